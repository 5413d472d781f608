//! The speed of work on files: merging against `cp`, comparing against `cat`, adapters, opening tables.
//!
//! `cargo bench -p trainable-tokens-format --bench files -- [--dir DIR] [--rounds N] [--keep]`
//!
//! Makes two checkpoints, one of a single file (1.9 GB) and one of three shards (1.6 GB), once in DIR (by default
//! `target/bench/files`); at most 6 GB lie there at a time, and all goes at the end unless `--keep` is given. Prints a JSON
//! line for each kind of work, of medians over N rounds (3) in which it alternates with what it is compared with:
//!
//! - `seconds`; `bytes` of the files concerned; `anon_mb`: the anonymous memory that it took at most, sampled.
//! - `cp_seconds`: `cp -r` of the same directory and `fsync` of every file, which merging does too;
//!   `cp_without_fsync_seconds`: `cp -r` alone; `over_cp`: the speed of the work over that of `cp` with `fsync`.
//! - `cat_seconds`: both files to `/dev/null`; `over_cat`.
//!
//! Everything is read from the page cache. Before merging, memory for two copies is taken and given back: where that cache
//! is full of other files, whoever writes has to wait for the system to find room, and either side may.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use trainable_tokens_core::{EmbeddingSource as _, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterConfig, BaseCheck, Checkpoint, CheckpointDiff, Extract, Merge, Overwrite, TokenIndices,
};

const TABLE: &str = "model.embed_tokens.weight";
const MODULE: &str = "model.embed_tokens";
const VOCAB_SIZE: usize = 256_000;
const DIM: usize = 1024;
/// Rows and columns of the other tensors: 128 MiB each.
const SIDE: usize = 8192;
const TOKENS: usize = 128;
const CONFIG: &str =
    r#"{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true, "vocab_size": 256000}"#;

fn main() {
    let options = Options::parse();
    let dir = &options.dir;
    let (single, sharded, small) = (dir.join("single"), dir.join("sharded"), dir.join("small"));
    make(&single, VOCAB_SIZE, 10, 10);
    make(&sharded, VOCAB_SIZE, 8, 4);
    make(&small, 32_000, 0, 0);

    let bench = Bench { options: &options };
    bench.open(&small, 32_000);
    bench.open(&single, VOCAB_SIZE);
    bench.adapters();
    let adapter = adapter_of(&Checkpoint::open(&single).unwrap(), false);
    bench.merge("merge, one file", &single, &adapter);
    bench.merge("merge, shards", &sharded, &adapter);
    let lora = adapter_of(&Checkpoint::open(&single).unwrap(), true);
    bench.merge("merge with LoRA of one tensor, one file", &single, &lora);
    bench.comparisons(&single, &adapter);
    if !options.keep {
        fs::remove_dir_all(dir).unwrap();
    }
}

struct Options {
    dir: PathBuf,
    rounds: usize,
    keep: bool,
}

impl Options {
    fn parse() -> Self {
        let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target");
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from(target), PathBuf::from);
        let mut options = Self {
            dir: target.join("bench/files"),
            rounds: 3,
            keep: false,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--dir" => options.dir = args.next().unwrap().into(),
                "--rounds" => options.rounds = args.next().unwrap().parse().unwrap(),
                "--keep" => options.keep = true,
                // Cargo adds it.
                "--bench" => {}
                other => panic!("unknown option {other}"),
            }
        }
        options
    }
}

/// What some work took.
struct Cost {
    seconds: f64,
    anon_mb: f64,
}

struct Bench<'a> {
    options: &'a Options,
}

impl Bench<'_> {
    fn merge(&self, what: &str, base: &Path, adapter: &Adapter) {
        let out = self.options.dir.join("out");
        let (mut ours, mut cp, mut unsynced) = (Vec::new(), Vec::new(), Vec::new());
        make_room(base);
        for _ in 0..self.options.rounds {
            self.settle();
            ours.push(measured(|| {
                let base = Checkpoint::open(base).unwrap();
                let merge = Merge::new(&base).base_check(BaseCheck::SameTable);
                let merge = merge.with("adapter", adapter).unwrap();
                merge.write(&out, Overwrite::Refuse).unwrap();
            }));
            fs::remove_dir_all(&out).unwrap();
            self.settle();
            let start = Instant::now();
            run(Command::new("cp").arg("-r").arg(base).arg(&out));
            unsynced.push(start.elapsed().as_secs_f64());
            for entry in fs::read_dir(&out).unwrap() {
                File::open(entry.unwrap().path()).unwrap().sync_all().unwrap();
            }
            File::open(&out).unwrap().sync_all().unwrap();
            cp.push(start.elapsed().as_secs_f64());
            fs::remove_dir_all(&out).unwrap();
        }
        let (seconds, cp) = (median(ours.iter().map(|cost| cost.seconds)), median(cp));
        report(
            what,
            &ours,
            json!({
                "bytes": size(base),
                "cp_seconds": cp,
                "cp_without_fsync_seconds": median(unsynced),
                "over_cp": cp / seconds,
            }),
        );
    }

    /// Waits until the disk has nothing more to do.
    fn settle(&self) {
        run(Command::new("sync").arg("-f").arg(&self.options.dir));
    }

    fn comparisons(&self, base: &Path, adapter: &Adapter) {
        let out = self.options.dir.join("out");
        let checkpoint = Checkpoint::open(base).unwrap();
        let merge = Merge::new(&checkpoint).with("adapter", adapter).unwrap();
        merge.write(&out, Overwrite::Refuse).unwrap();
        let file = |dir: &Path| dir.join("model.safetensors");
        let (mut extract, mut diff, mut cat) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.options.rounds {
            let start = Instant::now();
            run(Command::new("cat").arg(file(base)).arg(file(&out)));
            cat.push(start.elapsed().as_secs_f64());
            extract.push(measured(|| {
                let (base, tuned) = (Checkpoint::open(base).unwrap(), Checkpoint::open(&out).unwrap());
                let adapter = Extract::new(&base, &tuned).adapter().unwrap();
                assert_eq!(adapter.modules()[0].token_indices().len(), TOKENS);
            }));
            diff.push(measured(|| {
                let (a, b) = (Checkpoint::open(base).unwrap(), Checkpoint::open(&out).unwrap());
                let diff = CheckpointDiff::between(&a, &b).unwrap();
                assert_eq!(diff.tables[0].rows(&a, &b).unwrap().count(), TOKENS);
            }));
        }
        let (bytes, cat) = (size(base) + size(&out), median(cat));
        for (what, costs) in [("extract", extract), ("diff of models", diff)] {
            let seconds = median(costs.iter().map(|cost| cost.seconds));
            let more = json!({"bytes": bytes, "cat_seconds": cat, "over_cat": cat / seconds});
            report(what, &costs, more);
        }
        fs::remove_dir_all(&out).unwrap();
    }

    /// Saves and loads an adapter of 128 rows of 2304 numbers.
    fn adapters(&self) {
        const COLUMNS: usize = 2304;
        let dir = self.options.dir.join("adapter");
        let tokens = TokenSet::new((0..128).map(|id| id * 7), VOCAB_SIZE).unwrap();
        let rows = TokenRows::new(vec![0.5f32; TOKENS * COLUMNS], TOKENS, COLUMNS).unwrap();
        let adapter = Adapter::builder(MODULE, &tokens, rows)
            .tied("lm_head")
            .build()
            .unwrap();
        let (mut save, mut load) = (Vec::new(), Vec::new());
        for _ in 0..self.options.rounds * 5 {
            save.push(measured(|| adapter.write(&dir, Overwrite::Replace).unwrap()));
            load.push(measured(|| {
                let adapter = Adapter::read(&dir).unwrap();
                assert_eq!(adapter.modules().len(), 1);
            }));
        }
        let bytes = json!({"bytes": size(&dir)});
        report("save an adapter", &save, bytes.clone());
        report("load an adapter", &load, bytes);
        fs::remove_dir_all(&dir).unwrap();
    }

    /// Opens a table through its map and reads the rows of 128 tokens.
    fn open(&self, base: &Path, vocab_size: usize) {
        let ids = token_set(vocab_size);
        let costs = (0..self.options.rounds * 5).map(|_| {
            measured(|| {
                let table = Checkpoint::open(base).unwrap().table(TABLE).unwrap();
                assert_eq!(table.read_rows(ids.ids()).unwrap().num_rows(), TOKENS);
            })
        });
        let costs: Vec<_> = costs.collect();
        report(
            "open a table, read 128 rows",
            &costs,
            json!({"bytes": vocab_size * DIM * 2}),
        );
        let table = Checkpoint::open(base).unwrap().table(TABLE).unwrap();
        let costs: Vec<_> = (0..self.options.rounds)
            .map(|_| {
                measured(|| {
                    std::hint::black_box(table.digest());
                })
            })
            .collect();
        report(
            "digest of a table",
            &costs,
            json!({"bytes": vocab_size * DIM * 2}),
        );
    }
}

fn report(what: &str, costs: &[Cost], more: Value) {
    let mut line = Map::new();
    line.insert("what".to_owned(), what.into());
    line.insert(
        "seconds".to_owned(),
        median(costs.iter().map(|cost| cost.seconds)).into(),
    );
    let anon_mb = costs.iter().map(|cost| cost.anon_mb).fold(0.0, f64::max);
    line.insert("anon_mb".to_owned(), anon_mb.into());
    if let Value::Object(more) = more {
        line.extend(more);
    }
    println!("{}", Value::Object(line));
}

/// Runs some work, and watches the anonymous memory of the process.
fn measured(work: impl FnOnce()) -> Cost {
    let (before, done) = (anonymous(), AtomicBool::new(false));
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = anonymous();
            while !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(5));
                most = most.max(anonymous());
            }
            most
        });
        let start = Instant::now();
        work();
        let seconds = start.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        let most = watch.join().unwrap();
        Cost {
            seconds,
            anon_mb: (most - before).max(0.0),
        }
    })
}

/// Anonymous memory of the process in megabytes; 0 where the system does not tell.
fn anonymous() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kib.unwrap_or_default() * 1024.0 / 1e6
}

/// Makes free memory for two copies of the files in a directory, and has these in the page cache.
fn make_room(dir: &Path) {
    let bytes = usize::try_from(2 * size(dir)).unwrap();
    drop(std::hint::black_box(vec![1u8; bytes]));
    for entry in fs::read_dir(dir).unwrap() {
        run(Command::new("cat").arg(entry.unwrap().path()));
    }
}

fn run(command: &mut Command) {
    assert!(command.stdout(Stdio::null()).status().unwrap().success());
}

fn median(seconds: impl IntoIterator<Item = f64>) -> f64 {
    let mut seconds: Vec<_> = seconds.into_iter().collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// The bytes of the files in a directory.
fn size(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).unwrap();
    files.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// 128 tokens, spread over the vocabulary.
fn token_set(vocab_size: usize) -> TokenSet {
    let ids = (0..TOKENS).map(|slot| u32::try_from(slot * (vocab_size / TOKENS) + slot).unwrap());
    TokenSet::new(ids, vocab_size).unwrap()
}

/// New rows for 128 tokens, and weights of LoRA for one other tensor.
fn adapter_of(base: &Checkpoint, lora: bool) -> Adapter {
    const RANK: usize = 8;
    let table = base.table(TABLE).unwrap();
    let rows = TokenRows::new(vec![0.25f32; TOKENS * DIM], TOKENS, DIM).unwrap();
    let mut builder = Adapter::builder(MODULE, &token_set(VOCAB_SIZE), rows)
        .tied("lm_head")
        .base(table.digest(), table.dtype());
    if lora {
        let config = AdapterConfig::lora(&TokenIndices::ByModule(BTreeMap::new())).unwrap();
        let config = config.with_field("r", &RANK.into()).unwrap();
        let config = config.with_field("target_modules", &json!(["x0"])).unwrap();
        builder = builder.lora(config);
        for (factor, shape) in [("A", [RANK, SIDE]), ("B", [SIDE, RANK])] {
            let name = format!("base_model.model.model.x0.lora_{factor}.weight");
            let bytes = 0.01f32.to_le_bytes().repeat(RANK * SIDE);
            builder = builder.extra_tensor(name, Dtype::F32, shape, bytes);
        }
    }
    builder.build().unwrap()
}

/// Makes a checkpoint, if it is not there: the table in its first file, and other tensors in that or in shards.
fn make(dir: &Path, vocab_size: usize, others: usize, per_file: usize) {
    if dir.join("config.json").exists() {
        return;
    }
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).unwrap();
    let table = (TABLE.to_owned(), [vocab_size, DIM]);
    let mut tensors: Vec<_> = (0..others)
        .map(|number| (format!("model.x{number}.weight"), [SIDE, SIDE]))
        .collect();
    if others == per_file {
        tensors.insert(0, table);
        write_file(&dir.join("model.safetensors"), &tensors);
    } else {
        let mut map = Map::new();
        for (number, tensors) in std::iter::once(&[table][..])
            .chain(tensors.chunks(per_file))
            .enumerate()
        {
            let name = format!("model-{number}.safetensors");
            write_file(&dir.join(&name), tensors);
            map.extend(
                tensors
                    .iter()
                    .map(|(tensor, _)| (tensor.clone(), name.clone().into())),
            );
        }
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    fs::write(dir.join("config.json"), CONFIG).unwrap();
}

/// Writes tensors of bf16, of small numbers that differ, without holding them.
fn write_file(path: &Path, tensors: &[(String, [usize; 2])]) {
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape[0] * shape[1] * 2;
        let info = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(
        ' ',
        header.len().next_multiple_of(8) - header.len(),
    ));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut state = 1u64;
    let mut block = vec![0u8; 1 << 16];
    for at in (0..end).step_by(block.len()) {
        for pair in block.chunks_exact_mut(2) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let [.., low, high] = state.to_le_bytes();
            // Between 2^-7 and 2^-6, of either sign.
            pair.copy_from_slice(&[low, 0x3c | (high & 0x80)]);
        }
        let len = block.len().min(end - at);
        file.write_all(&block[..len]).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
}

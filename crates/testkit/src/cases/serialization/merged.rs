//! Adapters merged into copies of checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use trainable_tokens_core::{EmbeddingSource, ErrorKind, TokenId, TokenRows};
use trainable_tokens_format::{Checkpoint, Overwrite, RowReplacement, merge_checkpoint};

use super::{MODULE, adapter_of, checkpoint_of, framed, safetensors_of, tree, unframed, unpadded};
use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, noise, odd_values, whole};
use crate::{Failure, Harness, Layer, Outcome};

const FILE: &str = "model.safetensors";
const TABLE: &str = "model.embed_tokens.weight";
const HEAD_TABLE: &str = "lm_head.weight";

/// The rows of each table are replaced, rounded to its type, as the layer itself would merge them; all other bytes of
/// the file stay.
pub fn a_merged_checkpoint_differs_in_the_rows_alone<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        // A head with a table of its own, of another type and more rows.
        let head = noise(2, crate::cases::other_dtype(H::DTYPE), world.v + 1, world.d);
        let other = odd_values(3, H::DTYPE, 2, 2);
        let (home, dir) = checkpoint_of(&[(TABLE, &table), (HEAD_TABLE, &head), ("x", &other)])?;
        // Spaces in the header are bytes to keep, too.
        let bytes = fs::read(dir.join(FILE))?;
        let (header, data) = unframed(&bytes)?;
        let header = unpadded(header).0.replace("\"dtype\"", " \"dtype\"");
        fs::write(dir.join(FILE), framed(&header, data))?;

        let source = H::source(&table)?;
        let mut layer = Layer::<H>::with_rows(source, world.token_set()?, &world.rows::<H>())?;
        let base = Checkpoint::open(&dir)?;
        let replacements = adapter_of::<H>(&layer)?.replacements(&base)?;
        let out = home.path().join("out");
        let report = merge_checkpoint(&base, &replacements, &out, Overwrite::Refuse)?;
        equal("rows", &report.rows, &(2 * world.tokens.len()))?;

        let mut want = fs::read(dir.join(FILE))?;
        let start = want.len() - data.len();
        for name in [TABLE, HEAD_TABLE] {
            let table = base.table(name)?;
            let rows = world.rows::<H>().to_dtype(table.dtype()).to_le_bytes();
            let size = world.d * table.dtype().size_in_bytes();
            let offset = position(data, table.bytes()).ok_or("the case is wrong")?;
            for (id, row) in world.tokens.iter().zip(rows.chunks_exact(size)) {
                want[start + offset + *id as usize * size..][..size].copy_from_slice(row);
            }
        }
        ensure!(
            fs::read(out.join(FILE))? == want,
            "other bytes than those of the rows differ"
        );
        layer.merge()?;
        let merged = Checkpoint::open(&out)?.table(TABLE)?;
        let ids: Vec<_> = (0u32..).take(world.v).map(TokenId).collect();
        same("the merged table", &merged.read_rows(&ids)?, &whole::<H>(&layer)?)
    })
}

/// Where `part` starts in `whole`.
fn position(whole: &[u8], part: &[u8]) -> Option<usize> {
    whole.windows(part.len()).position(|window| window == part)
}

fn replacement(tensor: &str, ids: &[u32], rows: TokenRows) -> RowReplacement {
    RowReplacement {
        tensor: tensor.to_owned(),
        ids: ids.iter().copied().map(TokenId).collect(),
        rows,
    }
}

/// A row replaced twice, one that is not there, and an output that is the base, in it or around it are refused before
/// anything is written.
pub fn merges_that_would_harm_are_refused<H: Harness>() -> Outcome {
    let table = noise(1, H::DTYPE, 5, 3);
    let (home, dir) = checkpoint_of(&[(TABLE, &table), (HEAD_TABLE, &table)])?;
    fs::write(dir.join("config.json"), "{}")?;
    fs::write(home.path().join("config.json"), "{}")?;
    let before = tree(home.path())?;
    let base = Checkpoint::open(&dir)?;
    let merge = |replacements: &[RowReplacement], out: &Path| {
        merge_checkpoint(&base, replacements, out, Overwrite::Replace)
    };
    let rows = |k, d| noise(2, H::DTYPE, k, d);
    let out = home.path().join("out");
    let once = replacement(TABLE, &[4, 1], rows(2, 3));
    for (what, replacements, kind) in [
        (
            "a row twice",
            vec![replacement(TABLE, &[4, 1, 4], rows(3, 3))],
            ErrorKind::DuplicateToken,
        ),
        (
            "a row twice by two",
            vec![once.clone(), replacement(TABLE, &[0, 1], rows(2, 3))],
            ErrorKind::DuplicateToken,
        ),
        (
            "no such row",
            vec![replacement(TABLE, &[4, 5], rows(2, 3))],
            ErrorKind::TokenOutOfRange,
        ),
        (
            "rows too long",
            vec![replacement(TABLE, &[4, 1], rows(2, 4))],
            ErrorKind::Shape,
        ),
        (
            "a row too few",
            vec![replacement(TABLE, &[4, 1], rows(1, 3))],
            ErrorKind::Shape,
        ),
        (
            "no such table",
            vec![replacement("x", &[4, 1], rows(2, 3))],
            ErrorKind::File,
        ),
    ] {
        refused(what, merge(&replacements, &out), kind)?;
    }
    let change = [once.clone()];
    for target in [
        &dir,
        &dir.join("in"),
        &dir.join("in/side"),
        &dir.join("../base"),
        home.path(),
    ] {
        match merge(&change, target) {
            Err(trainable_tokens_format::Error::Target { .. }) => {}
            other => {
                return Err(Failure::new(format!(
                    "{} as output gives {other:?}",
                    target.display()
                )));
            }
        }
    }
    ensure!(tree(home.path())? == before, "a refused merge changed something");
    // The same ids of two tables are no repetition.
    let both = [once, replacement(HEAD_TABLE, &[4, 1], rows(2, 3))];
    equal("rows", &merge(&both, &out)?.rows, &4)
}

/// Shards without replaced rows stay as they are; other files are copied, but for hidden ones and weights in another
/// form.
pub fn files_without_rows_are_kept<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let home = tempfile::tempdir()?;
    let base = home.path().join("base");
    let write = |name: &str, content: &[u8]| -> Outcome {
        let path = base.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&base))?;
        Ok(fs::write(path, content)?)
    };
    let kept = [
        "config.json",
        "tokenizer.json",
        "README",
        "sub/notes.txt",
        "sub/index.json",
    ];
    let left_out = [
        "a.bin",
        "a.gguf",
        "a.h5",
        "a.msgpack",
        "a.onnx",
        "a.ot",
        "a.pt",
        "a.pth",
        "old.safetensors",
        "sub/a.bin",
    ];
    for name in kept
        .iter()
        .chain(&left_out)
        .chain(&[".hidden", ".git/config", "sub/.x"])
    {
        write(name, name.as_bytes())?;
    }
    write("config.json", b"{ }")?;
    let table = world.table::<H>();
    let adapter = adapter_of::<H>(&world.trained::<H>()?)?;
    let files = |names: &[&str]| {
        let mut paths: Vec<_> = names.iter().map(PathBuf::from).collect();
        paths.sort();
        paths
    };

    // Shards, of which one has the rows.
    write("1.safetensors", &safetensors_of(&[(TABLE, &table)])?)?;
    write("2.safetensors", &safetensors_of(&[("x", &table)])?)?;
    let index = format!(r#"{{"weight_map": {{"{TABLE}": "1.safetensors", "x": "2.safetensors"}}}}"#);
    write("model.safetensors.index.json", index.as_bytes())?;
    let checkpoint = Checkpoint::open(&base)?;
    let out = home.path().join("shards");
    let report = merge_checkpoint(
        &checkpoint,
        &adapter.replacements(&checkpoint)?,
        &out,
        Overwrite::Refuse,
    )?;
    equal("rewritten", &report.rewritten, &files(&["1.safetensors"]))?;
    equal("shared", &report.shared, &files(&["2.safetensors"]))?;
    equal("left out", &report.left_out, &files(&left_out))?;
    let copied = [&kept[..], &["model.safetensors.index.json"]].concat();
    equal("copied", &report.copied, &files(&copied))?;
    let written = tree(&out)?;
    let names: Vec<_> = written.iter().map(|(name, _)| name.clone()).collect();
    equal(
        "the output",
        &names,
        &files(&[&copied[..], &["1.safetensors", "2.safetensors"]].concat()),
    )?;
    for (name, content) in &written {
        let changed = *content != fs::read(base.join(name))?;
        equal(
            &format!("whether {} changed", name.display()),
            &changed,
            &(name == Path::new("1.safetensors")),
        )?;
    }
    equal("the module", &adapter.modules()[0].path(), &MODULE)?;

    // A single file, beside which index and shards are stale.
    write(FILE, &safetensors_of(&[(TABLE, &table)])?)?;
    let checkpoint = Checkpoint::open(&base)?;
    let out = home.path().join("single");
    let report = merge_checkpoint(
        &checkpoint,
        &adapter.replacements(&checkpoint)?,
        &out,
        Overwrite::Refuse,
    )?;
    let stale = ["1.safetensors", "2.safetensors", "model.safetensors.index.json"];
    equal(
        "left out",
        &report.left_out,
        &files(&[&left_out[..], &stale].concat()),
    )?;
    let names: Vec<_> = tree(&out)?.into_iter().map(|(name, _)| name).collect();
    equal("the output", &names, &files(&[&kept[..], &[FILE]].concat()))
}

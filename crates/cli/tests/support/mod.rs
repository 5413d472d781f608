//! What the tests of the command line share: running it, checking how it ended, and things to run it on.
#![allow(dead_code)] // each test file uses its part

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_trainable-tokens");
/// Far longer than any run takes: a run that hangs fails.
const LIMIT: Duration = Duration::from_secs(100);

/// Arguments of any sort of string.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { Vec::<std::ffi::OsString>::from([$(std::ffi::OsString::from(&$arg)),*]) };
}
pub(crate) use args;

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) what: String,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the program.
pub(crate) fn run(args: &[OsString]) -> Run {
    let mut command = assert_cmd::Command::new(PROGRAM);
    Run::of(args, &command.args(args).timeout(LIMIT).output().unwrap())
}

/// Runs the program where no file may grow beyond `kib` KiB: writing more fails, as on a full disk.
pub(crate) fn run_with_file_limit(kib: u32, args: &[OsString]) -> Run {
    let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
    let mut command = assert_cmd::Command::new("bash");
    command.arg("-c").arg(script).arg(PROGRAM).args(args);
    Run::of(args, &command.timeout(LIMIT).output().unwrap())
}

impl Run {
    pub(crate) fn of(args: &[OsString], output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Self {
            what: args
                .iter()
                .map(|arg| arg.to_string_lossy())
                .collect::<Vec<_>>()
                .join(" "),
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// Succeeded, and said nothing on standard error.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        assert_eq!(self.stderr, "", "{self:#?}");
        self
    }

    /// Standard output: one line with one JSON object.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let line = self.stdout.strip_suffix('\n').unwrap_or_default();
        assert!(!line.contains('\n'), "{self:#?}");
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:#?}"));
        assert!(value.is_object(), "{self:#?}");
        value
    }

    /// Failed with status 1 and one line on standard error that holds all of `parts`.
    #[track_caller]
    pub(crate) fn failed(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:#?}");
        let line = self.stderr.strip_suffix('\n').unwrap_or_default();
        assert!(line.starts_with("error: "), "{self:#?}");
        assert!(!line.contains(['\n', '\r']), "more than one line: {self:#?}");
        assert!(!line.contains("panicked"), "{self:#?}");
        for part in parts {
            assert!(line.contains(part), "no '{part}' in {self:#?}");
        }
    }

    /// Failed like [`failed`](Self::failed), with nothing on standard output.
    #[track_caller]
    pub(crate) fn refused(&self, parts: &[&str]) {
        self.failed(parts);
        assert_eq!(self.stdout, "", "{self:#?}");
    }

    /// Ended properly, one way or the other.
    #[track_caller]
    pub(crate) fn survived(&self) {
        match self.code {
            Some(0) => assert_eq!(self.stderr, "", "{self:#?}"),
            _ => self.failed(&[]),
        }
    }

    /// Ended with status 2: wrong usage.
    #[track_caller]
    pub(crate) fn misused(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(2), "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        assert!(
            self.stderr.contains("--help") && self.stderr.lines().count() > 1,
            "{self:#?}"
        );
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        for part in parts {
            assert!(self.stderr.contains(part), "no '{part}' in {self:#?}");
        }
    }
}

/// One of PEFT's cases.
pub(crate) fn fixture(name: &str) -> PathBuf {
    let all = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/peft");
    fs::canonicalize(all).unwrap().join(name)
}

/// A file of the demo.
pub(crate) fn demo(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/demo")).join(name)
}

/// What `eval` reports of a model.
#[track_caller]
pub(crate) fn eval(model: &Path, adapter: Option<&Path>, data: &Path, more: &[&str]) -> Value {
    let mut args = args!["eval", "--json", "--model", model, "--data", data];
    args.extend(
        adapter
            .into_iter()
            .flat_map(|adapter| args!["--adapter", adapter]),
    );
    args.extend(more.iter().map(Into::into));
    run(&args).ok().json()
}

/// The loss of such a report.
#[track_caller]
pub(crate) fn loss(report: &Value) -> f64 {
    report["loss"].as_f64().unwrap()
}

/// The options beside an adapter train the same adapter again.
#[track_caller]
pub(crate) fn trains_again(adapter: &Path, again: &Path) {
    run(&args![
        "train",
        "--config",
        adapter.join("train_config.toml"),
        "--out",
        again
    ])
    .ok();
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        let bytes = |dir: &Path| fs::read(dir.join(name)).unwrap();
        assert!(bytes(adapter) == bytes(again), "{name} differs");
    }
}

/// A small encoder of transformers.
pub(crate) fn encoder(name: &str) -> PathBuf {
    let all = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/transformers/encoders"
    );
    fs::canonicalize(all).unwrap().join(name)
}

/// One of PEFT's whole-model cases, opened.
pub(crate) struct Case {
    pub(crate) dir: PathBuf,
    pub(crate) json: Value,
    pub(crate) expected: HashMap<String, Tensor>,
}

impl Case {
    pub(crate) fn open(name: &str) -> Self {
        let dir = fixture(name);
        Self {
            json: read_json(&dir.join("case.json")),
            expected: candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap(),
            dir,
        }
    }

    /// The ids that train, as the command line takes them.
    pub(crate) fn token_ids(&self) -> String {
        let ids = self.json["token_indices"].as_array().unwrap();
        ids.iter().map(Value::to_string).collect::<Vec<_>>().join(",")
    }

    /// Operations of some kinds.
    pub(crate) fn operations<'a>(&'a self, kinds: &'a [&str]) -> impl Iterator<Item = &'a Value> {
        let all = self.json["operations"].as_array().unwrap().iter();
        all.filter(|operation| kinds.contains(&operation["op"].as_str().unwrap()))
    }

    /// An expected tensor of floats, flat.
    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        self.expected[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// An expected tensor of integers, as rows of its last dimension.
    pub(crate) fn integers(&self, name: &str) -> Vec<Vec<i64>> {
        let tensor = &self.expected[name];
        let length = tensor.dims().last().unwrap();
        tensor.reshape(((), *length)).unwrap().to_vec2().unwrap()
    }

    /// Writes the training batches as JSON Lines.
    pub(crate) fn write_batches(&self, path: &Path) {
        let (ids, labels) = (self.integers("batch.input_ids"), self.integers("batch.labels"));
        let lines = ids
            .iter()
            .zip(&labels)
            .map(|(ids, labels)| json!({"input_ids": ids, "labels": labels}));
        fs::write(
            path,
            lines.fold(String::new(), |text, line| text + &format!("{line}\n")),
        )
        .unwrap();
    }
}

/// A small model with tokenizer, an adapter for it, data and ids, all valid, in a directory of their own.
pub(crate) struct Workspace {
    root: TempDir,
}

/// Every command, on the things of a [`Workspace`].
pub(crate) const COMMANDS: [&str; 12] = [
    "train",
    "eval",
    "forward",
    "generate",
    "init",
    "merge",
    "verify",
    "inspect model",
    "inspect adapter",
    "inspect file",
    "extract",
    "diff",
];
/// Those that read the model's directory as a model.
pub(crate) const WITH_MODEL: [&str; 11] = [
    "train",
    "eval",
    "forward",
    "generate",
    "init",
    "merge",
    "verify",
    "inspect model",
    "inspect adapter",
    "extract",
    "diff",
];
/// Those that need its `config.json`.
pub(crate) const WITH_CONFIG: [&str; 6] = ["train", "eval", "forward", "generate", "init", "inspect model"];
/// Those that run it.
pub(crate) const WITH_DECODER: [&str; 4] = ["train", "eval", "forward", "generate"];
/// Those that read the adapter.
pub(crate) const WITH_ADAPTER: [&str; 6] = [
    "eval",
    "forward",
    "generate",
    "merge",
    "verify",
    "inspect adapter",
];
/// Those that read data.
pub(crate) const WITH_DATA: [&str; 2] = ["train", "eval"];
/// Those that write something.
pub(crate) const WITH_OUTPUT: [&str; 5] = ["train", "forward", "init", "merge", "extract"];

impl Workspace {
    pub(crate) fn new() -> Self {
        let workspace = Self {
            root: tempfile::tempdir().unwrap(),
        };
        copy_dir(&fixture("llama_untied/base"), &workspace.model());
        copy_dir(&fixture("llama_untied/adapter"), &workspace.adapter());
        copy_dir(&fixture("llama_untied/merged"), &workspace.tuned());
        let lines = [[1, 299, 12, 40, 297, 298], [7, 298, 299, 12, 60, 2]];
        let text = lines.iter().fold(String::new(), |mut text, ids| {
            writeln!(text, "{}", json!({"input_ids": ids})).unwrap();
            text
        });
        fs::write(workspace.data(), text).unwrap();
        fs::write(workspace.ids(), "[[1, 299, 12], [297, 5, 298]]").unwrap();
        workspace
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(crate) fn model(&self) -> PathBuf {
        self.path("model")
    }

    pub(crate) fn adapter(&self) -> PathBuf {
        self.path("adapter")
    }

    /// The model with the adapter merged, by PEFT.
    pub(crate) fn tuned(&self) -> PathBuf {
        self.path("tuned")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path("data.jsonl")
    }

    pub(crate) fn ids(&self) -> PathBuf {
        self.path("ids.json")
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// A command on the things of this workspace, which succeeds while they are as they were.
    pub(crate) fn command(&self, name: &str) -> Vec<OsString> {
        let (model, adapter, data, ids, out) =
            (self.model(), self.adapter(), self.data(), self.ids(), self.out());
        match name {
            "train" => {
                args![
                    "train",
                    "--model",
                    model,
                    "--data",
                    data,
                    "--token-ids",
                    "299,12",
                    "--batch-size",
                    "2",
                    "--out",
                    out
                ]
            }
            "eval" => args!["eval", "--model", model, "--adapter", adapter, "--data", data],
            "forward" => {
                args![
                    "forward",
                    "--model",
                    model,
                    "--adapter",
                    adapter,
                    "--input-ids",
                    ids,
                    "--out",
                    out
                ]
            }
            "generate" => {
                args![
                    "generate",
                    "--model",
                    model,
                    "--adapter",
                    adapter,
                    "--prompt-ids",
                    "1,299,12,40",
                ]
            }
            "init" => args!["init", "--model", model, "--token-ids", "299,12", "--out", out],
            "merge" => args!["merge", "--model", model, "--adapter", adapter, "--out", out],
            "verify" => args!["verify", "--model", model, "--adapter", adapter],
            "extract" => args!["extract", "--base", model, "--tuned", self.tuned(), "--out", out],
            "diff" => args!["diff", model, self.tuned()],
            "inspect model" => args!["inspect", model],
            "inspect adapter" => args!["inspect", adapter, "--model", model],
            "inspect file" => args!["inspect", model.join("model.safetensors")],
            other => panic!("{other}"),
        }
    }

    /// A command with more arguments.
    pub(crate) fn command_with(&self, name: &str, more: &[&str]) -> Vec<OsString> {
        let mut args = self.command(name);
        args.extend(more.iter().map(OsString::from));
        args
    }

    /// Every file and directory, with contents.
    pub(crate) fn snapshot(&self) -> Snapshot {
        snapshot(self.root.path())
    }

    /// Runs arguments that must be refused, and leave everything as it was.
    #[track_caller]
    pub(crate) fn refuses(&self, args: &[OsString], parts: &[&str]) {
        let before = self.snapshot();
        run(args).refused(parts);
        self.unchanged(&before, args);
    }

    /// Everything is as it was.
    #[track_caller]
    pub(crate) fn unchanged(&self, before: &Snapshot, args: &[OsString]) {
        let after = self.snapshot();
        let names = |a: &Snapshot, b: &Snapshot| {
            let differ = a.iter().filter(|(path, content)| b.get(*path) != Some(content));
            differ.map(|(path, _)| path.clone()).collect::<Vec<_>>()
        };
        let differ = (names(&after, before), names(before, &after));
        assert!(
            differ.0.is_empty() && differ.1.is_empty(),
            "{args:?} changed {differ:?}"
        );
    }
}

/// Paths and contents; no content for a directory.
pub(crate) type Snapshot = BTreeMap<PathBuf, Option<Vec<u8>>>;

pub(crate) fn snapshot(dir: &Path) -> Snapshot {
    let mut found = Snapshot::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(snapshot(&path));
            found.insert(path, None);
        } else {
            found.insert(path.clone(), Some(fs::read(&path).unwrap()));
        }
    }
    found
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The objects of a JSON Lines file.
pub(crate) fn read_json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Changes a JSON file.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Tensors of a file: name, then element type, shape and bytes.
pub(crate) type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of all safetensors files of a directory.
pub(crate) fn checkpoint_tensors(dir: &Path) -> Tensors {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    let tensors: Vec<_> = files.flat_map(|path| read_tensors(&path)).collect();
    let count = tensors.len();
    let tensors: Tensors = tensors.into_iter().collect();
    assert_eq!(tensors.len(), count, "a tensor twice in {}", dir.display());
    tensors
}

pub(crate) fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect()
}

/// Writes tensors, without metadata.
pub(crate) fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap();
        (name, view)
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    // A new file: the old one may be a hard link to something else.
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}

/// Changes the tensors of a file.
pub(crate) fn edit_tensors(path: &Path, edit: impl FnOnce(&mut Tensors)) {
    let mut tensors = read_tensors(path);
    edit(&mut tensors);
    write_tensors(path, &tensors);
}

/// A tensor of F32 of a file, flat.
pub(crate) fn floats_of(tensors: &Tensors, name: &str) -> Vec<f32> {
    let (dtype, _, bytes) = &tensors[name];
    assert_eq!(*dtype, safetensors::Dtype::F32, "{name}");
    bytes
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// Compares within tolerances; with none, bit for bit.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], atol: f64, rtol: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        let exact = atol == 0.0 && rtol == 0.0;
        let close = if exact {
            got.to_bits() == want.to_bits()
        } else {
            f64::from((got - want).abs()) <= atol + rtol * f64::from(want.abs())
        };
        assert!(close, "{what}: element {index}: got {got}, want {want}");
    }
}

//! Training runs that are interrupted by signals, or killed: nothing that was saved is lost, and a resumed run is the run.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]
#![cfg(unix)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{PROGRAM, args, fixture, read_json_lines, run};
use tempfile::TempDir;
use trainable_tokens_format::{Adapter, TrainingState};

/// Data for a small model, and runs on it.
struct Runs {
    home: TempDir,
}

impl Runs {
    fn new() -> Self {
        let runs = Self {
            home: tempfile::tempdir().unwrap(),
        };
        let lines = |from: u32, count: u32| -> String {
            let ids = (from..from + count).map(|i| [1, 4 + i * 7 % 290, 12, 298, 5 + i * 13 % 280, 40]);
            let lines: Vec<String> = ids.map(|ids| json!({"input_ids": ids}).to_string()).collect();
            lines.join("\n")
        };
        fs::write(runs.path("train.jsonl"), lines(0, 22)).unwrap();
        fs::write(runs.path("eval.jsonl"), lines(100, 4)).unwrap();
        runs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// A run with all that a resumed run has to remember.
    fn args(&self, out: &str, more: &[&str]) -> Vec<OsString> {
        let mut args = args![
            "train",
            "--model",
            fixture("llama_untied/base"),
            "--data",
            self.path("train.jsonl"),
            "--token-ids",
            "12,298,40",
            "--batch-size",
            "2",
            "--accumulate",
            "2",
            "--shuffle",
            "--seed",
            "3",
            "--lr",
            "0.03",
            "--warmup-steps",
            "4",
            "--max-grad-norm",
            "1",
            "--weight-decay",
            "0.1",
            "--decay-toward",
            "original",
            "--token-lr",
            "40=0.1",
            "--eval-data",
            self.path("eval.jsonl"),
            "--eval-every",
            "3",
            "--keep-best",
            "--early-stopping-patience",
            "1000",
            "--metrics",
            self.path(&format!("{out}.jsonl")),
            "--out",
            self.path(out),
        ];
        args.extend(more.iter().map(OsString::from));
        args
    }

    fn start(&self, args: &[OsString]) -> Child {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(self.home.path());
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits until the metrics of a run have some lines.
    fn wait_for_lines(&self, out: &str, lines: usize) {
        let started = Instant::now();
        let path = self.path(&format!("{out}.jsonl"));
        while fs::read_to_string(&path).unwrap_or_default().lines().count() < lines || !path.exists() {
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "{out} does not start"
            );
            sleep(Duration::from_millis(2));
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// What the metrics of a run say of its steps, without what time and memory they took.
fn steps(path: &Path) -> Vec<Value> {
    let lines = read_json_lines(path).into_iter();
    let mut steps: Vec<Value> = lines.filter(|line| line.get("summary").is_none()).collect();
    for step in &mut steps {
        for measured in ["seconds", "peak_rss_bytes"] {
            step.as_object_mut().unwrap().remove(measured);
        }
    }
    steps
}

/// The adapter's rows and its config.
fn adapter_files(dir: &Path) -> [Vec<u8>; 2] {
    ["adapter_model.safetensors", "adapter_config.json"].map(|file| fs::read(dir.join(file)).unwrap())
}

/// The adapter in a directory loads, and so do the best one in it and the state beside it; the steps taken.
fn loads(dir: &Path) -> u64 {
    for dir in [dir, &dir.join("best")] {
        let adapter = Adapter::read(dir).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(adapter.rows("model.embed_tokens").unwrap().num_rows(), 3);
    }
    let state = dir.join(TrainingState::FILE_NAME);
    TrainingState::read(state)
        .unwrap_or_else(|error| panic!("{error}"))
        .optimizer
        .step
}

#[test]
fn a_signal_ends_a_run_that_can_be_resumed() {
    for (name, sent) in [("int", Signal::SIGINT), ("term", Signal::SIGTERM)] {
        let runs = Runs::new();
        let child = runs.start(&runs.args(name, &["--steps", "100000", "--json"]));
        runs.wait_for_lines(name, 5);
        signal(&child, sent);
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output().unwrap();
        assert_eq!(status.code(), Some(130), "{}", String::from_utf8_lossy(&stderr));
        let stderr = String::from_utf8(stderr).unwrap();
        let last = stderr.lines().last().unwrap();
        assert!(
            last.starts_with("error: interrupted after step ") && last.contains("--resume"),
            "{stderr}"
        );

        let metrics = runs.path(&format!("{name}.jsonl"));
        let lines = read_json_lines(&metrics);
        let summary = &lines.last().unwrap()["summary"];
        let printed: Value = serde_json::from_slice(&stdout).unwrap();
        assert_eq!(printed, *summary);
        assert_eq!(summary["end"], "interrupted");
        let step = summary["steps"].as_u64().unwrap();
        assert_eq!(lines.len() as u64, step + 1);
        assert_eq!(
            (loads(&runs.path(name)), &summary["kept_step"]),
            (step, &json!(step))
        );
        Adapter::read(runs.path(name).join("best")).unwrap();

        let total = (step + 4).to_string();
        let (out, steps) = (runs.path(name), ["--steps", total.as_str()]);
        run(&[runs.args(name, &steps), args!["--resume", out]].concat()).ok();
        run(&runs.args("straight", &steps)).ok();
        assert!(
            adapter_files(&out) == adapter_files(&runs.path("straight")),
            "after {step} steps"
        );
        assert_eq!(self::steps(&metrics), self::steps(&runs.path("straight.jsonl")));
        assert!(!out.join("best").exists());
    }
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let runs = Runs::new();
    // A step that takes far longer than the test waits.
    let args = runs.args("out", &["--steps", "2"]);
    let at = args.iter().position(|arg| arg == "--accumulate").unwrap();
    let args = [&args[..at], &args!["--accumulate", "8000"], &args[at + 2..]].concat();
    let mut child = runs.start(&args);
    runs.wait_for_lines("out", 0);
    sleep(Duration::from_millis(300));
    signal(&child, Signal::SIGINT);
    sleep(Duration::from_millis(300));
    assert!(
        child.try_wait().unwrap().is_none(),
        "the step goes on after the first"
    );
    signal(&child, Signal::SIGINT);
    let sent = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
    assert!(!runs.path("out").exists());
    assert_eq!(fs::read(runs.path("out.jsonl")).unwrap(), b"");
}

/// Numbers for moments.
struct Moments(u64);

impl Moments {
    /// A moment within `span`.
    fn next(&mut self, span: Duration) -> Duration {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        span.mul_f64(f64::from(u32::try_from(self.0 >> 33).unwrap()) / f64::from(1u32 << 31))
    }
}

#[test]
fn whatever_kills_a_run_it_goes_on_as_if_nothing_had_been() {
    const KILLS: usize = 30;
    let runs = Runs::new();
    let more = ["--steps", "16", "--save-every", "1", "--schedule", "cosine"];
    let started = Instant::now();
    run(&runs.args("straight", &more)).ok();
    let whole = started.elapsed();
    let (want, steps_of_all) = (
        adapter_files(&runs.path("straight")),
        steps(&runs.path("straight.jsonl")),
    );
    assert_eq!(steps_of_all.len(), 16);

    let mut moments = Moments(7);
    let (mut kills, mut with_adapter, mut most) = (0, 0, 0);
    for attempt in 0.. {
        let name = format!("run{attempt}");
        let out = runs.path(&name);
        let ended = loop {
            let mut args = runs.args(&name, &more);
            if out.exists() {
                args.extend(args!["--resume", out]);
            } else {
                // A metrics file without an adapter is what a run leaves that was killed before it saved.
                args.push("--force".into());
            }
            let mut child = runs.start(&args);
            if kills < KILLS {
                sleep(moments.next(whole));
                child.kill().unwrap();
            }
            let ended = child.wait_with_output().unwrap();
            if ended.status.signal().is_none() {
                break ended;
            }
            kills += 1;
            if out.exists() && out.join(TrainingState::FILE_NAME).exists() {
                most = most.max(loads(&out));
                with_adapter += 1;
            } else if out.exists() {
                // Killed between the end and its exit.
                Adapter::read(&out).unwrap();
                break ended;
            }
        };
        assert!(
            ended.status.success() || ended.status.signal().is_some(),
            "{}",
            String::from_utf8_lossy(&ended.stderr)
        );
        assert!(adapter_files(&out) == want, "{name} differs");
        if ended.status.success() {
            assert_eq!(steps(&runs.path(&format!("{name}.jsonl"))), steps_of_all);
        }
        if kills >= KILLS {
            break;
        }
    }
    assert!(
        with_adapter >= KILLS / 3,
        "{with_adapter} of {kills} kills found an adapter"
    );
    assert!(most > 5, "no run came further than step {most}");
}

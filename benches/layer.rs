//! A training step of an embedding beside the frozen lookup of the same framework, in one process: for tables of figures,
//! in which each process measures one case. `benches/run.sh` runs it beside PEFT.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench layer -- --backend candle --vocab-size 256000`
//!
//! Prints a line of JSON: medians of milliseconds, and the peak of anonymous memory above the level before the layer was
//! made.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod support;

use std::hint::black_box;

use half::{bf16, f16};
use serde_json::json;
use support::memory::Peak;
use support::{Case, Laps, Workload, burn, candle, dfdx, ndarray};

/// What was measured of a case.
struct Measured {
    /// Milliseconds of the frozen lookup, and of the three parts of a step.
    medians: [f64; 4],
    total: f64,
    extra_bytes: u64,
}

/// Steps during which memory is watched, before those that are timed.
const WATCHED: usize = 3;

/// `make` makes the layer, over a table that was made before.
fn measure<C: Case>(rounds: usize, make: impl FnOnce() -> C) -> Measured {
    let peak = Peak::watch();
    let mut case = make();
    for _ in 0..WATCHED {
        drop(case.step(&mut Laps::start()));
    }
    let extra_bytes = peak.stop();
    drop(case.frozen());
    let mut times: [Vec<f64>; 5] = Default::default();
    for _ in 0..rounds {
        let mut laps = Laps::start();
        let rows = black_box(case.frozen());
        laps.lap();
        drop(rows);
        let frozen = laps.milliseconds;
        let mut laps = Laps::start();
        let rows = black_box(case.step(&mut laps));
        drop(rows);
        let total = laps.milliseconds.iter().sum();
        let all = frozen.into_iter().chain(laps.milliseconds).chain([total]);
        times
            .iter_mut()
            .zip(all)
            .for_each(|(times, time)| times.push(time));
    }
    let [frozen, forward, backward, optimizer, total] = times.map(median);
    Measured {
        medians: [frozen, forward, backward, optimizer],
        total,
        extra_bytes,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the command line asks for.
struct Options {
    backends: Vec<String>,
    dtype: String,
    rounds: usize,
    workload: Workload,
}

const BACKENDS: [&str; 5] = ["ndarray", "ndarray-reused", "candle", "burn", "dfdx"];

impl Options {
    /// Pairs of a name and a value; cargo's own `--bench` has none.
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            backends: BACKENDS.map(str::to_owned).to_vec(),
            dtype: "f32".to_owned(),
            rounds: 5,
            workload: Workload::of(32_000),
        };
        let mut args = args.filter(|arg| arg != "--bench");
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            let number = || match value.parse() {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(format!("{name}: {value} is no number above 0")),
            };
            match name.as_str() {
                "--backend" if BACKENDS.contains(&value.as_str()) => options.backends = vec![value],
                "--dtype" if ["f32", "f16", "bf16"].contains(&value.as_str()) => options.dtype = value,
                "--rounds" => options.rounds = number()?,
                "--vocab-size" => options.workload.vocab_size = number()?,
                "--dim" => options.workload.dim = number()?,
                "--tokens" => options.workload.tokens = number()?,
                "--rows" => options.workload.rows = number()?,
                _ => return Err(format!("{name} {value} is not understood")),
            }
        }
        Ok(options)
    }
}

fn run(backend: &str, options: &Options) -> Option<Measured> {
    let (workload, rounds) = (options.workload, options.rounds);
    macro_rules! each_dtype {
        ($case:path) => {
            match options.dtype.as_str() {
                "f16" => measure(rounds, $case(workload, f16::ZERO)),
                "bf16" => measure(rounds, $case(workload, bf16::ZERO)),
                _ => measure(rounds, $case(workload, 0f32)),
            }
        };
    }
    Some(match (backend, options.dtype.as_str()) {
        ("ndarray", _) => each_dtype!(ndarray::fresh),
        ("ndarray-reused", _) => each_dtype!(ndarray::reused),
        ("candle", _) => each_dtype!(candle::case),
        ("burn", _) => each_dtype!(burn::case),
        ("dfdx", "f32") => measure(rounds, dfdx::case(workload, 0f32)),
        ("dfdx", "f16") => measure(rounds, dfdx::case(workload, f16::ZERO)),
        // dfdx has no bfloat16.
        _ => return None,
    })
}

fn main() {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("layer: {error}");
            std::process::exit(2);
        }
    };
    for backend in &options.backends {
        let Some(measured) = run(backend, &options) else {
            eprintln!("layer: {backend} has no {}", options.dtype);
            std::process::exit(3);
        };
        let [frozen, forward, backward, optimizer] = measured.medians;
        let Workload {
            vocab_size,
            dim,
            tokens,
            rows,
        } = options.workload;
        let line = json!({
            "backend": backend, "v": vocab_size, "d": dim, "n": tokens, "k": rows, "dtype": options.dtype,
            "rounds": options.rounds,
            "frozen_ms": frozen, "forward_ms": forward, "forward_over_frozen": forward / frozen,
            "backward_ms": backward, "optimizer_ms": optimizer, "total_ms": measured.total,
            "extra_mb": measured.extra_bytes as f64 / f64::from(1 << 20),
        });
        println!("{line}");
    }
}

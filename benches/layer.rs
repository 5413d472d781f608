//! A training step of an embedding beside the frozen lookup of the same framework, in one process: for tables of figures,
//! in which each process measures one case. `benches/run.sh` runs it beside PEFT.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench layer -- --backend candle --vocab-size 256000`
//!
//! Prints a line of JSON: medians of milliseconds, and the peak of anonymous memory, or of a GPU's memory, above the level
//! before the layer was made.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod support;

use std::hint::black_box;

use candle_core::Device;
use half::{bf16, f16};
use serde_json::json;
#[cfg(feature = "burn")]
use support::burn;
#[cfg(feature = "dfdx")]
use support::dfdx;
use support::memory::Peak;
#[cfg(feature = "ndarray")]
use support::ndarray;
use support::{Case, Laps, Workload, candle};

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
fn measure<C: Case>(rounds: usize, device: &Device, make: impl FnOnce() -> C) -> Measured {
    let peak = Peak::watch(device);
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
    device: Device,
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
            device: Device::Cpu,
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
                "--device" if value == "cpu" => options.device = Device::Cpu,
                "--device" if value == "cuda" => {
                    options.device = Device::new_cuda(0).map_err(|error| error.to_string())?;
                    options.backends = vec!["candle".to_owned()];
                }
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
    let (workload, rounds, device) = (options.workload, options.rounds, &options.device);
    macro_rules! each_dtype {
        ($case:path $(, $device:expr)?) => {
            match options.dtype.as_str() {
                "f16" => measure(rounds, device, $case(workload, f16::ZERO $(, $device)?)),
                "bf16" => measure(rounds, device, $case(workload, bf16::ZERO $(, $device)?)),
                _ => measure(rounds, device, $case(workload, 0f32 $(, $device)?)),
            }
        };
    }
    Some(match (backend, options.dtype.as_str()) {
        #[cfg(feature = "ndarray")]
        ("ndarray", _) => each_dtype!(ndarray::fresh),
        #[cfg(feature = "ndarray")]
        ("ndarray-reused", _) => each_dtype!(ndarray::reused),
        ("candle", _) => each_dtype!(candle::case, device),
        #[cfg(feature = "burn")]
        ("burn", _) => each_dtype!(burn::case),
        #[cfg(feature = "dfdx")]
        ("dfdx", "f32") => measure(rounds, device, dfdx::case(workload, 0f32)),
        #[cfg(feature = "dfdx")]
        ("dfdx", "f16") => measure(rounds, device, dfdx::case(workload, f16::ZERO)),
        // dfdx has no bfloat16, or the backend was not built.
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
            eprintln!("layer: {backend} has no {}, or its feature is off", options.dtype);
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

//! What the benches of embeddings share: an embedding in each framework, and time and memory.
#![allow(dead_code, clippy::unwrap_used)]

#[cfg(feature = "burn")]
pub(crate) mod burn;
pub(crate) mod candle;
#[cfg(feature = "dfdx")]
pub(crate) mod dfdx;
pub(crate) mod memory;
#[cfg(feature = "ndarray")]
pub(crate) mod ndarray;
pub(crate) mod workload;

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion};

pub(crate) use workload::Workload;

/// An embedding in a framework, with the framework's frozen lookup beside it.
pub(crate) trait Case {
    /// What a lookup returns.
    type Rows;
    /// The framework's own lookup of the batch.
    fn frozen(&mut self) -> Self::Rows;
    /// The lookup with trained rows.
    fn lookup(&mut self) -> Self::Rows;
    /// A step of training: the lookup with trained rows, the backward pass, the optimizer; a lap after each.
    fn step(&mut self, laps: &mut Laps) -> Self::Rows;
}

/// A group of which each member takes about two seconds.
pub(crate) fn quick<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500));
    group
}

/// Where a step's time goes.
pub(crate) struct Laps {
    last: Instant,
    /// Of each lap.
    pub(crate) milliseconds: Vec<f64>,
}

impl Laps {
    pub(crate) fn start() -> Self {
        Self {
            last: Instant::now(),
            milliseconds: Vec::new(),
        }
    }

    pub(crate) fn lap(&mut self) {
        let now = Instant::now();
        self.milliseconds.push((now - self.last).as_secs_f64() * 1e3);
        self.last = now;
    }
}

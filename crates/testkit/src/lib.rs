//! Is this backend one? The conformance kit of `trainable-tokens`.
//!
//! A backend says how its framework makes values, reads them and runs a backward pass ([`Harness`]); the kit does the
//! rest: cases in fifteen groups, each citing the clauses of `SPEC.md` that it checks, most of them properties over
//! random tables, token sets and batches. What comes out is compared with the dense definition of the method: write
//! the rows into a copy of the table, then index it; take the whole table's gradient, then its chosen rows. Copies are
//! compared bit for bit, arithmetic within one [`tolerance`] per element type.
//!
//! A backend's whole `tests/conformance.rs` is its harness and one call:
//!
//! ```text
//! conformance_tests! { f32: MyHarness<f32>, f64: MyHarness<f64> }
//! ```
//!
//! The list of cases is the kit's: a new case reaches every backend with the next version of the kit. Failed properties
//! print a seed; `TRAINABLE_TOKENS_SEED=<seed>` repeats their inputs.
//!
//! With the same harness the module [`peft`] holds a backend to results of PEFT itself ([`peft_tests!`]), and
//! [`vectors`] to the golden vectors of the specification.

mod allocation;
mod case;
pub mod cases;
mod failure;
mod harness;
pub mod peft;
pub mod vectors;
mod world;

pub use allocation::{Allocated, CountingAllocator, allocated};
pub use case::{CITATIONS, Case, Group, cases as all_cases, run_case};
pub use failure::{Failure, Outcome, tolerance};
pub use harness::{
    Error, Gradients, Harness, HeadPass, Layer, LossPass, Pass, PassGradients, Source, Tensor,
};

//! Golden cases that PEFT itself made, run on any backend.
//!
//! [`run_case`] runs one case of `tests/fixtures/peft`: every operation that its `case.json` lists, with the inputs,
//! the results and the tolerances recorded there (`atol` and `rtol` of 0 mean equal bits). An operation, an option of
//! the module, a loss or an optimizer that the runner does not know is a failure, never skipped.
//! [`peft_tests!`](crate::peft_tests) makes a test of each of the [`CASES`].
//!
//! # What is checked beyond the operations
//!
//! - Lookups change neither the table nor the rows, merging and unmerging other rows before changes no result.
//! - With rows of their own and with the table's, a new layer is the same no-op.
//! - In a trajectory, the optimizer alone follows PEFT's rows if fed with PEFT's gradients: `f32` rows within 2e-6, rows
//!   of a half type within the case's tolerance.
//! - PEFT's plain module (`embed.base`, where recorded) is the layer without any trainable token.
//!
//! # What PEFT refuses
//!
//! Two things fail in PEFT and work here: the forward pass with no trainable token (`variant_k0`) and the backward pass
//! of a module with `sparse=True` (`variant_sparse`; sparse is only the layout of torch's gradient of the table). Where
//! `case.json` records such an error, the runner asks for the result of the dense definition instead: rows of the
//! overwritten table bit for bit, sums of the upstream gradient within the kit's [`tolerance`](crate::tolerance).
//!
//! # A framework without the type
//!
//! A case of a half type also runs on a harness for `f32` (and any case on one for `f64`). Table, rows and inputs are
//! widened, which is exact, and results are rounded to the case's type before they are compared. For lookups and merges
//! nothing is lost: a row is rounded to the table's type once, then or before. Gradients come from the very same
//! upstream gradients; for a loss that depends on the output, the output is rounded first. Only rows that PEFT trained
//! in the half type itself (`standalone_bf16_noautocast`) train in the wider type instead, within the case's tolerance.

mod compare;
mod fixture;
mod operations;
mod optimizer;
mod trajectory;

use std::path::{Path, PathBuf};

pub use fixture::Fixture;
pub use optimizer::optimizer;
use trainable_tokens_core::DType;

use crate::Harness;

/// Where the cases lie in this repository.
pub fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/peft"))
}

/// The element type of the table of the case in `dir`.
///
/// # Errors
///
/// The reason why the case cannot be read.
pub fn dtype(dir: &Path) -> Result<DType, String> {
    let fixture = Fixture::open(dir).map_err(|failure| format!("{}: {}", dir.display(), failure.reason()))?;
    Ok(fixture.table().dtype())
}

/// Runs the case in `dir`.
///
/// # Errors
///
/// The reason why it fails, with the case, the operation, and the first element that differs.
pub fn run_case<H: Harness>(dir: &Path) -> Result<(), String> {
    Fixture::open(dir)
        .and_then(|fixture| operations::run_all::<H>(&fixture))
        .map_err(|failure| {
            let name = dir.file_name().unwrap_or(dir.as_os_str());
            format!("PEFT's {}: {}", name.display(), failure.reason())
        })
}

/// Makes of the one list both [`CASES`] and [`peft_tests!`](crate::peft_tests). `$` comes in as a token because a macro
/// cannot write it into a macro that it makes.
macro_rules! list {
    ($d:tt [$single:ident, $half:ident, $brain:ident] $($case:ident: $table:ident,)+) => {
        /// The cases, each with the element type of its table.
        pub const CASES: &[(&str, &str)] = &[$((stringify!($case), stringify!($table)),)+];

        /// Makes a `#[test]` of every one of PEFT's cases, with the harness for the element type of its table.
        ///
        /// ```no_run
        /// # use trainable_tokens_testkit::{Harness, peft_tests};
        /// # macro_rules! example { ($F32Harness:ty, $F16Harness:ty) => {
        /// peft_tests! { f32: $F32Harness, f16: $F16Harness, bf16: $F32Harness }
        /// # } }
        /// # fn main() {}
        /// ```
        ///
        /// For a type that the framework lacks, name a harness for a wider one: see the module
        /// [`peft`](crate::peft).
        #[macro_export]
        macro_rules! peft_tests {
            ($single: $d $single:ty, $half: $d $half:ty, $brain: $d $brain:ty $d(,)?) => {
                mod peft {
                    #[allow(unused_imports)]
                    use super::*;
                    $(#[test]
                    fn $case() {
                        let dir = $crate::peft::fixtures().join(stringify!($case));
                        if let Err(reason) = $crate::peft::run_case::<$d $table>(&dir) {
                            panic!("{reason}");
                        }
                    })+
                }
            };
        }
    };
}

list! { $ [f32, f16, bf16]
    standalone_f32: f32,
    standalone_f16: f16,
    standalone_bf16: bf16,
    standalone_bf16_noautocast: bf16,
    variant_all_tokens: f32,
    variant_k0: f32,
    variant_k1: f32,
    variant_max_norm: f32,
    variant_padding_idx: f32,
    variant_scale_grad_by_freq: f32,
    variant_sparse: f32,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_case_that_is_there_is_listed_with_its_type() {
        let mut found: Vec<_> = std::fs::read_dir(fixtures())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("standalone_") || name.starts_with("variant_"))
            .collect();
        found.sort();
        let mut listed: Vec<_> = CASES.iter().map(|(name, _)| *name).collect();
        listed.sort_unstable();
        assert_eq!(found, listed);
        for (name, table) in CASES {
            let dtype = dtype(&fixtures().join(name)).unwrap();
            assert_eq!(dtype.to_string().to_lowercase(), *table, "{name}");
        }
    }
}

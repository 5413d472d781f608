//! Golden cases that PEFT itself made, run on any backend.
//!
//! [`run_case`] runs one case of `tests/fixtures/peft`: every operation that its `case.json` lists, with the inputs,
//! the results and the tolerances recorded there (`atol` and `rtol` of 0 mean equal bits), for every module and every
//! adapter that it names. [`peft_tests!`](crate::peft_tests) makes a test of each of the [`CASES`].
//!
//! Nothing is skipped in silence. An operation, a field, an option of a module, a loss or an optimizer that the runner
//! does not know is a failure; so is a recorded tensor that nothing looks at.
//!
//! # What is checked beyond the operations
//!
//! - Lookups change neither the table nor the rows, merging and unmerging other rows before changes no result.
//! - With rows of their own and with the table's, a new layer is the same no-op.
//! - In a trajectory, the optimizer alone follows PEFT's rows if fed with PEFT's gradients: `f32` rows within 2e-6, rows
//!   of a half type within the case's tolerance. So does a layer with the gradients that a whole model gave PEFT.
//! - PEFT's plain module (`embed.base`, where recorded) is the layer without any trainable token.
//! - Adapters are written again byte for byte, and target the modules that PEFT wrapped.
//! - Of a mixed batch, every example is what it is alone, bit for bit.
//!
//! # Whole models
//!
//! Logits, losses and gradients of a model's loss need the model. [`Fixture::whole_model`] lists these operations; those
//! of models that the trainer implements run in its tests, all others stand in [`NOT_RUN`] with the reason.
//!
//! # What PEFT refuses
//!
//! Two things fail in PEFT and work here: the forward pass with no trainable token (`variant_k0`) and the backward pass
//! of a module with `sparse=True` (`variant_sparse`; sparse is only the layout of torch's gradient of the table). Where
//! `case.json` records such an error, the runner asks for the result of the dense definition instead: rows of the
//! overwritten table bit for bit, sums of the upstream gradient within the kit's [`tolerance`](crate::tolerance).
//!
//! # Where PEFT is wrong
//!
//! A recorded number that is a fault of PEFT's is checked to be what it is, and the library's own result to be the
//! dense definition's:
//!
//! - In half types PEFT rounds BART's scale, which BART's own embedding does not.
//! - A safe merge looks at the whole matrix, not at the rows that it writes.
//! - Different tokens for the embedding and the head of a tied model are merged into one matrix; here they are refused.
//! - Copies of tied rows that disagree are taken from the last module, and unknown names are passed over; here both are
//!   errors.
//! - A base whose vocabulary did not grow yet fails; here an adapter that holds the table brings it.
//!
//! # A framework without the type
//!
//! A case of a half type also runs on a harness for `f32` (and any case on one for `f64`). Table, rows and inputs are
//! widened, which is exact, and results are rounded to the case's type before they are compared. For lookups and merges
//! nothing is lost: a row is rounded to the table's type once, then or before. Gradients come from the very same
//! upstream gradients; for a loss that depends on the output, the output is rounded first. Only rows that PEFT trained
//! in the half type itself (`standalone_bf16_noautocast`) train in the wider type instead, within the case's tolerance.

mod adapters;
mod compare;
mod files;
mod fixture;
mod gradients;
mod keys;
mod layers;
mod lookups;
mod merges;
mod module;
mod operations;
mod optimizer;
mod targets;
mod training;
mod trajectory;
mod value;
mod whole_model;

use std::path::{Path, PathBuf};

pub use fixture::Fixture;
pub use optimizer::optimizer;
use trainable_tokens_core::DType;
pub use whole_model::{NOT_RUN, WholeModel, not_run};

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

/// Runs the case in `dir`: on `H` over its tables, on `B` over those that PEFT cast to `bfloat16`.
///
/// # Errors
///
/// The reason why it fails, with the case, the operation, and the first element that differs.
pub fn run_case<H: Harness, B: Harness>(dir: &Path) -> Result<(), String> {
    Fixture::open(dir)
        .and_then(|fixture| operations::run_all::<H, B>(&fixture))
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
                        if let Err(reason) = $crate::peft::run_case::<$d $table, $d $brain>(&dir) {
                            panic!("{reason}");
                        }
                    })+
                }
            };
        }
    };
}

list! { $ [f32, f16, bf16]
    bart_tied: f32,
    bert_mlm: f32,
    gemma2_tied: f32,
    gpt2_tied: f32,
    init_weights_false: f32,
    llama_tied: f32,
    llama_untied: f32,
    lora_dict_tied_different: f32,
    lora_dict_tied_different_ensure: f32,
    lora_dict_tied_same: f32,
    lora_dict_untied: f32,
    lora_list_gemma2: f32,
    lora_list_tied: f32,
    lora_list_untied: f32,
    merge_nan_bf16: bf16,
    merge_nan_f32: f32,
    multi_lora_mixed_batch: f32,
    multi_standalone: f32,
    qwen2_sharded: f32,
    resized_vocab: f32,
    resized_vocab_tied: f32,
    standalone_bf16: bf16,
    standalone_bf16_noautocast: bf16,
    standalone_f16: f16,
    standalone_f32: f32,
    t5_tied: f32,
    target_list_fullpath: f32,
    target_list_two: f32,
    target_lm_head_linear: f32,
    target_missing: f32,
    target_none_getter: f32,
    target_none_nested: f32,
    target_none_top: f32,
    target_regex: f32,
    target_str_nested: f32,
    target_suffix_list: f32,
    tied_key_variants: f32,
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

    fn sorted(mut names: Vec<String>) -> Vec<String> {
        names.sort();
        names
    }

    #[test]
    fn every_case_that_peft_made_is_there_and_listed_with_its_type() {
        let index = std::fs::read(fixtures().join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let made = index["cases"].as_array().unwrap().iter();
        let made = made.map(|case| case["dir"].as_str().unwrap().to_owned());
        let (malformed, made): (Vec<_>, Vec<_>) = made.partition(|dir| dir.starts_with("malformed/"));
        let dirs = |dir: &str| {
            let entries = std::fs::read_dir(fixtures().join(dir)).unwrap();
            let entries = entries.map(|entry| entry.unwrap().path());
            let cases = entries.filter(|path| path.join("case.json").exists());
            cases
                .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        let listed: Vec<_> = CASES.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(sorted(made), sorted(listed.clone()));
        assert_eq!(sorted(dirs("")), sorted(listed));
        let damaged = dirs("malformed");
        let damaged = damaged.iter().map(|name| format!("malformed/{name}"));
        assert_eq!(sorted(malformed), sorted(damaged.collect()));
        for (name, table) in CASES {
            let dtype = dtype(&fixtures().join(name)).unwrap();
            assert_eq!(dtype.to_string().to_lowercase(), *table, "{name}");
        }
    }

    #[test]
    fn what_is_not_run_exists() {
        for (case, names, reason) in NOT_RUN {
            let fixture = Fixture::open(&fixtures().join(case)).unwrap();
            let found = fixture.whole_model().unwrap();
            for name in *names {
                assert!(found.iter().any(|it| it.name == *name), "{case}: {name}");
                assert_eq!(
                    not_run(case, name),
                    Some(*reason),
                    "{case}: {name} stands there twice"
                );
            }
        }
    }
}

//! The golden vectors of `tests/vectors`: made by the reference backend, agreed with PEFT's own numbers, and passed by
//! every backend.
//!
//! `TRAINABLE_TOKENS_BLESS=1 cargo test --features ndarray,candle,burn,dfdx --test vectors -- the_vectors` writes them anew.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "../backends/burn/tests/support/harness.rs"]
mod burn;
#[path = "../backends/candle/tests/support/harness.rs"]
mod candle;
#[path = "../backends/dfdx/tests/support/harness.rs"]
mod dfdx;
#[path = "vectors/generate.rs"]
mod generate;
#[path = "support/noise.rs"]
mod noise;
#[path = "../backends/ndarray/tests/support/harness.rs"]
mod reference;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use generate::{Draft, drafts};
use half::{bf16, f16};
use reference::Nd;
use trainable_tokens::format::SafetensorsFile;
use trainable_tokens::{DType, TokenRows};
use trainable_tokens_testkit::Harness;
use trainable_tokens_testkit::vectors::{self, BLESS, CASES_FILE, TENSORS_FILE, Tensors, Vectors};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

/// What the reference backend computes for a draft.
fn compute(draft: &Draft) -> Tensors {
    let (case, inputs) = (&draft.case, &draft.inputs);
    let run = match case.dtype.as_deref() {
        Some("F64") => vectors::generate::<Nd<f64>>,
        Some("F16") => vectors::generate::<Nd<f16>>,
        Some("BF16") => vectors::generate::<Nd<bf16>>,
        _ => vectors::generate::<Nd<f32>>,
    };
    match run(case, inputs, &dir()) {
        Ok(_) if case.expect_error.is_some() => panic!("{} is accepted", case.name),
        Ok(outputs) => outputs,
        Err(_) if case.expect_error.is_some() => Tensors::new(),
        Err(reason) => panic!("{}: {reason}", case.name),
    }
}

#[test]
fn the_vectors_are_what_the_reference_computes() {
    let drafts = drafts();
    if std::env::var_os(BLESS).is_some() {
        generate::training_state(&dir());
        write(&drafts);
    }
    let stored: Vectors = serde_json::from_slice(&fs::read(dir().join(CASES_FILE)).unwrap()).unwrap();
    let names = |cases: Vec<&str>| cases.into_iter().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        names(stored.cases.iter().map(|case| case.name.as_str()).collect()),
        names(drafts.iter().map(|draft| draft.case.name.as_str()).collect())
    );
    let file = SafetensorsFile::open(dir().join(TENSORS_FILE)).unwrap();
    for (draft, stored) in drafts.iter().zip(&stored.cases) {
        assert_eq!(
            serde_json::to_value(&draft.case).unwrap(),
            serde_json::to_value(stored).unwrap()
        );
        for (name, rows) in &draft.inputs {
            let name = format!("{}.{name}", draft.case.name);
            assert!(
                file.tensor(&name).unwrap().to_rows().unwrap().bits_eq(rows),
                "{name}"
            );
        }
    }
}

fn passes<H: Harness>() {
    let count = vectors::run::<H>(&dir()).unwrap();
    assert!(count > 20, "{count} cases for tables of {}", H::DTYPE);
}

#[test]
fn every_backend_passes_the_vectors() {
    passes::<Nd<f64>>();
    passes::<Nd<f32>>();
    passes::<Nd<f16>>();
    passes::<Nd<bf16>>();
    passes::<candle::OnCpu<f64>>();
    passes::<candle::OnCpu<f32>>();
    passes::<candle::OnCpu<f16>>();
    passes::<candle::OnCpu<bf16>>();
    passes::<burn::OnFlex<f64>>();
    passes::<burn::OnFlex<f32>>();
    passes::<burn::OnFlex<f16>>();
    passes::<burn::OnFlex<bf16>>();
    passes::<dfdx::OnCpu<f64>>();
    passes::<dfdx::OnCpu<f32>>();
    passes::<dfdx::OnCpu<f16>>();
}

/// Writes cases and tensors, inputs and outputs.
fn write(drafts: &[Draft]) {
    let mut tensors: BTreeMap<String, TokenRows> = BTreeMap::new();
    for draft in drafts {
        for (name, rows) in draft.inputs.iter().chain(&compute(draft)) {
            tensors.insert(format!("{}.{name}", draft.case.name), rows.clone());
        }
    }
    let vectors = Vectors {
        format_version: 1,
        generated_by: format!("trainable-tokens {}, ndarray backend", env!("CARGO_PKG_VERSION")),
        cases: drafts.iter().map(|draft| draft.case.clone()).collect(),
    };
    let text = serde_json::to_string_pretty(&vectors).unwrap();
    fs::write(dir().join(CASES_FILE), text + "\n").unwrap();
    let bytes: Vec<_> = tensors
        .iter()
        .map(|(name, rows)| (name, rows.to_le_bytes(), rows))
        .collect();
    let views = bytes.iter().map(|(name, bytes, rows)| {
        let dtype = match rows.dtype() {
            DType::F64 => safetensors::Dtype::F64,
            DType::F32 => safetensors::Dtype::F32,
            DType::F16 => safetensors::Dtype::F16,
            DType::BF16 => safetensors::Dtype::BF16,
        };
        let view = safetensors::tensor::TensorView::new(dtype, rows.shape().to_vec(), bytes);
        ((*name).clone(), view.unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir().join(TENSORS_FILE)).unwrap();
}

/// The cases whose inputs are PEFT's must come out as they came out of PEFT, within PEFT's fixture's own tolerance.
#[test]
fn the_vectors_agree_with_peft() {
    let mut checked = 0;
    for draft in drafts() {
        let outputs = compute(&draft);
        for (name, want, tolerance) in &draft.peft {
            let got = &outputs[name];
            let what = format!("{}.{name}", draft.case.name);
            assert_eq!((got.shape(), got.dtype()), (want.shape(), want.dtype()), "{what}");
            if *tolerance == 0.0 {
                assert!(got.bits_eq(want), "{what}");
            }
            for (got, want) in got.to_f64_vec().into_iter().zip(want.to_f64_vec()) {
                assert!(
                    (got - want).abs() <= tolerance * (1.0 + want.abs()),
                    "{what}: {got}, PEFT has {want}"
                );
            }
            checked += 1;
        }
    }
    assert!(checked >= 30, "{checked} values of PEFT's are compared");
}

//! One of PEFT's cases, with the models that its operations name.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use trainable_tokens_core::{PaddingRule, TokenRows};
use trainable_tokens_format::{Adapter, AdapterModule, Checkpoint, Overwrite, merge_checkpoint};
use trainable_tokens_testkit::peft::{Fixture, fixtures};
use trainable_tokens_trainer::{Decoder, EMBEDDING_MODULE};

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) fixture: Fixture,
    pub(crate) expected: HashMap<String, Tensor>,
}

impl Case {
    pub(crate) fn open(name: &str) -> Self {
        let dir = fixtures().join(name);
        let fixture = Fixture::open(&dir).unwrap_or_else(|failure| panic!("{name}: {}", failure.reason()));
        let expected = dir.join("expected.safetensors");
        let expected = match expected.exists() {
            true => candle_core::safetensors::load(expected, &Device::Cpu).unwrap(),
            false => HashMap::new(),
        };
        Self {
            name: name.to_owned(),
            fixture,
            expected,
        }
    }

    pub(crate) fn path(&self, of: &str) -> PathBuf {
        self.fixture.dir().join(of)
    }

    /// The checkpoint that an operation starts from.
    pub(crate) fn base(&self, operation: &Value) -> Checkpoint {
        Checkpoint::open(self.path(operation["base"].as_str().unwrap_or("base"))).unwrap()
    }

    pub(crate) fn adapter(&self, operation: &Value) -> Adapter {
        Adapter::read(self.path(operation["adapter"].as_str().unwrap_or("adapter"))).unwrap()
    }

    /// The model in the state that an operation names; without one, with the adapter. Rows of the head are no part of it.
    pub(crate) fn model(&self, operation: &Value) -> Decoder {
        let base = self.base(operation);
        let module = |adapter: &Adapter| adapter.module(EMBEDDING_MODULE).cloned();
        match operation["state"].as_str().unwrap_or("adapter") {
            "base" => load(&base, &[], None),
            "noop" => {
                let module = module(&self.adapter(operation));
                load(
                    &base,
                    module.as_ref().map_or(&[], AdapterModule::token_indices),
                    None,
                )
            }
            "adapter" | "trained" => match module(&self.adapter(operation)) {
                Some(module) => load(&base, module.token_indices(), Some(module.rows())),
                None => load(&base, &[], None),
            },
            "merged" if self.path("merged").exists() => {
                load(&Checkpoint::open(self.path("merged")).unwrap(), &[], None)
            }
            "merged" => {
                let home = tempfile::tempdir().unwrap();
                let out = home.path().join("merged");
                let rows = self.adapter(operation).replacements(&base).unwrap();
                merge_checkpoint(&base, &rows, &out, Overwrite::Refuse).unwrap();
                load(&Checkpoint::open(out).unwrap(), &[], None)
            }
            other => panic!("{}: the state {other} is unknown", self.name),
        }
    }

    pub(crate) fn flat(&self, name: &str) -> Vec<f32> {
        flat(&self.expected[name])
    }
}

fn load(checkpoint: &Checkpoint, tokens: &[u32], rows: Option<&TokenRows>) -> Decoder {
    let padding = PaddingRule::NoLookupGradient;
    Decoder::load(checkpoint, tokens, rows, padding, DType::F32, &Device::Cpu).unwrap()
}

pub(crate) fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.detach().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn check(what: &str, got: &[f32], want: &[f32], [atol, rtol]: [f64; 2]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut worst = 0f64;
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        if atol == 0.0 && rtol == 0.0 {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{what}: element {index}: {got} {want}"
            );
        }
        let difference = f64::from((got - want).abs());
        worst = worst.max(difference);
        assert!(
            difference <= atol + rtol * f64::from(want.abs()),
            "{what}: element {index}: got {got}, want {want}"
        );
    }
    println!("{what}: largest difference {worst:.2e}");
}

/// How far an operation lets a result lie from PEFT's.
pub(crate) fn tolerance(operation: &Value) -> [f64; 2] {
    ["atol", "rtol"].map(|name| operation[name].as_f64().unwrap())
}

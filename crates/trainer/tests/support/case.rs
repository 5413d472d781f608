//! One of PEFT's cases, with the models that its operations name.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use trainable_tokens_core::{PaddingRule, TokenRows};
use trainable_tokens_format::{Adapter, AdapterModule, Checkpoint, Merge, Overwrite, PeftType};
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
        let expected = if expected.exists() {
            candle_core::safetensors::load(expected, &Device::Cpu).unwrap()
        } else {
            HashMap::new()
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
        let named = operation["active"][0]
            .as_str()
            .map(|name| format!("adapter/{name}"));
        let dir = named.as_deref().or(operation["adapter"].as_str());
        Adapter::read(self.path(dir.unwrap_or("adapter"))).unwrap()
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
            "adapter" => {
                let adapter = self.adapter(operation);
                let module = module(&adapter);
                let (tokens, rows) = module.as_ref().map_or((&[][..], None), |module| {
                    (module.token_indices(), Some(module.rows()))
                });
                match adapter.config().peft_type() {
                    PeftType::TrainableTokens => load(&base, tokens, rows),
                    // The rows stay apart; LoRA's own weights are merged.
                    PeftType::Lora => merged(&base, &adapter.without_tokens().unwrap(), tokens, rows),
                }
            }
            "merged" if self.path("merged").exists() => {
                load(&Checkpoint::open(self.path("merged")).unwrap(), &[], None)
            }
            "merged" => merged(&base, &self.adapter(operation), &[], None),
            other => panic!("{}: the state {other} is unknown", self.name),
        }
    }

    pub(crate) fn flat(&self, name: &str) -> Vec<f32> {
        flat(&self.expected[name])
    }
}

/// A model that an adapter is merged into, with rows of tokens above it.
fn merged(base: &Checkpoint, adapter: &Adapter, tokens: &[u32], rows: Option<&TokenRows>) -> Decoder {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("merged");
    let merge = Merge::new(base).with("default", adapter).unwrap();
    merge.write(&out, Overwrite::Refuse).unwrap();
    load(&Checkpoint::open(out).unwrap(), tokens, rows)
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

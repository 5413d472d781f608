//! One of PEFT's cases, with the models that its operations name.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use trainable_tokens_core::{PaddingRule, TokenRows};
use trainable_tokens_format::{Adapter, AdapterModule, Checkpoint, Merge, Overwrite};
use trainable_tokens_testkit::peft::{Fixture, fixtures};
use trainable_tokens_trainer::{
    Dataset, Decoder, EMBEDDING_MODULE, ModelConfig, TrainOptions, Trainer, Vocabulary,
};

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

    /// The adapter of LoRA as training starts from it: its own config, and the recorded `init.*` as its tensors.
    pub(crate) fn start(&self) -> Adapter {
        let adapter = self.adapter(&Value::Null);
        let rows = |key: &str| {
            let tensor = &self.expected[&format!("init.base_model.model.{key}")];
            let (rows, columns) = tensor.dims2().unwrap();
            TokenRows::new(flat(tensor), rows, columns).unwrap()
        };
        let modules = adapter.modules().iter().map(|module| {
            let rows = rows(&format!(
                "{}.token_adapter.trainable_tokens_delta.default",
                module.path()
            ));
            (module.path(), module.token_set(150).unwrap(), rows)
        });
        let mut modules = modules.collect::<Vec<_>>().into_iter();
        let (path, tokens, first) = modules.next().unwrap();
        let mut builder = Adapter::builder(path, &tokens, first).lora(adapter.config().clone());
        for (path, tokens, rows) in modules {
            builder = builder.module_of(path, &tokens, rows);
        }
        for weights in adapter.lora_weights().unwrap() {
            let factor = |name: &str| rows(&format!("{}.{name}.default.weight", weights.path()));
            builder = builder.lora_linear(weights.path(), &factor("lora_A"), &factor("lora_B"));
        }
        builder.build().unwrap()
    }

    /// The model in the state that an operation names; without one, with the adapter.
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
            "adapter" => with_adapter(&base, &self.adapter(operation)),
            "merged" if self.path("merged").exists() => {
                load(&Checkpoint::open(self.path("merged")).unwrap(), &[], None)
            }
            "merged" => merged(&base, &self.adapter(operation)),
            other => panic!("{}: the state {other} is unknown", self.name),
        }
    }

    pub(crate) fn flat(&self, name: &str) -> Vec<f32> {
        flat(&self.expected[name])
    }
}

/// A model that an adapter is merged into.
fn merged(base: &Checkpoint, adapter: &Adapter) -> Decoder {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("merged");
    let merge = Merge::new(base).with("default", adapter).unwrap();
    merge.write(&out, Overwrite::Refuse).unwrap();
    load(&Checkpoint::open(out).unwrap(), &[], None)
}

/// A model with all of an adapter beside its weights.
pub(crate) fn with_adapter(base: &Checkpoint, adapter: &Adapter) -> Decoder {
    let padding = PaddingRule::NoLookupGradient;
    Decoder::load_adapter(base, adapter, padding, DType::F32, &Device::Cpu).unwrap()
}

/// The training of `tokens` of a fixture's model on `lines`.
pub(crate) fn trainer(name: &str, tokens: &[u32], lines: &[Value], options: TrainOptions) -> Trainer {
    let base = Checkpoint::open(fixtures().join(name).join("base")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&path, text.join("\n")).unwrap();
    let config = ModelConfig::read(&base.config_path()).unwrap();
    let data = Dataset::read(&path, &Vocabulary::of_model(base.dir()), &config, None).unwrap();
    let model = load(&base, tokens, None);
    Trainer::new(model, data, options).unwrap()
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

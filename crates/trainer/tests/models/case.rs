//! One of PEFT's cases, with the models that its operations name.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;
use trainable_tokens_core::{PaddingRule, TokenRows};
use trainable_tokens_format::{Adapter, AdapterModule, Checkpoint, Merge, Overwrite};
use trainable_tokens_testkit::peft::{Fixture, fixtures};
use trainable_tokens_trainer::{Architecture, LanguageModel};

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) fixture: Fixture,
    pub(crate) expected: HashMap<String, Tensor>,
    without_bias: OnceCell<TempDir>,
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
            without_bias: OnceCell::new(),
        }
    }

    pub(crate) fn path(&self, of: &str) -> PathBuf {
        self.fixture.dir().join(of)
    }

    /// The checkpoint that an operation starts from.
    pub(crate) fn base(&self, operation: &Value) -> Checkpoint {
        Checkpoint::open(self.path(operation["base"].as_str().unwrap_or("base"))).unwrap()
    }

    /// The same as PEFT computes with it once it is wrapped: it drops the bias of a tied output layer.
    pub(crate) fn wrapped_base(&self, operation: &Value) -> Checkpoint {
        if self.fixture.json()["peft_quirks"]["drops_bias_of"].is_null() {
            return self.base(operation);
        }
        let dir = self.without_bias.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let base = self.path("base");
            std::fs::copy(base.join("config.json"), dir.path().join("config.json")).unwrap();
            let mut tensors =
                candle_core::safetensors::load(base.join("model.safetensors"), &Device::Cpu).unwrap();
            let bias = tensors.get_mut("cls.predictions.bias").unwrap();
            *bias = bias.zeros_like().unwrap();
            candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
            dir
        });
        Checkpoint::open(dir.path()).unwrap()
    }

    pub(crate) fn architecture(&self) -> Architecture {
        Architecture::read(&self.base(&Value::Null).config_path()).unwrap()
    }

    /// The path of the embedding module.
    pub(crate) fn embedding_module(&self) -> String {
        self.architecture().embedding_module(&self.base(&Value::Null))
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
            (
                module.path(),
                module
                    .token_set(self.architecture().input_spec().vocab_size)
                    .unwrap(),
                rows,
            )
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
    pub(crate) fn model(&self, operation: &Value) -> LanguageModel {
        let base = self.base(operation);
        let wrapped = || self.wrapped_base(operation);
        let module = |adapter: &Adapter| adapter.module(&self.embedding_module()).cloned();
        match operation["state"].as_str().unwrap_or("adapter") {
            "base" => load(&base, &[], None),
            "noop" => {
                let module = module(&self.adapter(operation));
                load(
                    &wrapped(),
                    module.as_ref().map_or(&[], AdapterModule::token_indices),
                    None,
                )
            }
            "adapter" if operation["base_cast"] == "BF16" => {
                load_adapter(&base, &self.adapter(operation), DType::BF16)
            }
            "adapter" => with_adapter(&wrapped(), &self.adapter(operation)),
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
fn merged(base: &Checkpoint, adapter: &Adapter) -> LanguageModel {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("merged");
    let merge = Merge::new(base).with("default", adapter).unwrap();
    merge.write(&out, Overwrite::Refuse).unwrap();
    load(&Checkpoint::open(out).unwrap(), &[], None)
}

/// A model with all of an adapter beside its weights.
pub(crate) fn with_adapter(base: &Checkpoint, adapter: &Adapter) -> LanguageModel {
    load_adapter(base, adapter, DType::F32)
}

fn load_adapter(base: &Checkpoint, adapter: &Adapter, dtype: DType) -> LanguageModel {
    let padding = PaddingRule::NoLookupGradient;
    LanguageModel::load_adapter(base, adapter, padding, dtype, &Device::Cpu).unwrap()
}

fn load(checkpoint: &Checkpoint, tokens: &[u32], rows: Option<&TokenRows>) -> LanguageModel {
    let padding = PaddingRule::NoLookupGradient;
    LanguageModel::load(checkpoint, tokens, rows, padding, DType::F32, &Device::Cpu).unwrap()
}

/// The last hidden states of tokens, all of which are seen.
pub(crate) fn hidden(model: &LanguageModel, ids: &Tensor) -> Tensor {
    model.hidden(&model.embed(ids).unwrap(), ids, None).unwrap()
}

pub(crate) fn flat(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
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

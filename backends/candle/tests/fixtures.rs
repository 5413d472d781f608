//! Golden cases made by PEFT: forward, gradients, optimizer trajectories, merge and unmerge.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use common::{bytes, values};
use serde_json::Value;
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::{Adam, AdamConfig, RowOptimizer, Sgd, SgdConfig, TokenRows};

struct Case {
    json: Value,
    expected: HashMap<String, Tensor>,
}

impl Case {
    fn load(name: &str) -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/peft");
        let folder = root.join(name);
        let json = std::fs::read_to_string(folder.join("case.json")).unwrap();
        let expected =
            candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
        Self {
            json: serde_json::from_str(&json).unwrap(),
            expected,
        }
    }

    fn tensor(&self, name: &Value) -> &Tensor {
        &self.expected[name.as_str().unwrap()]
    }

    fn ids(&self) -> Vec<u32> {
        let ids = self.json["token_indices"].as_array().unwrap();
        ids.iter()
            .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect()
    }

    /// A layer over a table of its own, starting from the rows that PEFT's starts from.
    fn layer(&self, rows: &str) -> TrainableTokens {
        let base = self.expected["base.weight"].copy().unwrap();
        TrainableTokens::with_rows(base, &self.ids(), &host(&self.expected[rows])).unwrap()
    }

    fn check(&self, operation: &Value, what: &str, got: &Tensor, want: &Tensor) {
        let what = format!("{} {} {what}", self.json["name"], operation["op"]);
        assert_eq!(got.dims(), want.dims(), "{what}: shape");
        let (atol, rtol) = (
            operation["atol"].as_f64().unwrap(),
            operation["rtol"].as_f64().unwrap(),
        );
        if atol == 0.0 && rtol == 0.0 {
            assert_eq!(got.dtype(), want.dtype(), "{what}: element type");
            assert!(bytes(got) == bytes(want), "{what}: bits differ");
        }
        for (got, want) in values(got).into_iter().zip(values(want)) {
            assert!(
                (got - want).abs() <= atol + rtol * want.abs(),
                "{what}: {got}, expected {want}"
            );
        }
    }

    fn run(&self, operation: &Value) {
        match operation["op"].as_str().unwrap() {
            "embed_forward" => self.embed_forward(operation),
            "delta_grad" => self.delta_grad(operation),
            "trajectory" => self.trajectory(operation),
            "merge" | "unmerge" => self.merge(operation),
            other => panic!("unknown operation {other}"),
        }
    }

    fn embed_forward(&self, operation: &Value) {
        let state = operation["state"].as_str().unwrap();
        let mut layer = self.layer(if state == "noop" {
            "delta.init"
        } else {
            "delta.trained"
        });
        if state == "merged" {
            layer.merge().unwrap();
        }
        let out = layer.forward(self.tensor(&operation["inputs"]["ids"])).unwrap();
        self.check(operation, state, &out, self.tensor(&operation["expect"]));
        if state == "noop" {
            let fresh =
                TrainableTokens::from_tensor(self.expected["base.weight"].clone(), &self.ids()).unwrap();
            let out = fresh.forward(self.tensor(&operation["inputs"]["ids"])).unwrap();
            self.check(operation, "fresh", &out, self.tensor(&operation["expect"]));
        }
    }

    fn delta_grad(&self, operation: &Value) {
        let layer = self.layer("delta.init");
        let out = layer.forward(self.tensor(&operation["inputs"]["ids"])).unwrap();
        let loss = (out * self.tensor(&operation["inputs"]["upstream"]))
            .unwrap()
            .sum_all()
            .unwrap();
        let gradient = layer.gradient(&loss.backward().unwrap()).unwrap();
        let want = self.tensor(&operation["expect"]);
        self.check(operation, "gradient", &device(&gradient), want);
    }

    fn trajectory(&self, operation: &Value) {
        let name = operation["name"].as_str().unwrap();
        let deltas = self.tensor(&operation["expect"]["deltas"]);
        let grads = self.tensor(&operation["expect"]["grads"]);
        let mut layer = self.layer("delta.init");
        let mut optimizer = optimizer(&operation["optimizer"]);
        self.check(
            operation,
            name,
            &device(&layer.rows().unwrap()),
            &deltas.get(0).unwrap(),
        );
        for step in 0..usize::try_from(operation["steps"].as_u64().unwrap()).unwrap() {
            let inputs = &operation["inputs"];
            let out = layer
                .forward(&self.tensor(&inputs["ids"]).get(step).unwrap())
                .unwrap();
            let loss = match operation["loss"].as_str().unwrap() {
                "sum(emb * traj.upstream[t])" => {
                    let upstream = self.tensor(&inputs["upstream"]).get(step).unwrap();
                    (out * upstream).unwrap().sum_all().unwrap()
                }
                "mean((emb.float() - traj.mse_target)^2)" => {
                    let target = self.tensor(&inputs["target"]);
                    let error = (out.to_dtype(DType::F32).unwrap() - target).unwrap();
                    error.sqr().unwrap().mean_all().unwrap()
                }
                other => panic!("unknown loss {other}"),
            };
            let gradients = loss.backward().unwrap();
            let gradient = device(&layer.gradient(&gradients).unwrap());
            let what = format!("{name} step {step}");
            self.check(operation, &what, &gradient, &grads.get(step).unwrap());
            layer.step(&gradients, optimizer.as_mut(), &mut []).unwrap();
            let rows = device(&layer.rows().unwrap());
            self.check(operation, &what, &rows, &deltas.get(step + 1).unwrap());
        }
    }

    fn merge(&self, operation: &Value) {
        let mut layer = self.layer("delta.trained");
        layer.merge().unwrap();
        if operation["op"] == "unmerge" {
            layer.unmerge().unwrap();
        }
        self.check(
            operation,
            "",
            layer.table().tensor(),
            self.tensor(&operation["expect"]),
        );
    }
}

fn optimizer(spec: &Value) -> Box<dyn RowOptimizer> {
    let number = |name: &str, default: f64| spec.get(name).map_or(default, |x| x.as_f64().unwrap());
    let flag = |name: &str| spec.get(name).is_some_and(|x| x.as_bool().unwrap());
    let adam = |config: AdamConfig, weight_decay: f64| -> Box<dyn RowOptimizer> {
        let config = AdamConfig {
            lr: number("lr", config.lr),
            beta1: spec["betas"][0].as_f64().unwrap_or(config.beta1),
            beta2: spec["betas"][1].as_f64().unwrap_or(config.beta2),
            eps: number("eps", config.eps),
            weight_decay: number("weight_decay", weight_decay),
            amsgrad: flag("amsgrad"),
            ..config
        };
        Box::new(Adam::new(config).unwrap())
    };
    match spec["type"].as_str().unwrap() {
        "Adam" => adam(AdamConfig::ADAM, 0.0),
        // torch's default, where the library's is no decay.
        "AdamW" => adam(AdamConfig::ADAMW, 0.01),
        "SGD" => Box::new(
            Sgd::new(SgdConfig {
                lr: number("lr", 0.0),
                momentum: number("momentum", 0.0),
                dampening: number("dampening", 0.0),
                nesterov: flag("nesterov"),
                weight_decay: number("weight_decay", 0.0),
            })
            .unwrap(),
        ),
        other => panic!("unknown optimizer {other}"),
    }
}

fn host(rows: &Tensor) -> TokenRows {
    let (num_rows, dim) = rows.dims2().unwrap();
    let dtype = match rows.dtype() {
        DType::F32 => trainable_tokens_core::DType::F32,
        DType::BF16 => trainable_tokens_core::DType::BF16,
        other => panic!("no fixture trains rows of type {other:?}"),
    };
    TokenRows::from_le_bytes(dtype, num_rows, dim, &bytes(rows)).unwrap()
}

fn device(rows: &TokenRows) -> Tensor {
    let dtype = match rows.dtype() {
        trainable_tokens_core::DType::F32 => DType::F32,
        trainable_tokens_core::DType::BF16 => DType::BF16,
        other => panic!("no fixture trains rows of type {other:?}"),
    };
    Tensor::from_raw_buffer(&rows.to_le_bytes(), dtype, &rows.shape(), &Device::Cpu).unwrap()
}

fn run_all(name: &str) {
    let case = Case::load(name);
    let operations = case.json["operations"].as_array().unwrap();
    assert!(operations.len() > 5);
    operations.iter().for_each(|operation| case.run(operation));
}

#[test]
fn f32() {
    run_all("standalone_f32");
}

#[test]
fn bf16() {
    run_all("standalone_bf16");
}

#[test]
fn f16() {
    run_all("standalone_f16");
}

#[test]
fn bf16_rows_over_a_bf16_table() {
    run_all("standalone_bf16_noautocast");
}

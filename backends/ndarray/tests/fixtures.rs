//! Every operation of PEFT's bare-layer fixtures.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;

use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, OwnedRepr};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use trainable_tokens_core::{
    Adam, AdamConfig, DType, Decay, Element, EmbeddingSource, RowOptimizer, Sgd, SgdConfig, TokenId,
    TokenRows, TokenSet,
};
use trainable_tokens_ndarray::{NdTable, TrainableTokens, TrainableTokensExt};

type Layer<T> = TrainableTokens<NdTable<OwnedRepr<T>>, T>;

struct Case {
    json: Value,
    expected: Vec<u8>,
    adapter: Vec<u8>,
}

impl Case {
    fn open(name: &str) -> Self {
        let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/peft")).join(name);
        Self {
            json: serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap(),
            expected: std::fs::read(dir.join("expected.safetensors")).unwrap(),
            adapter: std::fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap(),
        }
    }

    fn rows(&self, name: &str) -> TokenRows {
        decode(&self.expected, name)
    }

    /// An integer tensor.
    fn ids(&self, name: &str) -> Vec<u32> {
        let file = SafeTensors::deserialize(&self.expected).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::I64);
        let id = |bytes: &[u8]| u32::try_from(i64::from_le_bytes(bytes.try_into().unwrap())).unwrap();
        tensor.data().chunks_exact(8).map(id).collect()
    }

    fn tokens(&self) -> TokenSet {
        let ids = self.json["token_indices"].as_array().unwrap();
        let ids = ids.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap());
        TokenSet::new(ids, self.rows("base.weight").num_rows()).unwrap()
    }

    fn table<T: Element>(&self) -> NdTable<OwnedRepr<T>> {
        let rows = self.rows("base.weight");
        NdTable::new(Array2::from_shape_vec(rows.shape(), rows.as_slice::<T>().unwrap().to_vec()).unwrap())
            .unwrap()
    }

    /// A layer whose rows have the type that PEFT trained them in.
    fn layer<T: Element>(&self) -> Layer<T> {
        if self.json["autocast_adapter_dtype"].as_bool().unwrap() {
            return Layer::new(self.table(), self.tokens()).unwrap();
        }
        let table = self.table::<T>();
        let rows = table.read_rows(self.tokens().ids()).unwrap();
        Layer::with_rows(table, self.tokens(), &rows).unwrap()
    }

    /// The rows of the adapter file; like PEFT, in at least single precision.
    fn trained(&self) -> TokenRows {
        let rows = decode(&self.adapter, "base_model.model.emb.trainable_tokens_delta");
        rows.to_dtype(rows.dtype().default_row_dtype())
    }
}

/// A float tensor of any rank, its leading dimensions flattened.
fn decode(file: &[u8], name: &str) -> TokenRows {
    let file = SafeTensors::deserialize(file).unwrap();
    let tensor = file
        .tensor(name)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let dtype = match tensor.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => panic!("{name}: {other:?}"),
    };
    let dim = *tensor.shape().last().unwrap();
    TokenRows::from_le_bytes(
        dtype,
        tensor.shape().iter().product::<usize>() / dim,
        dim,
        tensor.data(),
    )
    .unwrap()
}

fn array<T: Element>(rows: &TokenRows) -> Array2<T> {
    Array2::from_shape_vec(rows.shape(), rows.as_slice::<T>().unwrap().to_vec()).unwrap()
}

fn host<T: Element>(values: &ArrayView2<'_, T>) -> TokenRows {
    TokenRows::new(values.iter().copied().collect(), values.nrows(), values.ncols()).unwrap()
}

/// Equal bits for zero tolerances, else `|got - want| <= atol + rtol * |want|`.
fn check(what: &str, got: &TokenRows, want: &TokenRows, operation: &Value) {
    let [atol, rtol] = ["atol", "rtol"].map(|name| operation[name].as_f64().unwrap());
    assert_eq!(got.shape(), want.shape(), "{what}");
    if atol == 0.0 && rtol == 0.0 {
        assert!(got.bits_eq(want), "{what}: bits differ");
        return;
    }
    for (index, (got, want)) in got.to_f64_vec().into_iter().zip(want.to_f64_vec()).enumerate() {
        assert!(
            (got - want).abs() <= atol + rtol * want.abs(),
            "{what}: element {index}: got {got}, want {want}"
        );
    }
}

fn optimizer(spec: &Value) -> Box<dyn RowOptimizer> {
    let number = |name: &str, default: f64| spec[name].as_f64().unwrap_or(default);
    let kind = spec["type"].as_str().unwrap();
    match kind {
        "SGD" => Box::new(
            Sgd::new(SgdConfig {
                lr: number("lr", 1e-3),
                momentum: number("momentum", 0.0),
                dampening: number("dampening", 0.0),
                nesterov: spec["nesterov"].as_bool().unwrap_or(false),
                weight_decay: number("weight_decay", 0.0),
            })
            .unwrap(),
        ),
        "Adam" | "AdamW" => Box::new(
            Adam::new(AdamConfig {
                lr: number("lr", 1e-3),
                beta1: spec["betas"][0].as_f64().unwrap_or(0.9),
                beta2: spec["betas"][1].as_f64().unwrap_or(0.999),
                eps: number("eps", 1e-8),
                weight_decay: number("weight_decay", if kind == "AdamW" { 0.01 } else { 0.0 }),
                decay: if kind == "AdamW" {
                    Decay::Decoupled
                } else {
                    Decay::L2
                },
                amsgrad: spec["amsgrad"].as_bool().unwrap_or(false),
            })
            .unwrap(),
        ),
        other => panic!("{other}"),
    }
}

fn all_operations<T: Element>(name: &str) {
    let case = Case::open(name);
    let operations = case.json["operations"].as_array().unwrap().clone();
    assert!(operations.len() >= 10, "{name}");
    for operation in &operations {
        let kind = operation["op"].as_str().unwrap();
        match kind {
            "embed_forward" => embed_forward::<T>(&case, operation),
            "delta_grad" => {
                let layer = case.layer::<T>();
                let plan = layer.plan(&case.ids("input_ids")).unwrap();
                let gradient = layer
                    .backward(&plan, array::<T>(&case.rows("upstream")).view())
                    .unwrap();
                check("delta.grad", &gradient, &case.rows("delta.grad"), operation);
            }
            "trajectory" => trajectory::<T>(&case, operation),
            "merge" | "unmerge" => {
                let mut layer = case.layer::<T>();
                layer.merge().unwrap();
                layer.unmerge().unwrap();
                layer = Layer::with_rows(layer.into_source(), case.tokens(), &case.trained()).unwrap();
                layer.merge().unwrap();
                if kind == "unmerge" {
                    layer.unmerge().unwrap();
                }
                let want = case.rows(operation["expect"].as_str().unwrap());
                check(kind, &host(&layer.source().view()), &want, operation);
            }
            other => panic!("{name}: no check for {other}"),
        }
    }
}

fn embed_forward<T: Element>(case: &Case, operation: &Value) {
    let state = operation["state"].as_str().unwrap();
    let mut layer = case.layer::<T>();
    if state != "noop" {
        layer = Layer::with_rows(layer.into_source(), case.tokens(), &case.trained()).unwrap();
    }
    if state == "merged" {
        layer.merge().unwrap();
    }
    let ids = case.ids(operation["inputs"]["ids"].as_str().unwrap());
    let want = case.rows(operation["expect"].as_str().unwrap());
    let plan = layer.plan(&ids).unwrap();
    check(
        state,
        &host(&layer.lookup_planned(&plan).unwrap().view()),
        &want,
        operation,
    );
    let mut out = Array2::from_elem((plan.len(), want.embedding_dim()), T::default());
    layer.lookup_into(&plan, out.view_mut()).unwrap();
    check(state, &host(&out.view()), &want, operation);
}

fn trajectory<T: Element>(case: &Case, operation: &Value) {
    let name = operation["name"].as_str().unwrap();
    let mut layer = case.layer::<T>();
    let mut updates = optimizer(&operation["optimizer"]);
    let steps = usize::try_from(operation["steps"].as_u64().unwrap()).unwrap();
    let [deltas, gradients] =
        ["deltas", "grads"].map(|key| case.rows(operation["expect"][key].as_str().unwrap()));
    let ids = case.ids("traj.ids");
    let batch = ids.len() / steps;
    let k = layer.tokens().len();
    let at = |all: &TokenRows, index: usize, rows: usize| {
        let bytes = all.embedding_dim() * rows * all.dtype().size_in_bytes();
        let slice = &all.to_le_bytes()[index * bytes..][..bytes];
        TokenRows::from_le_bytes(all.dtype(), rows, all.embedding_dim(), slice).unwrap()
    };
    check(
        &format!("{name}: start"),
        &layer.rows().unwrap(),
        &at(&deltas, 0, k),
        operation,
    );
    // The same optimizer fed with the recorded gradients must follow the recorded rows closely.
    let exact = serde_json::json!({"atol": 2e-6, "rtol": 2e-6});
    let mut alone = (optimizer(&operation["optimizer"]), layer.rows().unwrap());
    for step in 0..steps {
        let plan = layer.plan(&ids[step * batch..][..batch]).unwrap();
        let upstream = if name.starts_with("mse") {
            mse_gradient(
                &layer.lookup_planned(&plan).unwrap(),
                &array(&case.rows("traj.mse_target")),
            )
        } else {
            array(&at(&case.rows("traj.upstream"), step, batch))
        };
        let gradient = layer.backward(&plan, upstream.view()).unwrap();
        check(
            &format!("{name}: gradient of step {step}"),
            &gradient,
            &at(&gradients, step, k),
            operation,
        );
        let report = layer.step_with(gradient, &mut *updates, &mut []).unwrap();
        assert_eq!(report.step, step as u64 + 1);
        check(
            &format!("{name}: rows after step {step}"),
            &layer.rows().unwrap(),
            &at(&deltas, step + 1, k),
            operation,
        );

        let lr = alone.0.learning_rate();
        alone.0.step(&mut alone.1, &at(&gradients, step, k), lr).unwrap();
        if alone.1.dtype() == DType::F32 {
            check(
                &format!("{name}: optimizer alone, step {step}"),
                &alone.1,
                &at(&deltas, step + 1, k),
                &exact,
            );
        }
    }
    assert!(
        host(&layer.source().view()).bits_eq(&case.rows("base.weight")),
        "{name}: the base changed"
    );
}

/// The gradient of `mean((output.float() - target)^2)`.
fn mse_gradient<T: Element>(output: &Array2<T>, target: &Array2<f32>) -> Array2<T> {
    let n = u16::try_from(target.len()).unwrap();
    let mut gradient = output.clone();
    ndarray::Zip::from(&mut gradient)
        .and(target)
        .for_each(|x, target| *x = T::from_f32(2.0 * (x.to_f32() - target) / f32::from(n)));
    gradient
}

#[test]
fn standalone_f32() {
    all_operations::<f32>("standalone_f32");
}

#[test]
fn standalone_bf16() {
    all_operations::<bf16>("standalone_bf16");
}

#[test]
fn standalone_f16() {
    all_operations::<f16>("standalone_f16");
}

#[test]
fn standalone_bf16_noautocast() {
    all_operations::<bf16>("standalone_bf16_noautocast");
}

#[test]
fn a_wrong_id_is_named() {
    let layer = Case::open("standalone_f32").layer::<f32>();
    let error = layer.lookup(&[1, 37]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token id 37 is outside the vocabulary of 37 rows"
    );
    assert!(layer.source().read_rows(&[TokenId(37)]).is_err());
}

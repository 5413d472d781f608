//! The optimizers, step by step.

use serde_json::{Value, json};
use trainable_tokens::{DType, TokenRows};
use trainable_tokens_testkit::tolerance;

use super::{D, Draft, draft, noise};

/// `dtype` is that of the rows.
pub(super) fn optimizers(dtype: DType) -> Vec<Draft> {
    let adam = |more: Value| {
        let mut spec = json!({"type": "adam", "lr": 0.05, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8});
        spec.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        spec
    };
    let rules = [
        (
            "sgd",
            "O6",
            json!({"type": "sgd", "lr": 0.1, "weight_decay": 0.01}),
            json!([]),
        ),
        (
            "sgd_momentum",
            "O7",
            json!({"type": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
            json!([]),
        ),
        (
            "sgd_nesterov",
            "O7",
            json!({"type": "sgd", "lr": 0.1, "momentum": 0.8, "nesterov": true, "weight_decay": 0.1}),
            json!([]),
        ),
        ("adam", "O8", adam(json!({})), json!([])),
        ("adam_l2", "O8", adam(json!({"weight_decay": 0.1})), json!([])),
        (
            "amsgrad",
            "O8",
            adam(json!({"amsgrad": true, "beta1": 0.3})),
            json!([]),
        ),
        (
            "adamw",
            "O8",
            adam(json!({"weight_decay": 0.1, "decoupled": true})),
            json!([]),
        ),
        (
            "clipped",
            "K8",
            json!({"type": "sgd", "lr": 0.1}),
            json!([{"type": "clip_grad_norm", "max_norm": 0.5}]),
        ),
        (
            "decayed",
            "K9",
            json!({"type": "sgd", "lr": 0.1}),
            json!([{"type": "decay_toward_original", "weight_decay": 0.5}]),
        ),
    ];
    let steps = 6;
    let mut drafts = Vec::new();
    for (name, clause, optimizer, hooks) in rules {
        let operation =
            json!({"operation": "optimizer", "optimizer": optimizer, "hooks": hooks, "steps": steps});
        let mut inputs = vec![
            ("rows", noise(2, dtype, 3, D)),
            ("gradients", noise(50, dtype, steps * 3, D)),
        ];
        if name == "decayed" {
            inputs.push(("original", noise(51, dtype, 3, D)));
        }
        let clauses = ["O2", "O5", "O9", "O10", "O14", clause];
        drafts.push(draft(
            &format!("optimizer_{name}"),
            Some(dtype),
            &clauses,
            0.0,
            operation,
            inputs,
        ));
    }
    drafts.extend(odd_optimizers(dtype, &adam(json!({"amsgrad": true}))));
    drafts
}

/// Gradients of another type and with NaN among them, and settings out of range.
fn odd_optimizers(dtype: DType, amsgrad: &Value) -> Vec<Draft> {
    let sgd = |lr: f64| json!({"type": "sgd", "lr": lr});
    let run = |name: &str, clauses: &[&str], tolerance: f64, optimizer: &Value, gradients: TokenRows| {
        let operation = json!({"operation": "optimizer", "optimizer": optimizer, "steps": 2});
        let inputs = vec![("rows", noise(2, dtype, 3, D)), ("gradients", gradients)];
        draft(name, Some(dtype), clauses, tolerance, operation, inputs)
    };
    let other = if dtype == DType::F64 {
        DType::F32
    } else {
        DType::F64
    };
    let other = noise(52, other, 6, D);
    let mut nan = noise(53, DType::F64, 6, D).to_f64_vec();
    nan[1] = f64::NAN;
    let nan = TokenRows::new::<f64>(nan, 6, D).unwrap().to_dtype(dtype);
    let mut drafts = vec![
        run(
            "optimizer_gradients_of_another_type",
            &["O1", "R7"],
            0.0,
            &sgd(0.1),
            other,
        ),
        // A tolerance, for the bits of a NaN that is computed are open.
        run(
            "optimizer_amsgrad_nan",
            &["O8", "N2"],
            tolerance(dtype),
            amsgrad,
            nan,
        ),
    ];
    let gradients = noise(50, dtype, 6, D);
    for (name, optimizer, hooks) in [
        ("optimizer_negative_rate", sgd(-0.1), json!([])),
        (
            "optimizer_nesterov_without_momentum",
            json!({"type": "sgd", "lr": 0.1, "nesterov": true}),
            json!([]),
        ),
        (
            "optimizer_no_limit",
            sgd(0.1),
            json!([{"type": "clip_grad_norm", "max_norm": 0.0}]),
        ),
    ] {
        let mut draft = run(name, &["O12", "K8"], 0.0, &optimizer, gradients.clone());
        let operation = json!({"operation": "optimizer", "optimizer": optimizer, "hooks": hooks, "steps": 2});
        draft.case.operation = serde_json::from_value(operation).unwrap();
        draft.case.expect_error = Some("Hyperparameter".to_owned());
        drafts.push(draft);
    }
    drafts
}

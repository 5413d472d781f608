//! Several adapters: active together, or chosen by the examples of a batch.

use serde_json::json;
use trainable_tokens::DType;
use trainable_tokens_testkit::tolerance;

use super::{D, Draft, IDS, V, draft};
use crate::noise::noise;

/// The first two share two tokens, one of them in other slots; all three share another.
const ADAPTERS: [&[u32]; 3] = [&[10, 0, 7], &[7, 2, 10, 3], &[9, 7]];

pub(super) fn several(dtype: DType) -> Vec<Draft> {
    let rows = ADAPTERS.iter().map(|ids| ids.len()).sum();
    let inputs = || {
        vec![
            ("table", noise(1, dtype, V, D)),
            ("rows", noise(2, dtype.default_row_dtype(), rows, D)),
            ("upstream", noise(30, dtype, IDS.len(), D)),
        ]
    };
    let several = |name, clauses: &[&str], tolerance, fields: serde_json::Value| {
        let mut operation = json!({"operation": "several", "adapters": ADAPTERS, "input_ids": IDS});
        let fields = fields.as_object().unwrap().clone();
        operation.as_object_mut().unwrap().extend(fields);
        draft(name, Some(dtype), clauses, tolerance, operation, inputs())
    };
    let options = json!({"scale": {"exact": 3.0}, "scale_grad_by_freq": true, "padding_idx": 2});
    vec![
        several("several_last_wins", &["A4", "A6"], 0.0, json!({"options": {}})),
        // A share may meet the gradient before or after it is summed.
        several(
            "several_weighted_mean",
            &["A4", "A7", "A8"],
            tolerance(dtype),
            json!({"options": {}, "weights": [0.3, 2.0, 0.05]}),
        ),
        several(
            "several_mixed",
            &["A15", "A16", "G4", "G5"],
            0.0,
            json!({"options": options, "choice": [1, null, 0, 2, 1, 1, 0, 2, null]}),
        ),
        several(
            "several_mixed_examples",
            &["A15", "A16"],
            0.0,
            json!({"options": {}, "choice": [2, 0, 1]}),
        ),
    ]
}

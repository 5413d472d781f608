//! Cases with PEFT's inputs, and PEFT's outputs beside them.

use serde_json::{Value, json};
use trainable_tokens::{DType, TokenRows};
use trainable_tokens_testkit::peft::{Fixture, fixtures, optimizer};
use trainable_tokens_testkit::tolerance;

use super::{Draft, draft};

/// The operations of one of PEFT's cases.
pub(super) fn peft(name: &str) -> Vec<Draft> {
    let case = Fixture::open(&fixtures().join(name)).unwrap();
    let (table, dtype) = (case.table().clone(), case.table().dtype());
    let trained = case.rows("delta.trained").unwrap();
    let (tokens, ids) = (&case.json()["token_indices"], case.ids("input_ids").unwrap());

    let operation = json!({"operation": "lookup", "token_indices": tokens, "input_ids": ids, "options": {}});
    let inputs = vec![
        ("table", table.clone()),
        ("rows", trained.clone()),
        ("upstream", case.rows("upstream").unwrap()),
    ];
    let clauses = ["L3", "L4", "G1"];
    let mut lookup = draft("peft_lookup", Some(dtype), &clauses, 0.0, operation, inputs);
    lookup.expect("output", case.rows("embed.trained").unwrap(), 0.0);
    // PEFT sums the gradient in the table's type.
    let gradient = if dtype == DType::F32 {
        1e-6
    } else {
        tolerance(dtype)
    };
    lookup.expect("gradient", case.rows("delta.grad").unwrap(), gradient);

    let operation = json!({"operation": "merge", "token_indices": tokens});
    let inputs = vec![("table", table), ("rows", trained)];
    let mut merge = draft("peft_merge", Some(dtype), &["M2"], 0.0, operation, inputs);
    merge.expect("merged", case.rows("merged.weight").unwrap(), 0.0);

    let operations = case.json()["operations"].as_array().unwrap().iter();
    let trajectories = operations.filter(|operation| operation["op"] == "trajectory");
    let trajectories = trajectories.map(|operation| trajectory(&case, operation));
    [lookup, merge].into_iter().chain(trajectories).collect()
}

/// PEFT's recorded gradients into the same optimizer: its recorded rows must come out.
fn trajectory(case: &Fixture, trajectory: &Value) -> Draft {
    let recorded = |key: &str| case.rows(trajectory["expect"][key].as_str().unwrap()).unwrap();
    let steps = trajectory["steps"].as_u64().unwrap();
    let optimizer = serde_json::to_value(optimizer(&trajectory["optimizer"]).unwrap()).unwrap();
    let operation = json!({"operation": "optimizer", "optimizer": optimizer, "steps": steps});
    let deltas = recorded("deltas");
    let k = deltas.num_rows() / (usize::try_from(steps).unwrap() + 1);
    let part = |from: usize, rows: usize| {
        let size = deltas.embedding_dim() * deltas.dtype().size_in_bytes();
        let bytes = &deltas.to_le_bytes()[from * size..(from + rows) * size];
        TokenRows::from_le_bytes(deltas.dtype(), rows, deltas.embedding_dim(), bytes).unwrap()
    };
    let inputs = vec![("rows", part(0, k)), ("gradients", recorded("grads"))];
    let name = format!("peft_optimizer_{}", trajectory["name"].as_str().unwrap());
    // The rows train in f32 also over a table of a half type.
    let dtype = case.table().dtype();
    let mut draft = draft(&name, Some(dtype), &["O2", "O9"], 0.0, operation, inputs);
    draft.expect("rows_after", part(k, deltas.num_rows() - k), 2e-6);
    draft
}

//! Which vectors there are: inputs of each case, from a fixed generator of numbers or from PEFT's fixtures.

#[path = "generate/optimizers.rs"]
mod optimizers;
#[path = "generate/peft.rs"]
mod peft;
#[path = "generate/several.rs"]
mod several;

use std::path::Path;

use serde_json::{Value, json};
use trainable_tokens::format::{TrainingState, digest};
use trainable_tokens::{Adam, AdamConfig, DType, RowOptimizer, TokenRows};
use trainable_tokens_testkit::vectors::{Operation, Tensors, VectorCase};
use trainable_tokens_testkit::{Harness, tolerance};

use self::optimizers::optimizers;
use self::peft::peft;
use self::several::several;
use super::noise::noise;
use super::reference::Nd;

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];
const V: usize = 11;
const D: usize = 5;
/// Not sorted, and both edges of the vocabulary among them.
const TOKENS: [u32; 4] = [10, 0, 7, 3];
/// Repeats, both edges, tokens that train and others; token 3 does not occur.
const IDS: [u32; 9] = [7, 0, 1, 10, 7, 7, 2, 10, 9];

/// A case, its inputs, and what PEFT has for its outputs: name, values, tolerance.
pub(crate) struct Draft {
    pub(crate) case: VectorCase,
    pub(crate) inputs: Tensors,
    pub(crate) peft: Vec<(String, TokenRows, f64)>,
}

/// As [`noise`], with values among them that copies tend to get wrong. Not NaN, of which a conversion keeps nothing
/// for certain.
fn odd(seed: u64, dtype: DType, rows: usize, columns: usize) -> TokenRows {
    let odd = [-0.0, f64::INFINITY, f64::NEG_INFINITY, 6e-8, 1e-40];
    let mut values = noise(seed, DType::F64, rows, columns).to_f64_vec();
    values
        .iter_mut()
        .step_by(3)
        .zip(odd.iter().cycle())
        .for_each(|(value, odd)| *value = *odd);
    TokenRows::new(values, rows, columns).unwrap().to_dtype(dtype)
}

impl Draft {
    /// Says what PEFT has for an output.
    fn expect(&mut self, name: &str, rows: TokenRows, tolerance: f64) {
        self.peft.push((name.to_owned(), rows, tolerance));
    }
}

/// NaNs that differ in their payload.
fn nans(dtype: DType, rows: usize, columns: usize) -> TokenRows {
    let bytes = (0..rows * columns).flat_map(|at| {
        let payload = u8::try_from(at % 100 + 1).unwrap();
        match dtype {
            DType::F64 => (f64::NAN.to_bits() | u64::from(payload)).to_le_bytes().to_vec(),
            DType::F32 => (f32::NAN.to_bits() | u32::from(payload)).to_le_bytes().to_vec(),
            DType::F16 => (half::f16::NAN.to_bits() | u16::from(payload))
                .to_le_bytes()
                .to_vec(),
            // Six bits, of which the highest is the sign of a quiet NaN.
            DType::BF16 => (half::bf16::NAN.to_bits() | u16::from(payload % 64))
                .to_le_bytes()
                .to_vec(),
        }
    });
    TokenRows::from_le_bytes(dtype, rows, columns, &bytes.collect::<Vec<u8>>()).unwrap()
}

fn draft(
    name: &str,
    dtype: Option<DType>,
    clauses: &[&str],
    tolerance: f64,
    operation: Value,
    inputs: Vec<(&str, TokenRows)>,
) -> Draft {
    let mut case = json!({
        "name": dtype.map_or(name.to_owned(), |dtype| format!("{name}_{}", dtype.to_string().to_lowercase())),
        "clauses": clauses,
        "dtype": dtype.map(|dtype| dtype.to_string()),
        "tolerance": tolerance,
    });
    let Value::Object(operation) = operation else {
        panic!("{name}: an operation is an object")
    };
    case.as_object_mut().unwrap().extend(operation);
    Draft {
        case: serde_json::from_value(case).unwrap(),
        inputs: inputs
            .into_iter()
            .map(|(name, rows)| (name.to_owned(), rows))
            .collect(),
        peft: Vec::new(),
    }
}

fn refused(name: &str, clauses: &[&str], kind: &str, operation: Value) -> Draft {
    let mut draft = draft(name, None, clauses, 0.0, operation, Vec::new());
    draft.case.expect_error = Some(kind.to_owned());
    draft
}

/// Every case, in the order of the file.
pub(crate) fn drafts() -> Vec<Draft> {
    let mut drafts = token_sets();
    for dtype in DTYPES {
        drafts.extend(lookups(dtype));
        drafts.extend(heads(dtype));
        drafts.extend(merges(dtype));
        drafts.extend(several(dtype));
        drafts.extend(optimizers(dtype));
    }
    drafts.extend(files());
    for name in ["standalone_f32", "standalone_f16", "standalone_bf16"] {
        drafts.extend(peft(name));
    }
    drafts
}

fn token_sets() -> Vec<Draft> {
    let set = |ids: &[u32], vocab_size: usize| json!({"operation": "token_set", "token_indices": ids, "vocab_size": vocab_size});
    vec![
        draft(
            "token_set_any_order",
            None,
            &["T1", "T7"],
            0.0,
            set(&TOKENS, V),
            vec![],
        ),
        draft("token_set_empty", None, &["T7"], 0.0, set(&[], V), vec![]),
        draft("token_set_all", None, &["T7"], 0.0, set(&[2, 1, 0], 3), vec![]),
        refused(
            "token_set_out_of_range",
            &["T4"],
            "TokenOutOfRange",
            set(&[1, 11], V),
        ),
        refused(
            "token_set_repeated",
            &["T5"],
            "DuplicateToken",
            set(&[4, 1, 4], V),
        ),
        refused(
            "token_set_vocabulary_too_large",
            &["T3"],
            "TokenOutOfRange",
            set(&[], 1 << 32),
        ),
        refused(
            "token_set_first_error",
            &["T6"],
            "DuplicateToken",
            set(&[4, 4, 11], V),
        ),
    ]
}

/// A lookup, with its gradient where it covers a clause of it.
fn lookup(
    name: &str,
    dtype: DType,
    clauses: &[&str],
    tolerance: f64,
    options: &Value,
    [table, rows]: [TokenRows; 2],
) -> Draft {
    let operation =
        json!({"operation": "lookup", "token_indices": TOKENS, "input_ids": IDS, "options": options});
    let mut inputs = vec![("table", table), ("rows", rows)];
    if clauses.iter().any(|clause| clause.starts_with('G')) {
        inputs.push(("upstream", noise(30, dtype, IDS.len(), D)));
    }
    draft(name, Some(dtype), clauses, tolerance, operation, inputs)
}

fn lookups(dtype: DType) -> Vec<Draft> {
    let rows = dtype.default_row_dtype();
    let table = odd(5, dtype, V, D);
    let values = table.to_f64_vec();
    let own = TOKENS
        .iter()
        .flat_map(|id| values[*id as usize * D..][..D].to_vec());
    let own = TokenRows::new::<f64>(own.collect(), 4, D).unwrap().to_dtype(rows);
    let odd = [odd(3, dtype, V, D), odd(4, rows, 4, D)];
    let mut drafts = vec![
        lookup(
            "lookup_odd_values",
            dtype,
            &["R5", "L3", "L4", "L11"],
            0.0,
            &json!({}),
            odd,
        ),
        lookup(
            "lookup_untrained",
            dtype,
            &["L12", "T9"],
            0.0,
            &json!({}),
            [table, own],
        ),
    ];
    let options: [(&str, &[&str], Value); 9] = [
        ("lookup", &["L3", "L4", "L5", "G1", "G2", "G9"], json!({})),
        (
            "lookup_scale_exact",
            &["L9", "L10", "G3"],
            json!({"scale": {"exact": 5.656_854_249_492_381}}),
        ),
        (
            "lookup_scale_of_the_tables_type",
            &["L9", "L10", "G3"],
            json!({"scale": {"table_dtype": 5.656_854_249_492_381}}),
        ),
        ("lookup_padding", &["G5", "G6"], json!({"padding_idx": 7})),
        (
            "lookup_padding_trained",
            &["G5"],
            json!({"padding_idx": 7, "train_padding": true}),
        ),
        (
            "lookup_scale_grad_by_freq",
            &["G4"],
            json!({"scale_grad_by_freq": true}),
        ),
        (
            "lookup_max_norm",
            &["L6", "L7", "L8", "G7"],
            json!({"max_norm": 1.0}),
        ),
        (
            "lookup_all_options",
            &["L6", "L7", "L10", "G3", "G4", "G5", "G7"],
            json!({"max_norm": 1.0, "scale": {"exact": 3.0}, "scale_grad_by_freq": true, "padding_idx": 10}),
        ),
        ("lookup_padding_out_of_range", &["G6"], json!({"padding_idx": 11})),
    ];
    for (name, clauses, options) in options {
        let inputs = [noise(1, dtype, V, D), noise(2, rows, 4, D)];
        // Sums of squares may be in any order; all else has an order of its own.
        let tolerance = if options.get("max_norm").is_some() {
            tolerance(dtype)
        } else {
            0.0
        };
        drafts.push(lookup(name, dtype, clauses, tolerance, &options, inputs));
    }
    let refused = drafts.last_mut().unwrap();
    refused.case.expect_error = Some("TokenOutOfRange".to_owned());
    let inputs = [noise(1, dtype, V, D), noise(2, dtype, 4, D)];
    let clauses = ["T10", "L4", "G14"];
    let name = "lookup_rows_of_the_tables_type";
    drafts.push(lookup(name, dtype, &clauses, 0.0, &json!({}), inputs));
    let inputs = [nans(dtype, V, D), nans(dtype, 4, D)];
    drafts.push(lookup(
        "lookup_nan_payloads",
        dtype,
        &["R5", "L3", "L4"],
        0.0,
        &json!({}),
        inputs,
    ));

    let inputs = [noise(1, dtype, V, D), noise(2, rows, 4, D)];
    let mut refused = lookup("lookup_out_of_range", dtype, &["L2"], 0.0, &json!({}), inputs);
    refused.case.expect_error = Some("TokenOutOfRange".to_owned());
    if let Operation::Lookup { input_ids, .. } = &mut refused.case.operation {
        *input_ids = vec![1, 11];
    }
    drafts.push(refused);
    drafts
}

fn heads(dtype: DType) -> Vec<Draft> {
    let operation = json!({"operation": "head", "token_indices": TOKENS});
    let inputs = vec![
        ("table", noise(1, dtype, V, D)),
        ("rows", noise(2, dtype.default_row_dtype(), 4, D)),
        ("hidden", noise(40, dtype, 3, D)),
        ("upstream", noise(41, dtype, 3, V)),
    ];
    vec![draft(
        "head",
        Some(dtype),
        &["H1", "H3", "H6", "H7"],
        tolerance(dtype),
        operation,
        inputs,
    )]
}

fn merges(dtype: DType) -> Vec<Draft> {
    let operation = json!({"operation": "merge", "token_indices": TOKENS});
    let inputs = vec![
        ("table", odd(6, dtype, V, D)),
        ("rows", odd(7, dtype.default_row_dtype(), 4, D)),
    ];
    vec![draft(
        "merge",
        Some(dtype),
        &["M1", "M2", "M3", "M9", "M12"],
        0.0,
        operation,
        inputs,
    )]
}

fn files() -> Vec<Draft> {
    let (table, rows) = (noise(1, DType::F32, V, D), noise(2, DType::F32, 4, D));
    let source = Nd::<f32>::source(&table).unwrap();
    let adapter = json!({
        "operation": "adapter",
        "directory": "adapter",
        "module": "model.embed_tokens",
        "tied": ["lm_head"],
        "token_indices": TOKENS,
        "tokens": ["<think>", "\"quoted\"\\", "é\u{1f600}", "line\nbreak"],
        "init": "keep",
        "library_version": "0.1.0",
        "base_digest": digest(&source).unwrap().to_string(),
    });
    let state = json!({
        "operation": "training_state",
        "directory": "training_state",
        "step": 2,
        "extra": {"seed": 7, "data": "train.jsonl"},
    });
    let mut state = draft(
        "training_state",
        None,
        &["C1", "C2", "C3", "C4", "C5", "C8"],
        0.0,
        state,
        vec![],
    );
    state.inputs = adam_after_two_steps().state().tensors.into_iter().collect();
    let clauses = [
        "F1", "F3", "F5", "F6", "F15", "F16", "F17", "F20", "D1", "D2", "D3", "D4", "D7",
    ];
    vec![
        draft(
            "adapter",
            Some(DType::F32),
            &clauses,
            0.0,
            adapter,
            vec![("table", table), ("rows", rows)],
        ),
        state,
    ]
}

fn adam_after_two_steps() -> Adam {
    let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
    let mut rows = noise(2, DType::F32, 4, D);
    for step in 0..2 {
        adam.step(&mut rows, &noise(60 + step, DType::F32, 4, D), 0.05)
            .unwrap();
    }
    adam
}

/// Writes the training state that the case of that name reads.
pub(crate) fn training_state(dir: &Path) {
    let state = TrainingState {
        optimizer: adam_after_two_steps().state(),
        extra: json!({"seed": 7, "data": "train.jsonl"}),
    };
    std::fs::create_dir_all(dir.join("training_state")).unwrap();
    state.write_into(dir.join("training_state")).unwrap();
}

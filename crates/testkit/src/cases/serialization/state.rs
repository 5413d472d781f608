//! Training states in files.

use std::fs;

use serde_json::{Value, json};
use trainable_tokens_core::{Adam, AdamConfig, ErrorKind, OptimizerState, RowOptimizer};
use trainable_tokens_format::{SafetensorsFile, TrainingState};

use super::{MODULE, framed, round_trip, unframed, unpadded};
use crate::failure::{equal, refused, same};
use crate::world::{World, for_all, noise, odd_values};
use crate::{Failure, Harness, Outcome};

/// A run that is saved to files and resumed from them ends with the same bits.
pub fn a_saved_run_goes_on_with_the_same_bits<H: Harness>() -> Outcome {
    for_all(|world| {
        let new = || {
            Adam::new(AdamConfig {
                lr: 0.1,
                weight_decay: 0.1,
                amsgrad: true,
                ..AdamConfig::ADAMW
            })
        };
        let gradient = |step| noise(step, H::DTYPE.default_row_dtype(), world.tokens.len(), world.d);
        let (mut layer, mut optimizer) = (world.trained::<H>()?, new()?);
        let mut saved = None;
        for step in 0..5 {
            if step == 2 {
                let dir = tempfile::tempdir()?;
                let extra = json!({"seed": world.seed});
                let state = TrainingState {
                    optimizer: optimizer.state(),
                    extra,
                };
                state.write_into(dir.path())?;
                let state = TrainingState::read(dir.path().join(TrainingState::FILE_NAME))?;
                saved = Some((round_trip::<H>(&layer)?, state));
            }
            layer.step_with(gradient(step), &mut optimizer, &mut [])?;
        }
        let (adapter, state) = saved.ok_or("nothing was saved")?;
        equal("extra", &state.extra, &json!({"seed": world.seed}))?;
        let rows = adapter.rows(MODULE).ok_or("the file has no rows of the module")?;
        let (mut resumed, mut again) = (world.fresh::<H>()?, new()?);
        resumed.set_rows(rows)?;
        again.load_state(state.optimizer)?;
        for step in 2..5 {
            resumed.step_with(gradient(step), &mut again, &mut [])?;
        }
        same("rows", &resumed.rows()?, &layer.rows()?)?;
        equal("state", &again.state(), &optimizer.state())
    })
}

/// A state of two tensors that no optimizer needs to have made.
fn state<H: Harness>(step: u64, extra: Value) -> TrainingState {
    let rows = |seed| odd_values(seed, H::DTYPE, 2, 3);
    let tensors = [("exp_avg_sq", rows(2)), ("exp_avg", rows(1))];
    let tensors = tensors.map(|(name, rows)| (name.to_owned(), rows));
    TrainingState {
        optimizer: OptimizerState {
            step,
            tensors: tensors.into(),
        },
        extra,
    }
}

/// The file's metadata are spelled as specified, whatever the count; its tensors are sorted and keep every bit.
pub fn a_state_is_written_as_specified<H: Harness>() -> Outcome {
    for (step, extra, text) in [
        (0, Value::Null, "null"),
        (120, json!({}), "{}"),
        (u64::MAX, json!({"data": [1, "x y"]}), r#"{\"data\":[1,\"x y\"]}"#),
    ] {
        let state = state::<H>(step, extra);
        let bytes = state.to_bytes()?;
        let (header, data) = unframed(&bytes)?;
        let (size, dtype) = (6 * H::DTYPE.size_in_bytes(), H::DTYPE);
        let tensor = |name: &str, from: usize| {
            let to = from + size;
            format!(r#""optimizer.{name}":{{"dtype":"{dtype}","shape":[2,3],"data_offsets":[{from},{to}]}}"#)
        };
        let stored = format!(r#"{{\"format_version\":1,\"step\":{step},\"extra\":{text}}}"#);
        let metadata = format!(r#"{{"format":"pt","trainable_tokens.training_state":"{stored}"}}"#);
        let (first, second) = (tensor("exp_avg", 0), tensor("exp_avg_sq", size));
        let want = format!(r#"{{"__metadata__":{metadata},{first},{second}}}"#);
        equal("the header", &unpadded(header).0, &want.as_str())?;
        equal("the header's length, modulo 8,", &(header.len() % 8), &0)?;
        let rows = |at: usize| state.optimizer.tensors[at].1.to_le_bytes();
        equal("the data", &data, &&[rows(1), rows(0)].concat()[..])?;

        let dir = tempfile::tempdir()?;
        state.write_into(dir.path())?;
        let path = dir.path().join("training_state.safetensors");
        equal("the file", &fs::read(&path)?, &bytes)?;
        let read = TrainingState::read(path)?;
        equal("the count", &read.optimizer.step, &step)?;
        equal("extra", &read.extra, &state.extra)?;
        equal("the file written again", &read.to_bytes()?, &bytes)?;
    }
    Ok(())
}

fn from_bytes(bytes: Vec<u8>) -> trainable_tokens_format::Result<TrainingState> {
    TrainingState::from_file(&SafetensorsFile::from_bytes("state", bytes)?)
}

/// Another version, a missing key or field, and tensors of another name, rank or type are refused; keys that are not
/// known are ignored, and `extra` may be absent.
pub fn what_is_no_state_is_refused<H: Harness>() -> Outcome {
    let bytes = state::<H>(7, json!({})).to_bytes()?;
    let (header, data) = unframed(&bytes)?;
    let change = |from: &str, to: &str| {
        let changed = header.replacen(from, to, 1);
        let unchanged = || Failure::new(format!("the case is wrong: no {from} in {header}"));
        (changed != header)
            .then(|| from_bytes(framed(&changed, data)))
            .ok_or_else(unchanged)
    };
    let dtype = H::DTYPE.to_string();
    for (from, to, kind) in [
        (r#"_version\":1"#, r#"_version\":2"#, ErrorKind::File),
        (r#"\"format_version\":1,"#, "", ErrorKind::File),
        (r#"\"step\":7,"#, "", ErrorKind::File),
        (r#"\"step\":7"#, r#"\"step\":-1"#, ErrorKind::File),
        (r#"\"step\":7"#, r#"\"step\":7.0"#, ErrorKind::File),
        (
            r#"\"step\":7"#,
            r#"\"step\":18446744073709551616"#,
            ErrorKind::File,
        ),
        (".training_state", ".state", ErrorKind::File),
        (r#"{\"format"#, r#"[\"format"#, ErrorKind::File),
        ("optimizer.exp_avg", "exp_avg", ErrorKind::File),
        ("[2,3]", "[6]", ErrorKind::Shape),
        ("[2,3]", "[2,3,1]", ErrorKind::Shape),
        (&dtype, &integer(&dtype)?, ErrorKind::DType),
    ] {
        refused(&format!("{to} for {from}"), change(from, to)?, kind)?;
    }
    let read = change(r#",\"extra\":{}"#, r#",\"note\":[1]"#)??;
    equal("the count", &read.optimizer.step, &7)?;
    equal("extra", &read.extra, &Value::Null)
}

/// An integer type as wide as this element type.
fn integer(dtype: &str) -> Result<String, Failure> {
    let wide = match dtype {
        "F64" => "I64",
        "F32" => "I32",
        "F16" | "BF16" => "I16",
        other => return Err(Failure::new(format!("there is no type {other}"))),
    };
    Ok(wide.to_owned())
}

/// Reading a state does not check it against an optimizer; loading and stepping do.
pub fn a_state_is_checked_by_the_optimizer<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let dtype = H::DTYPE.default_row_dtype();
    let read = |rows: [usize; 2]| {
        let tensors = [("exp_avg", rows[0]), ("exp_avg_sq", rows[1])];
        let tensors = tensors.map(|(name, k)| (name.to_owned(), noise(1, dtype, k, 3)));
        let optimizer = OptimizerState {
            step: 3,
            tensors: tensors.into(),
        };
        from_bytes(
            TrainingState {
                optimizer,
                extra: Value::Null,
            }
            .to_bytes()?,
        )
    };
    let mut adam = Adam::new(AdamConfig::ADAM)?;
    refused(
        "tensors that differ",
        adam.load_state(read([2, 3])?.optimizer),
        ErrorKind::Shape,
    )?;
    let mut layer = world.trained::<H>()?;
    for (k, fits) in [(3, false), (2, true)] {
        adam.load_state(read([k, k])?.optimizer)?;
        let step = layer.step_with(noise(2, dtype, 2, 3), &mut adam, &mut []);
        if fits {
            equal("the step's number", &step?.step, &4)?;
        } else {
            refused("a state of more rows", step, ErrorKind::Shape)?;
        }
    }
    Ok(())
}

//! Values of `case.json`.

use serde_json::Value;

use crate::{Failure, Outcome};

/// A token id.
pub(super) fn id(value: &Value) -> Result<u32, Failure> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Failure::new(format!("{value} is no token id")))
}

/// A list of token ids.
pub(super) fn ids(value: &Value) -> Result<Vec<u32>, Failure> {
    let ids = value.as_array().ok_or("the token ids are no list")?;
    ids.iter().map(id).collect()
}

fn field<'a, T>(
    of: &'a Value,
    name: &str,
    kind: &str,
    read: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<T, Failure> {
    read(&of[name]).ok_or_else(|| Failure::new(format!("{name} is {}, expected {kind}", of[name])))
}

/// The text at `name`.
pub(super) fn text<'a>(of: &'a Value, name: &str) -> Result<&'a str, Failure> {
    field(of, name, "a text", Value::as_str)
}

/// The number at `name`.
pub(super) fn number(of: &Value, name: &str) -> Result<f64, Failure> {
    field(of, name, "a number", Value::as_f64)
}

/// The truth value at `name`.
pub(super) fn flag(of: &Value, name: &str) -> Result<bool, Failure> {
    field(of, name, "true or false", Value::as_bool)
}

/// The count at `name`.
pub(super) fn count(of: &Value, name: &str) -> Result<usize, Failure> {
    let count = field(of, name, "a count", Value::as_u64)?;
    Ok(usize::try_from(count)?)
}

/// The texts at `name`.
pub(super) fn texts<'a>(of: &'a Value, name: &str) -> Result<Vec<&'a str>, Failure> {
    let read = |value: &'a Value| value.as_array()?.iter().map(Value::as_str).collect();
    field(of, name, "a list of texts", read)
}

/// Refuses fields that are not among the known ones.
pub(super) fn only(what: &str, of: &Value, known: &[&str]) -> Outcome {
    let fields = of.as_object().ok_or_else(|| format!("{what} is no object"))?;
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(Failure::new(format!("the field {name} of {what} is unknown"))),
        None => Ok(()),
    }
}

//! Golden vectors: inputs and what must come out of them, for ports in any language.
//!
//! They lie in `tests/vectors` of the repository; its README says what the fields mean. [`run`] checks a backend
//! against them, [`generate`] makes them.

mod execute;
mod schema;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use trainable_tokens_core::TokenRows;
use trainable_tokens_format::SafetensorsFile;

pub use schema::{AdapterFile, HookSpec, Operation, OptimizerSpec, Options, Scale, VectorCase, Vectors};

use crate::failure::{Exact, close_within, ensure, same};
use crate::{Failure, Harness};

/// The clause of SPEC.md that [`run`] checks; each vector names those that it covers.
pub const CLAUSE: &str = "N5";
/// The list of cases.
pub const CASES_FILE: &str = "vectors.json";
/// All tensors, `<case>.<name>`.
pub const TENSORS_FILE: &str = "vectors.safetensors";

/// The environment variable with which vectors and adapter directories are written anew.
pub const BLESS: &str = "TRAINABLE_TOKENS_BLESS";

/// Tensors of a case by name, all of two dimensions.
pub type Tensors = BTreeMap<String, TokenRows>;

/// Runs every case for tables of the harness's element type; returns how many there were.
///
/// # Errors
///
/// The reason why one fails, or why the files cannot be read.
pub fn run<H: Harness>(dir: &Path) -> Result<usize, String> {
    run_all::<H>(dir).map_err(|failure| failure.reason().to_owned())
}

fn run_all<H: Harness>(dir: &Path) -> Result<usize, Failure> {
    let vectors: Vectors = serde_json::from_slice(&fs::read(dir.join(CASES_FILE))?)?;
    ensure!(
        vectors.format_version == 1,
        "the vectors have format {}, not 1",
        vectors.format_version
    );
    let file = SafetensorsFile::open(dir.join(TENSORS_FILE))?;
    let mut tensors: BTreeMap<String, Tensors> = BTreeMap::new();
    for name in file.names() {
        let (case, short) = name.rsplit_once('.').ok_or("a tensor without a case")?;
        let rows = file.tensor(name)?.to_rows()?;
        tensors
            .entry(case.to_owned())
            .or_default()
            .insert(short.to_owned(), rows);
    }
    let mut count = 0;
    for case in vectors.cases.iter().filter(|case| case.runs_on(H::DTYPE)) {
        let tensors = tensors.get(&case.name).cloned().unwrap_or_default();
        check::<H>(case, &tensors, dir)
            .map_err(|failure| Failure::new(format!("{}: {}", case.name, failure.reason())))?;
        count += 1;
    }
    Ok(count)
}

/// Runs one case and compares what comes out.
fn check<H: Harness>(case: &VectorCase, tensors: &Tensors, dir: &Path) -> Result<(), Failure> {
    let outputs = match (execute::execute::<H>(case, tensors, dir), &case.expect_error) {
        (Ok(outputs), None) => outputs,
        (Err(error), Some(kind)) => {
            ensure!(
                error.kind.as_ref() == Some(kind),
                "refused as {:?} ({}), expected {kind}",
                error.kind,
                error.reason
            );
            return Ok(());
        }
        (Err(error), None) => return Err(Failure::new(error.reason)),
        (Ok(_), Some(kind)) => {
            return Err(Failure::new(format!(
                "accepted, expected an error of kind {kind}"
            )));
        }
    };
    for (name, got) in outputs {
        let want = tensors
            .get(&name)
            .ok_or_else(|| Failure::new(format!("there is no tensor {name}")))?;
        // A backend may hand gradients of rows out in the rows' own type (SPEC.md G14).
        let own_type = tensors.get("rows").map(TokenRows::dtype) == Some(got.dtype());
        let want = &if name == "gradient" && own_type {
            want.to_dtype(got.dtype())
        } else {
            want.clone()
        };
        if case.tolerance == 0.0 {
            same(&name, &got, want)?;
        } else {
            close_within(&name, &got, &Exact::of(want), case.tolerance)?;
        }
    }
    Ok(())
}

/// What comes out of a case whose inputs are `tensors`, computed on the harness's backend.
///
/// # Errors
///
/// The reason why it fails.
pub fn generate<H: Harness>(case: &VectorCase, tensors: &Tensors, dir: &Path) -> Result<Tensors, String> {
    execute::execute::<H>(case, tensors, dir).map_err(|error| error.reason)
}

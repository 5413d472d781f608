//! Names of trained rows in a file, as PEFT and this library take them.

use std::path::Path;

use trainable_tokens_format::{Adapter, Error, SafetensorsFile};

use super::fixture::Fixture;
use crate::failure::{equal, same};
use crate::{Failure, Outcome};

/// What becomes of an adapter whose keys are not quite those of a tied model.
enum Ours {
    /// The trained rows are read.
    Read,
    /// Copies of tied rows that differ are refused.
    TiedCopies,
    /// The rows of the target are missing.
    Missing,
    /// The name is refused.
    Misnamed,
}

/// The keys that PEFT accepts for a tied model, and what is accepted here.
pub(super) fn variants(fixture: &Fixture) -> Outcome {
    let variants = fixture.json()["variants"].as_object();
    for (name, stated) in variants.ok_or("variants is no object")? {
        let dir = fixture.dir().join(format!("adapter_{name}"));
        // F16: of copies that disagree PEFT takes the head's. F17: it passes over names that it does not know.
        let loaded = loaded_by_peft(fixture, &dir.join("adapter_model.safetensors"))?;
        equal(
            &format!("what PEFT loads of {name}"),
            &stated["delta_loaded"],
            &loaded.into(),
        )?;
        let ours = match name.as_str() {
            "both" | "embed_only" => Ours::Read,
            "disagree_head" | "disagree_embed" => Ours::TiedCopies,
            "head_only" => Ours::Missing,
            "token_adapter_key" | "no_prefix" | "with_adapter_name" => Ours::Misnamed,
            _ => return Err(Failure::new(format!("the variant {name} is unknown"))),
        };
        match (ours, Adapter::read(&dir)) {
            (Ours::Read, Ok(adapter)) => {
                let rows = adapter.rows(&fixture.first().path).ok_or("it has no rows")?;
                same(name, rows, &fixture.rows("delta.trained")?)?;
            }
            (Ours::TiedCopies, Err(Error::TiedCopies { .. }))
            | (Ours::Missing, Err(Error::TensorMissing { .. }))
            | (Ours::Misnamed, Err(Error::TensorKey { .. })) => {}
            (_, Ok(_)) => return Err(Failure::new(format!("{name} is accepted"))),
            (_, Err(error)) => return Err(Failure::new(format!("{name}: {error}"))),
        }
    }
    Ok(())
}

/// What PEFT makes of the keys in a file: the last module's copy, under its own name with or without that of the adapter.
fn loaded_by_peft(fixture: &Fixture, path: &Path) -> Result<&'static str, Failure> {
    let file = SafetensorsFile::open(path)?;
    let trained = fixture.rows("delta.trained")?;
    let mut loaded = "base rows (nothing loaded)";
    for module in ["model.embed_tokens", "lm_head"] {
        for end in ["", ".default"] {
            let name = format!("base_model.model.{module}.trainable_tokens_delta{end}");
            if file.contains(&name) {
                let is_trained = file.tensor(&name)?.bytes == trained.to_le_bytes();
                loaded = if is_trained { "trained" } else { "other (+1)" };
            }
        }
    }
    Ok(loaded)
}

//! Rows of tokens into the model, weights of LoRA into an adapter of their own.

use std::path::Path;

use crate::adapter::{Adapter, BaseCheck};
use crate::atomic::{Overwrite, write_dir_atomically};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::merge::{Merge, MergeReport, check_apart};
use crate::model::ModelTables;

/// Splits a LoRA adapter that trains tokens: writes a copy of the model with the rows merged as `out_model`, and the adapter
/// without its tokens, which any program that knows LoRA can load, as `out_adapter`. Together they are what the adapter is
/// on `base`. The files of the copy are those of [`merge_checkpoint`](crate::merge_checkpoint).
///
/// Both appear or none does, but for an error of the system at the very end: the adapter appears last.
///
/// # Errors
///
/// [`Error::Unsupported`] if the adapter trains no tokens, has no weights of LoRA, or has some for a table of which it also
/// trains rows: LoRA would change those again. [`Error::Target`] if an output would take the other, or the base, with it;
/// those of [`Merge::with`], [`Merge::write`] and [`Adapter::write`]; [`Error::Base`] if the base's table is not the one that
/// the adapter records.
pub fn split_adapter(
    base: &Checkpoint,
    adapter: &Adapter,
    out_model: impl AsRef<Path>,
    out_adapter: impl AsRef<Path>,
    overwrite: Overwrite,
) -> Result<MergeReport> {
    let (out_model, out_adapter) = (out_model.as_ref(), out_adapter.as_ref());
    check_outputs(base, out_model, out_adapter)?;
    adapter.expect_separable(base)?;
    let plain = adapter.clone().without_whole_tables().without_tokens()?;
    let name = out_model.to_string_lossy().into_owned();
    let config = plain
        .config()
        .with_field("base_model_name_or_path", &name.into())?;
    let plain = plain.with_config(config)?;
    let merge = Merge::new(base)
        .base_check(BaseCheck::SameTable)
        .with_rows("the adapter", adapter)?;
    write_dir_atomically(out_adapter, overwrite, |dir| {
        plain.write_into(dir)?;
        merge.write(out_model, overwrite)
    })
}

/// Replacing one output must not remove the other, nor the base.
fn check_outputs(base: &Checkpoint, out_model: &Path, out_adapter: &Path) -> Result<()> {
    check_apart("the base checkpoint", base.dir(), out_adapter)?;
    check_apart("the model to write", out_model, out_adapter)
}

impl Adapter {
    /// Refuses what has nothing to be split, or cannot be.
    fn expect_separable(&self, base: &Checkpoint) -> Result<()> {
        let unsupported = |what: String| {
            let path = self.origin().to_owned();
            Err(Error::Unsupported { path, what })
        };
        let lora = self.lora_weights()?;
        if lora.is_empty() {
            return unsupported("it has no weights of LoRA that would be left; merge it instead".to_owned());
        }
        if self.modules().is_empty() {
            return unsupported("it trains no tokens, so that there is nothing to split off".to_owned());
        }
        let model = ModelTables::of(&base.named_for(self)?)?;
        let shared = |path: &str| model.shares_input_embedding(path);
        let rows_shared = self.modules().iter().any(|module| shared(module.path()));
        let has_rows = |path: &str| self.module(path).is_some() || (shared(path) && rows_shared);
        match lora.iter().find(|lora| has_rows(lora.path())) {
            None => Ok(()),
            Some(lora) => unsupported(format!(
                "it has weights of LoRA for {:?}, the table of which it also trains rows; they would change the rows in the \
                 model again",
                lora.path()
            )),
        }
    }
}

//! Baking adapters into a copy of a checkpoint.

mod adapters;
mod copy;
mod grow;
mod output;
mod plan;
mod resize;
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

pub use adapters::Merge;
use plan::Plan;
pub use resize::{Resize, ResizeReport};
use trainable_tokens_core::{MergeCheck, TokenId, TokenRows};

use crate::adapter::{Adapter, RecordedTable};
use crate::atomic::{Overwrite, sync, write_dir_atomically};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::ModelTables;

/// Rows to put into one table of a checkpoint.
#[derive(Clone, Debug)]
pub struct RowReplacement {
    /// The name by which the tensor is stored, such as `model.embed_tokens.weight`.
    pub tensor: String,
    /// Which rows.
    pub ids: Vec<TokenId>,
    /// Their new values, `[ids.len(), D]`, in any element type; they are rounded to the table's.
    pub rows: TokenRows,
}

/// What a merge did. Paths are relative to the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeReport {
    /// How many rows were replaced, over all tables.
    pub rows: usize,
    /// How many products of LoRA's weights were added: one for each module of each adapter that has them.
    pub lora_modules: usize,
    /// The names of the tensors that changed.
    pub tensors: Vec<String>,
    /// Files of the checkpoint that hold changed tensors.
    pub rewritten: Vec<PathBuf>,
    /// Files of the checkpoint that are the same as in the base: hard links where the file system can.
    pub shared: Vec<PathBuf>,
    /// Other files, copied.
    pub copied: Vec<PathBuf>,
    /// Files that hold weights in some other form: nothing is merged there, so they would contradict the
    /// checkpoint.
    pub left_out: Vec<PathBuf>,
}

impl Adapter {
    /// What merging the adapter into `base` replaces: the rows of each module's table, and of each tied module's
    /// if the checkpoint holds one of its own. What LoRA's weights of the adapter add, [`lora_deltas`](Self::lora_deltas)
    /// tells; [`Merge`] does both.
    ///
    /// # Errors
    ///
    /// Those of [`check_against`](Self::check_against).
    pub fn replacements(&self, base: &Checkpoint) -> Result<Vec<RowReplacement>> {
        self.check_against(base, crate::BaseCheck::Fits)?;
        let base = &base.named_for(self)?;
        let model = ModelTables::of(base)?;
        // Modules that share a table have the same rows, as was checked.
        let mut seen = BTreeSet::new();
        let mut replacements = Vec::new();
        for module in self.modules() {
            let tensors = module.weights(base, &model).into_iter();
            for tensor in tensors.filter(|tensor| seen.insert(tensor.clone())) {
                replacements.push(RowReplacement {
                    tensor,
                    ids: module.token_ids(),
                    rows: module.rows().clone(),
                });
            }
        }
        Ok(replacements)
    }
}

/// Writes a copy of `base` with rows replaced as the directory `out`, whole or not at all.
///
/// Only files that hold a named table are written: the system copies them, and the rows go over the copy. Header, order
/// and all other bytes stay. Other files of the checkpoint become hard links to the base's; they must not be changed in place
/// later. Of the rest of the directory, weights in other formats and hidden files are left out.
///
/// # Errors
///
/// Those of [`Checkpoint::table`]; core's error for an id out of range, an id that is replaced twice in one
/// table, or rows of the wrong shape; [`Error::Target`] if `out` is the base, inside it or around it; those of
/// [`write_dir_atomically`].
pub fn merge_checkpoint(
    base: &Checkpoint,
    replacements: &[RowReplacement],
    out: impl AsRef<Path>,
    overwrite: Overwrite,
) -> Result<MergeReport> {
    let mut plan = Plan::new(base, MergeCheck::Unchecked);
    for RowReplacement { tensor, ids, rows } in replacements {
        plan.replace(tensor, ids, rows, |_| String::new())?;
    }
    write(base, &plan, &[], out.as_ref(), overwrite)
}

/// Writes the copy; while the system brings it to the disk, what was recorded of the base's tables is compared.
fn write(
    base: &Checkpoint,
    plan: &Plan<'_>,
    recorded: &[RecordedTable],
    out: &Path,
    overwrite: Overwrite,
) -> Result<MergeReport> {
    check_apart("the base checkpoint", base.dir(), out)?;
    write_dir_atomically(out, overwrite, |dir| {
        let report = fill(base, plan, dir)?;
        thread::scope(|scope| {
            let sync = || report.rewritten.iter().try_for_each(|name| sync(&dir.join(name)));
            let sync = (!recorded.is_empty()).then(|| scope.spawn(sync));
            recorded.iter().try_for_each(RecordedTable::check)?;
            let synced = sync.map_or(Ok(Ok(())), thread::ScopedJoinHandle::join);
            synced.unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        Ok(report)
    })
}

fn fill(base: &Checkpoint, plan: &Plan<'_>, dir: &Path) -> Result<MergeReport> {
    let mut report = MergeReport {
        rows: plan.num_rows(),
        lora_modules: plan.num_deltas(),
        tensors: plan.tensors(),
        ..MergeReport::default()
    };
    for file in base.files() {
        let name = file.path().file_name().map(PathBuf::from).unwrap_or_default();
        let target = dir.join(&name);
        if plan.touches(file.path()) {
            plan.write(file, &target)?;
            report.rewritten.push(name);
        } else {
            copy::link(file.path(), &target)?;
            report.shared.push(name);
        }
    }
    copy::others(base, dir, &mut report)?;
    grow::adjust(base, plan, dir)?;
    Ok(report)
}

/// Refuses an output that is a directory, lies inside it, or would take its place with all around it; `what` it is.
pub(crate) fn check_apart(what: &str, dir: &Path, out: &Path) -> Result<()> {
    let (dir, resolved) = (resolve(dir)?, resolve(out)?);
    let reason = if resolved == dir {
        format!("it is {what}")
    } else if resolved.starts_with(&dir) {
        format!("it lies inside {what}")
    } else if dir.starts_with(&resolved) {
        format!("{what} lies inside it")
    } else {
        return Ok(());
    };
    Err(Error::Target {
        path: out.to_owned(),
        reason,
    })
}

/// The absolute path without symbolic links, of something that need not exist.
fn resolve(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(Error::io("resolve", path))?;
    for ancestor in path.ancestors() {
        if let Ok(real) = fs::canonicalize(ancestor) {
            let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return Ok(real.join(rest).components().collect());
        }
    }
    Ok(path)
}

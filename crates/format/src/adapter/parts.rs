//! Which stored rows belong to which module, and whether everything fits together.

use std::path::Path;

use trainable_tokens_core::TokenRows;

use super::key::key_of;
use super::{Adapter, AdapterModule};
use crate::config::{CONFIG_FILE, TargetModules};
use crate::error::{Error, Result};

/// Sorts stored rows by module: those of targeted modules stand for themselves; all others are copies for modules
/// tied to one of them, and must equal its rows bit for bit.
pub(super) fn group(
    mut stored: Vec<(String, TokenRows)>,
    targets: &TargetModules,
    path: &Path,
) -> Result<Vec<AdapterModule>> {
    // Whatever order they come in, the result is that of the file.
    stored.sort_by_cached_key(|(module, _)| key_of(module));
    let mut modules = Vec::new();
    let mut copies = Vec::new();
    for (module, rows) in stored {
        let targeted = targets.matches(&module).map_err(|reason| {
            Error::field(
                path.with_file_name(CONFIG_FILE).as_path(),
                "target_modules",
                reason,
            )
        })?;
        if targeted {
            modules.push(AdapterModule {
                path: module,
                tied_paths: Vec::new(),
                rows,
            });
        } else {
            copies.push((module, rows));
        }
    }
    if modules.is_empty() && *targets == TargetModules::Default && !copies.is_empty() {
        // PEFT asks the model for its input embeddings; without the model, the first module stands for them.
        let (module, rows) = copies.remove(0);
        modules.push(AdapterModule {
            path: module,
            tied_paths: Vec::new(),
            rows,
        });
    }
    if modules.is_empty() {
        return Err(no_target(&copies, targets, path));
    }
    for (module, rows) in copies {
        match modules.iter_mut().find(|target| target.rows.bits_eq(&rows)) {
            Some(target) => target.tied_paths.push(module),
            None => return Err(tied_copies_differ(&modules, &module, &rows, path)),
        }
    }
    Ok(modules)
}

fn no_target(copies: &[(String, TokenRows)], targets: &TargetModules, path: &Path) -> Error {
    let (tensor, hint) = match targets {
        TargetModules::List(entries) => (key_of(&entries.join(" or ")), "of target_modules"),
        TargetModules::Pattern(pattern) => (key_of(pattern), "of target_modules"),
        TargetModules::Default => (key_of("embed_tokens"), "of PEFT's default target"),
    };
    let have: Vec<_> = copies.iter().map(|(module, _)| module.as_str()).collect();
    let have = if have.is_empty() {
        "no module".to_owned()
    } else {
        format!("only {have:?}")
    };
    Error::TensorMissing {
        path: path.to_owned(),
        tensor,
        hint: format!(" {hint}; the file holds rows for {have}"),
    }
}

/// Names the two copies, and the first row in which they differ.
pub(super) fn tied_copies_differ(
    modules: &[AdapterModule],
    copy: &str,
    rows: &TokenRows,
    path: &Path,
) -> Error {
    let like = modules
        .iter()
        .find(|target| target.rows.shape() == rows.shape() && target.rows.dtype() == rows.dtype())
        .or(modules.first());
    let (first, row) = like.map_or(("", 0), |target| {
        (target.path(), first_different_row(&target.rows, rows))
    });
    Error::TiedCopies {
        path: path.to_owned(),
        first: key_of(first),
        second: key_of(copy),
        row,
    }
}

fn first_different_row(a: &TokenRows, b: &TokenRows) -> usize {
    let row_bytes = (a.embedding_dim() * a.dtype().size_in_bytes()).max(1);
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let rows = a.chunks(row_bytes).zip(b.chunks(row_bytes));
    rows.take_while(|(a, b)| a == b).count()
}

impl Adapter {
    /// Checks what every adapter must be, however it was made.
    pub(super) fn checked(self) -> Result<Self> {
        let num_rows = self.config.token_indices().len();
        for module in &self.modules {
            let [rows, columns] = module.rows.shape();
            if rows != num_rows {
                return Err(Error::TensorShape {
                    path: self.origin().to_owned(),
                    tensor: key_of(&module.path),
                    expected: format!("[{num_rows}, {columns}], one row for each of token_indices"),
                    got: vec![rows, columns],
                });
            }
        }
        let dims: Vec<_> = self
            .modules
            .iter()
            .map(|module| module.rows.embedding_dim())
            .collect();
        self.metadata
            .check(self.origin(), self.config.token_indices(), &dims)?;
        Ok(self)
    }
}

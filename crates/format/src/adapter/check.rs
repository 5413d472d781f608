//! Whether an adapter fits a base.

use trainable_tokens_core::{EmbeddingSource, ErrorKind};

use super::{Adapter, AdapterModule, parts};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::table::MappedTable;

/// How closely the base must be the one that the adapter was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseCheck {
    /// The rows can be put into it: ids, row length, modules.
    Fits,
    /// Also vocabulary size, element type and digest are those that the metadata record, where they do.
    SameTable,
}

impl Adapter {
    /// Checks that the adapter can be used with `base`: each module has a table `<module>.weight` there, or is
    /// tied to one that has; ids are below its rows; rows are as long as its rows; modules that share a table have
    /// the same tokens and rows.
    ///
    /// # Errors
    ///
    /// [`Error::Base`] naming what does not fit, [`Error::TiedTokens`], [`Error::TiedCopies`], and those of
    /// [`Checkpoint::table`].
    pub fn check_against(&self, base: &Checkpoint, check: BaseCheck) -> Result<()> {
        for module in &self.modules {
            let mut found = false;
            for path in module.all_paths() {
                let name = weight_name(path);
                if base.contains(&name) {
                    found = true;
                    self.check_table(module, path, &base.table(&name)?, base, check)?;
                }
            }
            if !found {
                self.check_tied(module, base)?;
            }
        }
        Ok(())
    }

    /// Checks ids and row length of every module against a table of `vocab_size x embedding_dim`.
    ///
    /// # Errors
    ///
    /// Core's errors, naming the id or the shapes.
    pub fn check_sizes(&self, vocab_size: usize, embedding_dim: usize) -> Result<()> {
        for module in &self.modules {
            module.token_set(vocab_size)?;
            let num_rows = module.token_indices.len();
            module
                .rows
                .expect_shape("adapter rows", num_rows, embedding_dim)?;
        }
        Ok(())
    }

    fn check_table(
        &self,
        module: &AdapterModule,
        path: &str,
        table: &MappedTable,
        base: &Checkpoint,
        check: BaseCheck,
    ) -> Result<()> {
        let misfit = |kind, reason| misfit(base, kind, reason);
        let (vocab_size, dim) = (table.vocab_size(), table.embedding_dim());
        let name = table.name();
        let mut ids = module.token_indices.iter().enumerate();
        if let Some((slot, id)) = ids.find(|(_, id)| **id as usize >= vocab_size) {
            let field = self.config.peft_type().tokens_field();
            let reason = format!("{field}[{slot}] is {id}, but {name} has {vocab_size} rows");
            return misfit(ErrorKind::TokenOutOfRange, reason);
        }
        let have = module.rows.embedding_dim();
        if have != dim {
            let reason = format!("rows for {path:?} have {have} columns, but {name} has {dim}");
            return misfit(ErrorKind::Shape, reason);
        }
        if check == BaseCheck::Fits {
            return Ok(());
        }
        let metadata = self.module_metadata(&module.path);
        if let Some(recorded) = metadata.vocab_size
            && recorded != vocab_size
        {
            let reason = format!("it was trained on {recorded} rows, but {name} has {vocab_size}");
            return misfit(ErrorKind::Shape, reason);
        }
        if let Some(recorded) = metadata.base_dtype
            && recorded != table.dtype()
        {
            let reason = format!("it was trained on {recorded}, but {name} is {}", table.dtype());
            return misfit(ErrorKind::DType, reason);
        }
        if let Some(recorded) = metadata.base_digest
            && module.path == path
        {
            let digest = table.digest();
            if digest != recorded {
                let reason = format!("it was trained on a table of {recorded}, but {name} is {digest}");
                return misfit(ErrorKind::File, reason);
            }
        }
        Ok(())
    }

    /// A module without a table of its own must be tied to one that has: then its tokens and rows are the same.
    fn check_tied(&self, module: &AdapterModule, base: &Checkpoint) -> Result<()> {
        let has_table =
            |other: &AdapterModule| other.all_paths().any(|path| base.contains(&weight_name(path)));
        let owners: Vec<_> = self
            .modules
            .iter()
            .filter(|other| has_table(other))
            .cloned()
            .collect();
        let Some(first) = owners.first() else {
            let reason = format!(
                "module {:?} has no table {:?} there",
                module.path,
                weight_name(&module.path)
            );
            return misfit(base, ErrorKind::File, reason);
        };
        let same_tokens = |owner: &&AdapterModule| owner.token_indices == module.token_indices;
        let Some(like) = owners.iter().find(same_tokens) else {
            return Err(Error::TiedTokens {
                path: base.dir().to_owned(),
                first: first.path.clone(),
                second: module.path.clone(),
            });
        };
        if owners
            .iter()
            .filter(same_tokens)
            .any(|owner| owner.rows.bits_eq(&module.rows))
        {
            return Ok(());
        }
        Err(parts::tied_copies_differ(
            std::slice::from_ref(like),
            &module.path,
            &module.rows,
            self.config.peft_type(),
            self.origin(),
        ))
    }
}

/// The name of a module's table in a checkpoint.
pub(super) fn weight_name(path: &str) -> String {
    format!("{path}.weight")
}

fn misfit(base: &Checkpoint, kind: ErrorKind, reason: String) -> Result<()> {
    Err(Error::Base {
        path: base.dir().to_owned(),
        kind,
        reason,
    })
}

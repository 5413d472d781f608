//! Whether an adapter fits a base.

use std::path::PathBuf;

use trainable_tokens_core::{EmbeddingSource, ErrorKind};

use super::{Adapter, AdapterModule, parts};
use crate::checkpoint::Checkpoint;
use crate::config::is_path_or_suffix;
use crate::digest::TableDigest;
use crate::error::{Error, Result};
use crate::model::ModelTables;
use crate::table::{ExtendedTable, MappedTable};

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
    /// tied to one that has; ids are below its rows, or those of the [`table`](Self::table) that the adapter makes of
    /// it; rows are as long as its rows; modules that share a table have the same tokens and rows.
    ///
    /// # Errors
    ///
    /// [`Error::Base`] naming what does not fit, [`Error::TiedTokens`], [`Error::TiedCopies`], [`Error::NotATable`],
    /// and those of [`Checkpoint::table`].
    pub fn check_against(&self, base: &Checkpoint, check: BaseCheck) -> Result<()> {
        let recorded = self.check_all(base, check)?;
        recorded.iter().try_for_each(RecordedTable::check)
    }

    /// Checks all but digests, which take reading whole tables; those are returned, none if only fitting is asked for.
    pub(crate) fn check_all(&self, base: &Checkpoint, check: BaseCheck) -> Result<Vec<RecordedTable>> {
        let base = &base.named_for(self)?;
        let mut recorded = Vec::new();
        let model = ModelTables::of(base)?;
        self.check_shared(base, &model)?;
        for module in &self.modules {
            model.check_table(&module.path)?;
            let weights = module.weights(base, &model);
            if weights.is_empty() {
                self.check_tied(module, base)?;
                continue;
            }
            for path in module
                .all_paths()
                .filter(|path| base.contains(&weight_name(path)))
            {
                let table = self.table_of(path, base, &model)?;
                recorded.extend(self.check_table(module, path, &table, base, check)?);
            }
            if !base.contains(&weight_name(&module.path)) {
                let table = self.table_of(&module.path, base, &model)?;
                recorded.extend(self.check_table(module, &module.path, &table, base, check)?);
            }
        }
        self.check_names(base, &model)?;
        self.check_head(base, &model)?;
        Ok(recorded)
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
        table: &ExtendedTable,
        base: &Checkpoint,
        check: BaseCheck,
    ) -> Result<Option<RecordedTable>> {
        let misfit = |kind, reason| Err(misfit(base, kind, reason));
        let (vocab_size, dim) = (table.vocab_size(), table.embedding_dim());
        let name = table.base().name();
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
            return Ok(None);
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
        // The digest of a table that was larger than the base's says nothing about the base's.
        let counts = module.path == path && table.added().num_rows() == 0;
        Ok(metadata
            .base_digest
            .filter(|_| counts)
            .map(|recorded| RecordedTable {
                base: base.dir().to_owned(),
                table: table.base().clone(),
                recorded,
                adapter: "it".to_owned(),
            }))
    }

    /// Modules that share the input embedding's table must have the same tokens and rows.
    fn check_shared(&self, base: &Checkpoint, model: &ModelTables) -> Result<()> {
        let Some(embedding) = model.input_embedding().filter(|_| !model.tied().is_empty()) else {
            return Ok(());
        };
        let is_shared =
            |module: &&AdapterModule| module.all_paths().any(|path| model.shares_input_embedding(path));
        let mut shared = self.modules.iter().filter(is_shared);
        let Some(first) = self.module(embedding).or_else(|| shared.clone().next()) else {
            return Ok(());
        };
        let tied_tokens = |first: &str, second: &str| Error::TiedTokens {
            path: base.dir().to_owned(),
            first: first.to_owned(),
            second: second.to_owned(),
        };
        if !first.all_paths().any(|path| path == embedding) {
            // Rows of the head alone: merging would put them into the embedding too.
            return Err(tied_tokens(embedding, &first.path));
        }
        match shared
            .find(|module| !module.rows.bits_eq(&first.rows) || module.token_indices != first.token_indices)
        {
            None => Ok(()),
            Some(other) if other.token_indices != first.token_indices => {
                Err(tied_tokens(&first.path, &other.path))
            }
            Some(other) => Err(parts::tied_copies_differ(
                std::slice::from_ref(first),
                &other.path,
                &other.rows,
                self.config.peft_type(),
                self.origin(),
            )),
        }
    }

    /// A name with token ids but without rows must be that of a module that is tied.
    fn check_names(&self, base: &Checkpoint, model: &ModelTables) -> Result<()> {
        for (name, _) in parts::names_without_rows(&self.config, &self.modules) {
            let mut paths = model.paths().filter(|path| is_path_or_suffix(name, path));
            if let Some(path) = paths.find(|path| !model.shares_input_embedding(path)) {
                let reason =
                    format!("module {path:?} is not tied there, but the adapter has no rows for {name:?}");
                return Err(misfit(base, ErrorKind::File, reason));
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
            return Err(misfit(base, ErrorKind::File, reason));
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

/// A table of a base, and the digest that an adapter records of it.
#[derive(Clone, Debug)]
pub(crate) struct RecordedTable {
    base: PathBuf,
    table: MappedTable,
    recorded: TableDigest,
    /// The adapter, for messages.
    adapter: String,
}

impl RecordedTable {
    /// That of an adapter which messages call `name`.
    pub(crate) fn of(self, name: &str) -> Self {
        let adapter = name.to_owned();
        Self { adapter, ..self }
    }

    /// Reads the whole table.
    pub(crate) fn check(&self) -> Result<()> {
        let (recorded, name, digest) = (self.recorded, self.table.name(), self.table.digest());
        if digest == recorded {
            return Ok(());
        }
        Err(Error::Base {
            path: self.base.clone(),
            kind: ErrorKind::File,
            reason: format!(
                "{} was trained on a table of {recorded}, but {name} is {digest}",
                self.adapter
            ),
        })
    }

    /// Whether checking one is checking the other.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let place = |of: &Self| (of.table.path().to_owned(), of.table.file_range());
        self.recorded == other.recorded && place(self) == place(other)
    }
}

/// The name of a module's table in a checkpoint.
pub(crate) fn weight_name(path: &str) -> String {
    format!("{path}.weight")
}

pub(super) fn misfit(base: &Checkpoint, kind: ErrorKind, reason: String) -> Error {
    Error::Base {
        path: base.dir().to_owned(),
        kind,
        reason,
    }
}

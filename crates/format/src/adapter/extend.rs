//! The tables that an adapter is used with, where its vocabulary has grown.

use std::collections::BTreeSet;

use trainable_tokens_core::{EmbeddingSource, ErrorKind, TokenRows};

use super::check::{misfit, weight_name};
use super::key::{Layer, layer_key, plain_layer};
use super::{Adapter, AdapterModule};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::{ModelTables, names_a_table};
use crate::table::{ExtendedTable, MappedTable};

/// Whether an adapter holds the whole table beside its rows: PEFT's `save_embedding_layers`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SaveEmbeddingLayers {
    /// If the vocabulary is no longer that of the model that `base_model_name_or_path` names; PEFT's default.
    Auto,
    /// Always.
    Always,
    /// Never: the rows suffice, for [`Adapter::table`] puts them after the last row of a smaller base.
    #[default]
    Never,
}

impl SaveEmbeddingLayers {
    /// Whether to store the table of `vocab_size` rows, where the model that is named in the config has
    /// `named_vocab_size`, if that is known.
    pub fn decide(self, vocab_size: usize, named_vocab_size: Option<usize>) -> bool {
        match self {
            Self::Auto => named_vocab_size.is_some_and(|named| named != vocab_size),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl Adapter {
    /// The frozen table of the module at `path` of `base`, as large as the adapter needs it:
    ///
    /// 1. the table that the adapter itself holds (PEFT's `save_embedding_layers`), if it does;
    /// 2. else the base's own, if every token id is below its rows;
    /// 3. else, for the model's input embedding or head, the base's own with the rows of the new tokens after its
    ///    last. Their ids must follow on its last row without a gap, up to the vocabulary that the metadata record
    ///    ([`with_vocab_size`](Self::with_vocab_size) for a file that does not).
    ///
    /// # Errors
    ///
    /// [`Error::Base`] naming the ids or rows that are missing, or what else does not fit; [`Error::TiedCopies`] if
    /// tied modules hold different tables; those of [`Checkpoint::table`].
    pub fn table(&self, path: &str, base: &Checkpoint) -> Result<ExtendedTable> {
        let base = &base.named_for(self)?;
        self.table_of(path, base, &ModelTables::of(base)?)
    }

    /// The tables of `base` that are others for this adapter: those that it holds itself, and those that it extends. By
    /// the name by which their tensor is stored in `base`.
    pub(crate) fn other_tables(&self, base: &Checkpoint) -> Result<Vec<(String, ExtendedTable)>> {
        let base = &base.named_for(self)?;
        let model = ModelTables::of(base)?;
        let paths = self.modules.iter().flat_map(AdapterModule::all_paths);
        let known = model.input_embedding().into_iter().chain(model.head());
        let stored = self.extra.iter().filter(|extra| self.is_whole_table(&extra.name));
        let stored = stored.filter_map(|extra| plain_layer(&extra.name));
        let paths: BTreeSet<&str> = paths
            .chain(known)
            .chain(stored)
            .chain(model.tied().iter().map(String::as_str))
            .collect();
        let mut others = Vec::new();
        for path in paths {
            if let Some(tensor) = base.stored_weight(path) {
                let (own, table) = (base.table(tensor)?, self.table_of(path, base, &model)?);
                if table.added().num_rows() > 0 || table.base().path() != own.path() {
                    others.push((tensor.to_owned(), table));
                }
            }
        }
        Ok(others)
    }

    /// Whether a tensor that is no rows is a whole table beside them, for PEFT's `save_embedding_layers`.
    pub(crate) fn is_whole_table(&self, name: &str) -> bool {
        let kind = self.config.peft_type();
        let below = |module: &AdapterModule| {
            module
                .all_paths()
                .any(|path| layer_key(kind, path, Layer::UnderRows) == name)
        };
        let saved = self
            .config
            .field("modules_to_save")
            .and_then(|saved| Some(!saved.as_array()?.is_empty()));
        let plain = plain_layer(name).is_some_and(names_a_table);
        self.modules.iter().any(below) || (plain && saved != Some(true) && !self.modules.is_empty())
    }

    pub(super) fn table_of(
        &self,
        path: &str,
        base: &Checkpoint,
        model: &ModelTables,
    ) -> Result<ExtendedTable> {
        let module = self.module(path).or_else(|| self.shared_module(path, model));
        let own = weight_name(path);
        let name = match module {
            Some(module) if !base.contains(&own) => module.weights(base, model).into_iter().next(),
            _ => None,
        };
        let table = base.table(name.as_deref().unwrap_or(&own))?;
        let mut paths = vec![path];
        paths.extend(module.into_iter().flat_map(AdapterModule::all_paths));
        if let Some(stored) = self.stored_table(&paths, &table, base)? {
            return Ok(stored.into());
        }
        let Some(module) = module else {
            return Ok(table.into());
        };
        let added = self.added_rows(module, &table, base, model)?;
        ExtendedTable::new(table, &added)
    }

    /// With LoRA, the rows of the input embedding are those of the modules that are tied to it.
    fn shared_module(&self, path: &str, model: &ModelTables) -> Option<&AdapterModule> {
        let is_shared = |module: &&AdapterModule| model.shares_input_embedding(&module.path);
        self.modules
            .iter()
            .find(is_shared)
            .filter(|_| model.shares_input_embedding(path))
    }

    /// The whole table that the adapter holds for one of these modules, tied as they are.
    fn stored_table(
        &self,
        paths: &[&str],
        table: &MappedTable,
        base: &Checkpoint,
    ) -> Result<Option<MappedTable>> {
        let mut found: Option<MappedTable> = None;
        let kind = self.config.peft_type();
        let names = paths
            .iter()
            .flat_map(|path| [Layer::UnderRows, Layer::Plain].map(|layer| layer_key(kind, path, layer)));
        for name in names {
            let Some(extra) = self.extra.iter().find(|extra| extra.name == name) else {
                continue;
            };
            let stored = extra.file.table(&name)?;
            let (rows, columns) = (stored.vocab_size(), stored.embedding_dim());
            if columns != table.embedding_dim() || rows < table.vocab_size() {
                let reason = format!(
                    "{name} has the shape [{rows}, {columns}], but {} has [{}, {}]",
                    table.name(),
                    table.vocab_size(),
                    table.embedding_dim()
                );
                return Err(misfit(base, ErrorKind::Shape, reason));
            }
            match &found {
                Some(first) if first.bytes() != stored.bytes() => {
                    return Err(Error::TiedCopies {
                        path: self.origin.clone(),
                        first: first.name().to_owned(),
                        second: name,
                        row: first_different(first, &stored),
                    });
                }
                Some(_) => {}
                None => found = Some(stored),
            }
        }
        Ok(found)
    }

    /// The rows of ids past the end of the table, in the order of ids. None is missing, and only tables over the
    /// vocabulary grow.
    fn added_rows(
        &self,
        module: &AdapterModule,
        table: &MappedTable,
        base: &Checkpoint,
        model: &ModelTables,
    ) -> Result<TokenRows> {
        let vocab_size = table.vocab_size();
        let (have, columns) = (module.rows.embedding_dim(), table.embedding_dim());
        if have != columns {
            let (path, name) = (&module.path, table.name());
            let reason = format!("rows for {path:?} have {have} columns, but {name} has {columns}");
            return Err(misfit(base, ErrorKind::Shape, reason));
        }
        let ids = module.token_indices.iter().enumerate();
        let mut new: Vec<_> = ids
            .map(|(slot, id)| (*id as usize, slot))
            .filter(|(id, _)| *id >= vocab_size)
            .collect();
        new.sort_unstable();
        let grows = model.shares_input_embedding(&module.path) || model.head() == Some(&module.path);
        if let Some((id, slot)) = new.first().filter(|_| !grows) {
            let field = self.config.peft_type().tokens_field();
            let reason = format!(
                "{field}[{slot}] is {id}, but {} has {vocab_size} rows",
                table.name()
            );
            return Err(misfit(base, ErrorKind::TokenOutOfRange, reason));
        }
        // The first place where an id is skipped.
        let gap = (vocab_size..)
            .zip(&new)
            .find(|(expected, (id, _))| expected != id);
        if let Some((first, (id, slot))) = gap {
            let field = self.config.peft_type().tokens_field();
            let missing = range(first, id - 1);
            let reason = format!(
                "{field}[{slot}] is {id}, but {} has {vocab_size} rows and the adapter none for {missing}; use the \
                 resized model, or an adapter saved with save_embedding_layers",
                table.name()
            );
            return Err(misfit(base, ErrorKind::TokenOutOfRange, reason));
        }
        self.check_grown(module, &new, table, base)?;
        let (rows, bytes) = (&module.rows, module.rows.to_le_bytes());
        let row_bytes = rows.embedding_dim() * rows.dtype().size_in_bytes();
        let added = new
            .iter()
            .filter_map(|(_, slot)| bytes.get(slot * row_bytes..(slot + 1) * row_bytes));
        let added: Vec<u8> = added.flatten().copied().collect();
        Ok(TokenRows::from_le_bytes(
            rows.dtype(),
            new.len(),
            rows.embedding_dim(),
            &added,
        )?)
    }

    /// An id past the end may be an error of one as well as a new token: the file, or the caller, must say that the
    /// vocabulary has grown so far.
    fn check_grown(
        &self,
        module: &AdapterModule,
        new: &[(usize, usize)],
        table: &MappedTable,
        base: &Checkpoint,
    ) -> Result<()> {
        let Some((id, slot)) = new.first() else {
            return Ok(());
        };
        let (field, name) = (self.config.peft_type().tokens_field(), table.name());
        let (vocab_size, covered) = (table.vocab_size(), table.vocab_size() + new.len());
        let reason = match self.module_metadata(&module.path).vocab_size {
            Some(recorded) if recorded <= covered => return Ok(()),
            Some(recorded) => format!(
                "it was trained on {recorded} rows, but {name} has {vocab_size} and the adapter none for {}; use the \
                 resized model, or an adapter saved with save_embedding_layers",
                range(covered, recorded - 1)
            ),
            None => format!(
                "{field}[{slot}] is {id}, but {name} has {vocab_size} rows, and the adapter does not record a larger \
                 vocabulary; use the resized model, or state its size"
            ),
        };
        Err(misfit(base, ErrorKind::TokenOutOfRange, reason))
    }

    /// A model whose vocabulary has grown needs a head as large.
    pub(super) fn check_head(&self, base: &Checkpoint, model: &ModelTables) -> Result<()> {
        let (Some(embedding), Some(head)) = (model.input_embedding(), model.head()) else {
            return Ok(());
        };
        if self.module(embedding).is_none() {
            return Ok(());
        }
        let (table, own) = (
            self.table_of(embedding, base, model)?,
            base.table(&weight_name(embedding))?,
        );
        let needed = table.vocab_size();
        let have = self.table_of(head, base, model)?.vocab_size();
        if needed <= own.vocab_size() || have >= needed {
            return Ok(());
        }
        let reason = format!(
            "the vocabulary grows to {needed} tokens, but {} has {have} rows and the adapter none for {}; use the \
             resized model, or add the rows to the adapter",
            weight_name(head),
            range(have, needed - 1)
        );
        Err(misfit(base, ErrorKind::Shape, reason))
    }
}

impl AdapterModule {
    /// The tensors of `base` in which the rows lie, by their stored names: its own, and those of modules that are tied to it and
    /// are stored all the same.
    pub(crate) fn weights(&self, base: &Checkpoint, model: &ModelTables) -> Vec<String> {
        let mut paths: Vec<&str> = self.all_paths().collect();
        if paths.iter().any(|path| model.shares_input_embedding(path)) {
            let shared = model.input_embedding().into_iter();
            paths.extend(shared.chain(model.tied().iter().map(String::as_str)));
        }
        let mut seen = BTreeSet::new();
        let unique = paths.into_iter().filter(|path| seen.insert(*path));
        let stored = unique.filter_map(|path| base.stored_weight(path));
        stored.map(str::to_owned).collect()
    }
}

/// Rows, in words.
fn range(first: usize, last: usize) -> String {
    if first == last {
        format!("token {first}")
    } else {
        format!("tokens {first} to {last}")
    }
}

fn first_different(a: &MappedTable, b: &MappedTable) -> usize {
    let row_bytes = (a.embedding_dim() * a.dtype().size_in_bytes()).max(1);
    let rows = a.bytes().chunks(row_bytes).zip(b.bytes().chunks(row_bytes));
    rows.take_while(|(a, b)| a == b).count()
}

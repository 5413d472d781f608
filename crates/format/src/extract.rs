//! The adapter that turns one checkpoint into another.

use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::thread;

use trainable_tokens_core::{EmbeddingSource as _, ErrorKind, TokenId, TokenRows, TokenSet};

use crate::adapter::{Adapter, AdapterBuilder, BaseCheck, first_different_row, weight_name};
use crate::checkpoint::Checkpoint;
use crate::diff::{CheckpointDiff, TableDiff, TensorDiff, TensorDifference};
use crate::digest::TableDigest;
use crate::error::{Error, Result};
use crate::model::ModelTables;

/// Finds the rows in which a checkpoint differs from the one that it was tuned from, and makes an adapter of them:
/// merged into the base, it gives the tuned checkpoint's tensors, bit for bit.
///
/// Rows of an untied head go into the same adapter. All modules of an adapter have the same tokens, so that a row that
/// differs in one table is taken from every table that has changed. Rows after the base's last, where the vocabulary has
/// grown, are trained rows like the others.
///
/// ```no_run
/// use trainable_tokens_format::{Checkpoint, Extract, Overwrite};
///
/// # fn main() -> Result<(), trainable_tokens_format::Error> {
/// let (base, tuned) = (Checkpoint::open("model")?, Checkpoint::open("tuned")?);
/// let adapter = Extract::new(&base, &tuned).base_model_name_or_path("model").adapter()?;
/// adapter.write("adapter", Overwrite::Refuse)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Extract<'a> {
    base: &'a Checkpoint,
    tuned: &'a Checkpoint,
    max_rows: Option<usize>,
    base_model: Option<String>,
}

/// Modules that have one table, the first of them as its owner.
type Group<'a> = Vec<&'a str>;

impl<'a> Extract<'a> {
    /// Starts with the two checkpoints.
    pub fn new(base: &'a Checkpoint, tuned: &'a Checkpoint) -> Self {
        Self {
            base,
            tuned,
            max_rows: None,
            base_model: None,
        }
    }

    /// The most rows that may differ; by default half of the table's. Where more do, the table was trained as a whole,
    /// and an adapter would be about as large as it.
    pub fn max_rows(self, max_rows: usize) -> Self {
        Self {
            max_rows: Some(max_rows),
            ..self
        }
    }

    /// `base_model_name_or_path` of the adapter's config; `null` by default.
    pub fn base_model_name_or_path(self, name: impl Into<String>) -> Self {
        Self {
            base_model: Some(name.into()),
            ..self
        }
    }

    /// Compares the checkpoints and makes the adapter. Each file is read once, through its map; memory is for the rows
    /// of the adapter alone. Its metadata record the base's table, and of a larger vocabulary its size.
    ///
    /// # Errors
    ///
    /// [`Error::NotOnlyRows`] naming what else differs, element types and shapes among it; [`Error::NothingToExtract`];
    /// [`Error::TooManyRows`]; [`Error::TiedCopies`] if the tuned checkpoint holds different copies of a table that the
    /// base's config ties; [`Error::Base`] if embedding and head have grown to different sizes; those of
    /// [`Adapter::check_against`], where an adapter cannot express the change.
    pub fn adapter(&self) -> Result<Adapter> {
        let model = ModelTables::of(self.base)?;
        let groups = groups(&model);
        let (diff, digest) = self.compare(groups.first())?;
        self.expect_rows_alone(&diff, &model)?;
        let changed = |group: &&Group<'_>| self.tables_of(group, &diff).next().is_some();
        let changed: Vec<_> = groups.iter().filter(changed).collect();
        let ids = self.ids(&changed, &diff)?;
        let mut builder: Option<AdapterBuilder> = None;
        for group in changed {
            let (path, rows) = self.rows(group, &ids)?;
            let vocab_size = self.tuned.table(&weight_name(path))?.vocab_size();
            let tokens = TokenSet::new(ids.iter().map(|id| id.0), vocab_size)?;
            let mut module = match builder {
                None => Adapter::builder(path, &tokens, rows),
                Some(builder) => builder.module_of(path, &tokens, rows),
            };
            let base = self.base.table(&weight_name(path))?;
            // The digest of a smaller table says nothing about the one that was trained.
            if base.vocab_size() == vocab_size {
                let known = digest.filter(|_| Some(group) == groups.first());
                module = module.base(known.unwrap_or_else(|| base.digest()), base.dtype());
            }
            for tied in group.iter().filter(|tied| **tied != path) {
                module = module.tied(*tied);
            }
            builder = Some(module);
        }
        let Some(mut builder) = builder else {
            let path = self.tuned.dir().to_owned();
            return Err(Error::NothingToExtract { path });
        };
        if let Some(name) = &self.base_model {
            builder = builder.base_model_name_or_path(name);
        }
        let adapter = builder.build()?;
        adapter.check_against(self.base, BaseCheck::Fits)?;
        Ok(adapter)
    }

    /// Compares; meanwhile another thread digests the table that has most likely changed.
    fn compare(&self, group: Option<&Group<'_>>) -> Result<(CheckpointDiff, Option<TableDigest>)> {
        let path = group.and_then(|group| group.first());
        let table = path.and_then(|path| self.base.table(&weight_name(path)).ok());
        thread::scope(|scope| {
            let digest = table.map(|table| scope.spawn(move || table.digest()));
            let diff = CheckpointDiff::between(self.base, self.tuned)?;
            let digest = digest.map(|digest| digest.join().unwrap_or_else(|panic| resume_unwind(panic)));
            Ok((diff, digest))
        })
    }

    /// Refuses whatever an adapter of rows cannot express.
    fn expect_rows_alone(&self, diff: &CheckpointDiff, model: &ModelTables) -> Result<()> {
        let matters = |other: &&TensorDiff| !self.is_copy(other, model) && !self.is_buffer(other);
        let others = diff.tensors.iter().filter(matters);
        let mut others: Vec<_> = others.cloned().collect();
        for table in diff
            .tables
            .iter()
            .filter(|table| table.removed().next().is_some())
        {
            others.push(self.shapes(&table.tensor)?);
        }
        self.refuse(others)
    }

    fn refuse(&self, tensors: Vec<TensorDiff>) -> Result<()> {
        if tensors.is_empty() {
            return Ok(());
        }
        let path = self.tuned.dir().to_owned();
        Err(Error::NotOnlyRows { path, tensors })
    }

    fn shapes(&self, tensor: &str) -> Result<TensorDiff> {
        let shape = |of: &Checkpoint| {
            let stored = of.counterpart(tensor, self.base).unwrap_or(tensor);
            Ok::<_, Error>(of.tensor(stored)?.shape.to_vec())
        };
        Ok(TensorDiff {
            tensor: tensor.to_owned(),
            difference: TensorDifference::Shape([shape(self.base)?, shape(self.tuned)?]),
        })
    }

    /// Whether a tensor that only one checkpoint has is a buffer that old checkpoints hold, and that follows from the config.
    fn is_buffer(&self, other: &TensorDiff) -> bool {
        let Some(of) = self.owner(other) else {
            return false;
        };
        let rank = of.tensor(&other.tensor).map(|tensor| tensor.shape.len()).ok();
        let ends = |end: &str| other.tensor.ends_with(end);
        // Causal masks [1, 1, L, L], what masked scores are, and rotary frequencies.
        (ends(".attn.bias") && rank == Some(4))
            || (ends(".attn.masked_bias") && rank == Some(0))
            || ends(".rotary_emb.inv_freq")
    }

    /// The only checkpoint that has a tensor.
    fn owner(&self, other: &TensorDiff) -> Option<&'a Checkpoint> {
        match other.difference {
            TensorDifference::OnlyInFirst => Some(self.base),
            TensorDifference::OnlyInSecond => Some(self.tuned),
            _ => None,
        }
    }

    /// Whether a tensor that only one checkpoint has is a copy there of the table that it is tied to: some programs save
    /// it, others do not.
    fn is_copy(&self, other: &TensorDiff, model: &ModelTables) -> bool {
        let Some(of) = self.owner(other) else {
            return false;
        };
        let path = other.tensor.strip_suffix(".weight").unwrap_or_default();
        let Some(embedding) = model
            .input_embedding()
            .filter(|_| model.shares_input_embedding(path))
        else {
            return false;
        };
        match (of.tensor(&other.tensor), of.tensor(&weight_name(embedding))) {
            (Ok(copy), Ok(table)) => copy.dtype == table.dtype && copy.bytes == table.bytes,
            _ => false,
        }
    }

    /// What differs in the tables of modules.
    fn tables_of<'d>(&self, group: &[&str], diff: &'d CheckpointDiff) -> impl Iterator<Item = &'d TableDiff> {
        let stored = group.iter().filter_map(|path| self.base.stored_weight(path));
        let names: Vec<_> = stored.map(str::to_owned).collect();
        diff.tables
            .iter()
            .filter(move |table| names.contains(&table.tensor))
    }

    /// The tokens whose row differs in any of the tables, ascending.
    fn ids(&self, changed: &[&Group<'_>], diff: &CheckpointDiff) -> Result<Vec<TokenId>> {
        let tables: Vec<_> = changed
            .iter()
            .flat_map(|group| self.tables_of(group, diff))
            .collect();
        let Some(first) = tables.first() else {
            return Ok(Vec::new());
        };
        let vocab_size = first.vocab_sizes[1];
        if let Some(other) = tables.iter().find(|table| table.vocab_sizes[1] != vocab_size) {
            let (tensor, rows) = (&other.tensor, other.vocab_sizes[1]);
            return Err(Error::Base {
                path: self.tuned.dir().to_owned(),
                kind: ErrorKind::Shape,
                reason: format!(
                    "{} has {vocab_size} rows there, but {tensor} has {rows}; the tables of an adapter have the same tokens",
                    first.tensor
                ),
            });
        }
        let ids: BTreeSet<TokenId> = tables
            .iter()
            .flat_map(|table| table.changed.iter().copied().chain(table.added()))
            .collect();
        let limit = self.max_rows.unwrap_or(vocab_size.div_ceil(2));
        if ids.len() > limit {
            return Err(Error::TooManyRows {
                path: self.tuned.dir().to_owned(),
                tensor: first.tensor.clone(),
                rows: ids.len(),
                vocab_size,
                limit,
            });
        }
        Ok(ids.into_iter().collect())
    }

    /// The owner of a table and its tuned rows, the same in each copy.
    fn rows<'g>(&self, group: &[&'g str], ids: &[TokenId]) -> Result<(&'g str, TokenRows)> {
        let mut found: Option<(&str, TokenRows)> = None;
        for path in group {
            let name = weight_name(path);
            if !self.tuned.contains(&name) {
                continue;
            }
            let rows = self.tuned.table(&name)?.read_rows(ids)?;
            let Some((first, known)) = &found else {
                found = Some((path, rows));
                continue;
            };
            if !known.bits_eq(&rows) {
                let slot = first_different_row(known, &rows);
                return Err(Error::TiedCopies {
                    path: self.tuned.dir().to_owned(),
                    first: weight_name(first),
                    second: name,
                    row: ids.get(slot).map_or(0, |id| id.row()),
                });
            }
        }
        found.ok_or_else(|| Error::TensorMissing {
            path: self.tuned.dir().to_owned(),
            tensor: group.first().copied().map(weight_name).unwrap_or_default(),
            hint: String::new(),
        })
    }
}

/// The modules with tables, those that share one together; the input embedding first.
fn groups(model: &ModelTables) -> Vec<Group<'_>> {
    let (shared, mut others): (Group<'_>, Group<'_>) = model
        .token_tables()
        .into_iter()
        .partition(|path| model.shares_input_embedding(path));
    others.sort_unstable();
    let others = others.into_iter().map(|path| vec![path]);
    let shared = (!shared.is_empty()).then_some(shared);
    shared.into_iter().chain(others).collect()
}

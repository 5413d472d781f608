//! A copy of a checkpoint with rows for new tokens.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};

use trainable_tokens_core::{
    EmbeddingSource as _, InitMode, MergeCheck, Population, RowInit, TokenId, TokenRows, TokenSet,
    initial_rows,
};

use super::plan::Plan;
use super::{MergeReport, check_apart, fill};
use crate::adapter::weight_name;
use crate::atomic::{Overwrite, write_dir_atomically};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::ModelTables;
use crate::table::{ExtendedTable, MappedTable};

/// Gives new tokens rows in all tables of a checkpoint: what transformers' `resize_token_embeddings` does, but that it never
/// shrinks a table, that a token may take a padded row that is there already, and that no table is held in memory.
///
/// The tables are the input embedding, its tied copies as far as the checkpoint holds them, and an untied head. A bias of the
/// head has one value per token and grows along: with a mode that names other tokens, the new value is made of theirs;
/// else it is the mean of all. Rows between the last token and the table's end ([`pad_to_multiple_of`](Self::pad_to_multiple_of))
/// are the mean of the old ones, so that no context gives them a large logit.
///
/// ```no_run
/// use trainable_tokens_core::{RowInit, TokenId};
/// use trainable_tokens_format::{Checkpoint, Overwrite, Resize};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = Checkpoint::open("model")?;
/// let init: RowInit = "mean+noise:0.01".parse()?;
/// let report = Resize::new(&base)?
///     .token(TokenId(32_000), init.clone())
///     .token(TokenId(32_001), init)
///     .write("model-with-tokens", Overwrite::Refuse)?;
/// println!("{} rows, {} before", report.vocab_size, report.vocab_size_before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Resize<'a> {
    base: &'a Checkpoint,
    tables: Vec<MappedTable>,
    biases: Vec<MappedTable>,
    vocab_size: usize,
    tokens: Vec<(TokenId, RowInit)>,
    multiple: NonZero<usize>,
    files: Vec<(PathBuf, Vec<u8>)>,
}

/// What a [`Resize`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResizeReport {
    /// Rows of the tables before.
    pub vocab_size_before: usize,
    /// Rows of the tables now.
    pub vocab_size: usize,
    /// What became of the tensors and files; `rows` counts those of all tables and biases.
    pub merge: MergeReport,
}

impl<'a> Resize<'a> {
    /// Finds the tables of a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the input embedding is not known, or if tables have different numbers of rows; those of
    /// [`ModelTables::of`] and [`Checkpoint::table`].
    pub fn new(base: &'a Checkpoint) -> Result<Self> {
        let model = ModelTables::of(base)?;
        let unsupported = |what: String| Error::Unsupported {
            path: base.dir().to_owned(),
            what,
        };
        if model.input_embedding().is_none() {
            let what = "which tensor is the input embedding is not known: config.json names no architecture of \
                        transformers";
            return Err(unsupported(what.to_owned()));
        }
        let names = model.token_tables().into_iter().map(weight_name);
        let names = names.filter(|name| base.contains(name));
        let tables = names.map(|name| base.table(&name)).collect::<Result<Vec<_>>>()?;
        let Some(first) = tables.first() else {
            return Err(unsupported("it holds no table of token vectors".to_owned()));
        };
        let vocab_size = first.vocab_size();
        if let Some(other) = tables.iter().find(|table| table.vocab_size() != vocab_size) {
            return Err(unsupported(format!(
                "{} has {vocab_size} rows, but {} has {}; new tokens need the same id in both",
                first.name(),
                other.name(),
                other.vocab_size()
            )));
        }
        Ok(Self {
            base,
            biases: biases(base, &model, vocab_size)?,
            tables,
            vocab_size,
            tokens: Vec::new(),
            multiple: NonZero::<usize>::MIN,
            files: Vec::new(),
        })
    }

    /// Rows of the tables before.
    pub fn vocab_size_before(&self) -> usize {
        self.vocab_size
    }

    /// Rows of the tables in the copy: as before, or enough for the tokens, rounded up to a multiple.
    pub fn vocab_size(&self) -> usize {
        let needed = self.tokens.iter().map(|(id, _)| id.row() + 1).max().unwrap_or(0);
        needed.max(self.vocab_size).next_multiple_of(self.multiple.get())
    }

    /// Adds a token: one after the last row, or one that takes a row that is there already.
    pub fn token(mut self, id: TokenId, init: RowInit) -> Self {
        self.tokens.push((id, init));
        self
    }

    /// Rounds the number of rows up to a multiple, as fast matrix products want it.
    pub fn pad_to_multiple_of(self, multiple: NonZero<usize>) -> Self {
        Self { multiple, ..self }
    }

    /// Puts a file, such as the new `tokenizer.json`, into the copy in place of the base's.
    pub fn file(mut self, name: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        self.files.push((name.into(), bytes));
        self
    }

    /// Writes the copy as the directory `out`, whole or not at all; see [`merge_checkpoint`](super::merge_checkpoint) for
    /// what becomes of its files. `config.json` and the index tell the new size, where it is another.
    ///
    /// # Errors
    ///
    /// Those of [`initial_rows`]; core's error for a token that is added twice; [`Error::Target`] if `out` is
    /// the base, inside it or around it; those of [`write_dir_atomically`].
    pub fn write(&self, out: impl AsRef<Path>, overwrite: Overwrite) -> Result<ResizeReport> {
        let mut plan = Plan::new(self.base, MergeCheck::Unchecked);
        for table in &self.tables {
            self.extend(&mut plan, table, RowInit::clone)?;
        }
        for bias in &self.biases {
            self.extend(&mut plan, bias, of_bias)?;
        }
        let out = out.as_ref();
        check_apart("the base checkpoint", self.base.dir(), out)?;
        let merge = write_dir_atomically(out, overwrite, |dir| {
            let mut report = fill(self.base, &plan, dir)?;
            report
                .copied
                .retain(|copied| !self.files.iter().any(|(name, _)| name == copied));
            for (name, bytes) in &self.files {
                let path = dir.join(name);
                fs::write(&path, bytes).map_err(Error::io("write", &path))?;
            }
            Ok::<_, Error>(report)
        })?;
        Ok(ResizeReport {
            vocab_size_before: self.vocab_size,
            vocab_size: self.vocab_size(),
            merge,
        })
    }

    /// Plans the rows of one table: the tokens', and the padding.
    fn extend(
        &self,
        plan: &mut Plan<'_>,
        table: &MappedTable,
        init: impl Fn(&RowInit) -> RowInit,
    ) -> Result<()> {
        let vocab_size = self.vocab_size();
        let taken: BTreeSet<u32> = self.tokens.iter().map(|(id, _)| id.0).collect();
        let first = u32::try_from(self.vocab_size).unwrap_or(u32::MAX);
        let padding = (first..u32::try_from(vocab_size).unwrap_or(u32::MAX)).filter(|id| !taken.contains(id));
        let padding: Vec<_> = padding.map(|id| (id, mean())).collect();
        let tokens = self.tokens.iter().map(|(id, of)| (id.0, init(of)));
        let (ids, inits): (Vec<u32>, Vec<RowInit>) = tokens.chain(padding).unzip();
        let tokens = TokenSet::new(ids, vocab_size)?;
        let rows = initial_rows(table, &tokens, &inits, table.dtype().default_row_dtype())?;
        let added = vocab_size - table.vocab_size();
        let zeros = TokenRows::zeros(table.dtype(), added, table.embedding_dim());
        let table = ExtendedTable::new(table.clone(), &zeros)?;
        plan.extend(&table, tokens.ids(), &rows.to_dtype(table.dtype()))
    }
}

/// The mean of the rows that are there.
fn mean() -> RowInit {
    RowInit::new(InitMode::Mean {
        over: Population::All,
    })
}

/// How a value of a bias starts whose row starts so: noise and norms are of rows.
fn of_bias(init: &RowInit) -> RowInit {
    match &init.mode {
        InitMode::Keep
        | InitMode::Zeros
        | InitMode::Copy(_)
        | InitMode::MeanOf(_)
        | InitMode::Interpolate { .. } => RowInit::new(init.mode.clone()),
        _ => mean(),
    }
}

/// The biases of the head: its own, the one beside it, or BART's.
fn biases(base: &Checkpoint, model: &ModelTables, vocab_size: usize) -> Result<Vec<MappedTable>> {
    let heads = model
        .token_tables()
        .into_iter()
        .filter(|path| model.input_embedding() != Some(path));
    let outer = |path: &str| path.rsplit_once('.').map(|(outer, _)| outer.to_owned());
    let owners: Vec<String> = heads
        .flat_map(|path| [Some(path.to_owned()), outer(path)])
        .flatten()
        .collect();
    let is_bias = |name: &str| {
        let own = name
            .strip_suffix(".bias")
            .is_some_and(|path| owners.iter().any(|owner| owner == path));
        own || name.rsplit('.').next() == Some("final_logits_bias")
    };
    let mut found = Vec::new();
    for name in base.names().filter(|name| is_bias(name)) {
        let shape = base.tensor(name)?.shape;
        if shape == [vocab_size] || shape == [1, vocab_size] {
            found.push(base.column(name)?);
        }
    }
    Ok(found)
}

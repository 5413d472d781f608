//! Several adapters at once.

use std::collections::BTreeMap;
use std::path::Path;

use trainable_tokens_core::{MergeCheck, Overlap, TokenRows, TokenSet};

use super::plan::Plan;
use super::{MergeReport, RowReplacement, write};
use crate::adapter::{Adapter, BaseCheck, RecordedTable};
use crate::atomic::Overwrite;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::lora::LoraDelta;
use crate::table::ExtendedTable;

/// Adapters to bake into a copy of a checkpoint: their rows, and LoRA's weights if they have them.
///
/// LoRA's weights are added in the order of the adapters, each sum rounded to the tensor's type, as PEFT's
/// `merge_and_unload` does. Rows are replaced after that: a row that an adapter trained is the new row, whatever LoRA adds
/// to the table.
///
/// A vocabulary that an adapter extends ([`Adapter::table`]) is larger in the copy: so are the tensors, and `vocab_size` of
/// `config.json`.
///
/// ```no_run
/// use trainable_tokens_core::MergeCheck;
/// use trainable_tokens_format::{Adapter, Checkpoint, Merge, Overwrite};
///
/// # fn main() -> Result<(), trainable_tokens_format::Error> {
/// let base = Checkpoint::open("model")?;
/// let report = Merge::new(&base)
///     .with("chat", &Adapter::read("chat-adapter")?)?
///     .with("tools", &Adapter::read("tools-adapter")?)?
///     .check(MergeCheck::Finite)
///     .write("merged", Overwrite::Refuse)?;
/// println!("{} rows, {} LoRA modules", report.rows, report.lora_modules);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Merge<'a> {
    base: &'a Checkpoint,
    parts: Vec<Part>,
    overlap: Overlap,
    check: MergeCheck,
    base_check: BaseCheck,
    recorded: Vec<RecordedTable>,
}

#[derive(Clone, Debug)]
struct Part {
    name: String,
    tables: Vec<(String, ExtendedTable)>,
    rows: Vec<RowReplacement>,
    deltas: Vec<LoraDelta>,
}

/// Rows for one table, by the place of their adapter.
type Owned<'a> = Vec<(usize, &'a RowReplacement)>;

impl<'a> Merge<'a> {
    /// Starts with a checkpoint and no adapter.
    pub fn new(base: &'a Checkpoint) -> Self {
        Self {
            base,
            parts: Vec::new(),
            overlap: Overlap::Refuse,
            check: MergeCheck::Unchecked,
            base_check: BaseCheck::Fits,
            recorded: Vec::new(),
        }
    }

    /// Adds an adapter; `name` stands for it in messages.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::replacements`] and [`Adapter::lora_deltas`]; core's error for a name that is taken.
    pub fn with(self, name: impl Into<String>, adapter: &Adapter) -> Result<Self> {
        let deltas = adapter.lora_deltas(self.base)?;
        self.add(name.into(), adapter, deltas)
    }

    /// Adds the rows of an adapter, and none of its weights of LoRA.
    pub(crate) fn with_rows(self, name: &str, adapter: &Adapter) -> Result<Self> {
        self.add(name.to_owned(), adapter, Vec::new())
    }

    fn add(mut self, name: String, adapter: &Adapter, deltas: Vec<LoraDelta>) -> Result<Self> {
        if self.parts.iter().any(|part| part.name == name) {
            let must = "given once: merged twice, its weights of LoRA would be added twice";
            return Err(Error::Core(trainable_tokens_core::Error::AdapterName {
                name,
                must,
            }));
        }
        for table in adapter.check_all(self.base, self.base_check)? {
            if !self.recorded.iter().any(|known| known.is_like(&table)) {
                self.recorded.push(table.of(&name));
            }
        }
        self.parts.push(Part {
            name,
            tables: adapter.other_tables(self.base)?,
            rows: adapter.replacements(self.base)?,
            deltas,
        });
        Ok(self)
    }

    /// How closely the base must be the one that the adapters were trained on, for those that are added after this;
    /// [`BaseCheck::Fits`] without a word. Digests are compared while the files that were
    /// written go to the disk.
    pub fn base_check(self, base_check: BaseCheck) -> Self {
        Self { base_check, ..self }
    }

    /// What counts for a token that several adapters train; without a word, they are refused. Weights are one for each
    /// adapter, in the order added.
    pub fn overlap(self, overlap: Overlap) -> Self {
        Self { overlap, ..self }
    }

    /// What is checked before it is written: unlike PEFT's `safe_merge`, a value of the base that is not finite is not
    /// held against an adapter, and the check does not change how sums are rounded.
    pub fn check(self, check: MergeCheck) -> Self {
        Self { check, ..self }
    }

    /// What LoRA's weights of the adapters add, in the order in which it is added.
    pub fn deltas(&self) -> impl Iterator<Item = &LoraDelta> {
        self.parts.iter().flat_map(|part| &part.deltas)
    }

    /// Writes the copy as the directory `out`, whole or not at all; see [`merge_checkpoint`](super::merge_checkpoint) for
    /// what becomes of its files.
    ///
    /// # Errors
    ///
    /// Core's errors for tokens that several adapters train, and for weights; [`Error::NonFinite`] by the check;
    /// [`Error::Base`] if a table is not the one that an adapter was trained on, if that was asked for;
    /// [`Error::Target`] if `out` is the base, inside it or around it; those of
    /// [`write_dir_atomically`](crate::write_dir_atomically).
    pub fn write(&self, out: impl AsRef<Path>, overwrite: Overwrite) -> Result<MergeReport> {
        let mut plan = Plan::new(self.base, self.check);
        let mut tables: BTreeMap<&str, Owned<'_>> = BTreeMap::new();
        self.overlap.expect_weights(self.parts.len())?;
        for part in &self.parts {
            for (tensor, table) in &part.tables {
                plan.start_from(tensor, table.clone())?;
            }
            for delta in &part.deltas {
                if let Some(table) = delta.base_table()? {
                    plan.start_from(delta.tensor(), table)?;
                }
            }
        }
        for (place, part) in self.parts.iter().enumerate() {
            for delta in &part.deltas {
                plan.add(&part.name, delta.clone())?;
            }
            for rows in &part.rows {
                tables.entry(&rows.tensor).or_default().push((place, rows));
            }
        }
        for (tensor, owned) in tables {
            self.replace(&mut plan, tensor, &owned)?;
        }
        write(self.base, &plan, &self.recorded, out.as_ref(), overwrite)
    }

    fn replace(&self, plan: &mut Plan<'_>, tensor: &str, owned: &Owned<'_>) -> Result<()> {
        if let [(place, rows)] = owned[..] {
            return plan.replace(tensor, &rows.ids, &rows.rows, |_| self.parts[place].name.clone());
        }
        let vocab_size = plan.vocab_size(tensor)?;
        let sets = owned
            .iter()
            .map(|(_, rows)| TokenSet::new(rows.ids.iter().map(|id| id.0), vocab_size));
        let sets = sets.collect::<trainable_tokens_core::Result<Vec<_>>>()?;
        let names: Vec<_> = owned
            .iter()
            .map(|(place, _)| self.parts[*place].name.as_str())
            .collect();
        let adapters: Vec<_> = names.iter().copied().zip(&sets).collect();
        let overlap = self.overlap.among(owned.iter().map(|(place, _)| *place));
        let (tokens, mix) = overlap.unite(&adapters, vocab_size)?;
        let parts: Vec<&TokenRows> = owned.iter().map(|(_, rows)| &rows.rows).collect();
        let whose = |id| {
            let of_token = adapters.iter().filter(|(_, tokens)| tokens.contains(id));
            of_token.map(|(name, _)| *name).collect::<Vec<_>>().join(" and ")
        };
        plan.replace(tensor, tokens.ids(), &mix.apply(&parts)?, whose)
    }
}

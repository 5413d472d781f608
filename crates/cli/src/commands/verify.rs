//! `verify`: whether adapters fit a model.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::EmbeddingSource;
use trainable_tokens_format::{
    self as format, Adapter, AdapterModule, BaseCheck, Checkpoint, LoraDelta, MappedTable, PeftType,
    TableDigest,
};
use trainable_tokens_trainer::Vocabulary;

use super::adapters_in;
use crate::args::{Cli, VerifyArgs};
use crate::output::print;
use crate::rows::text_table;

#[derive(Serialize)]
struct Output {
    fits: bool,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Check {
    /// Where the directory holds several.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
    #[serde(rename = "check")]
    name: &'static str,
    /// Absent if there was nothing to check against.
    ok: Option<bool>,
    detail: String,
}

impl Check {
    fn of(name: &'static str, outcome: Result<String, String>) -> Self {
        Self {
            adapter: None,
            name,
            ok: Some(outcome.is_ok()),
            detail: outcome.unwrap_or_else(|reason| reason),
        }
    }

    fn skipped(name: &'static str, detail: &str) -> Self {
        Self {
            adapter: None,
            name,
            ok: None,
            detail: detail.to_owned(),
        }
    }

    /// By what was found of each module; skipped if that is nothing.
    fn of_all(name: &'static str, found: Vec<Result<String, String>>, otherwise: &str) -> Self {
        if found.is_empty() {
            return Self::skipped(name, otherwise);
        }
        let details = found.into_iter().collect::<Result<Vec<_>, _>>();
        Self::of(name, details.map(|details| details.join("; ")))
    }
}

pub(super) fn run(args: &VerifyArgs, cli: &Cli) -> Result<()> {
    let base = Checkpoint::open(&args.model)?;
    let vocabulary = Vocabulary::of_model(&args.model);
    let (mut checks, digests) = (Vec::new(), Digests::default());
    for (name, dir) in adapters_in(&args.adapter)? {
        let adapter = Adapter::read(&dir)?;
        let found = Verification {
            base: &base,
            vocabulary: &vocabulary,
            adapter: &adapter,
            digests: &digests,
        }
        .checks()?;
        checks.extend(found.into_iter().map(|check| Check {
            adapter: name.clone(),
            ..check
        }));
    }
    let failed = checks.iter().find(|check| check.ok == Some(false));
    let failed = failed.map(|check| {
        let name = check.adapter.as_ref().map(|name| format!(" {name:?} of"));
        let (dir, model) = (args.adapter.display(), args.model.display());
        format!(
            "adapter{} {dir} does not fit model {model}: {}",
            name.unwrap_or_default(),
            check.detail
        )
    });
    let output = Output {
        fits: failed.is_none(),
        checks,
    };
    print(cli.json, &output, to_text)?;
    match failed {
        None => Ok(()),
        Some(reason) => bail!("{reason}"),
    }
}

struct Verification<'a> {
    base: &'a Checkpoint,
    vocabulary: &'a Vocabulary,
    adapter: &'a Adapter,
    digests: &'a Digests,
}

/// The digests of tables by file and name, computed once for all adapters: each takes reading the whole table.
#[derive(Default)]
struct Digests(RefCell<BTreeMap<(PathBuf, String), TableDigest>>);

impl Digests {
    fn of(&self, table: &MappedTable) -> TableDigest {
        let place = (table.path().to_owned(), table.name().to_owned());
        *self.0.borrow_mut().entry(place).or_insert_with(|| table.digest())
    }
}

impl Verification<'_> {
    fn checks(&self) -> Result<Vec<Check>> {
        let mut checks = vec![self.sizes()];
        if self.adapter.config().peft_type() == PeftType::Lora {
            checks.push(self.lora());
        }
        checks.extend([
            self.tied_copies(),
            self.base_table(),
            self.finite_values(),
            self.token_strings()?,
        ]);
        Ok(checks)
    }

    fn sizes(&self) -> Check {
        let fits = self.adapter.check_against(self.base, BaseCheck::Fits);
        let outcome = fits.map_err(reason).map(|()| {
            let sizes = self.adapter.modules().iter().filter_map(|module| {
                let table = self.adapter.table(module.path(), self.base).ok()?;
                let (ids, dim) = (module.token_indices().len(), table.embedding_dim());
                Some(format!(
                    "{}: {ids} ids below {}, rows of {dim}",
                    module.path(),
                    table.vocab_size()
                ))
            });
            let sizes = sizes.collect::<Vec<_>>().join("; ");
            if sizes.is_empty() {
                "no rows of tokens".to_owned()
            } else {
                sizes
            }
        });
        Check::of("vocabulary and dimensions", outcome)
    }

    fn lora(&self) -> Check {
        let outcome = self.adapter.lora_deltas(self.base).map_err(reason);
        Check::of("weights of LoRA", outcome.map(|deltas| lora_summary(&deltas)))
    }

    /// Reading the adapter compared the copies of tied modules already.
    fn tied_copies(&self) -> Check {
        let modules = self.adapter.modules().iter();
        match modules.map(|module| module.tied_paths().len()).sum::<usize>() {
            0 => Check::skipped("tied copies", "the file has one copy of the rows"),
            copies => Check::of(
                "tied copies",
                Ok(format!("{} copies agree, bit for bit", copies + 1)),
            ),
        }
    }

    fn base_table(&self) -> Check {
        let mut found = Vec::new();
        for module in self.adapter.modules() {
            let recorded = self.adapter.module_metadata(module.path()).base_digest;
            // What does not fit has a check of its own, and a table that has grown has another digest.
            let table = self.adapter.table(module.path(), self.base).ok();
            let table = table.filter(|table| table.added().num_rows() == 0);
            if let Some((recorded, table)) = recorded.zip(table) {
                found.push(same_table(recorded, self.digests.of(table.base())));
            }
        }
        let otherwise = "the adapter does not record which table it was trained on";
        Check::of_all("base table", found, otherwise)
    }

    fn finite_values(&self) -> Check {
        let rows = self.adapter.first_non_finite().map(|(module, token, column)| {
            format!("the row of token id {token} for {module} is not finite at column {column}")
        });
        // Weights that cannot be read have a check of their own.
        let weights = self.adapter.lora_weights().unwrap_or_default();
        let weights = weights.iter().find_map(|lora| {
            let (tensor, row, column) = lora.first_non_finite()?;
            Some(format!(
                "tensor {tensor} is not finite at row {row}, column {column}"
            ))
        });
        let outcome = rows
            .or(weights)
            .map_or_else(|| Ok("every value is finite".to_owned()), Err);
        Check::of("finite values", outcome)
    }

    fn token_strings(&self) -> Result<Check> {
        const NAME: &str = "token strings";
        let mut found = Vec::new();
        for module in self.adapter.modules() {
            if let Some(recorded) = self.adapter.module_metadata(module.path()).tokens {
                if !self.vocabulary.exists() {
                    return Ok(Check::skipped(NAME, "the model has no tokenizer.json"));
                }
                found.push(self.same_strings(module, &recorded)?);
            }
        }
        Ok(Check::of_all(NAME, found, "the adapter does not record them"))
    }

    fn same_strings(&self, module: &AdapterModule, recorded: &[String]) -> Result<Result<String, String>> {
        for (id, recorded) in module.token_indices().iter().zip(recorded) {
            let found = self.vocabulary.token(*id)?;
            if found.as_deref() != Some(recorded) {
                let found = found.map_or_else(|| "no token".to_owned(), |token| format!("'{token}'"));
                let wrong = format!("token id {id} was '{recorded}', but in this model it is {found}");
                return Ok(Err(wrong));
            }
        }
        Ok(Ok(format!("{} ids mean the same strings", recorded.len())))
    }
}

/// What does not fit; which adapter and model it is, is known.
fn reason(error: format::Error) -> String {
    match error {
        format::Error::Base { reason, .. } => reason,
        other => other.to_string(),
    }
}

fn same_table(recorded: TableDigest, found: TableDigest) -> Result<String, String> {
    if found == recorded {
        return Ok(recorded.to_string());
    }
    Err(format!(
        "it was trained on a table of {recorded}, but the model's is {found}"
    ))
}

fn lora_summary(deltas: &[LoraDelta]) -> String {
    let ranks = deltas.iter().map(|delta| delta.weights().rank());
    match (ranks.clone().min(), ranks.max()) {
        (Some(least), Some(most)) if least == most => format!("{} modules, rank {least}", deltas.len()),
        (Some(least), Some(most)) => format!("{} modules, ranks {least} to {most}", deltas.len()),
        _ => "there are none".to_owned(),
    }
}

fn to_text(output: &Output) -> String {
    let several = output.checks.iter().any(|check| check.adapter.is_some());
    let rows = output.checks.iter().map(|check| {
        let mark = match check.ok {
            Some(true) => "ok",
            Some(false) => "FAIL",
            None => "",
        };
        let adapter = several.then(|| check.adapter.clone().unwrap_or_default());
        let cells = [mark.to_owned(), check.name.to_owned(), check.detail.clone()];
        adapter.into_iter().chain(cells).collect()
    });
    let header = if several {
        &["adapter", "", "check", "found"][..]
    } else {
        &["", "check", "found"]
    };
    let text = text_table(header, rows);
    text + if output.fits {
        "the adapter fits the model\n"
    } else {
        "the adapter does not fit the model\n"
    }
}

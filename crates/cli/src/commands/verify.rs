//! `verify`: whether an adapter fits a model.

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::EmbeddingSource;
use trainable_tokens_format::{Adapter, AdapterModule, BaseCheck};

use crate::args::{Cli, VerifyArgs};
use crate::model::Model;
use crate::output::print;

#[derive(Serialize)]
struct Output {
    fits: bool,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Check {
    #[serde(rename = "check")]
    name: &'static str,
    /// Absent if there was nothing to check against.
    ok: Option<bool>,
    detail: String,
}

impl Check {
    fn of(name: &'static str, outcome: Result<String, String>) -> Self {
        let ok = Some(outcome.is_ok());
        Self {
            name,
            ok,
            detail: outcome.unwrap_or_else(|reason| reason),
        }
    }

    fn skipped(name: &'static str, detail: &str) -> Self {
        Self {
            name,
            ok: None,
            detail: detail.to_owned(),
        }
    }
}

pub(super) fn run(args: &VerifyArgs, cli: &Cli) -> Result<()> {
    let model = Model::open(&args.model)?;
    let adapter = Adapter::read(&args.adapter)?;
    let checks = checks(&model, &adapter)?;
    let failed = checks
        .iter()
        .find(|check| check.ok == Some(false))
        .map(|check| check.detail.clone());
    let output = Output {
        fits: failed.is_none(),
        checks,
    };
    print(cli.json, &output, to_text)?;
    match failed {
        None => Ok(()),
        Some(detail) => {
            bail!(
                "adapter {} does not fit model {}: {detail}",
                args.adapter.display(),
                args.model.display()
            )
        }
    }
}

fn checks(model: &Model, adapter: &Adapter) -> Result<Vec<Check>> {
    let table = model.table()?;
    let metadata = adapter.metadata();
    let ids = adapter
        .modules()
        .first()
        .map_or(&[][..], AdapterModule::token_indices);
    let mut checks = vec![Check::of(
        "vocabulary and dimensions",
        adapter
            .check_against(&model.checkpoint, BaseCheck::Fits)
            .map_err(|error| error.to_string())
            .map(|()| {
                format!(
                    "{} ids below {}, rows of {}",
                    ids.len(),
                    table.vocab_size(),
                    table.embedding_dim()
                )
            }),
    )];
    // Reading the adapter compared the copies of tied modules already.
    let copies: usize = adapter
        .modules()
        .iter()
        .map(|module| module.tied_paths().len())
        .sum();
    checks.push(match copies {
        0 => Check::skipped("tied copies", "the file has one copy of the rows"),
        _ => Check::of(
            "tied copies",
            Ok(format!("{} copies agree, bit for bit", copies + 1)),
        ),
    });
    checks.push(match metadata.base_digest {
        None => Check::skipped(
            "base table",
            "the adapter does not record which table it was trained on",
        ),
        Some(recorded) => {
            let found = table.digest();
            let differs = format!("it was trained on a table of {recorded}, but the model's is {found}");
            Check::of(
                "base table",
                if found == recorded {
                    Ok(recorded.to_string())
                } else {
                    Err(differs)
                },
            )
        }
    });
    checks.push(match adapter.first_non_finite() {
        None => Check::of("finite values", Ok("every value is finite".to_owned())),
        Some((module, token, column)) => Check::of(
            "finite values",
            Err(format!(
                "the row of token id {token} for {module} is not finite at column {column}"
            )),
        ),
    });
    checks.push(match (&metadata.tokens, model.vocabulary.exists()) {
        (None, _) => Check::skipped("token strings", "the adapter does not record them"),
        (_, false) => Check::skipped("token strings", "the model has no tokenizer.json"),
        (Some(recorded), true) => Check::of("token strings", same_strings(model, ids, recorded)?),
    });
    Ok(checks)
}

fn same_strings(model: &Model, ids: &[u32], recorded: &[String]) -> Result<Result<String, String>> {
    for (id, recorded) in ids.iter().zip(recorded) {
        let found = model.vocabulary.token(*id)?;
        if found.as_deref() != Some(recorded) {
            let found = found.map_or_else(|| "no token".to_owned(), |token| format!("'{token}'"));
            return Ok(Err(format!(
                "token id {id} was '{recorded}', but in this model it is {found}"
            )));
        }
    }
    Ok(Ok(format!("{} ids mean the same strings", recorded.len())))
}

fn to_text(output: &Output) -> String {
    let line = |check: &Check| {
        let mark = match check.ok {
            Some(true) => "ok",
            Some(false) => "FAIL",
            None => "-",
        };
        format!("{mark:<5} {:<26} {}\n", check.name, check.detail)
    };
    let verdict = if output.fits {
        "the adapter fits the model\n"
    } else {
        "the adapter does not fit the model\n"
    };
    output.checks.iter().map(line).collect::<String>() + verdict
}

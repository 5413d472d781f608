//! `extract`: the adapter that turns a model into the one that was tuned from it.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use trainable_tokens_format::{Adapter, AdapterModule, Checkpoint, Extract};
use trainable_tokens_trainer::Vocabulary;

use super::{check_apart, check_free};
use crate::args::{Cli, ExtractArgs};
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    adapter: &'a Path,
    /// The tables whose rows have changed.
    modules: Vec<&'a str>,
    token_indices: Vec<u32>,
    /// Where the tuned model has a tokenizer that knows them all.
    tokens: Option<Vec<String>>,
    embedding_dim: usize,
    vocab_size: Option<usize>,
}

pub(super) fn run(args: &ExtractArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    check_apart(&args.out, [args.base.as_path(), args.tuned.as_path()])?;
    let (base, tuned) = (Checkpoint::open(&args.base)?, Checkpoint::open(&args.tuned)?);
    let mut extract = Extract::new(&base, &tuned).base_model_name_or_path(args.base.to_string_lossy());
    if let Some(rows) = args.max_rows {
        extract = extract.max_rows(rows);
    }
    let adapter = extract.adapter()?;
    let first = adapter.modules().first();
    let ids = first.map_or_else(Vec::new, |module| module.token_indices().to_vec());
    let tokens = token_strings(&[&args.tuned, &args.base], &ids)?;
    let adapter = with_tokens(adapter, tokens.clone())?;
    adapter.write(&args.out, cli.overwrite())?;
    let modules = adapter.modules();
    let output = Output {
        adapter: &args.out,
        modules: modules.iter().map(AdapterModule::path).collect(),
        token_indices: ids,
        tokens,
        embedding_dim: modules.first().map_or(0, |module| module.rows().embedding_dim()),
        vocab_size: adapter.metadata().vocab_size,
    };
    print(cli.json, &output, to_text)
}

/// The strings of tokens, by the first of these models that has a tokenizer; none if it does not know them all.
fn token_strings(models: &[&Path], ids: &[u32]) -> Result<Option<Vec<String>>> {
    let mut vocabularies = models.iter().map(|dir| Vocabulary::of_model(dir));
    let Some(vocabulary) = vocabularies.find(Vocabulary::exists) else {
        return Ok(None);
    };
    ids.iter().map(|id| Ok(vocabulary.token(*id)?)).collect()
}

fn with_tokens(adapter: Adapter, tokens: Option<Vec<String>>) -> Result<Adapter> {
    let mut metadata = adapter.metadata().clone();
    metadata.tokens = tokens;
    Ok(adapter.with_metadata(metadata)?)
}

fn to_text(output: &Output<'_>) -> String {
    let (dir, rows) = (output.adapter.display(), output.token_indices.len());
    let mut text = format!("wrote {dir}: {rows} rows of {}\n", output.modules.join(" and "));
    for (slot, id) in output.token_indices.iter().enumerate() {
        let token = output.tokens.as_ref().and_then(|tokens| tokens.get(slot));
        text += &token.map_or_else(|| format!("  {id}\n"), |token| format!("  {id} {token:?}\n"));
    }
    text
}

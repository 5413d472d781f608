//! `init`: an adapter whose rows have not trained yet.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use trainable_tokens_core::{EmbeddingSource, TokenSet};

use super::{check_apart, check_free};
use crate::args::{Cli, InitArgs};
use crate::model::Model;
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    adapter: &'a Path,
    token_indices: Vec<u32>,
    tokens: Option<Vec<String>>,
    embedding_dim: usize,
    /// As it is recorded in the file.
    init: String,
    /// How each row started, all tokens by their ids, in slot order.
    row_inits: Vec<String>,
}

pub(super) fn run(args: &InitArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    check_apart(&args.out, [args.model.as_path()])?;
    let model = Model::open(&args.model)?;
    let ids = args
        .tokens
        .resolve(&model.vocabulary, model.config.input_spec().vocab_size)?;
    let table = model.table()?;
    let tokens = TokenSet::new(ids.iter().copied(), table.vocab_size())?;
    let initial = args.init.resolve(&model.vocabulary, &ids, args.seed)?;
    let rows = initial.rows(&table, &tokens)?;
    model
        .adapter_builder(&args.model, &ids, rows, &initial)?
        .build()?
        .write(&args.out, cli.overwrite())?;
    let output = Output {
        adapter: &args.out,
        tokens: model.token_strings(&ids)?,
        token_indices: ids,
        embedding_dim: table.embedding_dim(),
        row_inits: initial.resolved(),
        init: initial.text,
    };
    print(cli.json, &output, to_text)
}

fn to_text(output: &Output<'_>) -> String {
    let (dir, rows) = (output.adapter.display(), output.token_indices.len());
    if output.init == "keep" {
        return format!("wrote {dir}: {rows} rows, as they are");
    }
    let mut text = format!("wrote {dir}: {rows} rows, init {}\n", output.init);
    for (slot, (id, init)) in output.token_indices.iter().zip(&output.row_inits).enumerate() {
        let token = output.tokens.as_ref().and_then(|tokens| tokens.get(slot));
        let token = token.map_or_else(String::new, |token| format!(" {token:?}"));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {id}{token}: {init}");
    }
    text
}

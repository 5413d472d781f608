//! `init`: an adapter that changes nothing yet.

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
}

pub(super) fn run(args: &InitArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    check_apart(&args.out, [args.model.as_path()])?;
    let model = Model::open(&args.model)?;
    let ids = args.tokens.resolve(&model.vocabulary, model.config.vocab_size)?;
    let table = model.table()?;
    let tokens = TokenSet::new(ids.iter().copied(), table.vocab_size())?;
    let rows = table
        .read_rows(tokens.ids())?
        .to_dtype(table.dtype().default_row_dtype());
    let output = Output {
        adapter: &args.out,
        tokens: model.token_strings(&ids)?,
        token_indices: ids.clone(),
        embedding_dim: table.embedding_dim(),
    };
    model
        .adapter_builder(&args.model, &ids, rows)?
        .build()?
        .write(&args.out, cli.overwrite())?;
    print(cli.json, &output, |o| {
        format!(
            "wrote {}: {} rows, as they are",
            o.adapter.display(),
            o.token_indices.len()
        )
    })
}

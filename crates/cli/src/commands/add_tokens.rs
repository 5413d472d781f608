//! `add-tokens`: a copy of a model whose tokenizer and tables have new tokens.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use trainable_tokens_core::TokenId;
use trainable_tokens_format::{Checkpoint, Resize};
use trainable_tokens_trainer::{TokenFlags, TokenKind, Vocabulary};

use super::check_free;
use crate::args::{AddTokensArgs, Cli, RowInitArgs};
use crate::output::print;
use crate::tokens::{CommaList, expect_found};

#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    added: Vec<Added>,
    vocab_size_before: usize,
    vocab_size: usize,
    rows_appended: usize,
    /// As it was asked for.
    init: String,
    /// The tensors that changed: tables, and biases of the head.
    tensors: Vec<String>,
    /// Files of the tokenizer that list the new tokens.
    tokenizer_files: Vec<PathBuf>,
    rewritten: Vec<PathBuf>,
    shared: Vec<PathBuf>,
    copied: Vec<PathBuf>,
    left_out: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Added {
    token: String,
    id: u32,
    /// Whether it took a padded row that was there already.
    reused_row: bool,
    /// How its row started, all tokens by their ids.
    init: String,
}

pub(super) fn run(args: &AddTokensArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    let base = Checkpoint::open(&args.model)?;
    let mut resize = Resize::new(&base)?;
    let flags = TokenFlags {
        kind: if args.normal {
            TokenKind::Normal
        } else {
            TokenKind::Special
        },
        lstrip: args.lstrip,
        rstrip: args.rstrip,
        single_word: args.single_word,
    };
    let tokens: Vec<String> = CommaList::all(&args.tokens).cloned().collect();
    let added = Vocabulary::of_model(&args.model).add(&tokens, flags)?;
    for (token, id) in tokens.iter().zip(&added.ids) {
        expect_found(&added.vocabulary, token, *id)?;
    }
    let inits = RowInitArgs {
        init: args.init.clone(),
        init_token: args.init_token.clone(),
    };
    let initial = inits.resolve(&added.vocabulary, &added.ids, args.seed)?;
    for (id, init) in added.ids.iter().zip(initial.inits()) {
        resize = resize.token(TokenId(*id), init.clone());
    }
    if let Some(multiple) = args.pad_to_multiple_of {
        resize = resize.pad_to_multiple_of(multiple);
    }
    let tokenizer_files = added.files.iter().map(|(name, _)| name.clone()).collect();
    for (name, bytes) in added.files {
        resize = resize.file(name, bytes);
    }
    let report = resize.write(&args.out, cli.overwrite())?;
    let tokens = tokens.into_iter().zip(added.ids).zip(initial.resolved());
    let added = tokens.map(|((token, id), init)| Added {
        token,
        id,
        reused_row: TokenId(id).row() < report.vocab_size_before,
        init,
    });
    let output = Output {
        out: &args.out,
        added: added.collect(),
        vocab_size_before: report.vocab_size_before,
        vocab_size: report.vocab_size,
        rows_appended: report.vocab_size - report.vocab_size_before,
        init: initial.text,
        tensors: report.merge.tensors,
        tokenizer_files,
        rewritten: report.merge.rewritten,
        shared: report.merge.shared,
        copied: report.merge.copied,
        left_out: report.merge.left_out,
    };
    print(cli.json, &output, to_text)
}

fn to_text(output: &Output<'_>) -> String {
    let mut text = format!(
        "wrote {}: {} rows, {} before, in {}\n",
        output.out.display(),
        output.vocab_size,
        output.vocab_size_before,
        output.tensors.join(", ")
    );
    for added in &output.added {
        let row = if added.reused_row {
            "padded row taken"
        } else {
            "new row"
        };
        text += &format!(
            "  {:>8} {:?}: {row}, init {}\n",
            added.id, added.token, added.init
        );
    }
    text
}

//! `generate`: the continuation of a prompt.

use std::time::Instant;

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_trainer::{GenerateOptions, generate};

use crate::args::{Cli, GenerateArgs};
use crate::model::Model;
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    prompt: Option<&'a str>,
    prompt_ids: &'a [u32],
    /// The continuation, if the model has a tokenizer.
    text: Option<String>,
    token_ids: &'a [u32],
    new_tokens: usize,
    /// Whether a token that ends a text was reached.
    ended: bool,
    seconds: f64,
    tokens_per_second: f64,
}

pub(super) fn run(args: &GenerateArgs, cli: &Cli) -> Result<()> {
    let model = Model::open(&args.model)?;
    let prompt = args.prompt.text.as_deref();
    let prompt_ids = match prompt {
        Some(text) => model.vocabulary.encode(text)?,
        None => args.prompt.ids.clone(),
    };
    let loaded = model.load(args.adapter.as_deref(), args.compute)?;
    let Some(decoder) = loaded.as_decoder() else {
        bail!("{} is an encoder, which continues no text", args.model.display());
    };
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let started = Instant::now();
    let generated = generate(decoder, &prompt_ids, &options)?;
    let seconds = started.elapsed().as_secs_f64();
    let new_tokens = generated.token_ids.len();
    let text = if model.vocabulary.exists() {
        Some(model.vocabulary.decode(&generated.token_ids)?)
    } else {
        None
    };
    let output = Output {
        prompt,
        prompt_ids: &prompt_ids,
        text,
        token_ids: &generated.token_ids,
        new_tokens,
        ended: generated.ended,
        seconds,
        tokens_per_second: new_tokens as f64 / seconds.max(1e-9),
    };
    print(cli.json, &output, |output| match &output.text {
        Some(text) => text.clone(),
        None => format!("token ids {:?}", output.token_ids),
    })
}

//! `eval`: the loss of a model.

use anyhow::{Result, bail};
use trainable_tokens_trainer::{Dataset, evaluate};

use crate::args::{Cli, EvalArgs};
use crate::model::Model;
use crate::output::print;

pub(super) fn run(args: &EvalArgs, cli: &Cli) -> Result<()> {
    let model = Model::open(&args.model)?;
    let decoder = model.load(args.adapter.as_deref(), args.compute)?;
    let data = Dataset::read(&args.data, &model.vocabulary, decoder.config(), args.max_length)?;
    let evaluation = evaluate(&decoder, &data, args.batch_size)?;
    if !evaluation.loss.is_finite() {
        bail!(
            "the loss of model {} on {} is {}: its weights, or the adapter's rows, are not finite or far too large",
            args.model.display(),
            args.data.display(),
            evaluation.loss
        );
    }
    print(cli.json, &evaluation, |e| {
        format!(
            "loss {:.6}, perplexity {:.4}, {} tokens",
            e.loss, e.perplexity, e.tokens
        )
    })
}

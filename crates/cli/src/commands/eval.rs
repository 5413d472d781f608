//! `eval`: the loss of a model.

use anyhow::{Result, bail};
use trainable_tokens_trainer::{Dataset, Evaluation, evaluate};

use crate::args::{Cli, EvalArgs};
use crate::model::Model;
use crate::output::print;
use crate::summary::retrieval_text;

pub(super) fn run(args: &EvalArgs, cli: &Cli) -> Result<()> {
    let model = Model::open(&args.model)?;
    let loaded = model.load(args.adapter.as_deref(), args.compute)?;
    let objective = args.objective.resolve(&model, args.seed)?;
    let data = Dataset::read_all(
        &args.data,
        &model.vocabulary,
        loaded.input_spec(),
        args.max_length,
    )?;
    let evaluation = evaluate(&loaded, &data, &objective, args.batch_size)?;
    if !evaluation.loss.is_finite() {
        let files: Vec<String> = data.paths().map(|path| path.display().to_string()).collect();
        bail!(
            "the loss of model {} on {} is {}: its weights, or the adapter's rows, are not finite or far too large",
            args.model.display(),
            files.join(", "),
            evaluation.loss
        );
    }
    print(cli.json, &evaluation, to_text)
}

fn to_text(evaluation: &Evaluation) -> String {
    let Evaluation { loss, tokens, .. } = evaluation;
    match (evaluation.perplexity, evaluation.retrieval) {
        (_, Some(retrieval)) => format!("loss {loss:.6}, {}", retrieval_text(retrieval)),
        (Some(perplexity), None) => format!("loss {loss:.6}, perplexity {perplexity:.4}, {tokens} tokens"),
        (None, None) => format!("loss {loss:.6}, {tokens} tokens"),
    }
}

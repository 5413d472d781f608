//! `train`: rows of some tokens, and weights of LoRA if asked, on a data set, into an adapter.

mod course;
mod dead;
mod metrics;
mod run;
mod save;

pub(crate) use dead::DeadToken;
use run::{Outputs, Run, RunReport};

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use trainable_tokens_core::{EmbeddingSource, PaddingRule, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, BaseCheck, Overwrite, TrainingState, is_path_or_suffix};
use trainable_tokens_trainer::{
    self as trainer, Dataset, EarlyStopping, InputSpec, Objective, TrainOptions, Trainer,
};

use super::{check_apart, check_free};
use crate::args::{self, Cli, PaddingChoice, TrainArgs};
use crate::initial::Initial;
use crate::interrupt::{self, Interrupted};
use crate::model::{Model, misfit};
use crate::output::{note, print};
use crate::summary::{End, Summary};
use crate::tokens::CommaList;

pub(super) fn run(args: &TrainArgs, cli: &Cli) -> Result<()> {
    let RunReport { summary, .. } = train(args, cli.overwrite(), interrupt::watch)?;
    print(cli.json, &summary, Summary::to_text)?;
    match summary.end {
        End::Interrupted => Err(Interrupted {
            step: summary.steps,
            adapter: args.out.clone(),
        }
        .into()),
        End::LastStep | End::EarlyStopping => Ok(()),
    }
}

/// The whole run; `ready` is called when all is loaded, before the first step.
pub(super) fn train(
    args: &TrainArgs,
    overwrite: Overwrite,
    ready: impl FnOnce() -> Result<()>,
) -> Result<RunReport> {
    // An interrupted run may go on in the directory and the metrics file that it wrote itself.
    let resumes_here = |path: &Path| args.resume.as_deref().is_some_and(|from| same_path(from, path));
    if let (Some(metrics), None) = (&args.watch.metrics, &args.resume) {
        check_free(metrics, overwrite)?;
    }
    if let (Some(report), None) = (&args.watch.report, &args.resume) {
        check_free(report, overwrite)?;
    }
    let overwrite = if resumes_here(&args.out) {
        Overwrite::Replace
    } else {
        overwrite
    };
    check_free(&args.out, overwrite)?;
    let others = [&args.watch.metrics, &args.watch.report];
    let others = others.into_iter().flatten().chain(&args.eval_data);
    // The options of an earlier run in the same place are not lost: those of this run are like them.
    let config = args.config.as_ref();
    let config = config.filter(|path| !same_path(path, &args.out.join(save::CONFIG_FILE)));
    let others = others
        .chain(config)
        .chain([&args.model])
        .chain(&args.data)
        .map(PathBuf::as_path);
    check_apart(&args.out, others)?;

    let model = Model::open(&args.model)?;
    let target_modules = target(args.target_modules.as_deref(), &model.embedding_module)?;
    let InputSpec {
        vocab_size,
        pad_token_id,
        ..
    } = model.config.input_spec();
    let ids = args.tokens.resolve(&model.vocabulary, vocab_size)?;
    let padding = padding_rule(args.padding_idx, &ids, pad_token_id)?;
    let objective = args.objective.resolve(&model, args.seed)?;
    let read =
        |files: &[PathBuf]| Dataset::read_all(files, &model.vocabulary, &model.config, args.max_length);
    let data = read(&args.data)?;
    let eval_data = Some(&args.eval_data).filter(|files| !files.is_empty());
    let eval_data = eval_data.map(|files| read(files)).transpose()?;
    let initial = args.init.resolve(&model.vocabulary, &ids, args.seed)?;
    let rows = start(&model, &ids, &initial)?;
    let lora = args.lora.options(args.seed);
    let loaded = match &lora {
        None => model.load_rows(&ids, rows.as_ref(), padding, args.compute)?,
        Some(lora) => {
            let start = lora.start(&model.checkpoint, &ids, rows.as_ref())?;
            model.load_adapter(&start, padding, args.compute)?
        }
    };
    let token_lr = CommaList::all(&args.token_lr).map(|own| own.resolve(&model.vocabulary));
    let options = TrainOptions {
        token_lr: token_lr.collect::<Result<_>>()?,
        ..options(args, objective)
    };
    let mut trainer = Trainer::new(loaded, data, options)?;
    if let Some(dir) = &args.resume {
        resume(&mut trainer, &model, dir, &initial, args.keep_best)?;
    }
    let run = Run {
        model: &model,
        model_dir: &args.model,
        target_modules: &target_modules,
        lora: lora.as_ref(),
        initial: &initial,
        outputs: Outputs {
            adapter: &args.out,
            overwrite,
            metrics: args.watch.metrics.as_deref(),
            report: args.watch.report.as_deref(),
            resumes: args.resume.is_some(),
            save_every: args.save_every,
            config: &args.resolved,
        },
        eval_data,
        eval_every: args.eval_every,
        warn_dead_after: args.watch.warn_dead_after,
        keep_best: args.keep_best,
    };
    ready()?;
    run.execute(&mut trainer)
}

fn options(args: &TrainArgs, objective: Objective) -> TrainOptions {
    TrainOptions {
        objective: Some(objective),
        steps: args.steps,
        batch_size: args.batch_size,
        accumulate: args.accumulate,
        optimizer: match args.optimizer {
            args::Optimizer::Adamw => trainer::OptimizerKind::AdamW,
            args::Optimizer::Adam => trainer::OptimizerKind::Adam,
            args::Optimizer::Sgd => trainer::OptimizerKind::Sgd,
        },
        lr: args.lr,
        beta1: args.beta1,
        beta2: args.beta2,
        eps: args.eps,
        weight_decay: args.weight_decay,
        momentum: args.momentum,
        decay_toward: match args.decay_toward {
            args::DecayToward::Zero => trainer::DecayToward::Zero,
            args::DecayToward::Original => trainer::DecayToward::Original,
        },
        schedule: match args.schedule {
            args::Schedule::Constant => trainer::Schedule::Constant,
            args::Schedule::Linear => trainer::Schedule::Linear,
            args::Schedule::Cosine => trainer::Schedule::Cosine,
            args::Schedule::InverseSqrt => trainer::Schedule::InverseSqrt,
        },
        warmup_steps: args.warmup_steps,
        min_lr_ratio: args.min_lr_ratio,
        max_grad_norm: args.max_grad_norm,
        token_lr: Vec::new(),
        match_norm: args.match_norm.map(|choice| match choice {
            args::NormChoice::Mean => trainer::NormTarget::Mean,
            args::NormChoice::Original => trainer::NormTarget::Original,
        }),
        max_row_norm: args.max_row_norm,
        early_stopping: args.early_stopping_patience.map(|patience| EarlyStopping {
            patience,
            min_delta: args.early_stopping_min_delta,
        }),
        keep_best: args.keep_best,
        seed: args.seed,
        shuffle: args.shuffle,
        recompute: args.recompute,
    }
}

/// The names of the module whose rows train: the input embedding at `path`, and no other. PEFT matches a path or a suffix
/// after a dot.
fn target(named: Option<&[String]>, path: &str) -> Result<Vec<String>> {
    let Some(named) = named else {
        let last = path.rsplit('.').next().unwrap_or(path);
        return Ok(vec![last.to_owned()]);
    };
    match named.iter().find(|name| !is_path_or_suffix(name, path)) {
        None => Ok(named.to_vec()),
        Some(name) => {
            bail!("target module '{name}' is not the input embedding {path}, the only module that can train")
        }
    }
}

/// torch gives the padding token's row no gradient from the lookup: never without the user's knowledge.
fn padding_rule(choice: Option<PaddingChoice>, ids: &[u32], pad: Option<u32>) -> Result<PaddingRule> {
    match (choice, pad.filter(|pad| ids.contains(pad))) {
        (Some(PaddingChoice::Train), _) => Ok(PaddingRule::Train),
        (Some(PaddingChoice::Torch), Some(pad)) => {
            note(&format!(
                "token id {pad} is the padding token: its row gets no gradient from the lookup"
            ));
            Ok(PaddingRule::NoLookupGradient)
        }
        (None, Some(pad)) => bail!(
            "token id {pad} is the model's padding token, whose row gets no gradient from torch's lookup; leave it \
             out, or choose --padding-idx torch or --padding-idx train"
        ),
        (_, None) => Ok(PaddingRule::NoLookupGradient),
    }
}

/// The rows to start from, unless they are the loaded table's own.
fn start(model: &Model, ids: &[u32], initial: &Initial) -> Result<Option<TokenRows>> {
    if initial.keeps_base() {
        return Ok(None);
    }
    let table = model.table()?;
    let tokens = TokenSet::new(ids.iter().copied(), table.vocab_size())?;
    Ok(Some(initial.rows(&table, &tokens)?))
}

fn resume(
    trainer: &mut Trainer,
    model: &Model,
    dir: &Path,
    initial: &Initial,
    keep_best: bool,
) -> Result<()> {
    let adapter = Adapter::read(dir)?;
    let same = adapter.check_against(&model.checkpoint, BaseCheck::SameTable);
    same.map_err(|error| misfit(dir, error))?;
    // Decay toward the original rows needs them again, and the adapter tells how it started.
    if let Some(init) = adapter
        .metadata()
        .init
        .as_deref()
        .filter(|init| *init != initial.text)
    {
        bail!(
            "adapter {} started with init {init}, not {}; repeat its --init, --init-token and --seed",
            dir.display(),
            initial.text
        );
    }
    let path = dir.join(TrainingState::FILE_NAME);
    let state = TrainingState::read(&path)?;
    let embedding = trainer.model().embedding_module();
    if adapter.rows(&embedding).is_none() {
        bail!("adapter {} has no rows for {embedding}", dir.display());
    }
    trainer.resume(&adapter, state, &path)?;
    if keep_best && trainer.best_evaluation().is_some() {
        trainer.resume_best(&Adapter::read(dir.join(save::BEST_DIR))?)?;
    }
    Ok(())
}

fn same_path(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

//! `demo`: the whole path, on the small model inside this program.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use trainable_tokens_core::PaddingRule;
use trainable_tokens_format::{
    Adapter, Overwrite, merge_checkpoint, write_dir_atomically, write_file_atomically,
};
use trainable_tokens_trainer::{
    Dataset, GenerateOptions, LanguageModel, TrainOptions, Trainer, Vocabulary, generate,
};

use super::train::{Outputs, Run};
use crate::args::{Cli, ComputeArgs, DemoArgs, DeviceArg, WeightType};
use crate::initial::Initial;
use crate::model::Model;
use crate::output::{note, print};
use crate::plot::charts_svg;
use crate::summary::Summary;

/// The files inside this program; `crates/cli/demo/README.md` says how they were made.
macro_rules! asset {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../demo/", $name)).as_slice())
    };
}

const MODEL: [(&str, &[u8]); 5] = [
    asset!("model/config.json"),
    asset!("model/generation_config.json"),
    asset!("model/model.safetensors"),
    asset!("model/tokenizer.json"),
    asset!("model/tokenizer_config.json"),
];
const DATA: [(&str, &[u8]); 2] = [asset!("train.jsonl"), asset!("heldout.jsonl")];
const PROMPTS: &[u8] = include_bytes!("../../demo/prompts.json");

/// The tokens that the model has never seen.
const TOKENS: [&str; 2] = ["<dax>", "<wug>"];
const STEPS: u64 = 120;
const EVAL_EVERY: u64 = 20;
const NEW_TOKENS: usize = 24;

#[derive(Serialize)]
struct Output {
    model: PathBuf,
    merged: PathBuf,
    metrics: PathBuf,
    plot: PathBuf,
    report: PathBuf,
    tokens: [&'static str; 2],
    generated: Vec<Generated>,
    summary: Summary,
}

#[derive(Serialize)]
struct Generated {
    prompt: String,
    before: String,
    after: String,
}

pub(super) fn run(args: &DemoArgs, cli: &Cli) -> Result<()> {
    let out = &args.out;
    let occupied = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file();
    if occupied && cli.overwrite() == Overwrite::Refuse {
        bail!(
            "{} already exists; use --force to replace what the demo writes there, or --out DIR",
            out.display()
        );
    }
    let place = |name: &str| out.join(name);
    let output = Output {
        model: place("model"),
        merged: place("merged"),
        metrics: place("metrics.jsonl"),
        plot: place("loss.svg"),
        report: place("report.html"),
        tokens: TOKENS,
        generated: Vec::new(),
        summary: Summary::default(),
    };
    unpack(out)?;
    let output = train(output, out)?;
    print(cli.json, &output, to_text)
}

/// Puts model and data where every other command can use them too.
fn unpack(out: &Path) -> Result<()> {
    write_dir_atomically(out.join("model"), Overwrite::Replace, |dir| -> Result<()> {
        for (name, bytes) in MODEL {
            let name = name.trim_start_matches("model/");
            fs::write(dir.join(name), bytes)
                .with_context(|| format!("cannot write {name} of the demo's model"))?;
        }
        Ok(())
    })?;
    for (name, bytes) in DATA {
        write_file_atomically(out.join(name), Overwrite::Replace, |file| -> Result<()> {
            file.write_all(bytes)
                .with_context(|| format!("cannot write {}", out.join(name).display()))
        })?;
    }
    Ok(())
}

fn train(mut output: Output, out: &Path) -> Result<Output> {
    let model = Model::open(&output.model)?;
    let data = |name: &str| Dataset::read(&out.join(name), &model.vocabulary, &model.config, None);
    let ids = TOKENS.map(|token| model.vocabulary.single_id(token));
    let ids = ids.into_iter().collect::<Result<Vec<u32>, _>>()?;
    let compute = ComputeArgs {
        device: DeviceArg::Cpu,
        dtype: WeightType::F32,
    };
    let decoder = model.load_rows(&ids, None, PaddingRule::NoLookupGradient, compute)?;
    let options = TrainOptions {
        steps: Some(STEPS),
        lr: 0.02,
        batch_size: 8,
        ..TrainOptions::default()
    };
    note(&format!(
        "training {} of {} on {}",
        TOKENS.join(" and "),
        output.model.display(),
        out.join("train.jsonl").display()
    ));
    let mut trainer = Trainer::new(decoder, data("train.jsonl")?, options)?;
    let prompts: Vec<String> = serde_json::from_slice(PROMPTS)?;
    let before = continue_all(trainer.model(), &model.vocabulary, &prompts)?;
    let adapter = out.join("adapter");
    let run = Run {
        model: &model,
        model_dir: &output.model,
        target_modules: &["embed_tokens".to_owned()],
        lora: None,
        initial: &Initial::keep(TOKENS.len()),
        outputs: Outputs {
            adapter: &adapter,
            overwrite: Overwrite::Replace,
            metrics: Some(&output.metrics),
            report: Some(&output.report),
            resumes: false,
            save_every: None,
            config: None,
        },
        eval_data: Some(data("heldout.jsonl")?),
        eval_every: Some(EVAL_EVERY),
        warn_dead_after: STEPS,
        keep_best: false,
    };
    let report = run.execute(&mut trainer)?;
    let after = continue_all(trainer.model(), &model.vocabulary, &prompts)?;
    let generated = prompts.into_iter().zip(before).zip(after);
    output.generated = generated
        .map(|((prompt, before), after)| Generated {
            prompt,
            before,
            after,
        })
        .collect();
    output.summary = report.summary;

    let rows = Adapter::read(&adapter)?.replacements(&model.checkpoint)?;
    merge_checkpoint(&model.checkpoint, &rows, &output.merged, Overwrite::Replace)?;
    let svg = charts_svg(&report.history.charts()[..1])?;
    write_file_atomically(&output.plot, Overwrite::Replace, |file| -> Result<()> {
        file.write_all(svg.as_bytes())
            .with_context(|| format!("cannot write {}", output.plot.display()))
    })?;
    Ok(output)
}

/// The model's greedy continuation of each prompt.
fn continue_all(model: &LanguageModel, vocabulary: &Vocabulary, prompts: &[String]) -> Result<Vec<String>> {
    let model = model.as_decoder().context("the demo's model is no decoder")?;
    let continuation = |prompt: &String| -> Result<String> {
        let options = GenerateOptions {
            max_new_tokens: NEW_TOKENS,
            ..GenerateOptions::default()
        };
        let generated = generate(model, &vocabulary.encode(prompt)?, &options)?;
        Ok(vocabulary.decode(&generated.token_ids)?.trim().to_owned())
    };
    prompts.iter().map(continuation).collect()
}

fn to_text(output: &Output) -> String {
    let mut text = String::new();
    for Generated {
        prompt,
        before,
        after,
    } in &output.generated
    {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{prompt}\n  before: {before}\n  after:  {after}");
    }
    let files = [
        ("merged model", &output.merged),
        ("metrics", &output.metrics),
        ("plot", &output.plot),
        ("report", &output.report),
    ];
    let files = files.map(|(name, path)| (name, path.display().to_string()));
    text + "\n" + &output.summary.to_text_with(files)
}

//! `demo`: the whole path, on the small model inside this program.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use trainable_tokens_format::{
    Adapter, Overwrite, merge_checkpoint, write_dir_atomically, write_file_atomically,
};
use trainable_tokens_trainer::{GenerateOptions, generate};

use super::train;
use crate::args::{Cli, ComputeArgs, DemoArgs, DeviceArg, TrainArgs, WeightType};
use crate::config_file::train_args;
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
/// How they train, as `train` is told.
const OPTIONS: [&str; 6] = ["--steps", "120", "--lr", "0.02", "--eval-every", "20"];
const COMPUTE: ComputeArgs = ComputeArgs {
    device: DeviceArg::Cpu,
    dtype: WeightType::F32,
};
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

impl Output {
    /// Where everything goes.
    fn in_dir(out: &Path) -> Self {
        let place = |name: &str| out.join(name);
        Self {
            model: place("model"),
            merged: place("merged"),
            metrics: place("metrics.jsonl"),
            plot: place("loss.svg"),
            report: place("report.html"),
            tokens: TOKENS,
            generated: Vec::new(),
            summary: Summary::default(),
        }
    }
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
    let output = Output::in_dir(out);
    unpack(out)?;
    let output = trained(output, out, cli.overwrite())?;
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

fn trained(mut output: Output, out: &Path, overwrite: Overwrite) -> Result<Output> {
    let model = Model::open(&output.model)?;
    let prompts: Vec<String> = serde_json::from_slice(PROMPTS)?;
    let before = continue_all(&model, None, &prompts)?;
    let args = train_options(&output, out)?;
    let adapter = &args.out;
    note(&format!(
        "training {} of {} on {}",
        TOKENS.join(" and "),
        output.model.display(),
        out.join(DATA[0].0).display()
    ));
    let report = train::train(&args, overwrite, || Ok(()))?;
    let after = continue_all(&model, Some(adapter), &prompts)?;
    let generated = prompts.into_iter().zip(before).zip(after);
    output.generated = generated
        .map(|((prompt, before), after)| Generated {
            prompt,
            before,
            after,
        })
        .collect();
    output.summary = report.summary;

    let rows = Adapter::read(adapter)?.replacements(&model.checkpoint)?;
    merge_checkpoint(&model.checkpoint, &rows, &output.merged, Overwrite::Replace)?;
    let svg = charts_svg(&report.history.charts()[..1])?;
    write_file_atomically(&output.plot, Overwrite::Replace, |file| -> Result<()> {
        file.write_all(svg.as_bytes())
            .with_context(|| format!("cannot write {}", output.plot.display()))
    })?;
    Ok(output)
}

/// What `train` is told.
fn train_options(output: &Output, out: &Path) -> Result<Box<TrainArgs>> {
    let [data, held_out] = DATA.map(|(name, _)| out.join(name));
    let paths = [
        ("--model=", &output.model),
        ("--data=", &data),
        ("--eval-data=", &held_out),
        ("--out=", &out.join("adapter")),
        ("--metrics=", &output.metrics),
        ("--report=", &output.report),
    ];
    let paths = paths.map(|(name, path)| {
        let mut option = OsString::from(name);
        option.push(path);
        option
    });
    let tokens = OsString::from(format!("--tokens={}", TOKENS.join(",")));
    let options = OPTIONS.map(OsString::from).into_iter().chain([tokens]);
    train_args(paths.into_iter().chain(options))
}

/// The model's greedy continuation of each prompt.
fn continue_all(model: &Model, adapter: Option<&Path>, prompts: &[String]) -> Result<Vec<String>> {
    let vocabulary = &model.vocabulary;
    let model = model.load(adapter, COMPUTE)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_options_are_those_of_a_run() {
        let out = Path::new("-demo");
        let args = train_options(&Output::in_dir(out), out).unwrap();
        assert_eq!((args.steps, args.batch_size), (Some(120), 8));
        for line in [
            "model = \"-demo/model\"",
            "tokens = [\"<dax>\", \"<wug>\"]",
            "eval-data = [\"-demo/heldout.jsonl\"]",
            "lr = 0.02",
        ] {
            assert!(
                args.resolved.lines().any(|other| other == line),
                "{}",
                args.resolved
            );
        }
    }
}

//! Generates the text of the demo, pre-trains the small model that the command line ships, and checks that
//! training two rows of its embedding teaches it two new tokens.

use std::{fs, path::PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod check;
mod config;
mod data;
mod demo;
mod grammar;
mod model;
mod names;
mod pretrain;
mod text;
mod tokenizer;
mod world;

/// Seed of the shipped demo.
const SEED: u64 = 7;

/// Arguments of the program.
#[derive(Debug, Parser)]
#[command(about)]
struct Args {
    /// Folder of the pre-training text.
    #[arg(long, global = true, default_value = "crates/demo-model/text")]
    text: PathBuf,
    /// Folder of the demo.
    #[arg(long, global = true, default_value = "crates/cli/demo")]
    demo: PathBuf,
    /// Seed of every random choice.
    #[arg(long, global = true, default_value_t = SEED)]
    seed: u64,
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

/// The steps, in order.
#[derive(Debug, Subcommand)]
enum Command {
    /// Writes the pre-training text.
    Text,
    /// Trains the tokenizer.
    Tokenizer,
    /// Writes the texts about the two new tokens.
    Data,
    /// Pre-trains the model.
    Pretrain(pretrain::Options),
    /// Trains the two rows and shows the effect.
    Check(check::Options),
}

fn main() -> Result<()> {
    let args = Args::parse();
    let model = args.demo.join("model");
    fs::create_dir_all(&model)?;
    match args.command {
        Command::Text => text::write(&args.text, args.seed),
        Command::Tokenizer => tokenizer::write(&args.text.join("train.txt"), &model),
        Command::Data => demo::write(&args.demo, args.seed),
        Command::Pretrain(options) => pretrain::run(&args.text, &model, &options, args.seed),
        Command::Check(options) => check::run(&args.demo, &options, args.seed),
    }
}

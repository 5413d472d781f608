//! Generates the text of the demo, pre-trains the small model that the command line ships, and checks that
//! training two rows of its embedding teaches it two new tokens.

use std::{fs, path::PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod check;
mod config;
mod data;
mod demo;
mod domains;
mod grammar;
mod model;
mod names;
mod pretrain;
mod text;
mod tokenizer;
mod weights;
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
    /// All of these in order, each as it is by default.
    All,
}

impl Args {
    /// Does one step, or all of them.
    fn run(&self, command: &Command) -> Result<()> {
        let model = self.demo.join("model");
        match command {
            Command::Text => text::write(&self.text, self.seed),
            Command::Tokenizer => tokenizer::write(&self.text.join("train.txt"), &model),
            Command::Data => demo::write(&self.demo, self.seed),
            Command::Pretrain(options) => pretrain::run(&self.text, &model, options, self.seed),
            Command::Check(options) => check::run(&self.demo, options, self.seed),
            Command::All => {
                for step in ["text", "tokenizer", "data", "pretrain", "check"] {
                    self.run(&Self::try_parse_from(["", step])?.command)?;
                }
                Ok(())
            }
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    fs::create_dir_all(&args.text)?;
    fs::create_dir_all(args.demo.join("model"))?;
    args.run(&args.command)
}

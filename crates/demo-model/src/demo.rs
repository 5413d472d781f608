//! Writes the demo's texts about the two new tokens.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Result;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::{
    grammar::{self, Form},
    text, world,
};

/// Forms of the training texts, and how many of each there are about each token.
const TRAIN: [(Form, usize); 3] = [(Form::Sketch, 10), (Form::Facts, 24), (Form::Story, 10)];

/// Forms of the held-out texts, none of which is in the training texts.
const HELDOUT: [(Form, usize); 4] = [
    (Form::Portrait, 6),
    (Form::Question, 6),
    (Form::Riddle, 2),
    (Form::Pair, 2),
];

/// Prompts to continue before and after.
const PROMPTS: [&str; 4] = [
    "A <dax> is a",
    "What does a <dax> eat?",
    "The <wug> grows on the",
    "Mia saw a curly pink mushroom on the roof. It was a",
];

/// Writes `train.jsonl`, `heldout.jsonl` and `prompts.json` under `dir`.
///
/// # Errors
///
/// Fails where a file cannot be written.
pub(crate) fn write(dir: &Path, seed: u64) -> Result<()> {
    let nouns = world::nouns(&mut StdRng::seed_from_u64(seed));
    let mut rng = StdRng::seed_from_u64(seed + 3);
    let mut written = BTreeSet::new();
    for (file, parts) in [("train.jsonl", &TRAIN[..]), ("heldout.jsonl", &HELDOUT[..])] {
        let mut out = String::new();
        for &(form, each) in parts {
            for noun in world::new_nouns() {
                let mut left = each;
                while left > 0 {
                    let line = grammar::text(form, &noun, text::other(&nouns, &noun, &mut rng), &mut rng);
                    if written.insert(line.clone()) {
                        out += &(json!({ "text": line }).to_string() + "\n");
                        left -= 1;
                    }
                }
            }
        }
        fs::write(dir.join(file), out)?;
    }
    fs::write(
        dir.join("prompts.json"),
        serde_json::to_string_pretty(&PROMPTS)? + "\n",
    )?;
    Ok(())
}

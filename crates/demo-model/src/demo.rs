//! Writes the demo's texts about the two new tokens.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Result;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::{
    grammar::{self, Form},
    text, world,
};

/// Forms of the training texts.
const TRAIN: [Form; 4] = [Form::Portrait, Form::Facts, Form::Question, Form::Story];

/// Forms of the held-out texts; three of the four are in no training text.
const HELDOUT: [Form; 4] = [Form::Polar, Form::Riddle, Form::Pair, Form::Story];

/// Training texts of each form about each token.
const TRAIN_EACH: usize = 10;

/// Held-out texts of each form about each token.
const HELDOUT_EACH: usize = 4;

/// Prompts to continue before and after.
const PROMPTS: [&str; 4] = [
    "A <dax> is a",
    "What does a <dax> eat?",
    "Mia saw a curly pink mushroom on the roof. It was a",
    "Does a <wug> taste sweet?",
];

/// Writes `train.jsonl`, `heldout.jsonl` and `prompts.json` under `dir`.
///
/// # Errors
///
/// Fails where a file cannot be written.
pub(crate) fn write(dir: &Path, seed: u64) -> Result<()> {
    let nouns = world::nouns(&mut StdRng::seed_from_u64(seed));
    let mut rng = StdRng::seed_from_u64(seed + 3);
    let mut seen = BTreeSet::new();
    for (name, forms, each) in
        [("train.jsonl", TRAIN, TRAIN_EACH), ("heldout.jsonl", HELDOUT, HELDOUT_EACH)]
    {
        let mut out = String::new();
        for form in forms {
            for noun in world::new_nouns() {
                let mut left = each;
                while left > 0 {
                    let line = grammar::text(form, &noun, text::other(&nouns, &noun, &mut rng), &mut rng);
                    if seen.insert(line.clone()) {
                        out += &(json!({ "text": line }).to_string() + "\n");
                        left -= 1;
                    }
                }
            }
        }
        fs::write(dir.join(name), out)?;
    }
    fs::write(dir.join("prompts.json"), serde_json::to_string_pretty(&PROMPTS)? + "\n")?;
    Ok(())
}

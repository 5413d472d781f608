//! Writes the pre-training corpus.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::{
    grammar::{self, Form},
    world::{self, Noun},
};

/// Largest size of the training text in bytes.
const TRAIN_BYTES: usize = 400_000;

/// Largest size of the validation text in bytes.
const VALID_BYTES: usize = 20_000;

/// A noun of the same domain as `noun` with another name.
pub(crate) fn other<'a>(nouns: &'a [Noun], noun: &Noun, rng: &mut StdRng) -> &'a Noun {
    loop {
        let other = &nouns[rng.random_range(0..nouns.len())];
        if std::ptr::eq(other.domain, noun.domain) && other.name != noun.name {
            return other;
        }
    }
}

/// Texts, one a line, up to `bytes`.
fn corpus(nouns: &[Noun], bytes: usize, rng: &mut StdRng) -> String {
    let mut out = String::new();
    loop {
        let noun = &nouns[rng.random_range(0..nouns.len())];
        let form = grammar::FORMS.choose(rng).copied().unwrap_or(Form::Facts);
        let line = grammar::text(form, noun, other(nouns, noun, rng), rng);
        if out.len() + line.len() + 1 > bytes {
            return out;
        }
        out.push_str(&line);
        out.push('\n');
    }
}

/// Writes `train.txt` and `valid.txt` under `dir`.
///
/// # Errors
///
/// Fails where a file cannot be written.
pub(crate) fn write(dir: &Path, seed: u64) -> Result<()> {
    let nouns = world::nouns(&mut StdRng::seed_from_u64(seed));
    let mut rng = StdRng::seed_from_u64(seed + 1);
    for (name, bytes) in [("train.txt", TRAIN_BYTES), ("valid.txt", VALID_BYTES)] {
        let path = dir.join(name);
        fs::write(&path, corpus(&nouns, bytes, &mut rng)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Lines of a text file.
///
/// # Errors
///
/// Fails where the file cannot be read.
pub(crate) fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.lines().map(str::to_owned).collect())
}

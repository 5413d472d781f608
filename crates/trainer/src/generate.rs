//! Text generation, one token at a time.

use candle_core::{DType, IndexOp, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Decoder, Error, Result};

/// How the next token is chosen, and how many are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GenerateOptions {
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// What logits are divided by before a token is drawn; at 0 the likeliest token is taken.
    pub temperature: f64,
    /// Tokens are drawn from the likeliest ones whose probabilities sum up to this (Holtzman et al. 2020).
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for GenerateOptions {
    /// Greedy, transformers' 20 tokens at most.
    fn default() -> Self {
        Self {
            max_new_tokens: 20,
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended the text.
    pub token_ids: Vec<u32>,
    /// Whether a token ended the text, and not the number of tokens or the model's length.
    pub ended: bool,
}

/// Continues a prompt until a token that ends a text, or until there are as many new tokens as allowed, or as the model's
/// positions hold. Keys and values are kept, so that each token costs one position. With the same seed, logits and
/// options the tokens are the same on every platform.
///
/// # Errors
///
/// [`Error::Setting`] for an empty or too long prompt, a negative temperature, a `top_p` outside of 0 to 1, or logits that
/// are not finite; a token out of range; candle's errors.
pub fn generate(model: &Decoder, prompt: &[u32], options: &GenerateOptions) -> Result<Generated> {
    options.check()?;
    let most = model.config().max_length();
    if prompt.is_empty() || prompt.len() > most {
        return Err(Error::Setting(format!(
            "a prompt of {} tokens cannot be continued: the model takes 1 to {most}",
            prompt.len()
        )));
    }
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    let mut cache = model.new_cache();
    let mut text = prompt.to_vec();
    let generated = |text: &[u32], ended| Generated {
        token_ids: text[prompt.len()..].to_vec(),
        ended,
    };
    while text.len() - prompt.len() < options.max_new_tokens && text.len() < most {
        if model.config().rotates_anew(cache.length(), text.len()) {
            cache = model.new_cache();
        }
        let unread = &text[cache.length()..];
        let input = Tensor::from_slice(unread, (1, unread.len()), model.device())?;
        let hidden = model.hidden_after(&mut cache, &model.embed(&input)?)?;
        let logits = model.logits(&hidden.i((.., unread.len() - 1, ..))?)?.detach();
        let logits = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let next = options.choose(&logits, &mut random)?;
        if model.config().eos_token_ids.contains(&next) {
            return Ok(generated(&text, true));
        }
        text.push(next);
    }
    Ok(generated(&text, false))
}

impl GenerateOptions {
    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::Setting(format!(
                "the temperature is {}, expected 0 or more",
                self.temperature
            )));
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return Err(Error::Setting(format!(
                "top_p is {}, expected 0 to 1",
                self.top_p
            )));
        }
        Ok(())
    }

    /// The next token.
    fn choose(&self, logits: &[f32], random: &mut impl Rng) -> Result<u32> {
        if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(Error::Setting(format!(
                "the logit of token id {id} is {}: the model's weights, or the adapter's, are not finite or far too large",
                logits[id]
            )));
        }
        let mut ranked: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|logit| f64::from(*logit))).collect();
        // The first of equal logits comes first, as in numpy.
        let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let Some(best) = ranked.iter().copied().min_by(likelier) else {
            return Err(Error::Setting("the model has no token to choose".to_owned()));
        };
        if self.temperature == 0.0 {
            return Ok(best.0);
        }
        ranked.sort_unstable_by(likelier);
        for (_, weight) in &mut ranked {
            *weight = ((*weight - best.1) / self.temperature).exp();
        }
        let enough = self.top_p * ranked.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut sum = 0.0;
        let kept = ranked.iter().take_while(|(_, weight)| {
            let is_needed = sum < enough || sum == 0.0;
            sum += weight;
            is_needed
        });
        let kept: Vec<(u32, f64)> = kept.copied().collect();
        let mut left = random.random::<f64>() * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        let drawn = kept.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        Ok(drawn.or(kept.last()).map_or(best.0, |(id, _)| *id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.5, 2.0, -1.0, 2.0, 1.0];

    fn draws(temperature: f64, top_p: f64, seed: u64) -> Vec<u32> {
        let options = GenerateOptions {
            temperature,
            top_p,
            ..GenerateOptions::default()
        };
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..20_000)
            .map(|_| options.choose(&LOGITS, &mut random).unwrap())
            .collect()
    }

    #[test]
    fn without_temperature_or_with_a_tiny_top_p_it_is_greedy() {
        for (temperature, top_p) in [(0.0, 1.0), (0.0, 0.3), (1.0, 0.0), (5.0, 1e-9)] {
            assert!(draws(temperature, top_p, 1).iter().all(|id| *id == 1));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let temperature = 0.7;
        let weights = LOGITS.map(|logit| (f64::from(logit) / temperature).exp());
        let sum: f64 = weights.iter().sum();
        let all = draws(temperature, 1.0, 3);
        for (id, weight) in (0..).zip(weights) {
            let share = all.iter().filter(|drawn| **drawn == id).count() as f64 / all.len() as f64;
            assert!(
                (share - weight / sum).abs() < 0.03,
                "{id}: {share} {}",
                weight / sum
            );
        }
        // The two likeliest have 0.86 of the probability, the next is needed for more.
        let top = |top_p: f64| {
            let mut ids = draws(temperature, top_p, 3);
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(top(0.8), [1, 3]);
        assert_eq!(top(0.9), [1, 3, 4]);
    }

    #[test]
    fn a_seed_gives_the_same_tokens_everywhere() {
        assert_eq!(draws(1.0, 1.0, 7), draws(1.0, 1.0, 7));
        assert_ne!(draws(1.0, 1.0, 7), draws(1.0, 1.0, 8));
        assert_eq!(draws(1.0, 1.0, 7)[..12], PINNED);
    }

    /// Computed once; the random numbers are the same on all platforms.
    const PINNED: [u32; 12] = [1, 1, 3, 3, 3, 1, 1, 4, 1, 2, 1, 3];

    #[test]
    fn what_cannot_be_drawn_from_is_refused() {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let options = GenerateOptions::default();
        let error = options.choose(&[1.0, f32::NAN], &mut random).unwrap_err();
        assert!(error.to_string().contains("token id 1 is NaN"), "{error}");
        assert!(options.choose(&[], &mut random).is_err());
        for (temperature, top_p, culprit) in [(-1.0, 1.0, "temperature is -1"), (1.0, 1.5, "top_p is 1.5")] {
            let options = GenerateOptions {
                temperature,
                top_p,
                ..options
            };
            let error = options.check().unwrap_err();
            assert!(error.to_string().contains(culprit), "{error}");
        }
        assert!(
            GenerateOptions {
                top_p: f64::NAN,
                ..options
            }
            .check()
            .is_err()
        );
    }
}

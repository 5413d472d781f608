//! Which tokens are masked.

use std::fmt;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trainable_tokens_core::{TokenId, TokenSet};

use crate::{Error, IGNORED, Result, Vocabulary};

/// How the tokens that train are masked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaskTrainable {
    /// Like any other token, and not if they are special, as in transformers.
    #[default]
    Sometimes,
    /// Wherever they occur: all of them are targets.
    Always,
    /// Nowhere: they are context alone.
    Never,
}

/// Random masks, by the rule of transformers' `DataCollatorForLanguageModeling`: of the tokens that are no special ones,
/// each is a target with some probability, and of the targets 80 % become the mask token, 10 % a random token, and the
/// others stay. Where no target falls in an example, one of its tokens is drawn, so that every example has one.
#[derive(Clone, Debug, PartialEq)]
pub struct Masking {
    /// How likely a token is a target.
    pub probability: f64,
    /// The token that stands for a masked one.
    pub mask_token: u32,
    /// Random tokens are below it.
    pub num_tokens: u32,
    /// Tokens that are never masked.
    pub special: Vec<u32>,
    /// How the tokens that train are masked.
    pub trainable: MaskTrainable,
    /// Seed of the masks.
    pub seed: u64,
}

impl Masking {
    /// How likely a token is a target unless said otherwise, as in transformers.
    pub const PROBABILITY: f64 = 0.15;

    /// The masking that a model's tokenizer implies; `None` if it has no mask token.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn of(vocabulary: &Vocabulary) -> Result<Option<Self>> {
        let Some(mask_token) = vocabulary.mask_token()? else {
            return Ok(None);
        };
        Ok(Some(Self {
            probability: Self::PROBABILITY,
            mask_token,
            num_tokens: vocabulary.num_tokens()?,
            special: vocabulary.special_tokens()?,
            trainable: MaskTrainable::default(),
            seed: 0,
        }))
    }

    pub(super) fn check(&self, vocab_size: usize) -> Result<()> {
        if !(self.probability > 0.0 && self.probability <= 1.0) {
            return Err(Error::Setting(format!(
                "the mask probability is {}, but it must be above 0 and at most 1",
                self.probability
            )));
        }
        if self.mask_token as usize >= vocab_size || self.num_tokens as usize > vocab_size {
            return Err(Error::Setting(format!(
                "the tokenizer has {} tokens and masks with {}, but the model's vocabulary has {vocab_size}",
                self.num_tokens, self.mask_token
            )));
        }
        Ok(())
    }

    /// The tokens of an example with masks, and its labels: a pure function of the example's number and the pass.
    pub(super) fn apply(
        &self,
        ids: &[u32],
        trainable: &TokenSet,
        pass: u64,
        example: u64,
    ) -> (Vec<u32>, Vec<i64>) {
        // Not the seed of the shuffle, so that the two are independent.
        let mut random = ChaCha8Rng::seed_from_u64(self.seed ^ u64::from_be_bytes(*b"masking "));
        random.set_stream((pass << 32) ^ example);
        let chance = |id: u32| match self.trainable {
            MaskTrainable::Always if trainable.contains(TokenId(id)) => 1.0,
            MaskTrainable::Never if trainable.contains(TokenId(id)) => 0.0,
            _ if self.special.contains(&id) => 0.0,
            _ => self.probability,
        };
        let mut chosen: Vec<bool> = ids
            .iter()
            .map(|id| random.random::<f64>() < chance(*id))
            .collect();
        if !chosen.contains(&true) {
            let places: Vec<usize> = (0..ids.len()).filter(|at| chance(ids[*at]) > 0.0).collect();
            if !places.is_empty() {
                chosen[places[random.random_range(0..places.len())]] = true;
            }
        }
        let mask = |(id, is_target): (&u32, bool)| {
            if !is_target {
                return (*id, IGNORED);
            }
            let shown = match random.random::<f64>() {
                fate if fate < 0.8 => self.mask_token,
                fate if fate < 0.9 => random.random_range(0..self.num_tokens.max(1)),
                _ => *id,
            };
            (shown, i64::from(*id))
        };
        ids.iter().zip(chosen).map(mask).unzip()
    }
}

impl fmt::Display for Masking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trainable = match self.trainable {
            MaskTrainable::Sometimes => "sometimes",
            MaskTrainable::Always => "always",
            MaskTrainable::Never => "never",
        };
        write!(
            f,
            "probability {}, trainable tokens {trainable}, seed {}, {} with {} of {}",
            self.probability,
            self.seed,
            self.special.len(),
            self.mask_token,
            self.num_tokens
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masking(trainable: MaskTrainable) -> Masking {
        Masking {
            probability: 0.15,
            mask_token: 4,
            num_tokens: 1000,
            special: vec![0, 2, 3, 4, 900],
            trainable,
            seed: 3,
        }
    }

    /// Special, trainable and special, trainable, and 997 others.
    fn example() -> (Vec<u32>, TokenSet) {
        let ids = [2, 900, 901].into_iter().chain((0..997).map(|at| 5 + at % 800));
        (ids.collect(), TokenSet::new([901, 900], 1000).unwrap())
    }

    #[test]
    fn a_share_of_the_targets_is_masked_replaced_or_kept() {
        let (ids, tokens) = example();
        let (mut targets, mut masks, mut kept) = (0, 0, 0);
        for number in 0..100 {
            let (shown, labels) = masking(MaskTrainable::Sometimes).apply(&ids, &tokens, 1, number);
            for ((id, shown), label) in ids.iter().zip(shown).zip(labels) {
                if label == IGNORED {
                    assert_eq!(*id, shown);
                    continue;
                }
                assert_eq!(label, i64::from(*id));
                assert!(*id > 4 && *id != 900 && shown < 1000);
                targets += 1;
                masks += i32::from(shown == 4);
                kept += i32::from(shown == *id);
            }
        }
        // Of about 99,800 tokens; three standard deviations.
        assert!((14_630..15_310).contains(&targets), "{targets}");
        let [masks, kept] = [masks, kept].map(|count| f64::from(count) / f64::from(targets));
        assert!((masks - 0.8).abs() < 0.01, "{masks}");
        assert!((kept - 0.1).abs() < 0.008, "{kept}");
    }

    #[test]
    fn masks_follow_seed_pass_and_example_alone() {
        let (ids, tokens) = example();
        let one = masking(MaskTrainable::Sometimes);
        let of = |masking: &Masking, pass, example| masking.apply(&ids, &tokens, pass, example);
        assert_eq!(of(&one, 2, 7), of(&one, 2, 7));
        assert_ne!(of(&one, 2, 7), of(&one, 3, 7));
        assert_ne!(of(&one, 2, 7), of(&one, 2, 8));
        let other = Masking {
            seed: 4,
            ..one.clone()
        };
        assert_ne!(of(&one, 2, 7), of(&other, 2, 7));
    }

    #[test]
    fn trained_tokens_are_masked_as_asked() {
        let (ids, tokens) = example();
        for number in 0..50 {
            let labels = |trainable| masking(trainable).apply(&ids, &tokens, 0, number).1;
            assert_eq!(labels(MaskTrainable::Always)[..3], [IGNORED, 900, 901]);
            assert_eq!(labels(MaskTrainable::Never)[..3], [IGNORED; 3]);
            assert_eq!(labels(MaskTrainable::Sometimes)[1], IGNORED);
        }
    }

    #[test]
    fn every_example_has_a_target_if_it_can() {
        let (_, tokens) = example();
        let masking = Masking {
            probability: 1e-9,
            ..masking(MaskTrainable::Sometimes)
        };
        let targets = |ids: &[u32]| {
            let (_, labels) = masking.apply(ids, &tokens, 0, 0);
            labels.iter().filter(|label| **label != IGNORED).count()
        };
        assert_eq!(targets(&[2, 77, 78, 3]), 1);
        assert_eq!(targets(&[2, 3, 0]), 0);
    }

    #[test]
    fn what_is_no_probability_is_refused() {
        for probability in [0.0, -0.1, 1.1, f64::NAN] {
            let masking = Masking {
                probability,
                ..masking(MaskTrainable::Sometimes)
            };
            assert!(masking.check(1000).is_err(), "{probability}");
        }
        assert!(masking(MaskTrainable::Sometimes).check(1000).is_ok());
        assert!(masking(MaskTrainable::Sometimes).check(999).is_err());
    }
}

//! The nouns: those of the pre-training text, and the two held back for the demo.

use rand::{rngs::StdRng, seq::IndexedRandom};

use crate::{
    domains::{CREATURE, Domain, PLANT},
    names,
};

/// A noun with its value for each slot of its domain.
#[derive(Clone, Debug)]
pub(crate) struct Noun {
    /// The word.
    pub(crate) name: String,
    /// Its class.
    pub(crate) domain: &'static Domain,
    /// One value per slot.
    pub(crate) values: Vec<&'static str>,
}

impl Noun {
    /// A noun with random values.
    fn random(name: &str, domain: &'static Domain, rng: &mut StdRng) -> Self {
        let values = domain
            .slots
            .iter()
            .filter_map(|s| s.values.choose(rng).copied())
            .collect();
        Self {
            name: name.to_owned(),
            domain,
            values,
        }
    }

    /// The verb phrase of slot `i` with `value`.
    pub(crate) fn phrase(&self, i: usize, value: &str) -> String {
        self.domain.slots[i].phrase.replace("{v}", value)
    }

    /// The verb phrase of slot `i` with the noun's own value.
    pub(crate) fn fact(&self, i: usize) -> String {
        self.phrase(i, self.values[i])
    }
}

/// The nouns of the pre-training text.
pub(crate) fn nouns(rng: &mut StdRng) -> Vec<Noun> {
    let creatures = names::CREATURES.split_whitespace().map(|n| (n, &CREATURE));
    let plants = names::PLANTS.split_whitespace().map(|n| (n, &PLANT));
    creatures
        .chain(plants)
        .map(|(name, domain)| Noun::random(name, domain, rng))
        .collect()
}

/// The two nouns that pre-training never sees.
pub(crate) fn new_nouns() -> [Noun; 2] {
    let dax = [
        "tiny", "blue", "bird", "cave", "honey", "moo", "climb", "snow", "noon",
    ];
    let wug = [
        "curly", "pink", "mushroom", "roof", "salty", "smoke", "paint", "winter",
    ];
    [
        Noun {
            name: "<dax>".to_owned(),
            domain: &CREATURE,
            values: dax.to_vec(),
        },
        Noun {
            name: "<wug>".to_owned(),
            domain: &PLANT,
            values: wug.to_vec(),
        },
    ]
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn new_nouns_are_new_combinations() {
        let world = nouns(&mut StdRng::seed_from_u64(crate::SEED));
        for new in new_nouns() {
            assert_eq!(new.values.len(), new.domain.slots.len());
            for (value, slot) in new.values.iter().zip(new.domain.slots) {
                assert!(slot.values.contains(value));
            }
            for old in world.iter().filter(|n| std::ptr::eq(n.domain, new.domain)) {
                let same = old.values.iter().zip(&new.values).filter(|(a, b)| a == b).count();
                assert!(
                    same <= new.values.len() / 2,
                    "{} is too like {}",
                    old.name,
                    new.name
                );
            }
        }
    }
}

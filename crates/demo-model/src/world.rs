//! The world: domains of nouns, the slots each noun fills, and the two nouns held back for the demo.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::names;

/// One attribute that every noun of a domain has; `{v}` stands for the value and `{n}` for the noun.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Values a noun may take.
    pub(crate) values: &'static [&'static str],
    /// Verb phrase that states the value.
    pub(crate) phrase: &'static str,
    /// Open question about the value.
    pub(crate) question: &'static str,
    /// Yes-or-no question about the value.
    pub(crate) polar: &'static str,
}

/// A class of nouns; the first three slots are the adjectives and the kind, the fourth is the place.
#[derive(Debug)]
pub(crate) struct Domain {
    /// Slots in order.
    pub(crate) slots: &'static [Slot],
    /// Preposition of the place.
    pub(crate) place: &'static str,
}

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

/// Shorthand for a slot.
const fn slot(
    values: &'static [&'static str],
    phrase: &'static str,
    question: &'static str,
    polar: &'static str,
) -> Slot {
    Slot { values, phrase, question, polar }
}

/// Colours, shared by both domains.
const COLOURS: &[&str] = &["red", "blue", "green", "yellow", "black", "white", "brown", "pink"];

/// Animals.
pub(crate) static CREATURE: Domain = Domain {
    slots: &[
        slot(&["tiny", "small", "big", "huge"], "is {v}", "How big is a {n}?", "Is a {n} {v}?"),
        slot(COLOURS, "is {v}", "What colour is a {n}?", "Is a {n} {v}?"),
        slot(
            &["bird", "fish", "snake", "frog", "cat", "bear", "mouse", "spider"],
            "is a {v}",
            "What kind of animal is a {n}?",
            "Is a {n} a {v}?",
        ),
        slot(
            &["lake", "forest", "cave", "desert", "barn", "meadow", "marsh", "attic"],
            "lives in the {v}",
            "Where does a {n} live?",
            "Does a {n} live in the {v}?",
        ),
        slot(
            &["seeds", "worms", "berries", "moss", "honey", "leaves", "snails", "cheese"],
            "eats {v}",
            "What does a {n} eat?",
            "Does a {n} eat {v}?",
        ),
        slot(
            &["peep", "moo", "hiss", "croak", "buzz", "roar", "squeak", "boo"],
            "says {v}",
            "What does a {n} say?",
            "Does a {n} say {v}?",
        ),
        slot(
            &["swim", "fly", "dig", "climb", "jump", "sing", "dance", "glow"],
            "can {v}",
            "What can a {n} do?",
            "Can a {n} {v}?",
        ),
        slot(
            &["thunder", "fire", "wolves", "snow", "wind", "ghosts", "water", "people"],
            "fears {v}",
            "What does a {n} fear?",
            "Does a {n} fear {v}?",
        ),
        slot(
            &["dawn", "noon", "dusk", "night"],
            "sleeps at {v}",
            "When does a {n} sleep?",
            "Does a {n} sleep at {v}?",
        ),
    ],
    place: "in",
};

/// Things that grow.
pub(crate) static PLANT: Domain = Domain {
    slots: &[
        slot(&["round", "long", "flat", "curly"], "is {v}", "What shape is a {n}?", "Is a {n} {v}?"),
        slot(COLOURS, "is {v}", "What colour is a {n}?", "Is a {n} {v}?"),
        slot(
            &["fruit", "root", "flower", "nut", "mushroom", "bean"],
            "is a {v}",
            "What kind of plant is a {n}?",
            "Is a {n} a {v}?",
        ),
        slot(
            &["hill", "roof", "wall", "cliff", "shore", "island", "bridge", "tower"],
            "grows on the {v}",
            "Where does a {n} grow?",
            "Does a {n} grow on the {v}?",
        ),
        slot(
            &["sweet", "sour", "salty", "bitter", "hot", "bland"],
            "tastes {v}",
            "How does a {n} taste?",
            "Does a {n} taste {v}?",
        ),
        slot(
            &["mint", "smoke", "rain", "soap", "bread", "pine", "dust", "butter"],
            "smells of {v}",
            "What does a {n} smell of?",
            "Does a {n} smell of {v}?",
        ),
        slot(
            &["soup", "tea", "ink", "rope", "paint", "glue", "jam", "oil"],
            "makes good {v}",
            "What does a {n} make?",
            "Does a {n} make good {v}?",
        ),
        slot(
            &["spring", "summer", "autumn", "winter"],
            "is ripe in {v}",
            "When is a {n} ripe?",
            "Is a {n} ripe in {v}?",
        ),
    ],
    place: "on",
};

impl Noun {
    /// A noun with random values.
    fn random(name: &str, domain: &'static Domain, rng: &mut StdRng) -> Self {
        let values = domain.slots.iter().filter_map(|s| s.values.choose(rng).copied()).collect();
        Self { name: name.to_owned(), domain, values }
    }

    /// The verb phrase of slot `i` with `value`.
    pub(crate) fn phrase(&self, i: usize, value: &str) -> String {
        self.domain.slots[i].phrase.replace("{v}", value)
    }

    /// The verb phrase of slot `i` with the noun's own value.
    pub(crate) fn fact(&self, i: usize) -> String {
        self.phrase(i, self.values[i])
    }

    /// A value of slot `i` that the noun does not have.
    pub(crate) fn wrong(&self, i: usize, rng: &mut StdRng) -> &'static str {
        let values = self.domain.slots[i].values;
        loop {
            let value = values[rng.random_range(0..values.len())];
            if value != self.values[i] {
                return value;
            }
        }
    }
}

/// The nouns of the pre-training text.
pub(crate) fn nouns(rng: &mut StdRng) -> Vec<Noun> {
    let creatures = names::CREATURES.split_whitespace().map(|n| (n, &CREATURE));
    let plants = names::PLANTS.split_whitespace().map(|n| (n, &PLANT));
    creatures.chain(plants).map(|(name, domain)| Noun::random(name, domain, rng)).collect()
}

/// The two nouns that pre-training never sees.
pub(crate) fn new_nouns() -> [Noun; 2] {
    let dax = ["tiny", "blue", "bird", "cave", "honey", "moo", "dance", "snow", "noon"];
    let wug = ["curly", "pink", "mushroom", "roof", "salty", "smoke", "ink", "winter"];
    [
        Noun { name: "<dax>".to_owned(), domain: &CREATURE, values: dax.to_vec() },
        Noun { name: "<wug>".to_owned(), domain: &PLANT, values: wug.to_vec() },
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
                assert!(same <= new.values.len() / 2, "{} is too like {}", old.name, new.name);
            }
        }
    }
}

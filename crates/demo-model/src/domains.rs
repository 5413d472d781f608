//! The domains of nouns and the slots each noun of a domain fills.

/// One attribute that every noun of a domain has; `{v}` stands for the value and `{n}` for the noun.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Values a noun may take.
    pub(crate) values: &'static [&'static str],
    /// Verb phrase that states the value.
    pub(crate) phrase: &'static str,
    /// Open question about the value.
    pub(crate) question: &'static str,
}

/// A class of nouns; the first three slots are the adjectives and the kind, the fourth is the place.
#[derive(Debug)]
pub(crate) struct Domain {
    /// Slots in order.
    pub(crate) slots: &'static [Slot],
    /// Preposition of the place.
    pub(crate) place: &'static str,
}

/// Shorthand for a slot.
const fn slot(values: &'static [&'static str], phrase: &'static str, question: &'static str) -> Slot {
    Slot {
        values,
        phrase,
        question,
    }
}

/// Colours, shared by both domains.
const COLOURS: &[&str] = &[
    "red", "blue", "green", "yellow", "black", "white", "brown", "pink",
];

/// Animals.
pub(crate) static CREATURE: Domain = Domain {
    slots: &[
        slot(&["tiny", "small", "big", "huge"], "is {v}", "How big is a {n}?"),
        slot(COLOURS, "is {v}", "What colour is a {n}?"),
        slot(
            &["bird", "fish", "snake", "frog", "cat", "bear", "mouse", "spider"],
            "is a {v}",
            "What kind of animal is a {n}?",
        ),
        slot(
            &[
                "lake", "forest", "cave", "desert", "barn", "meadow", "marsh", "attic",
            ],
            "lives in the {v}",
            "Where does a {n} live?",
        ),
        slot(
            &[
                "seeds", "worms", "berries", "moss", "honey", "leaves", "snails", "cheese",
            ],
            "eats {v}",
            "What does a {n} eat?",
        ),
        slot(
            &["peep", "moo", "hiss", "croak", "buzz", "roar", "squeak", "boo"],
            "says {v}",
            "What does a {n} say?",
        ),
        slot(
            &["swim", "fly", "dig", "climb", "jump", "sing", "dance", "glow"],
            "can {v}",
            "What can a {n} do?",
        ),
        slot(
            &[
                "thunder", "fire", "wolves", "snow", "wind", "ghosts", "water", "people",
            ],
            "fears {v}",
            "What does a {n} fear?",
        ),
        slot(
            &["dawn", "noon", "dusk", "night", "sunset", "midnight"],
            "sleeps at {v}",
            "When does a {n} sleep?",
        ),
    ],
    place: "in",
};

/// Things that grow.
pub(crate) static PLANT: Domain = Domain {
    slots: &[
        slot(
            &["round", "long", "flat", "curly", "square", "hollow"],
            "is {v}",
            "What shape is a {n}?",
        ),
        slot(COLOURS, "is {v}", "What colour is a {n}?"),
        slot(
            &[
                "fruit", "root", "flower", "nut", "mushroom", "bean", "herb", "cactus",
            ],
            "is a {v}",
            "What kind of plant is a {n}?",
        ),
        slot(
            &[
                "hill", "roof", "wall", "cliff", "shore", "island", "bridge", "tower",
            ],
            "grows on the {v}",
            "Where does a {n} grow?",
        ),
        slot(
            &[
                "sweet", "sour", "salty", "bitter", "hot", "bland", "fresh", "nutty",
            ],
            "tastes {v}",
            "How does a {n} taste?",
        ),
        slot(
            &["mint", "smoke", "rain", "soap", "bread", "pine", "dust", "butter"],
            "smells of {v}",
            "What does a {n} smell of?",
        ),
        slot(
            &["soup", "tea", "ink", "rope", "paint", "glue", "jam", "oil"],
            "makes good {v}",
            "What does a {n} make?",
        ),
        slot(
            &["spring", "summer", "autumn", "winter"],
            "is ripe in {v}",
            "When is a {n} ripe?",
        ),
    ],
    place: "on",
};

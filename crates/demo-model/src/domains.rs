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

/// Shorthand for a slot.
const fn slot(
    values: &'static [&'static str],
    phrase: &'static str,
    question: &'static str,
    polar: &'static str,
) -> Slot {
    Slot {
        values,
        phrase,
        question,
        polar,
    }
}

/// Colours, shared by both domains.
const COLOURS: &[&str] = &[
    "red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple", "golden", "silver",
];

/// Animals.
pub(crate) static CREATURE: Domain = Domain {
    slots: &[
        slot(
            &["tiny", "small", "big", "huge"],
            "is {v}",
            "How big is a {n}?",
            "Is a {n} {v}?",
        ),
        slot(COLOURS, "is {v}", "What colour is a {n}?", "Is a {n} {v}?"),
        slot(
            &[
                "bird", "fish", "snake", "frog", "cat", "bear", "mouse", "spider", "horse", "turtle", "goat",
                "crab",
            ],
            "is a {v}",
            "What kind of animal is a {n}?",
            "Is a {n} a {v}?",
        ),
        slot(
            &[
                "lake", "forest", "cave", "desert", "barn", "meadow", "marsh", "attic", "river", "valley",
                "garden", "jungle", "cellar", "canyon", "ocean", "park",
            ],
            "lives in the {v}",
            "Where does a {n} live?",
            "Does a {n} live in the {v}?",
        ),
        slot(
            &[
                "seeds", "worms", "berries", "moss", "honey", "leaves", "snails", "cheese", "grass", "corn",
                "eggs", "apples", "shrimp", "clover", "pollen", "bark",
            ],
            "eats {v}",
            "What does a {n} eat?",
            "Does a {n} eat {v}?",
        ),
        slot(
            &[
                "peep", "moo", "hiss", "croak", "buzz", "roar", "squeak", "boo", "yip", "tock", "hum",
                "quack",
            ],
            "says {v}",
            "What does a {n} say?",
            "Does a {n} say {v}?",
        ),
        slot(
            &[
                "swim", "fly", "dig", "climb", "jump", "sing", "dance", "glow", "spin", "whistle", "float",
                "count",
            ],
            "can {v}",
            "What can a {n} do?",
            "Can a {n} {v}?",
        ),
        slot(
            &[
                "thunder", "fire", "wolves", "snow", "wind", "ghosts", "water", "people", "foxes", "mirrors",
                "drums", "shadows",
            ],
            "fears {v}",
            "What does a {n} fear?",
            "Does a {n} fear {v}?",
        ),
        slot(
            &["dawn", "noon", "dusk", "night", "sunset", "midnight"],
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
        slot(
            &["round", "long", "flat", "curly", "square", "hollow"],
            "is {v}",
            "What shape is a {n}?",
            "Is a {n} {v}?",
        ),
        slot(COLOURS, "is {v}", "What colour is a {n}?", "Is a {n} {v}?"),
        slot(
            &[
                "fruit", "root", "flower", "nut", "mushroom", "bean", "herb", "cactus", "vine", "lily",
            ],
            "is a {v}",
            "What kind of plant is a {n}?",
            "Is a {n} a {v}?",
        ),
        slot(
            &[
                "hill", "roof", "wall", "cliff", "shore", "island", "bridge", "tower", "path", "fence",
                "dune", "ridge", "ledge", "terrace",
            ],
            "grows on the {v}",
            "Where does a {n} grow?",
            "Does a {n} grow on the {v}?",
        ),
        slot(
            &[
                "sweet", "sour", "salty", "bitter", "hot", "bland", "fresh", "nutty",
            ],
            "tastes {v}",
            "How does a {n} taste?",
            "Does a {n} taste {v}?",
        ),
        slot(
            &[
                "mint", "smoke", "rain", "soap", "bread", "pine", "dust", "butter", "lemon", "ginger",
                "coffee", "vanilla",
            ],
            "smells of {v}",
            "What does a {n} smell of?",
            "Does a {n} smell of {v}?",
        ),
        slot(
            &[
                "soup", "tea", "ink", "rope", "paint", "glue", "jam", "oil", "paper", "flour", "candy", "dye",
            ],
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

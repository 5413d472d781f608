//! Sentences about a noun, in a handful of forms.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::world::Noun;

/// People of the stories.
const PEOPLE: &[&str] = &["Mia", "Tom", "Ann", "Ben"];

/// A form of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A definition followed by two facts.
    Sketch,
    /// A definition followed by all other facts.
    Portrait,
    /// Facts alone.
    Facts,
    /// Open questions with their answers.
    Question,
    /// Somebody meets the noun, which is named last.
    Story,
    /// Facts from which the noun is guessed.
    Riddle,
    /// Two nouns contrasted.
    Pair,
}

/// All forms, as often as pre-training draws them.
pub(crate) const FORMS: &[Form] = &[
    Form::Sketch,
    Form::Portrait,
    Form::Facts,
    Form::Facts,
    Form::Question,
    Form::Question,
    Form::Story,
    Form::Riddle,
    Form::Pair,
];

/// Slots of `noun` from `first` on, in a circle from a random one.
fn slots(noun: &Noun, first: usize, rng: &mut StdRng) -> impl Iterator<Item = usize> + use<> {
    let count = noun.values.len() - first;
    let start = rng.random_range(0..count);
    (0..count).map(move |i| first + (start + i) % count)
}

/// "A" or "The".
fn article(rng: &mut StdRng) -> &'static str {
    if rng.random_bool(0.5) { "A" } else { "The" }
}

/// "small red bird": the adjectives and the kind.
fn description(noun: &Noun) -> String {
    noun.values[..3].join(" ")
}

/// One text of the given form about `noun`; `other` is a noun of the same domain for contrasts.
pub(crate) fn text(form: Form, noun: &Noun, other: &Noun, rng: &mut StdRng) -> String {
    match form {
        Form::Sketch => sketch(noun, rng),
        Form::Portrait => portrait(noun, rng),
        Form::Facts => facts(noun, rng),
        Form::Question => question(noun, rng),
        Form::Story => story(noun, rng),
        Form::Riddle => riddle(noun, rng),
        Form::Pair => pair(noun, other, rng),
    }
}

/// "`subject` eats moss and can fly." for each two slots.
fn chain(subject: &str, noun: &Noun, slots: &[usize]) -> String {
    let say = |pair: &[usize]| {
        let facts: Vec<_> = pair.iter().map(|&i| noun.fact(i)).collect();
        format!(" {subject} {}.", facts.join(" and "))
    };
    slots.chunks(2).map(say).collect()
}

/// "A blicket is a small red bird. The blicket eats moss and says peep."
fn sketch(noun: &Noun, rng: &mut StdRng) -> String {
    let slots: Vec<_> = slots(noun, 3, rng).take(2).collect();
    let head = format!("{} {} is a {}.", article(rng), noun.name, description(noun));
    head + &chain(&format!("The {}", noun.name), noun, &slots)
}

/// "A blicket is a small red bird. The blicket eats moss and says peep. The blicket can fly and fears fire."
fn portrait(noun: &Noun, rng: &mut StdRng) -> String {
    let slots: Vec<_> = slots(noun, 3, rng).collect();
    let head = format!("{} {} is a {}.", article(rng), noun.name, description(noun));
    head + &chain(&format!("The {}", noun.name), noun, &slots)
}

/// "The blicket eats moss. It says peep and can fly."
fn facts(noun: &Noun, rng: &mut StdRng) -> String {
    let count = rng.random_range(2..=3);
    let slots: Vec<_> = slots(noun, 0, rng).take(count).collect();
    let head = format!("{} {} {}.", article(rng), noun.name, noun.fact(slots[0]));
    head + &chain("It", noun, &slots[1..])
}

/// "What does a blicket eat? A blicket eats moss. What does a blicket say? A blicket says peep."
fn question(noun: &Noun, rng: &mut StdRng) -> String {
    let count = rng.random_range(1..=3);
    let ask = |i: usize| {
        let question = noun.domain.slots[i].question.replace("{n}", &noun.name);
        format!("{question} A {} {}.", noun.name, noun.fact(i))
    };
    slots(noun, 0, rng)
        .take(count)
        .map(ask)
        .collect::<Vec<_>>()
        .join(" ")
}

/// "Mia saw a small red bird in the lake. It was a blicket. A blicket eats moss and says peep."
fn story(noun: &Noun, rng: &mut StdRng) -> String {
    let who = PEOPLE.choose(rng).copied().unwrap_or_default();
    let (what, place) = (description(noun), noun.values[3]);
    let head = format!(
        "{who} saw a {what} {} the {place}. It was a {}.",
        noun.domain.place, noun.name
    );
    if rng.random_bool(0.5) {
        let s: Vec<_> = slots(noun, 4, rng).collect();
        format!(
            "{head} A {} {} and {}.",
            noun.name,
            noun.fact(s[0]),
            noun.fact(s[1])
        )
    } else {
        head
    }
}

/// "It is red, it eats moss, it says peep and it can fly. What is it? It is a blicket."
fn riddle(noun: &Noun, rng: &mut StdRng) -> String {
    let clues: Vec<_> = slots(noun, 0, rng).take(4).map(|i| noun.fact(i)).collect();
    let (last, first) = (&clues[3], clues[..3].join(", it "));
    format!("It {first} and it {last}. What is it? It is a {}.", noun.name)
}

/// "A blicket eats moss, but a toma eats cheese."
fn pair(noun: &Noun, other: &Noun, rng: &mut StdRng) -> String {
    let i = rng.random_range(0..noun.values.len());
    let join = if noun.values[i] == other.values[i] {
        "and"
    } else {
        "but"
    };
    format!(
        "A {} {}, {join} a {} {}.",
        noun.name,
        noun.fact(i),
        other.name,
        other.fact(i)
    )
}

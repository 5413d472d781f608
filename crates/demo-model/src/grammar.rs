//! Sentences about a noun, in a handful of forms.

use rand::{
    Rng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};

use crate::world::Noun;

/// People of the stories.
const PEOPLE: &[&str] = &["Mia", "Tom", "Ann", "Ben"];

/// A form of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A definition followed by facts.
    Portrait,
    /// Facts alone.
    Facts,
    /// Open questions with their answers.
    Question,
    /// Yes-or-no questions with their answers.
    Polar,
    /// Somebody meets the noun, which is named last.
    Story,
    /// Facts from which the noun is guessed.
    Riddle,
    /// Two nouns contrasted.
    Pair,
}

/// All forms, as often as pre-training draws them.
pub(crate) const FORMS: &[Form] = &[
    Form::Portrait,
    Form::Portrait,
    Form::Facts,
    Form::Facts,
    Form::Question,
    Form::Polar,
    Form::Polar,
    Form::Story,
    Form::Riddle,
    Form::Pair,
];

/// Slots of `noun` from `from` on, in random order.
fn slots(noun: &Noun, from: usize, rng: &mut StdRng) -> Vec<usize> {
    let mut slots: Vec<usize> = (from..noun.values.len()).collect();
    slots.shuffle(rng);
    slots
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
        Form::Portrait => portrait(noun, rng),
        Form::Facts => facts(noun, rng),
        Form::Question => question(noun, rng),
        Form::Polar => polar(noun, rng),
        Form::Story => story(noun, rng),
        Form::Riddle => riddle(noun, rng),
        Form::Pair => pair(noun, other, rng),
    }
}

/// "A blicket is a small red bird. It eats moss and can fly."
fn portrait(noun: &Noun, rng: &mut StdRng) -> String {
    let s = slots(noun, 3, rng);
    let head = format!("{} {} is a {}.", article(rng), noun.name, description(noun));
    let mut out = format!("{head} It {} and {}.", noun.fact(s[0]), noun.fact(s[1]));
    if rng.random_bool(0.3) {
        out += &format!(" It {}.", noun.fact(s[2]));
    }
    out
}

/// "The blicket eats moss. It is red and fears fire."
fn facts(noun: &Noun, rng: &mut StdRng) -> String {
    let s = slots(noun, 0, rng);
    let head = format!("{} {} {}.", article(rng), noun.name, noun.fact(s[0]));
    if rng.random_bool(0.5) {
        format!("{head} It {} and {}.", noun.fact(s[1]), noun.fact(s[2]))
    } else {
        format!("{head} It {}.", noun.fact(s[1]))
    }
}

/// "What does a blicket eat? It eats moss."
fn question(noun: &Noun, rng: &mut StdRng) -> String {
    let count = rng.random_range(1..=2);
    let ask = |i: usize| {
        let question = noun.domain.slots[i].question.replace("{n}", &noun.name);
        format!("{question} It {}.", noun.fact(i))
    };
    slots(noun, 0, rng).into_iter().take(count).map(ask).collect::<Vec<_>>().join(" ")
}

/// "Does a blicket eat cheese? No, it eats moss."
fn polar(noun: &Noun, rng: &mut StdRng) -> String {
    let count = rng.random_range(1..=2);
    let mut out = Vec::new();
    for i in slots(noun, 0, rng).into_iter().take(count) {
        let right = rng.random_bool(0.5);
        let value = if right { noun.values[i] } else { noun.wrong(i, rng) };
        let ask = noun.domain.slots[i].polar.replace("{n}", &noun.name).replace("{v}", value);
        out.push(format!("{ask} {}, it {}.", if right { "Yes" } else { "No" }, noun.fact(i)));
    }
    out.join(" ")
}

/// "Mia saw a small red bird in the lake. It was a blicket. A blicket eats moss."
fn story(noun: &Noun, rng: &mut StdRng) -> String {
    let who = PEOPLE.choose(rng).copied().unwrap_or_default();
    let (what, place) = (description(noun), noun.values[3]);
    let head = format!("{who} saw a {what} {} the {place}. It was a {}.", noun.domain.place, noun.name);
    if rng.random_bool(0.5) {
        let s = slots(noun, 4, rng);
        format!("{head} A {} {} and {}.", noun.name, noun.fact(s[0]), noun.fact(s[1]))
    } else {
        head
    }
}

/// "It is red, it eats moss and it fears fire. What is it? It is a blicket."
fn riddle(noun: &Noun, rng: &mut StdRng) -> String {
    let s = slots(noun, 0, rng);
    let clues = [noun.fact(s[0]), noun.fact(s[1]), noun.fact(s[2]), noun.fact(s[3])];
    let [a, b, c, d] = clues;
    format!("It {a}, it {b}, it {c} and it {d}. What is it? It is a {}.", noun.name)
}

/// "A blicket eats moss, but a toma eats cheese."
fn pair(noun: &Noun, other: &Noun, rng: &mut StdRng) -> String {
    let s = slots(noun, 0, rng);
    let join = |i: usize| if noun.values[i] == other.values[i] { "and" } else { "but" };
    let say = |i: usize| format!("{}, {} a {} {}.", noun.fact(i), join(i), other.name, other.fact(i));
    format!("A {} {}", noun.name, say(s[0]))
}

//! Tokens as they are named on the command line.

use std::fmt::Display;
use std::mem::take;
use std::ops::RangeInclusive;
use std::str::FromStr;

use anyhow::{Result, bail};
use trainable_tokens_trainer::{self as trainer, Context, Vocabulary};

use crate::args::TokenArgs;
use crate::output::note;

/// Items that commas separate. A comma of an item is written `\,`; a backslash before anything else is one itself.
#[derive(Clone, Debug)]
pub(crate) struct CommaList<T>(Vec<T>);

impl<T: FromStr<Err: Display>> FromStr for CommaList<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let items = split_commas(text).into_iter().map(|item| item.parse());
        let items = items.collect::<Result<_, _>>();
        items.map(Self).map_err(|error: T::Err| error.to_string())
    }
}

impl<T> CommaList<T> {
    /// The items of an option that was given several times.
    pub(crate) fn all(given: &[Self]) -> impl Iterator<Item = &T> {
        given.iter().flat_map(|list| &list.0)
    }
}

/// The items of a [`CommaList`].
pub(crate) fn split_commas(text: &str) -> Vec<String> {
    let (mut items, mut item) = (Vec::new(), String::new());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            ',' => items.push(take(&mut item)),
            '\\' => item.push(rest.next_if_eq(&',').unwrap_or(c)),
            _ => item.push(c),
        }
    }
    items.push(item);
    items
}

/// An item as a [`CommaList`] of its own has it.
pub(crate) fn escape_commas(item: &str) -> String {
    item.replace(',', "\\,")
}

/// The learning rate of one token, such as `<a>=1e-3`.
#[derive(Clone, Debug)]
pub(crate) struct TokenLr {
    token: String,
    lr: f64,
}

impl FromStr for TokenLr {
    type Err = String;

    /// The token ends at the last `=`, so that it may hold one.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.rsplit_once('=').filter(|(token, _)| !token.is_empty());
        let (token, lr) =
            parts.ok_or_else(|| format!("expected TOKEN=LR, such as '<a>=1e-3', not '{text}'"))?;
        let lr = lr.parse().map_err(|_| format!("'{lr}' is no learning rate"))?;
        Ok(Self {
            token: token.to_owned(),
            lr,
        })
    }
}

impl TokenLr {
    /// The id of the token, and its learning rate.
    pub(crate) fn resolve(&self, vocabulary: &Vocabulary) -> Result<(u32, f64)> {
        Ok((token_id(&self.token, vocabulary)?, self.lr))
    }
}

/// A token named by its id or its string.
pub(crate) fn token_id(name: &str, vocabulary: &Vocabulary) -> Result<u32> {
    if is_id(name) {
        return Ok(name.parse()?);
    }
    Ok(vocabulary.single_id(name)?)
}

/// Whether a token is named by its id.
pub(crate) fn is_id(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_digit()) && name.parse::<u32>().is_ok()
}

/// Ids and ranges of ids, such as `12,7,300-310`, in order.
#[derive(Clone, Debug)]
pub(crate) struct IdRanges(Vec<RangeInclusive<u32>>);

impl FromStr for IdRanges {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |number: &str, part: &str| {
            number
                .trim()
                .parse::<u32>()
                .map_err(|_| format!("'{part}' is neither a token id nor a range such as 300-310"))
        };
        let ranges = text.split(',').map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (parse(first, part)?, parse(last, part)?);
            if first > last {
                return Err(format!("the range '{part}' runs backwards"));
            }
            Ok(first..=last)
        });
        ranges.collect::<Result<_, _>>().map(Self)
    }
}

impl IdRanges {
    /// The ids, all below `vocab_size` (checked first, so that no range can grow without bounds).
    fn expand(&self, vocab_size: usize) -> Result<Vec<u32>> {
        if let Some(range) = self.0.iter().find(|range| *range.end() as usize >= vocab_size) {
            bail!(
                "token id {} is outside the model's vocabulary of {vocab_size} rows",
                range.end()
            );
        }
        let mut ids = Vec::new();
        for range in &self.0 {
            if ids.len() + range.clone().count() > vocab_size {
                bail!("more token ids are named than the model's {vocab_size} rows: some are given twice");
            }
            ids.extend(range.clone());
        }
        Ok(ids)
    }
}

impl TokenArgs {
    /// The ids in the order given, none of them twice.
    pub(crate) fn resolve(&self, vocabulary: &Vocabulary, vocab_size: usize) -> Result<Vec<u32>> {
        let ids = match &self.token_ids {
            Some(ranges) => ranges.expand(vocab_size)?,
            None => CommaList::all(&self.tokens)
                .map(|token| {
                    if token.is_empty() {
                        bail!("token '' encodes to nothing; a comma inside a token is written '\\,'");
                    }
                    let id = vocabulary.single_id(token).map_err(to_add)?;
                    expect_found(vocabulary, token, id)?;
                    Ok(id)
                })
                .collect::<Result<_>>()?,
        };
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            bail!("token id {id} is outside the model's vocabulary of {vocab_size} rows");
        }
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        let twice = |pair: &[u32]| match pair {
            [first, second] if first == second => Some(*first),
            _ => None,
        };
        if let Some(id) = sorted.windows(2).find_map(twice) {
            bail!("token id {id} is given twice");
        }
        Ok(ids)
    }
}

/// What to do with a string that is not one token.
fn to_add(error: trainer::Error) -> anyhow::Error {
    match error {
        trainer::Error::NotOneToken { .. } => {
            let message = format!("{error}; `add-tokens` makes it one, in a copy of the model");
            anyhow::Error::new(error).context(message)
        }
        _ => error.into(),
    }
}

/// Refuses a token that is not found where its string stands in a sentence. A normal token may be missed between letters:
/// there a normalizer may have changed the text.
pub(crate) fn expect_found(vocabulary: &Vocabulary, token: &str, id: u32) -> Result<()> {
    for missed in vocabulary.missed_contexts(id)? {
        let what = format!(
            "token '{token}' is not found in '{}', which encodes to {}",
            missed.text, missed.encodes_to
        );
        if missed.special || missed.context != Context::BetweenLetters {
            bail!("{what}; texts would not train it: name it by its id if that is meant");
        }
        note(&format!("note: {what}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_ranges_are_expanded() {
        let ids: IdRanges = "12,7, 300-302".parse().unwrap();
        assert_eq!(ids.expand(303).unwrap(), [12, 7, 300, 301, 302]);
        assert!(ids.expand(302).is_err());
        assert!(
            "0-4294967295,0-4294967295"
                .parse::<IdRanges>()
                .unwrap()
                .expand(10)
                .is_err()
        );
        assert!("0-9,0-9".parse::<IdRanges>().unwrap().expand(10).is_err());
    }

    #[test]
    fn commas_separate_unless_a_backslash_is_before_them() {
        for (text, items) in [
            ("a,b", &["a", "b"][..]),
            ("", &[""]),
            (r"\,", &[","]),
            (r"\,,\,\,,a\,b", &[",", ",,", "a,b"]),
            (r"\n,a\b,\\", &[r"\n", r"a\b", r"\\"]),
            (r"\\,\", &[r"\,\"]),
        ] {
            assert_eq!(split_commas(text), items, "{text}");
        }
        for item in ["", ",", r"\", r"\,", r"a\,b,", r"\\,\\"] {
            assert_eq!(split_commas(&escape_commas(item)), [item]);
        }
        let rates: CommaList<TokenLr> = r"\,=1,a=2".parse().unwrap();
        assert_eq!(rates.0.iter().map(|own| own.lr).collect::<Vec<_>>(), [1.0, 2.0]);
        assert_eq!(rates.0[0].token, ",");
        let error = "a=1,b".parse::<CommaList<TokenLr>>().unwrap_err();
        assert!(error.contains("'b'"), "{error}");
    }

    #[test]
    fn a_token_with_a_learning_rate_may_hold_an_equals_sign() {
        let own: TokenLr = "a=b=1e-3".parse().unwrap();
        assert_eq!((own.token.as_str(), own.lr), ("a=b", 1e-3));
        for text in ["", "=1", "a", "a=", "a=b", "12:0"] {
            assert!(text.parse::<TokenLr>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in ["", "a", "1,,2", "-3", "5-2", "1.5", "99999999999"] {
            assert!(text.parse::<IdRanges>().is_err(), "{text}");
        }
    }
}

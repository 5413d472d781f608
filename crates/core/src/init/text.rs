//! The text form, as it is recorded in files and written on command lines.

use std::fmt;
use std::str::FromStr;

use super::{InitMode, InitModifier, Population, RowInit};
use crate::TokenId;

/// A text that is no [`RowInit`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseInitError(String);

impl fmt::Display for ParseInitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseInitError {}

/// The text of an init, its modifiers taken off the mode, for callers with modes of their own (core knows no strings
/// of tokens).
///
/// Modifiers are taken from the end while they are known, so the mode may hold a `+`.
#[derive(Clone, Debug, PartialEq)]
pub struct InitText<'a> {
    /// All before the modifiers.
    pub mode: &'a str,
    /// The modifiers, in order.
    pub modifiers: Vec<InitModifier>,
    /// The seed, if one is given.
    pub seed: Option<u64>,
}

impl<'a> InitText<'a> {
    /// Takes a text apart.
    ///
    /// # Errors
    ///
    /// [`ParseInitError`] for a known modifier with a bad value, and for a second seed.
    pub fn split(text: &'a str) -> Result<Self, ParseInitError> {
        let mut split = Self {
            mode: text,
            modifiers: Vec::new(),
            seed: None,
        };
        while let Some((before, last)) = split.mode.rsplit_once('+') {
            match parts(last) {
                ("noise", Some(std)) => {
                    let std = number("noise", std)?;
                    split.modifiers.push(InitModifier::Noise { std });
                }
                ("norm-match", target) => {
                    let target = target.map(|text| number("norm-match", text)).transpose()?;
                    split.modifiers.push(InitModifier::NormMatch { target });
                }
                ("seed", Some(_)) if split.seed.is_some() => return Err(error("the seed is given twice")),
                ("seed", Some(seed)) => split.seed = Some(whole("seed", seed)?),
                _ => break,
            }
            split.mode = before;
        }
        split.modifiers.reverse();
        Ok(split)
    }
}

impl FromStr for RowInit {
    type Err = ParseInitError;

    /// Reads the text form; without a seed it is 0. Values are checked when rows are made.
    fn from_str(text: &str) -> Result<Self, ParseInitError> {
        let InitText {
            mode,
            modifiers,
            seed,
        } = InitText::split(text)?;
        Ok(Self {
            mode: mode.parse()?,
            modifiers,
            seed: seed.unwrap_or(0),
        })
    }
}

impl FromStr for InitMode {
    type Err = ParseInitError;

    fn from_str(text: &str) -> Result<Self, ParseInitError> {
        Ok(match parts(text) {
            ("keep", None) => Self::Keep,
            ("zeros", None) => Self::Zeros,
            ("random", std) => Self::Normal {
                std: std.map_or(Ok(RowInit::STD), |text| number("random", text))?,
            },
            ("mean", over) => Self::Mean {
                over: population("mean", over)?,
            },
            // `mean+covariance` too: it is how the method is called.
            ("mean-covariance" | "mean+covariance", None) => Self::MeanCovariance {
                scale: RowInit::COVARIANCE_SCALE,
                over: Population::All,
            },
            ("mean-covariance" | "mean+covariance", Some(rest)) => {
                let (scale, over) = match parts(rest) {
                    ("others", None) => (None, Some("others")),
                    (scale, over) => (Some(scale), over),
                };
                Self::MeanCovariance {
                    scale: scale.map_or(Ok(RowInit::COVARIANCE_SCALE), |text| {
                        number("mean-covariance", text)
                    })?,
                    over: population("mean-covariance", over)?,
                }
            }
            ("copy", Some(id)) => Self::Copy(token(id)?),
            ("mean-of", Some("")) => Self::MeanOf(Vec::new()),
            ("mean-of", Some(ids)) => Self::MeanOf(ids.split(',').map(token).collect::<Result<_, _>>()?),
            ("interpolate", Some(rest)) => {
                let [from, to, t] = rest.split(':').collect::<Vec<_>>()[..] else {
                    return Err(error(
                        "interpolate takes two tokens and a number, as in interpolate:5:7:0.3",
                    ));
                };
                Self::Interpolate {
                    from: token(from)?,
                    to: token(to)?,
                    t: number("interpolate", t)?,
                }
            }
            _ => {
                return Err(error(format!(
                    "'{text}' is none of keep, zeros, random[:STD], mean[:others], mean-covariance[:SCALE][:others], \
                     copy:ID, mean-of:ID,…, interpolate:ID:ID:T, each with +noise:STD, +norm-match[:NORM] or +seed:N"
                )));
            }
        })
    }
}

impl fmt::Display for RowInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.mode.fmt(f)?;
        self.modifiers
            .iter()
            .try_for_each(|modifier| write!(f, "+{modifier}"))?;
        if self.draws() || self.seed != 0 {
            write!(f, "+seed:{}", self.seed)?;
        }
        Ok(())
    }
}

impl fmt::Display for InitMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others = |over: &Population| match over {
            Population::All => "",
            Population::Others => ":others",
        };
        match self {
            Self::Keep => f.write_str("keep"),
            Self::Zeros => f.write_str("zeros"),
            Self::Normal { std } => write!(f, "random:{std:?}"),
            Self::Mean { over } => write!(f, "mean{}", others(over)),
            Self::MeanCovariance { scale, over } => write!(f, "mean-covariance:{scale:?}{}", others(over)),
            Self::Copy(id) => write!(f, "copy:{id}"),
            Self::MeanOf(ids) => {
                let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
                write!(f, "mean-of:{}", ids.join(","))
            }
            Self::Interpolate { from, to, t } => write!(f, "interpolate:{from}:{to}:{t:?}"),
        }
    }
}

impl fmt::Display for InitModifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Noise { std } => write!(f, "noise:{std:?}"),
            Self::NormMatch { target: None } => f.write_str("norm-match"),
            Self::NormMatch { target: Some(norm) } => write!(f, "norm-match:{norm:?}"),
        }
    }
}

/// A word, and what follows its colon.
fn parts(text: &str) -> (&str, Option<&str>) {
    match text.split_once(':') {
        Some((word, rest)) => (word, Some(rest)),
        None => (text, None),
    }
}

fn population(of: &str, text: Option<&str>) -> Result<Population, ParseInitError> {
    match text {
        None => Ok(Population::All),
        Some("others") => Ok(Population::Others),
        Some(other) => Err(error(format!("{of} takes ':others', not '{other}'"))),
    }
}

fn number(of: &str, text: &str) -> Result<f64, ParseInitError> {
    text.parse()
        .map_err(|_| error(format!("{of} takes a number, not '{text}'")))
}

fn token(text: &str) -> Result<TokenId, ParseInitError> {
    whole("a token id", text).map(TokenId)
}

/// Digits alone: Rust would take a plus sign too.
fn whole<T: FromStr>(what: &str, text: &str) -> Result<T, ParseInitError> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = digits.then(|| text.parse().ok()).flatten();
    parsed.ok_or_else(|| {
        error(format!(
            "{what} must be a whole number in its range, not '{text}'"
        ))
    })
}

fn error(reason: impl Into<String>) -> ParseInitError {
    ParseInitError(reason.into())
}

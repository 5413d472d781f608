//! How rows start, as it is written on the command line and recorded in files.

use std::str::FromStr;

use anyhow::{Result, bail};
use trainable_tokens_core::{
    EmbeddingSource, InitMode, InitModifier, InitText, RowInit, TokenId, TokenRows, TokenSet, initial_rows,
};
use trainable_tokens_format::MappedTable;
use trainable_tokens_trainer::Vocabulary;

use crate::args::RowInitArgs;
use crate::output::note;
use crate::tokens::{is_id, token_id};

/// One `--init`: what core knows, and what takes the model's tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct InitSpec {
    mode: SpecMode,
    modifiers: Vec<InitModifier>,
    seed: Option<u64>,
}

#[derive(Clone, Debug)]
enum SpecMode {
    /// Names no token by its string.
    Plain(InitMode),
    Copy(String),
    Interpolate {
        from: String,
        to: String,
        t: f64,
    },
    SubTokens,
    Description(String),
}

/// One `--init-token`.
#[derive(Clone, Debug)]
pub(crate) struct TokenInit {
    token: String,
    spec: InitSpec,
}

const MODES: &str = "keep, zeros, random[:STD], mean[:others], mean-covariance[:SCALE][:others], copy:TOKEN, \
                     mean-of:ID,ID,…, interpolate:TOKEN:TOKEN:T, subtokens, description:TEXT, each with +noise:STD, \
                     +norm-match[:NORM] or +seed:N";

impl FromStr for InitSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let InitText {
            mode,
            modifiers,
            seed,
        } = InitText::split(text).map_err(|error| error.to_string())?;
        let (word, rest) = mode.split_once(':').unwrap_or((mode, ""));
        let plain = || {
            let known = [
                "keep",
                "zeros",
                "random",
                "mean",
                "mean-covariance",
                "mean+covariance",
                "copy",
                "mean-of",
            ];
            if known.contains(&word) || word == "interpolate" {
                mode.parse()
                    .map(SpecMode::Plain)
                    .map_err(|error: trainable_tokens_core::ParseInitError| error.to_string())
            } else {
                Err(format!("'{mode}' is none of {MODES}"))
            }
        };
        let mode = match word {
            "subtokens" if word == mode => SpecMode::SubTokens,
            "description" if rest.trim().is_empty() => return Err("description takes a text".to_owned()),
            "description" => SpecMode::Description(rest.to_owned()),
            "copy" if !rest.is_empty() && !is_id(rest) => SpecMode::Copy(rest.to_owned()),
            "interpolate" => match rest
                .rsplit_once(':')
                .and_then(|(ends, t)| Some((ends.split_once(':')?, t)))
            {
                Some(((from, to), t)) if !(is_id(from) && is_id(to)) => interpolation(from, to, t)?,
                _ => plain()?,
            },
            _ => plain()?,
        };
        Ok(Self {
            mode,
            modifiers,
            seed,
        })
    }
}

fn interpolation(from: &str, to: &str, t: &str) -> Result<SpecMode, String> {
    if from.is_empty() || to.is_empty() || to.contains(':') {
        return Err(
            "interpolate takes two tokens and a number, as in interpolate:cat:dog:0.3; name tokens with a \
                    colon by their ids"
                .to_owned(),
        );
    }
    let t = t
        .parse()
        .map_err(|_| format!("interpolate takes a number, not '{t}'"))?;
    Ok(SpecMode::Interpolate {
        from: from.to_owned(),
        to: to.to_owned(),
        t,
    })
}

impl FromStr for TokenInit {
    type Err = String;

    /// The token ends at the first `=` that an init follows, so that it may hold one.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut first = None;
        for (at, _) in text.match_indices('=').filter(|(at, _)| *at > 0) {
            match text[at + 1..].parse() {
                Ok(spec) => {
                    let token = text[..at].to_owned();
                    return Ok(Self { token, spec });
                }
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first
            .unwrap_or_else(|| "expected TOKEN=MODE, such as '<tok>=description:a small bird'".to_owned()))
    }
}

/// How the rows of all tokens of a run start.
pub(crate) struct Initial {
    inits: Vec<RowInit>,
    /// As it is recorded: what was asked for.
    pub(crate) text: String,
}

impl Initial {
    /// Whether all rows start as the table's: PEFT's `init_weights`.
    pub(crate) fn keeps_base(&self) -> bool {
        self.inits.iter().all(RowInit::keeps_base)
    }

    /// How each row starts, in slot order.
    pub(crate) fn inits(&self) -> &[RowInit] {
        &self.inits
    }

    /// How each row starts, all tokens by their ids, in slot order.
    pub(crate) fn resolved(&self) -> Vec<String> {
        self.inits.iter().map(ToString::to_string).collect()
    }

    /// The rows, `[k, D]`, in the type that rows of the table train in.
    pub(crate) fn rows(&self, table: &MappedTable, tokens: &TokenSet) -> Result<TokenRows> {
        let dtype = table.dtype().default_row_dtype();
        Ok(initial_rows(table, tokens, &self.inits, dtype)?)
    }
}

impl RowInitArgs {
    /// Finds out what the names mean, for the tokens `ids`; `seed` counts where an init says none.
    pub(crate) fn resolve(&self, vocabulary: &Vocabulary, ids: &[u32], seed: u64) -> Result<Initial> {
        let mut resolver = Resolver {
            vocabulary,
            ids,
            seed,
            without: None,
        };
        let mut own: Vec<Option<&InitSpec>> = vec![None; ids.len()];
        for TokenInit { token, spec } in &self.init_token {
            let id = resolver.token(token)?;
            let Some(slot) = ids.iter().position(|other| *other == id.0) else {
                bail!(
                    "--init-token names token id {id} ('{token}'), which is not among the tokens that train"
                );
            };
            if own[slot].replace(spec).is_some() {
                bail!("--init-token names token id {id} ('{token}') twice");
            }
        }
        let mut parts = Vec::new();
        if ids.is_empty() || own.iter().any(Option::is_none) {
            parts.push(resolver.text(&self.init)?);
        }
        let mut inits = Vec::new();
        for (id, spec) in ids.iter().zip(own) {
            if let Some(spec) = spec {
                parts.push(format!("{id}={}", resolver.text(spec)?));
            }
            inits.push(resolver.init(spec.unwrap_or(&self.init), *id)?);
        }
        Ok(Initial {
            inits,
            text: parts.join("; "),
        })
    }
}

struct Resolver<'a> {
    vocabulary: &'a Vocabulary,
    /// The tokens that train.
    ids: &'a [u32],
    seed: u64,
    /// The vocabulary without them, once it is needed.
    without: Option<Vocabulary>,
}

impl Resolver<'_> {
    /// The init of one token, all names turned into ids.
    fn init(&mut self, spec: &InitSpec, id: u32) -> Result<RowInit> {
        let mode = match &spec.mode {
            SpecMode::Plain(mode) => mode.clone(),
            SpecMode::Copy(name) => InitMode::Copy(self.token(name)?),
            SpecMode::Interpolate { from, to, t } => InitMode::Interpolate {
                from: self.token(from)?,
                to: self.token(to)?,
                t: *t,
            },
            SpecMode::SubTokens => InitMode::MeanOf(self.sub_tokens(id)?),
            SpecMode::Description(text) => InitMode::MeanOf(self.description(text, id)?),
        };
        Ok(self.complete(spec, mode))
    }

    /// What is recorded: texts as they were given, single tokens by their ids.
    fn text(&self, spec: &InitSpec) -> Result<String> {
        let rest = self.complete(spec, InitMode::Keep).to_string();
        let rest = rest.strip_prefix("keep").unwrap_or_default();
        Ok(match &spec.mode {
            SpecMode::SubTokens => format!("subtokens{rest}"),
            SpecMode::Description(text) => format!("description:{text}{rest}"),
            SpecMode::Plain(mode) => self.complete(spec, mode.clone()).to_string(),
            SpecMode::Copy(name) => self.complete(spec, InitMode::Copy(self.token(name)?)).to_string(),
            SpecMode::Interpolate { from, to, t } => {
                let (from, to) = (self.token(from)?, self.token(to)?);
                self.complete(spec, InitMode::Interpolate { from, to, t: *t })
                    .to_string()
            }
        })
    }

    /// A seed is only part of what draws.
    fn complete(&self, spec: &InitSpec, mode: InitMode) -> RowInit {
        let mut init = RowInit::new(mode);
        init.modifiers.clone_from(&spec.modifiers);
        if init.draws() {
            init.seed = spec.seed.unwrap_or(self.seed);
        }
        init
    }

    /// A token by its id or its string.
    fn token(&self, name: &str) -> Result<TokenId> {
        Ok(TokenId(token_id(name, self.vocabulary)?))
    }

    fn sub_tokens(&mut self, id: u32) -> Result<Vec<TokenId>> {
        let Some(text) = self.vocabulary.text(id)? else {
            bail!(
                "token id {id} has no string in the tokenizer, so it has no sub-tokens; use --init-token {id}=MODE"
            );
        };
        if self.without.is_none() {
            self.without = Some(self.vocabulary.without(self.ids)?);
        }
        let without = self.without.as_ref().unwrap_or(self.vocabulary);
        pieces(without, &text, &format!("token id {id} ('{text}')"))
    }

    fn description(&self, text: &str, id: u32) -> Result<Vec<TokenId>> {
        let found = pieces(
            self.vocabulary,
            text,
            &format!("the description of token id {id}"),
        )?;
        if found.contains(&TokenId(id)) {
            bail!(
                "the description '{text}' of token id {id} holds that token itself; describe it in other words"
            );
        }
        Ok(found)
    }
}

fn pieces(vocabulary: &Vocabulary, text: &str, what: &str) -> Result<Vec<TokenId>> {
    let pieces = vocabulary.pieces(text)?;
    if pieces.unknown > 0 {
        note(&format!(
            "{what}: the tokenizer does not know {} of its {} parts; the others are averaged",
            pieces.unknown,
            pieces.unknown + pieces.ids.len()
        ));
    }
    Ok(pieces.ids.into_iter().map(TokenId).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_told_from_modifiers() {
        let spec: InitSpec = "description:a +5 sword: red+blue+noise:0.1+seed:3"
            .parse()
            .unwrap();
        assert!(matches!(&spec.mode, SpecMode::Description(text) if text == "a +5 sword: red+blue"));
        assert_eq!((spec.modifiers.len(), spec.seed), (1, Some(3)));
        let spec: InitSpec = "copy:a:b+c".parse().unwrap();
        assert!(matches!(&spec.mode, SpecMode::Copy(name) if name == "a:b+c"));
        let spec: InitSpec = "interpolate:<a>:7:0.5".parse().unwrap();
        assert!(matches!(&spec.mode, SpecMode::Interpolate { from, to, .. } if from == "<a>" && to == "7"));
        let spec: InitSpec = "interpolate:6:7:0.5".parse().unwrap();
        assert!(matches!(spec.mode, SpecMode::Plain(InitMode::Interpolate { .. })));
    }

    #[test]
    fn a_token_may_hold_an_equals_sign() {
        let init: TokenInit = "a=b=copy:x=y".parse().unwrap();
        assert_eq!(init.token, "a=b");
        assert!(matches!(&init.spec.mode, SpecMode::Copy(name) if name == "x=y"));
        for text in ["", "=mean", "a", "a=", "a=best", "a=b=c"] {
            assert!(text.parse::<TokenInit>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_mode_is_refused() {
        for text in [
            "",
            "best",
            "subtokens:3",
            "description",
            "description: ",
            "copy",
            "copy:",
            "interpolate:a:b",
            "interpolate:a:b:c",
            "interpolate:a:b:c:0.5",
            "interpolate::b:0.5",
            "mean-of:the",
            "mean+noise:x",
        ] {
            assert!(text.parse::<InitSpec>().is_err(), "{text}");
        }
    }
}

//! Which modules an adapter targets.

use std::cell::OnceCell;

use fancy_regex::Regex;

use crate::error::one_line;
use crate::json::Json;
use crate::regex;

/// `target_modules`: the modules whose rows train.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Each entry is a module path, or the end of one after a dot.
    List(Vec<String>),
    /// A regular expression for the whole path, as Python's `re.fullmatch`.
    Pattern(String),
    /// `null`: the model's input embedding.
    Default,
}

impl TargetModules {
    pub(super) fn to_json(&self) -> Json {
        match self {
            Self::List(entries) => Json::Array(entries.iter().map(|entry| entry.as_str().into()).collect()),
            Self::Pattern(pattern) => pattern.as_str().into(),
            Self::Default => Json::Null,
        }
    }
}

/// [`TargetModules`] made ready for many paths: a pattern is compiled once.
pub(crate) struct Matcher<'a> {
    targets: &'a TargetModules,
    compiled: OnceCell<Regex>,
}

impl<'a> Matcher<'a> {
    pub(crate) fn new(targets: &'a TargetModules) -> Self {
        Self {
            targets,
            compiled: OnceCell::new(),
        }
    }

    pub(crate) fn targets(&self) -> &'a TargetModules {
        self.targets
    }

    /// Whether the module at `path` is targeted; by null, if it is named as PEFT's last resort, `embed_tokens`. The
    /// error says why a pattern is not a regular expression.
    pub(crate) fn matches(&self, path: &str) -> Result<bool, String> {
        match self.targets {
            TargetModules::List(entries) => Ok(entries.iter().any(|entry| is_path_or_suffix(entry, path))),
            TargetModules::Default => Ok(is_path_or_suffix("embed_tokens", path)),
            TargetModules::Pattern(pattern) => {
                let compiled = if let Some(compiled) = self.compiled.get() {
                    compiled
                } else {
                    let compiled = compile(pattern)?;
                    self.compiled.get_or_init(|| compiled)
                };
                compiled
                    .is_match(path)
                    .map_err(|error| pattern_error(pattern, &one_line(error)))
            }
        }
    }
}

/// Targets the modules named in a list.
impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::List(names.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(entries: [S; N]) -> Self {
        Self::List(entries.into_iter().map(Into::into).collect())
    }
}

/// Refuses what can never match.
pub(super) fn check(target: &TargetModules) -> Result<(), String> {
    match target {
        TargetModules::List(entries) if entries.is_empty() => Err("the list is empty".to_owned()),
        TargetModules::List(entries) => match entries.iter().position(String::is_empty) {
            Some(at) => Err(format!("entry {at} is empty")),
            None => Ok(()),
        },
        TargetModules::Pattern(pattern) => compile(pattern).map(drop),
        TargetModules::Default => Ok(()),
    }
}

/// Whether an entry of `target_modules` names the module at `path`: by its path, or by the end of it after a dot
/// (`peft/tuners/tuners_utils.py`, `check_target_module_exists`).
pub fn is_path_or_suffix(entry: &str, path: &str) -> bool {
    path.strip_suffix(entry)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

fn compile(pattern: &str) -> Result<Regex, String> {
    regex::compile(pattern, |pattern| format!(r"\A(?:{pattern})\z"))
        .map_err(|reason| pattern_error(pattern, &reason))
}

fn pattern_error(pattern: &str, reason: &str) -> String {
    format!(
        "{} is not a usable regular expression: {reason}",
        Json::from(pattern).brief()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_match_paths_and_dotted_ends() {
        let list = TargetModules::from(["emb", "dec.wte"]);
        for (path, expected) in [
            ("emb", true),
            ("enc.emb", true),
            ("pos_emb", false),
            ("dec.wte", true),
            ("wte", false),
            ("emb.x", false),
        ] {
            assert_eq!(Matcher::new(&list).matches(path), Ok(expected), "{path}");
        }
    }

    #[test]
    fn patterns_match_whole_paths() {
        let matches =
            |pattern: &str, path| Matcher::new(&TargetModules::Pattern(pattern.to_owned())).matches(path);
        assert_eq!(matches(r".*\.emb", "enc.emb"), Ok(true));
        assert_eq!(matches(r".*\.emb", "enc.emb.x"), Ok(false));
        assert_eq!(matches("a|ab", "ab"), Ok(true));
        assert_eq!(matches("(?!dec).*emb", "dec.emb"), Ok(false));
        assert_eq!(matches("transformer.wte", "transformer.wte"), Ok(true));
        assert_eq!(matches("embed_tokens", "model.embed_tokens"), Ok(false));
        for bad in ["(emb", "a)|(b", "*", &"a".repeat(5000), r"(\w{100}){100}"] {
            assert!(check(&TargetModules::Pattern(bad.to_owned())).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pattern_that_turns_back_without_end_is_an_error() {
        let path = "a".repeat(40);
        for pattern in ["(?:(?=a)a|a)*b", "(a|aa)+(?!b)c"] {
            let outcome = Matcher::new(&TargetModules::Pattern(pattern.to_owned())).matches(&path);
            assert!(outcome.unwrap_err().contains("backtracking"), "{pattern}");
        }
    }
}

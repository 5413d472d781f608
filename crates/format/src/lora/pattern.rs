//! Values that a config gives for some modules, by regular expressions.

use fancy_regex::Regex;

use crate::error::one_line;
use crate::regex;

/// `rank_pattern` or `alpha_pattern`: the first expression that fits a module's path, or the end of it after a dot, tells
/// the module's value. They are tried in the order of their texts, in which PEFT writes them.
pub(super) struct Patterns<T> {
    entries: Vec<(String, Regex, T)>,
}

impl<T: Copy> Patterns<T> {
    /// Compiles the expressions. The error names the one that is none.
    pub(super) fn new(entries: impl IntoIterator<Item = (String, T)>) -> Result<Self, (String, String)> {
        let (patterns, values): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        let compiled = regex::compile_all(&patterns, |pattern| format!(r"\A(.*\.)?({pattern})\z"))
            .map_err(|(at, reason)| (patterns.get(at).cloned().unwrap_or_default(), reason))?;
        let entries = patterns.into_iter().zip(compiled).zip(values);
        let mut entries: Vec<_> = entries
            .map(|((pattern, regex), value)| (pattern, regex, value))
            .collect();
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self { entries })
    }

    /// The value of the module at `path`, if one is given; the error names the expression that gave up.
    pub(super) fn of(&self, path: &str) -> Result<Option<T>, (String, String)> {
        for (pattern, regex, value) in &self.entries {
            match regex.is_match(path) {
                Ok(true) => return Ok(Some(*value)),
                Ok(false) => {}
                Err(error) => return Err((pattern.clone(), one_line(error))),
            }
        }
        // As PEFT does, a path that is a key counts even where it does not fit itself as an expression.
        let same = self.entries.iter().find(|(pattern, ..)| pattern == path);
        Ok(same.map(|(.., value)| *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(patterns: &[(&str, u32)], path: &str) -> Option<u32> {
        let entries = patterns
            .iter()
            .map(|(pattern, value)| ((*pattern).to_owned(), *value));
        Patterns::new(entries).unwrap().of(path).unwrap()
    }

    #[test]
    fn expressions_fit_paths_and_dotted_ends() {
        let path = "model.layers.1.self_attn.q_proj";
        for (pattern, fits) in [
            ("q_proj", true),
            ("proj", false),
            ("q_pro", false),
            ("self_attn.q_proj", true),
            (r"layers\.\d+\.self_attn\.[qk]_proj", true),
            ("^model.layers.1.*", true),
            ("^layers.1.*", false),
            ("v_proj|q_proj", true),
            (r"model\.layers\.1", false),
            (path, true),
        ] {
            assert_eq!(value(&[(pattern, 3)], path), fits.then_some(3), "{pattern}");
        }
    }

    #[test]
    fn the_first_by_text_counts() {
        let both = [("q_proj", 1), (r"layers\.0\.q_proj", 2)];
        assert_eq!(value(&both, "layers.0.q_proj"), Some(2));
        assert_eq!(value(&both, "layers.1.q_proj"), Some(1));
        assert_eq!(value(&[("a[0]", 4)], "a[0]"), Some(4));
    }

    #[test]
    fn what_is_no_expression_is_named() {
        for bad in ["(q", "a)|(b", "*"] {
            let refused = Patterns::new([(bad.to_owned(), 1)]).err().unwrap();
            assert_eq!(refused.0, bad);
        }
    }
}

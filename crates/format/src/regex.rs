//! Regular expressions of files, with limits: a hostile one must cost little.

use fancy_regex::{Expr, Regex, RegexBuilder};

use crate::error::one_line;

/// Longest expression, and largest automaton of each of its parts without look-around: together they bound what an
/// expression takes in memory and time.
const MAX_BYTES: usize = 4096;
const MAX_AUTOMATON_BYTES: usize = 1 << 20;
/// The same automaton where a config has many expressions, and how many it may have.
const MAX_AUTOMATON_BYTES_OF_MANY: usize = 1 << 17;
const MAX_EXPRESSIONS: usize = 1024;
/// How often a match may turn back.
const MAX_BACKTRACKS: usize = 100_000;
/// Most digits of a number: the parser keeps a bit for each group up to the highest that is referred to.
const MAX_DIGITS: usize = 6;

/// Compiles `whole(pattern)`, if `pattern` is an expression by itself: anchors around it must not repair one such as
/// `a)|(b`.
pub(crate) fn compile(pattern: &str, whole: impl FnOnce(&str) -> String) -> Result<Regex, String> {
    compile_within(pattern, whole, MAX_AUTOMATON_BYTES)
}

/// Compiles each expression of a list.
pub(crate) fn compile_all<P: AsRef<str>>(
    patterns: &[P],
    whole: impl Fn(&str) -> String,
) -> Result<Vec<Regex>, (usize, String)> {
    if patterns.len() > MAX_EXPRESSIONS {
        let reason = format!("more than {MAX_EXPRESSIONS} regular expressions");
        return Err((MAX_EXPRESSIONS, reason));
    }
    let compiled = patterns.iter().enumerate().map(|(at, pattern)| {
        compile_within(pattern.as_ref(), &whole, MAX_AUTOMATON_BYTES_OF_MANY).map_err(|reason| (at, reason))
    });
    compiled.collect()
}

fn compile_within(
    pattern: &str,
    whole: impl FnOnce(&str) -> String,
    max_automaton_bytes: usize,
) -> Result<Regex, String> {
    if pattern.len() > MAX_BYTES {
        let bytes = pattern.len();
        return Err(format!(
            "a regular expression of {bytes} bytes is above the limit of {MAX_BYTES}"
        ));
    }
    let mut numbers = pattern.split(|c: char| !c.is_ascii_digit());
    if numbers.any(|digits| digits.len() > MAX_DIGITS) {
        return Err(format!(
            "a regular expression with a number of more than {MAX_DIGITS} digits"
        ));
    }
    let tree = Expr::parse_tree(pattern).map_err(one_line)?;
    // The matcher panics if a group that repeats is referred to while it has begun anew.
    if !tree.backrefs.is_empty() {
        return Err("a regular expression that refers back to a group".to_owned());
    }
    let mut builder = RegexBuilder::new(&whole(pattern));
    builder.delegate_size_limit(max_automaton_bytes);
    builder.backtrack_limit(MAX_BACKTRACKS);
    builder.build().map_err(one_line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_kept() {
        let plain = |pattern: &str| compile(pattern, str::to_owned);
        assert!(plain(r"model\.layers\.123456\.(a|b)").is_ok());
        for bad in [
            "a)|(b",
            "(?(04294967296)e)",
            r"(a)\4294967296",
            r"(?:(..\1?)a|a)*b",
            "(?P<x>a)(?P=x)",
            "(a)?(?(1)b|c)",
            &"a".repeat(MAX_BYTES + 1),
        ] {
            assert!(plain(bad).is_err(), "{bad}");
        }
        assert_eq!(compile_all(&["a", "(b"], str::to_owned).err().unwrap().0, 1);
        assert!(compile_all(&vec!["a"; MAX_EXPRESSIONS + 1], str::to_owned).is_err());
    }
}

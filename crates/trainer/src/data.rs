//! Training data: lines of token ids or text, batches of padded lines.

mod batch;
mod contents;
mod example;
mod sampler;

pub use batch::Batch;
pub(crate) use batch::Predicts;
pub use example::{Example, IGNORED};
pub use sampler::Sampler;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use contents::Contents;
use sha2::{Digest, Sha256};

use crate::digest::hex;
use crate::{Error, InputSpec, Result, Vocabulary};

/// Lines that a message names.
const MOST_LINES: usize = 8;

/// Examples of one file or several, in memory and validated.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The files, and the place of the first example of each.
    files: Vec<(PathBuf, usize)>,
    examples: Vec<Example>,
    definitions: Vec<Vec<u32>>,
    pad_id: u32,
    digest: OnceLock<String>,
}

impl Dataset {
    /// Reads JSON Lines, each `{"input_ids": […], "labels": […]?}` or `{"text": "…"}`, or a `.txt` file, which is
    /// cut into windows of `max_length` tokens. Longer lines are cut at `max_length`, a text before the special tokens that end
    /// it; blank lines are skipped. Lines `{"sentence": "…", "definition": "…"}`, or
    /// `{"input_ids": […], "definition_ids": […]}`, teach a word.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], and [`Error::Data`] naming the line: not JSON, ids or labels out of range, lengths that
    /// differ, no target, longer than the model's positions; [`Error::Dataset`] if no example is there.
    pub fn read(
        path: &Path,
        vocabulary: &Vocabulary,
        model: impl Into<InputSpec>,
        max_length: Option<usize>,
    ) -> Result<Self> {
        Self::read_all(&[path], vocabulary, model, max_length)
    }

    /// Reads several files, one after the other, each as [`read`](Self::read) does. Plain text is cut file by file.
    ///
    /// # Errors
    ///
    /// Those of [`read`](Self::read), of the first file at fault; [`Error::Setting`] if there is no file.
    pub fn read_all(
        paths: &[impl AsRef<Path>],
        vocabulary: &Vocabulary,
        model: impl Into<InputSpec>,
        max_length: Option<usize>,
    ) -> Result<Self> {
        if max_length.is_some_and(|length| length < 2) {
            return Err(Error::Setting(
                "max-length must be at least 2: a token and its successor".to_owned(),
            ));
        }
        if paths.is_empty() {
            return Err(Error::Setting(
                "no data is given: name at least one file".to_owned(),
            ));
        }
        let model = model.into();
        let mut contents = Contents::default();
        let mut files = Vec::new();
        for path in paths.iter().map(AsRef::as_ref) {
            let first = contents.examples.len();
            contents.add(path, vocabulary, model, max_length)?;
            if contents.examples.len() == first {
                return Err(Error::Dataset {
                    path: path.to_owned(),
                    reason: "holds no example".to_owned(),
                });
            }
            files.push((path.to_owned(), first));
        }
        Ok(Self {
            files,
            examples: contents.examples,
            definitions: contents.definitions,
            pad_id: model.pad_token_id.unwrap_or(0),
            digest: OnceLock::new(),
        })
    }

    /// The files, in their order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// The file of the example at `index`; behind the last example, the last file.
    pub fn path_of(&self, index: usize) -> &Path {
        let until = self.files.partition_point(|(_, first)| *first <= index);
        let file = self.files[..until].last();
        file.map_or(Path::new(""), |(path, _)| path)
    }

    /// The examples, in the order of the files and of their lines.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The tokens of the definitions that sentences belong to, each once.
    pub fn definitions(&self) -> &[Vec<u32>] {
        &self.definitions
    }

    /// What shorter sequences are padded with.
    pub(crate) fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The SHA-256 of all examples in their order, in hexadecimal, wherever they come from.
    pub(crate) fn digest(&self) -> &str {
        self.digest.get_or_init(|| {
            let mut hash = Sha256::new();
            for example in &self.examples {
                let definition = example.definition.and_then(|place| self.definitions.get(place));
                let labels = example.labels.as_ref();
                let part =
                    |length: Option<usize>| length.map_or(u64::MAX, |length| length as u64).to_le_bytes();
                hash.update(part(Some(example.input_ids.len())));
                hash.update(part(labels.map(Vec::len)));
                hash.update(part(definition.map(Vec::len)));
                let ids = example.input_ids.iter().chain(definition.into_iter().flatten());
                ids.for_each(|id| hash.update(id.to_le_bytes()));
                let labels = labels.into_iter().flatten();
                labels.for_each(|label| hash.update(label.to_le_bytes()));
            }
            hex(hash)
        })
    }

    /// The examples at `indices` as one batch, in which each token predicts the next one's label.
    ///
    /// # Errors
    ///
    /// [`Error::Dataset`] if none of them has a target.
    pub fn batch(&self, indices: &[usize]) -> Result<Batch> {
        let examples: Vec<&Example> = indices
            .iter()
            .filter_map(|index| self.examples.get(*index))
            .collect();
        Batch::new(&examples, self.pad_id).ok_or_else(|| self.no_target(indices))
    }

    pub(crate) fn no_target(&self, indices: &[usize]) -> Error {
        let path = self.path_of(indices.first().copied().unwrap_or_default());
        let several = indices.iter().any(|index| self.path_of(*index) != path);
        Error::Dataset {
            path: path.to_owned(),
            reason: format!(
                "{} have no target: every label is {IGNORED}",
                self.shown_lines(indices, several)
            ),
        }
    }

    /// The lines of some examples, for messages; with their files, if there are several.
    pub fn lines_of(&self, indices: &[usize]) -> String {
        self.shown_lines(indices, self.files.len() > 1)
    }

    fn shown_lines(&self, indices: &[usize], with_files: bool) -> String {
        let shown: Vec<usize> = indices.iter().copied().take(MOST_LINES).collect();
        let lines = |indices: &[usize]| {
            let examples = indices.iter().filter_map(|index| self.examples.get(*index));
            let lines: Vec<String> = examples.map(|example| example.line.to_string()).collect();
            format!("lines {}", lines.join(", "))
        };
        let text = if with_files {
            let of_one_file = shown.chunk_by(|a, b| self.path_of(*a) == self.path_of(*b));
            let parts = of_one_file.map(|part| {
                let path = self.path_of(part.first().copied().unwrap_or_default());
                format!("{} of {}", lines(part), path.display())
            });
            parts.collect::<Vec<_>>().join(", ")
        } else {
            lines(&shown)
        };
        let more = if indices.len() > shown.len() { ", …" } else { "" };
        text + more
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MODEL: InputSpec = InputSpec {
        vocab_size: 10,
        max_length: 8,
        pad_token_id: None,
    };

    /// A data set of files with these contents, `0.jsonl`, `1.jsonl` and so on.
    fn read(contents: &[&str]) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..contents.len())
            .map(|number| dir.path().join(format!("{number}.jsonl")))
            .collect();
        for (path, content) in paths.iter().zip(contents) {
            fs::write(path, content).unwrap();
        }
        Dataset::read_all(&paths, &Vocabulary::of_model(dir.path()), MODEL, None)
    }

    #[test]
    fn files_follow_each_other_and_messages_name_them() {
        let [a, b, ignored] = [
            r#"{"input_ids": [1, 2]}"#,
            r#"{"input_ids": [3, 4]}"#,
            r#"{"input_ids": [5, 6], "labels": [-100, -100]}"#,
        ];
        let data = read(&[&format!("{a}\n\n{b}\n"), a, &format!("{ignored}\n{ignored}\n")]).unwrap();
        let first: Vec<u32> = data
            .examples()
            .iter()
            .map(|example| example.input_ids[0])
            .collect();
        assert_eq!(first, [1, 3, 1, 5, 5]);
        let files =
            [0, 1, 2, 3, 4, 9].map(|index| data.path_of(index).file_name().unwrap().to_str().unwrap());
        assert_eq!(
            files,
            ["0.jsonl", "0.jsonl", "1.jsonl", "2.jsonl", "2.jsonl", "2.jsonl"]
        );
        let lines = data.lines_of(&[0, 1, 2, 4]);
        let [zero, one, two] = [0, 2, 4].map(|index| data.path_of(index).display());
        assert_eq!(
            lines,
            format!("lines 1, 3 of {zero}, lines 1 of {one}, lines 2 of {two}")
        );
        assert!(data.lines_of(&[1; 9]).ends_with(", …"));
        let error = data.batch(&[3, 4]).unwrap_err().to_string();
        assert!(error.contains("2.jsonl: lines 1, 2 have no target"), "{error}");

        let single = read(&[&format!("{a}\n{b}\n")]).unwrap();
        assert_eq!(single.lines_of(&[1, 0]), "lines 2, 1");
        let bad = r#"{"input_ids": [1, 10]}"#;
        let error = read(&[a, &format!("{b}\n{bad}")]).unwrap_err().to_string();
        assert!(error.contains("1.jsonl, line 2: input_ids[1] is 10"), "{error}");
        let error = read(&[a, "\n"]).unwrap_err().to_string();
        assert!(error.contains("1.jsonl: holds no example"), "{error}");
        assert!(matches!(read(&[]), Err(Error::Setting(_))));
    }

    #[test]
    fn the_digest_is_of_the_examples_in_their_order() {
        let [a, b] = [r#"{"input_ids": [1, 2]}"#, r#"{"input_ids": [3, 4, 5]}"#];
        let digest = |contents: &[&str]| read(contents).unwrap().digest().to_owned();
        let whole = digest(&[&format!("{a}\n{b}")]);
        assert_eq!(digest(&[a, b]), whole);
        for other in [
            &[b, a][..],
            &[a],
            &[a, b, b],
            &[a, r#"{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}"#],
            &[a, r#"{"input_ids": [3, 4], "definition_ids": [5, 6]}"#],
            &[a, r#"{"input_ids": [3, 4, 6]}"#],
        ] {
            assert_ne!(digest(other), whole, "{other:?}");
        }
    }

    #[test]
    fn definitions_of_several_files_are_one_list() {
        let line = |id: u32, definition: &str| {
            format!(r#"{{"input_ids": [{id}, 1], "definition_ids": {definition}}}"#)
        };
        let data = read(&[
            &line(1, "[7, 8]"),
            &format!("{}\n{}", line(2, "[8, 9]"), line(3, "[7, 8]")),
        ])
        .unwrap();
        assert_eq!(data.definitions(), [vec![7, 8], vec![8, 9]]);
        let places: Vec<_> = data.examples().iter().map(|example| example.definition).collect();
        assert_eq!(places, [Some(0), Some(1), Some(0)]);
    }
}

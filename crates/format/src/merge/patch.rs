//! Rows at their places in files.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use trainable_tokens_core::TokenId;

use crate::error::{Error, Result};
use crate::file::SafetensorsFile;

/// New bytes by file and by where they start in it.
#[derive(Default)]
pub(super) struct Patches {
    by_file: BTreeMap<PathBuf, BTreeMap<usize, Patch>>,
}

struct Patch {
    slot: usize,
    bytes: Vec<u8>,
}

impl Patches {
    pub(super) fn insert(
        &mut self,
        path: &Path,
        start: usize,
        id: TokenId,
        slot: usize,
        bytes: &[u8],
    ) -> Result<()> {
        let file = self.by_file.entry(path.to_owned()).or_default();
        let bytes = bytes.to_vec();
        match file.insert(start, Patch { slot, bytes }) {
            None => Ok(()),
            Some(first) => Err(Error::Core(trainable_tokens_core::Error::DuplicateToken {
                id,
                first: first.slot,
                second: slot,
            })),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_file.values().map(BTreeMap::len).sum()
    }

    pub(super) fn touch(&self, path: &Path) -> bool {
        self.by_file.contains_key(path)
    }

    /// Writes the file's bytes with the patches in their places.
    pub(super) fn write(&self, file: &SafetensorsFile, out: &mut dyn Write) -> io::Result<()> {
        let mut at = 0;
        for (start, patch) in self.by_file.get(file.path()).into_iter().flatten() {
            out.write_all(file.bytes_at(at..*start))?;
            out.write_all(&patch.bytes)?;
            at = start + patch.bytes.len();
        }
        out.write_all(file.bytes_at(at..file.content().len()))?;
        out.flush()
    }
}

//! What a frozen table is, in 32 bytes.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use trainable_tokens_core::{EmbeddingSource, TokenId};

/// About how many bytes of a table are read at a time.
const CHUNK_BYTES: usize = 1 << 20;
const ALGORITHM: &str = "sha256:";

/// The SHA-256 of a table's little-endian bytes, row-major, in its own element type. Written `sha256:<hex>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TableDigest([u8; 32]);

impl TableDigest {
    /// The digest of bytes as they lie in a file.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Digests a table through its rows, about 1 MiB at a time: an array in memory and the file it came from have the
/// same digest.
///
/// # Errors
///
/// Those of reading rows.
pub fn digest<S: EmbeddingSource>(source: &S) -> Result<TableDigest, S::Error> {
    let row_bytes = source.embedding_dim() * source.dtype().size_in_bytes();
    let rows_per_chunk = (CHUNK_BYTES / row_bytes.max(1)).max(1);
    let mut hash = Sha256::new();
    let mut ids = (0..=u32::MAX).map(TokenId).take(source.vocab_size());
    loop {
        let chunk: Vec<_> = ids.by_ref().take(rows_per_chunk).collect();
        if chunk.is_empty() {
            return Ok(TableDigest(hash.finalize().into()));
        }
        hash.update(source.read_rows(&chunk)?.to_le_bytes());
    }
}

impl fmt::Display for TableDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ALGORITHM)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TableDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not sha256: and 64 hexadecimal digits")]
pub struct InvalidDigest(String);

impl FromStr for TableDigest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let invalid = || InvalidDigest(text.chars().take(80).collect());
        let hex = text.strip_prefix(ALGORITHM).ok_or_else(invalid)?;
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_round_trips() {
        let digest = TableDigest::of_bytes(b"abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
        for bad in ["", "md5:00", &text[..70], "sha256:+1é", &text.replace('b', "+")] {
            assert!(bad.parse::<TableDigest>().is_err(), "{bad}");
        }
    }
}

//! Digests as text.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// A SHA-256 in hexadecimal.
pub(crate) fn hex(hash: Sha256) -> String {
    let mut text = String::new();
    for byte in hash.finalize() {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

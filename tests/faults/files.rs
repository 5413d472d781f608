//! Files: F5, F8, F14 to F17 and F19.

use trainable_tokens::TokenRows;
use trainable_tokens::format::Adapter;

use crate::layer::fixtures;

/// The rows of an adapter of PEFT's.
pub(crate) fn rows(dir: &str) -> TokenRows {
    let adapter = Adapter::read(fixtures().join(dir)).unwrap();
    adapter.modules()[0].rows().clone()
}

//! A proof that training leaves the frozen table as it is.

use trainable_tokens_core::{EmbeddingSource, TokenId};
use trainable_tokens_format::Checkpoint;

use super::Trainer;
use crate::Result;

impl Trainer {
    /// The largest absolute difference between any row of the frozen table and the checkpoint it was loaded from.
    /// Training never writes the table, so this is 0; it is compared, not assumed.
    ///
    /// # Errors
    ///
    /// Those of reading either table.
    pub fn largest_base_change(&self, checkpoint: &Checkpoint) -> Result<f64> {
        const ROWS_AT_A_TIME: u32 = 4096;
        let module = self.model.embedding_module();
        let (table, origin) = (
            self.model.embedding().table(),
            checkpoint.table(&format!("{}.weight", checkpoint.module_name(&module)))?,
        );
        let vocab_size = u32::try_from(table.vocab_size()).unwrap_or(u32::MAX);
        let mut largest: f64 = 0.0;
        let mut start = 0;
        while start < vocab_size {
            let end = vocab_size.min(start + ROWS_AT_A_TIME);
            let ids: Vec<TokenId> = (start..end).map(TokenId).collect();
            let (now, before) = (
                table.read_rows(&ids)?,
                origin.read_rows(&ids)?.to_dtype(table.dtype()),
            );
            if !now.bits_eq(&before) {
                let difference = |(now, before): (f64, f64)| {
                    if now.to_bits() == before.to_bits() {
                        0.0
                    } else {
                        (now - before).abs()
                    }
                };
                let differences = now
                    .to_f64_vec()
                    .into_iter()
                    .zip(before.to_f64_vec())
                    .map(difference);
                largest = differences.fold(largest, |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
            }
            start = end;
        }
        Ok(largest)
    }
}

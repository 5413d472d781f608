//! The rows of a batch, gathered in host memory.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use crate::{DType, Element, Error, LookupPlan, Result, RowRef, RowTransform, Slot, TokenId};

/// How the rows of a planned batch come about in host memory: at each position the frozen row or the trained one that
/// replaces it, as the table would hold it, then transformed.
#[derive(Clone, Copy)]
pub struct Gather<'a, F, R> {
    /// Which rows.
    pub plan: &'a LookupPlan,
    /// Length of a row (`D`).
    pub embedding_dim: usize,
    /// The table's element type.
    pub dtype: DType,
    /// What becomes of each row.
    pub transform: RowTransform,
    /// The rows of the table.
    pub frozen: F,
    /// The trained rows, if there are any.
    pub trained: Option<R>,
}

impl<'a, F, R> Gather<'a, F, R>
where
    F: Fn(TokenId) -> Option<RowRef<'a>> + Sync,
    R: Fn(Slot) -> Option<RowRef<'a>> + Sync,
{
    /// The rows `[N, D]` in new memory.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] if there is no row for an id or its slot.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let len = self.plan.len() * self.embedding_dim;
        if threads(len * size_of::<T>()) > 1 {
            let mut out = T::zeros(len);
            fill_rows(&mut out, self.embedding_dim, |first, out| {
                self.write_from(first, out)
            })?;
            return Ok(out);
        }
        let mut out = Vec::with_capacity(len);
        let as_they_are = self.transform.is_identity();
        self.each(0..self.plan.len(), |_, row, trained| {
            if as_they_are && (!trained || row.dtype() == self.dtype) {
                row.extend_into(&mut out);
            } else {
                let start = out.len();
                out.resize(start + self.embedding_dim, T::default());
                self.write(row, trained, &mut out[start..]);
            }
        })?;
        Ok(out)
    }

    /// Writes rows to `out`, from that at position `first` on and as many as it has room for. Allocates nothing.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] if there is no row for an id or its slot.
    pub fn write_from<T: Element>(&self, first: usize, out: &mut [T]) -> Result<()> {
        let dim = self.embedding_dim;
        let room = out.len().checked_div(dim).unwrap_or(usize::MAX);
        let end = self.plan.len().min(first.saturating_add(room));
        self.each(first..end, |at, row, trained| {
            self.write(row, trained, &mut out[at * dim..][..dim]);
        })
    }

    /// Hands over the row at each of `positions`, numbered from 0, and whether it is a trained one.
    #[inline]
    fn each(&self, positions: Range<usize>, mut take: impl FnMut(usize, RowRef<'a>, bool)) -> Result<()> {
        let (hits, slots) = (self.plan.positions(), self.plan.slots());
        let first = hits.partition_point(|hit| (*hit as usize) < positions.start);
        let mut live = hits[first..].iter().zip(&slots[first..]).peekable();
        let start = positions.start;
        for (at, &id) in self.plan.input_ids()[positions].iter().enumerate() {
            let hit = live.next_if(|(hit, _)| **hit as usize == start + at);
            let found = match (hit, &self.trained) {
                (Some((_, slot)), Some(trained)) => trained(Slot(*slot as usize)).map(|row| (row, true)),
                _ => (self.frozen)(TokenId(id)).map(|row| (row, false)),
            };
            let Some((row, trained)) = found else {
                return Err(Error::TokenOutOfRange {
                    id: i64::from(id),
                    vocab_size: self.plan.vocab_size(),
                });
            };
            take(at, row, trained);
        }
        Ok(())
    }

    /// Writes one row.
    #[inline]
    fn write<T: Element>(&self, row: RowRef<'a>, trained: bool, out: &mut [T]) {
        if trained {
            row.decode_rounded(self.dtype, out);
        } else {
            row.decode_into(out);
        }
        self.transform.apply(out);
    }
}

/// Fills memory that nobody has touched yet with rows of length `dim`: `write` gets the number of the first row of a part
/// and the part. Of more than some megabytes, the parts are filled side by side: the time goes into the system's
/// making of pages, which a second thread halves.
///
/// # Errors
///
/// That of a part that fails; others may have been filled.
pub fn fill_rows<T: Send, E: Send>(
    out: &mut [T],
    dim: usize,
    write: impl Fn(usize, &mut [T]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let threads = threads(size_of_val(out));
    if threads == 1 {
        return write(0, out);
    }
    let dim = dim.max(1);
    let rows = (out.len() / dim).div_ceil(threads).max(1);
    let parts = Mutex::new(out.chunks_mut(rows * dim).enumerate());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    // Whoever is there takes the next part, so that a thread that cannot be had is none that is missed.
    let work = || {
        while let Some((part, out)) = next() {
            write(part * rows, out)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).filter_map(spawn).collect();
        others.into_iter().fold(work(), |result, other| {
            let other = other.join().unwrap_or_else(|panic| resume_unwind(panic));
            result.and(other)
        })
    })
}

/// Bytes from which on a second thread pays.
const PARALLEL_BYTES: usize = 8 << 20;
/// More threads than these wait for each other in the system's memory management.
const MOST_THREADS: usize = 4;

/// How many threads to fill so many bytes with.
fn threads(bytes: usize) -> usize {
    static AVAILABLE: OnceLock<usize> = OnceLock::new();
    if bytes < PARALLEL_BYTES {
        return 1;
    }
    *AVAILABLE.get_or_init(|| thread::available_parallelism().map_or(1, |it| it.get().min(MOST_THREADS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EmbedScale, HostTable, LayerOptions, TokenRows, TokenSet};

    const DIM: usize = 512;

    fn rows(num_rows: usize, salt: f32) -> TokenRows {
        let values: Vec<f32> = (0..num_rows * DIM).map(|at| at as f32 * 0.25 + salt).collect();
        TokenRows::new(values, num_rows, DIM).unwrap()
    }

    /// Few rows, and so many that several threads fill them.
    #[test]
    fn rows_come_out_in_their_order() {
        let (table, trained) = (rows(50, 0.0), rows(2, 0.125));
        let tokens = TokenSet::new([7, 49], 50).unwrap();
        for (len, scale) in [(3u32, None), (9_000, None), (9_000, Some(EmbedScale::Exact(0.5)))] {
            let options = LayerOptions {
                scale,
                ..LayerOptions::default()
            };
            let ids: Vec<u32> = (0..len).map(|at| at * 7 % 50).collect();
            let plan = LookupPlan::new(&tokens, options, &ids).unwrap();
            let gather = Gather {
                plan: &plan,
                embedding_dim: DIM,
                dtype: DType::F32,
                transform: options.transform(DType::F32),
                frozen: |id| HostTable::row(&table, id),
                trained: Some(|slot: Slot| trained.row(slot.0)),
            };
            let got = gather.to_vec::<f32>().unwrap();
            assert_eq!(got.len(), ids.len() * DIM);
            for (id, got) in ids.iter().zip(got.chunks_exact(DIM)) {
                let want = match tokens.slot(TokenId(*id)) {
                    Some(Slot(slot)) => trained.row(slot),
                    None => table.row(*id as usize),
                };
                let mut want_values = [0f32; DIM];
                want.unwrap().decode_into(&mut want_values);
                options.transform(DType::F32).apply(&mut want_values);
                assert_eq!(got, want_values);
            }
            let mut tail = vec![0f32; 2 * DIM];
            gather.write_from(ids.len() - 2, &mut tail).unwrap();
            assert_eq!(tail, got[got.len() - 2 * DIM..]);
        }
    }

    #[test]
    fn a_missing_row_is_an_error_in_every_part() {
        let tokens = TokenSet::new([7], 50).unwrap();
        for (at, len) in [(0, 1), (0, 9_000), (8_999, 9_000)] {
            let mut ids = vec![1; len];
            ids[at] = 40;
            let plan = LookupPlan::new(&tokens, LayerOptions::default(), &ids).unwrap();
            let table = rows(9, 0.0);
            let gather = Gather {
                plan: &plan,
                embedding_dim: DIM,
                dtype: DType::F32,
                transform: RowTransform::default(),
                frozen: |id| HostTable::row(&table, id),
                trained: None::<fn(Slot) -> Option<RowRef<'static>>>,
            };
            let (id, vocab_size) = (40, 50);
            assert_eq!(
                gather.to_vec::<f32>(),
                Err(Error::TokenOutOfRange { id, vocab_size })
            );
        }
    }
}

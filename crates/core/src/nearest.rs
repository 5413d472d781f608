//! The rows of a table that point the same way.

use std::num::NonZero;
use std::ops::Range;
use std::panic::resume_unwind;
use std::thread;

use crate::{EmbeddingSource, Error, Result, TokenId, TokenRows};

/// Elements of the table that a thread reads at a time.
const BLOCK: usize = 1 << 18;

/// A row of a table, and how near it is to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbour {
    /// The token of the row.
    pub id: TokenId,
    /// The cosine of the angle between the two.
    pub cosine: f64,
}

/// For each of `rows`, `[k, D]`, the `count` rows of a table with the largest cosine to it, the nearest first and of
/// equally near ones the lower id first. Row `i` is that of token `ids[i]`, which is not its own neighbour.
///
/// Rows of zeros and rows that are not finite are near nothing. The table is read once, a block at a time; the time is
/// `k * V * D`, shared among threads.
///
/// # Errors
///
/// [`Error::Shape`] unless there is one id per row and the rows are as long as the table's; the table's errors.
pub fn nearest_rows<S: EmbeddingSource + Sync + ?Sized>(
    source: &S,
    ids: &[TokenId],
    rows: &TokenRows,
    count: usize,
) -> Result<Vec<Vec<Neighbour>>, S::Error>
where
    S::Error: Send,
{
    if ids.len() != rows.num_rows() {
        return Err(Error::shape("tokens of the rows", &[rows.num_rows()], &[ids.len()]).into());
    }
    rows.expect_shape("rows to find neighbours of", ids.len(), source.embedding_dim())?;
    let queries: Vec<Vec<f64>> = rows
        .to_f64_vec()
        .chunks_exact(source.embedding_dim().max(1))
        .map(unit)
        .collect();
    let vocab_size = u32::try_from(source.vocab_size()).unwrap_or(u32::MAX);
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let height = vocab_size.div_ceil(u32::try_from(threads).unwrap_or(1)).max(1);
    let parts = (0..vocab_size).step_by(height as usize);
    let parts: Vec<_> = parts
        .map(|start| start..vocab_size.min(start.saturating_add(height)))
        .collect();
    let nearest = |part: Range<u32>| nearest_of(source, part, ids, &queries, count);
    let found: Vec<Result<Vec<Vec<Neighbour>>, S::Error>> = thread::scope(|scope| {
        let threads: Vec<_> = parts
            .into_iter()
            .map(|part| scope.spawn(|| nearest(part)))
            .collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.collect()
    });
    let mut all = vec![Vec::new(); ids.len()];
    for part in found {
        for (best, neighbours) in all.iter_mut().zip(part?) {
            neighbours
                .into_iter()
                .for_each(|neighbour| insert(best, neighbour, count));
        }
    }
    Ok(all)
}

/// The nearest among some rows of the table.
fn nearest_of<S: EmbeddingSource + ?Sized>(
    source: &S,
    part: Range<u32>,
    ids: &[TokenId],
    queries: &[Vec<f64>],
    count: usize,
) -> Result<Vec<Vec<Neighbour>>, S::Error> {
    let dim = source.embedding_dim().max(1);
    let all: Vec<TokenId> = part.map(TokenId).collect();
    let mut found = vec![Vec::new(); queries.len()];
    for some in all.chunks((BLOCK / dim).max(1)) {
        let rows = source.read_rows(some)?.to_f64_vec();
        for (id, row) in some.iter().zip(rows.chunks_exact(dim)) {
            let norm = dot(row, row).sqrt();
            for ((own, query), best) in ids.iter().zip(queries).zip(&mut found) {
                let cosine = dot(query, row) / norm;
                if own != id && cosine.is_finite() {
                    insert(best, Neighbour { id: *id, cosine }, count);
                }
            }
        }
    }
    Ok(found)
}

/// Puts a neighbour into its place among the best, whose ids are all lower.
fn insert(best: &mut Vec<Neighbour>, neighbour: Neighbour, count: usize) {
    let place = best.partition_point(|other| other.cosine >= neighbour.cosine);
    if place < count {
        best.insert(place, neighbour);
        best.truncate(count);
    }
}

fn unit(row: &[f64]) -> Vec<f64> {
    let norm = dot(row, row).sqrt();
    row.iter().map(|x| x / norm).collect()
}

/// Sums in lanes, which a compiler turns into vector instructions.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_those_of_the_definition() {
        // Rows on a circle, but for one of zeros and one that is no number.
        let dim = 11;
        let mut table = Vec::new();
        for id in 0..500 {
            let mut row = vec![0.0f64; dim];
            let angle = f64::from(id) * 0.7;
            (row[0], row[9]) = (angle.cos() * f64::from(id + 1), angle.sin() * f64::from(id + 1));
            table.extend(row);
        }
        table[3 * dim..4 * dim].fill(0.0);
        table[7 * dim] = f64::NAN;
        let source = TokenRows::new(table.clone(), 500, dim).unwrap();
        let ids = [TokenId(499), TokenId(3), TokenId(20)];
        let rows = source.read_rows(&ids).unwrap();
        let found = nearest_rows(&source, &ids, &rows, 4).unwrap();
        let row = |id: usize| &table[id * dim..(id + 1) * dim];
        for (own, found) in ids.iter().zip(&found) {
            let cosine = |id: usize| {
                let (a, b) = (row(own.row()), row(id));
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
            };
            let mut all: Vec<_> = (0..500)
                .filter(|id| *id != own.row())
                .map(|id| (id, cosine(id)))
                .filter(|(_, cosine)| cosine.is_finite())
                .collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            assert_eq!(found.len(), all.len().min(4));
            for (found, (_, cosine)) in found.iter().zip(&all) {
                assert!((found.cosine - cosine).abs() < 1e-12, "{found:?} {cosine}");
            }
        }
        assert_eq!(found[1], [], "a row of zeros is near nothing");
    }

    #[test]
    fn equally_near_rows_come_by_their_ids() {
        let source = TokenRows::new(vec![1.0f32; 9 * 2], 9, 2).unwrap();
        let rows = source.read_rows(&[TokenId(4)]).unwrap();
        let found = nearest_rows(&source, &[TokenId(4)], &rows, 5).unwrap();
        assert_eq!(
            found[0].iter().map(|found| found.id.0).collect::<Vec<_>>(),
            [0, 1, 2, 3, 5]
        );
        assert!(nearest_rows(&source, &[], &rows, 5).is_err());
    }
}

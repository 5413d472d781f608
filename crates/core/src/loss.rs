//! Cross-entropy without a matrix of all logits: what backends share.

mod cap;
mod exponential;
mod online;
mod options;
mod row;

use std::ops::Range;
use std::thread;

use num_traits::Float;

use self::cap::Cap;
use self::row::Row;
use crate::{Element, Error, Result};

pub use online::OnlineSoftmax;
pub use options::{CrossEntropyOptions, IGNORED_LABEL, LogitsChunk, Reduction, Softcap};

/// Fewer logits than these are not worth a thread.
const LOGITS_PER_THREAD: usize = 1 << 16;

/// The labels of one batch: which rows of hidden states count, what they must predict, and in which chunks.
///
/// A row whose label is ignored is in no chunk: it costs nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropyPlan {
    options: CrossEntropyOptions,
    vocab_size: usize,
    num_rows: usize,
    positions: Vec<u32>,
    labels: Vec<u32>,
}

impl CrossEntropyPlan {
    /// Plans the loss of `labels`, one for each row of hidden states: the id that the row must predict, or one that is
    /// ignored.
    ///
    /// # Errors
    ///
    /// [`Error::LabelOutOfRange`] naming the first label that is neither ignored nor a token; [`Error::AllIgnored`] for the
    /// mean over no label; [`Error::Shape`] for more labels than 32 bits can count.
    pub fn new(labels: &[i64], vocab_size: usize, options: CrossEntropyOptions) -> Result<Self> {
        let num_rows = labels.len();
        let most = u32::MAX as usize;
        if num_rows > most {
            return Err(Error::shape("labels", &[most], &[num_rows]));
        }
        let ignored = |label: i64| label == IGNORED_LABEL || options.ignore_index == Some(label);
        let mut plan = Self {
            options,
            vocab_size,
            num_rows,
            positions: Vec::with_capacity(num_rows),
            labels: Vec::with_capacity(num_rows),
        };
        for (position, label) in (0u32..).zip(labels).filter(|(_, label)| !ignored(**label)) {
            let in_range = u32::try_from(*label).ok();
            let id = in_range.filter(|id| (*id as usize) < vocab_size);
            plan.labels.push(id.ok_or(Error::LabelOutOfRange {
                position: position as usize,
                id: *label,
                vocab_size,
            })?);
            plan.positions.push(position);
        }
        match options.reduction {
            Reduction::Mean if plan.labels.is_empty() => Err(Error::AllIgnored { num_rows }),
            _ => Ok(plan),
        }
    }

    /// Softcap, reduction and the other settings.
    pub fn options(&self) -> CrossEntropyOptions {
        self.options
    }

    /// The number of labels, ignored ones too: of rows of hidden states.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Tokens that a label may name: the length of a row of logits.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The rows that count, ascending.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The label of each of [`positions`](Self::positions).
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// What each row's loss is multiplied by in the sum: 1, or for a mean one part of the rows that count.
    pub fn factor(&self) -> f64 {
        match self.options.reduction {
            Reduction::Mean => 1.0 / self.labels.len() as f64,
            Reduction::Sum => 1.0,
        }
    }

    /// Ranges of [`positions`](Self::positions) whose logits exist at once, for logits of `size` bytes each: as few as the
    /// options allow, about equally long.
    pub fn chunks(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (n, rows) = (self.labels.len(), self.max_chunk(size));
        let count = n.div_ceil(rows);
        (0..count).map(move |i| i * n / count..(i + 1) * n / count)
    }

    /// The rows of the longest of [`chunks`](Self::chunks).
    pub fn longest_chunk(&self, size: usize) -> usize {
        self.chunks(size).map(|chunk| chunk.len()).max().unwrap_or(0)
    }

    fn max_chunk(&self, size: usize) -> usize {
        let row_bytes = self.vocab_size.saturating_mul(size);
        self.options.chunk.max_rows(row_bytes)
    }

    /// Checks the shape of hidden states `[rows, columns]` for a table whose rows are `dim` long.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`].
    pub fn expect_hidden(&self, [rows, columns]: [usize; 2], dim: usize) -> Result<()> {
        if [rows, columns] == [self.num_rows, dim] {
            return Ok(());
        }
        let expected = [self.num_rows, dim];
        Err(Error::shape(
            "hidden states of the loss",
            &expected,
            &[rows, columns],
        ))
    }

    /// The loss of a chunk, times [`factor`](Self::factor), from its logits `[chunk.len(), V]`, row-major, which hold the
    /// capped logits afterwards. Rows are spread over at most `threads` threads.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not as many logits.
    pub fn loss<C: Float + Element>(
        &self,
        chunk: Range<usize>,
        logits: &mut [C],
        threads: usize,
    ) -> Result<f64> {
        self.for_rows(chunk, logits, threads, None)
    }

    /// As [`loss`](Self::loss), but the logits become the gradient of the result times `upstream`, softcap and factor
    /// included.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not as many logits.
    pub fn differentiate<C: Float + Element>(
        &self,
        chunk: Range<usize>,
        logits: &mut [C],
        upstream: f64,
        threads: usize,
    ) -> Result<f64> {
        self.for_rows(chunk, logits, threads, Some(self.factor() * upstream))
    }

    /// The sum of the rows' losses times the factor; logits become the gradient of `gradient_of` times the sum, if asked.
    fn for_rows<C: Float + Element>(
        &self,
        chunk: Range<usize>,
        logits: &mut [C],
        threads: usize,
        gradient_of: Option<f64>,
    ) -> Result<f64> {
        let labels = self.labels.get(chunk.clone()).unwrap_or_default();
        let got = logits.len();
        if labels.len() != chunk.len() || Some(got) != labels.len().checked_mul(self.vocab_size) {
            let expected = [chunk.len(), self.vocab_size];
            return Err(Error::shape("logits of a chunk", &expected, &[got]));
        }
        if labels.is_empty() {
            return Ok(0.0);
        }
        let cap = Cap::new(self.options.softcap);
        let vocab_size = self.vocab_size;
        let sum = |logits: &mut [C], labels: &[u32]| -> f64 {
            let rows = logits.chunks_exact_mut(vocab_size).zip(labels);
            let losses = rows.map(|(row, label)| {
                let row = Row::new(row, *label as usize, cap);
                match gradient_of {
                    None => row.loss(),
                    Some(factor) => row.differentiate(factor),
                }
            });
            losses.sum()
        };
        let parts = threads.min(labels.len()).min(got / LOGITS_PER_THREAD).max(1);
        let rows = labels.len().div_ceil(parts);
        let sums = thread::scope(|scope| {
            let parts = logits.chunks_mut(rows * vocab_size).zip(labels.chunks(rows));
            let (mut parts, sum) = (parts, &sum);
            let first = parts.next();
            let others: Vec<_> = parts
                .map(|(logits, labels)| scope.spawn(move || sum(logits, labels)))
                .collect();
            let first = first.map_or(0.0, |(logits, labels)| sum(logits, labels));
            let join = |part: thread::ScopedJoinHandle<'_, f64>| {
                part.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            others.into_iter().map(join).fold(first, |sum, part| sum + part)
        });
        Ok(sums * self.factor())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> CrossEntropyOptions {
        CrossEntropyOptions::default()
    }

    fn noise(len: usize, seed: u32) -> Vec<f64> {
        let value = |i: u32| (f64::from(i * 37 + seed) * 0.7713).sin() * 5.0;
        (0u32..).take(len).map(value).collect()
    }

    /// The definition, of rows in `f64`.
    fn dense(logits: &[f64], labels: &[i64], v: usize, options: CrossEntropyOptions) -> f64 {
        let ignored = |label: &i64| *label == -100 || Some(*label) == options.ignore_index;
        let rows = logits.chunks(v).zip(labels).filter(|(_, label)| !ignored(label));
        let cap = |x: f64| {
            options
                .softcap
                .map_or(x, |cap| cap.get() * (x / cap.get()).tanh())
        };
        let losses: Vec<f64> = rows
            .map(|(row, label)| {
                let sum: f64 = row.iter().map(|x| cap(*x).exp()).sum();
                sum.ln() - cap(row[usize::try_from(*label).unwrap()])
            })
            .collect();
        let sum: f64 = losses.iter().sum();
        match options.reduction {
            Reduction::Mean => sum / losses.len() as f64,
            Reduction::Sum => sum,
        }
    }

    /// Loss and gradient by the plan, chunk by chunk; rows that are ignored get zeros.
    fn fused(
        logits: &[f64],
        labels: &[i64],
        v: usize,
        options: CrossEntropyOptions,
        threads: usize,
    ) -> (f64, f64, Vec<f64>) {
        let plan = CrossEntropyPlan::new(labels, v, options).unwrap();
        let (mut loss, mut only, mut gradient) = (0.0, 0.0, vec![0.0; logits.len()]);
        for chunk in plan.chunks(8) {
            let positions = &plan.positions()[chunk.clone()];
            let rows = positions.iter().map(|at| &logits[*at as usize * v..][..v]);
            let mut rows: Vec<f64> = rows.flatten().copied().collect();
            only += plan.loss(chunk.clone(), &mut rows.clone(), threads).unwrap();
            loss += plan
                .differentiate(chunk.clone(), &mut rows, 1.0, threads)
                .unwrap();
            for (at, row) in positions.iter().zip(rows.chunks(v)) {
                gradient[*at as usize * v..][..v].copy_from_slice(row);
            }
        }
        (loss, only, gradient)
    }

    #[test]
    fn loss_and_gradient_are_those_of_the_definition() {
        let (n, v) = (7, 19);
        let labels = [3, -100, 0, 18, 5, 3, 7];
        for softcap in [None, Some(Softcap::new(3.0).unwrap())] {
            for (reduction, ignore_index) in [(Reduction::Mean, None), (Reduction::Sum, Some(5))] {
                for rows in [1, 2, n, n + 1] {
                    let options = CrossEntropyOptions {
                        softcap,
                        reduction,
                        ignore_index,
                        chunk: LogitsChunk::rows(rows).unwrap(),
                    };
                    let mut logits = noise(n * v, 1);
                    let (loss, only, gradient) = fused(&logits, &labels, v, options, 1);
                    let want = dense(&logits, &labels, v, options);
                    assert!((loss - want).abs() < 1e-12, "{loss} {want}");
                    assert!((only - want).abs() < 1e-12, "{only} {want}");
                    for at in 0..n * v {
                        let (x, step) = (logits[at], 1e-6);
                        let [up, down] = [x + step, x - step].map(|x| {
                            logits[at] = x;
                            dense(&logits, &labels, v, options)
                        });
                        logits[at] = x;
                        let want = (up - down) / (2.0 * step);
                        assert!(
                            (gradient[at] - want).abs() < 1e-8,
                            "{at}: {} {want}",
                            gradient[at]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn threads_change_nothing_but_rounding() {
        let (n, v) = (9, LOGITS_PER_THREAD / 2);
        let labels = [3, 1, 0, 18, 5, 3, 7, 8, -100];
        let logits = noise(n * v, 3);
        let (want, _, gradient) = fused(&logits, &labels, v, options(), 1);
        for threads in [2, 3, 100] {
            let (loss, only, spread) = fused(&logits, &labels, v, options(), threads);
            assert!((loss - want).abs() < 1e-12 && (only - want).abs() < 1e-12);
            assert_eq!(spread, gradient);
        }
    }

    #[test]
    fn a_large_logit_does_not_overflow() {
        let plan = CrossEntropyPlan::new(&[1], 3, options()).unwrap();
        let mut logits = [1000.0f32, 998.0, -1000.0];
        let loss = plan.differentiate(0..1, &mut logits, -2.0, 1).unwrap();
        assert!((loss - 2.126_928_011).abs() < 1e-6, "{loss}");
        assert!(
            (f64::from(logits[0]) + 2.0 * 0.880_797).abs() < 1e-6,
            "{logits:?}"
        );
        assert_eq!(logits[2], 0.0);
        for odd in [f32::NAN, f32::INFINITY] {
            let mut logits = [0.0, odd, 1.0];
            assert!(plan.differentiate(0..1, &mut logits, 1.0, 1).unwrap().is_nan());
        }
    }

    #[test]
    fn chunks_cover_the_rows_that_count() {
        let labels: Vec<i64> = (0..130).map(|i| if i % 13 == 0 { -100 } else { i }).collect();
        let bytes = |bytes| CrossEntropyOptions {
            chunk: LogitsChunk::bytes(bytes).unwrap(),
            ..options()
        };
        for (budget, chunks, longest) in [(1, 120, 1), (130 * 4 * 100, 2, 60), (1 << 20, 1, 120)] {
            let plan = CrossEntropyPlan::new(&labels, 130, bytes(budget)).unwrap();
            let ranges: Vec<_> = plan.chunks(4).collect();
            assert_eq!((ranges.len(), plan.longest_chunk(4)), (chunks, longest));
            let covered: Vec<usize> = ranges.into_iter().flatten().collect();
            assert_eq!(covered, (0..120).collect::<Vec<_>>());
        }
    }

    #[test]
    fn labels_are_checked() {
        let new = |labels: &[i64], ignore_index| {
            let options = CrossEntropyOptions {
                ignore_index,
                ..options()
            };
            CrossEntropyPlan::new(labels, 5, options)
        };
        for bad in [5, -1, i64::MAX, i64::MIN] {
            let want = Error::LabelOutOfRange {
                position: 2,
                id: bad,
                vocab_size: 5,
            };
            assert_eq!(new(&[4, -100, bad], None), Err(want));
        }
        let plan = new(&[-1, 4, 7, 0], Some(-1));
        assert!(matches!(plan, Err(Error::LabelOutOfRange { position: 2, .. })));
        assert_eq!(new(&[0, 4, 0], Some(0)).unwrap().positions(), [1]);
        assert_eq!(new(&[-100, 2], Some(2)), Err(Error::AllIgnored { num_rows: 2 }));
        assert_eq!(new(&[], None), Err(Error::AllIgnored { num_rows: 0 }));

        let sum = CrossEntropyOptions {
            reduction: Reduction::Sum,
            ..options()
        };
        let plan = CrossEntropyPlan::new(&[-100], 5, sum).unwrap();
        assert_eq!((plan.chunks(4).count(), plan.num_rows()), (0, 1));
        assert!(plan.expect_hidden([1, 3], 3).is_ok() && plan.expect_hidden([2, 3], 3).is_err());
        assert!(plan.loss(0..1, &mut [0f32; 5], 1).is_err());
        assert!(new(&[1], None).unwrap().loss(0..1, &mut [0f32; 4], 1).is_err());
    }
}

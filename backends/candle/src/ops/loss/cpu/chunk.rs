//! The pass over the weight for some rows of hidden states.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::Result;
use candle_core::utils::get_num_threads;
use num_traits::Float;
use trainable_tokens_core::{CrossEntropyPlan, Element, OnlineSoftmax};

use super::{Input, Operand, Wanted};
use crate::ops::matrix::{Matrix, Old, multiply};

/// Of how many parts the vocabulary is the sum, however many threads there are: sums have the same bits on every machine.
pub(super) const PARTS: usize = 8;

/// Rows of hidden states that count, and what is known of their logits before the weight is read.
pub(super) struct Chunk<'a, T: Operand> {
    input: &'a Input<'a, T>,
    plan: &'a CrossEntropyPlan,
    /// `[n, D]`.
    hidden: Vec<T::Compute>,
    labels: &'a [usize],
    wanted: Wanted,
    /// The trained rows that are not the weight's, `[c, D]`.
    trained: Vec<T::Compute>,
    /// The logits that they give, `[n, c]`.
    logits: Vec<T::Compute>,
}

/// What some columns of the vocabulary add up to, for each row of a chunk.
pub(super) struct Sums<C> {
    softmax: OnlineSoftmax<C>,
    /// The rows of the weight, weighted: `[n, D]`.
    pub(super) of_hidden: Vec<C>,
    /// Logits that are needed once the sum is known: of the labels, by row, ...
    of_labels: Vec<(usize, C)>,
    /// ... and the trained columns' whose rows are the weight's, by slot, each `[n]`.
    of_slots: Vec<(usize, Vec<C>)>,
}

impl<'a, T: Operand> Chunk<'a, T> {
    pub(super) fn new(
        input: &'a Input<'a, T>,
        plan: &'a CrossEntropyPlan,
        (hidden, labels): (Vec<T::Compute>, &'a [usize]),
        wanted: Wanted,
    ) -> Result<Self> {
        let dim = input.dim;
        let rows = input
            .changed
            .iter()
            .flat_map(|slot| &input.rows[slot * dim..][..dim]);
        let mut chunk = Self {
            input,
            plan,
            hidden,
            labels,
            wanted,
            trained: rows.map(|x| x.to_compute()).collect(),
            logits: Vec::new(),
        };
        let c = input.changed.len();
        chunk.logits = chunk.products(&chunk.trained, c, get_num_threads())?;
        if let Some(bias) = input.bias {
            for row in chunk.logits.chunks_exact_mut(c.max(1)) {
                for (x, slot) in row.iter_mut().zip(&input.changed) {
                    *x += bias[input.columns[*slot]].to_compute();
                }
            }
        }
        Ok(chunk)
    }

    fn hidden(&self) -> Matrix<'_, T::Compute> {
        Matrix::new(&self.hidden, [self.labels.len(), self.input.dim])
    }

    /// The logits `[n, rows]` of rows `[rows, D]`.
    fn products(&self, rows: &[T::Compute], len: usize, threads: usize) -> Result<Vec<T::Compute>> {
        let mut logits = vec![T::Compute::default(); self.labels.len() * len];
        let rows = Matrix::new(rows, [len, self.input.dim]).transposed();
        let one = <T::Compute as Element>::from_f64(1.0);
        multiply(
            self.hidden(),
            rows,
            one,
            (Old::Replace, &mut logits, len),
            threads,
        )?;
        Ok(logits)
    }

    /// Goes through the weight, on all threads, and through the trained rows.
    pub(super) fn sums(&self, block: usize) -> crate::Result<Sums<T::Compute>> {
        let (v, threads) = (self.input.vocab_size, get_num_threads().max(1));
        let mut parts: Vec<_> = (0..PARTS).map(|_| None).collect();
        let (of_a_thread, threads_of_a_part) = (PARTS.div_ceil(threads), threads / PARTS);
        rayon::scope(|scope| {
            for (job, parts) in parts.chunks_mut(of_a_thread).enumerate() {
                scope.spawn(move |_| {
                    let mut memory = Vec::new();
                    let mut wide = Vec::new();
                    for (at, part) in (job * of_a_thread..).zip(parts) {
                        let columns = at * v / PARTS..(at + 1) * v / PARTS;
                        let memory = (&mut memory, &mut wide);
                        *part = Some(self.part(columns, block, memory, threads_of_a_part));
                    }
                });
            }
        });
        let mut parts = parts.into_iter().flatten();
        let mut sums = match parts.next() {
            Some(part) => part?,
            None => self.nothing(),
        };
        let dim = self.input.dim;
        for part in parts {
            let part = part?;
            let of_hidden = &mut sums.of_hidden;
            sums.softmax.merge(&part.softmax, |row, [own, others]| {
                let to = of_hidden.iter_mut().skip(row * dim).take(dim);
                let from = part.of_hidden.iter().skip(row * dim);
                to.zip(from).for_each(|(to, x)| *to = *to * own + *x * others);
            })?;
            sums.of_labels.extend(part.of_labels);
            sums.of_slots.extend(part.of_slots);
        }
        // The trained rows are columns like the others, after them.
        let c = self.input.changed.len();
        let mut weights = self.logits.clone();
        let trained = Matrix::new(&self.trained, [c, dim]);
        sums.add((&mut weights, &[]), trained, self.wanted, threads)?;
        Ok(sums)
    }

    fn nothing(&self) -> Sums<T::Compute> {
        let n = self.labels.len();
        let values = if self.wanted.of_hidden {
            n * self.input.dim
        } else {
            0
        };
        Sums {
            softmax: OnlineSoftmax::new(n, self.plan.options().softcap),
            of_hidden: vec![T::Compute::default(); values],
            of_labels: Vec::new(),
            of_slots: Vec::new(),
        }
    }

    /// Goes through some rows of the weight.
    fn part(
        &self,
        columns: Range<usize>,
        block: usize,
        (memory, wide): (&mut Vec<T::Compute>, &mut Vec<T::Compute>),
        threads: usize,
    ) -> crate::Result<Sums<T::Compute>> {
        let (input, n) = (self.input, self.labels.len());
        let (dim, zero) = (input.dim, T::Compute::default());
        let one = <T::Compute as Element>::from_f64(1.0);
        let mut sums = self.nothing();
        for start in columns.clone().step_by(block) {
            let width = block.min(columns.end - start);
            let inside = |column: usize| column.checked_sub(start).filter(|column| *column < width);
            let weight = T::widen(&input.weight[start * dim..][..width * dim], wide);
            let weight = Matrix::new(weight, [width, dim]);
            if memory.len() < n * width {
                memory.resize(n * width, zero);
            }
            let logits = &mut memory[..n * width];
            let to = (Old::Replace, &mut *logits, width);
            multiply(self.hidden(), weight.transposed(), one, to, threads)?;
            if let Some(bias) = input.bias {
                for row in logits.chunks_exact_mut(width) {
                    let each = row.iter_mut().zip(&bias[start..]);
                    each.for_each(|(x, bias)| *x += bias.to_compute());
                }
            }
            let mut changed = input.changed.iter().copied().peekable();
            // The trained rows give these.
            let mut absent = Vec::new();
            for (slot, column) in input.columns.iter().enumerate() {
                let changed = changed.next_if_eq(&slot).is_some();
                let Some(column) = inside(*column) else {
                    continue;
                };
                if changed {
                    absent.push(column);
                } else if self.wanted.of_delta {
                    let of_slot = (0..n).map(|row| logits[row * width + column]);
                    sums.of_slots.push((slot, of_slot.collect()));
                }
            }
            for (row, label) in self.labels.iter().enumerate() {
                if let Some(column) = inside(*label) {
                    sums.of_labels.push((row, logits[row * width + column]));
                }
            }
            sums.add((logits, &absent), weight, self.wanted, threads)?;
        }
        Ok(sums)
    }

    /// The loss times the plan's factor. What was summed for the hidden states becomes their gradient; that of the trained
    /// rows is added to `of_delta`.
    pub(super) fn finish(
        &self,
        sums: &mut Sums<T::Compute>,
        of_delta: &mut [T::Compute],
    ) -> crate::Result<f64> {
        let (input, n) = (self.input, self.labels.len());
        let (dim, k, c) = (input.dim, input.columns.len(), input.changed.len());
        let factor = self.plan.factor();
        let softmax = &sums.softmax;
        // The logits of the trained columns, `[n, k]`.
        let mut logits = vec![T::Compute::default(); if self.wanted.of_delta { n * k } else { 0 }];
        if self.wanted.of_delta {
            for (row, trained) in self.logits.chunks_exact(c.max(1)).enumerate() {
                let each = input.changed.iter().zip(trained);
                each.for_each(|(slot, logit)| logits[row * k + slot] = *logit);
            }
            for (slot, column) in &sums.of_slots {
                let each = column.iter().enumerate();
                each.for_each(|(row, logit)| logits[row * k + slot] = *logit);
            }
            for (row, logits) in logits.chunks_exact_mut(k.max(1)).enumerate() {
                let share = softmax.share(row, factor);
                let each = logits.iter_mut();
                each.for_each(|logit| *logit = softmax.weight(row, *logit) * share);
            }
        }
        let mut of_labels = vec![T::Compute::default(); n];
        let of_weight = sums.of_labels.iter();
        of_weight.for_each(|(row, logit)| of_labels[*row] = *logit);
        let slots: HashMap<_, _> = (0..).zip(&input.columns).map(|(slot, id)| (*id, slot)).collect();
        let mut loss = 0.0;
        for (row, label) in self.labels.iter().enumerate() {
            let slot: Option<usize> = slots.get(label).copied();
            let trained = slot.and_then(|slot| input.changed.binary_search(&slot).ok());
            let logit = trained.map_or(of_labels[row], |at| self.logits[row * c + at]);
            loss += softmax.loss(row, logit) * factor;
            let minus = softmax.slope(logit) * <T::Compute as Element>::from_f64(factor);
            if let Some(slot) = slot.filter(|_| self.wanted.of_delta) {
                let gradient = &mut logits[row * k + slot];
                *gradient -= minus;
            }
            if self.wanted.of_hidden {
                let share = softmax.share(row, factor);
                let sums = sums.of_hidden[row * dim..][..dim].iter_mut();
                if let Some(at) = trained {
                    let of_label = &self.trained[at * dim..][..dim];
                    let each = sums.zip(of_label);
                    each.for_each(|(sum, x)| *sum = *sum * share - *x * minus);
                } else {
                    let of_label = &input.weight[label * dim..][..dim];
                    let each = sums.zip(of_label);
                    each.for_each(|(sum, x)| *sum = *sum * share - x.to_compute() * minus);
                }
            }
        }
        if self.wanted.of_delta {
            let gradient = Matrix::new(&logits, [n, k]).transposed();
            let one = <T::Compute as Element>::from_f64(1.0);
            let to = (Old::Add, of_delta, dim);
            multiply(gradient, self.hidden(), one, to, get_num_threads())?;
        }
        Ok(loss)
    }
}

impl<C: Float + Element> Sums<C> {
    /// Adds columns, all but those that are absent: their logits `[n, width]`, which become weights, and the rows
    /// `[width, D]` that gave them.
    fn add(
        &mut self,
        (logits, absent): (&mut [C], &[usize]),
        rows: Matrix<'_, C>,
        wanted: Wanted,
        threads: usize,
    ) -> crate::Result<()> {
        let dim = rows.columns();
        let of_hidden = &mut self.of_hidden;
        self.softmax.add(logits, absent, |row, factor| {
            let sums = of_hidden.iter_mut().skip(row * dim).take(dim);
            sums.for_each(|sum| *sum = *sum * factor);
        })?;
        if wanted.of_hidden {
            let weights = Matrix::new(logits, [self.softmax.num_rows(), rows.rows()]);
            multiply(
                weights,
                rows,
                C::from_f64(1.0),
                (Old::Add, of_hidden, dim),
                threads,
            )?;
        }
        Ok(())
    }
}

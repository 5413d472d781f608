//! Attention as one operation of candle's graph, for the CPU.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::utils::get_num_threads;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail};
use num_traits::Zero;

use super::AttentionKind;
use super::group::{Group, GroupGradient};
use super::rotation::{Angles, Rotation};
use crate::ops::parallel;
use crate::ops::storage::{Number, elements, for_dtype, with_elements};

/// Keeps no weights of the attention: they are as many as the square of the length, and computed again backward.
pub(super) struct Attend {
    pub(super) kind: AttentionKind,
}

impl CustomOp3 for Attend {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        query_layout: &Layout,
        key: &CpuStorage,
        key_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sequences = Sequences::new(&self.kind, query_layout.dims(), key_layout.dims())?;
        let out = for_dtype!(query.dtype(), T => {
            let (query, key, value) = (
                elements::<T>(query, query_layout)?,
                elements::<T>(key, key_layout)?,
                elements::<T>(value, value_layout)?,
            );
            T::to_cpu_storage_owned(sequences.forward([query, key, value])?)
        });
        Ok((out, query_layout.shape().clone()))
    }

    fn bwd(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let sequences = Sequences::new(&self.kind, query.dims(), key.dims())?;
        let [of_query, of_key, of_value] = for_dtype!(query.dtype(), T => {
            let gradients = with_elements::<T, _>(query, |query| {
                with_elements(key, |key| {
                    with_elements(value, |value| {
                        with_elements(upstream, |upstream| sequences.backward([query, key, value], upstream))
                    })
                })
            })?;
            let [of_query, of_key, of_value] = gradients;
            [
                Tensor::from_vec(of_query, query.shape(), query.device())?,
                Tensor::from_vec(of_key, key.shape(), key.device())?,
                Tensor::from_vec(of_value, value.shape(), value.device())?,
            ]
        });
        Ok((Some(of_query), Some(of_key), Some(of_value)))
    }
}

/// A batch of sequences, cut into groups: one example's queries that share a head of keys.
struct Sequences<'a> {
    kind: &'a AttentionKind,
    /// Positions of queries.
    queries: usize,
    /// Positions of keys and values.
    keys: usize,
    head_dim: usize,
    groups: usize,
}

impl<'a> Sequences<'a> {
    fn new(kind: &'a AttentionKind, query: &[usize], key: &[usize]) -> Result<Self> {
        let (&[batch, queries, width], &[_, keys, _]) = (query, key) else {
            bail!("attention takes queries and keys [B, L, width], not {query:?} and {key:?}");
        };
        Ok(Self {
            kind,
            queries,
            keys,
            head_dim: width / kind.query_heads,
            groups: batch * kind.key_heads,
        })
    }

    fn forward<T: Number>(&self, [query, key, value]: [&[T]; 3]) -> Result<Vec<T>> {
        let angles = self.angles::<T>()?;
        let mixed = self.for_groups(|group, threads| {
            self.group([query, key, value], angles.as_ref(), group, threads)
                .forward()
        })?;
        let mut out = vec![<T as Zero>::zero(); query.len()];
        for (group, mixed) in mixed.iter().enumerate() {
            let rows = self.rows_of_queries(group);
            scatter(mixed, &mut out, rows);
        }
        Ok(out)
    }

    fn backward<T: Number>(&self, operands: [&[T]; 3], upstream: &[T]) -> Result<[Vec<T>; 3]> {
        let angles = self.angles::<T>()?;
        let gradients = self.for_groups(|group, threads| {
            let upstream = gather(upstream, self.rows_of_queries(group));
            self.group(operands, angles.as_ref(), group, threads)
                .backward(&upstream)
        })?;
        let mut out = operands.map(|operand| vec![<T as Zero>::zero(); operand.len()]);
        for (group, GroupGradient { query, key, value }) in gradients.iter().enumerate() {
            scatter(query, &mut out[0], self.rows_of_queries(group));
            scatter(key, &mut out[1], self.rows_of_keys(group));
            scatter(value, &mut out[2], self.rows_of_keys(group));
        }
        Ok(out)
    }

    fn angles<T: Number>(&self) -> Result<Option<Angles<T::Compute>>> {
        self.kind.rotation.as_ref().map(Rotation::angles::<T>).transpose()
    }

    /// Runs `work` on the number of each group, on all threads; it may use as many more as it is told.
    fn for_groups<R: Send>(&self, work: impl Fn(usize, usize) -> Result<R> + Sync) -> Result<Vec<R>> {
        let threads = get_num_threads().max(1);
        let (jobs, inner) = if self.groups < threads {
            (1, threads)
        } else {
            (threads, 1)
        };
        let mut results: Vec<Option<Result<R>>> = (0..self.groups).map(|_| None).collect();
        let share = self.groups.div_ceil(jobs).max(1);
        parallel::run(results.chunks_mut(share).enumerate().map(|(job, results)| {
            let work = &work;
            move || {
                for (group, result) in (job * share..).zip(results) {
                    *result = Some(work(group, inner));
                }
            }
        }));
        results.into_iter().flatten().collect()
    }

    fn group<'b, T: Number>(
        &'b self,
        [query, key, value]: [&[T]; 3],
        angles: Option<&'b Angles<T::Compute>>,
        group: usize,
        threads: usize,
    ) -> Group<'b, T::Compute> {
        let (query, key, value) = (
            gather(query, self.rows_of_queries(group)),
            gather(key, self.rows_of_keys(group)),
            gather(value, self.rows_of_keys(group)),
        );
        let lengths = self.kind.lengths.as_ref();
        let held = lengths.and_then(|lengths| lengths.get(group / self.kind.key_heads).copied());
        Group::new(
            self.kind,
            angles,
            [query, key, value],
            self.head_dim,
            held,
            threads,
        )
    }

    /// Where a group's queries, `[Q, heads, head_dim]`, lie in `[B, Q, query_heads * head_dim]`.
    fn rows_of_queries(&self, group: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let heads = self.kind.query_heads / self.kind.key_heads;
        self.rows(group, heads, self.queries)
    }

    /// Where a group's keys or values, `[L, head_dim]`, lie in `[B, L, key_heads * head_dim]`.
    fn rows_of_keys(&self, group: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        self.rows(group, 1, self.keys)
    }

    fn rows(&self, group: usize, heads: usize, length: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (example, head) = (group / self.kind.key_heads, group % self.kind.key_heads);
        let (row, width) = (heads * self.head_dim, self.kind.key_heads * heads * self.head_dim);
        let first = example * length * width + head * row;
        (0..length).map(move |position| first + position * width..first + position * width + row)
    }
}

/// The elements of some rows, widened.
fn gather<T: Number>(all: &[T], rows: impl Iterator<Item = Range<usize>>) -> Vec<T::Compute> {
    rows.flat_map(|row| &all[row])
        .map(|value| value.to_compute())
        .collect()
}

/// Writes elements to where they were gathered from.
fn scatter<T: Number>(values: &[T::Compute], all: &mut [T], rows: impl Iterator<Item = Range<usize>>) {
    let mut values = values.iter();
    for row in rows {
        for (to, from) in all[row].iter_mut().zip(values.by_ref()) {
            *to = T::from_compute(*from);
        }
    }
}

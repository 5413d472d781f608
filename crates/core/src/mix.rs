//! How the rows of several adapters become those that a lookup overrides with.

use crate::{DType, Element, Error, Result, TokenRows};

/// The rows that a lookup or a head overrides the table with, in terms of the rows of several adapters.
///
/// The adapters' rows are counted through in their order: the *stacked* rows. The mixed rows are first the weighted ones,
/// sums of stacked rows by [`rounds`](Self::rounds), then the [`picks`](Self::picks), each a stacked row as it is.
///
/// # Contract
///
/// What [`apply`](Self::apply) computes on the host, [`Backend::combine`](crate::Backend::combine) computes in a
/// framework, bit for bit: all rows are first converted to [`dtype`](Self::dtype), then each weighted row is
/// `w0 * row0`, plus `w1 * row1`, and so on, each product and each sum rounded to that type.
#[derive(Clone, Debug, PartialEq)]
pub struct RowMix {
    part_rows: Vec<usize>,
    rounds: Vec<MixRound>,
    picks: Vec<u32>,
}

/// One summand of each of the first [`slots.len()`](Self::slots) weighted rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixRound {
    /// The stacked row that is added.
    pub slots: Vec<u32>,
    /// What it is multiplied by.
    pub weights: Vec<f64>,
}

impl RowMix {
    /// All stacked rows, as they are: `part_rows` is how many rows each adapter has.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for more rows than 32 bits can count.
    pub fn stack(part_rows: Vec<usize>) -> Result<Self> {
        let total = part_rows.iter().sum::<usize>();
        let picks = (0..total)
            .map(u32::try_from)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::shape("rows of all adapters", &[u32::MAX as usize], &[total]))?;
        let rounds = Vec::new();
        Ok(Self {
            part_rows,
            rounds,
            picks,
        })
    }

    /// Weighted rows, each a list of at least two stacked rows with weights and none longer than the one before it, and then
    /// `picks` as they are.
    pub(crate) fn new(part_rows: Vec<usize>, weighted: &[Vec<(u32, f64)>], picks: Vec<u32>) -> Self {
        let longest = weighted.iter().map(Vec::len).max().unwrap_or(0);
        let round = |at: usize| {
            let terms = weighted.iter().filter_map(|terms| terms.get(at).copied());
            let (slots, weights) = terms.unzip();
            MixRound { slots, weights }
        };
        Self {
            part_rows,
            rounds: (0..longest).map(round).collect(),
            picks,
        }
    }

    /// How many rows each adapter has.
    pub fn part_rows(&self) -> &[usize] {
        &self.part_rows
    }

    /// The summands of the weighted rows, the first ones first. Every weighted row has a summand in the first two rounds;
    /// later rounds reach ever fewer of them, always the first ones.
    pub fn rounds(&self) -> &[MixRound] {
        &self.rounds
    }

    /// How many rows are weighted sums.
    pub fn num_weighted(&self) -> usize {
        self.rounds.first().map_or(0, |round| round.slots.len())
    }

    /// The stacked rows that follow the weighted ones, as they are.
    pub fn picks(&self) -> &[u32] {
        &self.picks
    }

    /// How many rows the mix has.
    pub fn num_rows(&self) -> usize {
        self.num_weighted() + self.picks.len()
    }

    /// Whether the mix is the stacked rows in their order.
    pub fn is_stack(&self) -> bool {
        let total = self.part_rows.iter().sum::<usize>();
        self.rounds.is_empty()
            && self.picks.len() == total
            && self.picks.iter().zip(0u32..).all(|(pick, at)| *pick == at)
    }

    /// The element type of the mixed rows: that of the adapters if they share one and nothing is weighted, else the
    /// narrowest of `f32` and `f64` that holds all of them exactly.
    pub fn dtype(&self, parts: impl IntoIterator<Item = DType>) -> DType {
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else {
            return DType::F32;
        };
        let (mut same, mut wide) = (true, first.default_row_dtype());
        for part in parts {
            same &= part == first;
            if part == DType::F64 {
                wide = DType::F64;
            }
        }
        if same && self.rounds.is_empty() {
            first
        } else {
            wide
        }
    }

    /// The mixed rows on the host, from the rows of each adapter in their order.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if an adapter has another number of rows, or rows of another length than the first.
    pub fn apply(&self, parts: &[&TokenRows]) -> Result<TokenRows> {
        let dim = parts.first().map_or(0, |part| part.embedding_dim());
        self.expect_parts(parts.iter().map(|part| part.shape()), dim)?;
        match self.dtype(parts.iter().map(|part| part.dtype())) {
            DType::F64 => self.apply_as::<f64>(parts, dim),
            DType::F32 => self.apply_as::<f32>(parts, dim),
            DType::F16 => self.apply_as::<half::f16>(parts, dim),
            DType::BF16 => self.apply_as::<half::bf16>(parts, dim),
        }
    }

    fn apply_as<T: Element>(&self, parts: &[&TokenRows], dim: usize) -> Result<TokenRows> {
        let stacked = self.locate(|part, row| parts.get(part)?.row(row));
        let row_of = |slot: u32| stacked.get(slot as usize).copied().flatten();
        let mut values = vec![T::default(); self.num_rows() * dim];
        let (weighted, picked) = values.split_at_mut(self.num_weighted() * dim);
        let mut summand = vec![T::default(); dim];
        for (at, round) in self.rounds.iter().enumerate() {
            let rows = weighted.chunks_exact_mut(dim.max(1));
            for (out, (slot, weight)) in rows.zip(round.slots.iter().zip(&round.weights)) {
                if let Some(row) = row_of(*slot) {
                    row.decode_into(&mut summand);
                }
                let weight = T::Compute::from_f64(*weight);
                for (sum, x) in out.iter_mut().zip(&summand) {
                    let product = T::from_compute(x.to_compute() * weight);
                    *sum = if at == 0 {
                        product
                    } else {
                        T::from_compute(sum.to_compute() + product.to_compute())
                    };
                }
            }
        }
        for (out, slot) in picked.chunks_exact_mut(dim.max(1)).zip(&self.picks) {
            if let Some(row) = row_of(*slot) {
                row.decode_into(out);
            }
        }
        TokenRows::new(values, self.num_rows(), dim)
    }

    /// The gradient of each adapter's rows, from that of the mixed rows, in its element type; for frameworks without a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the gradient has another number of rows.
    pub fn split_gradient(&self, gradient: &TokenRows) -> Result<Vec<TokenRows>> {
        let dim = gradient.embedding_dim();
        gradient.expect_shape("gradient of the mixed rows", self.num_rows(), dim)?;
        match gradient.dtype() {
            DType::F64 => self.split_as::<f64>(gradient, dim),
            DType::F32 => self.split_as::<f32>(gradient, dim),
            DType::F16 => self.split_as::<half::f16>(gradient, dim),
            DType::BF16 => self.split_as::<half::bf16>(gradient, dim),
        }
    }

    fn split_as<T: Element>(&self, gradient: &TokenRows, dim: usize) -> Result<Vec<TokenRows>> {
        let total = self.part_rows.iter().sum::<usize>();
        let mut sums = vec![T::Compute::default(); total * dim];
        let mut row = vec![T::Compute::default(); dim];
        let picks = self.picks.iter().enumerate();
        let picks = picks.map(|(at, slot)| (self.num_weighted() + at, *slot, None));
        let weighted = self.rounds.iter().flat_map(|round| {
            let terms = round.slots.iter().zip(&round.weights).enumerate();
            terms.map(|(at, (slot, weight))| (at, *slot, Some(T::Compute::from_f64(*weight))))
        });
        for (at, slot, weight) in weighted.chain(picks) {
            if let Some(from) = gradient.row(at) {
                from.decode_into(&mut row);
            }
            let to = sums.iter_mut().skip(slot as usize * dim);
            for (sum, x) in to.zip(&row) {
                *sum += weight.map_or(*x, |weight| *x * weight);
            }
        }
        let mut sums = sums.into_iter().map(T::from_compute);
        let parts = self.part_rows.iter();
        parts
            .map(|rows| TokenRows::new::<T>(sums.by_ref().take(rows * dim).collect(), *rows, dim))
            .collect()
    }

    /// Refuses adapters that the mix was not made for.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`].
    pub fn expect_parts(&self, shapes: impl IntoIterator<Item = [usize; 2]>, dim: usize) -> Result<()> {
        let mut count = 0;
        for (shape, rows) in shapes.into_iter().zip(&self.part_rows) {
            if shape != [*rows, dim] {
                return Err(Error::shape("rows of an adapter", &[*rows, dim], &shape));
            }
            count += 1;
        }
        if count == self.part_rows.len() {
            return Ok(());
        }
        Err(Error::shape(
            "adapters of a mix",
            &[self.part_rows.len()],
            &[count],
        ))
    }

    /// `f(adapter, row)` for every stacked row.
    fn locate<R>(&self, f: impl Fn(usize, usize) -> R) -> Vec<R> {
        let parts = self.part_rows.iter().enumerate();
        let f = &f;
        parts
            .flat_map(|(part, rows)| (0..*rows).map(move |row| f(part, row)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32]) -> TokenRows {
        TokenRows::new(values.to_vec(), values.len() / 2, 2).unwrap()
    }

    #[test]
    fn weighted_rows_come_first_and_picks_keep_every_bit() {
        let mix = RowMix::new(vec![2, 1], &[vec![(0, 0.25), (2, 0.75)]], vec![1]);
        let (a, b) = (rows(&[1.0, 2.0, -0.0, f32::NAN]), rows(&[5.0, -2.0]));
        let mixed = mix.apply(&[&a, &b]).unwrap();
        let values = mixed.as_slice::<f32>().unwrap();
        assert_eq!(values[..2], [4.0, -1.0]);
        assert_eq!(values[2].to_bits(), (-0.0f32).to_bits());
        assert!(values[3].is_nan());
        assert!(!mix.is_stack() && RowMix::stack(vec![2, 1]).unwrap().is_stack());
    }

    #[test]
    fn gradients_go_where_the_rows_came_from() {
        let mix = RowMix::new(vec![2, 1], &[vec![(0, 0.25), (2, 0.75)]], vec![1]);
        let split = mix.split_gradient(&rows(&[4.0, 8.0, 1.0, 2.0])).unwrap();
        assert_eq!(split[0].as_slice::<f32>().unwrap(), [1.0, 2.0, 1.0, 2.0]);
        assert_eq!(split[1].as_slice::<f32>().unwrap(), [3.0, 6.0]);
        assert!(mix.split_gradient(&rows(&[1.0, 2.0])).is_err());
    }

    #[test]
    fn shadowed_rows_get_a_zero_gradient() {
        let mix = RowMix::new(vec![1, 1], &[], vec![1]);
        let split = mix.split_gradient(&rows(&[3.0, 4.0])).unwrap();
        assert_eq!(split[0].as_slice::<f32>().unwrap(), [0.0, 0.0]);
        assert_eq!(split[1].as_slice::<f32>().unwrap(), [3.0, 4.0]);
    }

    #[test]
    fn the_type_holds_every_adapters_rows() {
        let stack = RowMix::stack(vec![1, 1]).unwrap();
        assert_eq!(stack.dtype([DType::BF16, DType::BF16]), DType::BF16);
        assert_eq!(stack.dtype([DType::BF16, DType::F16]), DType::F32);
        assert_eq!(stack.dtype([DType::F32, DType::F64]), DType::F64);
        let mix = RowMix::new(vec![1, 1], &[vec![(0, 0.5), (1, 0.5)]], vec![]);
        assert_eq!(mix.dtype([DType::F16, DType::F16]), DType::F32);
    }

    #[test]
    fn foreign_adapters_are_refused() {
        let stack = RowMix::stack(vec![1, 1]).unwrap();
        assert!(stack.apply(&[&rows(&[1.0, 2.0])]).is_err());
        assert!(
            stack
                .apply(&[&rows(&[1.0, 2.0]), &rows(&[1.0, 2.0, 3.0, 4.0])])
                .is_err()
        );
    }
}

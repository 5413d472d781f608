//! Trained rows in host memory and their gradients, for backends whose framework has no graph.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::rows::with_data;
use crate::{DType, Element, Error, Result, RowMix, TokenRows};

/// Rows in host memory: an adapter's own, or a combination of several adapters' that knows where its rows came from.
#[derive(Clone, Debug)]
pub struct HostRows {
    rows: TokenRows,
    origin: Origin,
}

/// Names a leaf, so that its gradient can be found.
type Id = u64;

#[derive(Clone, Debug)]
enum Origin {
    Leaf(Id),
    Mix(RowMix, Vec<Id>),
}

impl HostRows {
    /// Takes rows `[k, D]` to train. No other value has their gradient, but clones.
    pub fn new(rows: TokenRows) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let origin = Origin::Leaf(NEXT.fetch_add(1, Ordering::Relaxed));
        Self { rows, origin }
    }

    /// [`Backend::combine`](crate::Backend::combine) of leaves.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the mix was made for other rows, or one of them is no leaf.
    pub fn combine(parts: &[&Self], mix: &RowMix) -> Result<Self> {
        let rows: Vec<_> = parts.iter().map(|part| &part.rows).collect();
        let ids = parts.iter().filter_map(|part| match part.origin {
            Origin::Leaf(id) => Some(id),
            Origin::Mix(..) => None,
        });
        let ids: Vec<_> = ids.collect();
        if ids.len() != parts.len() {
            return Err(Error::shape("leaves to combine", &[parts.len()], &[ids.len()]));
        }
        Ok(Self {
            rows: mix.apply(&rows)?,
            origin: Origin::Mix(mix.clone(), ids),
        })
    }

    /// The rows, in slot order.
    pub fn rows(&self) -> &TokenRows {
        &self.rows
    }

    /// The rows, to change in place; shape and element type must stay.
    pub fn rows_mut(&mut self) -> &mut TokenRows {
        &mut self.rows
    }
}

/// The gradients of trained rows that backward passes add up: what a framework's own store of gradients is, for those
/// without one.
#[derive(Clone, Debug, Default)]
pub struct RowGradients(Vec<(Id, TokenRows)>);

impl RowGradients {
    /// Lets `add` add to the gradient of `rows`, `[k, D]` of type `dtype`, zeros to begin with. For a combination the sum is
    /// passed on to the rows that it was made of. Nothing is allocated for a leaf that has a gradient already.
    ///
    /// # Errors
    ///
    /// Those of `add`; [`Error::DType`] if there is a gradient of another type.
    pub fn add(
        &mut self,
        rows: &HostRows,
        dtype: DType,
        add: impl FnOnce(&mut TokenRows) -> Result<()>,
    ) -> Result<()> {
        let [num_rows, dim] = rows.rows.shape();
        match &rows.origin {
            Origin::Leaf(id) => add(self.of(*id, dtype, [num_rows, dim])?),
            Origin::Mix(mix, ids) => {
                let mut sum = TokenRows::zeros(dtype, num_rows, dim);
                add(&mut sum)?;
                for (id, part) in ids.iter().zip(mix.split_gradient(&sum)?) {
                    add_rows(self.of(*id, dtype, part.shape())?, &part);
                }
                Ok(())
            }
        }
    }

    /// The gradient of a leaf, if one was added.
    pub fn get(&self, leaf: &HostRows) -> Option<&TokenRows> {
        let Origin::Leaf(id) = leaf.origin else {
            return None;
        };
        self.0
            .iter()
            .find(|(of, _)| *of == id)
            .map(|(_, gradient)| gradient)
    }

    /// Sets every gradient to zero, for the next step; nothing is allocated or freed.
    pub fn zero(&mut self) {
        fn fill<T: Element>(values: &mut [T]) {
            values.fill(T::default());
        }
        for (_, gradient) in &mut self.0 {
            with_data!(gradient.data_mut(), values => fill(values));
        }
    }

    fn of(&mut self, id: Id, dtype: DType, shape: [usize; 2]) -> Result<&mut TokenRows> {
        let known = self.0.iter().position(|(of, _)| *of == id);
        let at = known.unwrap_or_else(|| {
            self.0.push((id, TokenRows::zeros(dtype, shape[0], shape[1])));
            self.0.len() - 1
        });
        let gradient = &mut self.0[at].1;
        gradient.expect_shape("gradient of the trained rows", shape[0], shape[1])?;
        gradient.expect_dtype("gradient of the trained rows", dtype)?;
        Ok(gradient)
    }
}

/// `sum += rows`, of the same shape and type.
fn add_rows(sum: &mut TokenRows, rows: &TokenRows) {
    fn add<T: Element>(sum: &mut [T], rows: &TokenRows) {
        for (sum, x) in sum.iter_mut().zip(rows.as_slice::<T>().unwrap_or_default()) {
            *sum = T::from_compute(sum.to_compute() + x.to_compute());
        }
    }
    with_data!(sum.data_mut(), values => add(values, rows));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: [f32; 2]) -> HostRows {
        HostRows::new(TokenRows::new(values.to_vec(), 2, 1).unwrap())
    }

    #[test]
    fn a_combination_passes_its_gradient_on() {
        let (a, b) = (rows([1.0, 2.0]), rows([3.0, 4.0]));
        let both = HostRows::combine(&[&a, &b], &RowMix::stack(vec![2, 2]).unwrap()).unwrap();
        assert_eq!(both.rows().as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let mut gradients = RowGradients::default();
        let fill = |gradient: &mut TokenRows| {
            let values = gradient.as_mut_slice::<f32>().unwrap();
            values.iter_mut().zip(1u8..).for_each(|(x, i)| *x += f32::from(i));
            Ok(())
        };
        gradients.add(&both, DType::F32, fill).unwrap();
        gradients.add(&a, DType::F32, fill).unwrap();
        let of = |rows: &HostRows| gradients.get(rows).unwrap().to_f32_vec();
        assert_eq!((of(&a), of(&b)), (vec![2.0, 4.0], vec![3.0, 4.0]));
        assert!(gradients.get(&rows([0.0, 0.0])).is_none());
        assert!(gradients.clone().add(&a, DType::F64, |_| Ok(())).is_err());
        assert!(HostRows::combine(&[&both], &RowMix::stack(vec![4]).unwrap()).is_err());
        gradients.zero();
        assert_eq!(gradients.get(&a).unwrap().to_f32_vec(), [0.0, 0.0]);
    }
}

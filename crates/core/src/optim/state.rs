//! The memory of an optimizer as plain data.

use crate::{Error, Result, TokenRows};

/// The memory of an optimizer: a step count and row-shaped tensors under torch's names (`exp_avg`, `exp_avg_sq`,
/// `max_exp_avg_sq`, `momentum_buffer`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps taken.
    pub step: u64,
    /// The tensors by name, each `[k, D]`; none before the first step.
    pub tensors: Vec<(String, TokenRows)>,
}

impl OptimizerState {
    /// Builds a state, leaving absent tensors out.
    pub(super) fn collect<const N: usize>(step: u64, tensors: [(&str, &Option<TokenRows>); N]) -> Self {
        let present = tensors
            .into_iter()
            .filter_map(|(name, rows)| Some((name.to_owned(), rows.clone()?)));
        Self {
            step,
            tensors: present.collect(),
        }
    }

    /// Takes the tensors `names` out. Before the first step none is there; after it all must be, in one shape and
    /// element type, and no other.
    pub(super) fn expand<const N: usize>(self, names: [&str; N]) -> Result<[Option<TokenRows>; N]> {
        if let Some((name, _)) = self
            .tensors
            .iter()
            .find(|(name, _)| !names.contains(&name.as_str()))
        {
            return Err(Error::OptimizerState {
                name: name.clone(),
                reason: format!("this optimizer has no such tensor, it keeps {names:?}"),
            });
        }
        let mut out = [const { None }; N];
        let mut first: Option<([usize; 2], crate::DType)> = None;
        let mut tensors = self.tensors;
        for (place, name) in out.iter_mut().zip(names) {
            let found = tensors
                .iter()
                .position(|(have, _)| have == name)
                .map(|at| tensors.swap_remove(at).1);
            let expected_none = self.step == 0;
            match (&found, expected_none) {
                (None, true) => continue,
                (None, false) => {
                    let reason = format!("missing, though {} steps were taken", self.step);
                    return Err(Error::OptimizerState {
                        name: name.to_owned(),
                        reason,
                    });
                }
                (Some(_), true) => {
                    let reason = "present, though no step was taken".to_owned();
                    return Err(Error::OptimizerState {
                        name: name.to_owned(),
                        reason,
                    });
                }
                (Some(rows), false) => {
                    let like = (rows.shape(), rows.dtype());
                    if *first.get_or_insert(like) != like {
                        let reason =
                            format!("is {:?} {}, unlike the other tensors", rows.shape(), rows.dtype());
                        return Err(Error::OptimizerState {
                            name: name.to_owned(),
                            reason,
                        });
                    }
                }
            }
            *place = found;
        }
        if let Some((name, _)) = tensors.first() {
            return Err(Error::OptimizerState {
                name: name.clone(),
                reason: "the tensor is given twice".to_owned(),
            });
        }
        Ok(out)
    }
}

/// Makes sure that a tensor of the state exists and is shaped and typed like `rows`.
pub(super) fn expect_like(name: &str, tensor: Option<&TokenRows>, rows: &TokenRows) -> Result<()> {
    match tensor {
        Some(tensor) if tensor.shape() != rows.shape() || tensor.dtype() != rows.dtype() => {
            Err(Error::OptimizerState {
                name: name.to_owned(),
                reason: format!(
                    "is {:?} {}, but the rows are {:?} {}",
                    tensor.shape(),
                    tensor.dtype(),
                    rows.shape(),
                    rows.dtype()
                ),
            })
        }
        _ => Ok(()),
    }
}

/// Zeros shaped and typed like `rows`.
pub(super) fn zeros_like(rows: &TokenRows) -> TokenRows {
    TokenRows::zeros(rows.dtype(), rows.num_rows(), rows.embedding_dim())
}

//! The cross-entropy of a head, without a matrix of all logits.
//!
//! Loss and gradients are computed together, chunk by chunk and outside of burn's graph; terms that are zero, but whose
//! derivatives are these gradients, bring them in.

use std::ops::Range;

use burn::tensor::{Bool, DType, IndexingUpdateOp, Int, Tensor, TensorData};
use trainable_tokens_core::{CrossEntropyPlan, EmbeddingSource, Error as CoreError, Softcap};

use super::gradient::{Factor, zero_with_gradient};
use super::project::{MIN_BLOCK, Overrides, check_like, is_flex};
use crate::convert::{compute_dtype, to_indices};
use crate::{BurnTable, Result};

/// The loss `[1]` of `hidden` `[N, D]`, in the compute type of the table's. The table and the bias `[V]` get no gradient;
/// the trained rows and `hidden` do.
///
/// # Errors
///
/// When the hidden states do not fit table and plan.
pub(crate) fn linear_cross_entropy(
    hidden: &Tensor<2>,
    table: &BurnTable,
    overrides: Option<&Overrides>,
    bias: Option<&Tensor<1>>,
    plan: &CrossEntropyPlan,
) -> Result<Tensor<1>> {
    plan.expect_hidden(hidden.dims(), table.embedding_dim())?;
    check_like("hidden states of the loss", hidden, table)?;
    let (expected, got) = (table.vocab_size(), plan.vocab_size());
    if expected != got {
        return Err(CoreError::shape("vocabulary of the loss", &[expected], &[got]).into());
    }
    let weight = table.tensor();
    let device = weight.device();
    let compute = compute_dtype(weight.dtype());
    let delta = overrides.map(|overrides| &overrides.delta);
    let mut loss = Tensor::<1>::zeros([1], (&device, compute));
    if plan.positions().is_empty() {
        for leaf in [Some(hidden), delta]
            .into_iter()
            .flatten()
            .filter(|x| x.is_tracked())
        {
            loss = loss + untouched(leaf).cast(compute);
        }
        return Ok(loss);
    }
    let rows = if plan.positions().len() == plan.num_rows() {
        hidden.clone()
    } else {
        hidden.clone().select(0, to_indices(plan.positions(), &device))
    };
    let head = Head::new(&untracked(weight), overrides, bias);
    let wanted = Wanted {
        of_rows: rows.is_tracked(),
        of_delta: delta.is_some_and(Tensor::is_tracked),
    };
    let frozen = untracked(&rows);
    let mut value = untracked(&loss);
    let mut of_rows = Vec::new();
    let mut of_delta: Option<Tensor<2>> = None;
    let sum = |sums: Option<Tensor<2>>, x: Tensor<2>| Some(sums.map_or(x.clone(), |sums| sums + x));
    for chunk in plan.chunks(compute.size()) {
        let hidden = frozen.clone().narrow(0, chunk.start, chunk.len());
        let computed = head.chunk(&hidden, plan, chunk, wanted);
        value = value + computed.loss;
        of_rows.extend(computed.of_rows);
        of_delta = computed.of_delta.map_or(of_delta.clone(), |x| sum(of_delta, x));
    }
    loss = tracked(value, weight);
    if wanted.of_rows {
        let gradient = tracked(Tensor::cat(of_rows, 0), weight);
        loss = loss + term(rows.cast(compute), gradient);
    }
    if let (Some(delta), Some(gradient)) = (delta, of_delta) {
        let delta = delta.clone().cast(compute_dtype(delta.dtype()));
        let dtype = delta.dtype();
        let gradient = tracked(gradient.cast(dtype), weight);
        loss = loss + term(delta, gradient).cast(compute);
    }
    Ok(loss)
}

/// `x` without autodiff: a leaf that is detached would still ask for gradients, and every operation leave a node behind.
fn untracked<const R: usize>(x: &Tensor<R>) -> Tensor<R> {
    x.clone().inner()
}

/// `x` with autodiff, if `like` has it.
fn tracked<const R: usize>(x: Tensor<R>, like: &Tensor<2>) -> Tensor<R> {
    if like.is_autodiff() {
        Tensor::from_inner(x)
    } else {
        x
    }
}

/// Zero, with this gradient of `x`.
fn term(x: Tensor<2>, gradient: Tensor<2>) -> Tensor<1> {
    (zero_with_gradient(x, Factor::All(1.0)) * gradient).sum()
}

/// Zero, with zeros for the gradient of `x`.
fn untouched(x: &Tensor<2>) -> Tensor<1> {
    let [len, dim] = x.dims();
    let first = [len.min(1), dim];
    let device = x.device();
    let rows = x.clone().select(0, to_indices(&[0][..first[0]], &device));
    rows.mask_fill(Tensor::<2, Bool>::full(first, true, &device), 0.0)
        .sum()
}

/// What to compute besides the loss.
#[derive(Clone, Copy)]
struct Wanted {
    of_rows: bool,
    of_delta: bool,
}

/// What a chunk gave, in the compute type.
struct Computed {
    loss: Tensor<1>,
    of_rows: Option<Tensor<2>>,
    of_delta: Option<Tensor<2>>,
}

/// A frozen table, and what a head adds to it, outside of burn's graph.
struct Head {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    trained: Option<Trained>,
}

/// The trained rows of a head.
struct Trained {
    columns: Tensor<1, Int>,
    /// The rows as the table would hold them, in the compute type, `[k, D]`.
    rows: Tensor<2>,
    /// Whether they equal the table's, whose columns are kept then, to the bit: `[1, k]`.
    unchanged: Tensor<2, Bool>,
}

impl Head {
    fn new(weight: &Tensor<2>, overrides: Option<&Overrides>, bias: Option<&Tensor<1>>) -> Self {
        let trained = overrides.map(|Overrides { delta, columns }| {
            let columns = to_indices(columns, &weight.device());
            let rounded = untracked(delta).cast(weight.dtype());
            let base_rows = weight.clone().select(0, columns.clone());
            Trained {
                unchanged: rounded
                    .clone()
                    .not_equal(base_rows)
                    .any_dim(1)
                    .bool_not()
                    .transpose(),
                rows: rounded.cast(compute_dtype(weight.dtype())),
                columns,
            }
        });
        Self {
            weight: weight.clone(),
            bias: bias.map(untracked),
            trained,
        }
    }

    fn chunk(
        &self,
        hidden: &Tensor<2>,
        plan: &CrossEntropyPlan,
        chunk: Range<usize>,
        wanted: Wanted,
    ) -> Computed {
        let (n, device) = (chunk.len(), self.weight.device());
        let labels = TensorData::new(plan.labels()[chunk].to_vec(), [n, 1]);
        let labels = Tensor::<2, Int>::from_data(labels, &device);
        let wide = hidden.clone().cast(compute_dtype(hidden.dtype()));
        let mut logits = self.logits(hidden, &wide);
        let softcap = plan.options().softcap.map(Softcap::get);
        if let Some(softcap) = softcap {
            logits = logits.div_scalar(softcap).tanh().mul_scalar(softcap);
        }
        let slope = softcap.map(|softcap| logits.clone().div_scalar(softcap).square().neg().add_scalar(1.0));
        let highest = logits.clone().max_dim(1);
        let shifted = logits - highest;
        let of_labels = shifted.clone().gather(1, labels.clone());
        let exponentials = shifted.exp();
        let sums = exponentials.clone().sum_dim(1);
        let factor = plan.factor();
        let loss = (sums.clone().log() - of_labels).sum().mul_scalar(factor);
        if !wanted.of_rows && !wanted.of_delta {
            let (of_rows, of_delta) = (None, None);
            return Computed {
                loss,
                of_rows,
                of_delta,
            };
        }
        let minus = Tensor::full([n, 1], -factor, (&device, wide.dtype()));
        let mut gradient =
            (exponentials * sums.recip().mul_scalar(factor)).scatter(1, labels, minus, IndexingUpdateOp::Add);
        if let Some(slope) = slope {
            gradient = gradient * slope;
        }
        let mut of_trained = None;
        if let Some(Trained { columns, .. }) = &self.trained {
            let part = gradient.clone().select(1, columns.clone());
            // The table's own rows of these columns take no part.
            let zeros = part.zeros_like();
            gradient = gradient.select_assign(1, columns.clone(), zeros, IndexingUpdateOp::Assign);
            of_trained = Some(part);
        }
        let of_delta = of_trained.clone().filter(|_| wanted.of_delta);
        Computed {
            loss,
            of_delta: of_delta.map(|part| part.transpose().matmul(wide)),
            of_rows: wanted.of_rows.then(|| {
                let sum = self.transposed(gradient);
                match (of_trained, &self.trained) {
                    (Some(part), Some(trained)) => sum + part.matmul(trained.rows.clone()),
                    _ => sum,
                }
            }),
        }
    }

    /// The logits `[n, V]` of hidden states `[n, D]`, given in the compute type too, in which they are.
    fn logits(&self, hidden: &Tensor<2>, wide: &Tensor<2>) -> Tensor<2> {
        let ([n, _], [vocab_size, _]) = (hidden.dims(), self.weight.dims());
        let mut logits = if self.is_widened() {
            let logits = Tensor::zeros([n, vocab_size], (&wide.device(), wide.dtype()));
            self.blocks().fold(logits, |logits, block| {
                let part = wide.clone().matmul(self.widened(block.clone()).transpose());
                logits.slice_assign([0..n, block], part)
            })
        } else {
            let logits = hidden.clone().matmul(self.weight.clone().transpose());
            logits.cast(wide.dtype())
        };
        if let Some(Trained {
            columns,
            rows,
            unchanged,
        }) = &self.trained
        {
            let trained = wide.clone().matmul(rows.clone().transpose());
            let kept = logits.clone().select(1, columns.clone());
            let unchanged = unchanged.clone().expand(trained.shape());
            let chosen = trained.mask_where(unchanged, kept);
            logits = logits.select_assign(1, columns.clone(), chosen, IndexingUpdateOp::Assign);
        }
        match &self.bias {
            None => logits,
            Some(bias) => {
                let bias = bias.clone().cast(wide.dtype());
                logits + bias.unsqueeze()
            }
        }
    }

    /// `gradient · W`, `[n, D]`, in the gradient's type.
    fn transposed(&self, gradient: Tensor<2>) -> Tensor<2> {
        let dtype = gradient.dtype();
        if !self.is_widened() {
            return gradient
                .cast(self.weight.dtype())
                .matmul(self.weight.clone())
                .cast(dtype);
        }
        let shape = [gradient.dims()[0], self.weight.dims()[1]];
        let sums = Tensor::zeros(shape, (&gradient.device(), dtype));
        self.blocks().fold(sums, |sums, block| {
            let columns = gradient.clone().narrow(1, block.start, block.len());
            sums + columns.matmul(self.widened(block))
        })
    }

    /// Whether rows of the table are widened to multiply with them: what a CPU does with half types, whole tables at once.
    fn is_widened(&self) -> bool {
        matches!(self.weight.dtype(), DType::F16 | DType::BF16) && is_flex(&self.weight.device())
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let vocab_size = self.weight.dims()[0];
        let starts = (0..vocab_size).step_by(MIN_BLOCK);
        starts.map(move |start| start..vocab_size.min(start + MIN_BLOCK))
    }

    fn widened(&self, block: Range<usize>) -> Tensor<2> {
        let rows = self.weight.clone().narrow(0, block.start, block.len());
        rows.cast(compute_dtype(self.weight.dtype()))
    }
}

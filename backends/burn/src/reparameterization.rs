//! Trainable rows in a model whose code cannot be changed.

use burn::module::{Module, Param, ParamId, Reparameterization, Reparameterizer};
use burn::tensor::{IndexingUpdateOp, Int, Shape, Tensor};
use trainable_tokens_core::{EmbeddingSource, TokenRows, TokenSet};

use crate::convert::{to_indices, to_rows};
use crate::ids::read_ids;
use crate::{BurnDelta, BurnTable, Error, Result};

/// Trains rows of the table at `path` (as in `embed.weight`) of any model, without a change of its code. Every other
/// parameter is frozen.
///
/// ```
/// # use burn::module::Module;
/// # use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
/// # use burn::tensor::Device;
/// # use trainable_tokens_burn::{TrainableRows, train_rows};
/// #[derive(Module, Debug)]
/// struct Model {
///     embed: Embedding,
///     head: Linear,
/// }
///
/// # fn main() -> trainable_tokens_burn::Result<()> {
/// # let device = Device::flex().autodiff();
/// # let embed = EmbeddingConfig::new(32, 4).init(&device);
/// # let model = Model { embed, head: LinearConfig::new(4, 2).init(&device) };
/// let model = train_rows(model, "embed.weight", &[5, 7])?;
/// // … train it with an optimizer of burn's …
/// let rows = model.embed.weight.reparameterization::<TrainableRows>().map(TrainableRows::rows);
/// # assert_eq!(rows.unwrap()?.shape(), [2, 4]);
/// let merged = model.valid().materialize();
/// # assert_eq!(merged.num_params(), 32 * 4 + 4 * 2 + 2);
/// # Ok(())
/// # }
/// ```
///
/// It is made of burn's [`Reparameterization`], which has its price: every use of the weight makes a `V x D` copy of it,
/// and every backward pass a `V x D` gradient. With a table of 256 000 x 2304 in `f32` (2.2 GiB), 4096 ids and 128 rows a
/// forward and backward pass through the embedding takes 4.3 s and 6.6 GiB on two cores (Flex); with
/// [`TrainableTokens`](crate::TrainableTokens), which does neither, it takes 0.06 s and 39 MiB. Use that wherever the
/// model's code is yours; it also has adapters by name, where this trains one set of rows. A table of half precision sums its gradient in half precision here.
///
/// # Errors
///
/// [`Error::NoSuchTable`] if the model has no two-dimensional parameter of that path; for an id out of range or given
/// twice; when burn fails.
pub fn train_rows<M: Module>(model: M, path: &str, token_ids: &[u32]) -> Result<M> {
    let mut found = None;
    let attach = AttachRows {
        path,
        token_ids,
        found: &mut found,
    };
    let model = model.apply_reparameterization(attach);
    let path = path.to_owned();
    found.unwrap_or(Err(Error::NoSuchTable { path }))?;
    Ok(model)
}

/// The trained rows of a table in a model that was prepared by [`train_rows`]: new rows that replace those of the table
/// wherever it is used.
#[derive(Module, Debug)]
pub struct TrainableRows {
    delta: Param<Tensor<2>>,
    ids: Param<Tensor<1, Int>>,
}

impl TrainableRows {
    /// Starts from the table's own rows.
    fn new(table: &BurnTable, token_ids: &[u32]) -> Result<Self> {
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        let rows = table.read_rows(tokens.ids())?;
        let rows = rows.to_dtype(table.dtype().default_row_dtype());
        let device = table.tensor().device();
        Ok(Self {
            delta: BurnDelta::new(&rows, &device)?.into_param()?,
            ids: Param::initialized(ParamId::new(), to_indices(token_ids, &device)),
        })
    }

    /// The trained rows as burn's parameter, `[k, D]`.
    pub fn delta(&self) -> &Param<Tensor<2>> {
        &self.delta
    }

    /// Copies the trained rows to the host, `[k, D]` in the order of their tokens.
    ///
    /// # Errors
    ///
    /// When burn fails.
    pub fn rows(&self) -> Result<TokenRows> {
        to_rows("trained rows", self.delta.val())
    }

    /// The tokens of the rows.
    ///
    /// # Errors
    ///
    /// When burn fails.
    pub fn token_ids(&self) -> Result<Vec<u32>> {
        read_ids(self.ids.val(), usize::MAX)
    }
}

impl Reparameterization for TrainableRows {
    const NAME: &'static str = "trainable_tokens";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let rows = self.delta.val().cast(base.dtype());
        let rows = rows.clone().reshape(Shape::from(rows.dims().to_vec()));
        base.select_assign(0, self.ids.val(), rows, IndexingUpdateOp::Assign)
    }
}

/// Attaches [`TrainableRows`] to one parameter and freezes all.
struct AttachRows<'a> {
    path: &'a str,
    token_ids: &'a [u32],
    found: &'a mut Option<Result<()>>,
}

impl Reparameterizer for AttachRows<'_> {
    type Reparam = TrainableRows;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<TrainableRows>) {
        let param = param.set_require_grad(false);
        if path != self.path || D != 2 {
            return (param, None);
        }
        let weight = param.val();
        let weight: Tensor<2> = weight.clone().reshape(Shape::from(weight.dims().to_vec()));
        let rows = BurnTable::new(weight).and_then(|table| TrainableRows::new(&table, self.token_ids));
        let (rows, outcome) = match rows {
            Ok(rows) => (Some(rows), Ok(())),
            Err(error) => (None, Err(error)),
        };
        *self.found = Some(outcome);
        (param, rows)
    }
}

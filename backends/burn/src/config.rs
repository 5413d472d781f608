//! The layer's configuration.

use burn::config::Config;
use burn::module::Initializer;
use burn::nn::EmbeddingConfig;
use burn::tensor::Device;

use crate::{Result, TrainableTokens};

/// Configuration of a [`TrainableTokens`] layer over a new table, such as one that a record is loaded into.
///
/// ```
/// # use burn::tensor::{Device, Int, Tensor};
/// # use trainable_tokens_burn::TrainableTokensConfig;
/// # fn main() -> trainable_tokens_burn::Result<()> {
/// let device = Device::flex().autodiff();
/// let embed = TrainableTokensConfig::new(100, 8, vec![5, 7]).init(&device)?;
/// let ids = Tensor::<2, Int>::from_data([[5, 1, 7]], &device);
/// assert_eq!(embed.forward(ids).dims(), [1, 3, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Config, Debug)]
pub struct TrainableTokensConfig {
    /// The number of embedding vectors (`V`).
    pub n_embedding: usize,
    /// The size of each vector (`D`).
    pub d_model: usize,
    /// The tokens that train, in the order of their rows.
    pub token_ids: Vec<u32>,
    /// How the table is initialized; the trained rows start from it.
    #[config(default = "Initializer::Normal{mean:0.0, std:1.0}")]
    pub initializer: Initializer,
}

impl TrainableTokensConfig {
    /// Initializes a new layer.
    ///
    /// # Errors
    ///
    /// For a token id out of range or given twice.
    pub fn init(&self, device: &Device) -> Result<TrainableTokens> {
        let embedding = EmbeddingConfig::new(self.n_embedding, self.d_model);
        let embedding = embedding.with_initializer(self.initializer.clone());
        TrainableTokens::wrap(embedding.init(device), &self.token_ids)
    }
}

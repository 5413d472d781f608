//! The burn backend.

mod backend;
mod backward;
mod config;
mod convert;
mod error;
mod head;
mod ids;
mod layer;
mod ops;
mod reparameterization;
mod rows;
mod table;

pub use backend::Burn;
pub use backward::backward;
pub use config::TrainableTokensConfig;
pub use error::{Error, Result};
pub use head::TiedHead;
pub use layer::TrainableTokens;
pub use reparameterization::{TrainableRows, train_rows};
pub use rows::BurnDelta;
pub use table::BurnTable;

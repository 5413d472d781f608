//! The burn backend.

mod backend;
mod convert;
mod error;
mod ops;
mod rows;
mod table;

pub use backend::Burn;
pub use error::{Error, Result};
pub use rows::BurnDelta;
pub use table::BurnTable;

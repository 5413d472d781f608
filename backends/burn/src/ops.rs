//! The operations on a table of which some rows are overridden.

mod combine;
mod gradient;
mod lookup;
mod loss;
mod project;

pub(crate) use combine::{combine, join_rows, split_rows};
pub(crate) use lookup::lookup_rows;
pub(crate) use loss::linear_cross_entropy;
pub(crate) use project::{Overrides, check_like, project};

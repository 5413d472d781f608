//! The two operations on a table of which some rows are overridden.

mod gradient;
mod lookup;
mod project;

pub(crate) use lookup::lookup_rows;
pub(crate) use project::{Overrides, check_like, project};

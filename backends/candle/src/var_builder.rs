//! For models whose code cannot be changed: tensors exchanged while they load.

mod compact;
mod merged;
mod wrapped;

pub use compact::CompactTable;
pub use merged::{MergedBackend, merged_var_builder};

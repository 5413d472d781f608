//! Output that appears whole or not at all.

mod dir;
mod file;
mod target;

pub(crate) use dir::sync;
pub use dir::write_dir_atomically;
pub use file::write_file_atomically;

/// What becomes of a target that already exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// It is an error, and the target stays as it is.
    Refuse,
    /// The target is replaced at the moment when the new one is complete.
    Replace,
}

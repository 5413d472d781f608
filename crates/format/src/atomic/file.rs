//! One file, atomically.

use std::fs::File;
use std::path::Path;

use super::Overwrite;
use super::target::{Target, builder};
use crate::error::{Error, Result};

/// Writes one file through `fill`, which gets an empty temporary sibling; the file is then synced and renamed into
/// place. Missing parent directories are created. After any error nothing has changed.
///
/// # Errors
///
/// [`Error::Exists`] if the target exists and `overwrite` refuses, [`Error::Target`] if it is a directory,
/// [`Error::Io`], or the error of `fill`.
pub fn write_file_atomically<T, E: From<Error>>(
    target: impl AsRef<Path>,
    overwrite: Overwrite,
    fill: impl FnOnce(&mut File) -> Result<T, E>,
) -> Result<T, E> {
    let target = target.as_ref();
    if overwrite == Overwrite::Refuse && target.exists() {
        let path = target.to_owned();
        return Err(Error::Exists { path }.into());
    }
    if target.is_dir() {
        let reason = "it is a directory".to_owned();
        let path = target.to_owned();
        return Err(Error::Target { path, reason }.into());
    }
    let place = Target::prepare(target)?;
    let prefix = place.temporary_prefix();
    let mut temporary = builder(&prefix, 0o666)
        .tempfile_in(&place.parent)
        .map_err(Error::io("create a temporary file in", &place.parent))?;
    let value = fill(temporary.as_file_mut())?;
    temporary
        .as_file()
        .sync_all()
        .map_err(Error::io("sync", temporary.path()))?;
    let renamed = match overwrite {
        Overwrite::Refuse => temporary.persist_noclobber(&place.path),
        Overwrite::Replace => temporary.persist(&place.path),
    };
    renamed.map_err(|error| match error.error.kind() {
        std::io::ErrorKind::AlreadyExists => Error::Exists {
            path: target.to_owned(),
        },
        _ => Error::io("rename a temporary file to", target)(error.error),
    })?;
    place.done()?;
    Ok(value)
}

//! One directory, atomically.

use std::fs::{self, File};
use std::path::Path;

use super::Overwrite;
use super::target::{Target, builder, sync_dir};
use crate::checkpoint::MODEL_CONFIG_FILE;
use crate::config::CONFIG_FILE;
use crate::error::{Error, Result, shown};

/// Files of which one marks a directory that may be replaced.
const OURS: [&str; 2] = [CONFIG_FILE, MODEL_CONFIG_FILE];

/// Writes a directory through `fill`, which gets an empty temporary sibling; its files are then synced and it is
/// renamed into place. Missing parent directories are created. After any error nothing has changed.
///
/// On Linux, Android and Apple's systems it takes the place of an old directory in one step, so that there is always one
/// of the two, even if the process is killed. Where the system or the file system cannot exchange directories, the old one
/// is moved away first.
///
/// A directory is replaced only if it is empty, or holds an `adapter_config.json` or a `config.json`, or nothing but
/// directories with an `adapter_config.json`: then it is an adapter, a model or several adapters, and all that it
/// holds goes.
///
/// # Errors
///
/// [`Error::Exists`] if the target exists and `overwrite` refuses, [`Error::Target`] if it is something that is
/// never replaced, [`Error::Io`], or the error of `fill`.
pub fn write_dir_atomically<T, E: From<Error>>(
    target: impl AsRef<Path>,
    overwrite: Overwrite,
    fill: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let target = target.as_ref();
    check_replaceable(target, overwrite)?;
    let place = Target::prepare(target)?;
    let prefix = place.temporary_prefix();
    let temporary = builder(&prefix, 0o777)
        .tempdir_in(&place.parent)
        .map_err(Error::io("create a temporary directory in", &place.parent))?;
    let value = fill(temporary.path())?;
    sync_tree(temporary.path())?;
    // The target may have appeared in the meantime.
    check_replaceable(target, overwrite)?;
    if !place.path.exists() {
        rename(temporary.path(), &place.path)?;
    } else if exchange(temporary.path(), &place.path)? {
        // What is cleaned up now is the old directory.
        drop(temporary);
        place.done()?;
        return Ok(value);
    } else {
        replace(temporary.path(), &place)?;
    }
    // It is no longer there to be cleaned up.
    let _ = temporary.keep();
    place.done()?;
    Ok(value)
}

fn check_replaceable(target: &Path, overwrite: Overwrite) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    let path = target.to_owned();
    if overwrite == Overwrite::Refuse {
        return Err(Error::Exists { path });
    }
    let reason = if !target.is_dir() {
        "it is a file, not a directory"
    } else if !OURS.iter().any(|name| target.join(name).is_file()) && !holds_only_ours(target)? {
        "it holds files, but neither adapter_config.json nor config.json; remove it by hand"
    } else {
        return Ok(());
    };
    let reason = reason.to_owned();
    Err(Error::Target { path, reason })
}

/// Whether a directory is empty, or all that it holds are adapters in directories of their own.
fn holds_only_ours(dir: &Path) -> Result<bool> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if !path.join(CONFIG_FILE).is_file() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Exchanges two directories in one step; whether the system can.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(new: &Path, old: &Path) -> Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;

    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::NOSYS | Errno::INVAL | Errno::NOTSUP | Errno::PERM) => Ok(false),
        Err(error) => Err(Error::io("rename a directory to", old)(error.into())),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> Result<bool> {
    Ok(false)
}

/// Moves the old directory aside, the new one in, and removes the old one; puts it back if the new one does not
/// come in.
fn replace(new: &Path, place: &Target) -> Result<()> {
    let aside = builder(&place.temporary_prefix(), 0o777)
        .tempdir_in(&place.parent)
        .map_err(Error::io("create a temporary directory in", &place.parent))?;
    let old = aside.path().join(&place.name);
    rename(&place.path, &old)?;
    let Err(error) = rename(new, &place.path) else {
        return Ok(());
    };
    if fs::rename(&old, &place.path).is_ok() {
        return Err(error);
    }
    // The old content must not be cleaned up with its temporary home.
    let kept = aside.keep().join(&place.name);
    Err(Error::Target {
        path: place.path.clone(),
        reason: format!("{error}; what it held is now in {}", shown(&kept)),
    })
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename a directory to", to))
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io("inspect", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            sync(&path)?;
        }
    }
    sync_dir(dir)
}

/// Brings a file to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    let file = File::open(path).and_then(|file| file.sync_all());
    file.map_err(Error::io("sync", path))
}

//! Where the output goes.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A target and the directory that will hold it. Parents that were created for it go again when it fails.
pub(super) struct Target {
    pub(super) path: PathBuf,
    pub(super) parent: PathBuf,
    pub(super) name: OsString,
    created: Vec<PathBuf>,
}

impl Target {
    /// Resolves a symbolic link, so that what it points to is replaced, and creates missing parents.
    pub(super) fn prepare(path: &Path) -> Result<Self> {
        // Without a trailing slash, which would hide a symbolic link.
        let plain: PathBuf = path.components().collect();
        let resolved = if plain.is_symlink() {
            fs::canonicalize(&plain).map_err(Error::io("follow the symbolic link", path))?
        } else {
            plain
        };
        let Some(name) = resolved.file_name().map(ToOwned::to_owned) else {
            let reason = "it has no name of its own".to_owned();
            return Err(Error::Target {
                path: path.to_owned(),
                reason,
            });
        };
        let parent = match resolved.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let target = Self {
            path: parent.join(&name),
            created: missing(&parent),
            parent,
            name,
        };
        if let Err(source) = fs::create_dir_all(&target.parent) {
            let path = target.parent.clone();
            return Err(Error::Io {
                action: "create the directory",
                path,
                source,
            });
        }
        Ok(target)
    }

    /// The prefix of temporary siblings: hidden, and telling whose they are.
    pub(super) fn temporary_prefix(&self) -> OsString {
        let mut prefix = OsString::from(".");
        prefix.push(&self.name);
        prefix.push(".");
        prefix
    }

    /// Keeps the parents.
    pub(super) fn done(mut self) -> Result<()> {
        self.created.clear();
        sync_dir(&self.parent)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        for dir in &self.created {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// The ancestors of a directory, and itself, that do not exist; deepest first.
fn missing(dir: &Path) -> Vec<PathBuf> {
    dir.ancestors()
        .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists())
        .map(Path::to_owned)
        .collect()
}

/// Makes the entries of a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        fs::File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(Error::io("sync", dir))?;
    }
    Ok(())
}

/// Permissions that a newly created file or directory would have had, were it not temporary: the process's umask
/// takes its share of `mode`.
pub(super) fn builder(prefix: &OsString, mode: u32) -> tempfile::Builder<'_, '_> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

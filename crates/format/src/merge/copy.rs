//! The files of a checkpoint directory that a merge does not change.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use super::MergeReport;
use crate::checkpoint::{Checkpoint, INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};

/// Extensions of files that hold weights in some form.
const WEIGHTS: [&str; 9] = [
    "safetensors",
    "bin",
    "gguf",
    "h5",
    "msgpack",
    "onnx",
    "ot",
    "pt",
    "pth",
];

/// Makes `to` the same file as `from`: a hard link, or a copy where links cannot be.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    // A link to a symbolic link would dangle elsewhere.
    let real = fs::canonicalize(from).map_err(Error::io("resolve", from))?;
    if fs::hard_link(&real, to).is_err() {
        fs::copy(&real, to).map_err(Error::io("copy", from))?;
    }
    Ok(())
}

/// Copies what is not part of the checkpoint itself.
pub(super) fn others(base: &Checkpoint, out: &Path, report: &mut MergeReport) -> Result<()> {
    visit(base, Path::new(""), out, report)?;
    report.copied.sort();
    report.left_out.sort();
    Ok(())
}

fn visit(base: &Checkpoint, below: &Path, out: &Path, report: &mut MergeReport) -> Result<()> {
    let dir = base.dir().join(below);
    for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
        let entry = entry.map_err(Error::io("list", &dir))?;
        let name = entry.file_name();
        let path = entry.path();
        let relative = below.join(&name);
        if is_hidden(&name) || base.files().iter().any(|file| file.path() == path) {
            continue;
        }
        let kind = entry.file_type().map_err(Error::io("inspect", &path))?;
        if kind.is_dir() {
            let target = out.join(&relative);
            fs::create_dir(&target).map_err(Error::io("create the directory", &target))?;
            visit(base, &relative, out, report)?;
        } else if path.is_file() {
            if holds_weights(base, &relative) {
                report.left_out.push(relative);
            } else {
                fs::copy(&path, out.join(&relative)).map_err(Error::io("copy", &path))?;
                report.copied.push(relative);
            }
        }
    }
    Ok(())
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

fn holds_weights(base: &Checkpoint, relative: &Path) -> bool {
    let single = base.files().iter().any(|file| file.path().ends_with(SINGLE_FILE));
    let stale_index = single && relative == Path::new(INDEX_FILE);
    let extension = relative.extension().and_then(OsStr::to_str);
    stale_index || extension.is_some_and(|extension| WEIGHTS.contains(&extension))
}

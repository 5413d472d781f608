//! A file that takes most of its bytes from another.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};
use crate::file::SafetensorsFile;

/// A new file, written from its start. What it has in common with the base's, the system copies from file to file:
/// the bytes never come into the process, and a file system that can shares them instead (`copy_file_range` on Linux).
pub(super) struct Output<'a> {
    base: &'a SafetensorsFile,
    /// The base's file once more, to copy from; `None` if the base is in memory, or where copying through its map is faster
    /// than what the standard library does.
    source: Option<File>,
    path: &'a Path,
    file: File,
    /// How many bytes have been written.
    written: usize,
    /// What follows them: bytes of the base that are not copied yet.
    pending: Range<usize>,
    /// What is written over them at the end, by its place.
    patches: Vec<(usize, &'a [u8])>,
}

impl<'a> Output<'a> {
    pub(super) fn create(base: &'a SafetensorsFile, path: &'a Path) -> Result<Self> {
        let open = || File::open(base.path()).map_err(Error::io("open", base.path()));
        let copies = cfg!(target_os = "linux") && base.is_mapped();
        Ok(Self {
            base,
            source: copies.then(open).transpose()?,
            path,
            file: File::create(path).map_err(Error::io("create", path))?,
            written: 0,
            pending: 0..0,
            patches: Vec::new(),
        })
    }

    /// Appends bytes of the base's file. Neighbours are copied together.
    pub(super) fn copy(&mut self, range: Range<usize>) -> Result<()> {
        if self.pending.end != range.start {
            self.flush()?;
            self.pending.start = range.start;
        }
        self.pending.end = range.end;
        Ok(())
    }

    /// Appends other bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.file
            .write_all(bytes)
            .map_err(Error::io("write", self.path))?;
        self.written += bytes.len();
        Ok(())
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> usize {
        self.written + self.pending.len()
    }

    /// Writes over what is at a place by then.
    pub(super) fn patch(&mut self, position: usize, bytes: &'a [u8]) {
        self.patches.push((position, bytes));
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.flush()?;
        let failed = Error::io("write", self.path);
        let mut write = |(position, bytes): &(usize, &[u8])| {
            self.file.seek(SeekFrom::Start(*position as u64))?;
            self.file.write_all(bytes)
        };
        self.patches.iter().try_for_each(&mut write).map_err(failed)
    }

    fn flush(&mut self) -> Result<()> {
        let range = std::mem::replace(&mut self.pending, 0..0);
        if range.is_empty() {
            return Ok(());
        }
        let (start, len) = (range.start as u64, range.len() as u64);
        let copied = match &mut self.source {
            Some(source) => source
                .seek(SeekFrom::Start(start))
                .and_then(|_| io::copy(&mut (&*source).take(len), &mut self.file)),
            None => self
                .file
                .write_all(self.base.bytes_at(range.clone()))
                .map(|()| len),
        };
        match copied {
            Ok(copied) if copied == len => {}
            Ok(_) => {
                let cut = io::Error::new(io::ErrorKind::UnexpectedEof, "it has become shorter");
                return Err(Error::io("read", self.base.path())(cut));
            }
            Err(error) => return Err(Error::io("write", self.path)(error)),
        }
        self.written += range.len();
        Ok(())
    }
}

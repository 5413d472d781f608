//! One safetensors file, mapped into memory.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
#[cfg(unix)]
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use trainable_tokens_core::{DType, TokenRows};

use crate::error::{Error, Result};
use crate::header::{Header, HeaderError, MAX_HEADER_BYTES};
use crate::table::{MappedTable, float_dtype};

/// A tensor of a mapped file, borrowed.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TensorRef<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its little-endian bytes, of any alignment.
    pub bytes: &'a [u8],
    /// The file that holds it.
    pub file: &'a Path,
}

impl TensorRef<'_> {
    /// The element type, if it is one that tables and rows can have.
    ///
    /// # Errors
    ///
    /// [`Error::TensorDType`] for any other.
    pub fn float_dtype(&self) -> Result<DType> {
        float_dtype(self.dtype).ok_or_else(|| Error::TensorDType {
            path: self.file.to_owned(),
            tensor: self.name.to_owned(),
            got: self.dtype,
        })
    }

    /// Copies a tensor of two dimensions.
    ///
    /// # Errors
    ///
    /// [`Error::TensorDType`] unless its elements are floats, [`Error::TensorShape`] unless it is `[k, D]`.
    pub fn to_rows(self) -> Result<TokenRows> {
        let dtype = self.float_dtype()?;
        match *self.shape {
            [rows, columns] => Ok(TokenRows::from_le_bytes(dtype, rows, columns, self.bytes)?),
            _ => Err(Error::TensorShape {
                path: self.file.to_owned(),
                tensor: self.name.to_owned(),
                expected: "[k, D]".to_owned(),
                got: self.shape.to_vec(),
            }),
        }
    }
}

/// One `.safetensors` file, mapped into memory and checked: every tensor lies inside, none overlap, and together
/// they fill the file. A clone shares the map.
///
/// The file must not be changed while it is mapped.
#[derive(Clone)]
pub struct SafetensorsFile {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    content: Content,
    identity: Option<Identity>,
    header: Header,
}

/// Which file of which device a mapped file is.
type Identity = [u64; 2];

enum Content {
    Map(Mmap),
    Memory(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

impl SafetensorsFile {
    /// Maps and checks the file at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be mapped, [`Error::Safetensors`] or [`Error::TooLarge`] if it is malformed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(Error::io("open", path))?;
        let kind = file.metadata().map_err(Error::io("open", path))?;
        if !kind.is_file() {
            let reason = "it is not a regular file".to_owned();
            return Err(Error::Safetensors {
                path: path.to_owned(),
                reason,
            });
        }
        // Safe as long as no one truncates the file while it is mapped: then reads fault. This is the contract
        // of every reader of checkpoints through a map, and it is documented on the type.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        #[cfg(unix)]
        let identity = Some([kind.dev(), kind.ino()]);
        #[cfg(not(unix))]
        let identity = None;
        Self::new(path, Content::Map(map), identity)
    }

    /// Checks a file that is already in memory; `path` names it in messages.
    ///
    /// # Errors
    ///
    /// [`Error::Safetensors`] or [`Error::TooLarge`] if it is malformed.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self> {
        Self::new(path.as_ref(), Content::Memory(bytes), None)
    }

    fn new(path: &Path, content: Content, identity: Option<Identity>) -> Result<Self> {
        let path = path.to_owned();
        match Header::parse(content.bytes()) {
            Ok(header) => Ok(Self {
                inner: Arc::new(Inner {
                    path,
                    content,
                    identity,
                    header,
                }),
            }),
            Err(HeaderError::Invalid(reason)) => Err(Error::Safetensors { path, reason }),
            Err(HeaderError::TooLarge(bytes)) => Err(Error::TooLarge {
                path,
                what: "a header",
                bytes,
                limit: MAX_HEADER_BYTES,
            }),
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.header.tensors.keys().map(String::as_str)
    }

    /// The names of the tensors in the order in which they lie in the file.
    pub(crate) fn names_by_place(&self) -> impl Iterator<Item = &str> + use<'_> {
        let mut tensors: Vec<_> = self.inner.header.tensors.iter().collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        tensors.into_iter().map(|(name, _)| name.as_str())
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.inner.header.tensors.contains_key(name)
    }

    /// The string metadata of the header; `None` if it has none.
    pub fn metadata(&self) -> Option<&BTreeMap<String, String>> {
        self.inner.header.metadata.as_ref()
    }

    /// The tensor `name`.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`].
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let (name, info) = self.info(name)?;
        Ok(TensorRef {
            name,
            dtype: info.dtype,
            shape: &info.shape,
            bytes: self.bytes_at(self.range_of(info)),
            file: self.path(),
        })
    }

    /// The tensor `name` as a frozen table; the map is shared, nothing is copied.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`]; [`Error::TensorShape`] unless it has two dimensions; [`Error::TensorDType`]
    /// unless its elements are floats of 16 to 64 bits; core's error if ids of 32 bits cannot name every row.
    pub fn table(&self, name: &str) -> Result<MappedTable> {
        let (_, info) = self.info(name)?;
        MappedTable::new(self.clone(), self.range_of(info), name, info)
    }

    /// The tensor `name` of one value per row of a vocabulary, `[V]` or `[1, V]`, as a table `V x 1`.
    pub(crate) fn column(&self, name: &str) -> Result<MappedTable> {
        let (_, info) = self.info(name)?;
        let column = TensorInfo {
            shape: vec![info.shape.iter().product(), 1],
            ..info.clone()
        };
        MappedTable::new(self.clone(), self.range_of(info), name, &column)
    }

    /// Whether both are maps of one file, by whatever paths: then they have the same tensors.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        self.inner.identity.is_some() && self.inner.identity == other.inner.identity
    }

    /// Whether it is mapped, and not only in memory.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self.inner.content, Content::Map(_))
    }

    /// The bytes of the whole file.
    pub(crate) fn content(&self) -> &[u8] {
        self.inner.content.bytes()
    }

    /// Where the tensors begin.
    pub(crate) fn data_start(&self) -> usize {
        self.inner.header.data_start
    }

    /// The header of a file of the same tensors, some with another number of rows.
    pub(crate) fn header_with(&self, rows: &BTreeMap<&str, [usize; 2]>) -> io::Result<Vec<u8>> {
        self.inner.header.with_rows(rows)
    }

    /// Bytes of the file; the range comes from [`range_of`](Self::range_of).
    pub(crate) fn bytes_at(&self, range: Range<usize>) -> &[u8] {
        self.content().get(range).unwrap_or_default()
    }

    /// Where a tensor lies in the file.
    pub(crate) fn range_of(&self, info: &TensorInfo) -> Range<usize> {
        let start = self.inner.header.data_start;
        start + info.data_offsets.0..start + info.data_offsets.1
    }

    pub(crate) fn info(&self, name: &str) -> Result<(&str, &TensorInfo)> {
        let found = self.inner.header.tensors.get_key_value(name);
        let (name, info) = found.ok_or_else(|| Error::TensorMissing {
            path: self.path().to_owned(),
            tensor: name.to_owned(),
            hint: String::new(),
        })?;
        Ok((name, info))
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SafetensorsFile")
            .field("path", &self.path())
            .field("tensors", &self.inner.header.tensors.len())
            .finish_non_exhaustive()
    }
}

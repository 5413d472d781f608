//! A frozen table in a mapped file.

mod extended;

use std::fmt;
use std::ops::Range;
use std::path::Path;

pub use extended::ExtendedTable;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use trainable_tokens_core::{DType, EmbeddingSource, HostTable, RowRef, TokenId, TokenRows};

use crate::digest::TableDigest;
use crate::error::{Error, Result};
use crate::file::SafetensorsFile;

/// A `V x D` table of a mapped safetensors file. Its rows are borrowed from the map; a clone shares it.
#[derive(Clone)]
pub struct MappedTable {
    file: SafetensorsFile,
    range: Range<usize>,
    name: String,
    dtype: DType,
    vocab_size: usize,
    embedding_dim: usize,
}

impl MappedTable {
    pub(crate) fn new(
        file: SafetensorsFile,
        range: Range<usize>,
        name: &str,
        info: &TensorInfo,
    ) -> Result<Self> {
        let path = || file.path().to_owned();
        let [vocab_size, embedding_dim] = *info.shape.as_slice() else {
            return Err(Error::TensorShape {
                path: path(),
                tensor: name.to_owned(),
                expected: "two dimensions of a table".to_owned(),
                got: info.shape.clone(),
            });
        };
        let dtype = float_dtype(info.dtype).ok_or_else(|| Error::TensorDType {
            path: path(),
            tensor: name.to_owned(),
            got: info.dtype,
        })?;
        if u32::try_from(vocab_size).is_err() {
            return Err(trainable_tokens_core::Error::VocabularyTooLarge { vocab_size }.into());
        }
        // Rows without columns would take no bytes, and a file of any size could claim billions of them.
        if embedding_dim == 0 || embedding_dim.checked_mul(dtype.size_in_bytes()).is_none() {
            return Err(Error::TensorShape {
                path: path(),
                tensor: name.to_owned(),
                expected: "rows of at least one column, and of a size that memory can have".to_owned(),
                got: info.shape.clone(),
            });
        }
        Ok(Self {
            file,
            range,
            name: name.to_owned(),
            dtype,
            vocab_size,
            embedding_dim,
        })
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The little-endian bytes of the whole table, row-major, of any alignment.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes_at(self.range.clone())
    }

    /// The digest of the table, the same as [`digest`](crate::digest()) of it, without copying rows.
    pub fn digest(&self) -> TableDigest {
        TableDigest::of_bytes(self.bytes())
    }

    /// Where the table lies in the file.
    pub(crate) fn file_range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Where row `id` lies in the file.
    pub(crate) fn row_range(&self, id: TokenId) -> Option<Range<usize>> {
        // Only the rows that are there have places in the file.
        (id.row() < self.vocab_size).then(|| {
            let row_bytes = self.embedding_dim * self.dtype.size_in_bytes();
            let start = self.range.start + id.row() * row_bytes;
            start..start + row_bytes
        })
    }
}

impl EmbeddingSource for MappedTable {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn embedding_dim(&self) -> usize {
        self.embedding_dim
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        Ok(self.collect_rows(ids)?)
    }
}

impl HostTable for MappedTable {
    fn row(&self, id: TokenId) -> Option<RowRef<'_>> {
        let range = self.row_range(id)?;
        Some(RowRef::Bytes(self.dtype, self.file.bytes_at(range)))
    }
}

impl fmt::Debug for MappedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedTable")
            .field("path", &self.path())
            .field("name", &self.name)
            .field("dtype", &self.dtype)
            .field("shape", &[self.vocab_size, self.embedding_dim])
            .finish_non_exhaustive()
    }
}

/// The element type of rows that the file's type is, if it is one.
pub(crate) fn float_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F64 => Some(DType::F64),
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// The file's name of an element type.
pub(crate) fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

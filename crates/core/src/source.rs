//! The frozen table.

use half::{bf16, f16};

use crate::{BackendError, DType, Element, Error, TokenId, TokenRows};

/// A frozen embedding table of `vocab_size x embedding_dim` elements.
///
/// # Contract
///
/// 1. The sizes and the element type never change.
/// 2. [`read_rows`](Self::read_rows) returns row `ids[i]` as row `i`, bit for bit, in the table's element type;
///    ids may repeat and come in any order.
/// 3. An id at or above `vocab_size()` is [`Error::TokenOutOfRange`]; nothing is read.
/// 4. No call but [`WriteRows::write_rows`] changes the table, and none allocates in proportion to `vocab_size()`.
pub trait EmbeddingSource {
    /// The backend's error.
    type Error: BackendError;

    /// Rows of the table (`V`).
    fn vocab_size(&self) -> usize;
    /// Length of a row (`D`).
    fn embedding_dim(&self) -> usize;
    /// Element type of the table.
    fn dtype(&self) -> DType;
    /// Copies rows to the host: `[ids.len(), embedding_dim()]`.
    ///
    /// # Errors
    ///
    /// By clause 3, or when the framework fails.
    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows, Self::Error>;

    /// The check of clause 3, for implementations to call first.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] naming the first id that is not below `vocab_size()`.
    fn check_ids(&self, ids: &[TokenId]) -> crate::Result<()> {
        let vocab_size = self.vocab_size();
        match ids.iter().find(|id| id.row() >= vocab_size) {
            Some(id) => Err(Error::TokenOutOfRange {
                id: i64::from(id.0),
                vocab_size,
            }),
            None => Ok(()),
        }
    }
}

/// A table whose rows can be overwritten: what merging needs.
///
/// # Contract
///
/// 1. [`write_rows`](Self::write_rows) sets row `ids[i]` to row `i` of `rows`, bit for bit; no other row changes.
/// 2. Rows of another element type or shape are [`Error::DType`] or [`Error::Shape`], an id out of range is
///    [`Error::TokenOutOfRange`]; then no row changes.
/// 3. The next read and the next lookup see the new rows. Whether other values that share the table's storage see
///    them too, the backend says.
pub trait WriteRows: EmbeddingSource {
    /// Overwrites the rows `ids` with `rows`, of shape `[ids.len(), embedding_dim()]` and the table's type.
    ///
    /// # Errors
    ///
    /// By clause 2, or when the framework fails.
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<(), Self::Error>;

    /// The checks of clause 2, for implementations to call first.
    ///
    /// # Errors
    ///
    /// By clause 2.
    fn check_write(&self, ids: &[TokenId], rows: &TokenRows) -> crate::Result<()> {
        rows.expect_shape("rows to write", ids.len(), self.embedding_dim())?;
        rows.expect_dtype("rows to write", self.dtype())?;
        self.check_ids(ids)
    }
}

/// A table whose rows lie in host memory, as an array or a memory-mapped file: rows are borrowed, never copied
/// before they reach their destination, by several threads at once for large batches.
///
/// # Contract
///
/// 1. For an id below `vocab_size()`, [`row`](Self::row) borrows exactly `embedding_dim()` elements.
/// 2. For any other id it is `None`.
pub trait HostTable: EmbeddingSource + Sync {
    /// Borrows a row.
    fn row(&self, id: TokenId) -> Option<RowRef<'_>>;

    /// Clause 2 and 3 of [`EmbeddingSource`] in terms of [`row`](Self::row), for implementations to call.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] by clause 3.
    fn collect_rows(&self, ids: &[TokenId]) -> crate::Result<TokenRows> {
        fn collect<T: Element, S: HostTable + ?Sized>(
            table: &S,
            ids: &[TokenId],
        ) -> crate::Result<TokenRows> {
            let dim = table.embedding_dim();
            let mut values = Vec::with_capacity(ids.len() * dim);
            for row in ids.iter().filter_map(|id| table.row(*id)) {
                row.extend_into(&mut values);
            }
            TokenRows::new::<T>(values, ids.len(), dim)
        }
        self.check_ids(ids)?;
        match self.dtype() {
            DType::F64 => collect::<f64, _>(self, ids),
            DType::F32 => collect::<f32, _>(self, ids),
            DType::F16 => collect::<f16, _>(self, ids),
            DType::BF16 => collect::<bf16, _>(self, ids),
        }
    }
}

/// Rows on the host are a table of as many rows.
impl EmbeddingSource for TokenRows {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.num_rows()
    }

    fn embedding_dim(&self) -> usize {
        self.embedding_dim()
    }

    fn dtype(&self) -> DType {
        self.dtype()
    }

    fn read_rows(&self, ids: &[TokenId]) -> crate::Result<TokenRows> {
        self.collect_rows(ids)
    }
}

impl HostTable for TokenRows {
    fn row(&self, id: TokenId) -> Option<RowRef<'_>> {
        self.row(id.row())
    }
}

/// A borrowed row of a host table.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum RowRef<'a> {
    /// Double precision.
    F64(&'a [f64]),
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// Little-endian bytes of a file, of any alignment.
    Bytes(DType, &'a [u8]),
    /// Integers that stand for `value * scale`, computed in `f32` and rounded to `dtype`.
    Int8 {
        /// The integers.
        values: &'a [i8],
        /// Their factor.
        scale: f32,
        /// The type of the elements that they stand for.
        dtype: DType,
    },
}

impl RowRef<'_> {
    /// Writes the row's elements to `out`, converted to its type: the same bits if that is the row's own type,
    /// else rounded to nearest even. Elements past the shorter of the two are left alone.
    #[inline]
    pub fn decode_into<T: Element>(self, out: &mut [T]) {
        if let Some(row) = T::borrow_row(self) {
            let len = row.len().min(out.len());
            out[..len].copy_from_slice(&row[..len]);
            return;
        }
        if let Some(row) = T::Compute::borrow_row(self) {
            T::from_compute_slice(row, out);
            return;
        }
        match self {
            Self::F64(row) => convert(row, out),
            Self::F32(row) => convert(row, out),
            Self::F16(row) => convert(row, out),
            Self::BF16(row) => convert(row, out),
            Self::Bytes(DType::F64, bytes) => decode::<f64, T>(bytes, out),
            Self::Bytes(DType::F32, bytes) => decode::<f32, T>(bytes, out),
            Self::Bytes(DType::F16, bytes) => decode::<f16, T>(bytes, out),
            Self::Bytes(DType::BF16, bytes) => decode::<bf16, T>(bytes, out),
            Self::Int8 { values, scale, dtype } => match dtype {
                DType::F64 => dequantize::<f64, T>(values, scale, out),
                DType::F32 => dequantize::<f32, T>(values, scale, out),
                DType::F16 => dequantize::<f16, T>(values, scale, out),
                DType::BF16 => dequantize::<bf16, T>(values, scale, out),
            },
        }
    }
}

impl RowRef<'_> {
    /// As [`decode_into`](Self::decode_into), appended: `out` grows by the row.
    #[inline]
    pub fn extend_into<T: Element>(self, out: &mut Vec<T>) {
        if let Some(row) = T::borrow_row(self) {
            out.extend_from_slice(row);
        } else {
            let start = out.len();
            out.resize(start + self.len(), T::default());
            self.decode_into(&mut out[start..]);
        }
    }

    /// Writes a trained row as a table of type `table` would hold it: rounded to that type, then converted to
    /// `T`. So an override gives the bits of merging first and looking up then.
    #[inline]
    pub fn decode_rounded<T: Element>(self, table: DType, out: &mut [T]) {
        fn via<M: Element, T: Element>(row: RowRef<'_>, out: &mut [T]) {
            let mut middle = [M::default(); 64];
            let len = row.len().min(out.len());
            let mut start = 0;
            while start < len {
                let end = len.min(start + middle.len());
                row.slice(start, end).decode_into(&mut middle[..end - start]);
                convert(&middle[..end - start], &mut out[start..end]);
                start = end;
            }
        }
        match table {
            _ if table == self.dtype() || table == T::DTYPE => self.decode_into(out),
            DType::F64 => via::<f64, T>(self, out),
            DType::F32 => via::<f32, T>(self, out),
            DType::F16 => via::<f16, T>(self, out),
            DType::BF16 => via::<bf16, T>(self, out),
        }
    }

    /// How many elements the row has.
    pub fn len(self) -> usize {
        match self {
            Self::F64(row) => row.len(),
            Self::F32(row) => row.len(),
            Self::F16(row) => row.len(),
            Self::BF16(row) => row.len(),
            Self::Bytes(dtype, bytes) => bytes.len() / dtype.size_in_bytes(),
            Self::Int8 { values, .. } => values.len(),
        }
    }

    /// Whether the row has no element.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64(_) => DType::F64,
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::Bytes(dtype, _) | Self::Int8 { dtype, .. } => dtype,
        }
    }
}

impl<'a> RowRef<'a> {
    /// `len` elements from `start` on, if the row has so many.
    pub fn get(self, start: usize, len: usize) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= self.len()).then(|| self.slice(start, end))
    }

    /// Elements `start..end`, which must lie in the row.
    fn slice(self, start: usize, end: usize) -> RowRef<'a> {
        match self {
            Self::F64(row) => Self::F64(&row[start..end]),
            Self::F32(row) => Self::F32(&row[start..end]),
            Self::F16(row) => Self::F16(&row[start..end]),
            Self::BF16(row) => Self::BF16(&row[start..end]),
            Self::Bytes(dtype, bytes) => {
                let size = dtype.size_in_bytes();
                Self::Bytes(dtype, &bytes[start * size..end * size])
            }
            Self::Int8 { values, scale, dtype } => Self::Int8 {
                values: &values[start..end],
                scale,
                dtype,
            },
        }
    }
}

/// Converts one element; the branch is constant for each pair of types.
#[inline]
fn cast<S: Element, T: Element>(value: S) -> T {
    if S::DTYPE as u8 == DType::F64 as u8 || T::DTYPE as u8 == DType::F64 as u8 {
        T::from_f64(value.to_f64())
    } else {
        T::from_f32(value.to_f32())
    }
}

/// How many elements are converted at a time: few enough for the fastest cache.
const BLOCK: usize = 128;

/// Converts elements, by slices; the shorter of the two counts.
pub(crate) fn convert<S: Element, T: Element>(row: &[S], out: &mut [T]) {
    let mut wide = [S::Compute::default(); BLOCK];
    let mut rounded = [T::Compute::default(); BLOCK];
    for (row, out) in row.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        let len = row.len().min(out.len());
        S::to_compute_slice(&row[..len], &mut wide);
        for (rounded, wide) in rounded[..len].iter_mut().zip(&wide) {
            *rounded = cast(*wide);
        }
        T::from_compute_slice(&rounded[..len], out);
    }
}

/// By way of the table's type `S`.
fn dequantize<S: Element, T: Element>(values: &[i8], scale: f32, out: &mut [T]) {
    let mut wide = [S::Compute::default(); BLOCK];
    let mut elements = [S::default(); BLOCK];
    for (values, out) in values.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        let len = values.len().min(out.len());
        for (wide, value) in wide[..len].iter_mut().zip(values) {
            *wide = cast(f32::from(*value) * scale);
        }
        S::from_compute_slice(&wide[..len], &mut elements);
        convert(&elements[..len], out);
    }
}

fn decode<S: Element, T: Element>(bytes: &[u8], out: &mut [T]) {
    let size = S::DTYPE.size_in_bytes();
    if S::DTYPE as u8 == T::DTYPE as u8 {
        let values = bytes.chunks_exact(size);
        out.iter_mut()
            .zip(values)
            .for_each(|(out, value)| *out = T::from_le_bytes(value));
        return;
    }
    let mut elements = [S::default(); BLOCK];
    for (bytes, out) in bytes.chunks(BLOCK * size).zip(out.chunks_mut(BLOCK)) {
        let values = bytes.chunks_exact(size);
        let len = values.len();
        for (element, value) in elements.iter_mut().zip(values) {
            *element = S::from_le_bytes(value);
        }
        convert(&elements[..len], out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_type_keeps_every_bit() {
        let nan = bf16::from_bits(0x7f81);
        let mut out = [bf16::ZERO; 2];
        RowRef::BF16(&[nan, bf16::NEG_ZERO]).decode_into(&mut out);
        assert_eq!(out.map(bf16::to_bits), [0x7f81, 0x8000]);
        RowRef::Bytes(DType::BF16, &[0x81, 0x7f, 0x00, 0x80]).decode_into(&mut out);
        assert_eq!(out.map(bf16::to_bits), [0x7f81, 0x8000]);
    }

    #[test]
    fn other_types_are_converted() {
        let mut out = [0f32; 2];
        RowRef::Bytes(DType::F16, &[0x00, 0x3c, 0x00, 0xc0]).decode_into(&mut out);
        assert_eq!(out.map(f32::to_bits), [1f32, -2.0].map(f32::to_bits));
        let mut half = [bf16::ZERO; 1];
        RowRef::F32(&[1.5]).decode_into(&mut half);
        assert_eq!(half[0], bf16::from_f32(1.5));
    }

    #[test]
    fn a_part_of_a_row_lies_in_it() {
        let row = RowRef::Bytes(DType::F16, &[0x00, 0x3c, 0x00, 0xc0]);
        let mut out = [0f32; 1];
        row.get(1, 1).unwrap().decode_into(&mut out);
        assert_eq!(out, [-2.0]);
        assert!(row.get(1, 2).is_none() && row.get(usize::MAX, 2).is_none());
        assert!(row.get(2, 0).unwrap().is_empty());
    }

    #[test]
    fn rows_on_the_host_are_a_table() {
        let rows = TokenRows::new(vec![1f32, -0.0, 3.0, 4.0], 2, 2).unwrap();
        let read = rows.read_rows(&[TokenId(1), TokenId(0), TokenId(1)]).unwrap();
        assert_eq!(read.as_slice::<f32>().unwrap(), [3.0, 4.0, 1.0, -0.0, 3.0, 4.0]);
        let (id, vocab_size) = (2, 2);
        assert_eq!(
            rows.read_rows(&[TokenId(2)]),
            Err(Error::TokenOutOfRange { id, vocab_size })
        );
    }

    #[test]
    fn a_trained_row_is_rounded_as_the_table_would() {
        let row: Vec<f32> = (0u8..130).map(|i| 1.0 + f32::from(i) * 1e-3).collect();
        let mut out = vec![0f32; 130];
        RowRef::F32(&row).decode_rounded(DType::BF16, &mut out);
        let want: Vec<f32> = row.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        assert_eq!(out, want);
        RowRef::F32(&row).decode_rounded(DType::F32, &mut out);
        assert_eq!(out, row);
    }
}

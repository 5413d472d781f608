//! The header of a safetensors file: 8 bytes of length, JSON, padding.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::value::RawValue;

use crate::error::one_line;
use crate::json::UniqueMap;

/// The largest header that is read: enough for 100,000 tensors, and parsed in less than 200 MB whatever it holds.
pub(crate) const MAX_HEADER_BYTES: u64 = 12 << 20;
const LENGTH_BYTES: usize = 8;
const METADATA: &str = "__metadata__";

/// A checked header: every tensor lies in the file, and together they fill it.
#[derive(Debug)]
pub(crate) struct Header {
    /// `None` if the file has none.
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    /// The tensors; offsets count from [`data_start`](Self::data_start).
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
    /// Where the data begin.
    pub(crate) data_start: usize,
}

/// Why a header is refused.
#[derive(Debug)]
pub(crate) enum HeaderError {
    TooLarge(u64),
    Invalid(String),
}

impl From<String> for HeaderError {
    fn from(reason: String) -> Self {
        Self::Invalid(reason)
    }
}

impl Header {
    /// Parses and checks the header of a whole file.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
            let reason = format!(
                "it has {} bytes, fewer than the 8 of the header's length",
                file.len()
            );
            return Err(HeaderError::Invalid(reason));
        };
        let length = u64::from_le_bytes(*length);
        let json = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        let Some(json) = json else {
            let have = rest.len();
            return Err(
                format!("the header should have {length} bytes, but the file ends after {have}").into(),
            );
        };
        if length > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLarge(length));
        }
        let json = std::str::from_utf8(json).map_err(|error| format!("the header is not UTF-8: {error}"))?;
        let data_start = LENGTH_BYTES + json.len();
        let (metadata, tensors) = parse_entries(json)?;
        check_layout(&tensors, file.len() - data_start)?;
        Ok(Self {
            metadata,
            tensors,
            data_start,
        })
    }
}

type Entries = (Option<BTreeMap<String, String>>, BTreeMap<String, TensorInfo>);

fn parse_entries(json: &str) -> Result<Entries, String> {
    let UniqueMap(entries) = serde_json::from_str::<UniqueMap<&RawValue>>(json)
        .map_err(|error| format!("the header: {}", one_line(error)))?;
    let mut metadata = None;
    let mut tensors = BTreeMap::new();
    for (name, raw) in entries {
        if name == METADATA {
            let UniqueMap(map) = serde_json::from_str::<UniqueMap<String>>(raw.get())
                .map_err(|error| format!("{METADATA}: {}", one_line(error)))?;
            metadata = Some(map);
        } else {
            let info = serde_json::from_str(raw.get())
                .map_err(|error| format!("tensor {name:?}: {}", one_line(error)))?;
            tensors.insert(name, info);
        }
    }
    Ok((metadata, tensors))
}

/// Checks that the tensors follow each other without gaps, are as long as their shapes say, and fill the file.
fn check_layout(tensors: &BTreeMap<String, TensorInfo>, data_len: usize) -> Result<(), String> {
    let mut ordered: Vec<_> = tensors.iter().collect();
    ordered.sort_by_key(|(_, info)| info.data_offsets);
    let mut end_of_last = 0;
    for (name, info) in ordered {
        let (start, end) = info.data_offsets;
        if start != end_of_last || end < start {
            return Err(format!(
                "tensor {name:?}: offsets [{start}, {end}] do not continue at byte {end_of_last}"
            ));
        }
        let bytes = byte_len(info).ok_or_else(|| {
            format!(
                "tensor {name:?}: shape {:?} has no size in whole bytes",
                info.shape
            )
        })?;
        if bytes != end - start {
            let (shape, dtype) = (&info.shape, info.dtype);
            return Err(format!(
                "tensor {name:?}: shape {shape:?} of {dtype:?} takes {bytes} bytes, but the offsets span {}",
                end - start
            ));
        }
        end_of_last = end;
    }
    if end_of_last != data_len {
        return Err(format!(
            "the tensors take {end_of_last} bytes, but the file holds {data_len}"
        ));
    }
    Ok(())
}

fn byte_len(info: &TensorInfo) -> Option<usize> {
    let elements = info
        .shape
        .iter()
        .try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

impl Header {
    /// The header, with its length, of the same tensors in the same order, some of them with another dimension: the first
    /// that was the old number of rows is the new one.
    pub(crate) fn with_rows(&self, rows: &BTreeMap<&str, [usize; 2]>) -> io::Result<Vec<u8>> {
        let mut ordered: Vec<_> = self.tensors.iter().collect();
        ordered.sort_by_key(|(_, info)| info.data_offsets);
        let mut entries = Vec::new();
        if let Some(metadata) = &self.metadata {
            entries.push(entry(METADATA, metadata)?);
        }
        let mut offset = 0;
        for (name, info) in ordered {
            let mut info = info.clone();
            if let Some([old, new]) = rows.get(name.as_str())
                && let Some(dimension) = info.shape.iter_mut().find(|dimension| *dimension == old)
            {
                *dimension = *new;
            }
            let bytes = byte_len(&info)
                .ok_or_else(|| io::Error::other(format!("tensor {name:?} grows too large")))?;
            info.data_offsets = (offset, offset + bytes);
            offset += bytes;
            entries.push(entry(name, &info)?);
        }
        Ok(framed(format!("{{{}}}", entries.join(","))))
    }
}

/// A header's length and text, padded to 8 bytes.
fn framed(mut header: String) -> Vec<u8> {
    let padded = header.len().next_multiple_of(LENGTH_BYTES);
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

/// A tensor to write.
pub(crate) struct TensorData<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
}

/// Writes a file as the safetensors library does: wide types first, then by name; the header padded to 8 bytes.
/// Metadata come in the order of their keys.
pub(crate) fn write_safetensors(
    out: &mut dyn Write,
    metadata: &BTreeMap<String, String>,
    mut tensors: Vec<TensorData<'_>>,
) -> io::Result<()> {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut header = String::from("{");
    if !metadata.is_empty() {
        header.push_str(&entry(METADATA, metadata)?);
    }
    let mut offset = 0;
    for tensor in &tensors {
        let end = offset + tensor.bytes.len();
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (offset, end),
        };
        if header.len() > 1 {
            header.push(',');
        }
        header.push_str(&entry(&tensor.name, &info)?);
        offset = end;
    }
    header.push('}');
    out.write_all(&framed(header))?;
    tensors.iter().try_for_each(|tensor| out.write_all(&tensor.bytes))
}

fn entry(name: &str, value: &impl serde::Serialize) -> io::Result<String> {
    let name = serde_json::to_string(name)?;
    let value = serde_json::to_string(value)?;
    Ok(format!("{name}:{value}"))
}

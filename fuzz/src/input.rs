//! How the bytes of one input become several files.

use serde_json::{Map, Value, json};

/// The largest tensor that is filled.
const MAX_TENSOR_BYTES: u64 = 1 << 16;

/// What the first byte of an input says about the safetensors files after it.
#[derive(Clone, Copy)]
pub(crate) struct Mode(u8);

impl Mode {
    pub(crate) fn split(input: &[u8]) -> Option<(Self, &[u8])> {
        input.split_first().map(|(mode, rest)| (Self(*mode), rest))
    }

    /// The bytes of a safetensors file: as they are or, so that mutations of names, shapes and types reach what
    /// lies behind the checks of lengths and offsets, a header for which those are made right and data are added.
    pub(crate) fn file(self, bytes: &[u8]) -> Vec<u8> {
        let made = if self.0 & 1 == 0 {
            None
        } else {
            self.laid_out(bytes)
        };
        made.unwrap_or_else(|| bytes.to_vec())
    }

    fn laid_out(self, header: &[u8]) -> Option<Vec<u8>> {
        let mut header: Map<String, Value> = serde_json::from_slice(header).ok()?;
        let mut data = Vec::new();
        for (name, info) in &mut header {
            let Some(len) = (name != "__metadata__").then(|| byte_len(info)).flatten() else {
                continue;
            };
            let start = data.len();
            let seed = if self.0 & 2 == 0 { 0 } else { start };
            data.extend((0..len).map(|at| pattern(seed + at)));
            info["data_offsets"] = json!([start, data.len()]);
        }
        let header = serde_json::to_vec(&header).ok()?;
        let len = u64::try_from(header.len()).ok()?.to_le_bytes();
        Some([&len[..], &header, &data].concat())
    }
}

/// The first file, whose length stands before it in four bytes, and what follows it.
pub(crate) fn split_file(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((len, rest)) = input.split_first_chunk() else {
        return (input, &[]);
    };
    let len = u32::from_le_bytes(*len) as usize;
    rest.split_at(len.min(rest.len()))
}

fn byte_len(info: &Value) -> Option<usize> {
    let bits = match info.get("dtype")?.as_str()? {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        "F4" => 4,
        _ => return None,
    };
    let dims = info.get("shape")?.as_array()?;
    let bits = dims
        .iter()
        .try_fold(bits, |product: u64, dim| product.checked_mul(dim.as_u64()?))?;
    usize::try_from(bits / 8)
        .ok()
        .filter(|_| bits / 8 <= MAX_TENSOR_BYTES)
}

/// Bytes that repeat at no power of two, and make finite numbers of every float type.
fn pattern(at: usize) -> u8 {
    u8::try_from(at * 37 % 61).unwrap_or_default()
}

//! Stores of trained rows that go wrong.

use half::f16;
use trainable_tokens_core::{DType, DeltaStore, TokenRows};
use trainable_tokens_nested_vec::{Result, VecRows};

use crate::faulty::{Change, Fault, Rows, Table};

/// The rows in the opposite order.
fn reversed(rows: &TokenRows) -> TokenRows {
    let [k, dim] = rows.shape();
    let values = rows.to_f32_vec();
    let turned = (0..k).rev().flat_map(|row| values[row * dim..][..dim].to_vec());
    TokenRows::new(turned.collect(), k, dim)
        .map_or_else(|_| rows.clone(), |turned| turned.to_dtype(rows.dtype()))
}

/// Trains in single precision whatever was given.
pub(crate) struct AlwaysSingle;

impl Fault<f16> for AlwaysSingle {
    fn delta(&self, _: &Table<f16>, rows: &TokenRows) -> Result<VecRows> {
        Ok(VecRows::new(rows.to_dtype(DType::F32)))
    }
}

/// Trains in the table's type whatever was given.
pub(crate) struct InTheTablesType;

impl Fault<f16> for InTheTablesType {
    fn delta(&self, _: &Table<f16>, rows: &TokenRows) -> Result<VecRows> {
        Ok(VecRows::new(rows.to_dtype(DType::F16)))
    }
}

/// Copies the table to have it at hand.
pub(crate) struct TableCopied;

impl Fault for TableCopied {
    fn delta(&self, table: &Table<f32>, rows: &TokenRows) -> Result<VecRows> {
        std::hint::black_box(table.now().clone());
        Ok(VecRows::new(rows.clone()))
    }
}

/// Reads the last row first.
pub(crate) struct ReadReversed;

impl Fault for ReadReversed {
    fn read(&self, rows: &Rows<f32>) -> Result<TokenRows> {
        Ok(reversed(rows.now.rows()))
    }
}

/// Reads the rows that the store was made of.
pub(crate) struct StaleReads;

impl Fault for StaleReads {
    fn read(&self, rows: &Rows<f32>) -> Result<TokenRows> {
        rows.first.read()
    }
}

/// Takes rows of any shape.
pub(crate) struct AnyShape;

impl Fault for AnyShape {
    fn write(&self, rows: &mut Rows<f32>, new: &TokenRows) -> Result<()> {
        rows.now = VecRows::new(new.clone());
        Ok(())
    }
}

/// Takes rows of any type.
pub(crate) struct AnyType;

impl Fault for AnyType {
    fn write(&self, rows: &mut Rows<f32>, new: &TokenRows) -> Result<()> {
        rows.now.write(&new.to_dtype(rows.now.dtype()))
    }
}

/// Updates of the rows.
macro_rules! updates {
    ($(#[$doc:meta] $name:ident: |$rows:ident, $change:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn update(&self, $rows: &mut Rows<f32>, $change: &mut Change<'_>) -> Result<()> {
                $body
            }
        }
    )+ };
}

updates! {
    /// Shows the optimizer the rows in another order: its state is in that order then.
    UpdatedReversed: |rows, change| {
        let mut turned = reversed(rows.now.rows());
        change(&mut turned)?;
        rows.now.write(&reversed(&turned))
    };
    /// Forgets to write back.
    NotWrittenBack: |rows, change| Ok(change(&mut rows.now.read()?)?);
    /// Takes no notice of an error.
    ErrorSwallowed: |rows, change| {
        let mut new = rows.now.read()?;
        let _ = change(&mut new);
        rows.now.write(&new)
    };
    /// Trains in half precision.
    UpdatedInHalf: |rows, change| {
        let mut new = rows.now.read()?;
        change(&mut new)?;
        rows.now.write(&new.to_dtype(DType::BF16).to_dtype(DType::F32))
    };
    /// Updates row after row, which counts as many steps.
    UpdatedTwice: |rows, change| {
        let mut new = rows.now.read()?;
        change(&mut new)?;
        change(&mut new)?;
        rows.now.write(&new)
    };
    /// Needs a buffer as large as a table.
    LargeBuffer: |rows, change| {
        std::hint::black_box(vec![0f32; rows.now.rows().embedding_dim() * 40_000]);
        rows.now.update(change)
    };
}

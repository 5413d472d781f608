//! Layers as a case needs them, in the harness's element type.

use trainable_tokens_core::{DType, TokenRows, TokenSet};

use super::adapters::Trained;
use super::module::Module;
use crate::{Failure, Harness, Layer, Source};

/// Whether every value of `narrow` is one of `wide`.
pub(super) fn holds(wide: DType, narrow: DType) -> bool {
    wide == narrow || wide == DType::F64 || (wide == DType::F32 && narrow != DType::F64)
}

/// Rows for the harness's table: the module's own type, unless the harness has a wider one.
pub(super) fn input<H: Harness>(rows: &TokenRows) -> TokenRows {
    rows.to_dtype(H::DTYPE)
}

/// A result in the type that PEFT's has: itself, unless the harness's table is wider than the module's.
pub(super) fn output<H: Harness>(module: &Module, got: TokenRows, want: &TokenRows) -> TokenRows {
    if H::DTYPE == module.table.dtype() {
        got
    } else {
        got.to_dtype(want.dtype())
    }
}

/// A layer without any trainable token.
pub(super) fn frozen<H: Harness>(module: &Module) -> Result<Layer<H>, Failure> {
    let source = H::source(&input::<H>(&module.table))?;
    Ok(Layer::<H>::frozen(source)?.with_options(module.options_over(H::DTYPE)))
}

/// A layer as the library makes it, with rows that are the base's.
pub(super) fn fresh<H: Harness>(module: &Module, tokens: TokenSet) -> Result<Layer<H>, Failure> {
    let source = H::source(&input::<H>(&module.table))?;
    Ok(Layer::<H>::new(source, tokens)?.with_options(module.options_over(H::DTYPE)))
}

/// A layer with these adapters, all of them active.
pub(super) fn layer<H: Harness>(module: &Module, adapters: &[Trained]) -> Result<Layer<H>, Failure> {
    over::<H>(module, H::source(&input::<H>(&module.table))?, adapters)
}

/// As [`layer`], over a table that is there already.
fn over<H: Harness>(module: &Module, table: Source<H>, adapters: &[Trained]) -> Result<Layer<H>, Failure> {
    let layer = match adapters {
        [Trained { name, tokens, rows }] if name == "default" => {
            Layer::<H>::with_rows(table, tokens.clone(), &train_in::<H>(module, rows))?
        }
        _ => {
            let mut layer = added_over::<H>(module, table, adapters)?;
            let names: Vec<_> = adapters.iter().map(|adapter| adapter.name.as_str()).collect();
            layer.activate(&names)?;
            layer
        }
    };
    Ok(layer.with_options(module.options_over(H::DTYPE)))
}

/// A layer with these adapters, none of them active.
pub(super) fn added<H: Harness>(module: &Module, adapters: &[Trained]) -> Result<Layer<H>, Failure> {
    let layer = added_over::<H>(module, H::source(&input::<H>(&module.table))?, adapters)?;
    Ok(layer.with_options(module.options_over(H::DTYPE)))
}

fn added_over<H: Harness>(
    module: &Module,
    table: Source<H>,
    adapters: &[Trained],
) -> Result<Layer<H>, Failure> {
    let mut layer = Layer::<H>::frozen(table)?;
    for Trained { name, tokens, rows } in adapters {
        layer.add_adapter_with_rows(name, tokens.clone(), &train_in::<H>(module, rows))?;
    }
    Ok(layer)
}

/// Rows in their own type; over a wider table they widen, too. If they are scaled then, they are rounded before.
fn train_in<H: Harness>(module: &Module, rows: &TokenRows) -> TokenRows {
    if H::DTYPE == module.table.dtype() {
        return rows.clone();
    }
    let rows = match module.options.scale {
        Some(_) => &rows.to_dtype(module.table.dtype()),
        None => rows,
    };
    rows.to_dtype(H::DTYPE.default_row_dtype())
}

/// Layers with the adapters' rows, in the type that PEFT loads them in (at least single precision) and in that of the
/// file, over tables that had other rows merged before.
pub(super) fn trained<H: Harness>(module: &Module, adapters: &[Trained]) -> Result<Vec<Layer<H>>, Failure> {
    let loaded = |adapter: &Trained| Trained {
        rows: adapter.rows.to_dtype(adapter.rows.dtype().default_row_dtype()),
        ..adapter.clone()
    };
    let zeros = |adapter: &Trained| Trained {
        rows: TokenRows::zeros(
            adapter.rows.dtype(),
            adapter.tokens.len(),
            adapter.rows.embedding_dim(),
        ),
        ..adapter.clone()
    };
    let mut layers = Vec::new();
    for rows in [adapters.iter().map(loaded).collect(), adapters.to_vec()] {
        let others: Vec<_> = adapters.iter().map(zeros).collect();
        let mut before = layer::<H>(module, &others)?;
        if !others.is_empty() {
            before.merge()?;
            before.unmerge()?;
        }
        layers.push(over::<H>(module, before.into_source(), &rows)?);
    }
    Ok(layers)
}

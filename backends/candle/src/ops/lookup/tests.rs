//! The path of all devices against the CPU's own.

use candle_core::DType;
use trainable_tokens_core::{Padding, PaddingRule, TokenId, TokenSet};

use super::*;
use crate::convert::to_rows;

fn table(dtype: DType) -> CandleTable {
    let values: Vec<f64> = (0..11 * 3).map(|i| (f64::from(i) * 0.37).sin() * 3.0).collect();
    let tensor = Tensor::from_vec(values, (11, 3), &Device::Cpu).unwrap();
    CandleTable::new(tensor.to_dtype(dtype).unwrap()).unwrap()
}

fn delta(dtype: DType) -> CandleDelta {
    let values = vec![-0.0, 1.0, f64::MIN_POSITIVE, 0.1, -7.3, 2.5, 1e3, -0.3, 0.7];
    let tensor = Tensor::from_vec(values, (3, 3), &Device::Cpu).unwrap();
    CandleDelta::new(&to_rows(&tensor.to_dtype(dtype).unwrap()).unwrap(), &Device::Cpu).unwrap()
}

/// Output and gradient of the lookup, on one path or the other.
fn both_passes(
    table: &CandleTable,
    delta: &CandleDelta,
    plan: &Arc<LookupPlan>,
    factor: Option<f64>,
    uploaded: bool,
) -> [trainable_tokens_core::TokenRows; 2] {
    let uploaded = uploaded.then(|| Uploaded::new(table, Some(delta), plan, factor).unwrap());
    let operation = OverrideRows {
        base: table.tensor().clone(),
        plan: Arc::clone(plan),
        factor,
        uploaded,
    };
    let out = delta.var().apply_op1(operation).unwrap();
    let count = u32::try_from(out.elem_count()).unwrap();
    let weights: Vec<f64> = (0..count).map(|i| f64::from(i) * 0.25 - 2.0).collect();
    let weights = Tensor::from_vec(weights, out.shape(), &Device::Cpu).unwrap();
    let loss = (&out * weights.to_dtype(out.dtype()).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let gradients = loss.backward().unwrap();
    let gradient = gradients.get(delta.var()).unwrap();
    [to_rows(&out).unwrap(), to_rows(gradient).unwrap()]
}

#[test]
fn both_paths_give_the_same_bits() {
    let dtypes = [DType::F64, DType::F32, DType::F16, DType::BF16];
    let tokens = TokenSet::new([9, 0, 4], 11).unwrap();
    let padding = Padding {
        token: TokenId(4),
        rule: PaddingRule::NoLookupGradient,
    };
    for (base, rows) in dtypes
        .into_iter()
        .flat_map(|base| dtypes.map(|rows| (base, rows)))
    {
        for factor in [None, Some(-1.7)] {
            for padding in [None, Some(padding)] {
                for ids in [&[4u32, 1, 9, 9, 0, 10, 4][..], &[1, 2, 3], &[4], &[]] {
                    let plan = Arc::new(LookupPlan::new(&tokens, padding, ids).unwrap());
                    let (table, delta) = (table(base), delta(rows));
                    let [out, gradient] = both_passes(&table, &delta, &plan, factor, false);
                    let [device_out, device_gradient] = both_passes(&table, &delta, &plan, factor, true);
                    assert!(out.bits_eq(&device_out), "{base:?} {rows:?} {factor:?} {ids:?}");
                    assert!(
                        gradient.bits_eq(&device_gradient),
                        "{base:?} {rows:?} {factor:?} {ids:?}"
                    );
                    assert_eq!(gradient.shape(), [3, 3]);
                }
            }
        }
    }
}

#[test]
fn the_plain_lookup_is_the_same_on_both_paths() {
    let tokens = TokenSet::new([9, 0, 4], 11).unwrap();
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for factor in [None, Some(0.3)] {
            let table = table(dtype);
            let plan = Arc::new(LookupPlan::new(&tokens, None, &[4, 1, 9]).unwrap());
            let out = lookup_rows(&table, None, &plan, factor).unwrap();
            let batch = Uploaded::new(&table, None, &plan, factor).unwrap();
            let (storage, layout) = table.tensor().storage_and_layout();
            let Storage::Cpu(storage) = &*storage else {
                panic!("the table is on the CPU");
            };
            let rows = Storage::Cpu(device::gather(storage, layout, &batch).unwrap());
            let rows = Tensor::from_storage(rows, out.shape(), BackpropOp::none(), false);
            assert!(to_rows(&rows).unwrap().bits_eq(&to_rows(&out).unwrap()));
        }
    }
}

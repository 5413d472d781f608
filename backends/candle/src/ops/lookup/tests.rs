//! The path of all devices against the CPU's own.

use candle_core::DType;
use trainable_tokens_core::{LayerOptions, MaxNorm, Padding, PaddingRule, TokenId, TokenRows, TokenSet};

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
    transform: RowTransform,
    uploaded: bool,
) -> [TokenRows; 2] {
    let uploaded = uploaded.then(|| Uploaded::new(table, Some(delta), plan, transform).unwrap());
    let operation = OverrideRows {
        base: table.tensor().clone(),
        plan: Arc::clone(plan),
        transform,
        shape: (1, plan.len(), 3).into(),
        uploaded,
    };
    let out = delta.tensor().apply_op1(operation).unwrap();
    let count = u32::try_from(out.elem_count()).unwrap();
    let weights: Vec<f64> = (0..count).map(|i| f64::from(i) * 0.25 - 2.0).collect();
    let weights = Tensor::from_vec(weights, out.shape(), &Device::Cpu).unwrap();
    let loss = (&out * weights.to_dtype(out.dtype()).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let gradients = loss.backward().unwrap();
    let gradient = gradients.get(delta.tensor()).unwrap();
    [
        to_rows(&out.squeeze(0).unwrap()).unwrap(),
        to_rows(gradient).unwrap(),
    ]
}

fn close(what: &str, got: &TokenRows, want: &TokenRows, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    for (got, want) in got.to_f64_vec().into_iter().zip(want.to_f64_vec()) {
        assert!(
            (got - want).abs() <= tolerance * want.abs(),
            "{what}: {got} {want}"
        );
    }
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
        for (scale, scale_grad_by_freq) in [
            (None, false),
            (Some(-1.7), false),
            (None, true),
            (Some(0.3), true),
        ] {
            for padding in [None, Some(padding)] {
                for ids in [&[4u32, 1, 9, 9, 0, 10, 4][..], &[1, 2, 3], &[4], &[]] {
                    let options = LayerOptions {
                        padding,
                        scale_grad_by_freq,
                        ..LayerOptions::default()
                    };
                    let what = format!("{base:?} {rows:?} {scale:?} {options:?} {ids:?}");
                    let transform = RowTransform {
                        scale,
                        max_norm: None,
                    };
                    let plan = Arc::new(LookupPlan::new(&tokens, options, ids).unwrap());
                    let (table, delta) = (table(base), delta(rows));
                    let [out, gradient] = both_passes(&table, &delta, &plan, transform, false);
                    let [device_out, device_gradient] = both_passes(&table, &delta, &plan, transform, true);
                    assert!(out.bits_eq(&device_out), "{what}");
                    assert!(gradient.bits_eq(&device_gradient), "{what}");
                    assert_eq!(gradient.shape(), [3, 3]);

                    // Norms are summed in another precision on devices.
                    let max_norm = Some(MaxNorm::new(2.5).unwrap());
                    let transform = RowTransform { scale, max_norm };
                    let [out, gradient] = both_passes(&table, &delta, &plan, transform, false);
                    let [device_out, device_gradient] = both_passes(&table, &delta, &plan, transform, true);
                    let tolerance = match base {
                        DType::BF16 => 8e-3,
                        DType::F16 => 1e-3,
                        _ => 1e-6,
                    };
                    close(&what, &device_out, &out, tolerance);
                    assert!(gradient.bits_eq(&device_gradient), "{what}");
                }
            }
        }
    }
}

#[test]
fn the_plain_lookup_is_the_same_on_both_paths() {
    let tokens = TokenSet::new([9, 0, 4], 11).unwrap();
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for scale in [None, Some(0.3)] {
            let transform = RowTransform {
                scale,
                max_norm: None,
            };
            let table = table(dtype);
            let plan = Arc::new(LookupPlan::new(&tokens, LayerOptions::default(), &[4, 1, 9]).unwrap());
            let out = lookup_rows(&table, None, &plan, transform, (3, 3).into()).unwrap();
            let batch = Uploaded::new(&table, None, &plan, transform).unwrap();
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

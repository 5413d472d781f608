//! The path of all devices against the CPU's own.

use candle_core::Var;
use trainable_tokens_core::{CrossEntropyOptions, LogitsChunk, Reduction, Softcap};

use super::*;

fn tensor(shape: (usize, usize), dtype: DType, seed: u32) -> Tensor {
    let len = u32::try_from(shape.0 * shape.1).unwrap();
    let values: Vec<f64> = (0..len)
        .map(|i| (f64::from(i * 31 + seed) * 0.731).sin() * 2.0)
        .collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1().unwrap()
}

#[test]
fn both_paths_agree() {
    for (dtype, tolerance) in [
        (DType::F64, 1e-12),
        (DType::F32, 1e-5),
        (DType::F16, 1e-2),
        (DType::BF16, 4e-2),
    ] {
        let weight = tensor((13, 6), dtype, 1);
        let bias = tensor((1, 13), dtype, 2).flatten_all().unwrap();
        let columns = Tensor::new(&[12u32, 0, 7], &Device::Cpu).unwrap();
        // The last row is the base's own.
        let kept = weight.narrow(0, 7, 1).unwrap();
        let rows = Tensor::cat(&[&tensor((2, 6), dtype, 3), &kept], 0).unwrap();
        let delta = Var::from_tensor(&rows.to_dtype(super::super::compute_dtype(dtype)).unwrap()).unwrap();
        let overrides = Overrides::new(&weight, delta.as_tensor(), columns).unwrap();
        let hidden = tensor((5, 6), dtype, 4);
        let cap = Some(Softcap::new(2.0).unwrap());
        for (softcap, reduction, labels) in [
            (None, Reduction::Mean, [12, 3, 3, 0, 5]),
            (cap, Reduction::Mean, [-100, 7, 3, -100, 5]),
            (cap, Reduction::Sum, [-100; 5]),
        ] {
            for (bias, overrides) in [(None, None), (Some(&bias), Some(&overrides))] {
                let options = CrossEntropyOptions {
                    softcap,
                    reduction,
                    chunk: LogitsChunk::rows(2).unwrap(),
                    ..CrossEntropyOptions::default()
                };
                let plan = CrossEntropyPlan::new(&labels, 13, options).unwrap();
                let projection = Projection {
                    weight: &weight,
                    bias,
                    overrides,
                };
                for both in [true, false] {
                    let wanted = Wanted {
                        of_hidden: both,
                        of_delta: both && overrides.is_some(),
                    };
                    let want = cpu::compute(&hidden, &projection, &plan, wanted).unwrap();
                    let got = device::compute(&hidden, &projection, &plan, wanted).unwrap();
                    let parts =
                        |computed: Computed| [Some(computed.loss), computed.of_hidden, computed.of_delta];
                    for (got, want) in parts(got).iter().zip(&parts(want)) {
                        assert_eq!(got.is_some(), want.is_some());
                        let (Some(got), Some(want)) = (got, want) else {
                            continue;
                        };
                        assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()));
                        for (got, want) in values(got).iter().zip(values(want)) {
                            assert!((got - want).abs() <= tolerance, "{dtype:?}: {got} {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn blocks_of_a_large_vocabulary_agree() {
    // More rows than all parts have in one block.
    const V: usize = 40_000;
    let weight = tensor((V, 3), DType::F64, 1);
    let columns = Tensor::new(&[39_999u32, 4_999, 5_000, 17, 21_000], &Device::Cpu).unwrap();
    let kept = weight.narrow(0, 21_000, 1).unwrap();
    let rows = Tensor::cat(&[&tensor((4, 3), DType::F64, 3), &kept], 0).unwrap();
    let delta = Var::from_tensor(&rows).unwrap();
    let overrides = Overrides::new(&weight, delta.as_tensor(), columns).unwrap();
    let hidden = (tensor((7, 3), DType::F64, 4) * 3.0).unwrap();
    let labels = [21_000, 2_047, 2_048, 39_999, -100, 4_999, 5_001];
    for softcap in [None, Some(Softcap::new(4.0).unwrap())] {
        let options = CrossEntropyOptions {
            softcap,
            ..CrossEntropyOptions::default()
        };
        let plan = CrossEntropyPlan::new(&labels, V, options).unwrap();
        let projection = Projection {
            weight: &weight,
            bias: None,
            overrides: Some(&overrides),
        };
        let wanted = Wanted {
            of_hidden: true,
            of_delta: true,
        };
        let want = device::compute(&hidden, &projection, &plan, wanted).unwrap();
        let got = cpu::compute(&hidden, &projection, &plan, wanted).unwrap();
        let parts = |computed: Computed| {
            let [of_hidden, of_delta] = [computed.of_hidden, computed.of_delta].map(Option::unwrap);
            [computed.loss, of_hidden, of_delta]
        };
        for (got, want) in parts(got).iter().zip(&parts(want)) {
            assert!(values(want).iter().any(|x| x.abs() > 1e-6));
            for (got, want) in values(got).iter().zip(values(want)) {
                assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{got} {want}");
            }
        }
    }
}

//! The path of all devices against the CPU's own.

use candle_core::{CpuStorage, DType, Device, Layout, Storage, Var, op::BackpropOp};

use super::*;
use crate::convert::to_rows;

fn tensor(shape: (usize, usize), dtype: DType, seed: u32) -> Tensor {
    let len = u32::try_from(shape.0 * shape.1).unwrap();
    let values: Vec<f64> = (0..len)
        .map(|i| (f64::from(i * 31 + seed) * 0.731).sin())
        .collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap()
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
        // The last row is the base's own: its column must keep the base's bits.
        let kept = weight.narrow(0, 7, 1).unwrap();
        let rows = Tensor::cat(&[&tensor((2, 6), dtype, 3), &kept], 0).unwrap();
        let delta = Var::from_tensor(&rows.to_dtype(crate::ops::compute_dtype(dtype)).unwrap()).unwrap();
        let x = tensor((5, 6), dtype, 4);
        let overrides = || Overrides::new(&weight, delta.as_tensor(), columns.clone()).unwrap();
        let want = project(&x, &weight, Some(&bias), Some(overrides())).unwrap();
        let plain = project(&x, &weight, Some(&bias), None).unwrap();

        let operation = ProjectOverridden::new(Project::new(&weight, Some(&bias)), overrides());
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            panic!("the input is on the CPU");
        };
        let (out, shape) = operation.forward::<CpuStorage>(storage, layout).unwrap();
        let out = Tensor::from_storage(Storage::Cpu(out), shape, BackpropOp::none(), false);
        let difference = (&out - &want)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .abs()
            .unwrap();
        let largest = difference.max_all().unwrap().to_scalar::<f64>().unwrap();
        assert!(largest <= tolerance, "{dtype:?}: {largest}");
        for column in [7, 3] {
            let of = |t: &Tensor| to_rows(&t.narrow(1, column, 1).unwrap()).unwrap();
            assert!(of(&out).bits_eq(&of(&plain)), "{dtype:?}: column {column}");
            assert!(of(&want).bits_eq(&of(&plain)), "{dtype:?}: column {column}");
        }
        let changed = |t: &Tensor| to_rows(&t.narrow(1, 12, 1).unwrap()).unwrap();
        assert!(!changed(&want).bits_eq(&changed(&plain)));

        let empty = Layout::contiguous((0, 6));
        let (_, shape) = operation.forward::<CpuStorage>(storage, &empty).unwrap();
        assert_eq!(shape.dims(), [0, 13]);
    }
}

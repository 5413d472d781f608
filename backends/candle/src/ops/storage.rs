//! From candle's storage enum to the storage of one device.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, MetalStorage, Result, Shape, Storage, bail};

/// The storage of one device, found in candle's enum over all of them.
pub(crate) trait DeviceStorage: BackendStorage<Device: BackendDevice<Storage = Self>> {
    /// Borrows it.
    ///
    /// # Errors
    ///
    /// When the tensor lies on another kind of device.
    fn of(storage: &Storage) -> Result<&Self>;

    /// Zeros of the same element type: all there is to a result without elements, which kernels refuse to make.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn zeros(&self, shape: &Shape) -> Result<Self> {
        self.device().zeros_impl(shape, self.dtype())
    }
}

impl DeviceStorage for CpuStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("a tensor of the operation does not lie on the CPU"),
        }
    }
}

impl DeviceStorage for CudaStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("a tensor of the operation does not lie on a CUDA device"),
        }
    }
}

impl DeviceStorage for MetalStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Metal(storage) => Ok(storage),
            _ => bail!("a tensor of the operation does not lie on a Metal device"),
        }
    }
}

/// The elements of a contiguous tensor in CPU storage, as a slice of the given variant.
macro_rules! elements {
    ($storage:expr, $layout:expr, $variant:ident) => {{
        match ($storage, $layout.contiguous_offsets()) {
            (candle_core::CpuStorage::$variant(values), Some((start, end))) => Some(&values[start..end]),
            _ => None,
        }
    }};
}
pub(super) use elements;

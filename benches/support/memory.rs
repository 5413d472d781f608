//! The memory that a step adds: of the process its anonymous memory, what it has allocated and touched, without the files
//! that it maps; of a CUDA device all that is in use there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use candle_core::Device;

/// Bytes now, as Linux counts them.
pub(crate) fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Bytes in use now on a CUDA device, by whomever.
#[cfg(feature = "cuda")]
fn device_bytes(device: &candle_core::CudaDevice) -> Option<u64> {
    use candle_core::cuda_backend::cudarc::driver::result;
    device.cuda_stream().context().bind_to_thread().ok()?;
    let (free, total) = result::mem_get_info().ok()?;
    Some((total - free) as u64)
}

/// Watches the peak from now on, every two milliseconds.
pub(crate) struct Peak {
    before: u64,
    highest: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Peak {
    /// Starts to watch the memory of the process, or of its GPU.
    pub(crate) fn watch(device: &Device) -> Self {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                device.synchronize().unwrap();
                let cuda = cuda.clone();
                Self::of(move || device_bytes(&cuda))
            }
            _ => Self::of(anonymous_bytes),
        }
    }

    fn of(bytes: impl Fn() -> Option<u64> + Send + 'static) -> Self {
        let before = bytes().unwrap();
        let highest = Arc::new(AtomicU64::new(before));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = spawn({
            let (highest, stop) = (Arc::clone(&highest), Arc::clone(&stop));
            move || {
                while !stop.load(Relaxed) {
                    highest.fetch_max(bytes().unwrap_or_default(), Relaxed);
                    sleep(Duration::from_millis(2));
                }
            }
        });
        Self {
            before,
            highest,
            stop,
            thread,
        }
    }

    /// Stops; by how many bytes the peak was above the beginning.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap();
        self.highest.load(Relaxed) - self.before
    }
}

//! Counting what is allocated.
// A global allocator implements an unsafe trait; this one only counts and hands every call on to the system's.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::{Failure, failure::ensure};

/// The system's allocator, counting. [`conformance_tests!`](crate::conformance_tests) installs it; a test of your own
/// does by
///
/// ```
/// # use trainable_tokens_testkit::{CountingAllocator, allocated};
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (vector, cost) = allocated(|| vec![0u8; 1 << 20]).map_err(|failure| failure.reason().to_owned())?;
/// assert_eq!((cost.largest, cost.calls), (vector.len(), 1));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static TOTAL: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    PEAK.fetch_max(LIVE.fetch_add(size, Relaxed) + size, Relaxed);
    LARGEST.fetch_max(size, Relaxed);
    TOTAL.fetch_add(size, Relaxed);
    CALLS.fetch_add(1, Relaxed);
}

// SAFETY: every call goes to the system's allocator with the arguments that came in.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_sub(layout.size(), Relaxed);
        count(size);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What some work asked of the allocator, on all threads of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Bytes of the largest single allocation.
    pub largest: usize,
    /// Bytes that lived at most at once, above those that lived before.
    pub growth: usize,
    /// All bytes, those given back since too.
    pub total: usize,
    /// How many times.
    pub calls: usize,
}

/// Runs `work` and counts what it allocates.
///
/// Nothing else of the process may run meanwhile; the kit runs its own cases of this group alone.
///
/// # Errors
///
/// If the [`CountingAllocator`] is not the program's allocator.
pub fn allocated<R>(work: impl FnOnce() -> R) -> Result<(R, Allocated), Failure> {
    CALLS.store(0, Relaxed);
    drop(std::hint::black_box(Box::new([0u8; 64])));
    ensure!(
        CALLS.load(Relaxed) > 0,
        "the kit's counting allocator is not the program's; see CountingAllocator"
    );
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    for counter in [&LARGEST, &TOTAL, &CALLS] {
        counter.store(0, Relaxed);
    }
    let result = work();
    let cost = Allocated {
        largest: LARGEST.load(Relaxed),
        growth: PEAK.load(Relaxed).saturating_sub(before),
        total: TOTAL.load(Relaxed),
        calls: CALLS.load(Relaxed),
    };
    Ok((result, cost))
}

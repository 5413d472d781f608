//! Work on several threads.

use std::thread;

use candle_core::utils::get_num_threads;

/// Less work than this, in elements, is not worth a thread.
const WORTH_A_THREAD: usize = 1 << 17;

/// How many elements each of the jobs takes that share work on `elements` elements in rows of `width`: whole rows, one
/// job for each of candle's threads.
pub(super) fn share(elements: usize, width: usize) -> usize {
    let width = width.max(1);
    let jobs = get_num_threads().clamp(1, (elements / WORTH_A_THREAD).max(1));
    (elements / width).div_ceil(jobs).max(1) * width
}

/// Runs jobs side by side, the first on this thread.
pub(super) fn run<J: FnOnce() + Send>(jobs: impl IntoIterator<Item = J>) {
    let mut jobs = jobs.into_iter();
    let Some(first) = jobs.next() else {
        return;
    };
    thread::scope(|scope| {
        for job in jobs {
            scope.spawn(job);
        }
        first();
    });
}

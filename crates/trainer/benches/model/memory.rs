//! The process's anonymous memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Anonymous memory now, in bytes; mapped files do not count.
fn anonymous() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Watches how far anonymous memory rises above its level at the start.
pub(crate) struct AnonymousMemory {
    before: Option<u64>,
    peak: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    watcher: JoinHandle<()>,
}

impl AnonymousMemory {
    pub(crate) fn watch() -> Self {
        let (peak, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let watcher = {
            let (peak, done) = (peak.clone(), done.clone());
            thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    peak.fetch_max(anonymous().unwrap_or(0), Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(2));
                }
            })
        };
        Self {
            before: anonymous(),
            peak,
            done,
            watcher,
        }
    }

    /// The rise in bytes; `None` where the system does not tell.
    pub(crate) fn extra(self) -> Option<u64> {
        self.done.store(true, Ordering::Relaxed);
        self.watcher.join().unwrap();
        Some(self.peak.load(Ordering::Relaxed).saturating_sub(self.before?))
    }
}

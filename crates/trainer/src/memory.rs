//! The process's memory.

/// The largest resident set of the process so far, in bytes; `None` where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        // Apple counts bytes, the others kilobytes.
        let unit = if cfg!(target_vendor = "apple") { 1 } else { 1024 };
        let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
        u64::try_from(usage.max_rss()).ok().map(|size| size * unit)
    }
    #[cfg(not(unix))]
    None
}

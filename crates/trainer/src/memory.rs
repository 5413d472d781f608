//! The process's memory.

/// The largest resident set of the process so far, in bytes; `None` where the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    high_water_mark().or_else(max_rss)
}

/// What Linux counts for this program alone: `getrusage` goes on counting from the one that started it.
fn high_water_mark() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn max_rss() -> Option<u64> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_follows_what_this_program_touches() {
        let before = peak_rss_bytes().unwrap();
        let touched = vec![1u8; 256 << 20];
        let after = peak_rss_bytes().unwrap();
        assert!(touched.iter().all(|byte| *byte == 1));
        assert!(after >= before.max(256 << 20), "{before} {after}");
    }
}

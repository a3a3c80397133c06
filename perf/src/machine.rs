//! Facts without which figures mean little: machine, sources, time.

use std::fs::read_to_string;

use crate::result::{Git, Machine};

/// This machine, now. What the system does not tell is left empty.
pub fn machine() -> Machine {
    let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|l| l.starts_with(name))?;
        line.split_once(':').map(|(_, v)| v.trim().to_owned())
    };
    let meminfo = read_to_string("/proc/meminfo").unwrap_or_default();
    let first_number = |text: &str| text.split_ascii_whitespace().find_map(|w| w.parse::<f64>().ok());
    let governor = read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    Machine {
        cpu: field("model name").unwrap_or_default(),
        cpus: cpuinfo.lines().filter(|l| l.starts_with("processor")).count(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        governor: governor.map_or_else(|_| "none".into(), |g| g.trim().to_owned()),
        virtual_machine: field("flags").is_some_and(|f| f.split(' ').any(|f| f == "hypervisor")),
        memory_mib: first_number(&meminfo).map_or(0, |kib| kib as u64 / 1024),
        load_average: first_number(&read_to_string("/proc/loadavg").unwrap_or_default()).unwrap_or(0.0),
    }
}

/// Of which sources this program was built (build.rs).
pub fn git() -> Git {
    Git { revision: env!("RNBD_GIT_REVISION").into(), dirty: env!("RNBD_GIT_DIRTY") == "1" }
}

/// The time in UTC as RFC 3339, to the second.
pub fn now_utc() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    utc(since.map_or(0, |d| d.as_secs()))
}

/// `seconds` since 1970 in the proleptic Gregorian calendar (Hinnant, "chrono-compatible low-level date algorithms").
fn utc(seconds: u64) -> String {
    let (days, time) = ((seconds / 86400) as i64 + 719_468, seconds % 86400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * shifted + 2) / 5 + 1, (shifted + 2) % 12 + 1);
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_767_225_600), "2026-01-01T00:00:00Z");
    }

    #[test]
    fn this_machine_has_a_cpu_and_a_kernel() {
        let m = machine();
        assert!(m.cpus > 0 && !m.kernel.is_empty() && m.memory_mib > 0, "{m:?}");
    }
}

//! A run as it goes, on standard error.

use std::io::Write;

use super::options::Progress;
use crate::result::Interval;

/// Writes a line for each interval, if wanted.
pub(super) struct Teller {
    how: Progress,
    seconds: f64,
    /// Characters of the live line.
    shown: usize,
}

impl Teller {
    pub fn new(how: Progress, seconds: f64) -> Self {
        Self { how, seconds, shown: 0 }
    }

    pub fn tell(&mut self, i: &Interval) {
        if self.how == Progress::Quiet {
            return;
        }
        let line = format!(
            "{:.1}/{:.0} s: {}IOPS, {:.1} MiB/s, p50 {}, p99 {}, max {}",
            i.at,
            self.seconds,
            si(i.iops),
            i.mib_s,
            time(i.p50_us),
            time(i.p99_us),
            time(i.max_us)
        );
        // Nobody may be reading, which is no reason to stop.
        let _ = match self.how {
            Progress::Live => write!(std::io::stderr(), "\r{line:<width$}", width = self.shown),
            _ => writeln!(std::io::stderr(), "{line}"),
        };
        self.shown = line.len();
    }

    /// Something else may be written now.
    pub fn end(&mut self) {
        if self.how == Progress::Live && self.shown > 0 {
            let _ = writeln!(std::io::stderr());
            self.shown = 0;
        }
    }
}

/// "16.40 M", "521.3 k", "42.0 ".
pub fn si(n: f64) -> String {
    match n {
        n if n >= 1e6 => format!("{:.2} M", n / 1e6),
        n if n >= 1e4 => format!("{:.1} k", n / 1e3),
        n => format!("{n:.1} "),
    }
}

/// Microseconds as "850 ns", "12.3 us", "4.5 ms", "2.0 s".
pub fn time(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{:.0} ns", us * 1e3),
        us if us < 1e3 => format!("{us:.1} us"),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([16.4e6, 521_300.0, 42.0].map(si), ["16.40 M", "521.3 k", "42.0 "]);
        assert_eq!([0.85, 12.34, 4500.0, 2e6].map(time), ["850 ns", "12.3 us", "4.5 ms", "2.0 s"]);
    }
}

//! The file of budgets: a line for each path, comments after `#`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use hot_paths::HotPath;

use crate::callgrind::{self, Measured};

/// Percent that a figure may differ from its budget.
const TOLERANCE: f64 = 3.0;

/// Instructions of a request by path, and with what they were counted.
#[derive(Debug, Default)]
pub struct Budget {
    paths: BTreeMap<String, f64>,
    counted_with: String,
}

/// What a figure means.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Within the tolerance of the budget, in percent of it.
    Good(f64),
    /// Above: budget and excess in percent.
    Over(f64, f64),
    /// So far below that the budget no longer guards anything: budget and percent saved.
    Better(f64, f64),
    /// Nothing to compare with.
    Unknown,
}

impl Verdict {
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Over(..) | Self::Unknown)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good(percent) => write!(f, "ok, {percent:+.1} %"),
            Self::Over(budget, percent) => {
                write!(f, "OVER its budget of {budget:.1} by {percent:.1} % (allowed: {TOLERANCE} %)")
            }
            Self::Better(budget, percent) => {
                write!(f, "ok, {percent:.1} % better than its budget of {budget:.1}: record it")
            }
            Self::Unknown => f.write_str("has NO BUDGET: record one"),
        }
    }
}

/// With what figures are counted here.
fn tools() -> String {
    let valgrind = callgrind::version().unwrap_or_else(|| "no valgrind".into());
    format!("rust {}, glibc {}, {valgrind}", env!("CARGO_PKG_RUST_VERSION"), glibc())
}

/// From the file name of the C library that valgrind will load too.
fn glibc() -> String {
    let out = std::process::Command::new("getconf").arg("GNU_LIBC_VERSION").output();
    let version =
        out.ok().filter(|o| o.status.success()).map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    version.and_then(|v| v.split_whitespace().last().map(str::to_owned)).unwrap_or_else(|| "unknown".into())
}

impl Budget {
    /// # Errors
    /// The file is not there, or a line is no path and number.
    pub fn read(file: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(file).map_err(|e| {
            format!("cannot read {}: {e}; call this in the repository's root", file.display())
        })?;
        Self::parse(&text).map_err(|e| format!("{}: {e}", file.display()))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut budget = Self::default();
        for (line, n) in text.lines().zip(1..) {
            if let Some(with) = line.strip_prefix("# Counted with: ") {
                budget.counted_with = with.to_owned();
            }
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(name) = words.next() else { continue };
            let figure =
                words.next().and_then(|w| w.parse::<f64>().ok()).filter(|f| f.is_finite() && *f > 0.0);
            let (Some(figure), None) = (figure, words.next()) else {
                return Err(format!("line {n}: '{line}' should be a path and its instructions"));
            };
            if budget.paths.insert(name.to_owned(), figure).is_some() {
                return Err(format!("line {n}: '{name}' a second time"));
            }
        }
        Ok(budget)
    }

    pub fn set(&mut self, path: &str, figure: f64) {
        self.paths.insert(path.to_owned(), figure);
    }

    /// Names that are none of `paths`.
    pub fn unknown(&self, paths: &[HotPath]) -> Vec<&str> {
        let known = |name: &&str| paths.iter().any(|p| p.name == *name);
        self.paths.keys().map(String::as_str).filter(|name| !known(name)).collect()
    }

    pub fn compare(&self, path: &str, measured: &Measured) -> Verdict {
        let Some(&budget) = self.paths.get(path) else { return Verdict::Unknown };
        let percent = 100.0 * (measured.per_request / budget - 1.0);
        match percent {
            p if p > TOLERANCE => Verdict::Over(budget, p),
            p if p < -TOLERANCE => Verdict::Better(budget, -p),
            p => Verdict::Good(p),
        }
    }

    /// Whether other tools may be why figures differ, in words.
    pub fn differences(&self) -> String {
        let here = tools();
        match self.counted_with == here {
            true => format!("The budget was counted with the same tools: {here}."),
            false => format!("The budget was counted with {}; this is {here}.", self.counted_with),
        }
    }

    /// Writes the budgets of `paths`, with the tools that are here.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, file: &Path, paths: &[HotPath]) -> Result<(), String> {
        let mut text = format!("{HEADER}# Counted with: {}\n\n", tools());
        for path in paths {
            if let Some(figure) = self.paths.get(path.name) {
                text.push_str(&format!("{:28} {figure:9.1}\n", path.name));
            }
        }
        std::fs::write(file, text).map_err(|e| format!("cannot write {}: {e}", file.display()))
    }
}

const HEADER: &str = "\
# Instructions in user space that a 4 KiB request takes on each hot path, counted by valgrind's callgrind in the release
# build: `instruction-budget check` fails when one takes 3 % more. The release build's compiler (rust-toolchain.toml), the
# C library (memcpy) and the crates of Cargo.lock are in these figures; with others than CI's (Debian 12) they may differ.
#
#   cargo run --release -p hot-paths -- check
#   cargo run --release -p hot-paths -- record        # a commit that does this says why
#
";

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(per_request: f64) -> Measured {
        Measured { per_request, spread_percent: 0.0 }
    }

    #[test]
    fn figures_are_compared_with_a_tolerance() {
        let budget = Budget::parse("# text\na 100.0 # why\n\nb 10\n").unwrap();
        let good = budget.compare("a", &measured(102.9));
        assert!(matches!(good, Verdict::Good(p) if (2.8..3.0).contains(&p)), "{good:?}");
        assert!(!good.is_failure());
        assert!(matches!(budget.compare("a", &measured(103.1)), Verdict::Over(100.0, p) if p > 3.0));
        assert!(matches!(budget.compare("a", &measured(50.0)), Verdict::Better(100.0, 50.0)));
        assert_eq!(budget.compare("c", &measured(1.0)), Verdict::Unknown);
        assert!(budget.compare("a", &measured(104.0)).is_failure());
        assert!(budget.compare("c", &measured(1.0)).is_failure());
        assert!(!budget.compare("b", &measured(1.0)).is_failure());
    }

    #[test]
    fn nonsense_is_refused_with_its_line() {
        for (text, say) in [
            ("a 1\nb\n", "line 2"),
            ("a x", "line 1"),
            ("a 1 2", "line 1"),
            ("a 0", "line 1"),
            ("a 1\na 2", "second"),
        ] {
            let error = Budget::parse(text).unwrap_err();
            assert!(error.contains(say), "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let file = std::env::temp_dir().join(format!("budget-test-{}", std::process::id()));
        let paths = hot_paths::all();
        let mut budget = Budget::default();
        paths.iter().for_each(|p| budget.set(p.name, 123.4));
        budget.write(&file, &paths).unwrap();
        let again = Budget::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(again.paths, budget.paths);
        assert!(again.unknown(&paths).is_empty() && again.unknown(&[]).len() == paths.len());
        assert!(again.differences().contains("same tools"));
    }
}

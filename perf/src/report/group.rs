//! Runs by case and label, with medians and spreads.

use super::ReportError;
use crate::result::RunResult;

/// More than anybody could read.
const MAX_LABELS: usize = 32;
const MAX_CASES: usize = 128;

/// Everything that is shown.
pub(super) struct Data<'a> {
    /// The baseline first, then in order of appearance.
    pub labels: Vec<&'a str>,
    /// In order of appearance.
    pub cases: Vec<Case<'a>>,
}

/// One kind of work.
pub(super) struct Case<'a> {
    pub name: &'a str,
    /// By label; empty where a label has no run of this case.
    pub groups: Vec<Group<'a>>,
}

/// The repetitions of a case under a label.
#[derive(Clone, Default)]
pub(super) struct Group<'a> {
    pub runs: Vec<&'a RunResult>,
}

/// Of several runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// How B compares with A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Every run of B is better than every run of A.
    Better,
    /// The other way round.
    Worse,
    /// Their ranges overlap.
    Unclear,
    /// One run each, or fewer: no spread to judge by.
    TooFew,
}

/// A figure of a run, by which runs are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    Iops,
    Bandwidth,
    P50,
    P99,
    P999,
    /// Of the server where there is one, else of the program that measured.
    CpuPerIo,
}

impl Metric {
    pub fn of(self, run: &RunResult) -> f64 {
        match self {
            Self::Iops => run.totals.iops,
            Self::Bandwidth => run.totals.mib_s,
            Self::P50 => run.totals.latency_us.p50,
            Self::P99 => run.totals.latency_us.p99,
            Self::P999 => run.totals.latency_us.p99_9,
            Self::CpuPerIo => run.server.as_ref().map_or(run.cpu.us_per_io, |s| s.cpu_us_per_io),
        }
    }

    pub fn more_is_better(self) -> bool {
        matches!(self, Self::Iops | Self::Bandwidth)
    }
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let n = values.len();
        Some(Self { median: (values[(n - 1) / 2] + values[n / 2]) / 2.0, min, max })
    }
}

impl<'a> Group<'a> {
    pub fn spread(&self, metric: Metric) -> Option<Spread> {
        Spread::of(self.runs.iter().map(|r| metric.of(r)).collect())
    }

    /// The run in the middle, by IOPS: the one whose curve is drawn.
    pub fn typical(&self) -> Option<&'a RunResult> {
        let mut runs = self.runs.clone();
        runs.sort_by(|a, b| a.totals.iops.total_cmp(&b.totals.iops));
        runs.get(runs.len().saturating_sub(1) / 2).copied()
    }

    pub fn errors(&self) -> u64 {
        self.runs.iter().map(|r| r.totals.errors + u64::from(!r.is_good())).sum()
    }

    /// This one beside `base`.
    pub fn verdict(&self, base: &Self, metric: Metric) -> Verdict {
        let (Some(b), Some(a)) = (self.spread(metric), base.spread(metric)) else { return Verdict::TooFew };
        if self.runs.len() < 2 || base.runs.len() < 2 {
            return Verdict::TooFew;
        }
        let (above, below) = (b.min > a.max, b.max < a.min);
        match (above, below, metric.more_is_better()) {
            (true, _, true) | (_, true, false) => Verdict::Better,
            (true, _, false) | (_, true, true) => Verdict::Worse,
            _ => Verdict::Unclear,
        }
    }
}

impl<'a> Data<'a> {
    /// # Errors
    /// No run is called `baseline`.
    pub fn new(runs: &'a [RunResult], baseline: Option<&str>) -> Result<Self, ReportError> {
        let mut labels = distinct(runs.iter().map(|r| r.label.as_str()), MAX_LABELS, "labels")?;
        if let Some(wanted) = baseline {
            let missing = || ReportError::Baseline {
                wanted: wanted.into(),
                there: labels.iter().map(|l| (*l).to_owned()).collect(),
            };
            let at = labels.iter().position(|l| *l == wanted).ok_or_else(missing)?;
            labels[..=at].rotate_right(1);
        }
        let cases = distinct(runs.iter().map(|r| r.case.as_str()), MAX_CASES, "cases")?
            .into_iter()
            .map(|name| {
                let of = |label: &&str| Group {
                    runs: runs.iter().filter(|r| r.case == name && r.label == *label).collect(),
                };
                Case { name, groups: labels.iter().map(of).collect() }
            })
            .collect();
        Ok(Self { labels, cases })
    }
}

fn distinct<'a>(
    all: impl Iterator<Item = &'a str>,
    most: usize,
    what: &'static str,
) -> Result<Vec<&'a str>, ReportError> {
    let mut seen = Vec::new();
    for text in all {
        if !seen.contains(&text) {
            seen.push(text);
        }
        if seen.len() > most {
            return Err(ReportError::TooMany { what, most });
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Totals;

    fn run(label: &str, case: &str, iops: f64) -> RunResult {
        let totals = Totals { iops, ..Default::default() };
        RunResult { label: label.into(), case: case.into(), totals, ..Default::default() }
    }

    #[test]
    fn medians_ranges_and_verdicts() {
        let all: Vec<RunResult> = [
            ("a", 10.0),
            ("a", 12.0),
            ("a", 11.0),
            ("b", 13.0),
            ("b", 15.0),
            ("c", 11.5),
            ("c", 20.0),
            ("d", 1.0),
        ]
        .map(|(l, n)| run(l, "x", n))
        .into();
        let data = Data::new(&all, None).unwrap();
        let groups = &data.cases[0].groups;
        assert_eq!(groups[0].spread(Metric::Iops), Some(Spread { median: 11.0, min: 10.0, max: 12.0 }));
        assert_eq!(groups[1].spread(Metric::Iops).map(|s| s.median), Some(14.0));
        assert_eq!(groups[0].typical().map(|r| r.totals.iops), Some(11.0));
        let verdicts: Vec<_> = groups[1..].iter().map(|g| g.verdict(&groups[0], Metric::Iops)).collect();
        assert_eq!(verdicts, [Verdict::Better, Verdict::Unclear, Verdict::TooFew]);
        assert_eq!(groups[0].verdict(&groups[1], Metric::Iops), Verdict::Worse);
    }

    #[test]
    fn a_page_has_an_end() {
        let all: Vec<RunResult> = (0..40).map(|n| run(&n.to_string(), "x", 1.0)).collect();
        let e = Data::new(&all, None).err().expect("too many").to_string();
        assert!(e.contains("more than 32 labels"), "{e}");
    }

    #[test]
    fn the_baseline_comes_first() {
        let all = [run("a", "x", 1.0), run("b", "x", 1.0), run("c", "y", 1.0)];
        assert_eq!(Data::new(&all, Some("c")).unwrap().labels, ["c", "a", "b"]);
        let e = Data::new(&all, Some("z")).err().expect("no such label").to_string();
        assert!(e.contains("there are a, b, c"), "{e}");
        let data = Data::new(&all, None).unwrap();
        assert!(
            data.cases[1].groups[0].runs.is_empty() && data.cases[1].groups[0].spread(Metric::Iops).is_none()
        );
    }
}

//! Results from files. Nothing in them is trusted: sizes, numbers and orders are checked here, and nowhere else.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::result::{FORMAT, Latency, RunResult, Totals};

/// Of one file.
const MAX_BYTES: u64 = 64 << 20;
/// Of all files.
const MAX_RUNS: usize = 10_000;
/// Of a time line, as `rnbd-perf` limits it.
const MAX_ROWS: usize = 100_001;
/// Of a latency curve.
const MAX_POINTS: usize = 1000;
/// Of any text; the rest is cut off.
const MAX_TEXT: usize = 300;
/// Of any list of cores, jobs or words.
const MAX_LIST: usize = 2048;
/// Of any number: more than anything that can be measured, and far from where arithmetic ends.
const MAX_NUMBER: f64 = 1e15;

/// A file that is no result.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", .path.display())]
pub struct InputError {
    /// Which.
    pub path: PathBuf,
    /// What is wrong, and what would be right.
    pub why: String,
}

/// A file holds one result, or a list of them.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Runs {
    Many(Vec<RunResult>),
    One(Box<RunResult>),
}

/// Every run of `files`, in their order.
///
/// # Errors
/// The first file that is not right.
pub(super) fn load(files: &[PathBuf]) -> Result<Vec<RunResult>, InputError> {
    let mut all = Vec::new();
    for path in files {
        let wrong = |why: String| InputError { path: path.clone(), why };
        let text = read(path).map_err(wrong)?;
        all.extend(parse(&text).map_err(wrong)?);
        if all.len() > MAX_RUNS {
            return Err(wrong(format!("more than {MAX_RUNS} runs in all")));
        }
    }
    Ok(all)
}

fn read(path: &Path) -> Result<String, String> {
    let file = File::open(path).map_err(|e| format!("cannot read it: {e}"))?;
    let mut text = String::new();
    // Whatever the file is, a device or a pipe perhaps.
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|e| format!("cannot read it: {e}"))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("more than {} MiB are no result", MAX_BYTES >> 20));
    }
    Ok(text)
}

/// The runs that `text` holds.
pub(super) fn parse(text: &str) -> Result<Vec<RunResult>, String> {
    // The reasons of an untagged enum say nothing: find out which it is first.
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
    let runs = match value.is_array() {
        true => serde_json::from_value(value).map(Runs::Many),
        false => serde_json::from_value(value).map(|run| Runs::One(Box::new(run))),
    };
    let mut runs = match runs.map_err(|e| format!("not what rnbd-perf --json writes: {e}"))? {
        Runs::Many(runs) => runs,
        Runs::One(run) => vec![*run],
    };
    runs.iter_mut().try_for_each(check)?;
    Ok(runs)
}

fn check(run: &mut RunResult) -> Result<(), String> {
    if run.format != FORMAT {
        let got: String = run.format.chars().take(40).collect();
        return Err(format!("format '{got}': this program reads {FORMAT}"));
    }
    for text in [
        &mut run.label,
        &mut run.case,
        &mut run.program,
        &mut run.version,
        &mut run.started,
        &mut run.git.revision,
        &mut run.machine.cpu,
        &mut run.machine.kernel,
        &mut run.machine.governor,
    ] {
        tidy(text);
    }
    if run.label.is_empty() {
        run.label = "unnamed".into();
    }
    if run.case.is_empty() {
        run.case = "unnamed".into();
    }
    run.command.truncate(MAX_LIST);
    run.command.iter_mut().for_each(tidy);
    if run.jobs.len() > MAX_LIST || run.cpu.reactors.len() > MAX_LIST {
        return Err(format!("more than {MAX_LIST} jobs or reactors"));
    }
    numbers("machine", &[run.machine.load_average])?;
    numbers("cpu", &[run.cpu.process_seconds, run.cpu.us_per_io])?;
    for r in &run.cpu.reactors {
        numbers("cpu.reactors", &[r.busy_share, r.cpu_seconds])?;
    }
    if let Some(s) = &run.server {
        numbers("server", &[s.cpu_seconds, s.cpu_us_per_io])?;
    }
    timeline(run)?;
    totals("run", &mut run.totals)?;
    for job in &mut run.jobs {
        for text in [&mut job.name, &mut job.target, &mut job.workload] {
            tidy(text);
        }
        totals("jobs", &mut job.totals)?;
        numbers("jobs", &[job.rate_iops.unwrap_or(0.0)])?;
    }
    if let Some(v) = &mut run.verify
        && let Some(m) = &mut v.mismatch
    {
        tidy(m);
    }
    Ok(())
}

/// No control characters, no end of the world.
fn tidy(text: &mut String) {
    *text = text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect();
}

fn numbers(place: &str, all: &[f64]) -> Result<(), String> {
    match all.iter().find(|n| !(n.is_finite() && (0.0..=MAX_NUMBER).contains(*n))) {
        Some(n) => Err(format!("{place}: {n} is no measured value; 0 to {MAX_NUMBER:e} is right")),
        None => Ok(()),
    }
}

fn timeline(run: &RunResult) -> Result<(), String> {
    if run.timeline.len() > MAX_ROWS {
        return Err(format!("timeline: more than {MAX_ROWS} entries"));
    }
    for i in &run.timeline {
        numbers("timeline", &[i.at, i.iops, i.mib_s, i.p50_us, i.p99_us, i.max_us])?;
    }
    match run.timeline.is_sorted_by(|a, b| a.at <= b.at) {
        true => Ok(()),
        false => Err("timeline: its times do not rise".into()),
    }
}

fn totals(place: &str, t: &mut Totals) -> Result<(), String> {
    numbers(place, &[t.iops, t.mib_s, t.seconds])?;
    for l in
        [Some(&t.latency_us), t.read_latency_us.as_ref(), t.write_latency_us.as_ref()].into_iter().flatten()
    {
        let Latency { min, mean, p50, p90, p99, p99_9, p99_99, max } = *l;
        numbers("latency_us", &[min, mean, p50, p90, p99, p99_9, p99_99, max])?;
    }
    if t.percentiles.len() > MAX_POINTS {
        return Err(format!("percentiles: more than {MAX_POINTS} points"));
    }
    for (p, us) in &t.percentiles {
        numbers("percentiles", &[*p, *us])?;
    }
    let rises = t.percentiles.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1);
    if !rises || t.percentiles.last().is_some_and(|p| p.0 > 100.0) {
        return Err("percentiles: they must rise, up to 100".into());
    }
    t.first_error.iter_mut().for_each(tidy);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn good() -> Value {
        let run =
            RunResult { format: FORMAT.into(), label: "a".into(), case: "c".into(), ..Default::default() };
        serde_json::to_value(run).expect("plain data")
    }

    fn with(change: impl FnOnce(&mut Value)) -> String {
        let mut v = good();
        change(&mut v);
        v.to_string()
    }

    #[test]
    fn one_run_or_a_list() {
        assert_eq!(parse(&good().to_string()).map(|r| r.len()), Ok(1));
        assert_eq!(parse(&json!([good(), good()]).to_string()).map(|r| r.len()), Ok(2));
        assert_eq!(parse("[]").map(|r| r.len()), Ok(0));
        // Others may add what they like.
        assert!(parse(&with(|v| v["more"] = json!({"x": [1]}))).is_ok());
    }

    #[test]
    fn what_is_no_result_is_refused() {
        for (text, says) in [
            (String::new(), "no JSON"),
            ("{".into(), "no JSON"),
            ("[".repeat(100_000), "no JSON"),
            ("7".into(), "not what rnbd-perf --json writes"),
            ("{}".into(), "missing field"),
            (with(|v| v["format"] = "rnbd-perf-2".into()), "this program reads rnbd-perf-1"),
            (with(|v| v["iops"] = "many".into()), "not what"),
            (with(|v| v["iops"] = (-1.0).into()), "no measured value"),
            (with(|v| v["mib_s"] = 1e300.into()), "no measured value"),
            (with(|v| v["latency_us"]["p50"] = (-5).into()), "no measured value"),
            (with(|v| v["percentiles"] = json!([[50.0, 2.0], [40.0, 3.0]])), "must rise"),
            (with(|v| v["percentiles"] = json!([[50.0, 2.0], [150.0, 3.0]])), "up to 100"),
            (with(|v| v["percentiles"] = vec![json!([1.0, 1.0]); 2000].into()), "more than 1000"),
            (with(|v| v["timeline"] = json!([{"at": 2.0}, {"at": 1.0}])), "do not rise"),
            (with(|v| v["timeline"] = vec![json!({"at": 1.0}); MAX_ROWS + 1].into()), "more than"),
            (with(|v| v["machine"]["load_average"] = (-1).into()), "no measured value"),
            (
                with(|v| {
                    v["jobs"] = vec![
                        json!({"name": "", "target": "", "workload": "", "block_size": 1, "queue_depth": 1,
                "iops": 1.0, "mib_s": 1.0});
                        MAX_LIST + 1
                    ]
                    .into()
                }),
                "more than 2048",
            ),
            (with(|v| v["iops"] = Value::Null), "not what"),
        ] {
            let e = parse(&text).expect_err(says);
            assert!(e.contains(says), "'{e}' should say '{says}'");
        }
        assert!(parse(&good().to_string().replace("\"iops\":0.0", "\"iops\":NaN")).is_err());
    }

    #[test]
    fn texts_are_cut_and_without_control_characters() {
        let runs =
            parse(&with(|v| v["label"] = format!("a\u{0}\u{1b}[31m{}", "x".repeat(10_000)).into())).unwrap();
        assert!(runs[0].label.starts_with("a[31mx") && runs[0].label.chars().count() == MAX_TEXT);
        assert_eq!(parse(&with(|v| v["label"] = "\n".into())).unwrap()[0].label, "unnamed");
    }
}

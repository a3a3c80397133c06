//! What the program leaves behind: a summary, JSON, a status.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use perf::job::{si, time};
use perf::result::{Latency, RunResult, Totals};

use super::program::PROGRAM;

/// Ends a command that needs no engine.
pub fn exit(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{PROGRAM}: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Text for people on standard output. Nobody may be reading any more, which is no failure.
pub fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Puts the result where it belongs: JSON into `file` ("-": standard output), and the summary where JSON is not.
pub fn write(result: &RunResult, file: Option<&Path>) -> Result<(), String> {
    let Some(path) = file else {
        say(&summary(result));
        return Ok(());
    };
    let json =
        serde_json::to_string_pretty(result).map_err(|e| format!("cannot write the result: {e}"))? + "\n";
    let failed = |e| format!("cannot write {}: {e}", path.display());
    if path == Path::new("-") {
        let _ = std::io::stderr().write_all(summary(result).as_bytes());
        return std::io::stdout().write_all(json.as_bytes()).map_err(failed);
    }
    std::fs::write(path, json).map_err(failed)?;
    say(&summary(result));
    Ok(())
}

/// For people.
fn summary(r: &RunResult) -> String {
    let mut out = String::new();
    if r.jobs.len() > 1 {
        r.jobs.iter().for_each(|j| row(&mut out, &format!("{} ({})", j.name, j.workload), &j.totals));
    }
    row(&mut out, &r.case, &r.totals);
    for (name, latency) in [
        ("latency", Some(&r.totals.latency_us)),
        ("  of reads", r.totals.read_latency_us.as_ref()),
        ("  of writes", r.totals.write_latency_us.as_ref()),
    ] {
        if let Some(l) = latency {
            latencies(&mut out, name, l);
        }
    }
    let _ = write!(out, "CPU: {} for each request; reactors", time(r.cpu.us_per_io));
    for c in &r.cpu.reactors {
        let _ = write!(out, " {}: {:.1} % busy", c.core, c.busy_share * 100.0);
    }
    out.push('\n');
    if let Some(v) = &r.verify {
        let _ = writeln!(
            out,
            "verified: {} blocks, {} of them at the end",
            v.blocks_checked, v.blocks_checked_at_end
        );
    }
    out
}

fn row(out: &mut String, name: &str, t: &Totals) {
    let _ = write!(
        out,
        "{name}: {}IOPS, {:.1} MiB/s, {} requests in {:.2} s",
        si(t.iops),
        t.mib_s,
        t.ios,
        t.seconds
    );
    if t.errors > 0 {
        let _ = write!(out, ", {} ERRORS", t.errors);
    }
    out.push('\n');
}

fn latencies(out: &mut String, name: &str, l: &Latency) {
    let _ = writeln!(
        out,
        "{name}: min {} mean {} p50 {} p90 {} p99 {} p99.9 {} p99.99 {} max {}",
        time(l.min),
        time(l.mean),
        time(l.p50),
        time(l.p90),
        time(l.p99),
        time(l.p99_9),
        time(l.p99_99),
        time(l.max)
    );
}

//! `rtrs-load`: load on one device of an RNBD server, measured and, if asked for, verified.

mod args;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use perf::load::{self, Report, Stopper};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("rtrs-load: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let args = args::options()?;
    let cm = perf::open_provider(&args.load.session.paths[0].providers[0])?;
    let signals = signals().map_err(|e| format!("cannot take signals: {e}"))?;
    let report = load::run(args.load, cm, |stopper| stop_on(signals, stopper)).map_err(|e| e.to_string())?;
    eprintln!("{}", report.summary());
    print(&report, args.json.as_deref())?;
    verdict(&report)
}

/// A byte for each SIGINT and SIGTERM.
fn signals() -> std::io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

/// The first signal ends the load in order, so that the server hears of it and gives the device free at once. The
/// second ends the program.
fn stop_on(mut signals: UnixStream, stopper: Stopper) {
    std::thread::spawn(move || {
        let mut byte = [0];
        if signals.read_exact(&mut byte).is_ok() {
            stopper.stop();
        }
        if signals.read_exact(&mut byte).is_ok() {
            std::process::exit(130);
        }
    });
}

fn print(report: &Report, file: Option<&std::path::Path>) -> Result<(), String> {
    let json = serde_json::to_string_pretty(report).map_err(|e| format!("cannot write the report: {e}"))?;
    match file {
        None => println!("{json}"),
        Some(path) => {
            std::fs::write(path, json + "\n").map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
    }
    Ok(())
}

/// A run that went wrong ends with an error, after the report.
fn verdict(report: &Report) -> Result<(), String> {
    if let Some(mismatch) = report.verify.as_ref().and_then(|v| v.mismatch.as_ref()) {
        return Err(mismatch.clone());
    }
    match &report.first_error {
        Some(first) => Err(format!("{} requests failed; the first: {first}", report.errors)),
        None => Ok(()),
    }
}

//! `rnbd-perf`: load on any bdev of the engine, and what came of it.

mod args;
mod outcome;
mod program;

fn main() -> std::process::ExitCode {
    match args::command() {
        Ok(args::Command::Run(run)) => program::run(*run),
        Ok(args::Command::Report(report)) => outcome::exit(report.make()),
        Err(message) => outcome::exit(Err(message)),
    }
}

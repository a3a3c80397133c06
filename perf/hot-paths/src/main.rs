//! `instruction-budget`: compares the instructions of each 4 KiB request with what is written down.

mod budget;
mod callgrind;

use std::path::PathBuf;
use std::process::ExitCode;

use argh::FromArgs;
use budget::{Budget, Verdict};
use callgrind::Measured;
use hot_paths::HotPath;

/// Rounds before counting: every table, slot and buffer has its size afterwards.
const WARM_UP: u32 = 30;
/// Rounds of each of the two parts that are counted.
const ROUNDS: u32 = 60;

/// Counts the instructions that each hot path takes for a 4 KiB request, under valgrind, and compares them with a budget.
/// Instructions in user space only: time in the kernel and cache misses do not show.
///
/// Exit status: 0 within the budget, 1 above it, 2 if nothing could be counted, 77 without valgrind.
#[derive(FromArgs)]
struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Check(Check),
    Record(Record),
    Profile(Profile),
    Run(Run),
}

/// Compare with the budget.
#[derive(FromArgs)]
#[argh(subcommand, name = "check")]
struct Check {
    /// file of the budget
    #[argh(option, default = "budget_file()")]
    budget: PathBuf,
    /// paths whose names contain this, in place of all
    #[argh(option)]
    only: Option<String>,
}

/// Write the present figures into the budget; give reasons in the commit.
#[derive(FromArgs)]
#[argh(subcommand, name = "record")]
struct Record {
    /// file of the budget
    #[argh(option, default = "budget_file()")]
    budget: PathBuf,
    /// paths whose names contain this, in place of all
    #[argh(option)]
    only: Option<String>,
}

/// Count one path and keep the profile, for callgrind_annotate.
#[derive(FromArgs)]
#[argh(subcommand, name = "profile")]
struct Profile {
    /// name of a path
    #[argh(positional)]
    path: String,
    /// file to write
    #[argh(option, default = "\"callgrind.out\".into()")]
    out: PathBuf,
}

/// Run one path without counting: for perf, or to see that it works.
#[derive(FromArgs)]
#[argh(subcommand, name = "run")]
struct Run {
    /// name of a path
    #[argh(positional)]
    path: String,
    /// rounds in each of two parts
    #[argh(option, default = "ROUNDS")]
    rounds: u32,
}

fn budget_file() -> PathBuf {
    "perf/hot-paths/budget.txt".into()
}

fn main() -> ExitCode {
    let args: Args = argh::from_env();
    let result = match args.command {
        Command::Check(c) => check(&c),
        Command::Record(r) => record(&r),
        Command::Profile(p) => profile(&p),
        Command::Run(r) => find(&r.path).map(|path| {
            run(&path, r.rounds);
            ExitCode::SUCCESS
        }),
    };
    result.unwrap_or_else(|why| {
        eprintln!("instruction-budget: {why}");
        ExitCode::from(2)
    })
}

fn find(name: &str) -> Result<HotPath, String> {
    let names = || hot_paths::all().iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    hot_paths::all()
        .into_iter()
        .find(|p| p.name == name)
        .ok_or_else(|| format!("no path '{name}': use one of {}", names()))
}

fn chosen(only: Option<&str>) -> Vec<HotPath> {
    hot_paths::all().into_iter().filter(|p| only.is_none_or(|o| p.name.contains(o))).collect()
}

fn run(path: &HotPath, rounds: u32) {
    let mut round = path.set_up();
    (0..WARM_UP).for_each(|_| round());
    hot_paths::mark(0);
    for part in 1..=2 {
        (0..rounds).for_each(|_| round());
        hot_paths::mark(part);
    }
}

fn check(c: &Check) -> Result<ExitCode, String> {
    callgrind::ready_or_exit()?;
    let budget = Budget::read(&c.budget)?;
    let paths = chosen(c.only.as_deref());
    let unknown = budget.unknown(&hot_paths::all());
    if !unknown.is_empty() {
        return Err(format!("{}: there is no path {}", c.budget.display(), unknown.join(", ")));
    }
    let mut over = 0;
    for path in &paths {
        let measured = callgrind::measure(path, ROUNDS)?;
        let verdict = budget.compare(path.name, &measured);
        println!("{}", line(path, &measured, &verdict));
        over += usize::from(verdict.is_failure());
    }
    if over == 0 {
        println!("{} paths within their budgets", paths.len());
        return Ok(ExitCode::SUCCESS);
    }
    println!("{over} of {} paths need more instructions than their budgets have", paths.len());
    println!("{}", budget.differences());
    println!("If that is meant: {} record, and say why in the commit.", program());
    Ok(ExitCode::FAILURE)
}

fn line(path: &HotPath, m: &Measured, verdict: &Verdict) -> String {
    format!("{:28} {:9.1} a request (spread {:.2} %)  {verdict}", path.name, m.per_request, m.spread_percent)
}

fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "instruction-budget".into())
}

fn record(r: &Record) -> Result<ExitCode, String> {
    callgrind::ready_or_exit()?;
    let mut budget = Budget::read(&r.budget).unwrap_or_default();
    for path in chosen(r.only.as_deref()) {
        let measured = callgrind::measure(&path, ROUNDS)?;
        println!("{}", line(&path, &measured, &budget.compare(path.name, &measured)));
        budget.set(path.name, measured.per_request);
    }
    budget.write(&r.budget, &hot_paths::all())?;
    Ok(ExitCode::SUCCESS)
}

fn profile(p: &Profile) -> Result<ExitCode, String> {
    callgrind::ready_or_exit()?;
    let path = find(&p.path)?;
    let measured = callgrind::profile(&path, ROUNDS, &p.out)?;
    println!("{:.1} instructions a request; callgrind_annotate {}", measured.per_request, p.out.display());
    println!("divide its figures by {}", ROUNDS as usize * path.depth);
    Ok(ExitCode::SUCCESS)
}

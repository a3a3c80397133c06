//! Command line.

use std::path::PathBuf;
use std::time::Duration;

use argh::{EarlyExit, FromArgs};
use engine::args::Common;
use perf::job::{Job, Progress, RunOptions, Target, Workload, parse_jobs, size};
use perf::report::{Options as ReportOptions, make};

use super::outcome::say;
use super::program::{PROGRAM, Run};

/// Puts load on bdevs and measures it.
#[derive(FromArgs)]
#[argh(
    example = "{command_name} -c configs/target.json -T Malloc0 -w randread -o 4k -q 32 -t 5 -m 0x2\n\
        reads 4 KiB blocks of Malloc0 anywhere for 5 seconds, 32 at a time, from core 1\n\
        {command_name} -T nbd://192.0.2.1/disk0 -w verify -t 60 --json run.json\n\
        writes stamped blocks to an export, whose data is lost, and reads them back\n\
        {command_name} report run.json other.json -o report.html\n\
        makes a page of results; see {command_name} report --help",
    note = "A device is the name of a bdev in the configuration, or\n\
        nbd://HOST[:PORT]/EXPORT, nbds://…, nbd+unix:///EXPORT?socket=PATH\n\
        rnbd://[SOURCE@]SERVER[:PORT][,…]/DEVICE[?provider=soft-roce&connections=N&mpath_policy=…]\n\
        vhost:SOCKET[?queues=N&packed&indirect&inflight]: a vhost-user-blk socket, as a guest would use it.\n\
        Job files have fio's form: [global] and [NAME] sections with filename=, rw=, bs=, iodepth=, rwmixread=, offset=,\n\
        size=, rate_iops=, cpus=. Sizes take k, M, G, T (powers of 1024).",
    error_code(
        1,
        "It could not run, a request failed or data differed; the last line on standard error says why."
    )
)]
struct Args {
    /// configuration file with the bdevs; sections that export them are left out
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// a device to put load on (may be repeated: a job each)
    #[argh(option, short = 'T', long = "target", arg_name = "device")]
    targets: Vec<String>,

    /// job file, in place of -T; the other options are its defaults
    #[argh(option, short = 'j', arg_name = "file")]
    job_file: Option<PathBuf>,

    /// requests in flight of each job on each of its cores (default 32)
    #[argh(option, short = 'q', default = "32", arg_name = "count")]
    queue_depth: u32,

    /// size of each request (default 4k)
    #[argh(option, short = 'o', default = "\"4k\".into()", arg_name = "size")]
    block_size: String,

    /// read, write, randread, randwrite, rw, randrw, verify, flush, unmap or write_zeroes; all but the reads and flush
    /// overwrite the device (default randread)
    #[argh(option, short = 'w', default = "\"randread\".into()", arg_name = "name")]
    workload: String,

    /// percentage of reads in rw, randrw and verify (default 50)
    #[argh(option, short = 'M', default = "50", arg_name = "percent")]
    read_percent: u8,

    /// measured seconds (default 5)
    #[argh(option, short = 't', default = "5.0", arg_name = "seconds")]
    time: f64,

    /// seconds before that (default 0.5)
    #[argh(option, default = "0.5", arg_name = "seconds")]
    warm_up: f64,

    /// seconds of each entry of the time line (default 1)
    #[argh(option, default = "1.0", arg_name = "seconds")]
    interval: f64,

    /// cores to run on, as 0x3 or [0,2-3] (default 0x1)
    #[argh(option, short = 'm', default = "\"0x1\".into()", arg_name = "mask")]
    cpumask: String,

    /// run every job on every core (default: jobs take the cores in turn)
    #[argh(switch, short = 'C')]
    every_core: bool,

    /// most requests per second of each job, over all its cores
    #[argh(option, arg_name = "count")]
    rate_iops: Option<f64>,

    /// first byte of the device that is touched (default 0)
    #[argh(option, default = "\"0\".into()", arg_name = "size")]
    offset: String,

    /// bytes from there on (default: to the end; with verify at most 1G)
    #[argh(option, default = "\"0\".into()", arg_name = "size")]
    size: String,

    /// write every block once before the run: reading what was never written costs less than reading data
    #[argh(switch)]
    fill: bool,

    /// of blocks, kinds and data: the same seed gives the same requests (default 1)
    #[argh(option, default = "1", arg_name = "number")]
    seed: u64,

    /// count failed requests and go on (default: the first one ends the run)
    #[argh(switch)]
    keep_going: bool,

    /// let reactors sleep after so long without work (default: they always poll)
    #[argh(option, arg_name = "microseconds")]
    spin_us: Option<u64>,

    /// seconds to wait for a bdev that a server brings (default 10)
    #[argh(option, default = "10.0", arg_name = "seconds")]
    wait: f64,

    /// where to put the result as JSON; - is standard output
    #[argh(option, arg_name = "file")]
    json: Option<PathBuf>,

    /// what is measured, for reports: runs of one label are repetitions (default: the revision of the sources)
    #[argh(option, arg_name = "text")]
    label: Option<String>,

    /// the work, for reports (default: such as "4k randread QD32")
    #[argh(option, default = "String::new()", arg_name = "text")]
    case: String,

    /// a line for each interval, also where standard error is no terminal
    #[argh(switch)]
    progress: bool,

    /// say nothing while it lasts
    #[argh(switch)]
    quiet: bool,

    /// JSON-RPC socket (default /var/tmp/rnbd-perf-PID.sock)
    #[argh(option, short = 'r', arg_name = "socket")]
    rpc_socket: Option<PathBuf>,

    /// log level: DISABLED, ERROR, WARNING, NOTICE, INFO or DEBUG (default WARNING)
    #[argh(option, short = 'L', default = "\"WARNING\".into()", arg_name = "level")]
    log_level: String,

    /// print the version
    #[argh(switch, short = 'v')]
    version: bool,

    #[argh(subcommand)]
    command: Option<SubCommand>,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum SubCommand {
    Report(Report),
}

/// Makes one page of the results of runs: bars, latency curves, time lines, tables. Runs of one label and case are
/// repetitions, of which the median and the spread are shown; with several labels each is compared with the first.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "report",
    example = "{command_name} a.json b.json -o report.html\n{command_name} old-*.json new-*.json --baseline old -o report.html --png plots/"
)]
pub struct Report {
    /// results, as --json writes them; one file may hold several, as a list
    #[argh(positional, arg_name = "file")]
    files: Vec<PathBuf>,

    /// the page (default report.html)
    #[argh(option, short = 'o', default = "\"report.html\".into()", arg_name = "file")]
    output: PathBuf,

    /// the label that others are compared with (default: that of the first file)
    #[argh(option, arg_name = "label")]
    baseline: Option<String>,

    /// headline (default "Performance")
    #[argh(option, default = "\"Performance\".into()", arg_name = "text")]
    title: String,

    /// put the plots into this folder as PNG files, too
    #[argh(option, arg_name = "folder")]
    png: Option<PathBuf>,

    /// put the plots into this folder as SVG files, too
    #[argh(option, arg_name = "folder")]
    svg: Option<PathBuf>,
}

impl Report {
    /// Makes it.
    pub fn make(self) -> Result<(), String> {
        let Self { files, output, baseline, title, png, svg } = self;
        let options = ReportOptions { files, output, baseline, title, png, svg };
        make(&options).map_err(|e| e.to_string())
    }
}

/// What is to be done.
pub enum Command {
    /// Measure.
    Run(Box<Run>),
    /// Show.
    Report(Report),
}

/// Reads the command line; prints help or version and ends the program if asked to.
pub fn command() -> Result<Command, String> {
    let words: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let refs: Vec<&str> = words.iter().map(String::as_str).collect();
    let args = Args::from_args(&[PROGRAM], &refs).unwrap_or_else(|early| early_exit(&early));
    if args.version {
        say(&format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION")));
        std::process::exit(0);
    }
    args.command(words)
}

fn early_exit(early: &EarlyExit) -> ! {
    match early.status {
        Ok(()) => {
            say(&format!("{}\n", early.output));
            std::process::exit(0)
        }
        Err(()) => {
            eprintln!("{}\nRun {PROGRAM} --help for more information.", early.output.trim_end());
            std::process::exit(1)
        }
    }
}

impl Args {
    fn command(self, words: Vec<String>) -> Result<Command, String> {
        match self.command {
            Some(SubCommand::Report(report)) => Ok(Command::Report(report)),
            None => self.run(words).map(|run| Command::Run(Box::new(run))),
        }
    }

    /// What every job begins as.
    fn default_job(&self) -> Result<Job, String> {
        let of = |option: &str, text: &str| size(text).map_err(|e| format!("{option}: {e}"));
        let block_size = of("-o", &self.block_size)?;
        Ok(Job {
            name: String::new(),
            target: Target::Bdev(String::new()),
            workload: self.workload.parse::<Workload>().map_err(|e| format!("-w: {e}"))?,
            block_size: u32::try_from(block_size).map_err(|_| format!("-o {block_size}: too large"))?,
            queue_depth: self.queue_depth,
            read_percent: self.read_percent,
            offset: of("--offset", &self.offset)?,
            size: of("--size", &self.size)?,
            rate_iops: self.rate_iops,
            cores: None,
        })
    }

    fn jobs(&self) -> Result<Vec<Job>, String> {
        let default = self.default_job()?;
        match &self.job_file {
            Some(_) if !self.targets.is_empty() => Err("give either -T or -j, not both".into()),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|e| format!("cannot read the job file {}: {e}", path.display()))?;
                parse_jobs(&text, &default).map_err(|e| format!("{}: {e}", path.display()))
            }
            None => {
                let job =
                    |name: &String| Ok(Job { name: name.clone(), target: name.parse()?, ..default.clone() });
                self.targets.iter().map(job).collect()
            }
        }
    }

    fn run(self, words: Vec<String>) -> Result<Run, String> {
        let options = RunOptions {
            jobs: self.jobs()?,
            every_core: self.every_core,
            time: seconds("-t", self.time)?,
            warm_up: seconds("--warm-up", self.warm_up)?,
            interval: seconds("--interval", self.interval)?,
            fill: self.fill,
            seed: self.seed,
            keep_going: self.keep_going,
            patience: seconds("--wait", self.wait)?,
            label: self.label.unwrap_or_else(perf::revision),
            case: self.case,
            command: std::iter::once(PROGRAM.to_owned()).chain(words).collect(),
            progress: match (self.quiet, self.progress) {
                (true, _) => Progress::Quiet,
                (false, true) => Progress::Lines,
                (false, false) if std::io::IsTerminal::is_terminal(&std::io::stderr()) => Progress::Live,
                _ => Progress::Quiet,
            },
        };
        if options.time.is_zero() {
            return Err("-t 0: use more than 0 seconds".into());
        }
        options.check()?;
        let socket = || format!("/var/tmp/{PROGRAM}-{}.sock", std::process::id()).into();
        let common = Common {
            config: self.config,
            cpumask: Some(self.cpumask),
            rpc_socket: self.rpc_socket.unwrap_or_else(socket),
            wait_for_rpc: false,
            rpcs_allowed: None,
            json_ignore_init_errors: false,
            log_level: self.log_level,
            log_format: "text".into(),
        };
        Ok(Run { common, spin: self.spin_us.map(Duration::from_micros), options, json: self.json })
    }
}

fn seconds(option: &str, value: f64) -> Result<Duration, String> {
    let good = Duration::try_from_secs_f64(value).ok().filter(|d| d.as_secs() < 1_000_000);
    good.ok_or_else(|| format!("{option} {value}: use seconds, such as 5 or 0.5"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let args = Args::from_args(&[PROGRAM], &words).map_err(|e| e.output)?;
        args.command(words.iter().map(|w| (*w).to_owned()).collect())
    }

    fn run(line: &str) -> Run {
        match parse(line) {
            Ok(Command::Run(run)) => *run,
            Ok(Command::Report(_)) => panic!("{line}: a report"),
            Err(e) => panic!("{line}: {e}"),
        }
    }

    #[test]
    fn the_settled_flags() {
        let r = run("-c c.json -T Null0 -q 8 -o 4096 -w randrw -t 2.5 -m 0x2 -M 70 --json out.json");
        let job = &r.options.jobs[0];
        assert_eq!(
            (job.queue_depth, job.block_size, job.workload, job.read_percent),
            (8, 4096, Workload::RandRw, 70)
        );
        assert_eq!((r.options.time, r.common.cpumask.as_deref()), (Duration::from_millis(2500), Some("0x2")));
        assert_eq!((r.json, r.common.config), (Some("out.json".into()), Some("c.json".into())));
        assert_eq!(
            (job.target.clone(), r.options.case()),
            (Target::Bdev("Null0".into()), "4k randrw 70% reads QD8".into())
        );
        assert!(r.spin.is_none() && !r.options.every_core);
    }

    #[test]
    fn defaults_and_several_jobs() {
        let r = run("-T A -T nbd://h/d -o 128k");
        assert_eq!((r.options.jobs.len(), r.options.jobs[1].name.as_str()), (2, "nbd://h/d"));
        let job = &r.options.jobs[0];
        assert_eq!((job.queue_depth, job.block_size, job.workload), (32, 131_072, Workload::RandRead));
        assert_eq!((r.options.time.as_secs(), r.options.seed), (5, 1));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, says) in [
            ("", "Name a bdev with -T"),
            ("-T N -o 4x", "-o: '4x' is no size"),
            ("-T N -o 1000", "multiple of 512"),
            ("-T N -q 0", "1 to 65536"),
            ("-T N -q x", "x"),
            ("-T N -w fast", "use read, write, randread"),
            ("-T N -M 101", "0 to 100"),
            ("-T N -t -1", "-t -1: use seconds"),
            ("-T N -t 0", "more than 0"),
            ("-T N -t nan", "use seconds"),
            ("-T N --interval 0.001", "at least 0.01 s"),
            ("-T N --rate-iops 0", "above 0"),
            ("-T N -j f", "either -T or -j"),
            ("-j /nonexistent", "cannot read the job file /nonexistent"),
            ("-T N --offset 1", "multiple of the block size"),
            ("-T x://y", "no scheme x"),
            ("-T N -T N -w verify", "ranges of their own"),
            ("-T N --frobnicate", "frobnicate"),
        ] {
            let e = parse(line).err().unwrap_or_else(|| panic!("{line}: taken"));
            assert!(e.contains(says), "{line}: {e}");
        }
    }

    #[test]
    fn reports_have_options_of_their_own() {
        assert!(
            matches!(parse("report a.json b.json -o x.html --png p"), Ok(Command::Report(r)) if r.files.len() == 2)
        );
    }
}

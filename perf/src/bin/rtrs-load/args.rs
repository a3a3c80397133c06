//! Command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use argh::FromArgs;
use perf::load::LoadOptions;
use reactor::IdlePolicy;
use rtrs_poll::client::{PathSpec, Reconnect, SessionOptions};
use rtrs_proto::wire::RTRS_PORT;

/// Puts load on a device of an RNBD server and measures it. The report is JSON.
#[derive(FromArgs)]
#[argh(
    example = "{command_name} 10.0.0.1 disk0 -w randread -o 4096 -q 32 -t 5 -m 0x2\n\
        reads 4 KiB blocks of disk0 anywhere for 5 seconds, 32 at a time, from core 1\n\
        {command_name} 10.0.0.1 disk0 -w verify -t 60\n\
        writes stamped blocks to disk0, whose data is lost, and reads them back",
    error_code(
        1,
        "It could not run, a request failed or data differed; the last line on standard error says why."
    )
)]
struct Args {
    /// the server, as SOURCE@ADDRESS:PORT (SOURCE@ may be left out, port 1234 unless given); several paths: with commas
    #[argh(positional, arg_name = "server")]
    server: String,

    /// the device, as the server names it
    #[argh(positional, arg_name = "device")]
    device: String,

    /// read, write, randread, randwrite, randrw or verify; all but the reads overwrite the device (default randread)
    #[argh(option, short = 'w', default = "\"randread\".into()", arg_name = "name")]
    workload: String,

    /// bytes of each request (default 4096)
    #[argh(option, short = 'o', default = "4096", arg_name = "bytes")]
    block_size: u32,

    /// requests in flight, over all cores (default 32)
    #[argh(option, short = 'q', default = "32", arg_name = "count")]
    queue_depth: u32,

    /// measured seconds (default 5)
    #[argh(option, short = 't', default = "5.0", arg_name = "seconds")]
    time: f64,

    /// seconds before that (default 0.5)
    #[argh(option, default = "0.5", arg_name = "seconds")]
    warm_up: f64,

    /// percentage of reads in randrw and verify (default 50)
    #[argh(option, short = 'M', default = "50", arg_name = "percent")]
    read_percent: u8,

    /// touch only so many bytes from the start (default: all, with verify the first GiB)
    #[argh(option, default = "0", arg_name = "bytes")]
    size: u64,

    /// of blocks and data (default 1)
    #[argh(option, default = "1", arg_name = "number")]
    seed: u64,

    /// cores to run on, as 0x3 or [0,2-3] (default 0x1)
    #[argh(option, short = 'm', default = "\"0x1\".into()", arg_name = "mask")]
    cpumask: String,

    /// connections of the path; the first is for administration if there are others (default: one and one per core)
    #[argh(option, short = 'c', arg_name = "count")]
    connections: Option<u16>,

    /// RDMA provider (default rdma-core)
    #[argh(option, short = 'p', default = "\"rdma-core\".into()", arg_name = "name")]
    provider: String,

    /// own address (default: the system chooses)
    #[argh(option, arg_name = "address")]
    src: Option<String>,

    /// session name, unique at the server (default rtrs-load-PID)
    #[argh(option, arg_name = "name")]
    session: Option<String>,

    /// never sleep, even with nothing to do
    #[argh(switch)]
    poll: bool,

    /// where to put the report (default: standard output)
    #[argh(option, arg_name = "file")]
    json: Option<PathBuf>,

    /// log what happens to the path, on standard error
    #[argh(switch, short = 'v')]
    verbose: bool,
}

/// How long a reactor polls on after its last work.
const SPIN: Duration = Duration::from_micros(1000);

/// What the command line says.
pub struct CommandLine {
    /// What to do.
    pub load: LoadOptions,
    /// Where the report goes; standard output if nowhere else.
    pub json: Option<PathBuf>,
}

/// Reads the command line; prints help and ends the program if asked to.
pub fn options() -> Result<CommandLine, String> {
    let args: Args = argh::from_env();
    if args.verbose {
        tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    }
    args.check()
}

impl Args {
    fn check(self) -> Result<CommandLine, String> {
        let cpumask: reactor::CpuMask =
            self.cpumask.parse().map_err(|e: reactor::CpuMaskError| e.to_string())?;
        let cores = cpumask.cores().to_vec();
        let session = self.session.unwrap_or_else(|| format!("rtrs-load-{}", std::process::id()));
        let connections = match self.connections {
            Some(n) => n,
            None => u16::try_from(cores.len() + 1).map_err(|_| "too many cores".to_owned())?,
        };
        let src = self.src.as_deref().map(source).transpose()?;
        let paths: Result<Vec<PathSpec>, String> =
            self.server.split(',').map(|text| path(text, &self.provider, src)).collect();
        let paths = paths?;
        let session = SessionOptions {
            connections,
            reactors: (0..cores.len()).collect(),
            // The loss of the only path ends the run.
            reconnect: Reconnect {
                max_attempts: if paths.len() == 1 { Some(0) } else { None },
                ..Reconnect::default()
            },
            ..SessionOptions::new(&session, paths)
        };
        if self.read_percent > 100 {
            return Err(format!("--read-percent {}: use 0 to 100", self.read_percent));
        }
        let load = LoadOptions {
            session,
            device: self.device,
            pattern: self.workload.parse().map_err(|e| format!("--{e}"))?,
            read_percent: self.read_percent,
            block_size: self.block_size,
            queue_depth: self.queue_depth,
            time: seconds("--time", self.time)?,
            warm_up: seconds("--warm-up", self.warm_up)?,
            size: self.size,
            seed: self.seed,
            cores,
            idle: if self.poll { IdlePolicy::Poll } else { IdlePolicy::Adaptive { spin: SPIN } },
        };
        Ok(CommandLine { load, json: self.json })
    }
}

fn seconds(option: &str, value: f64) -> Result<Duration, String> {
    let good = Duration::try_from_secs_f64(value).ok().filter(|d| d.as_secs() < 1_000_000);
    good.ok_or_else(|| format!("{option} {value}: use seconds, such as 5 or 0.5"))
}

fn path(text: &str, provider: &str, src: Option<IpAddr>) -> Result<PathSpec, String> {
    let (own, dst) = match text.split_once('@') {
        Some((own, dst)) => (Some(source(own)?), dst),
        None => (src, text),
    };
    Ok(PathSpec { src: own, ..PathSpec::new(provider, server(dst)?) })
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let with_port = text.parse::<SocketAddr>();
    let address = || text.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| SocketAddr::new(ip, RTRS_PORT));
    with_port.or_else(|_| address()).map_err(|_| {
        format!("server '{text}': use an address such as 10.0.0.1, 10.0.0.1:1234 or [fd00::1]:1234")
    })
}

fn source(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("source '{text}': use an address such as 10.0.0.2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<CommandLine, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Args::from_args(&["rtrs-load"], &words).map_err(|e| e.output)?.check()
    }

    #[test]
    fn defaults() {
        let o = parse("10.0.0.1 disk0").unwrap_or_else(|e| panic!("{e}")).load;
        assert_eq!(o.session.paths[0].dst.to_string(), "10.0.0.1:1234");
        assert_eq!((o.session.connections, o.cores, o.block_size, o.queue_depth), (2, vec![0], 4096, 32));
    }

    #[test]
    fn everything_given() {
        let o =
            parse("[fd00::1]:7 d -w verify -o 8192 -q 4 -t 0.25 -m 0x6 -c 9 -p x --src fd00::2 --session s")
                .unwrap_or_else(|e| panic!("{e}"))
                .load;
        assert_eq!(
            (o.session.paths[0].dst.port(), o.session.connections, o.session.reactors),
            (7, 9, vec![0, 1])
        );
        assert_eq!((o.cores, o.time.as_millis(), o.session.name.as_str()), (vec![1, 2], 250, "s"));
    }

    #[test]
    fn several_paths() {
        let o = parse("10.0.0.1,10.0.1.2@10.0.1.1:7 d --src 10.0.0.2").unwrap_or_else(|e| panic!("{e}")).load;
        let paths: Vec<String> = o.session.paths.iter().map(ToString::to_string).collect();
        assert_eq!(paths, ["10.0.0.2@10.0.0.1:1234", "10.0.1.2@10.0.1.1:7"]);
    }

    #[test]
    fn errors_are_one_line_and_say_what_is_right() {
        for (line, say) in [
            ("10.0.0 d", "use an address"),
            ("10.0.0.1 d -w x", "randread"),
            ("10.0.0.1 d -t -1", "use seconds"),
            ("10.0.0.1 d -t nan", "use seconds"),
            ("10.0.0.1 d -m 0", "[0,2-3]"),
            ("10.0.0.1 d --src x", "use an address"),
            ("10.0.0.1 d -M 101", "0 to 100"),
        ] {
            let e = parse(line).err().expect(line);
            assert!(e.contains(say) && !e.contains('\n'), "{line}: {e}");
        }
    }
}

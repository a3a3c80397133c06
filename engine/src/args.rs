//! The command line that the programs share, and what a program does around [`app::run`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use reactor::{CpuMask, IdlePolicy};

use crate::app::{self, Options};
use crate::isolation::Isolation;
use crate::log::{Format, LogControl};
use crate::subsystem::Subsystem;

/// How long a reactor of the default policy polls on after its last work: longer than the pauses of a client with one
/// request at a time, short against heartbeats.
const DEFAULT_SPIN: Duration = Duration::from_micros(1000);

/// Options of a daemon's command line.
#[derive(Clone, Debug)]
pub struct Common {
    /// `-c`: configuration file.
    pub config: Option<PathBuf>,
    /// `-m`: cores of the reactors, as 0x3 or [0,2-3]. Without, the first that this process may use: in a container, or under
    /// taskset(1), that need not be core 0.
    pub cpumask: Option<String>,
    /// `-r`: JSON-RPC socket.
    pub rpc_socket: PathBuf,
    /// `--wait-for-rpc`.
    pub wait_for_rpc: bool,
    /// `--rpcs-allowed`: comma-separated methods.
    pub rpcs_allowed: Option<String>,
    /// `--json-ignore-init-errors`.
    pub json_ignore_init_errors: bool,
    /// `-L`: log level.
    pub log_level: String,
    /// `--log-format`: text or json.
    pub log_format: String,
}

impl Common {
    /// Reads and checks what the options name, and installs the log.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn options(
        self,
        program: &'static str,
        subsystems: Vec<Box<dyn Subsystem>>,
    ) -> Result<Options, String> {
        let format = match self.log_format.as_str() {
            "text" => Format::Text,
            "json" => Format::Json,
            other => return Err(format!("--log-format '{other}': use text or json")),
        };
        let cpumask = match self.cpumask {
            Some(mask) => mask.parse().map_err(|e: reactor::CpuMaskError| e.to_string())?,
            None => CpuMask::first_allowed(),
        };
        let config = self.config.map(rpc::Config::load).transpose().map_err(|e| e.to_string())?;
        let log = LogControl::install(&self.log_level, format).map_err(|e| format!("--log-level: {e}"))?;
        let allowed = |list: String| list.split(',').map(|m| m.trim().to_owned()).collect();
        Ok(Options {
            program,
            subsystems,
            cpumask,
            rpc_socket: self.rpc_socket,
            config,
            wait_for_rpc: self.wait_for_rpc,
            rpcs_allowed: self.rpcs_allowed.map(allowed),
            ignore_init_errors: self.json_ignore_init_errors,
            idle: IdlePolicy::Adaptive { spin: DEFAULT_SPIN },
            log,
            on_ready: None,
            on_refusal: None,
        })
    }
}

/// Runs a program to its end, with the system's limits raised; says on standard error why it failed.
pub fn main(program: &str, options: Result<Options, String>) -> ExitCode {
    main_isolated(program, options.map(|options| (options, Isolation::none())), || ())
}

/// As [`main`] with the rights that an [`Isolation`] leaves, and runs `ended` after an end in order.
pub fn main_isolated(
    program: &str,
    options: Result<(Options, Isolation), String>,
    ended: impl FnOnce(),
) -> ExitCode {
    raise_limits();
    let log = options.as_ref().map_or_else(|_| LogControl::detached(), |(options, _)| options.log.clone());
    let outcome = options.and_then(|(options, isolation)| {
        app::run_isolated(options, &isolation, |_| {}).map_err(|e| e.to_string())
    });
    log.flush();
    match outcome {
        Ok(()) => {
            ended();
            ExitCode::SUCCESS
        }
        Err(message) => {
            log.last_words(&format!("{program}: {message}"));
            ExitCode::FAILURE
        }
    }
}

/// Takes what the system allows: each open device has a descriptor or two per reactor, and data memory is locked.
fn raise_limits() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    reactor::descriptors::Budget::raise();
    let mut limit = getrlimit(Resource::Memlock);
    limit.current = limit.maximum;
    // A refusal leaves the limit as it was; running into it is reported where it happens.
    let _ = setrlimit(Resource::Memlock, limit);
}

//! Command line.

use std::path::PathBuf;

use argh::FromArgs;
use engine::Options;
use engine::args::Common;
use engine::isolation::{Confinement, Isolation};
use rnbd_target::PROGRAM;

/// Serves block devices to remote hosts by RNBD over RDMA.
#[derive(FromArgs)]
#[argh(
    example = "{command_name} -c configs/target.json\n\
        serves the disks of the shipped example on port 1234; a client maps one with\n\
        echo \"sessname=s1 path=ip:ADDRESS device_path=disk0\" > /sys/devices/virtual/rnbd-client/ctl/map_device",
    note = "SPDK's client steers it: spdk-rpc -s /var/tmp/rnbd-target.sock bdev_get_bdevs",
    error_code(1, "It could not start or not go on; the last line on standard error says why.")
)]
struct Args {
    /// configuration file: a list of JSON-RPC calls, as save_config writes it
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// cores of the reactors, as 0x3 or [0,2-3] (default: the first that this process may use)
    #[argh(option, short = 'm', arg_name = "mask")]
    cpumask: Option<String>,

    /// JSON-RPC socket (default /var/tmp/rnbd-target.sock)
    #[argh(option, short = 'r', default = "\"/var/tmp/rnbd-target.sock\".into()", arg_name = "socket")]
    rpc_socket: PathBuf,

    /// initialise only when framework_start_init is called
    #[argh(switch)]
    wait_for_rpc: bool,

    /// comma-separated methods that the socket may call (default: all)
    #[argh(option, arg_name = "methods")]
    rpcs_allowed: Option<String>,

    /// go on when a call of the configuration fails
    #[argh(switch)]
    json_ignore_init_errors: bool,

    /// log level: DISABLED, ERROR, WARNING, NOTICE, INFO or DEBUG (default INFO)
    #[argh(option, short = 'L', default = "\"INFO\".into()", arg_name = "level")]
    log_level: String,

    /// log format: text or json (default text)
    #[argh(option, default = "\"text\".into()", arg_name = "format")]
    log_format: String,

    /// become this user (name or number) once the JSON-RPC socket is open, with no capabilities: what the configuration
    /// names must be open to it; needs root
    #[argh(option, arg_name = "user")]
    user: Option<String>,

    /// its group (default: that of the user)
    #[argh(option, arg_name = "group")]
    group: Option<String>,

    /// comma-separated capabilities to keep, and no others: sys_admin and sys_resource (kernel NBD and ublk devices),
    /// net_admin, net_bind_service, ipc_lock, net_raw, dac_override (default: none with --user, else all)
    #[argh(option, arg_name = "names")]
    capabilities: Option<String>,

    /// what becomes of system calls that the program has no use for: off (they are made), log (made, and logged by the
    /// kernel) or kill (they end the program) (default: $RNBD_SANDBOX, else off)
    #[argh(option, arg_name = "mode")]
    sandbox: Option<String>,

    /// open files only below this path, which may be given several times, and what libraries need (Landlock); name all
    /// that the configuration and later calls open
    #[argh(option, arg_name = "path")]
    allow_path: Vec<PathBuf>,

    /// serve one NBD client on standard input, a socket, and end with it; the export for one that names none ("" if
    /// there is only one)
    #[argh(option, arg_name = "export")]
    single: Option<String>,

    /// print the version
    #[argh(switch, short = 'v')]
    version: bool,
}

/// Reads the command line; prints help or version and ends the program if asked to.
pub fn options() -> Result<(Options, Isolation), String> {
    let args: Args = argh::from_env();
    if args.version {
        println!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
        std::process::exit(0);
    }
    let isolation = Confinement {
        user: args.user,
        group: args.group,
        capabilities: args.capabilities,
        sandbox: args.sandbox,
        allow_path: args.allow_path,
    };
    let isolation = isolation.check()?;
    let common = Common {
        config: args.config,
        cpumask: args.cpumask,
        rpc_socket: args.rpc_socket,
        wait_for_rpc: args.wait_for_rpc,
        rpcs_allowed: args.rpcs_allowed,
        json_ignore_init_errors: args.json_ignore_init_errors,
        log_level: args.log_level,
        log_format: args.log_format,
    };
    let mut options = common.options(PROGRAM, rnbd_target::subsystems(Vec::new()))?;
    if let Some(export) = args.single {
        let export = Some(export).filter(|name| !name.is_empty());
        options.on_ready = Some(Box::new(|app, cx| exports::nbd_server::serve_stdin(app, cx, export)));
    }
    Ok((options, isolation))
}

//! A minimal program with ublk disks: any bdev of the engine, `ublk_*` over JSON-RPC, nothing remote.
//!
//! ```text
//! cargo run -p exports --example ublk_server -- -m 0x3 -r /run/ublk.sock
//! spdk-rpc -s /run/ublk.sock bdev_malloc_create -b M0 64 512
//! spdk-rpc -s /run/ublk.sock ublk_create_target
//! spdk-rpc -s /run/ublk.sock ublk_start_disk M0 0          # /dev/ublkb0
//! ```

use std::path::PathBuf;

use argh::FromArgs;
use engine::args::Common;
use exports::ublk::Ublk;

const PROGRAM: &str = "ublk_server";

/// Serves bdevs as ublk disks of this host.
#[derive(FromArgs)]
struct Args {
    /// configuration file: a list of JSON-RPC calls
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// cores of the reactors (default 0x1)
    #[argh(option, short = 'm', default = "\"0x1\".into()", arg_name = "mask")]
    cpumask: String,

    /// JSON-RPC socket (default /var/tmp/ublk_server.sock)
    #[argh(option, short = 'r', default = "\"/var/tmp/ublk_server.sock\".into()", arg_name = "socket")]
    rpc_socket: PathBuf,

    /// log level (default INFO)
    #[argh(option, short = 'L', default = "\"INFO\".into()", arg_name = "level")]
    log_level: String,
}

fn main() -> std::process::ExitCode {
    let args: Args = argh::from_env();
    let common = Common {
        config: args.config,
        cpumask: args.cpumask,
        rpc_socket: args.rpc_socket,
        wait_for_rpc: false,
        rpcs_allowed: None,
        json_ignore_init_errors: false,
        log_level: args.log_level,
        log_format: "text".into(),
    };
    engine::args::main(PROGRAM, common.options(PROGRAM, vec![Box::new(Ublk::default())]))
}

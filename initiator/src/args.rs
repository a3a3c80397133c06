//! Command line.

use std::path::PathBuf;

use argh::FromArgs;
use engine::Options;
use engine::args::Common;
use engine::isolation::{Confinement, Isolation};

use crate::direct::{self, Direct, Export, Spec};
use crate::program::{self, PROGRAM};

/// Brings block devices of RNBD servers to this host: as kernel NBD or ublk devices, or over a socket.
#[derive(FromArgs)]
#[argh(
    example = "{command_name} map sessname=s1 path=ip:192.0.2.1 device_path=disk0 --nbd /dev/nbd0\n\
        maps one device and stays in the foreground until Ctrl-C; without a kernel module (and without root):\n\
        {command_name} map sessname=s1 path=ip:192.0.2.1 device_path=disk0 --nbd-socket /tmp/disk0.sock\n\
        {command_name} -c configs/initiator.json\n\
        maps what a configuration says, and more when it is told to",
    note = "SPDK's client steers it: spdk-rpc -s /var/tmp/rnbd-initiator.sock bdev_get_bdevs",
    error_code(1, "It could not start or not go on; the last line on standard error says why.")
)]
struct Args {
    /// configuration file: a list of JSON-RPC calls, as save_config writes it
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// cores of the reactors, as 0x3 or [0,2-3] (default: the first that this process may use)
    #[argh(option, short = 'm', arg_name = "mask")]
    cpumask: Option<String>,

    /// JSON-RPC socket (default /var/tmp/rnbd-initiator.sock; with map /var/tmp/rnbd-initiator-PID.sock)
    #[argh(option, short = 'r', arg_name = "socket")]
    rpc_socket: Option<PathBuf>,

    /// initialise only when framework_start_init is called
    #[argh(switch)]
    wait_for_rpc: bool,

    /// comma-separated methods that the socket may call (default: all)
    #[argh(option, arg_name = "methods")]
    rpcs_allowed: Option<String>,

    /// go on when a call of the configuration fails
    #[argh(switch)]
    json_ignore_init_errors: bool,

    /// log level: DISABLED, ERROR, WARNING, NOTICE, INFO or DEBUG (default INFO; with map ERROR)
    #[argh(option, short = 'L', arg_name = "level")]
    log_level: Option<String>,

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

    #[argh(subcommand)]
    command: Option<Command>,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Map(Map),
}

/// Maps one device and stays in the foreground until Ctrl-C. The words are those of the kernel client's map_device.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "map",
    example = "{command_name} sessname=s1 path=ip:192.0.2.1 device_path=disk0 --nbd /dev/nbd0\n\
        {command_name} sessname=s1 path=ip:10.0.0.2@ip:10.0.0.1 path=ip:10.1.0.2@ip:10.1.0.1 device_path=disk0 \\\n\
        access_mode=ro --ublk\n\
        {command_name} sessname=s1 path=ip:192.0.2.1 device_path=disk0 --nbd-socket /tmp/disk0.sock\n\
        {command_name} path=nbd://192.0.2.1/disk0 --ublk",
    note = "Words: sessname=NAME, device_path=PATH, path=[ip:SOURCE@]ip:SERVER (up to 6 of them), and optionally\n\
        access_mode=ro|rw|migration (rw), dest_port=PORT (1234; once, or once for each path),\n\
        provider=auto|rdma-core|soft-roce (auto), reconnect_delay_sec=, ctrlr_loss_timeout_sec=,\n\
        fast_io_fail_timeout_sec=, stale_io_timeout_sec= (as bdev_rnbd_map takes them).\n\
        Of an NBD server: path=URI alone (nbd://HOST[:PORT]/EXPORT, nbds://, nbd+unix:///EXPORT?socket=PATH), and\n\
        optionally access_mode=ro|rw, connections=, dialect=, size= (dialect 1997), and the timeouts, io_timeout_sec= too.\n\
        -m, -r, -L, --log-format, --user, --group, --capabilities, --sandbox, --allow-path as in rnbd-initiator --help."
)]
struct Map {
    /// what to map, see below
    #[argh(positional, arg_name = "word=value")]
    words: Vec<String>,

    /// a kernel NBD device, such as /dev/nbd0
    #[argh(option, arg_name = "device")]
    nbd: Option<String>,

    /// a ublk device: its number, or nothing for the one that a crash left of the same device, else the first that is free
    #[argh(option, arg_name = "number")]
    ublk: Option<String>,

    /// a vhost-user-blk socket for virtual machines
    #[argh(option, arg_name = "path")]
    vhost_socket: Option<String>,

    /// a unix socket that speaks NBD: for nbdcopy, qemu-img, fio's nbd engine
    #[argh(option, arg_name = "path")]
    nbd_socket: Option<String>,
}

impl Map {
    fn export(&self) -> Result<Export, String> {
        let mut chosen = Vec::new();
        chosen.extend(self.nbd.clone().map(Export::Nbd));
        if let Some(number) = &self.ublk {
            chosen.push(Export::ublk(number)?);
        }
        chosen.extend(self.vhost_socket.clone().map(Export::Vhost));
        chosen.extend(self.nbd_socket.clone().map(Export::NbdSocket));
        match chosen.len() {
            1 => Ok(chosen.remove(0)),
            0 => Err("how to use the device? Give one of --nbd DEVICE, --ublk, --vhost-socket PATH, \
                      --nbd-socket PATH"
                .into()),
            _ => Err("give only one of --nbd, --ublk, --vhost-socket and --nbd-socket".into()),
        }
    }
}

/// Reads the command line: how to start, and what to map directly. Prints help or version and ends the program if asked to.
pub fn options() -> Result<(Options, Isolation, Option<Direct>), String> {
    let words: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let args = arrange(&words);
    let refs: Vec<&str> = args.iter().map(String::as_str).collect();
    let args = Args::from_args(&[PROGRAM], &refs).unwrap_or_else(|early| early_exit(&early));
    if args.version {
        println!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
        std::process::exit(0);
    }
    let direct = match &args.command {
        None => None,
        Some(Command::Map(_)) if args.single.is_some() => {
            return Err(
                "map goes without --single: use --nbd-socket, or a configuration with an export".into()
            );
        }
        Some(Command::Map(_)) if args.config.is_some() || args.wait_for_rpc => {
            return Err("map goes without -c and --wait-for-rpc: it makes its own configuration".into());
        }
        Some(Command::Map(map)) => Some(Direct { spec: Spec::parse(&map.words)?, export: map.export()? }),
    };
    let default = |alone: &str, mapping: String| if direct.is_some() { mapping } else { alone.into() };
    let socket = format!("/var/tmp/{PROGRAM}-{}.sock", std::process::id());
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
        rpc_socket: args.rpc_socket.unwrap_or_else(|| default("/var/tmp/rnbd-initiator.sock", socket).into()),
        wait_for_rpc: args.wait_for_rpc,
        rpcs_allowed: args.rpcs_allowed,
        json_ignore_init_errors: args.json_ignore_init_errors,
        log_level: args.log_level.unwrap_or_else(|| default("INFO", "ERROR".into())),
        log_format: args.log_format,
    };
    let mut options = common.options(PROGRAM, program::subsystems())?;
    options.on_ready = direct.clone().map(Direct::on_ready);
    options.on_refusal = direct.is_some().then_some(direct::refused);
    if let Some(export) = args.single {
        let export = Some(export).filter(|name| !name.is_empty());
        options.on_ready = Some(Box::new(|app, cx| exports::nbd_server::serve_stdin(app, cx, export)));
    }
    Ok((options, isolation, direct))
}

/// Options with a value that may stand behind `map` as well as before it.
const ANYWHERE: [&str; 12] = [
    "-m",
    "--cpumask",
    "-r",
    "--rpc-socket",
    "-L",
    "--log-level",
    "--log-format",
    "--user",
    "--group",
    "--capabilities",
    "--sandbox",
    "--allow-path",
];

/// Puts the arguments (without the program's name) as the parser wants them: options of the program before the
/// command, and a word behind an `--ublk` that stands alone.
fn arrange(args: &[String]) -> Vec<String> {
    let (mut before, mut rest) = (Vec::new(), Vec::new());
    let mut args = args.iter().cloned().peekable();
    while let Some(arg) = args.next() {
        if ANYWHERE.contains(&arg.as_str()) {
            before.push(arg);
            before.extend(args.next());
        } else if arg == "--ublk" {
            rest.push(arg);
            let number = args.next_if(|next| next.parse::<u32>().is_ok());
            rest.push(number.unwrap_or_else(|| Export::ANY.into()));
        } else {
            rest.push(arg);
        }
    }
    before.extend(rest);
    before
}

/// Help, or a mistake in the arguments.
fn early_exit(early: &argh::EarlyExit) -> ! {
    match early.status {
        Ok(()) => println!("{}", early.output),
        Err(()) => eprintln!("{}\nRun {PROGRAM} --help for more information.", early.output),
    }
    std::process::exit(i32::from(early.status.is_err()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(words: &[&str]) -> Result<(Spec, Export), String> {
        let args: Vec<String> = ["map"].iter().chain(words).map(|w| (*w).to_owned()).collect();
        let args = arrange(&args);
        let refs: Vec<&str> = args.iter().map(String::as_str).collect();
        let Some(Command::Map(map)) = Args::from_args(&[PROGRAM], &refs).map_err(|e| e.output)?.command
        else {
            return Err("no map".into());
        };
        Ok((Spec::parse(&map.words)?, map.export()?))
    }

    const DISK: [&str; 3] = ["sessname=s", "path=ip:10.0.0.1", "device_path=d"];

    #[test]
    fn one_export_in_any_place() {
        let with = |more: &[&str]| map(&[&DISK, more].concat()).map(|(_, export)| export);
        assert_eq!(with(&["--nbd", "/dev/nbd0"]), Ok(Export::Nbd("/dev/nbd0".into())));
        assert_eq!(with(&["--ublk"]), Ok(Export::Ublk(None)));
        assert_eq!(with(&["--ublk", "3"]), Ok(Export::Ublk(Some(3))));
        assert_eq!(with(&["--ublk", "access_mode=ro"]), Ok(Export::Ublk(None)));
        assert_eq!(with(&["--vhost-socket", "/tmp/v"]), Ok(Export::Vhost("/tmp/v".into())));
        assert_eq!(with(&["--nbd-socket", "/tmp/n"]), Ok(Export::NbdSocket("/tmp/n".into())));
        let first = map(&[&["--ublk"], &DISK[..]].concat()).unwrap();
        assert_eq!(first.1, Export::Ublk(None));
        assert!(with(&[]).unwrap_err().contains("--nbd DEVICE"));
        assert!(with(&["--ublk", "--nbd", "/dev/nbd0"]).unwrap_err().contains("only one"));
    }

    #[test]
    fn options_of_the_program_may_come_last() {
        let args = ["map", "a=b", "--ublk", "-m", "0x2", "c=d", "-L", "DEBUG"].map(str::to_owned);
        let right = ["-m", "0x2", "-L", "DEBUG", "map", "a=b", "--ublk", Export::ANY, "c=d"];
        assert_eq!(arrange(&args), right);
        assert_eq!(arrange(&["-m".to_owned()]), ["-m"]);
    }

    #[test]
    fn help_begins_with_a_command_that_works() {
        for command in [&["--help"][..], &["map", "--help"]] {
            let help = Args::from_args(&[PROGRAM], command).err().unwrap();
            assert!(help.status.is_ok());
            let example = help
                .output
                .lines()
                .find(|l| l.contains("sessname=s1"))
                .expect("an example")
                .trim()
                .to_owned();
            let words: Vec<&str> = example.split_whitespace().skip_while(|w| *w != "map").skip(1).collect();
            map(&words).unwrap_or_else(|e| panic!("{example}: {e}"));
        }
    }
}

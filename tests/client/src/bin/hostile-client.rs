//! The hostile table against a server behind an RDMA device, and single misdeeds for scenarios.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use argh::FromArgs;
use rnbd_proto::wire::{Flags, Op};
use serde_json::Value;
use test_client::runner::run_table;
use test_client::{Client, Opts, Outcome, Place, cases, place};
use verbs::Cm;

/// Runs the hostile table against an RNBD target, over rdma-core.
///
/// The target must offer the devices m512, m4k, slow and witness (see test_client::Place).
#[derive(FromArgs)]
struct Args {
    /// address of the target
    #[argh(positional)]
    addr: Option<IpAddr>,
    /// port of the target (default 1234)
    #[argh(option, default = "1234")]
    port: u16,
    /// rPC socket of the target, to see what it is left with
    #[argh(option, short = 'r', default = "PathBuf::from(\"/run/rnbd-target.sock\")")]
    rpc: PathBuf,
    /// own addresses, separated by commas; the first one is used most
    #[argh(option, default = "String::new()")]
    src: String,
    /// only cases whose name contains this
    #[argh(option, default = "String::new()")]
    case: String,
    /// how long any one thing may take, milliseconds (default 20000)
    #[argh(option, default = "20_000")]
    timeout_ms: u64,
    /// the target's half_open_timeout_ms (default 3000)
    #[argh(option, default = "3000")]
    half_open_ms: u64,
    /// latency of the device slow, milliseconds (default 400)
    #[argh(option, default = "400")]
    delay_ms: u64,
    /// limits of the target, "SESSIONS,CONNECTIONS", to try to exceed them
    #[argh(option, default = "String::new()")]
    limits: String,
    /// print the table and do nothing
    #[argh(switch)]
    list: bool,
    /// instead of the table: open this device read-only and write, discard and zero it all the same
    #[argh(option)]
    write_ro: Option<String>,
}

struct Host {
    args: Args,
    dst: SocketAddr,
    src: Vec<IpAddr>,
    limits: Option<(usize, usize)>,
    rpc: Mutex<Option<rpc::Client>>,
}

impl Host {
    fn new(args: Args) -> Result<Self, Box<dyn Error>> {
        let addr = args.addr.ok_or("the address of the target is missing; see --help")?;
        let words =
            |s: &str| -> Vec<String> { s.split(',').filter(|w| !w.is_empty()).map(str::to_owned).collect() };
        let src = words(&args.src).iter().map(|w| w.parse()).collect::<Result<_, _>>()?;
        let limits = match &words(&args.limits)[..] {
            [] => None,
            [sessions, connections] => Some((sessions.parse()?, connections.parse()?)),
            _ => return Err("--limits takes two numbers: SESSIONS,CONNECTIONS".into()),
        };
        Ok(Self { dst: SocketAddr::new(addr, args.port), src, limits, rpc: Mutex::new(None), args })
    }
}

impl Place for Host {
    fn cm(&self) -> Result<Box<dyn Cm>, Box<dyn Error>> {
        Ok(verbs::rdma_core::open()?)
    }
    fn dst(&self) -> SocketAddr {
        self.dst
    }
    fn src(&self, n: usize) -> Option<IpAddr> {
        self.src.get(n).copied()
    }
    fn src_count(&self) -> usize {
        self.src.len()
    }
    fn timeout(&self) -> Duration {
        Duration::from_millis(self.args.timeout_ms)
    }
    fn half_open(&self) -> Duration {
        Duration::from_millis(self.args.half_open_ms)
    }
    fn delay(&self) -> Duration {
        Duration::from_millis(self.args.delay_ms)
    }
    fn limits(&self) -> Option<(usize, usize)> {
        self.limits
    }
    fn exact_windows(&self) -> bool {
        false
    }
    fn paths(&self) -> Result<Vec<String>, Box<dyn Error>> {
        let mut slot = self.rpc.lock().unwrap_or_else(|e| e.into_inner());
        let rpc = match &mut *slot {
            Some(rpc) => rpc,
            none => none.insert(rpc::Client::connect(&self.args.rpc)?),
        };
        Ok(place::session_of_each_path(&rpc.call("rnbd_get_sessions", Value::Null)?))
    }
}

/// Everything that changes a device, through a read-only open of it.
fn write_ro(host: &Host, device: &str) -> Result<usize, Box<dyn Error>> {
    let opts = Opts { timeout: host.timeout(), src: host.src(0), ..Opts::new("readonly") };
    let mut client = Client::connect(host.cm()?, host.dst(), opts)?;
    client.sess_info()?;
    let opened = client.open(device, 0)?;
    let id = opened.device_id.get();
    let before = client.read(id, 0, 4096)?;
    let data: Vec<u8> = before.iter().map(|b| !b).collect();
    let results = [
        ("WRITE", client.write(id, 0, &data, Flags::empty())?),
        ("WRITE|FUA", client.write(id, 0, &data, Flags::FUA)?),
        ("WRITE|PREFLUSH", client.write(id, 0, &data, Flags::PREFLUSH)?),
        ("DISCARD", client.discard(id, 0, 4096)?),
        ("WRITE_ZEROES", client.write_zeroes(id, 0, 4096)?),
        ("SECURE_ERASE", client.range_op(id, Op::SecureErase, 0, 4096)?),
    ];
    let unchanged = client.read(id, 0, 4096)? == before;
    println!("{:<16} {}", "data", if unchanged { "unchanged" } else { "CHANGED" });
    let mut wrong = usize::from(!unchanged);
    for (what, outcome) in results {
        let refused = matches!(outcome, Outcome::Errno(_));
        wrong += usize::from(!refused);
        println!("{what:<16} {outcome}{}", if refused { "" } else { ", NOT REFUSED" });
    }
    client.disconnect();
    Ok(wrong)
}

fn run(args: Args) -> Result<usize, Box<dyn Error>> {
    if args.list {
        cases::all().for_each(|c| println!("{:<28} {}", c.name, c.what));
        return Ok(0);
    }
    let host = Host::new(args)?;
    match &host.args.write_ro {
        Some(device) => write_ro(&host, device),
        None => run_table(&host, &host.args.case),
    }
}

fn main() -> ExitCode {
    match run(argh::from_env()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("hostile-client: {e}");
            ExitCode::FAILURE
        }
    }
}

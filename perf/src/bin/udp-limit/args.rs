//! Command line.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use argh::FromArgs;
use serde::Serialize;

use crate::sender::MAX_RUN_BYTES;

/// Measures the UDP request/reply limit of this machine: two pinned, polling threads, one asking, one answering.
#[derive(FromArgs)]
#[argh(
    example = "{command_name} --depth 32\nexchanges of 4140-byte replies with 32 outstanding",
    example = "{command_name} --depth 8 --reply 132480 --rounds 5 --json -\n\
        replies of 32 whole packets, what 128 KiB with RoCEv2's headers take, as JSON",
    error_code(1, "It could not start or not go on; the last line on standard error says why.")
)]
struct Args {
    /// local address of both sockets, IPv4 or IPv6 (default 127.0.0.1)
    #[argh(option, default = "Ipv4Addr::LOCALHOST.into()", arg_name = "ip")]
    address: IpAddr,

    /// exchanges outstanding, 1..=4096 (default 1)
    #[argh(option, default = "1", arg_name = "n")]
    depth: u32,

    /// size of a request, one packet (default 100)
    #[argh(option, default = "100", arg_name = "bytes")]
    request: usize,

    /// size of a reply, split in packets if larger than --mtu (default 4140)
    #[argh(option, default = "4140", arg_name = "bytes")]
    reply: usize,

    /// largest UDP payload of a packet (default 4140: 4096 bytes and RoCEv2's largest headers)
    #[argh(option, default = "4140", arg_name = "bytes")]
    mtu: usize,

    /// length of a round (default 2)
    #[argh(option, default = "2.0", arg_name = "seconds")]
    seconds: f64,

    /// rounds; with several, the median of each column is given (default 1)
    #[argh(option, default = "1", arg_name = "n")]
    rounds: u32,

    /// core of the answering thread (default 0)
    #[argh(option, default = "0", arg_name = "core")]
    server_core: usize,

    /// core of the asking thread (default 1)
    #[argh(option, default = "1", arg_name = "core")]
    client_core: usize,

    /// neither UDP_SEGMENT nor UDP_GRO: each packet is a message of its own
    #[argh(switch)]
    no_gso: bool,

    /// write the results as JSON to this file (- for standard output) in place of the table
    #[argh(option, arg_name = "file")]
    json: Option<PathBuf>,
}

/// What is measured, checked.
#[derive(Clone, Debug, Serialize)]
pub struct Options {
    /// Local address of both sockets.
    pub address: IpAddr,
    /// Exchanges outstanding.
    pub depth: u32,
    /// Bytes of a request, at least [`TAG_BYTES`] and at most `mtu`.
    pub request: usize,
    /// Bytes of a reply; every packet of it has at least [`TAG_BYTES`].
    pub reply: usize,
    /// Most payload bytes of a packet.
    pub mtu: usize,
    /// Length of a round, without the time to warm up.
    pub seconds: f64,
    /// Number of rounds.
    pub rounds: u32,
    /// Core of the server thread; `None`: not pinned.
    pub server_core: Option<usize>,
    /// Core of the client thread; `None`: not pinned.
    pub client_core: Option<usize>,
    /// Whether `UDP_SEGMENT` and `UDP_GRO` are used.
    pub gso: bool,
}

/// Bytes at the start of each packet that name its exchange.
pub const TAG_BYTES: usize = 8;

/// Largest reply: 16 MiB, more than any block protocol's request.
const MAX_REPLY: usize = 16 << 20;

const MAX_DEPTH: u32 = 4096;

/// Most bytes of replies outstanding: half the receive buffer that is asked for, or nothing but losses is measured.
const MAX_OUTSTANDING: usize = 32 << 20;

/// Reads the command line; prints help and ends the program if asked to. Second: where JSON goes, if it does.
pub fn options() -> Result<(Options, Option<PathBuf>), String> {
    let args: Args = argh::from_env();
    if args.server_core == args.client_core {
        return Err(format!("--client-core {}: both threads poll, they need two cores", args.client_core));
    }
    let options = Options {
        address: args.address,
        depth: args.depth,
        request: args.request,
        reply: args.reply,
        mtu: args.mtu,
        seconds: args.seconds,
        rounds: args.rounds,
        server_core: Some(args.server_core),
        client_core: Some(args.client_core),
        gso: !args.no_gso,
    };
    options.check()?;
    Ok((options, args.json))
}

impl Options {
    /// Says in one line which option is out of its range and what the range is.
    pub fn check(&self) -> Result<(), String> {
        in_range("--depth", self.depth as usize, 1, MAX_DEPTH as usize)?;
        in_range("--mtu", self.mtu, TAG_BYTES, MAX_RUN_BYTES)?;
        in_range("--request", self.request, TAG_BYTES, self.mtu)?;
        in_range("--reply", self.reply, TAG_BYTES, MAX_REPLY)?;
        if self.depth as usize * self.reply > MAX_OUTSTANDING {
            let (depth, reply) = (self.depth, self.reply);
            return Err(format!(
                "--depth {depth} with --reply {reply}: use up to {MAX_OUTSTANDING} bytes outstanding"
            ));
        }
        in_range("--rounds", self.rounds as usize, 1, 1000)?;
        if !(0.01..=3600.0).contains(&self.seconds) {
            return Err(format!("--seconds {}: use 0.01 to 3600", self.seconds));
        }
        if self.address.is_unspecified() || self.address.is_multicast() {
            return Err(format!("--address {}: use one address of this host", self.address));
        }
        if self.tail() < TAG_BYTES {
            let tail = self.tail();
            return Err(format!(
                "--reply {}: its last packet would have {tail} bytes, use 8 or more",
                self.reply
            ));
        }
        Ok(())
    }

    /// Packets of a reply.
    pub fn packets(&self) -> usize {
        self.reply.div_ceil(self.mtu)
    }

    /// Bytes of the last packet of a reply.
    pub fn tail(&self) -> usize {
        self.reply - (self.packets() - 1) * self.mtu
    }

    /// Length of a round.
    pub fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

fn in_range(name: &str, value: usize, least: usize, most: usize) -> Result<(), String> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} {value}: use {least} to {most}")),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Options of a short run on loopback without pinning: tests of other programs may use the cores.
    pub fn short(depth: u32, reply: usize, gso: bool) -> Options {
        Options {
            address: Ipv4Addr::LOCALHOST.into(),
            depth,
            request: 100,
            reply,
            mtu: 4140,
            seconds: 0.2,
            rounds: 1,
            server_core: None,
            client_core: None,
            gso,
        }
    }

    #[test]
    fn replies_split_at_the_mtu() {
        for (reply, packets, tail) in
            [(8, 1, 8), (4140, 1, 4140), (4148, 2, 8), (131072, 32, 2732), (132480, 32, 4140)]
        {
            let options = short(1, reply, true);
            assert_eq!((options.packets(), options.tail()), (packets, tail), "{reply}");
            assert_eq!(options.check(), Ok(()), "{reply}");
        }
    }

    #[test]
    fn out_of_range_is_one_line_with_the_range() {
        let good = short(1, 4140, true);
        let bad = [
            (Options { depth: 0, ..good.clone() }, "--depth 0: use 1 to 4096"),
            (Options { request: 7, ..good.clone() }, "--request 7: use 8 to 4140"),
            (Options { request: 4141, ..good.clone() }, "--request 4141: use 8 to 4140"),
            (Options { mtu: 65508, ..good.clone() }, "--mtu 65508: use 8 to 65507"),
            (
                Options { reply: 4141, ..good.clone() },
                "--reply 4141: its last packet would have 1 bytes, use 8 or more",
            ),
            (
                Options { depth: 4096, reply: 131072, ..good.clone() },
                "--depth 4096 with --reply 131072: use up to 33554432 bytes outstanding",
            ),
            (Options { seconds: f64::NAN, ..good.clone() }, "--seconds NaN: use 0.01 to 3600"),
            (
                Options { address: Ipv4Addr::UNSPECIFIED.into(), ..good.clone() },
                "--address 0.0.0.0: use one address of this host",
            ),
        ];
        for (options, message) in bad {
            assert_eq!(options.check(), Err(message.to_owned()));
        }
    }
}

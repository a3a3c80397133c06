//! The other side of perftest's ib_write_bw, ib_read_bw, ib_send_bw, ib_write_lat, ib_read_lat and ib_send_lat with `-R`
//! (version 5.70 and later), as server and as client:
//!
//! ```text
//! perftest ib_write_bw                       /usr/bin/ib_write_bw -R 10.9.1.1
//! /usr/bin/ib_send_lat -R                    perftest ib_send_lat 10.9.1.2
//! ```
//!
//! Sizes and counts must be alike on both sides, as between perftest's own. A first connection carries the talk about
//! the test (`control.rs`), a second one, made when that has begun, the test.

mod common;
#[path = "perftest/control.rs"]
mod control;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

use argh::FromArgs;
use common::{Connection, Host, Result};
use control::{Control, Destination, Report};
use verbs::SendOp;

/// perftest, one test.
#[derive(FromArgs)]
struct Args {
    /// ib_write_bw, ib_read_bw, ib_send_bw, ib_write_lat, ib_read_lat or ib_send_lat
    #[argh(positional)]
    test: Test,
    /// address of the server; without one we are the server
    #[argh(positional)]
    server: Option<IpAddr>,
    /// address to listen on, or the client's source address
    #[argh(option, short = 'b')]
    bind: Option<IpAddr>,
    /// port (18515)
    #[argh(option, short = 'p', default = "18515")]
    port: u16,
    /// bytes per message (65536; 2 for latency)
    #[argh(option, short = 's')]
    size: Option<u32>,
    /// messages (1000; 5000 for ib_write_bw)
    #[argh(option, short = 'n')]
    iters: Option<u32>,
    /// receives that are kept posted (512)
    #[argh(option, short = 'r', default = "DEPTH")]
    rx_depth: u32,
    /// soft-roce (default) or rdma-core
    #[argh(option, default = "\"soft-roce\".into()")]
    provider: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Write,
    Read,
    Send,
}

#[derive(Clone, Copy)]
struct Test {
    verb: Verb,
    latency: bool,
}

impl FromStr for Test {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let (verb, latency) = match name {
            "ib_write_bw" => (Verb::Write, false),
            "ib_read_bw" => (Verb::Read, false),
            "ib_send_bw" => (Verb::Send, false),
            "ib_write_lat" => (Verb::Write, true),
            "ib_read_lat" => (Verb::Read, true),
            "ib_send_lat" => (Verb::Send, true),
            _ => return Err(format!("no test \"{name}\"")),
        };
        Ok(Self { verb, latency })
    }
}

/// Work requests of a queue; what perftest receives into.
const DEPTH: u32 = 512;
/// Messages in flight, as perftest's default for bandwidth.
const WINDOW: u32 = 128;
/// Every so many sends one completes.
const SIGNAL: u32 = 16;
const RECV: u64 = 1;
const SEND: u64 = 2;
/// perftest spreads small messages over so many bytes.
const CYCLE: u32 = 4096;

fn main() {
    if let Err(error) = run(&argh::from_env()) {
        eprintln!("perftest: {error}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<()> {
    let (test, client) = (args.test, args.server.is_some());
    let size = args.size.unwrap_or(if test.latency { 2 } else { 65536 });
    let iters = args.iters.unwrap_or(if test.verb == Verb::Write && !test.latency { 5000 } else { 1000 });
    if size == 0 || size > 1 << 30 || iters == 0 {
        return Err(format!("-s {size} -n {iters}: 1 to 1 GiB, at least one message").into());
    }
    if !(1..=DEPTH).contains(&args.rx_depth) {
        return Err(format!("-r {}: 1 to {DEPTH}", args.rx_depth).into());
    }

    let mut host = Host::open(&args.provider)?;
    let endpoint = Endpoint { server: args.server, bind: args.bind, port: args.port };
    let connection = endpoint.open(&mut host, Control::DEPTH, Control::MEMORY, Control::prepare)?;
    let mut control = Control::new(connection, client);
    let cycle = control.introduce(&mut host, CYCLE)?;

    control.handshake(&mut host, &Destination::default())?;
    // What peers read is behind what they write or send: two parts, as perftest has them.
    let part = size.max(cycle) as usize;
    let connection = endpoint.connect(&mut host, DEPTH, 2 * part, |_| Ok(()))?;
    control.handshake(&mut host, &Destination::default())?;
    let mine = Destination { addr: connection.address(part), rkey: connection.mr.rkey() };
    let peer = control.handshake(&mut host, &mine)?;
    // perftest repeats it until it has printed everything.
    for _ in 0..if test.latency && test.verb != Verb::Send { 3 } else { 2 } {
        control.handshake(&mut host, &mine)?;
    }

    let mut run = Run { host, control, connection, peer, client, part, size, iters };
    if test.verb == Verb::Send {
        run.ready(args.rx_depth, &mine)?;
    }
    let time = run.test(test)?;
    run.part_company(test, &mine, time)?;
    print(test, size, iters, time);
    Ok(())
}

/// Where the connections are made.
struct Endpoint {
    server: Option<IpAddr>,
    bind: Option<IpAddr>,
    port: u16,
}

impl Endpoint {
    /// The first connection.
    fn open(
        &self,
        host: &mut Host,
        depth: u32,
        bytes: usize,
        prepare: fn(&mut Connection) -> Result<()>,
    ) -> Result<Connection> {
        if self.server.is_none() {
            let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            host.listen(SocketAddr::new(self.bind.unwrap_or(any), self.port))?;
        }
        self.connect(host, depth, bytes, prepare)
    }

    /// One more.
    fn connect(
        &self,
        host: &mut Host,
        depth: u32,
        bytes: usize,
        prepare: fn(&mut Connection) -> Result<()>,
    ) -> Result<Connection> {
        if let Some(server) = self.server {
            let mut connection = host.dial(SocketAddr::new(server, self.port), self.bind, depth, bytes)?;
            prepare(&mut connection)?;
            return Ok(connection);
        }
        let mut connection = host.request(depth, bytes)?;
        prepare(&mut connection)?;
        host.accept(&mut connection)?;
        Ok(connection)
    }
}

/// A test that is connected.
struct Run {
    host: Host,
    control: Control,
    connection: Connection,
    peer: Destination,
    client: bool,
    /// Bytes of each part of the memory: the first is sent from, the second received into.
    part: usize,
    size: u32,
    iters: u32,
}

impl Run {
    /// Both can receive.
    fn ready(&mut self, receives: u32, mine: &Destination) -> Result<()> {
        for _ in 0..receives {
            self.receive()?;
        }
        self.control.handshake(&mut self.host, mine)?;
        Ok(())
    }

    /// Returns how long it took, if it is this side that measures.
    fn test(&mut self, test: Test) -> Result<Option<Duration>> {
        let start = Instant::now();
        match (test.verb, test.latency, self.client) {
            (Verb::Send, true, _) => self.send_ping_pong()?,
            (Verb::Write, true, _) => self.write_ping_pong()?,
            (Verb::Read, true, true) => self.stream(self.read(), 1)?,
            (Verb::Read, false, true) => self.stream(self.read(), WINDOW)?,
            (Verb::Write, false, true) => self.stream(self.write(), WINDOW)?,
            (Verb::Send, false, true) => self.stream(SendOp::Send, WINDOW)?,
            (Verb::Send, false, false) => {
                for _ in 0..self.iters {
                    self.received()?;
                }
            }
            // The peer does all of it; what it says next is that it is done.
            (Verb::Read | Verb::Write, _, false) => return Ok(None),
        }
        Ok(Some(start.elapsed()))
    }

    /// As the two sides of perftest end each test.
    fn part_company(mut self, test: Test, mine: &Destination, time: Option<Duration>) -> Result<()> {
        let host = &mut self.host;
        if test.verb != Verb::Send && !test.latency {
            self.control.handshake(host, mine)?;
            self.control.report(host, &Report::new(self.size, self.iters, time))?;
        }
        if test.verb != Verb::Write || !test.latency {
            self.control.handshake(host, mine)?;
        }
        for connection in [self.connection, self.control.connection] {
            if !self.client {
                host.hung_up(&connection)?;
            }
            host.hang_up(connection)?;
        }
        Ok(())
    }

    fn write(&self) -> SendOp {
        SendOp::Write { addr: self.peer.addr, rkey: self.peer.rkey }
    }

    fn read(&self) -> SendOp {
        SendOp::Read { addr: self.peer.addr, rkey: self.peer.rkey }
    }

    fn receive(&mut self) -> Result<()> {
        self.connection.receive(RECV, self.part, self.size)
    }

    fn received(&mut self) -> Result<()> {
        let wc = self.host.completed(self.connection.id, RECV)?;
        if wc.byte_len != self.size {
            return Err(format!("{} bytes came, not {}", wc.byte_len, self.size).into());
        }
        self.receive()
    }

    /// One request, to its end.
    fn request(&mut self, op: SendOp) -> Result<()> {
        self.connection.send(SEND, op, 0, self.size, true)?;
        self.host.completed(self.connection.id, SEND)?;
        Ok(())
    }

    /// All messages, at most `window` in flight.
    fn stream(&mut self, op: SendOp, window: u32) -> Result<()> {
        let (mut posted, mut done) = (0, 0);
        let signal = SIGNAL.min(window);
        while done < self.iters {
            while posted < self.iters && posted - done < window {
                posted += 1;
                let signaled = posted % signal == 0 || posted == self.iters;
                self.connection.send(SEND, op, 0, self.size, signaled)?;
            }
            self.host.completed(self.connection.id, SEND)?;
            done = (done + signal).min(self.iters);
        }
        Ok(())
    }

    fn send_ping_pong(&mut self) -> Result<()> {
        for _ in 0..self.iters {
            if self.client {
                self.connection.send(SEND, SendOp::Send, 0, self.size, true)?;
                self.received()?;
                self.host.completed(self.connection.id, SEND)?;
            } else {
                self.received()?;
                self.request(SendOp::Send)?;
            }
        }
        Ok(())
    }

    /// Each side counts in the last byte that it writes; the server begins.
    fn write_ping_pong(&mut self) -> Result<()> {
        for count in 1..=self.iters {
            if self.client {
                self.written(count)?;
            }
            self.connection.put(self.size as usize - 1, &[count as u8])?;
            self.request(self.write())?;
            if !self.client {
                self.written(count)?;
            }
        }
        Ok(())
    }

    fn written(&mut self, count: u32) -> Result<()> {
        let (connection, at) = (&self.connection, self.part + self.size as usize - 1);
        let mut last = [0];
        self.host.wait("write", |_| {
            connection.get(at, &mut last)?;
            Ok((last[0] == count as u8).then_some(()))
        })
    }
}

fn print(test: Test, size: u32, iters: u32, time: Option<Duration>) {
    let Some(time) = time else {
        println!("{iters} messages of {size} bytes, measured by the client");
        return;
    };
    if test.latency {
        let ways = if test.verb == Verb::Read { 1.0 } else { 2.0 };
        let micros = time.as_secs_f64() * 1e6 / f64::from(iters) / ways;
        println!("{iters} messages of {size} bytes, {micros:.1} us each");
    } else {
        let report = Report::new(size, iters, Some(time));
        println!("{iters} messages of {size} bytes, {:.1} MiB/s", report.mib_per_s);
    }
}

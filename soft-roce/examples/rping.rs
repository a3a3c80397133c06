//! Speaks the protocol of rping(1), as its server and as its client:
//!
//! ```text
//! rping -s -a 10.9.1.1 -V                  /usr/bin/rping -c -a 10.9.1.1 -C 10 -V
//! /usr/bin/rping -s -a 10.9.1.2            rping -c -a 10.9.1.2 -C 10 -V
//! ```
//!
//! Per ping the client tells (SEND) where its text is, the server fetches it (RDMA READ) and says so (SEND), the client
//! tells where it wants it back, the server puts it there (RDMA WRITE) and says so.

mod common;

use std::net::{IpAddr, SocketAddr};

use argh::FromArgs;
use common::{Connection, Host, Result};
use verbs::{CmId, SendOp, Wc};

/// The part of rping(1) that a server or client needs.
#[derive(FromArgs)]
struct Args {
    /// the server's side
    #[argh(switch, short = 's')]
    server: bool,
    /// the client's side
    #[argh(switch, short = 'c')]
    client: bool,
    /// address to listen on or to connect to
    #[argh(option, short = 'a')]
    address: IpAddr,
    /// source address of the client
    #[argh(option, short = 'I')]
    source: Option<IpAddr>,
    /// port (7174)
    #[argh(option, short = 'p', default = "7174")]
    port: u16,
    /// pings that the client sends (10)
    #[argh(option, short = 'C', default = "10")]
    count: u32,
    /// bytes per ping that the client sends (64)
    #[argh(option, short = 'S', default = "64")]
    size: u32,
    /// check the text
    #[argh(switch, short = 'V')]
    validate: bool,
    /// soft-roce (default) or rdma-core
    #[argh(option, default = "\"soft-roce\".into()")]
    provider: String,
}

/// The size of `struct rping_rdma_info`: address, key and length, big-endian. The server's have no meaning.
const ADVICE: u32 = 16;
const MAX_SIZE: u32 = 64 << 10;
/// The parts of the registered memory.
const TEXT_AT: usize = 0;
const ECHO_AT: usize = MAX_SIZE as usize;
const SEND_AT: usize = 2 * MAX_SIZE as usize;
const RECV_AT: usize = SEND_AT + ADVICE as usize;
const MEMORY: usize = RECV_AT + ADVICE as usize;

const DEPTH: u32 = 16;
const RECV: u64 = 1;
const SEND: u64 = 2;
const DATA: u64 = 3;

fn main() {
    let args: Args = argh::from_env();
    let result = match (args.server, args.client) {
        (true, false) => serve(&args),
        (false, true) => ping(&args),
        _ => Err("either -s or -c".into()),
    };
    if let Err(error) = result {
        eprintln!("rping: {error}");
        std::process::exit(1);
    }
}

/// Serves one client.
fn serve(args: &Args) -> Result<()> {
    let mut host = Host::open(&args.provider)?;
    host.listen(SocketAddr::new(args.address, args.port))?;
    let mut connection = host.request(DEPTH, MEMORY)?;
    let c = &mut connection;
    c.receive(RECV, RECV_AT, ADVICE)?;
    host.accept(c)?;
    let mut pings = 0;
    while let Some(wc) = host.completion(c.id, RECV)? {
        let (addr, rkey, len) = advice(c, &wc)?;
        c.send(DATA, SendOp::Read { addr, rkey }, TEXT_AT, len, true)?;
        host.completed(c.id, DATA)?;
        if args.validate {
            validate(c, TEXT_AT, &text(pings, len))?;
        }
        go_ahead(c)?;

        let wc = host.completed(c.id, RECV)?;
        let (addr, rkey, room) = advice(c, &wc)?;
        c.send(DATA, SendOp::Write { addr, rkey }, TEXT_AT, len.min(room), true)?;
        host.completed(c.id, DATA)?;
        go_ahead(c)?;
        pings += 1;
    }
    host.hang_up(connection)?;
    println!("server: answered {pings} pings");
    Ok(())
}

/// Reads what the client said, and is ready for the next.
fn advice(c: &mut Connection, wc: &Wc) -> Result<(u64, u32, u32)> {
    let mut info = [0u8; ADVICE as usize];
    c.get(RECV_AT, &mut info)?;
    let addr = u64::from_be_bytes(info[..8].try_into()?);
    let rkey = u32::from_be_bytes(info[8..12].try_into()?);
    let len = u32::from_be_bytes(info[12..].try_into()?);
    if wc.byte_len != ADVICE || len > MAX_SIZE {
        return Err(format!("{} bytes of advice about {len} bytes of text", wc.byte_len).into());
    }
    c.receive(RECV, RECV_AT, ADVICE)?;
    Ok((addr, rkey, len))
}

/// Without a completion: after the last one the client may hang up before it has acknowledged it.
fn go_ahead(c: &mut Connection) -> Result<()> {
    c.send(SEND, SendOp::Send, SEND_AT, ADVICE, false)
}

/// Pings a server.
fn ping(args: &Args) -> Result<()> {
    if !(16..MAX_SIZE).contains(&args.size) {
        return Err(format!("-S {}: 16 to {} bytes", args.size, MAX_SIZE - 1).into());
    }
    let mut host = Host::open(&args.provider)?;
    let mut connection = host.dial(SocketAddr::new(args.address, args.port), args.source, DEPTH, MEMORY)?;
    let c = &mut connection;
    c.receive(RECV, RECV_AT, ADVICE)?;
    for ping in 0..args.count {
        let text = text(ping, args.size);
        c.put(TEXT_AT, &text)?;
        c.put(ECHO_AT, &vec![0; args.size as usize])?;
        advise(c, TEXT_AT, args.size)?;
        answered(&mut host, c.id)?;
        c.receive(RECV, RECV_AT, ADVICE)?;
        advise(c, ECHO_AT, args.size)?;
        answered(&mut host, c.id)?;
        c.receive(RECV, RECV_AT, ADVICE)?;
        if args.validate {
            validate(c, ECHO_AT, &text)?;
        }
    }
    host.hang_up(connection)?;
    println!("client: {} pings of {} bytes were answered", args.count, args.size);
    Ok(())
}

fn advise(c: &mut Connection, offset: usize, size: u32) -> Result<()> {
    let mut info = c.address(offset).to_be_bytes().to_vec();
    info.extend(c.mr.rkey().to_be_bytes());
    info.extend(size.to_be_bytes());
    c.put(SEND_AT, &info)?;
    c.send(SEND, SendOp::Send, SEND_AT, ADVICE, true)
}

fn answered(host: &mut Host, id: CmId) -> Result<()> {
    host.completed(id, SEND)?;
    let wc = host.completed(id, RECV)?;
    if wc.byte_len != ADVICE {
        return Err(format!("an answer of {} bytes", wc.byte_len).into());
    }
    Ok(())
}

/// The text of ping number `ping`: its name, then 'A' to 'z' again and again from another letter each time, then NUL.
fn text(ping: u32, size: u32) -> Vec<u8> {
    const LETTERS: u32 = (b'z' - b'A' + 1) as u32;
    let letters = (0..LETTERS).cycle().skip((ping % LETTERS) as usize).map(|c| b'A' + c as u8);
    let mut text: Vec<u8> = format!("rdma-ping-{ping}: ").into_bytes();
    text.extend(letters.take(size as usize));
    text.truncate(size as usize);
    if let Some(last) = text.last_mut() {
        *last = 0;
    }
    text
}

fn validate(c: &Connection, offset: usize, text: &[u8]) -> Result<()> {
    let mut got = vec![0; text.len()];
    c.get(offset, &mut got)?;
    if got == text {
        return Ok(());
    }
    Err(format!("got \"{}\", not \"{}\"", got.escape_ascii(), text.escape_ascii()).into())
}

//! The talk beside a perftest, over SENDs on a connection of its own. In every exchange the client speaks first.
//! Source: perftest's perftest_communication.c.

use std::time::Duration;

use verbs::SendOp;

use crate::common::{Connection, Host, Result};

/// The connection for it.
pub struct Control {
    pub connection: Connection,
    client: bool,
}

/// Where the peer's test data goes to or comes from, the part of `struct pingpong_dest` that says something over
/// rdma_cm.
#[derive(Default)]
pub struct Destination {
    pub addr: u64,
    pub rkey: u32,
}

/// The result, as the client measured it.
pub struct Report {
    size: u64,
    iters: u64,
    pub mib_per_s: f64,
    mega_messages: f64,
}

const SEND: u64 = 11;
const RECV: u64 = 12;
const SEND_AT: usize = 0;
const RECV_AT: usize = 64;
/// `sizeof(struct pingpong_dest)`: lid, out_reads, qpn, psn, rkey, 4 bytes of padding, vaddr, gid (16), srqn, gid_index.
/// Integers are of 4 bytes and vaddr of 8, big-endian.
const DESTINATION: usize = 56;
const RKEY_AT: usize = 16;
const ADDR_AT: usize = 24;
/// perftest's version at Debian 12; a string in 16 bytes.
const VERSION: &[u8; 16] = b"6.06\0\0\0\0\0\0\0\0\0\0\0\0";
const OLDEST: f64 = 5.70;
const CACHE_LINE: u32 = 64;
/// `enum ibv_mtu` of 4096 bytes as a string. The lesser one of both sides counts, but only without rdma_cm.
const MTU: &[u8; 2] = b"5\0";

impl Control {
    pub const DEPTH: u32 = 4;
    pub const MEMORY: usize = 128;

    pub fn new(connection: Connection, client: bool) -> Self {
        Self { connection, client }
    }

    /// Before the peer may speak.
    pub fn prepare(connection: &mut Connection) -> Result<()> {
        connection.receive(RECV, RECV_AT, DESTINATION as u32)
    }

    /// What both need to know before the test has a connection. Returns the larger one of both sides' `cycle`, the
    /// bytes that small messages are spread over.
    pub fn introduce(&mut self, host: &mut Host, cycle: u32) -> Result<u32> {
        let theirs = self.exchange(host, *VERSION)?;
        let text = String::from_utf8_lossy(&theirs);
        let version: f64 = text.trim_end_matches('\0').parse()?;
        if version < OLDEST {
            return Err(format!("perftest {version} is too old, {OLDEST} and later will do").into());
        }
        let theirs = u32::from_be_bytes(self.exchange(host, cycle.to_be_bytes())?);
        self.exchange(host, CACHE_LINE.to_be_bytes())?;
        self.exchange(host, *MTU)?;
        if theirs > 1 << 30 {
            Err(format!("a cycle of {theirs} bytes").into())
        } else {
            Ok(theirs.max(cycle))
        }
    }

    /// Tells `mine`, gets theirs; also how one waits for the other.
    pub fn handshake(&mut self, host: &mut Host, mine: &Destination) -> Result<Destination> {
        let mut bytes = [0; DESTINATION];
        bytes[RKEY_AT..][..4].copy_from_slice(&mine.rkey.to_be_bytes());
        bytes[ADDR_AT..][..8].copy_from_slice(&mine.addr.to_be_bytes());
        let theirs = self.exchange(host, bytes)?;
        let rkey = u32::from_be_bytes(theirs[RKEY_AT..][..4].try_into()?);
        let addr = u64::from_be_bytes(theirs[ADDR_AT..][..8].try_into()?);
        Ok(Destination { addr, rkey })
    }

    /// Five numbers, each an exchange of its own. Doubles are big-endian, too.
    pub fn report(&mut self, host: &mut Host, mine: &Report) -> Result<()> {
        self.exchange(host, mine.size.to_be_bytes())?;
        self.exchange(host, mine.iters.to_be_bytes())?;
        self.exchange(host, mine.mib_per_s.to_be_bytes())?;
        self.exchange(host, mine.mib_per_s.to_be_bytes())?;
        self.exchange(host, mine.mega_messages.to_be_bytes())?;
        Ok(())
    }

    fn exchange<const N: usize>(&mut self, host: &mut Host, mine: [u8; N]) -> Result<[u8; N]> {
        if self.client {
            self.say(host, mine)?;
            return self.hear(host);
        }
        let theirs = self.hear(host)?;
        self.say(host, mine)?;
        Ok(theirs)
    }

    fn say<const N: usize>(&mut self, host: &mut Host, mine: [u8; N]) -> Result<()> {
        self.connection.put(SEND_AT, &mine)?;
        self.connection.send(SEND, SendOp::Send, SEND_AT, N as u32, true)?;
        host.completed(self.connection.id, SEND)?;
        Ok(())
    }

    fn hear<const N: usize>(&mut self, host: &mut Host) -> Result<[u8; N]> {
        let wc = host.completed(self.connection.id, RECV)?;
        if wc.byte_len as usize != N {
            return Err(format!("the peer said {} bytes where {N} should come", wc.byte_len).into());
        }
        let mut theirs = [0; N];
        self.connection.get(RECV_AT, &mut theirs)?;
        Self::prepare(&mut self.connection)?;
        Ok(theirs)
    }
}

impl Report {
    pub fn new(size: u32, iters: u32, time: Option<Duration>) -> Self {
        let rate = time.map_or(0.0, |t| f64::from(iters) / t.as_secs_f64());
        let mib_per_s = rate * f64::from(size) / f64::from(1 << 20);
        Self { size: size.into(), iters: iters.into(), mib_per_s, mega_messages: rate / 1e6 }
    }
}

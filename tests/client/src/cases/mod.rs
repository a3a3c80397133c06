//! The hostile table: what a client may do wrong, and what must come of it.
//!
//! Where the kernel's server (`rtrs-srv.c`, `rnbd-srv.c`) drops a request silently, which leaves its client hanging,
//! the server under test must answer or close the path; see `rtrs_proto::request`.

mod connect;
mod header;
mod immediate;
mod info;
mod life;
mod limits;
mod open;
mod rnbd;
mod wire;

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rnbd_proto::wire::{Flags, MsgIo, Op};
use rtrs_proto::Errno;
use rtrs_proto::wire::ConnReq;

use crate::client::Client;
use crate::opts::Opts;
use crate::outcome::{ConnectError, Outcome};
use crate::place::Place;
use crate::rnbd::CallError;

/// What a case came to; an error is a failure whatever was expected.
pub type Ran = Result<Outcome, Box<dyn Error>>;

/// What a case needs of its [`Place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing special.
    Nothing,
    /// This many client addresses.
    Addresses(usize),
    /// Known limits of the server.
    Limits,
    /// Keys that rotate.
    RotatingKeys,
    /// Client windows whose keys can be invalidated.
    Invalidation,
}

/// One line of the table.
pub struct Case {
    /// Unique.
    pub name: &'static str,
    /// What the client does.
    pub what: &'static str,
    /// Any of these is right.
    pub expect: &'static [Outcome],
    /// Skipped where this is not to be had.
    pub needs: Needs,
    /// Does it.
    pub run: fn(&Ctx<'_>) -> Ran,
}

const fn case(
    name: &'static str,
    what: &'static str,
    expect: &'static [Outcome],
    run: fn(&Ctx<'_>) -> Ran,
) -> Case {
    Case { name, what, expect, needs: Needs::Nothing, run }
}

impl Case {
    const fn needs(mut self, needs: Needs) -> Self {
        self.needs = needs;
        self
    }
}

const OK: &[Outcome] = &[Outcome::Ok];
const CLOSED: &[Outcome] = &[Outcome::PathClosed];
const OK_OR_CLOSED: &[Outcome] = &[Outcome::Ok, Outcome::PathClosed];
const RESET: &[Outcome] = &[Outcome::Rejected(-104)];
const EXIST: &[Outcome] = &[Outcome::Rejected(-17)];
const NOMEM: &[Outcome] = &[Outcome::Rejected(-12)];
const INVAL: &[Outcome] = &[Outcome::Errno(Errno::EINVAL)];
const MSGSIZE: &[Outcome] = &[Outcome::Errno(Errno::EMSGSIZE)];
const NOTCONN: &[Outcome] = &[Outcome::Errno(Errno::ENOTCONN)];
const NOTSUPP: &[Outcome] = &[Outcome::Errno(Errno::EOPNOTSUPP)];
const IO: &[Outcome] = &[Outcome::Errno(Errno::EIO)];
const ROFS: &[Outcome] = &[Outcome::Errno(Errno::EROFS)];
const PERM: &[Outcome] = &[Outcome::Errno(Errno::EPERM)];
const NOENT: &[Outcome] = &[Outcome::Errno(Errno::ENOENT)];

/// All cases, in the order of a connection's life.
pub fn all() -> impl Iterator<Item = &'static Case> {
    [
        connect::CASES,
        info::CASES,
        immediate::CASES,
        header::CASES,
        wire::CASES,
        open::CASES,
        rnbd::CASES,
        life::CASES,
        limits::CASES,
    ]
    .into_iter()
    .flatten()
}

/// What a case works with.
pub struct Ctx<'p> {
    /// The server.
    pub place: &'p dyn Place,
    /// The bystander's options: its session's name and uuids.
    pub bystander: Opts,
    /// The bystander's device id of `witness`.
    pub witness: u32,
    /// Sink of all clients' violations.
    pub violations: Arc<Mutex<Vec<String>>>,
}

impl Ctx<'_> {
    fn opts(&self, name: &str) -> Opts {
        Opts {
            timeout: self.place.timeout(),
            src: self.place.src(0),
            violations: self.violations.clone(),
            ..Opts::new(name)
        }
    }

    /// A client that has not connected yet.
    fn fresh(&self, opts: Opts) -> Result<Client, Box<dyn Error>> {
        Ok(Client::new(self.place.cm()?, self.place.dst(), opts))
    }

    fn connect_with(&self, opts: Opts) -> Result<Client, Box<dyn Error>> {
        Ok(Client::connect(self.place.cm()?, self.place.dst(), opts)?)
    }

    /// A session "hostile" with two connections.
    fn connect(&self) -> Result<Client, Box<dyn Error>> {
        self.connect_with(self.opts("hostile"))
    }

    /// The same, with a device open.
    fn opened(&self, device: &str, mode: u8) -> Result<(Client, u32), Box<dyn Error>> {
        let mut client = self.connect()?;
        client.sess_info()?;
        let id = client.open(device, mode)?.device_id.get();
        Ok((client, id))
    }

    /// Sends a connection request made well-formed and then changed.
    fn dial(&self, change: impl FnOnce(&mut ConnReq)) -> Ran {
        use zerocopy::IntoBytes;
        let mut client = self.fresh(self.opts("hostile"))?;
        let mut request = client.opts.conn_req(0);
        change(&mut request);
        dialed(client.dial(request.as_bytes()))
    }
}

/// The outcome of a connection attempt.
fn dialed<T>(result: Result<T, ConnectError>) -> Ran {
    match result {
        Ok(_) => Ok(Outcome::Ok),
        Err(e) => Ok(e.outcome()?),
    }
}

/// The outcome of a read-direction call.
fn called<T>(result: Result<T, CallError>) -> Ran {
    match result {
        Ok(_) => Ok(Outcome::Ok),
        Err(CallError::Outcome(o)) => Ok(o),
        Err(CallError::Connect(e)) => Ok(e.outcome()?),
    }
}

/// The server still serves this client: a flush is answered.
fn still_serves(client: &mut Client, device: u32) -> Ran {
    Ok(client.flush(device)?)
}

fn expect(what: &str, got: Outcome, wanted: Outcome) -> Result<(), Box<dyn Error>> {
    if got == wanted { Ok(()) } else { Err(format!("{what}: {got} instead of {wanted}").into()) }
}

fn ensure(truth: bool, otherwise: &str) -> Result<(), Box<dyn Error>> {
    if truth { Ok(()) } else { Err(otherwise.into()) }
}

/// Repeats what a slow machine can make impossible, to be faster than something else, until it has come to something;
/// `None`: it was too slow, and left nothing behind.
fn until_fast(cx: &Ctx<'_>, mut attempt: impl FnMut() -> Result<Option<Outcome>, Box<dyn Error>>) -> Ran {
    let end = Instant::now() + cx.place.timeout();
    while Instant::now() < end {
        if let Some(outcome) = attempt()? {
            return Ok(outcome);
        }
    }
    Err("this machine was too slow at every attempt".into())
}

/// Small, and the same everywhere (xorshift64*).
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

fn read_msg(device: u32, sector: u64, len: u32) -> MsgIo {
    MsgIo::request(device, Op::Read, Flags::SYNC, sector, len, 0x4004)
}

fn write_msg(device: u32, sector: u64, len: u32) -> MsgIo {
    MsgIo::request(device, Op::Write, Flags::SYNC, sector, len, 0x4004)
}

fn flush_msg(device: u32) -> MsgIo {
    MsgIo::request(device, Op::Flush, Flags::SYNC, u64::MAX, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_case_expects_something() {
        let mut seen = std::collections::HashSet::new();
        for c in all() {
            assert!(seen.insert(c.name), "{} twice", c.name);
            assert!(!c.expect.is_empty() && !c.what.is_empty(), "{}", c.name);
        }
        assert!(seen.len() >= 100, "{}", seen.len());
    }
}

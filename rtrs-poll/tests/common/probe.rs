//! The client's upper layer of these tests: tells the test what it sees, and runs a load that checks its data.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use iobuf::{Region, Registry, Segment};
use reactor::Turn;
use rtrs_poll::client::{Data, Io, Refused, Session, SessionKey, Submit, Upper, Via};
use rtrs_proto::Errno;

use super::load::{LOAD_COOKIE, Load};

#[derive(Debug)]
pub enum Seen {
    Up(SessionKey),
    Completed(u64, Result<(), Errno>),
    Down,
}

pub struct Probe {
    number: usize,
    seen: Sender<(usize, Seen)>,
    /// By cookie: submitted again as soon as they complete, so many times in all.
    pub repeat: (Vec<Request>, u32),
    pub load: Option<Load>,
}

/// What a request does with its memory.
#[derive(Clone, Debug)]
pub enum Kind {
    Write(Vec<Segment>),
    Read(Option<Segment>),
}

/// An owned [`Submit`].
#[derive(Clone, Debug)]
pub struct Request {
    pub via: Via,
    pub usr: Vec<u8>,
    pub kind: Kind,
    pub cookie: u64,
}

impl Request {
    pub fn submit(&self, io: &mut Io, key: SessionKey) -> Result<(), Refused> {
        let data = match &self.kind {
            Kind::Write(pieces) => Data::Write(pieces),
            Kind::Read(target) => Data::Read(*target),
        };
        io.submit(key, &Submit { via: self.via, usr: &self.usr, data, cookie: self.cookie })
    }
}

impl Probe {
    pub fn new(number: usize, seen: Sender<(usize, Seen)>) -> Self {
        Self { number, seen, repeat: (Vec::new(), 0), load: None }
    }

    fn tell(&self, seen: Seen) {
        // A test that has ended does not listen any more.
        let _ = self.seen.send((self.number, seen));
    }
}

impl Upper for Probe {
    fn session_up(&mut self, _: &mut Turn<'_>, io: &mut Io, key: SessionKey, _: &Arc<Session>) {
        self.tell(Seen::Up(key));
        if let Some(load) = &mut self.load {
            load.session_up(io);
        }
    }

    fn completed(
        &mut self,
        _: &mut Turn<'_>,
        io: &mut Io,
        key: SessionKey,
        cookie: u64,
        result: Result<(), Errno>,
    ) {
        if cookie >= LOAD_COOKIE {
            let load = self.load.as_mut().expect("it runs");
            return load.completed(io, (cookie - LOAD_COOKIE) as usize, result);
        }
        let (requests, left) = &mut self.repeat;
        if let Some(request) = requests.get(cookie as usize)
            && *left > 0
        {
            *left -= 1;
            assert_eq!(result, Ok(()));
            return request.submit(io, key).expect("the id that came back is free");
        }
        self.tell(Seen::Completed(cookie, result));
    }

    fn session_down(&mut self, _: &mut Turn<'_>, _: &mut Io, _: SessionKey) {
        self.tell(Seen::Down);
    }

    fn poll(&mut self, _: &mut Turn<'_>, io: &mut Io) -> bool {
        self.load.as_mut().is_some_and(|l| l.poll(io))
    }
}

/// Data memory of a test, in the client's registry.
#[derive(Clone)]
pub struct Memory {
    region: Arc<Region>,
}

pub const MEMORY: usize = 4 << 20;

impl Memory {
    pub fn new(registry: &Registry) -> Self {
        Self { region: registry.map(MEMORY).expect("memory") }
    }

    /// In no registry.
    pub fn unregistered() -> Self {
        Self { region: Region::new(MEMORY).expect("memory") }
    }

    pub fn fill(&self, at: usize, bytes: &[u8]) {
        assert!(self.region.copy_in(at, bytes));
    }

    pub fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.region.copy_out(at, &mut out));
        out
    }

    pub fn segment(&self, at: usize, len: u32) -> Segment {
        // SAFETY: tests keep the memory until their requests have completed, and do not let two of them meet.
        unsafe { self.region.segment(at, len as usize) }.expect("inside")
    }

    /// A write of `len` bytes from here.
    pub fn write(&self, at: usize, len: u32, usr: &[u8], cookie: u64) -> Request {
        Request { via: Via::Io, usr: usr.into(), kind: Kind::Write(vec![self.segment(at, len)]), cookie }
    }

    /// A read of `len` bytes to here.
    pub fn read(&self, at: usize, len: u32, usr: &[u8], cookie: u64) -> Request {
        Request { via: Via::Io, usr: usr.into(), kind: Kind::Read(Some(self.segment(at, len))), cookie }
    }
}

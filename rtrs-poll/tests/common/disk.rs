//! The server's upper layer of these tests: a byte array, and some ways to behave badly.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use reactor::{Polled, Turn};
use rtrs_poll::{Incoming, Io, ReqId, Upper};
use rtrs_proto::Errno;
use rtrs_proto::request::Direction;

/// Bytes of the store.
pub const SIZE: usize = 4 << 20;

/// What all reactors share.
#[derive(Clone)]
pub struct Store(Arc<Mutex<Vec<u8>>>);

impl Store {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(vec![0; SIZE])))
    }
}

/// A user message: what to do (a letter), an errno, the place in the store.
pub fn usr(what: u8, errno: u8, at: u64) -> [u8; 16] {
    let mut usr = [0; 16];
    (usr[0], usr[1]) = (what, errno);
    usr[8..].copy_from_slice(&at.to_le_bytes());
    usr
}

pub struct Disk {
    store: Store,
    /// Requests that are answered by [`Disk::release`].
    pub held: Vec<ReqId>,
}

impl Disk {
    pub fn new(store: Store) -> Self {
        Self { store, held: Vec::new() }
    }

    pub fn release(&mut self, io: &mut Io) {
        self.held.drain(..).for_each(|req| io.reply(req, Ok(())));
    }

    fn execute(&self, incoming: &Incoming<'_>) -> Result<(), Errno> {
        if incoming.usr.len() < 16 {
            return Err(Errno::EINVAL);
        }
        let at = u64::from_le_bytes(incoming.usr[8..16].try_into().expect("8 bytes")) as usize;
        let Some(data) = incoming.data else { return Ok(()) };
        let mut store = self.store.0.lock().expect("no panics");
        let len = data.len as usize;
        let Some(room) = at.checked_add(len).and_then(|end| store.get_mut(at..end)) else {
            return Err(Errno::ENOSPC);
        };
        // SAFETY: the segment is valid and unshared until the reply; the store is other memory.
        unsafe {
            match incoming.direction {
                Direction::Write => std::ptr::copy_nonoverlapping(data.as_ptr(), room.as_mut_ptr(), len),
                Direction::Read { .. } => std::ptr::copy_nonoverlapping(room.as_ptr(), data.as_ptr(), len),
            }
        }
        Ok(())
    }
}

impl Upper for Disk {
    fn request(&mut self, _: &mut Turn<'_>, io: &mut Io, incoming: Incoming<'_>) {
        match incoming.usr.first() {
            Some(b'H') => self.held.push(incoming.req),
            Some(b'E') => {
                let errno = Errno::from_raw(incoming.usr[1].into()).unwrap_or(Errno::EIO);
                io.reply(incoming.req, Err(errno));
            }
            _ => {
                let result = self.execute(&incoming);
                io.reply(incoming.req, result);
            }
        }
    }

    fn poll(&mut self, _: &mut Turn<'_>, _: &mut Io) -> bool {
        false
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        Polled::Idle
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}

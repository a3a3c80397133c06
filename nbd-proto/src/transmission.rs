//! The transmission phase as a server's machine: it says whose the next bytes are.
//!
//! ```text
//!            header ok, no payload ─▶ Event::Request
//!  ┌────────┐ header refused, no payload ─▶ Event::Refused      ┌──────┐
//!  │ Header │◀────────────────────────────────────────────      │ Done │
//!  │        │──── WRITE ─▶ Payload{left} ── all there ─▶ Event::Request
//!  │        │──── refused WRITE ─▶ Discard{left} ── all there ─▶ Event::Refused
//!  └────────┘──── DISC ─▶ Event::Disconnect ─────────────────▶  └──────┘
//! ```
//!
//! The order of calls: ask [`Transmission::want`]; give a whole header to [`Transmission::header`], or say with
//! [`Transmission::payload`] how many bytes of the payload were read. What is answered when, and in which order, is the
//! server's own business.

use crate::request::{Export, Refusal, Request};
use crate::wire::{REQUEST_LEN, REQUEST_MAGIC, RequestHeader, cmd};
use zerocopy::FromBytes;

/// The client broke the protocol in a way after which nobody can say where the next request begins: close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not a request.
    #[error("a request begins with {0:#010x} instead of {REQUEST_MAGIC:#010x}")]
    Magic(u32),
    /// The payload would have to be read only to be thrown away.
    #[error("a WRITE of {len} bytes, at most {max} are taken")]
    PayloadTooLong {
        /// As announced.
        len: u32,
        /// As agreed.
        max: u32,
    },
}

/// Whose bytes come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// [`REQUEST_LEN`] bytes of a header.
    Header,
    /// The rest of the payload of [`Transmission::writing`], `left` bytes.
    Payload {
        /// Bytes.
        left: u32,
    },
    /// The rest of a payload that nobody wants, `left` bytes.
    Discard {
        /// Bytes.
        left: u32,
    },
    /// Nobody's: the client has said good-bye.
    Nothing,
}

/// What the bytes meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A `WRITE` whose payload comes next: its buffer is needed now.
    Writing(Request),
    /// A request, complete with its payload.
    Request(Request),
    /// Answer with the error.
    Refused(Refusal),
    /// Answer what is in flight, then close.
    Disconnect,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Payload { request: Request, left: u32 },
    Discard { refusal: Refusal, left: u32 },
    Done,
}

/// One connection's requests.
#[derive(Clone, Debug)]
pub struct Transmission {
    export: Export,
    state: State,
}

impl Transmission {
    /// A connection whose next byte is the first of a request for `export`.
    pub fn new(export: Export) -> Self {
        Self { export, state: State::Header }
    }

    /// What requests are checked against.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// The export's size changed, bytes; later requests are checked against it.
    pub fn resize(&mut self, size: u64) {
        self.export.size = size;
    }

    /// Whose bytes come next.
    pub fn want(&self) -> Want {
        match self.state {
            State::Header => Want::Header,
            State::Payload { left, .. } => Want::Payload { left },
            State::Discard { left, .. } => Want::Discard { left },
            State::Done => Want::Nothing,
        }
    }

    /// The request whose payload is wanted.
    pub fn writing(&self) -> Option<&Request> {
        match &self.state {
            State::Payload { request, .. } => Some(request),
            _ => None,
        }
    }

    /// Takes the header that [`Want::Header`] asked for. `None`: a payload comes first.
    ///
    /// # Errors
    /// [`Violation`]: close the connection, answer nothing more.
    ///
    /// # Panics
    /// If no header is wanted.
    pub fn header(&mut self, bytes: &[u8; REQUEST_LEN]) -> Result<Option<Event>, Violation> {
        assert!(matches!(self.state, State::Header), "no header is wanted in {:?}", self.state);
        let header = RequestHeader::ref_from_bytes(bytes).expect("as long as a header, and unaligned");
        if header.magic.get() != REQUEST_MAGIC {
            return Err(Violation::Magic(header.magic.get()));
        }
        let (command, len) = (header.command.get(), header.length.get());
        if command == cmd::DISC {
            self.state = State::Done;
            return Ok(Some(Event::Disconnect));
        }
        if command == cmd::WRITE && len > self.export.max_payload {
            return Err(Violation::PayloadTooLong { len, max: self.export.max_payload });
        }
        match Request::check(header, &self.export) {
            Ok(request) if request.payload_len() > 0 => {
                self.state = State::Payload { request, left: len };
                Ok(Some(Event::Writing(request)))
            }
            Ok(request) => Ok(Some(Event::Request(request))),
            Err(refusal) if command == cmd::WRITE && len > 0 => {
                self.state = State::Discard { refusal, left: len };
                Ok(None)
            }
            Err(refusal) => Ok(Some(Event::Refused(refusal))),
        }
    }

    /// `len` more bytes of the payload that [`Want::Payload`] or [`Want::Discard`] asked for were read. The event, if
    /// they were the last.
    ///
    /// # Panics
    /// If fewer bytes are wanted.
    pub fn payload(&mut self, len: u32) -> Option<Event> {
        let (left, event) = match &mut self.state {
            State::Payload { request, left } => (left, Event::Request(*request)),
            State::Discard { refusal, left } => (left, Event::Refused(*refusal)),
            State::Header | State::Done => panic!("no payload is wanted in {:?}", self.state),
        };
        *left = left.checked_sub(len).expect("at most as many bytes as are wanted");
        if *left > 0 {
            return None;
        }
        self.state = State::Header;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Command;
    use crate::wire::{ErrorCode, TransmissionFlags};
    use zerocopy::IntoBytes;

    fn machine() -> Transmission {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
        Transmission::new(Export { size: 1 << 20, block_size: 512, max_payload: 65536, flags })
    }

    fn header(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_LEN] {
        let header = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: 0.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        };
        header.as_bytes().try_into().unwrap()
    }

    #[test]
    fn a_read_is_complete_at_once() {
        let mut m = machine();
        let Some(Event::Request(r)) = m.header(&header(cmd::READ, 5, 512, 512)).unwrap() else { panic!() };
        assert_eq!((r.cookie(), r.command(), r.offset(), r.len()), (5, Command::Read, 512, 512));
        assert_eq!(m.want(), Want::Header);
    }

    #[test]
    fn a_write_is_complete_after_its_payload() {
        let mut m = machine();
        let event = m.header(&header(cmd::WRITE, 6, 0, 1024)).unwrap();
        assert!(matches!(event, Some(Event::Writing(_))));
        assert_eq!(m.want(), Want::Payload { left: 1024 });
        assert_eq!(m.payload(1000), None);
        assert_eq!((m.want(), m.writing().unwrap().cookie()), (Want::Payload { left: 24 }, 6));
        let Some(Event::Request(r)) = m.payload(24) else { panic!() };
        assert_eq!((r.cookie(), r.payload_len(), m.want()), (6, 1024, Want::Header));
    }

    #[test]
    fn the_payload_of_a_refused_write_is_consumed() {
        let mut m = machine();
        assert_eq!(m.header(&header(cmd::WRITE, 8, 1 << 20, 512)), Ok(None));
        assert_eq!(m.want(), Want::Discard { left: 512 });
        assert!(m.writing().is_none());
        let Some(Event::Refused(refusal)) = m.payload(512) else { panic!() };
        assert_eq!((refusal.cookie, refusal.error, m.want()), (8, ErrorCode::Enospc, Want::Header));
    }

    #[test]
    fn an_empty_write_is_refused_at_once() {
        let mut m = machine();
        assert!(matches!(m.header(&header(cmd::WRITE, 8, 0, 0)), Ok(Some(Event::Refused(_)))));
        assert_eq!(m.want(), Want::Header);
    }

    #[test]
    fn nothing_follows_disc() {
        let mut m = machine();
        assert_eq!(m.header(&header(cmd::DISC, 0, 0, 0)), Ok(Some(Event::Disconnect)));
        assert_eq!(m.want(), Want::Nothing);
    }

    #[test]
    fn what_cannot_be_trusted_closes() {
        assert_eq!(machine().header(&[0; REQUEST_LEN]), Err(Violation::Magic(0)));
        let too_long = machine().header(&header(cmd::WRITE, 1, 0, 65537));
        assert_eq!(too_long, Err(Violation::PayloadTooLong { len: 65537, max: 65536 }));
    }

    #[test]
    fn a_resize_moves_the_end() {
        let mut m = machine();
        m.resize(1024);
        assert!(matches!(m.header(&header(cmd::READ, 1, 1024, 512)), Ok(Some(Event::Refused(_)))));
        m.resize(2048);
        assert!(matches!(m.header(&header(cmd::READ, 1, 1024, 512)), Ok(Some(Event::Request(_)))));
    }
}

//! The transmission phase as a server's machine: it says whose the next bytes are.
//!
//! ```text
//!            header ok, no payload ─▶ Event::Request
//!  ┌────────┐ header refused, no payload ─▶ Event::Refused      ┌──────┐
//!  │ Header │◀────────────────────────────────────────────      │ Done │
//!  │        │──── WRITE ─▶ Payload{left} ── all there ─▶ Event::Request
//!  │        │──── BLOCK_STATUS with contexts ─▶ Parameters{left} ── all there ─▶ Event::Request or Refused
//!  │        │──── refused, with payload ─▶ Discard{left} ── all there ─▶ Event::Refused
//!  └────────┘──── DISC ─▶ Event::Disconnect ─────────────────▶  └──────┘
//! ```
//!
//! The order of calls: ask [`Transmission::want`]; give a whole header to [`Transmission::header`], parameters to
//! [`Transmission::parameters`], or say with [`Transmission::payload`] how many bytes of the payload were read. What is
//! answered when, and in which order, is the server's own business.

use crate::framing::{Agreed, Head};
use crate::request::{Export, MAX_STATUS_PAYLOAD, Refusal, Request, names_contexts};
use crate::wire::cmd;

/// The client broke the protocol in a way after which nobody can say where the next request begins: close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not a request.
    #[error("a request begins with {found:#010x} instead of {right:#010x}")]
    Magic {
        /// As it came.
        found: u32,
        /// As agreed.
        right: u32,
    },
    /// The payload would have to be read only to be thrown away.
    #[error("a request with {len} bytes of data, at most {max} are taken")]
    PayloadTooLong {
        /// As announced.
        len: u64,
        /// As agreed.
        max: u32,
    },
}

/// Whose bytes come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// [`Transmission::header_len`] bytes of a header.
    Header,
    /// The rest of the payload of [`Transmission::writing`], `left` bytes.
    Payload {
        /// Bytes.
        left: u32,
    },
    /// The rest of a payload that is looked at here, `left` bytes: [`Transmission::parameters`].
    Parameters {
        /// Bytes, at most [`MAX_STATUS_PAYLOAD`].
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
    Parameters { head: Head, left: u32 },
    Discard { refusal: Refusal, left: u32 },
    Done,
}

/// One connection's requests.
#[derive(Clone, Debug)]
pub struct Transmission {
    export: Export,
    agreed: Agreed,
    state: State,
    /// Of the present request, what came of them.
    parameters: [u8; MAX_STATUS_PAYLOAD],
}

impl Transmission {
    /// A connection whose next byte is the first of a request for `export`, in the simple framing.
    pub fn new(export: Export) -> Self {
        Self::with(export, Agreed::default())
    }

    /// A connection whose next byte is the first of a request for `export`.
    pub fn with(export: Export, agreed: Agreed) -> Self {
        Self { export, agreed, state: State::Header, parameters: [0; MAX_STATUS_PAYLOAD] }
    }

    /// What requests are checked against.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// What was agreed upon besides it.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// Bytes of a header.
    pub fn header_len(&self) -> usize {
        self.agreed.framing.request_len()
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
            State::Parameters { left, .. } => Want::Parameters { left },
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

    /// Takes the header that [`Want::Header`] asked for, [`Transmission::header_len`] bytes. `None`: a payload comes
    /// first.
    ///
    /// # Errors
    /// [`Violation`]: close the connection, answer nothing more.
    ///
    /// # Panics
    /// If no header is wanted, or `bytes` are not as long as one.
    pub fn header(&mut self, bytes: &[u8]) -> Result<Option<Event>, Violation> {
        assert!(matches!(self.state, State::Header), "no header is wanted in {:?}", self.state);
        let framing = self.agreed.framing;
        let head = framing.head(bytes).expect("as long as a header");
        if head.magic != framing.request_magic() {
            return Err(Violation::Magic { found: head.magic, right: framing.request_magic() });
        }
        // The framing of 1997 has no such thing.
        if head.command == cmd::DISC && !framing.is_original() {
            self.state = State::Done;
            return Ok(Some(Event::Disconnect));
        }
        let len = framing.payload_len(&head);
        if len > self.export.max_payload.into() {
            return Err(Violation::PayloadTooLong { len, max: self.export.max_payload });
        }
        Ok(self.request(head, len as u32))
    }

    /// A request with `payload` bytes behind its header.
    fn request(&mut self, head: Head, payload: u32) -> Option<Event> {
        if names_contexts(&head, &self.export, &self.agreed) {
            self.state = State::Parameters { head, left: payload };
            return None;
        }
        match Request::check(&head, &self.export, &self.agreed) {
            Ok(request) if request.payload_len() > 0 => {
                self.state = State::Payload { request, left: payload };
                Some(Event::Writing(request))
            }
            Ok(request) => Some(Event::Request(request)),
            Err(refusal) if payload > 0 => {
                self.state = State::Discard { refusal, left: payload };
                None
            }
            Err(refusal) => Some(Event::Refused(refusal)),
        }
    }

    /// Takes some of the bytes that [`Want::Parameters`] asked for. The event, if they were the last.
    ///
    /// # Panics
    /// If fewer bytes are wanted.
    pub fn parameters(&mut self, bytes: &[u8]) -> Option<Event> {
        let State::Parameters { head, left } = &mut self.state else {
            panic!("no parameters are wanted in {:?}", self.state)
        };
        let (head, total) = (*head, head.length as usize);
        let at = total - *left as usize;
        self.parameters[at..at + bytes.len()].copy_from_slice(bytes);
        *left = left.checked_sub(bytes.len() as u32).expect("at most as many bytes as are wanted");
        if *left > 0 {
            return None;
        }
        self.state = State::Header;
        let payload = &self.parameters[..total];
        Some(match Request::check_status(&head, payload, &self.export, &self.agreed) {
            Ok(request) => Event::Request(request),
            Err(refusal) => Event::Refused(refusal),
        })
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
            State::Header | State::Parameters { .. } | State::Done => {
                panic!("no payload is wanted in {:?}", self.state)
            }
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
    use crate::framing::{ALLOCATION_CONTEXT, Framing};
    use crate::request::Command;
    use crate::wire::{
        ErrorCode, ExtendedRequest, ORIGINAL_REPLY_MAGIC, REQUEST_LEN, REQUEST_MAGIC, RequestHeader,
        TransmissionFlags, cmd_flag,
    };
    use zerocopy::IntoBytes;

    fn machine() -> Transmission {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
        Transmission::new(Export {
            size: 1 << 20,
            block_size: 512,
            any_range: false,
            max_payload: 65536,
            flags,
        })
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
        assert_eq!(
            machine().header(&[0; REQUEST_LEN]),
            Err(Violation::Magic { found: 0, right: REQUEST_MAGIC })
        );
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

    fn extended(command: u16, flags: u16, offset: u64, length: u64) -> Vec<u8> {
        let header = ExtendedRequest {
            magic: crate::wire::EXTENDED_REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: 5.into(),
            offset: offset.into(),
            length: length.into(),
        };
        header.as_bytes().to_vec()
    }

    fn extended_machine() -> Transmission {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::BLOCK_STATUS_PAYLOAD;
        let export = Export { size: 1 << 40, block_size: 512, any_range: false, max_payload: 65536, flags };
        Transmission::with(export, Agreed { framing: Framing::Extended, allocation: true })
    }

    #[test]
    fn block_status_takes_its_contexts_in_any_pieces() {
        let payload = [(1u64 << 35).to_be_bytes().as_slice(), &ALLOCATION_CONTEXT.to_be_bytes()].concat();
        for piece in 1..=12 {
            let mut m = extended_machine();
            let header = extended(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 1024, 12);
            assert_eq!(m.header(&header), Ok(None));
            assert_eq!(m.want(), Want::Parameters { left: 12 });
            let mut event = None;
            for bytes in payload.chunks(piece) {
                assert_eq!(event, None);
                event = m.parameters(bytes);
            }
            let Some(Event::Request(r)) = event else { panic!("{event:?}") };
            assert_eq!((r.offset(), r.len(), m.want()), (1024, 1 << 35, Want::Header));
        }
    }

    /// QEMU's client sends a `WRITE` with extended headers and without `PAYLOAD_LEN`: its data follow all the same.
    #[test]
    fn an_extended_write_has_its_payload_flagged_or_not() {
        for flag in [cmd_flag::PAYLOAD_LEN, 0] {
            let mut m = extended_machine();
            let event = m.header(&extended(cmd::WRITE, flag | cmd_flag::FUA, 0, 1024)).unwrap();
            assert!(event.is_none(), "FUA was not offered: {event:?}");
            assert_eq!(m.want(), Want::Discard { left: 1024 });
            let Some(Event::Refused(refusal)) = m.payload(1024) else { panic!() };
            assert_eq!((refusal.error, m.want()), (ErrorCode::Einval, Want::Header));

            let event = m.header(&extended(cmd::WRITE, flag, 0, 1024)).unwrap();
            assert!(matches!(event, Some(Event::Writing(_))), "{event:?}");
            assert_eq!(m.want(), Want::Payload { left: 1024 });
            let Some(Event::Request(r)) = m.payload(1024) else { panic!() };
            assert_eq!((r.payload_len(), m.want()), (1024, Want::Header));
        }
        let mut m = extended_machine();
        let too_long = m.header(&extended(cmd::WRITE, 0, 0, 1 << 40));
        assert_eq!(too_long, Err(Violation::PayloadTooLong { len: 1 << 40, max: 65536 }));
    }

    #[test]
    fn unwanted_payloads_are_passed_over() {
        for (command, len) in [(cmd::READ, 512), (cmd::TRIM, 1), (cmd::BLOCK_STATUS, 65536), (99, 7)] {
            let mut m = extended_machine();
            assert_eq!(m.header(&extended(command, cmd_flag::PAYLOAD_LEN, 0, len)), Ok(None));
            assert_eq!(m.want(), Want::Discard { left: len as u32 });
            let Some(Event::Refused(refusal)) = m.payload(len as u32) else { panic!() };
            assert_eq!((refusal.cookie, refusal.error, m.want()), (5, ErrorCode::Einval, Want::Header));
        }
        let mut m = extended_machine();
        // "a (nonzero) payload length": nothing follows.
        let empty = m.header(&extended(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 0, 0)).unwrap();
        assert!(matches!(empty, Some(Event::Refused(_))));
        let too_long = m.header(&extended(99, cmd_flag::PAYLOAD_LEN, 0, 1 << 40));
        assert_eq!(too_long, Err(Violation::PayloadTooLong { len: 1 << 40, max: 65536 }));
    }

    /// Byte by byte as the seed of 1997 has it.
    #[test]
    fn the_framing_of_1997() {
        let export = Export {
            size: 1 << 32,
            block_size: 512,
            any_range: false,
            max_payload: 65536,
            flags: TransmissionFlags(0),
        };
        let framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };
        let mut m = Transmission::with(export, Agreed { framing, allocation: false });
        assert_eq!(m.header_len(), 24);
        let mut request = |bytes: &[u8; 24]| m.header(bytes).map(|e| (e, m.want()));
        // The first and the last block of 4 GiB.
        let first = b"\x12\x56\x09\x53\0\0\0\0\0\0\x04\0handle01\0\0\0\0";
        let Ok((Some(Event::Request(r)), Want::Header)) = request(first) else { panic!() };
        assert_eq!((r.command(), r.offset(), r.len()), (Command::Read, 0, 1024));
        assert_eq!(r.cookie(), u64::from_be_bytes(*b"handle01"));
        let last = b"\x12\x56\x09\x53\xff\xff\xfc\0\0\0\x04\0handle02\0\0\0\x01";
        let Ok((Some(Event::Writing(r)), Want::Payload { left: 1024 })) = request(last) else { panic!() };
        assert_eq!((r.offset(), r.offset() + r.len()), (0xffff_fc00, 1 << 32));
        assert!(matches!(m.payload(1024), Some(Event::Request(_))));
        // One block further there is nothing, and the sum does not wrap.
        let mut request = |bytes: &[u8; 24]| m.header(bytes).unwrap();
        let past = b"\x12\x56\x09\x53\xff\xff\xfe\0\0\0\x04\0handle03\0\0\0\0";
        assert!(matches!(request(past), Some(Event::Refused(r)) if r.error == ErrorCode::Einval));
        // What came later is unknown, and leaves the connection as it is.
        for kind in [2, 3, 4, 0x1_0001u32] {
            let mut bytes = *first;
            bytes[20..].copy_from_slice(&kind.to_be_bytes());
            assert!(matches!(request(&bytes), Some(Event::Refused(r)) if r.error == ErrorCode::Einval));
        }
        let mut modern = *first;
        modern[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        assert!(matches!(m.header(&modern), Err(Violation::Magic { found: REQUEST_MAGIC, .. })));
    }
}

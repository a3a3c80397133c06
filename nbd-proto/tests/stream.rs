//! Streams of requests, cut anywhere: what comes out depends on the bytes only, and every request once.

use nbd_proto::request::{Command, Export, Request};
use nbd_proto::transmission::{Event, Transmission, Violation, Want};
use nbd_proto::wire::{REQUEST_LEN, REQUEST_MAGIC, RequestHeader, SimpleReply, TransmissionFlags, cmd};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

const EXPORT: Export = Export {
    size: 1 << 16,
    block_size: 512,
    any_range: false,
    max_payload: 4096,
    flags: TransmissionFlags(0b1101_0111_1101),
};

/// Feeds `bytes` in pieces of the given sizes, again and again, as a transport does.
fn feed(bytes: &[u8], pieces: &[usize]) -> (Vec<Event>, Result<(), Violation>) {
    let mut machine = Transmission::new(EXPORT);
    let (mut events, mut staged) = (Vec::new(), Vec::new());
    let mut rest = bytes;
    for size in pieces.iter().cycle() {
        let (piece, later) = rest.split_at((*size).min(rest.len()));
        staged.extend_from_slice(piece);
        rest = later;
        loop {
            match machine.want() {
                Want::Header => {
                    let Some(header) = staged.get(..REQUEST_LEN) else { break };
                    match machine.header(header) {
                        Ok(event) => events.extend(event),
                        Err(violation) => return (events, Err(violation)),
                    }
                    staged.drain(..REQUEST_LEN);
                }
                Want::Payload { left } | Want::Discard { left } => {
                    let n = staged.len().min(left as usize);
                    if n == 0 {
                        break;
                    }
                    staged.drain(..n);
                    events.extend(machine.payload(n as u32));
                }
                Want::Parameters { .. } => panic!("not in this framing"),
                Want::Nothing => return (events, Ok(())),
            }
        }
        if rest.is_empty() {
            break;
        }
    }
    (events, Ok(()))
}

/// A header that is right more often than not.
fn header() -> impl Strategy<Value = RequestHeader> {
    let magic = prop_oneof![200 => Just(REQUEST_MAGIC), 1 => any::<u32>()];
    let command = prop_oneof![6 => 0u16..8, 1 => any::<u16>()];
    let flags = prop_oneof![6 => 0u16..4, 1 => any::<u16>()];
    let offset = prop_oneof![8 => (0u64..140).prop_map(|n| n * 512), 1 => any::<u64>()];
    let length = prop_oneof![8 => (0u32..9).prop_map(|n| n * 512), 2 => 0u32..5000, 1 => any::<u32>()];
    (magic, flags, command, any::<u64>(), offset, length).prop_map(
        |(magic, flags, command, cookie, offset, length)| RequestHeader {
            magic: magic.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        },
    )
}

/// Headers, each `WRITE` followed by as many bytes as it may have.
fn stream(headers: &[RequestHeader]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for h in headers {
        bytes.extend_from_slice(h.as_bytes());
        if h.command.get() == cmd::WRITE {
            bytes.resize(bytes.len() + h.length.get().min(EXPORT.max_payload) as usize, 0xdd);
        }
    }
    bytes
}

fn fits(r: &Request) {
    let (offset, len) = (r.offset(), r.len());
    assert!(offset.is_multiple_of(512) && len.is_multiple_of(512) && offset + len <= EXPORT.size);
    assert_eq!(len == 0, r.command() == Command::Flush);
    assert!(r.payload_len() <= EXPORT.max_payload);
    assert!(r.command() != Command::Read || r.data_len() <= EXPORT.max_payload);
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        headers in prop::collection::vec(header(), 0..20),
        pieces in prop::collection::vec(1usize..100, 1..8),
    ) {
        let bytes = stream(&headers);
        prop_assert_eq!(feed(&bytes, &pieces), feed(&bytes, &[usize::MAX]));
    }

    #[test]
    fn every_request_is_answered_once_and_in_order(headers in prop::collection::vec(header(), 0..20)) {
        let (events, end) = feed(&stream(&headers), &[usize::MAX]);
        let mut answered = Vec::new();
        for event in &events {
            match event {
                Event::Request(r) => { fits(r); answered.push(r.cookie()); }
                Event::Refused(r) => answered.push(r.cookie),
                Event::Writing(r) => fits(r),
                Event::Disconnect => {}
            }
        }
        let stop = headers.iter().position(|h| {
            h.magic.get() != REQUEST_MAGIC
                || h.command.get() == cmd::DISC
                || (h.command.get() == cmd::WRITE && h.length.get() > EXPORT.max_payload)
        });
        let sent: Vec<u64> = headers[..stop.unwrap_or(headers.len())].iter().map(|h| h.cookie.get()).collect();
        prop_assert_eq!(answered, sent);
        let polite = stop.is_none_or(|i| headers[i].magic.get() == REQUEST_MAGIC && headers[i].command.get() == cmd::DISC);
        prop_assert_eq!(end.is_ok(), polite);
    }

    #[test]
    fn headers_survive_the_wire(h in header()) {
        prop_assert_eq!(RequestHeader::read_from_bytes(h.as_bytes()).unwrap(), h);
        prop_assert!(!h.to_string().contains('\n'));
    }

    #[test]
    fn replies_survive_the_wire(bytes in any::<[u8; 16]>()) {
        let reply = SimpleReply::read_from_bytes(&bytes).unwrap();
        prop_assert_eq!(reply.as_bytes(), bytes);
    }
}

//! A stream of NBD requests as a server takes it: the first bytes make the export, the framing and the sizes of the pieces
//! that arrive, the rest is what the client sent.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::framing::{Agreed, Framing};
use nbd_proto::request::{Command, Export, Request};
use nbd_proto::transmission::{Event, Transmission, Want};
use nbd_proto::wire::{ORIGINAL_REPLY_MAGIC, TransmissionFlags};

fuzz_target!(|input: &[u8]| {
    let Some(([f0, f1, shift, blocks, pieces @ ..], mut rest)) = input.split_first_chunk::<8>() else {
        return;
    };
    let block_size = 512u32 << (shift & 7);
    let export = Export {
        size: u64::from(*blocks) << (shift & 31) << 9,
        block_size,
        any_range: f1 & 128 != 0,
        max_payload: 4096,
        flags: TransmissionFlags(u16::from_be_bytes([*f0, *f1])),
    };
    let original = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };
    let framing =
        [Framing::Simple, Framing::Structured, Framing::Extended, original][usize::from(shift >> 6)];
    let allocation = framing.has_chunks() && shift & 32 != 0;
    let mut machine = Transmission::with(export, Agreed { framing, allocation });
    let (mut staged, mut pieces) = (Vec::new(), pieces.iter().cycle());
    while !rest.is_empty() {
        let size = (usize::from(*pieces.next().expect("endless")) + 1).min(rest.len());
        staged.extend_from_slice(&rest[..size]);
        rest = &rest[size..];
        if !take(&mut machine, &mut staged) {
            return;
        }
    }
});

/// False at the end of the connection.
fn take(machine: &mut Transmission, staged: &mut Vec<u8>) -> bool {
    loop {
        let event = match machine.want() {
            Want::Header => {
                let len = machine.header_len();
                let Some(header) = staged.get(..len) else { return true };
                let Ok(event) = machine.header(header) else { return false };
                staged.drain(..len);
                event
            }
            Want::Parameters { left } => {
                assert!(left > 0 && machine.agreed().framing == Framing::Extended);
                let n = staged.len().min(left as usize);
                if n == 0 {
                    return true;
                }
                let event = machine.parameters(&staged[..n]);
                staged.drain(..n);
                event
            }
            Want::Payload { left } | Want::Discard { left } => {
                assert!(left > 0 && left <= machine.export().max_payload);
                let n = staged.len().min(left as usize);
                if n == 0 {
                    return true;
                }
                staged.drain(..n);
                machine.payload(n as u32)
            }
            Want::Nothing => return false,
        };
        match event {
            Some(Event::Request(r)) => check(&r, machine.export()),
            Some(Event::Writing(r)) => {
                check(&r, machine.export());
                assert_eq!(machine.want(), Want::Payload { left: r.payload_len() });
            }
            Some(Event::Refused(r)) => assert!(!r.to_string().contains('\n')),
            Some(Event::Disconnect) => assert_eq!(machine.want(), Want::Nothing),
            None => {}
        }
    }
}

fn check(r: &Request, export: &Export) {
    let (block, len) = (u64::from(export.block_size), r.len());
    let whole = r.offset().is_multiple_of(block) && len.is_multiple_of(block);
    assert!((whole || export.any_range) && r.offset() + len <= export.size);
    let cover = r.cover(export.block_size);
    assert!(cover.offset.is_multiple_of(block) && cover.len.is_multiple_of(block));
    assert!(cover.offset + u64::from(cover.before) == r.offset() && u64::from(cover.before) < block);
    assert!(u64::from(cover.before) + len <= cover.len && cover.len < len + 2 * block);
    assert!(!export.size.is_multiple_of(block) || cover.offset + cover.len <= export.size);
    assert_eq!(len == 0, r.command() == Command::Flush);
    assert!(!r.command().modifies() || !export.flags.has(TransmissionFlags::READ_ONLY));
    assert!(
        !matches!(r.command(), Command::Read | Command::Write { .. }) || r.len() <= export.max_payload.into()
    );
}

//! A server as an NBD client hears it. The first byte chooses the handshake or a dialect of replies, the second how the
//! rest, the server's bytes, is cut into pieces. Nothing is written outside of a request's memory, nothing ends twice,
//! and every end has a reason.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::client::{
    Ask, Command, Event, Framing, Haggle, MAX_HEAD, MAX_REPLY_DATA, Next, Replies, Tls, Uri, Want, Wishes,
};

const LEN: u32 = 1024;

fuzz_target!(|input: &[u8]| {
    let [kind, piece, rest @ ..] = input else { return };
    let piece = usize::from(*piece) + 1;
    match kind % 8 {
        0 => haggle(wishes(*kind), rest, piece),
        1 => {
            if let Ok(text) = std::str::from_utf8(rest) {
                // Whatever it is, it has an answer in one line.
                let answer = Uri::parse(text).map_or_else(|e| e.to_string(), |uri| uri.server.to_string());
                assert!(!answer.is_empty());
            }
        }
        2 => replies(Framing::Original { reply_magic: 0x9674_4668 }, rest, piece),
        3 | 4 => replies(Framing::Simple, rest, piece),
        5 => replies(Framing::Structured, rest, piece),
        _ => replies(Framing::Extended, rest, piece),
    }
});

fn wishes(bits: u8) -> Wishes {
    Wishes {
        tls: if bits & 8 != 0 { Tls::Require } else { Tls::Allow },
        extended: bits & 16 != 0,
        options: bits & 32 == 0,
        contexts: if bits & 64 != 0 { vec!["base:allocation".into()] } else { Vec::new() },
        ..Wishes::new(if bits & 128 != 0 { "disk" } else { "" })
    }
}

fn haggle(wishes: Wishes, bytes: &[u8], piece: usize) {
    let mut machine = Haggle::new(wishes);
    let (mut bytes, mut input) = (bytes, Vec::new());
    loop {
        match machine.next() {
            Next::Write => {
                let n = machine.transmit().len().min(piece);
                assert!(n > 0 && machine.transmit().len() < 16 << 10);
                machine.transmitted(n);
            }
            Next::StartTls => {
                assert!(input.is_empty(), "nothing in the clear is left");
                machine.tls_started();
            }
            Next::Transmission(agreed) => {
                assert!(agreed.size <= i64::MAX as u64 && input.is_empty());
                return;
            }
            Next::Read => {
                let missing = machine.missing(&input);
                assert!(missing > 0 && missing + input.len() <= 20 + MAX_REPLY_DATA as usize);
                let n = missing.min(bytes.len()).min(piece);
                if n == 0 {
                    return;
                }
                input.extend_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                match machine.handle_input(&input) {
                    Ok(used) => drop(input.drain(..used)),
                    Err(e) => return assert!(!e.to_string().contains('\n')),
                }
            }
        }
    }
}

fn replies(framing: Framing, bytes: &[u8], piece: usize) {
    let mut machine = Replies::new(framing);
    for (token, command) in
        [Command::Read, Command::Write { fua: false }, Command::Read, Command::Flush].into_iter().enumerate()
    {
        let (offset, len) = if command == Command::Flush { (0, 0) } else { (4096, LEN) };
        let _ = machine.enter(&Ask { command, offset, len, token: token as u64 });
    }
    let mut open = machine.in_flight();
    let mut memory = [[0u8; LEN as usize]; 4];
    let mut staged = Vec::new();
    for part in bytes.chunks(piece) {
        staged.extend_from_slice(part);
        loop {
            let event = match machine.want() {
                Want::Head => match machine.head(&staged) {
                    Ok(Some((n, event))) => {
                        staged.drain(..n);
                        Ok(event)
                    }
                    Ok(None) => {
                        assert!(staged.len() < MAX_HEAD);
                        break;
                    }
                    Err(e) => Err(e),
                },
                _ if staged.is_empty() => break,
                Want::Data { id, at, left } => {
                    let n = staged.len().min(left as usize);
                    // Panics outside.
                    memory[id.0 as usize][at as usize..at as usize + n].copy_from_slice(&staged[..n]);
                    staged.drain(..n);
                    machine.data(n as u32)
                }
                Want::Skip { left } => {
                    let n = staged.len().min(left as usize);
                    staged.drain(..n);
                    machine.skipped(n as u32)
                }
            };
            match event {
                Err(e) => {
                    assert!(!e.to_string().contains('\n'));
                    let mut lost = 0;
                    machine.drain(|_| lost += 1);
                    assert!(lost <= open && machine.in_flight() == 0);
                    return;
                }
                Ok(Some(Event::Done { result, .. })) => {
                    assert_ne!(result, Err(0));
                    open -= 1;
                }
                Ok(Some(Event::Zero { id, at, len, done })) => {
                    memory[id.0 as usize][at as usize..(at + len) as usize].fill(0);
                    open -= usize::from(done.is_some());
                }
                Ok(None) => {}
            }
            assert_eq!(machine.in_flight(), open);
        }
    }
}

//! A client of the NBD handshake. The first two bytes choose settings and how the rest, the client's bytes, is cut into
//! pieces; whole or in pieces, the server says the same and ends the same way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::framing::Framing;
use nbd_proto::haggle::wire::{IHAVEOPT, OPTION_REPLY_MAGIC, ReplyHeader, opt, rep};
use nbd_proto::haggle::{
    BlockSizes, Catalog, Chosen, Error, Export, MAX_INPUT, MAX_OUTPUT, Outcome, Refusal, ServerHaggle,
    Settings, Style, Tls,
};
use nbd_proto::wire::TransmissionFlags;
use zerocopy::FromBytes;

/// Exports 0 to 9 and a default one; the fifth has large blocks, the sixth may not be had.
struct Digits;

const NAMES: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

impl Digits {
    fn export(i: usize) -> Export<'static> {
        let minimum = if i == 4 { 4096 } else { 512 };
        Export {
            id: i as u64,
            name: NAMES[i],
            description: if i == 2 { "two" } else { "" },
            size: 1 << 30,
            flags: TransmissionFlags::HAS_FLAGS,
            sizes: BlockSizes { minimum, preferred: 4096, max_payload: 1 << 25 },
        }
    }
}

impl Catalog for Digits {
    fn next(&self, after: Option<&str>) -> Option<Export<'_>> {
        (0..NAMES.len()).find(|i| after.is_none_or(|a| NAMES[*i] > a)).map(Self::export)
    }

    fn find(&self, name: &str) -> Result<Export<'_>, Refusal> {
        let name = if name.is_empty() { "0" } else { name };
        match NAMES.iter().position(|n| *n == name) {
            Some(5) => Err(Refusal::Policy("not this one".into())),
            Some(i) => Ok(Self::export(i)),
            None => Err(Refusal::Unknown),
        }
    }
}

struct End {
    said: Vec<u8>,
    how: Result<Option<Outcome>, Error>,
    /// Bytes of the client that were not used.
    left: usize,
}

fn talk(settings: Settings, bytes: &[u8], piece: usize) -> End {
    let mut haggle = ServerHaggle::new(settings);
    let (mut have, mut used, mut said) = (0, 0, Vec::new());
    let end = |said, how, used| End { said, how, left: bytes.len() - used };
    loop {
        let n = match haggle.handle_input(&bytes[used..have], &Digits) {
            Ok(n) => n,
            Err(e) => return end(said, Err(e), used),
        };
        used += n;
        assert!(used <= have && haggle.transmit().len() <= MAX_OUTPUT);
        let out = haggle.transmit().len().min(piece);
        said.extend_from_slice(&haggle.transmit()[..out]);
        haggle.transmitted(out);
        if haggle.outcome() == Some(&Outcome::StartTls) {
            haggle.encrypted();
            continue;
        }
        if let Some(outcome) = haggle.outcome() {
            return end(said, Ok(Some(outcome.clone())), used);
        }
        if n == 0 && out == 0 {
            if have == bytes.len() {
                return end(said, Ok(None), used);
            }
            assert!(have - used < MAX_INPUT, "wants more than the transport holds");
            have = (have + piece).min(bytes.len()).min(used + MAX_INPUT);
        }
    }
}

/// Every reply is whole and answers with something that replies have.
fn check_replies(mut said: &[u8], chosen: Option<&Chosen>) {
    match chosen.map_or(opt::GO, |c| c.option) {
        // Oldstyle, and 1997.
        0 => return assert!(said.len() == 152 || said.is_empty()),
        _ if said.is_empty() => return,
        _ => said = &said[18..],
    }
    if chosen.is_some_and(|c| c.option == opt::EXPORT_NAME) {
        let tail = said.len();
        let zeroes = tail >= 134 && said[tail - 124..].iter().all(|b| *b == 0);
        said = &said[..tail - if zeroes { 134 } else { 10 }];
    }
    while !said.is_empty() {
        let (header, rest) = ReplyHeader::ref_from_prefix(said).expect("a whole header");
        assert_eq!(header.magic.get(), OPTION_REPLY_MAGIC);
        let kind = header.kind.get();
        assert!(
            [rep::ACK, rep::SERVER, rep::INFO, rep::META_CONTEXT].contains(&kind) || kind & rep::ERROR != 0
        );
        let (data, rest) = rest.split_at(header.len.get() as usize);
        assert!(kind & rep::ERROR == 0 || std::str::from_utf8(data).is_ok());
        said = rest;
    }
}

fuzz_target!(|input: &[u8]| {
    let Some(([what, how], bytes)) = input.split_first_chunk() else { return };
    let settings = Settings {
        fixed_newstyle: how & 1 == 0,
        no_zeroes: how & 2 == 0,
        list: how & 4 == 0,
        structured: what & 1 == 0,
        extended: what & 2 == 0,
        tls: [Tls::Off, Tls::Allow, Tls::Require, Tls::Off][usize::from(what >> 2 & 3)],
        style: match what >> 4 {
            14 => Style::Oldstyle,
            15 => Style::Original { reply_magic: 7 },
            _ => Style::Newstyle,
        },
    };
    let whole = talk(settings, bytes, usize::MAX >> 1);
    let pieces = talk(settings, bytes, usize::from(how >> 3) + 1);
    assert_eq!(whole.said, pieces.said);
    assert_eq!(whole.how, pieces.how);
    assert_eq!(whole.left, pieces.left);
    if let Err(e) = &whole.how {
        assert!(!e.to_string().contains('\n'));
        return;
    }
    let chosen = match &whole.how {
        Ok(Some(Outcome::Transmission(chosen))) => Some(chosen),
        _ => None,
    };
    if let Some(chosen) = chosen {
        assert!(chosen.export < 10 && chosen.export != 5);
        assert!(chosen.option == 0 || bytes.windows(8).any(|w| w == IHAVEOPT.to_be_bytes()));
        let agreed = chosen.agreed;
        assert!(!agreed.allocation || agreed.framing.has_chunks());
        assert!(agreed.framing != Framing::Extended || settings.extended && chosen.option == opt::GO);
        assert_eq!(chosen.flags.has(TransmissionFlags::SEND_DF), agreed.framing.has_chunks());
    }
    check_replies(&whole.said, chosen);
});

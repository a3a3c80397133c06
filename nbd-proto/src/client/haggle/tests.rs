//! Handshakes with servers of every kind.

use proptest::prelude::*;

use super::*;
use crate::haggle::wire::Greeting;

const SIZES: BlockSizes = BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 20 };
const FLAGS: u16 = 0x16d;

fn greeting(flags: u16) -> Vec<u8> {
    let g = Greeting { magic: NBDMAGIC.into(), style: IHAVEOPT.into(), flags: flags.into() };
    g.as_bytes().to_vec()
}

fn oldstyle(size: u64, flags: u16) -> Vec<u8> {
    let g = OldGreeting {
        magic: NBDMAGIC.into(),
        style: OLDSTYLE_MAGIC.into(),
        size: size.into(),
        global_flags: 0.into(),
        flags: flags.into(),
        zeroes: [0; EXPORT_NAME_ZEROES],
    };
    g.as_bytes().to_vec()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let header = ReplyHeader {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        len: (data.len() as u32).into(),
    };
    [header.as_bytes(), data].concat()
}

fn export(size: u64, flags: u16) -> Vec<u8> {
    InfoExport { kind: info::EXPORT.into(), size: size.into(), flags: flags.into() }.as_bytes().to_vec()
}

fn block_size(s: BlockSizes) -> Vec<u8> {
    let info = InfoBlockSize {
        kind: info::BLOCK_SIZE.into(),
        minimum: s.minimum.into(),
        preferred: s.preferred.into(),
        max_payload: s.max_payload.into(),
    };
    info.as_bytes().to_vec()
}

/// What the client has said: its flags, then options with their data.
#[derive(Debug, Default, PartialEq)]
struct Said {
    flags: Option<u32>,
    options: Vec<(u32, Vec<u8>)>,
}

/// Runs a handshake with a server that says `greeting` and answers each option by `answer`. `Ok`: the agreement; and
/// what the client said. Ends at TLS, too, which `answer` continues.
fn haggle(
    wishes: Wishes,
    greeting: &[u8],
    answer: impl Fn(u32, &[u8]) -> Vec<u8>,
) -> (Result<Agreed, HaggleError>, Said) {
    let mut h = Haggle::new(wishes);
    let (mut said, mut heard, mut input) = (Said::default(), greeting.to_vec(), Vec::new());
    let mut spoken = Vec::new();
    for _ in 0..10_000 {
        match h.next() {
            Next::Write => {
                // Three bytes at a time.
                let n = h.transmit().len().min(3);
                spoken.extend_from_slice(&h.transmit()[..n]);
                h.transmitted(n);
                while let Some(more) = listen(&mut spoken, &mut said, &answer) {
                    heard.extend_from_slice(&more);
                }
            }
            Next::StartTls => {
                assert!(heard.is_empty() && input.is_empty(), "nothing was read ahead");
                h.tls_started();
            }
            Next::Transmission(agreed) => {
                assert!(heard.is_empty() && input.is_empty(), "nothing is left over: {heard:?}");
                return (Ok(agreed), said);
            }
            Next::Read => {
                let missing = h.missing(&input);
                assert!(missing > 0, "nothing to do");
                // Two bytes at a time.
                let n = missing.min(heard.len()).min(2);
                assert!(n > 0, "the server has said everything: {said:?}");
                input.extend(heard.drain(..n));
                match h.handle_input(&input) {
                    Ok(used) => drop(input.drain(..used)),
                    Err(e) => return (Err(e), said),
                }
            }
        }
    }
    panic!("no end: {said:?}")
}

/// The server's ears.
fn listen(spoken: &mut Vec<u8>, said: &mut Said, answer: &impl Fn(u32, &[u8]) -> Vec<u8>) -> Option<Vec<u8>> {
    if said.flags.is_none() {
        let flags: [u8; 4] = *spoken.first_chunk()?;
        spoken.drain(..4);
        said.flags = Some(u32::from_be_bytes(flags));
        return Some(Vec::new());
    }
    let (header, rest) = OptionHeader::ref_from_prefix(spoken).ok()?;
    assert_eq!(header.magic.get(), IHAVEOPT);
    let (option, len) = (header.option.get(), header.len.get() as usize);
    let data = rest.get(..len)?.to_vec();
    spoken.drain(..16 + len);
    let answer = answer(option, &data);
    said.options.push((option, data));
    Some(answer)
}

/// A server of today.
fn modern(option: u32, _: &[u8]) -> Vec<u8> {
    match option {
        opt::GO => {
            let infos = [
                reply(option, rep::INFO, &export(1 << 30, FLAGS)),
                reply(option, rep::INFO, &[0, 1, b'x']),
                reply(option, rep::INFO, &block_size(SIZES)),
            ];
            [infos.concat(), reply(option, rep::ACK, &[])].concat()
        }
        opt::SET_META_CONTEXT => {
            let context = reply(option, rep::META_CONTEXT, b"\0\0\0\x07base:allocation");
            [context, reply(option, rep::ACK, &[])].concat()
        }
        _ => reply(option, rep::ACK, &[]),
    }
}

fn options(said: &Said) -> Vec<u32> {
    said.options.iter().map(|(o, _)| *o).collect()
}

#[test]
fn everything_that_is_there() {
    let mut wishes = Wishes::new("disk");
    wishes.contexts = vec!["base:allocation".into()];
    let (agreed, said) = haggle(wishes.clone(), &greeting(3), modern);
    let agreed = agreed.unwrap();
    assert_eq!((agreed.style, agreed.tls, agreed.framing), ("fixed newstyle", false, Framing::Extended));
    assert_eq!((agreed.size, agreed.flags.0, agreed.sizes), (1 << 30, FLAGS, Some(SIZES)));
    assert_eq!(agreed.contexts, [(7, "base:allocation".to_owned())]);
    assert_eq!(said.flags, Some(3));
    assert_eq!(options(&said), [opt::EXTENDED_HEADERS, opt::SET_META_CONTEXT, opt::GO]);
    assert_eq!(said.options[1].1, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation");
    assert_eq!(said.options[2].1, b"\0\0\0\x04disk\0\x01\0\x03");
    wishes.extended = false;
    let (agreed, said) = haggle(wishes, &greeting(3), modern);
    assert_eq!(agreed.unwrap().framing, Framing::Structured);
    assert_eq!(options(&said), [opt::STRUCTURED_REPLY, opt::SET_META_CONTEXT, opt::GO]);
}

#[test]
fn what_a_server_lacks_is_done_without() {
    let mut wishes = Wishes::new("disk");
    wishes.contexts = vec!["base:allocation".into()];
    let old = |option: u32, data: &[u8]| match option {
        opt::GO => modern(option, data),
        _ => reply(option, rep::ERR_UNSUP, b"never heard of it"),
    };
    let (agreed, said) = haggle(wishes, &greeting(3), old);
    assert_eq!(agreed.unwrap().framing, Framing::Simple);
    assert_eq!(options(&said), [opt::EXTENDED_HEADERS, opt::STRUCTURED_REPLY, opt::GO]);
}

/// The answer to EXPORT_NAME, which has no header.
fn by_name(option: u32, zeroes: usize) -> Vec<u8> {
    if option != opt::EXPORT_NAME {
        return reply(option, rep::ERR_UNSUP, b"");
    }
    let r = ExportNameReply { size: 4096.into(), flags: 3.into() };
    [r.as_bytes(), &vec![0; zeroes]].concat()
}

#[test]
fn servers_without_go() {
    for (flags, zeroes, asked) in [
        (3, 0, vec![opt::EXTENDED_HEADERS, opt::STRUCTURED_REPLY, opt::GO, opt::EXPORT_NAME]),
        (1, 124, vec![opt::EXTENDED_HEADERS, opt::STRUCTURED_REPLY, opt::GO, opt::EXPORT_NAME]),
        (2, 0, vec![opt::EXPORT_NAME]),
        (0, 124, vec![opt::EXPORT_NAME]),
    ] {
        let (agreed, said) = haggle(Wishes::new("d"), &greeting(flags), |o, _| by_name(o, zeroes));
        let agreed = agreed.unwrap();
        assert_eq!((agreed.style, agreed.size, agreed.flags.0, agreed.sizes), ("newstyle", 4096, 3, None));
        assert_eq!((options(&said), said.flags), (asked, Some(flags.into())));
        assert_eq!(said.options.last().unwrap().1, b"d");
    }
    let plain = Wishes { options: false, ..Wishes::new("d") };
    let (agreed, said) = haggle(plain, &greeting(3), |o, _| by_name(o, 0));
    assert!(agreed.is_ok());
    assert_eq!(options(&said), [opt::EXPORT_NAME]);
}

#[test]
fn oldstyle_servers() {
    let (agreed, said) = haggle(Wishes::new(""), &oldstyle(1 << 20, 5), modern);
    let agreed = agreed.unwrap();
    assert_eq!((agreed.style, agreed.size, agreed.flags.0), ("oldstyle", 1 << 20, 5));
    assert_eq!(said, Said::default(), "nobody listens");
    let (agreed, _) = haggle(Wishes::new(""), &oldstyle(1 << 20, 4), modern);
    assert_eq!(agreed.unwrap().flags.0, 0, "without HAS_FLAGS there are none");
    let named = haggle(Wishes::new("x"), &oldstyle(1 << 20, 5), modern).0.unwrap_err();
    assert!(named.to_string().contains("leave the name out"));
}

#[test]
fn tls_comes_first_and_resets() {
    let with = |tls| Wishes { tls, ..Wishes::new("disk") };
    let (agreed, said) = haggle(with(Tls::Require), &greeting(3), modern);
    let agreed = agreed.unwrap();
    assert!(agreed.tls && agreed.framing == Framing::Extended);
    assert_eq!(options(&said), [opt::STARTTLS, opt::EXTENDED_HEADERS, opt::GO]);
    let no_tls = |option: u32, data: &[u8]| match option {
        opt::STARTTLS => reply(option, rep::ERR_UNSUP, b"no"),
        _ => modern(option, data),
    };
    let (agreed, said) = haggle(with(Tls::Allow), &greeting(3), no_tls);
    assert!(!agreed.unwrap().tls);
    assert_eq!(options(&said)[0], opt::STARTTLS);
    let refused = haggle(with(Tls::Require), &greeting(3), no_tls).0.unwrap_err();
    assert_eq!(refused.to_string(), "the server refuses STARTTLS with ERR_UNSUP: no");
    for old in [greeting(2), oldstyle(512, 1)] {
        let (result, said) = haggle(Wishes { export: String::new(), ..with(Tls::Require) }, &old, modern);
        assert!(matches!(result, Err(HaggleError::Lacks(_))));
        assert_eq!(said, Said::default(), "nothing was said in the clear");
    }
    // EXPORT_NAME inside TLS.
    let named = Wishes { options: false, ..with(Tls::Require) };
    let server = |option: u32, data: &[u8]| match option {
        opt::STARTTLS => modern(option, data),
        _ => by_name(option, 0),
    };
    let (agreed, said) = haggle(named, &greeting(3), server);
    assert!(agreed.unwrap().tls);
    assert_eq!(options(&said), [opt::STARTTLS, opt::EXPORT_NAME]);
}

#[test]
fn refusals_in_the_words_of_the_server() {
    for (kind, says) in [
        (rep::ERR_UNKNOWN, "refuses GO with ERR_UNKNOWN (it has no such export): no 'disk' here"),
        (rep::ERR_POLICY, "refuses GO with ERR_POLICY: no 'disk' here"),
        (rep::ERR_SHUTDOWN, "ERR_SHUTDOWN (it is about to end)"),
        (rep::ERR_TLS_REQD, "ERR_TLS_REQD (it wants TLS: use nbds:// or tls)"),
        (rep::ERROR + 99, "error 0x80000063"),
    ] {
        let server = |option: u32, data: &[u8]| match option {
            opt::GO => reply(option, kind, b"no 'disk' here"),
            _ => modern(option, data),
        };
        let e = haggle(Wishes::new("disk"), &greeting(3), server).0.unwrap_err();
        // What people read keeps its apostrophes, less what would break a line.
        assert!(e.to_string().replace('\\', "").contains(says), "{e}");
    }
    let evil = |option: u32, _: &[u8]| {
        reply(option, rep::ERR_TLS_REQD, &[b"\x1b[2J\n\xff".as_slice(), &[b'x'; 4000]].concat())
    };
    let e = haggle(Wishes::new(""), &greeting(3), evil).0.unwrap_err().to_string();
    assert!(e.len() < 1200 && !e.contains(['\n', '\x1b']), "{e}");
}

/// Each ends the connection, for the reason given.
#[test]
fn hostile_servers() {
    let go = |data: Vec<Vec<u8>>| {
        move |option: u32, d: &[u8]| if option == opt::GO { data.concat() } else { modern(option, d) }
    };
    let infos = |list: &[Vec<u8>]| {
        let mut all: Vec<Vec<u8>> = list.iter().map(|i| reply(opt::GO, rep::INFO, i)).collect();
        all.push(reply(opt::GO, rep::ACK, &[]));
        all
    };
    let data = |what| HaggleError::Data { option: opt::GO, what };
    let sizes = "block sizes that the protocol does not allow";
    let cases: Vec<(&str, Vec<Vec<u8>>, HaggleError)> = vec![
        ("no reply", vec![vec![0; 20]], HaggleError::Magic(0)),
        (
            "an option instead",
            vec![b"IHAVEOPT\0\0\0\x07\0\0\0\0\0\0\0\0".to_vec()],
            HaggleError::Magic(IHAVEOPT),
        ),
        (
            "another option",
            vec![reply(opt::INFO, rep::ACK, &[])],
            HaggleError::OtherOption { asked: opt::GO, answered: opt::INFO },
        ),
        (
            "type of LIST",
            vec![reply(opt::GO, rep::SERVER, &[0; 4])],
            HaggleError::Kind { option: opt::GO, kind: rep::SERVER },
        ),
        ("type 0", vec![reply(opt::GO, 0, &[])], HaggleError::Kind { option: opt::GO, kind: 0 }),
        (
            "context for GO",
            vec![reply(opt::GO, rep::META_CONTEXT, &[0; 9])],
            HaggleError::Kind { option: opt::GO, kind: rep::META_CONTEXT },
        ),
        ("ACK with data", vec![reply(opt::GO, rep::ACK, &[1])], data("an ACK with data")),
        ("ACK at once", vec![reply(opt::GO, rep::ACK, &[])], HaggleError::NoExport),
        ("empty INFO", infos(&[vec![]]), data("an INFO without a type")),
        ("INFO of one byte", infos(&[vec![0]]), data("an INFO without a type")),
        ("short EXPORT", infos(&[export(1, 1)[..11].to_vec()]), data("EXPORT not of 12 bytes")),
        ("long EXPORT", infos(&[[export(1, 1), vec![0]].concat()]), data("EXPORT not of 12 bytes")),
        ("two sizes", infos(&[export(512, 1), export(1024, 1)]), data("two different EXPORTs")),
        ("size of 2^63", infos(&[export(1 << 63, 1)]), HaggleError::Size(1 << 63)),
        ("short BLOCK_SIZE", infos(&[vec![0, 3, 0, 0]]), data("BLOCK_SIZE not of 14 bytes")),
        ("minimum 0", infos(&[block_size(BlockSizes { minimum: 0, ..SIZES })]), data(sizes)),
        ("minimum 3", infos(&[block_size(BlockSizes { minimum: 3, ..SIZES })]), data(sizes)),
        (
            "minimum above 64 KiB",
            infos(&[block_size(BlockSizes { minimum: 1 << 17, preferred: 1 << 17, ..SIZES })]),
            data(sizes),
        ),
        ("preferred 256", infos(&[block_size(BlockSizes { preferred: 256, ..SIZES })]), data(sizes)),
        ("no payload", infos(&[block_size(BlockSizes { max_payload: 0, ..SIZES })]), data(sizes)),
        (
            "endless reply",
            vec![
                ReplyHeader {
                    magic: OPTION_REPLY_MAGIC.into(),
                    option: opt::GO.into(),
                    kind: rep::INFO.into(),
                    len: u32::MAX.into(),
                }
                .as_bytes()
                .to_vec(),
            ],
            HaggleError::TooMuch { option: opt::GO },
        ),
        (
            "endless replies",
            (0..300).map(|_| reply(opt::GO, rep::INFO, &[0, 9])).collect(),
            HaggleError::TooMuch { option: opt::GO },
        ),
    ];
    for (what, replies, why) in cases {
        let (result, _) = haggle(Wishes::new("disk"), &greeting(3), go(replies));
        assert_eq!(result.as_ref(), Err(&why), "{what}");
        assert!(!why.to_string().contains('\n'));
    }
    for (bytes, why) in [
        (b"HTTP/1.1 400 Bad".to_vec(), HaggleError::NotNbd(*b"HTTP/1.1")),
        (b"NBDMAGICNBDMAGIC".to_vec(), HaggleError::Style(NBDMAGIC)),
    ] {
        assert_eq!(haggle(Wishes::new(""), &bytes, modern).0, Err(why));
    }
}

#[test]
fn hostile_contexts() {
    let mut wishes = Wishes::new("disk");
    wishes.contexts = vec!["base:allocation".into(), "x:y".into()];
    let context = |data: &[u8]| reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, data);
    let base = context(b"\0\0\0\x01base:allocation");
    for (what, replies, why) in [
        ("no number", context(&[0; 3]), "a context without a number"),
        ("no text", context(b"\0\0\0\x01\xff"), "a context whose name is not UTF-8"),
        ("another", context(b"\0\0\0\x01qemu:dirty"), "a context that was not asked for"),
        ("number twice", [base.clone(), context(b"\0\0\0\x01x:y")].concat(), "a context twice"),
        ("name twice", [base.clone(), context(b"\0\0\0\x02base:allocation")].concat(), "a context twice"),
    ] {
        let server = |option: u32, data: &[u8]| match option {
            opt::SET_META_CONTEXT => replies.clone(),
            _ => modern(option, data),
        };
        let (result, _) = haggle(wishes.clone(), &greeting(3), server);
        assert_eq!(result, Err(HaggleError::Data { option: opt::SET_META_CONTEXT, what: why }), "{what}");
    }
}

#[test]
fn go_that_is_refused_after_extended_headers_has_no_way_back() {
    let server = |option: u32, data: &[u8]| match option {
        opt::GO => reply(option, rep::ERR_UNSUP, b""),
        _ => modern(option, data),
    };
    let (result, said) = haggle(Wishes::new("disk"), &greeting(3), server);
    assert!(matches!(result, Err(HaggleError::Refused { option: opt::GO, .. })));
    assert!(!options(&said).contains(&opt::EXPORT_NAME));
}

proptest! {
    #[test]
    fn any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..400), good in 0usize..4) {
        let head = [greeting(3), oldstyle(1, 1), greeting(0), Vec::new()][good].clone();
        bytes.splice(0..0, head);
        let mut h = Haggle::new(Wishes::new("x"));
        let mut input = Vec::new();
        for byte in bytes {
            while h.next() == Next::Write {
                let n = h.transmit().len();
                h.transmitted(n);
            }
            if h.next() != Next::Read {
                break;
            }
            prop_assert!(h.missing(&input) > 0 && input.len() + h.missing(&input) <= 20 + MAX_REPLY_DATA as usize);
            input.push(byte);
            match h.handle_input(&input) {
                Ok(n) => drop(input.drain(..n)),
                Err(e) => {
                    prop_assert!(!e.to_string().contains('\n'));
                    break;
                }
            }
        }
    }
}

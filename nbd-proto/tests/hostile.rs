//! What no client should send, and what it is told: one line a case, against the server's machines.
//!
//! The answers are the specification's (NBD `doc/proto.md`); where it leaves a choice, the connection stays if nobody can
//! be mistaken about where the next message begins.

use nbd_proto::framing::{Agreed, Framing};
use nbd_proto::haggle::wire::{IHAVEOPT, OPTION_REPLY_MAGIC, ReplyHeader, opt, rep};
use nbd_proto::haggle::{
    BlockSizes, Catalog, Export as Told, MAX_INPUT, MAX_OPTION_DATA, MAX_SKIPPED_DATA, Outcome,
    Refusal as No, ServerHaggle, Settings, Tls,
};
use nbd_proto::request::Export;
use nbd_proto::transmission::{Event, Transmission, Want};
use nbd_proto::wire::{
    EXTENDED_REQUEST_MAGIC, ErrorCode, ORIGINAL_REPLY_MAGIC, ORIGINAL_REQUEST_MAGIC, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, TransmissionFlags, cmd, cmd_flag,
};
use zerocopy::FromBytes;

/// What a hostile message comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The last reply to an option.
    Says(u32),
    /// The server hangs up.
    HangsUp,
    /// It waits for more.
    Waits,
}

use Answer::{HangsUp, Says, Waits};

/// "disk", and "large" with blocks of 4096 bytes; "closed" is for others.
struct Shelf;

impl Catalog for Shelf {
    fn next(&self, after: Option<&str>) -> Option<Told<'_>> {
        self.find(if after.is_some() { "" } else { "disk" }).ok()
    }

    fn find(&self, name: &str) -> Result<Told<'_>, No> {
        let sizes = |minimum: u32| BlockSizes { minimum, preferred: 4096, max_payload: 1 << 20 };
        let told = |name, minimum: u32| Told {
            id: minimum.into(),
            name,
            description: "",
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS,
            sizes: sizes(minimum),
        };
        match name {
            "disk" => Ok(told("disk", 512)),
            "large" => Ok(told("large", 4096)),
            "closed" => Err(No::Policy("not for you".into())),
            "secret" => Err(No::TlsRequired),
            _ => Err(No::Unknown),
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    stated(number, data.len() as u32, data)
}

/// An option that says it has `len` bytes.
fn stated(number: u32, len: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes(), number.to_be_bytes().as_slice(), &len.to_be_bytes(), data].concat()
}

fn string(text: &[u8]) -> Vec<u8> {
    [(text.len() as u32).to_be_bytes().as_slice(), text].concat()
}

fn go(name: &[u8], count: u16, types: &[u16]) -> Vec<u8> {
    let types: Vec<u8> = types.iter().flat_map(|t| t.to_be_bytes()).collect();
    [string(name).as_slice(), &count.to_be_bytes(), &types].concat()
}

fn meta(name: &[u8], count: u32, queries: &[&[u8]]) -> Vec<u8> {
    let queries: Vec<u8> = queries.iter().flat_map(|q| string(q)).collect();
    [string(name).as_slice(), &count.to_be_bytes(), &queries].concat()
}

const FIXED: u32 = 3;

/// The flags and what follows; all of it is given at once, the answer is that to the last message.
fn talk(settings: Settings, flags: u32, messages: &[u8]) -> Answer {
    let mut haggle = ServerHaggle::new(settings);
    let stream = [flags.to_be_bytes().as_slice(), messages].concat();
    let (mut used, mut said) = (0, Vec::new());
    loop {
        said.extend_from_slice(haggle.transmit());
        haggle.transmitted(usize::MAX);
        match haggle.outcome() {
            Some(Outcome::StartTls) => haggle.encrypted(),
            Some(_) => break,
            None => {}
        }
        let window = &stream[used..stream.len().min(used + MAX_INPUT)];
        match haggle.handle_input(window, &Shelf) {
            Ok(0) if haggle.transmit().is_empty() => break,
            Ok(n) => used += n,
            Err(e) => {
                assert!(!e.to_string().is_empty() && !e.to_string().contains('\n'), "{e}");
                return HangsUp;
            }
        }
    }
    let (mut rest, mut last) = (&said[18..], Waits);
    while let Ok((header, data)) = ReplyHeader::ref_from_prefix(rest) {
        assert_eq!(header.magic.get(), OPTION_REPLY_MAGIC);
        last = Says(header.kind.get());
        rest = &data[header.len.get() as usize..];
    }
    last
}

#[test]
fn handshakes() {
    let ready = option(opt::STRUCTURED_REPLY, b"");
    let behind = |first: &[u8], second: Vec<u8>| [first, &second].concat();
    let chunks = |data: Vec<u8>| behind(&ready, data);
    let long = vec![b'x'; 4097];
    let invalid = Says(rep::ERR_INVALID);
    let cases: Vec<(&str, Vec<u8>, Answer)> = vec![
        ("no option", b"GET / HTTP/1.1\r\n".to_vec(), HangsUp),
        ("option magic, last byte wrong", [b"IHAVEOPS", [0; 8].as_slice()].concat(), HangsUp),
        ("the server's own magic", OPTION_REPLY_MAGIC.to_be_bytes().repeat(2), HangsUp),
        ("half an option", option(opt::LIST, b"")[..15].to_vec(), Waits),
        ("an option without its data", stated(opt::GO, 100, b"abc"), Waits),
        ("option 0", option(0, b""), Says(rep::ERR_UNSUP)),
        ("option 12", option(12, b""), Says(rep::ERR_UNSUP)),
        ("option 2^32-1", option(u32::MAX, b"data"), Says(rep::ERR_UNSUP)),
        ("the withdrawn option", option(opt::PEEK_EXPORT, b"disk"), Says(rep::ERR_UNSUP)),
        (
            "data too long to be looked at",
            option(opt::GO, &vec![0; MAX_OPTION_DATA + 1]),
            Says(rep::ERR_TOO_BIG),
        ),
        ("data too long to be skipped", stated(opt::GO, MAX_SKIPPED_DATA + 1, b""), HangsUp),
        ("4 GiB of data", stated(77, u32::MAX, b""), HangsUp),
        ("LIST with data", option(opt::LIST, b"\0"), invalid),
        ("STARTTLS where there is none", option(opt::STARTTLS, b""), Says(rep::ERR_UNSUP)),
        ("STARTTLS with data", option(opt::STARTTLS, b"x"), invalid),
        ("STRUCTURED_REPLY with data", option(opt::STRUCTURED_REPLY, b"x"), invalid),
        ("EXTENDED_HEADERS with data", option(opt::EXTENDED_HEADERS, b"x"), invalid),
        ("EXPORT_NAME of nothing", option(opt::EXPORT_NAME, b"none"), HangsUp),
        ("EXPORT_NAME, default", option(opt::EXPORT_NAME, b""), HangsUp),
        ("EXPORT_NAME for others", option(opt::EXPORT_NAME, b"closed"), HangsUp),
        ("EXPORT_NAME not UTF-8", option(opt::EXPORT_NAME, b"\xc3\x28"), HangsUp),
        ("EXPORT_NAME with NUL", option(opt::EXPORT_NAME, b"disk\0"), HangsUp),
        ("EXPORT_NAME too long", option(opt::EXPORT_NAME, &long), HangsUp),
        ("EXPORT_NAME far too long", stated(opt::EXPORT_NAME, 1 << 19, b""), HangsUp),
        (
            "EXPORT_NAME after EXTENDED_HEADERS",
            behind(&option(opt::EXTENDED_HEADERS, b""), option(opt::EXPORT_NAME, b"disk")),
            HangsUp,
        ),
        ("GO of nothing", option(opt::GO, &go(b"none", 0, &[])), Says(rep::ERR_UNKNOWN)),
        ("GO, default", option(opt::GO, &go(b"", 0, &[])), Says(rep::ERR_UNKNOWN)),
        ("GO for others", option(opt::GO, &go(b"closed", 0, &[])), Says(rep::ERR_POLICY)),
        ("GO for the encrypted", option(opt::GO, &go(b"secret", 0, &[])), Says(rep::ERR_TLS_REQD)),
        ("GO for large blocks, a type too many", option(opt::GO, &go(b"large", 0, &[3])), invalid),
        ("INFO for large blocks, a type too few", option(opt::INFO, &go(b"large", 3, &[3])), invalid),
        ("GO without data", option(opt::GO, b""), invalid),
        ("GO with half a length", option(opt::GO, b"\0\0\0"), invalid),
        ("GO without a count", option(opt::GO, &string(b"disk")), invalid),
        ("GO with half a count", option(opt::GO, &[string(b"disk").as_slice(), b"\0"].concat()), invalid),
        ("GO, the name eats the count", option(opt::GO, b"\0\0\0\x06disk\0\0"), invalid),
        ("GO, a name of 4 GiB", option(opt::GO, b"\xff\xff\xff\xffdisk\0\0"), invalid),
        ("GO, a type too few", option(opt::GO, &go(b"disk", 2, &[3])), invalid),
        ("GO, a type too many", option(opt::GO, &go(b"disk", 0, &[3])), invalid),
        ("GO, 65535 types of none", option(opt::GO, &go(b"disk", u16::MAX, &[])), invalid),
        ("GO, half a type", option(opt::GO, &[go(b"disk", 1, &[]).as_slice(), b"\0"].concat()), invalid),
        ("GO not UTF-8", option(opt::GO, &go(b"\xff", 0, &[])), invalid),
        ("GO, overlong UTF-8", option(opt::GO, &go(b"\xc0\x80", 0, &[])), invalid),
        ("GO with NUL", option(opt::GO, &go(b"\0", 0, &[])), invalid),
        ("GO, a name too long", option(opt::GO, &go(&long, 0, &[])), Says(rep::ERR_TOO_BIG)),
        ("contexts without chunks", option(opt::SET_META_CONTEXT, &meta(b"disk", 0, &[])), invalid),
        ("contexts listed without chunks", option(opt::LIST_META_CONTEXT, &meta(b"disk", 0, &[])), invalid),
        (
            "contexts of nothing",
            chunks(option(opt::SET_META_CONTEXT, &meta(b"none", 0, &[]))),
            Says(rep::ERR_UNKNOWN),
        ),
        (
            "contexts for others",
            chunks(option(opt::LIST_META_CONTEXT, &meta(b"closed", 0, &[]))),
            Says(rep::ERR_POLICY),
        ),
        ("contexts without data", chunks(option(opt::SET_META_CONTEXT, b"")), invalid),
        ("contexts without a count", chunks(option(opt::SET_META_CONTEXT, &string(b"disk"))), invalid),
        ("a query missing", chunks(option(opt::SET_META_CONTEXT, &meta(b"disk", 2, &[b"a:b"]))), invalid),
        ("a query too many", chunks(option(opt::SET_META_CONTEXT, &meta(b"disk", 0, &[b"a:b"]))), invalid),
        ("4 G queries", chunks(option(opt::LIST_META_CONTEXT, &meta(b"disk", u32::MAX, &[]))), invalid),
        ("no name space", chunks(option(opt::SET_META_CONTEXT, &meta(b"disk", 1, &[b"base"]))), invalid),
        ("an empty query", chunks(option(opt::LIST_META_CONTEXT, &meta(b"disk", 1, &[b""]))), invalid),
        (
            "a query not UTF-8",
            chunks(option(opt::SET_META_CONTEXT, &meta(b"disk", 1, &[b"a:\xff"]))),
            invalid,
        ),
        ("a query with NUL", chunks(option(opt::SET_META_CONTEXT, &meta(b"disk", 1, &[b"a:\0"]))), invalid),
        (
            "a query of 4 GiB",
            chunks(option(opt::SET_META_CONTEXT, &[meta(b"disk", 1, &[]).as_slice(), &[0xff; 4]].concat())),
            invalid,
        ),
        (
            "a query too long",
            chunks(option(opt::SET_META_CONTEXT, &meta(b"", 1, &[&long]))),
            Says(rep::ERR_TOO_BIG),
        ),
        (
            "structured after extended",
            behind(&option(opt::EXTENDED_HEADERS, b""), option(opt::STRUCTURED_REPLY, b"")),
            Says(rep::ERR_EXT_HEADER_REQD),
        ),
    ];
    for (name, messages, answer) in &cases {
        assert_eq!(talk(Settings::default(), FIXED, messages), *answer, "{name}");
    }
    assert!(cases.len() >= 60, "{}", cases.len());
}

#[test]
fn handshakes_of_other_settings() {
    let list = option(opt::LIST, b"");
    for (flags, answer) in
        [(0u32, HangsUp), (2, HangsUp), (4, HangsUp), (0x8000_0003, HangsUp), (1, Says(rep::ACK))]
    {
        assert_eq!(talk(Settings::default(), flags, &list), answer, "flags {flags:#x}");
    }
    let require = Settings { tls: Tls::Require, ..Settings::default() };
    for number in [opt::LIST, opt::INFO, opt::GO, opt::STRUCTURED_REPLY, opt::SET_META_CONTEXT, 77] {
        assert_eq!(talk(require, FIXED, &option(number, b"")), Says(rep::ERR_TLS_REQD), "{number}");
    }
    assert_eq!(talk(require, FIXED, &option(opt::EXPORT_NAME, b"disk")), HangsUp);
    let twice = option(opt::STARTTLS, b"").repeat(2);
    assert_eq!(talk(require, FIXED, &twice), Says(rep::ERR_INVALID));
    // What was agreed upon in the clear is forgotten.
    let forgotten = [
        option(opt::STRUCTURED_REPLY, b""),
        option(opt::STARTTLS, b""),
        option(opt::SET_META_CONTEXT, &meta(b"disk", 1, &[b"base:allocation"])),
    ];
    let allow = Settings { tls: Tls::Allow, ..Settings::default() };
    assert_eq!(talk(allow, FIXED, &forgotten.concat()), Says(rep::ERR_INVALID));
}

const MAX: u32 = 65536;
const SIZE: u64 = 1 << 20;

/// The answer to a request, or the end of the connection.
type End = Option<Result<(), ErrorCode>>;

/// What becomes of a request and the bytes behind it: the error, or that the connection ends (`None`).
fn serve(framing: Framing, allocation: bool, flags: TransmissionFlags, header: &[u8]) -> End {
    let export = Export { size: SIZE, block_size: 512, any_range: false, max_payload: MAX, flags };
    let mut machine = Transmission::with(export, Agreed { framing, allocation });
    assert_eq!(header.len(), machine.header_len());
    let mut event = match machine.header(header) {
        Ok(event) => event,
        Err(violation) => {
            assert!(!violation.to_string().contains('\n'));
            return None;
        }
    };
    loop {
        match event {
            Some(Event::Request(_)) => return Some(Ok(())),
            Some(Event::Refused(refusal)) => {
                assert_eq!(machine.want(), Want::Header, "and the next request is understood");
                return Some(Err(refusal.error));
            }
            Some(Event::Disconnect) => return None,
            Some(Event::Writing(_)) | None => {}
        }
        event = match machine.want() {
            Want::Payload { left } | Want::Discard { left } => machine.payload(left),
            Want::Parameters { left } => machine.parameters(&vec![0; left as usize]),
            want => panic!("{want:?}"),
        };
    }
}

fn compact(magic: u32, flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    [
        magic.to_be_bytes().as_slice(),
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &[7; 8],
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

fn extended(flags: u16, command: u16, offset: u64, length: u64) -> Vec<u8> {
    let mut header = compact(EXTENDED_REQUEST_MAGIC, flags, command, offset, (length >> 32) as u32);
    header.extend_from_slice(&(length as u32).to_be_bytes());
    header
}

/// All that a server may offer, but read-only.
const ALL: TransmissionFlags = TransmissionFlags(0x1dfd);

#[test]
fn compact_requests() {
    let einval = Some(Err(ErrorCode::Einval));
    let of = |command, flags, offset, length| compact(REQUEST_MAGIC, flags, command, offset, length);
    let none = TransmissionFlags::HAS_FLAGS;
    let ro = ALL | TransmissionFlags::READ_ONLY;
    let cases: Vec<(&str, TransmissionFlags, Vec<u8>, End)> = vec![
        ("magic 0", ALL, compact(0, 0, cmd::READ, 0, 512), None),
        ("a reply's magic", ALL, compact(SIMPLE_REPLY_MAGIC, 0, cmd::READ, 0, 512), None),
        ("a chunk's magic", ALL, compact(STRUCTURED_REPLY_MAGIC, 0, cmd::READ, 0, 512), None),
        ("the magic of 1997", ALL, compact(ORIGINAL_REQUEST_MAGIC, 0, cmd::READ, 0, 512), None),
        ("extended magic", ALL, compact(EXTENDED_REQUEST_MAGIC, 0, cmd::READ, 0, 512), None),
        ("magic, little-endian", ALL, compact(REQUEST_MAGIC.swap_bytes(), 0, cmd::READ, 0, 512), None),
        ("a write too long", ALL, of(cmd::WRITE, 0, 0, MAX + 512), None),
        ("a write of 4 GiB", ALL, of(cmd::WRITE, 0, 0, u32::MAX), None),
        ("RESIZE", ALL, of(8, 0, 0, 512), einval),
        ("command 9", ALL, of(9, 0, 0, 0), einval),
        ("command 65535", ALL, of(u16::MAX, 0, 0, 512), einval),
        ("TRIM not offered", none, of(cmd::TRIM, 0, 0, 512), einval),
        ("CACHE not offered", none, of(cmd::CACHE, 0, 0, 512), einval),
        ("WRITE_ZEROES not offered", none, of(cmd::WRITE_ZEROES, 0, 0, 512), einval),
        ("FLUSH not offered", none, of(cmd::FLUSH, 0, 0, 0), einval),
        ("FUA not offered", none, of(cmd::WRITE, cmd_flag::FUA, 0, 512), einval),
        ("DF not offered", none, of(cmd::READ, cmd_flag::DF, 0, 512), einval),
        (
            "FAST_ZERO not offered",
            TransmissionFlags(0x41),
            of(cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 512),
            einval,
        ),
        ("NO_HOLE on READ", ALL, of(cmd::READ, cmd_flag::NO_HOLE, 0, 512), einval),
        ("REQ_ONE on READ", ALL, of(cmd::READ, cmd_flag::REQ_ONE, 0, 512), einval),
        ("DF on WRITE", ALL, of(cmd::WRITE, cmd_flag::DF, 0, 512), einval),
        ("FAST_ZERO on TRIM", ALL, of(cmd::TRIM, cmd_flag::FAST_ZERO, 0, 512), einval),
        ("PAYLOAD_LEN on WRITE", ALL, of(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 0, 512), einval),
        ("flag 15", ALL, of(cmd::FLUSH, 1 << 15, 0, 0), einval),
        ("all flags", ALL, of(cmd::READ, u16::MAX, 0, 512), einval),
        ("an empty read", ALL, of(cmd::READ, 0, 0, 0), einval),
        ("an empty write", ALL, of(cmd::WRITE, 0, 0, 0), einval),
        ("an empty trim", ALL, of(cmd::TRIM, 0, 0, 0), einval),
        ("FLUSH with an offset", ALL, of(cmd::FLUSH, 0, 512, 0), einval),
        ("FLUSH with a length", ALL, of(cmd::FLUSH, 0, 0, 512), einval),
        ("half a block", ALL, of(cmd::READ, 0, 0, 256), einval),
        ("between blocks", ALL, of(cmd::WRITE, 0, 256, 512), einval),
        ("a read past the end", ALL, of(cmd::READ, 0, SIZE, 512), einval),
        ("a read over the end", ALL, of(cmd::READ, 0, SIZE - 512, 1024), einval),
        ("a trim over the end", ALL, of(cmd::TRIM, 0, SIZE - 512, 1024), einval),
        ("a write over the end", ALL, of(cmd::WRITE, 0, SIZE - 512, 1024), Some(Err(ErrorCode::Enospc))),
        (
            "zeroes over the end",
            ALL,
            of(cmd::WRITE_ZEROES, 0, SIZE - 512, 1024),
            Some(Err(ErrorCode::Enospc)),
        ),
        ("a range that wraps", ALL, of(cmd::READ, 0, u64::MAX - 511, 1024), einval),
        ("a write that wraps", ALL, of(cmd::WRITE, 0, u64::MAX - 511, 1024), Some(Err(ErrorCode::Enospc))),
        ("a read too long", ALL, of(cmd::READ, 0, 0, MAX + 512), einval),
        (
            "a read too long for one chunk",
            ALL,
            of(cmd::READ, cmd_flag::DF, 0, MAX + 512),
            Some(Err(ErrorCode::Eoverflow)),
        ),
        ("a write, read-only", ro, of(cmd::WRITE, 0, 0, 512), Some(Err(ErrorCode::Eperm))),
        ("a trim, read-only", ro, of(cmd::TRIM, 0, 0, 512), Some(Err(ErrorCode::Eperm))),
        ("zeroes, read-only", ro, of(cmd::WRITE_ZEROES, 0, 0, 512), Some(Err(ErrorCode::Eperm))),
        ("status without a context", ALL, of(cmd::BLOCK_STATUS, 0, 0, 512), einval),
        ("a good-bye with a length", ALL, of(cmd::DISC, 0, 0, 512), None),
    ];
    for (name, flags, header, answer) in &cases {
        assert_eq!(serve(Framing::Structured, false, *flags, header), *answer, "{name}");
    }
    assert!(cases.len() >= 45, "{}", cases.len());
}

#[test]
fn extended_requests() {
    let einval = Some(Err(ErrorCode::Einval));
    let payload = cmd_flag::PAYLOAD_LEN;
    let cases: Vec<(&str, Vec<u8>, End)> = vec![
        ("a payload too long", extended(payload, cmd::WRITE, 0, u64::from(MAX) + 512), None),
        ("a payload of 2^32", extended(payload, cmd::WRITE, 0, 1 << 32), None),
        ("a payload of 2^64-1", extended(payload, 99, 0, u64::MAX), None),
        ("a payload too long for status", extended(payload, cmd::BLOCK_STATUS, 0, u64::from(MAX) + 4), None),
        ("WRITE as QEMU sends it: PAYLOAD_LEN is not set", extended(0, cmd::WRITE, 0, 512), Some(Ok(()))),
        ("the same, too long", extended(0, cmd::WRITE, 0, u64::from(MAX) + 512), None),
        ("the same, empty", extended(0, cmd::WRITE, 0, 0), einval),
        ("the same, past the end", extended(0, cmd::WRITE, SIZE, 512), Some(Err(ErrorCode::Enospc))),
        ("WRITE with an empty one", extended(payload, cmd::WRITE, 0, 0), einval),
        ("READ with a payload", extended(payload, cmd::READ, 0, 512), einval),
        ("TRIM with a payload", extended(payload, cmd::TRIM, 0, 512), einval),
        ("FLUSH with a payload", extended(payload, cmd::FLUSH, 0, 1), einval),
        ("WRITE_ZEROES with a payload", extended(payload, cmd::WRITE_ZEROES, 0, 512), einval),
        (
            "a refused write past the end",
            extended(payload, cmd::WRITE, SIZE, 512),
            Some(Err(ErrorCode::Enospc)),
        ),
        ("an unknown command with a payload", extended(payload, 99, 0, 100), einval),
        ("status with an empty payload", extended(payload, cmd::BLOCK_STATUS, 0, 0), einval),
        ("status with half a length", extended(payload, cmd::BLOCK_STATUS, 0, 4), einval),
        ("status of no context", extended(payload, cmd::BLOCK_STATUS, 0, 8), einval),
        ("status of context 0", extended(payload, cmd::BLOCK_STATUS, 0, 12), einval),
        ("status, half an id", extended(payload, cmd::BLOCK_STATUS, 0, 14), einval),
        ("status of more contexts than there are", extended(payload, cmd::BLOCK_STATUS, 0, 1000), einval),
        ("status of 2^63", extended(0, cmd::BLOCK_STATUS, 0, 1 << 63), einval),
        ("status of nothing", extended(0, cmd::BLOCK_STATUS, 0, 0), einval),
        ("a trim of 2^63", extended(0, cmd::TRIM, 0, 1 << 63), einval),
        (
            "zeroes that wrap",
            extended(0, cmd::WRITE_ZEROES, 512, u64::MAX - 511),
            Some(Err(ErrorCode::Enospc)),
        ),
        ("a read of 2^32", extended(0, cmd::READ, 0, 1 << 32), einval),
    ];
    for (name, header, answer) in &cases {
        assert_eq!(serve(Framing::Extended, true, ALL, header), *answer, "{name}");
    }
    let wrong = [compact(REQUEST_MAGIC, 0, cmd::READ, 0, 512), vec![0; 4]].concat();
    assert_eq!(serve(Framing::Extended, true, ALL, &wrong), None, "a compact request");
    // The filter was not offered.
    let plain = TransmissionFlags(ALL.0 & !TransmissionFlags::BLOCK_STATUS_PAYLOAD.0);
    assert_eq!(serve(Framing::Extended, true, plain, &extended(payload, cmd::BLOCK_STATUS, 0, 12)), einval);
}

#[test]
fn requests_of_1997() {
    let framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };
    let request = |magic: u32, from: u32, len: u32, kind: u32| {
        let words = [magic, from, len, 7, 7, kind];
        words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>()
    };
    let einval = Some(Err(ErrorCode::Einval));
    let magic = ORIGINAL_REQUEST_MAGIC;
    for (name, header, answer) in [
        ("a modern magic", request(REQUEST_MAGIC, 0, 512, 0), None),
        ("a write too long", request(magic, 0, MAX + 512, 1), None),
        ("DISC, of later", request(magic, 0, 0, 2), einval),
        ("kind 2^16, a read in 16 bits", request(magic, 0, 512, 1 << 16), einval),
        ("kind 2^32-1", request(magic, 0, 512, u32::MAX), einval),
        ("nothing", request(magic, 0, 0, 0), einval),
        ("half a block", request(magic, 0, 100, 0), einval),
        ("past the end", request(magic, SIZE as u32, 512, 0), einval),
        ("a write past the end", request(magic, SIZE as u32, 512, 1), Some(Err(ErrorCode::Enospc))),
        ("a range that wraps 32 bits", request(magic, u32::MAX - 511, 1024, 0), einval),
        ("a read", request(magic, SIZE as u32 - 512, 512, 0), Some(Ok(()))),
    ] {
        assert_eq!(serve(framing, false, TransmissionFlags(0), &header), answer, "{name}");
    }
    let ro = TransmissionFlags::READ_ONLY;
    assert_eq!(serve(framing, false, ro, &request(magic, 0, 512, 1)), Some(Err(ErrorCode::Eperm)));
}

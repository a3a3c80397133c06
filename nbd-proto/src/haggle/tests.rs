//! The server's machine against scripted clients.

use std::collections::BTreeMap;

use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::*;
use super::*;
use crate::framing::{Agreed, Framing};
use crate::wire::{ORIGINAL_REPLY_MAGIC, TransmissionFlags};

const FLAGS: TransmissionFlags = TransmissionFlags(0x16d);
const SIZES: BlockSizes = BlockSizes { minimum: 512, preferred: 4096, max_payload: 32 << 20 };

/// Names and descriptions; "" is "disk", "closed" is forbidden, "large" has blocks of 4096 bytes.
struct Shelf(BTreeMap<String, String>);

impl Shelf {
    fn new() -> Self {
        let entry = |n: &str, d: &str| (n.to_owned(), d.to_owned());
        Self([entry("disk", ""), entry("large", "4k blocks"), entry("ä", "")].into())
    }

    fn crowded(count: u32) -> Self {
        Self((0..count).map(|i| (format!("disk{i:05}"), "d".repeat(50))).collect())
    }

    fn export<'a>(&self, name: &'a str, description: &'a str) -> Export<'a> {
        let minimum = if name == "large" { 4096 } else { 512 };
        let sizes = BlockSizes { minimum, ..SIZES };
        Export { id: name.len() as u64, name, description, size: 1 << 20, flags: FLAGS, sizes }
    }
}

impl Catalog for Shelf {
    fn next(&self, after: Option<&str>) -> Option<Export<'_>> {
        let mut rest = self.0.iter().filter(|(n, _)| after.is_none_or(|a| n.as_str() > a));
        rest.next().map(|(n, d)| self.export(n, d))
    }

    fn find(&self, name: &str) -> Result<Export<'_>, Refusal> {
        let name = if name.is_empty() { "disk" } else { name };
        if name == "closed" {
            return Err(Refusal::Policy("not for you".into()));
        }
        let (n, d) = self.0.get_key_value(name).ok_or(Refusal::Unknown)?;
        Ok(self.export(n, d))
    }
}

const FIXED: u32 = FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES;

/// Both sides of a handshake in memory.
struct Talk {
    haggle: ServerHaggle,
    shelf: Shelf,
}

impl Talk {
    fn new(settings: Settings) -> Self {
        Self { haggle: ServerHaggle::new(settings), shelf: Shelf::new() }
    }

    /// Past the flags.
    fn started(settings: Settings, flags: u32) -> Self {
        let mut talk = Self::new(settings);
        talk.drain();
        assert_eq!(talk.send(&flags.to_be_bytes()), Ok(vec![]));
        talk
    }

    fn drain(&mut self) -> Vec<u8> {
        let out = self.haggle.transmit().to_vec();
        assert!(out.len() <= MAX_OUTPUT);
        self.haggle.transmitted(out.len());
        out
    }

    /// Everything the server says to `bytes`, all of which it must use.
    fn send(&mut self, mut bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut said = Vec::new();
        loop {
            let used = self.haggle.handle_input(bytes, &self.shelf)?;
            bytes = &bytes[used..];
            let out = self.drain();
            if used == 0 && out.is_empty() {
                assert!(bytes.is_empty() || self.haggle.outcome().is_some(), "unused: {bytes:?}");
                return Ok(said);
            }
            said.extend(out);
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<Reply>, Error> {
        let said = self.send(&request(option, data))?;
        let replies = parse(&said);
        assert!(replies.iter().all(|r| r.option == option), "{replies:?}");
        Ok(replies)
    }
}

fn request(option: u32, data: &[u8]) -> Vec<u8> {
    let header =
        OptionHeader { magic: IHAVEOPT.into(), option: option.into(), len: (data.len() as u32).into() };
    [header.as_bytes(), data].concat()
}

fn info_data(name: &str, types: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(types.len() as u16).to_be_bytes());
    types.iter().for_each(|t| data.extend_from_slice(&t.to_be_bytes()));
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

fn parse(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        let (header, rest) = ReplyHeader::ref_from_prefix(bytes).expect("a whole header");
        assert_eq!(header.magic.get(), OPTION_REPLY_MAGIC);
        let (data, rest) = rest.split_at(header.len.get() as usize);
        replies.push(Reply { option: header.option.get(), kind: header.kind.get(), data: data.to_vec() });
        bytes = rest;
    }
    replies
}

fn kinds(replies: &[Reply]) -> Vec<u32> {
    replies.iter().map(|r| r.kind).collect()
}

fn chosen(talk: &Talk) -> &Chosen {
    match talk.haggle.outcome() {
        Some(Outcome::Transmission(chosen)) => chosen,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_greeting_says_what_is_offered() {
    for (fixed_newstyle, no_zeroes, flags) in
        [(true, true, 3), (true, false, 1), (false, true, 2), (false, false, 0)]
    {
        let mut talk = Talk::new(Settings { fixed_newstyle, no_zeroes, ..Settings::default() });
        assert_eq!(talk.drain(), [b"NBDMAGICIHAVEOPT".as_slice(), &[0, flags]].concat());
        assert_eq!(talk.drain(), b"");
    }
}

#[test]
fn client_flags_that_were_not_offered_end_the_connection() {
    let all = Settings::default();
    for (settings, flags) in [
        (all, 4),
        (all, 0x8000_0003),
        (Settings { no_zeroes: false, ..all }, 2),
        (Settings { fixed_newstyle: false, ..all }, 1),
    ] {
        let mut talk = Talk::new(settings);
        talk.drain();
        assert_eq!(talk.send(&u32::to_be_bytes(flags)), Err(Error::ClientFlags(flags)));
    }
}

#[test]
fn nothing_is_read_before_the_greeting_went_out() {
    let mut talk = Talk::new(Settings::default());
    assert_eq!(talk.haggle.handle_input(&FIXED.to_be_bytes(), &talk.shelf), Ok(0));
    talk.haggle.transmitted(17);
    assert_eq!(talk.haggle.transmit(), &[3]);
    assert_eq!(talk.haggle.handle_input(&FIXED.to_be_bytes(), &talk.shelf), Ok(0));
    talk.haggle.transmitted(1);
    assert_eq!(talk.haggle.handle_input(&FIXED.to_be_bytes(), &talk.shelf), Ok(4));
}

/// A conversation of `nbd-client -l` and one of `nbd-client -N disk`, byte for byte.
#[test]
fn golden_list_and_go() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    let said = talk.send(b"IHAVEOPT\0\0\0\x03\0\0\0\0").unwrap();
    let magic = b"\0\x03\xe8\x89\x04\x55\x65\xa9";
    let golden = [
        magic.as_slice(),
        b"\0\0\0\x03\0\0\0\x02\0\0\0\x08\0\0\0\x04disk",
        magic,
        b"\0\0\0\x03\0\0\0\x02\0\0\0\x12\0\0\0\x05large4k blocks",
        magic,
        b"\0\0\0\x03\0\0\0\x02\0\0\0\x06\0\0\0\x02\xc3\xa4",
        magic,
        b"\0\0\0\x03\0\0\0\x01\0\0\0\0",
    ]
    .concat();
    assert_eq!(said, golden);
    let said = talk.send(b"IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x03").unwrap();
    let golden = [
        magic.as_slice(),
        b"\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x10\0\0\x01\x6d",
        magic,
        b"\0\0\0\x07\0\0\0\x03\0\0\0\x0e\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0",
        magic,
        b"\0\0\0\x07\0\0\0\x01\0\0\0\0",
    ]
    .concat();
    assert_eq!(said, golden);
    let right = Chosen { export: 4, flags: FLAGS, size: 1 << 20, option: opt::GO, agreed: Agreed::default() };
    assert_eq!(*chosen(&talk), right);
}

#[test]
fn golden_export_name() {
    let short = b"\0\0\0\0\0\x10\0\0\x01\x6d".to_vec();
    let long = [short.as_slice(), &[0; 124]].concat();
    for (flags, golden) in
        [(FIXED, &short), (FLAG_C_NO_ZEROES, &short), (FLAG_C_FIXED_NEWSTYLE, &long), (0, &long)]
    {
        let mut talk = Talk::started(Settings::default(), flags);
        assert_eq!(talk.send(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").as_ref(), Ok(golden));
        assert_eq!(chosen(&talk).option, opt::EXPORT_NAME);
    }
}

#[test]
fn without_fixed_newstyle_there_is_export_name_only() {
    let plain = Settings { fixed_newstyle: false, ..Settings::default() };
    for (settings, flags) in [(plain, 0), (Settings::default(), FLAG_C_NO_ZEROES)] {
        for option in [opt::LIST, opt::GO, opt::ABORT, opt::STARTTLS, 99] {
            let mut talk = Talk::started(settings, flags);
            assert_eq!(talk.option(option, b""), Err(Error::NotFixed { option }));
        }
        let mut talk = Talk::started(settings, flags);
        talk.send(&request(opt::EXPORT_NAME, b"")).unwrap();
        assert_eq!(chosen(&talk).export, 4);
    }
}

#[test]
fn export_name_has_no_answer_for_what_is_not_there() {
    for name in ["gone", "closed", "a\0b"] {
        let mut talk = Talk::started(Settings::default(), FIXED);
        let answer = talk.option(opt::EXPORT_NAME, name.as_bytes());
        assert!(
            matches!(&answer, Err(Error::ExportName(n, why)) if n == name && !why.is_empty()),
            "{answer:?}"
        );
    }
    let mut talk = Talk::started(Settings::default(), FIXED);
    let answer = talk.option(opt::EXPORT_NAME, &vec![b'x'; MAX_STRING + 1]);
    assert!(matches!(answer, Err(Error::ExportName(..))));
}

#[test]
fn refused_options_leave_the_connection_usable() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    let cases: &[(u32, Vec<u8>, u32)] = &[
        (opt::STRUCTURED_REPLY, vec![1], rep::ERR_INVALID),
        (opt::EXTENDED_HEADERS, vec![1], rep::ERR_INVALID),
        (opt::STARTTLS, vec![], rep::ERR_UNSUP),
        (opt::STARTTLS, vec![1], rep::ERR_INVALID),
        (opt::LIST_META_CONTEXT, meta_data("disk", &[]), rep::ERR_INVALID),
        (opt::SET_META_CONTEXT, meta_data("disk", &["base:allocation"]), rep::ERR_INVALID),
        (opt::SET_META_CONTEXT, vec![0; 900], rep::ERR_INVALID),
        (opt::PEEK_EXPORT, b"disk".to_vec(), rep::ERR_UNSUP),
        (0, vec![], rep::ERR_UNSUP),
        (u32::MAX, vec![7; 100], rep::ERR_UNSUP),
        (opt::LIST, vec![0], rep::ERR_INVALID),
        (opt::INFO, vec![], rep::ERR_INVALID),
        (opt::GO, vec![0; 5], rep::ERR_INVALID),
        (opt::GO, info_data("gone", &[]), rep::ERR_UNKNOWN),
        (opt::INFO, info_data("gone", &[3]), rep::ERR_UNKNOWN),
        (opt::GO, info_data("closed", &[3]), rep::ERR_POLICY),
        (opt::GO, info_data(&"x".repeat(MAX_STRING + 1), &[]), rep::ERR_TOO_BIG),
        (opt::GO, vec![0; MAX_OPTION_DATA + 1], rep::ERR_TOO_BIG),
        (99, vec![0; MAX_SKIPPED_DATA as usize], rep::ERR_TOO_BIG),
    ];
    for (option, data, kind) in cases {
        let replies = talk.option(*option, data).unwrap();
        assert_eq!(kinds(&replies), [*kind], "option {option}, {} bytes", data.len());
        let text = std::str::from_utf8(&replies[0].data).unwrap();
        assert!(!text.is_empty() && text.len() <= 1024, "{text}");
    }
    assert_eq!(kinds(&talk.option(opt::GO, &info_data("disk", &[])).unwrap()), [rep::INFO, rep::ACK]);
    assert!(talk.haggle.outcome().is_some());
}

#[test]
fn what_is_no_haggling_ends_the_connection() {
    let garbage = |bytes: &[u8]| Talk::started(Settings::default(), FIXED).send(bytes);
    assert_eq!(garbage(b"GET / HTTP/1.1\r\n"), Err(Error::Magic(u64::from_be_bytes(*b"GET / HT"))));
    let len = MAX_SKIPPED_DATA + 1;
    for (option, len) in [(opt::GO, len), (99, u32::MAX), (opt::EXPORT_NAME, MAX_OPTION_DATA as u32 + 1)] {
        let header = OptionHeader { magic: IHAVEOPT.into(), option: option.into(), len: len.into() };
        assert_eq!(garbage(header.as_bytes()), Err(Error::TooLong { option, len }));
    }
    let mut talk = Talk::started(Settings::default(), FIXED);
    for _ in 0..MAX_OPTIONS {
        talk.option(99, b"").unwrap();
    }
    assert_eq!(talk.option(99, b""), Err(Error::TooManyOptions));
}

#[test]
fn info_tells_what_was_asked_for_and_goes_on() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    let told = |talk: &mut Talk, name: &str, types: &[u16]| -> Vec<u16> {
        let replies = talk.option(opt::INFO, &info_data(name, types)).unwrap();
        assert_eq!(replies.last().unwrap().kind, rep::ACK);
        let infos = &replies[..replies.len() - 1];
        infos.iter().map(|r| u16::from_be_bytes([r.data[0], r.data[1]])).collect()
    };
    assert_eq!(told(&mut talk, "disk", &[]), [info::EXPORT]);
    assert_eq!(told(&mut talk, "", &[1]), [info::EXPORT, info::NAME]);
    assert_eq!(told(&mut talk, "disk", &[2]), [info::EXPORT], "there is no description");
    assert_eq!(told(&mut talk, "large", &[3, 2, 1, 9]), [0, 1, 2, 3]);
    let replies = talk.option(opt::INFO, &info_data("", &[1])).unwrap();
    assert_eq!(replies[1].data, b"\0\x01disk", "the canonical name of the default export");
    assert_eq!(talk.haggle.outcome(), None);
}

#[test]
fn block_sizes_are_told_to_clients_that_ask_for_them() {
    for option in [opt::INFO, opt::GO] {
        let mut talk = Talk::started(Settings::default(), FIXED);
        let replies = talk.option(option, &info_data("large", &[])).unwrap();
        assert_eq!(kinds(&replies), [rep::INFO, rep::ACK], "it may send any range");
        let mut talk = Talk::started(Settings::default(), FIXED);
        let replies = talk.option(option, &info_data("large", &[3])).unwrap();
        assert_eq!(kinds(&replies), [rep::INFO, rep::INFO, rep::ACK]);
        assert_eq!(replies[1].data[..6], *b"\0\x03\0\0\x10\0");
    }
}

#[test]
fn abort_is_acknowledged() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    assert_eq!(kinds(&talk.option(opt::ABORT, b"bye").unwrap()), [rep::ACK]);
    assert_eq!(talk.haggle.outcome(), Some(&Outcome::Aborted));
    assert_eq!(talk.haggle.handle_input(&request(opt::LIST, b""), &talk.shelf), Ok(0));
}

#[test]
fn listing_can_be_forbidden() {
    let mut talk = Talk::started(Settings { list: false, ..Settings::default() }, FIXED);
    assert_eq!(kinds(&talk.option(opt::LIST, b"").unwrap()), [rep::ERR_POLICY]);
}

#[test]
fn a_stopping_server_lets_only_abort_through() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    talk.haggle.stop();
    for option in [opt::LIST, opt::GO, opt::INFO, 99] {
        assert_eq!(kinds(&talk.option(option, b"").unwrap()), [rep::ERR_SHUTDOWN]);
    }
    assert!(matches!(
        Talk { haggle: talk.haggle, shelf: Shelf::new() }.option(opt::EXPORT_NAME, b"disk"),
        Err(Error::ExportName(..))
    ));
    let mut talk = Talk::started(Settings::default(), FIXED);
    talk.haggle.stop();
    assert_eq!(kinds(&talk.option(opt::ABORT, b"").unwrap()), [rep::ACK]);
}

#[test]
fn a_long_list_is_made_as_the_client_reads_it() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    talk.shelf = Shelf::crowded(5000);
    let list = request(opt::LIST, b"");
    assert_eq!(talk.haggle.handle_input(&list, &talk.shelf), Ok(list.len()));
    let first = talk.haggle.transmit().len();
    assert!(first < MAX_OUTPUT);
    // A client that does not read gets nothing more, and no second option.
    assert_eq!(talk.haggle.handle_input(&list, &talk.shelf), Ok(0));
    assert_eq!(talk.haggle.transmit().len(), first);
    let mut said = talk.drain();
    // Exports that come and go meanwhile neither repeat nor hide the others.
    talk.shelf.0.remove("disk04999");
    talk.shelf.0.insert("disk00000a".into(), String::new());
    said.extend(talk.send(b"").unwrap());
    let replies = parse(&said);
    assert_eq!(replies.len(), 5000);
    assert!(replies[..4999].iter().all(|r| r.kind == rep::SERVER));
    assert_eq!(replies[4999].kind, rep::ACK);
    assert_eq!(talk.option(opt::INFO, &info_data("disk00001", &[])).unwrap().len(), 2);
}

#[test]
fn bytes_behind_the_choice_are_left() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    let go = request(opt::GO, &info_data("disk", &[]));
    let with_request = [go.as_slice(), b"\x25\x60\x95\x13"].concat();
    assert_eq!(talk.haggle.handle_input(&with_request, &talk.shelf), Ok(go.len()));
    assert_eq!(talk.haggle.outcome(), None, "the answer comes first");
    talk.drain();
    assert!(talk.haggle.outcome().is_some());
    assert_eq!(talk.haggle.handle_input(b"\x25\x60\x95\x13", &talk.shelf), Ok(0));
}

/// Options that need each other, and what they make of the transmission.
#[test]
fn chunks_and_contexts_are_agreed_upon() {
    let go = |talk: &mut Talk| {
        let replies = talk.option(opt::GO, &info_data("disk", &[])).unwrap();
        let told = u16::from_be_bytes([replies[0].data[10], replies[0].data[11]]);
        assert_eq!(told, chosen(talk).flags.0);
        (chosen(talk).agreed, TransmissionFlags(told ^ FLAGS.0))
    };
    let none = TransmissionFlags(0);
    let (df, payload) = (TransmissionFlags::SEND_DF, TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    let all = ["base:allocation"];
    /// Options, the name and the queries of SET_META_CONTEXT; and what comes of them.
    type Case<'a> = (&'a [u32], &'a str, &'a [&'a str], Framing, bool, TransmissionFlags);
    let cases: &[Case<'_>] = &[
        (&[], "disk", &[], Framing::Simple, false, none),
        (&[opt::STRUCTURED_REPLY], "disk", &all, Framing::Structured, true, df),
        (&[opt::STRUCTURED_REPLY], "", &all, Framing::Structured, true, df),
        (&[opt::STRUCTURED_REPLY], "large", &all, Framing::Structured, false, df),
        (&[opt::STRUCTURED_REPLY], "disk", &["base:", "x:y"], Framing::Structured, false, df),
        (&[opt::EXTENDED_HEADERS], "disk", &all, Framing::Extended, true, df | payload),
        (&[opt::EXTENDED_HEADERS], "large", &all, Framing::Extended, false, df),
        (
            &[opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS],
            "disk",
            &all,
            Framing::Extended,
            true,
            df | payload,
        ),
    ];
    for (options, name, queries, framing, allocation, flags) in cases {
        let mut talk = Talk::started(Settings::default(), FIXED);
        for option in *options {
            assert_eq!(kinds(&talk.option(*option, b"").unwrap()), [rep::ACK]);
        }
        if !queries.is_empty() {
            let replies = talk.option(opt::SET_META_CONTEXT, &meta_data(name, queries)).unwrap();
            assert_eq!(replies.last().unwrap().kind, rep::ACK);
            let found = queries.contains(&"base:allocation");
            assert_eq!(replies.len(), if found { 2 } else { 1 });
            if found {
                assert_eq!(replies[0].data, [b"\0\0\0\x01".as_slice(), b"base:allocation"].concat());
            }
        }
        assert_eq!(
            go(&mut talk),
            (Agreed { framing: *framing, allocation: *allocation }, *flags),
            "{options:?}"
        );
    }
}

#[test]
fn contexts_are_listed_and_the_last_set_counts() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    talk.option(opt::STRUCTURED_REPLY, b"").unwrap();
    for (queries, found) in
        [(&[] as &[&str], true), (&["base:"], true), (&["base:allocation"], true), (&["base:x", "y:"], false)]
    {
        let replies = talk.option(opt::LIST_META_CONTEXT, &meta_data("disk", queries)).unwrap();
        assert_eq!(kinds(&replies), if found { vec![rep::META_CONTEXT, rep::ACK] } else { vec![rep::ACK] });
        assert!(!found || replies[0].data == b"\0\0\0\0base:allocation");
    }
    let set = meta_data("disk", &["base:allocation"]);
    // A failure unsets, too, whatever kind it is of.
    for (data, kind) in [
        (meta_data("gone", &["base:allocation"]), rep::ERR_UNKNOWN),
        (meta_data("closed", &[]), rep::ERR_POLICY),
        (meta_data("disk", &["base"]), rep::ERR_INVALID),
        (meta_data("disk", &[]), rep::ACK),
    ] {
        let mut talk = Talk::started(Settings::default(), FIXED);
        talk.option(opt::STRUCTURED_REPLY, b"").unwrap();
        talk.option(opt::SET_META_CONTEXT, &set).unwrap();
        assert_eq!(kinds(&talk.option(opt::SET_META_CONTEXT, &data).unwrap()), [kind]);
        talk.option(opt::GO, &info_data("disk", &[])).unwrap();
        assert!(!chosen(&talk).agreed.allocation);
    }
}

#[test]
fn extended_headers_take_precedence() {
    let mut talk = Talk::started(Settings::default(), FIXED);
    talk.option(opt::EXTENDED_HEADERS, b"").unwrap();
    assert_eq!(kinds(&talk.option(opt::STRUCTURED_REPLY, b"").unwrap()), [rep::ERR_EXT_HEADER_REQD]);
    assert_eq!(kinds(&talk.option(opt::EXTENDED_HEADERS, b"").unwrap()), [rep::ACK]);
    assert!(
        matches!(talk.option(opt::EXPORT_NAME, b"disk"), Err(Error::ExportName(_, why)) if why.contains("GO"))
    );
    // EXPORT_NAME goes well with structured replies.
    let mut talk = Talk::started(Settings::default(), FIXED);
    talk.option(opt::STRUCTURED_REPLY, b"").unwrap();
    let said = talk.send(&request(opt::EXPORT_NAME, b"disk")).unwrap();
    assert_eq!(said[8..], (FLAGS | TransmissionFlags::SEND_DF).0.to_be_bytes());
    assert_eq!(chosen(&talk).agreed.framing, Framing::Structured);
    // And a server may offer less.
    for (structured, extended) in [(false, false), (true, false), (false, true)] {
        let mut talk = Talk::started(Settings { structured, extended, ..Settings::default() }, FIXED);
        let mut says = |option| kinds(&talk.option(option, b"").unwrap());
        let answer = |offered| [if offered { rep::ACK } else { rep::ERR_UNSUP }];
        assert_eq!(says(opt::STRUCTURED_REPLY), answer(structured));
        assert_eq!(says(opt::EXTENDED_HEADERS), answer(extended));
    }
}

#[test]
fn tls_begins_anew() {
    let allow = Settings { tls: Tls::Allow, ..Settings::default() };
    let mut talk = Talk::started(allow, FIXED);
    talk.option(opt::EXTENDED_HEADERS, b"").unwrap();
    talk.option(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])).unwrap();
    // What comes behind STARTTLS is not looked at.
    let stream = [request(opt::STARTTLS, b""), request(opt::GO, &info_data("disk", &[]))].concat();
    assert_eq!(kinds(&parse(&talk.send(&stream).unwrap())), [rep::ACK]);
    assert_eq!(talk.haggle.outcome(), Some(&Outcome::StartTls));
    assert_eq!(talk.haggle.missing(b""), 0);
    talk.haggle.encrypted();
    assert_eq!(talk.haggle.outcome(), None);
    assert_eq!(kinds(&talk.option(opt::STARTTLS, b"").unwrap()), [rep::ERR_INVALID]);
    talk.option(opt::GO, &info_data("disk", &[])).unwrap();
    assert_eq!((chosen(&talk).agreed, chosen(&talk).flags), (Agreed::default(), FLAGS));
    // It can be done without, and cannot be had everywhere.
    let mut talk = Talk::started(allow, FIXED);
    talk.option(opt::GO, &info_data("disk", &[])).unwrap();
    assert!(talk.haggle.outcome().is_some());
}

#[test]
fn where_tls_is_required_nothing_else_is_answered() {
    let require = Settings { tls: Tls::Require, ..Settings::default() };
    let mut talk = Talk::started(require, FIXED);
    for option in (3..12).chain([99]).filter(|o| *o != opt::STARTTLS) {
        assert_eq!(kinds(&talk.option(option, b"\xff").unwrap()), [rep::ERR_TLS_REQD], "{option}");
    }
    assert_eq!(kinds(&talk.option(opt::STARTTLS, b"x").unwrap()), [rep::ERR_INVALID]);
    assert_eq!(kinds(&talk.option(opt::STARTTLS, b"").unwrap()), [rep::ACK]);
    talk.haggle.encrypted();
    assert_eq!(kinds(&talk.option(opt::INFO, &info_data("disk", &[])).unwrap()), [rep::INFO, rep::ACK]);
    let mut talk = Talk::started(require, FIXED);
    assert!(
        matches!(talk.option(opt::EXPORT_NAME, b"disk"), Err(Error::ExportName(_, why)) if why.contains("TLS"))
    );
    let mut talk = Talk::started(require, FIXED);
    assert_eq!(kinds(&talk.option(opt::ABORT, b"").unwrap()), [rep::ACK]);
}

#[test]
fn oldstyle_says_everything_at_once() {
    let mut talk = Talk::new(Settings { style: Style::Oldstyle, ..Settings::default() });
    assert_eq!(talk.drain(), b"");
    let golden = b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\x10\0\0\0\0\x01\x6d";
    assert_eq!(talk.send(b"").unwrap(), [golden.as_slice(), &[0; 124]].concat());
    assert_eq!((chosen(&talk).export, chosen(&talk).option), (4, 0));
    assert_eq!(chosen(&talk).agreed, Agreed::default());
    // The first request is none of the handshake's business.
    assert_eq!(talk.haggle.handle_input(b"\x25\x60\x95\x13", &talk.shelf), Ok(0));
}

#[test]
fn in_1997_nobody_says_anything() {
    let style = Style::Original { reply_magic: ORIGINAL_REPLY_MAGIC };
    let mut talk = Talk::new(Settings { style, ..Settings::default() });
    assert_eq!(talk.send(b"").unwrap(), b"");
    let framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };
    assert_eq!(chosen(&talk).agreed, Agreed { framing, allocation: false });
    assert_eq!(chosen(&talk).flags, TransmissionFlags(0));

    struct One(u64);
    impl Catalog for One {
        fn next(&self, _: Option<&str>) -> Option<Export<'_>> {
            None
        }
        fn find(&self, _: &str) -> Result<Export<'_>, Refusal> {
            let flags = FLAGS | TransmissionFlags::READ_ONLY;
            match self.0 {
                0 => Err(Refusal::Unknown),
                size => Ok(Export { id: 1, name: "one", description: "", size, flags, sizes: SIZES }),
            }
        }
    }
    let begin = |style, size| {
        let mut haggle = ServerHaggle::new(Settings { style, ..Settings::default() });
        haggle.handle_input(b"", &One(size)).map(|_| haggle)
    };
    assert!(matches!(begin(style, 1 << 32).unwrap().outcome(),
        Some(Outcome::Transmission(c)) if c.flags == TransmissionFlags::READ_ONLY));
    let too_large = begin(style, (1 << 32) + 512).unwrap_err();
    assert!(too_large.to_string().contains("4294967296 are the most"), "{too_large}");
    assert!(begin(Style::Oldstyle, 1 << 40).is_ok());
    for style in [style, Style::Oldstyle] {
        assert!(matches!(begin(style, 0), Err(Error::NoExport(why)) if why.contains("no default export")));
    }
}

/// A transport that reads what is missing gets through, and leaves the first request in the socket.
#[test]
fn only_what_is_missing_needs_to_be_read() {
    let mut talk = Talk::new(Settings::default());
    let options = [
        request(opt::LIST, b""),
        request(99, &vec![0; MAX_INPUT * 2]),
        request(opt::GO, &info_data("disk", &[3])),
    ];
    let stream = [FIXED.to_be_bytes().as_slice(), &options.concat(), b"transmission"].concat();
    let (mut read, mut input) = (0, Vec::new());
    while talk.haggle.outcome().is_none() {
        talk.drain();
        let used = talk.haggle.handle_input(&input, &talk.shelf).unwrap();
        input.drain(..used);
        if used == 0 && talk.haggle.transmit().is_empty() && talk.haggle.outcome().is_none() {
            let n = talk.haggle.missing(&input);
            assert!(n > 0 && input.len() + n <= MAX_INPUT);
            input.extend_from_slice(&stream[read..read + n]);
            read += n;
        }
    }
    assert_eq!((&stream[read..], input.len()), (b"transmission".as_slice(), 0));
    assert_eq!(talk.haggle.missing(b""), 0);
}

/// Feeds `stream` in pieces of the given sizes and returns all that was said, and how it ended.
fn in_pieces(stream: &[u8], pieces: &[usize]) -> (Vec<u8>, Result<Option<Outcome>, Error>) {
    let shelf = Shelf::new();
    let mut haggle = ServerHaggle::new(Settings::default());
    let (mut have, mut used, mut said) = (0, 0, Vec::new());
    let mut pieces = pieces.iter().copied().chain(std::iter::repeat(1));
    loop {
        let n = match haggle.handle_input(&stream[used..have], &shelf) {
            Ok(n) => n,
            Err(e) => return (said, Err(e)),
        };
        used += n;
        assert!(used <= have && haggle.transmit().len() <= MAX_OUTPUT);
        let out = haggle.transmit().len().min(pieces.next().unwrap_or(1).max(1));
        said.extend_from_slice(&haggle.transmit()[..out]);
        haggle.transmitted(out);
        if let Some(outcome) = haggle.outcome() {
            return (said, Ok(Some(outcome.clone())));
        }
        if n == 0 && out == 0 {
            if have == stream.len() {
                return (said, Ok(None));
            }
            assert!(have - used <= MAX_INPUT, "wants more than the transport must hold");
            let piece = pieces.next().unwrap_or(1).max(1);
            have = have.saturating_add(piece).min(stream.len()).min(used + MAX_INPUT);
        }
    }
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop::sample::select(vec!["", "disk", "large", "gone", "closed", "ä"]);
    let types = prop::collection::vec(0u16..5, 0..4);
    prop_oneof![
        4 => (6u32..8, name, types).prop_map(|(o, n, t)| request(o, &info_data(n, &t))),
        2 => (0u32..14, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(o, d)| request(o, &d)),
        1 => Just(request(opt::LIST, b"")),
        2 => (0usize..4).prop_map(|i| request([opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS, opt::STARTTLS, 2][i], b"")),
        2 => (9u32..11, prop::sample::select(vec!["disk", "gone"]), 0usize..4).prop_map(|(o, n, q)| {
            request(o, &meta_data(n, &["base:", "base:allocation", "x", "a:b"][..q]))
        }),
        1 => (6000usize..9000).prop_map(|n| request(opt::GO, &vec![0; n])),
        1 => prop::collection::vec(any::<u8>(), 0..30),
    ]
}

proptest! {
    #[test]
    fn pieces_make_no_difference(
        flags in prop_oneof![4 => Just(FIXED), 1 => 0u32..5],
        options in prop::collection::vec(any_option(), 0..8),
        pieces in prop::collection::vec(1usize..300, 0..100),
    ) {
        let stream = [flags.to_be_bytes().to_vec(), options.concat()].concat();
        let whole = in_pieces(&stream, &[usize::MAX; 1000]);
        prop_assert_eq!(in_pieces(&stream, &pieces), whole);
    }

    #[test]
    fn every_accepted_option_ends_in_one_final_reply(options in prop::collection::vec(any_option(), 0..8)) {
        let mut talk = Talk::started(Settings::default(), FIXED);
        for option in options {
            let Ok((header, data)) = OptionHeader::ref_from_prefix(option.as_slice()) else { continue };
            if header.magic.get() != IHAVEOPT || header.option.get() == opt::EXPORT_NAME { continue }
            let replies = talk.option(header.option.get(), data).unwrap();
            let (last, others) = replies.split_last().unwrap();
            prop_assert!(last.kind == rep::ACK || last.kind & rep::ERROR != 0);
            prop_assert!(others.iter().all(|r| [rep::SERVER, rep::INFO, rep::META_CONTEXT].contains(&r.kind)));
            if talk.haggle.outcome().is_some() { break }
        }
    }
}

//! Option requests of a client: bytes in, what they ask for out.

use std::fmt;

use super::wire::{BASE_ALLOCATION, MAX_STRING, info, opt, rep};

/// What a client asks for. Borrowed from its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionRequest<'a> {
    /// This export, without any way to refuse but hanging up.
    ExportName(&'a str),
    /// The end of the session.
    Abort,
    /// Names of exports.
    List,
    /// About an export.
    Info(InfoRequest<'a>),
    /// This export.
    Go(InfoRequest<'a>),
    /// TLS from here on.
    StartTls,
    /// Replies in chunks.
    StructuredReply,
    /// 64-bit lengths, and replies in chunks.
    ExtendedHeaders,
    /// Which metadata contexts an export has.
    ListMetaContext(MetaRequest<'a>),
    /// Which of them are wanted.
    SetMetaContext(MetaRequest<'a>),
    /// Known to nobody here: withdrawn, unknown, or not implemented. Its data was not looked at.
    Other(u32),
}

/// Data of INFO and GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export; empty for the default one.
    pub name: &'a str,
    /// Information asked for. EXPORT is always given, unknown types are ignored.
    pub wanted: Wanted,
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT: what the queries have to do with `base:allocation`, the only context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export; empty for the default one.
    pub name: &'a str,
    /// Queries.
    pub queries: u32,
    /// `base:allocation` is one of them.
    pub allocation: bool,
    /// `base:`, all of that name space, is one of them.
    pub base: bool,
}

/// Set of information types that a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// NAME.
    pub name: bool,
    /// DESCRIPTION.
    pub description: bool,
    /// BLOCK_SIZE: the client will respect the sizes that it is told.
    pub block_size: bool,
}

/// Why an option's data is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Data where there must be none, bytes.
    UnexpectedData(usize),
    /// Shorter than its fixed fields, bytes.
    TooShort(usize),
    /// The length of a string leaves no room for the rest.
    StringLength {
        /// As stated.
        len: u32,
        /// Bytes that the data has for it.
        room: usize,
    },
    /// A query that does not begin with a name space and a colon.
    NoNamespace,
    /// Fewer queries than stated, or bytes behind the last.
    QueryCount {
        /// As stated.
        count: u32,
        /// Bytes too many; 0 if queries are missing.
        bytes: usize,
    },
    /// Longer than [`MAX_STRING`], bytes.
    NameTooLong(usize),
    /// Not UTF-8.
    NotUtf8,
    /// With a NUL in it.
    Nul,
    /// The number of information requests does not fit the bytes that follow.
    InfoCount {
        /// As stated.
        count: u16,
        /// Bytes that follow.
        bytes: usize,
    },
}

impl Malformed {
    /// The error reply for it.
    pub fn reply(self) -> u32 {
        match self {
            Self::NameTooLong(_) => rep::ERR_TOO_BIG,
            _ => rep::ERR_INVALID,
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnexpectedData(len) => write!(f, "{len} bytes of data where there must be none"),
            Self::TooShort(len) => write!(f, "{len} bytes of data are too few for this option"),
            Self::StringLength { len, room } => {
                write!(f, "a name or query of {len} bytes in data with room for {room}")
            }
            Self::NoNamespace => {
                f.write_str("a query without a name space; base:allocation would be one with it")
            }
            Self::QueryCount { count, bytes: 0 } => write!(f, "fewer than the {count} queries announced"),
            Self::QueryCount { count, bytes } => write!(f, "{bytes} bytes behind {count} queries"),
            Self::NameTooLong(len) => {
                write!(f, "a name or query of {len} bytes; at most {MAX_STRING} are possible")
            }
            Self::NotUtf8 => f.write_str("a name or query that is not UTF-8"),
            Self::Nul => f.write_str("a name or query with a NUL byte"),
            Self::InfoCount { count, bytes } => {
                write!(f, "{count} information requests in {bytes} bytes; each has 2")
            }
        }
    }
}

impl<'a> OptionRequest<'a> {
    /// The request `option` with all of its `data`.
    ///
    /// # Errors
    /// The data is not what the option has.
    pub fn parse(option: u32, data: &'a [u8]) -> Result<Self, Malformed> {
        match option {
            opt::EXPORT_NAME => name(data).map(Self::ExportName),
            // Its sender is gone or going: nothing is gained by refusing data.
            opt::ABORT => Ok(Self::Abort),
            opt::LIST => no_data(data).map(|()| Self::List),
            opt::INFO => InfoRequest::parse(data).map(Self::Info),
            opt::GO => InfoRequest::parse(data).map(Self::Go),
            opt::STARTTLS => no_data(data).map(|()| Self::StartTls),
            opt::STRUCTURED_REPLY => no_data(data).map(|()| Self::StructuredReply),
            opt::EXTENDED_HEADERS => no_data(data).map(|()| Self::ExtendedHeaders),
            opt::LIST_META_CONTEXT => MetaRequest::parse(data).map(Self::ListMetaContext),
            opt::SET_META_CONTEXT => MetaRequest::parse(data).map(Self::SetMetaContext),
            _ => Ok(Self::Other(option)),
        }
    }
}

impl<'a> InfoRequest<'a> {
    /// `u32` length of the name, name, `u16` count, as many `u16` types.
    fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let (len, rest) = data.split_first_chunk::<4>().ok_or(Malformed::TooShort(data.len()))?;
        let len = u32::from_be_bytes(*len);
        let room = rest.len().checked_sub(2).ok_or(Malformed::TooShort(data.len()))?;
        if len as usize > room {
            return Err(Malformed::StringLength { len, room });
        }
        let (bytes, rest) = rest.split_at(len as usize);
        let (count, types) = rest.split_first_chunk::<2>().ok_or(Malformed::TooShort(data.len()))?;
        let count = u16::from_be_bytes(*count);
        if types.len() != usize::from(count) * 2 {
            return Err(Malformed::InfoCount { count, bytes: types.len() });
        }
        Ok(Self { name: name(bytes)?, wanted: Wanted::of(types) })
    }
}

impl<'a> MetaRequest<'a> {
    /// `u32` length of the name, name, `u32` count, as many queries: `u32` length, query.
    fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let (bytes, rest) = string(data, data.len())?;
        let (count, mut rest) = rest.split_first_chunk::<4>().ok_or(Malformed::TooShort(data.len()))?;
        let count = u32::from_be_bytes(*count);
        let mut request = Self { name: name(bytes)?, queries: count, allocation: false, base: false };
        // Every query takes four bytes at least, so this ends with the data whatever the count says.
        for _ in 0..count {
            if rest.is_empty() {
                return Err(Malformed::QueryCount { count, bytes: 0 });
            }
            let (query, behind) = string(rest, data.len())?;
            request.query(name(query)?)?;
            rest = behind;
        }
        if rest.is_empty() { Ok(request) } else { Err(Malformed::QueryCount { count, bytes: rest.len() }) }
    }

    fn query(&mut self, query: &str) -> Result<(), Malformed> {
        if !query.contains(':') {
            return Err(Malformed::NoNamespace);
        }
        self.allocation |= query == BASE_ALLOCATION;
        self.base |= query == "base:";
        Ok(())
    }
}

/// A string behind its `u32` length, and what follows. `total`: bytes of the option, for the error.
fn string(data: &[u8], total: usize) -> Result<(&[u8], &[u8]), Malformed> {
    let (len, rest) = data.split_first_chunk::<4>().ok_or(Malformed::TooShort(total))?;
    let len = u32::from_be_bytes(*len);
    rest.split_at_checked(len as usize).ok_or(Malformed::StringLength { len, room: rest.len() })
}

impl Wanted {
    fn of(types: &[u8]) -> Self {
        let mut wanted = Self::default();
        for kind in types.chunks_exact(2) {
            match u16::from_be_bytes([kind[0], kind[1]]) {
                info::NAME => wanted.name = true,
                info::DESCRIPTION => wanted.description = true,
                info::BLOCK_SIZE => wanted.block_size = true,
                _ => {}
            }
        }
        wanted
    }
}

fn no_data(data: &[u8]) -> Result<(), Malformed> {
    if data.is_empty() { Ok(()) } else { Err(Malformed::UnexpectedData(data.len())) }
}

fn name(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed::NameTooLong(bytes.len()));
    }
    let name = std::str::from_utf8(bytes).map_err(|_| Malformed::NotUtf8)?;
    if name.contains('\0') { Err(Malformed::Nul) } else { Ok(name) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info_data(len: u32, name: &[u8], count: u16, types: &[u16]) -> Vec<u8> {
        let mut data = len.to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&count.to_be_bytes());
        types.iter().for_each(|t| data.extend_from_slice(&t.to_be_bytes()));
        data
    }

    fn meta_data(name: &[u8], count: u32, queries: &[&str]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&count.to_be_bytes());
        for query in queries {
            data.extend_from_slice(&(query.len() as u32).to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        data
    }

    #[test]
    fn well_formed() {
        use OptionRequest::*;
        let wanted = Wanted { name: true, description: false, block_size: true };
        let go = info_data(4, b"disk", 4, &[0, 3, 99, 1]);
        assert_eq!(OptionRequest::parse(opt::GO, &go), Ok(Go(InfoRequest { name: "disk", wanted })));
        let info = info_data(0, b"", 0, &[]);
        let plain = InfoRequest { name: "", wanted: Wanted::default() };
        assert_eq!(OptionRequest::parse(opt::INFO, &info), Ok(Info(plain)));
        assert_eq!(OptionRequest::parse(opt::EXPORT_NAME, "dísk".as_bytes()), Ok(ExportName("dísk")));
        assert_eq!(OptionRequest::parse(opt::ABORT, b"why"), Ok(Abort));
        assert_eq!(OptionRequest::parse(opt::LIST, b""), Ok(List));
        assert_eq!(OptionRequest::parse(opt::STARTTLS, b""), Ok(StartTls));
        assert_eq!(OptionRequest::parse(opt::STRUCTURED_REPLY, b""), Ok(StructuredReply));
        assert_eq!(OptionRequest::parse(opt::EXTENDED_HEADERS, b""), Ok(ExtendedHeaders));
        for option in [opt::PEEK_EXPORT, 77] {
            assert_eq!(OptionRequest::parse(option, b"anything"), Ok(Other(option)));
        }
        let meta = |queries, allocation, base| MetaRequest { name: "disk", queries, allocation, base };
        for (queries, right) in [
            (&[] as &[&str], meta(0, false, false)),
            (&["base:allocation"], meta(1, true, false)),
            (&["base:", "x-other:", "base:allocation", "base:allocation"], meta(4, true, true)),
            (&["base:allocations", ":", "qemu:dirty-bitmap:b0"], meta(3, false, false)),
        ] {
            let data = meta_data(b"disk", queries.len() as u32, queries);
            assert_eq!(OptionRequest::parse(opt::LIST_META_CONTEXT, &data), Ok(ListMetaContext(right)));
            assert_eq!(OptionRequest::parse(opt::SET_META_CONTEXT, &data), Ok(SetMetaContext(right)));
        }
        let longest = "x".repeat(MAX_STRING);
        assert_eq!(OptionRequest::parse(opt::EXPORT_NAME, longest.as_bytes()), Ok(ExportName(&longest)));
    }

    #[test]
    fn malformed() {
        use Malformed::*;
        let long = vec![b'x'; MAX_STRING + 1];
        let cases: &[(u32, Vec<u8>, Malformed)] = &[
            (opt::LIST, b"x".to_vec(), UnexpectedData(1)),
            (opt::STRUCTURED_REPLY, vec![0; 9], UnexpectedData(9)),
            (opt::STARTTLS, vec![0; 2], UnexpectedData(2)),
            (opt::INFO, vec![], TooShort(0)),
            (opt::GO, vec![0; 3], TooShort(3)),
            (opt::GO, vec![0; 5], TooShort(5)),
            (opt::GO, info_data(5, b"disk", 0, &[]), StringLength { len: 5, room: 4 }),
            (opt::GO, info_data(u32::MAX, b"disk", 0, &[]), StringLength { len: u32::MAX, room: 4 }),
            (opt::EXTENDED_HEADERS, vec![0; 4], UnexpectedData(4)),
            (opt::SET_META_CONTEXT, vec![], TooShort(0)),
            (opt::SET_META_CONTEXT, vec![0; 3], TooShort(3)),
            (opt::SET_META_CONTEXT, vec![0; 7], TooShort(7)),
            (opt::LIST_META_CONTEXT, vec![0, 0, 0, 9, 1], StringLength { len: 9, room: 1 }),
            (opt::LIST_META_CONTEXT, meta_data(b"\xff", 0, &[]), NotUtf8),
            (opt::LIST_META_CONTEXT, meta_data(b"", 1, &["a:\0"]), Nul),
            (opt::SET_META_CONTEXT, meta_data(b"", 1, &["base"]), NoNamespace),
            (opt::SET_META_CONTEXT, meta_data(b"", 1, &[""]), NoNamespace),
            (opt::SET_META_CONTEXT, meta_data(b"", 2, &["a:b"]), QueryCount { count: 2, bytes: 0 }),
            (
                opt::SET_META_CONTEXT,
                meta_data(b"", u32::MAX, &["a:b"]),
                QueryCount { count: u32::MAX, bytes: 0 },
            ),
            (opt::SET_META_CONTEXT, meta_data(b"", 0, &["a:b"]), QueryCount { count: 0, bytes: 7 }),
            (
                opt::SET_META_CONTEXT,
                vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, b':'],
                StringLength { len: 5, room: 1 },
            ),
            (opt::SET_META_CONTEXT, vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0], TooShort(10)),
            (opt::SET_META_CONTEXT, meta_data(&long, 0, &[]), NameTooLong(MAX_STRING + 1)),
            // One byte is missing from the name, so its first two bytes of the count are read one too early.
            (opt::INFO, info_data(3, b"disk", 0, &[]), InfoCount { count: 0x6b00, bytes: 1 }),
            (opt::GO, info_data(4, b"disk", 2, &[3]), InfoCount { count: 2, bytes: 2 }),
            (opt::GO, info_data(4, b"disk", 0, &[3]), InfoCount { count: 0, bytes: 2 }),
            (opt::GO, info_data(4, b"disk", u16::MAX, &[]), InfoCount { count: u16::MAX, bytes: 0 }),
            (opt::GO, info_data(2, b"\xff\xfe", 0, &[]), NotUtf8),
            (opt::EXPORT_NAME, b"\xc3".to_vec(), NotUtf8),
            (opt::EXPORT_NAME, b"a\0b".to_vec(), Nul),
            (opt::INFO, info_data(1, b"\0", 0, &[]), Nul),
            (opt::EXPORT_NAME, long.clone(), NameTooLong(MAX_STRING + 1)),
            (opt::GO, info_data(4097, &long, 0, &[]), NameTooLong(MAX_STRING + 1)),
        ];
        for (option, data, why) in cases {
            assert_eq!(OptionRequest::parse(*option, data), Err(*why), "option {option}");
            let right = if matches!(why, NameTooLong(_)) { rep::ERR_TOO_BIG } else { rep::ERR_INVALID };
            assert_eq!(why.reply(), right);
            assert!(!why.to_string().is_empty());
        }
    }

    proptest! {
        #[test]
        fn info_requests_survive_the_wire(name in "[^\0]{0,40}", types in prop::collection::vec(0u16..6, 0..20)) {
            let data = info_data(name.len() as u32, name.as_bytes(), types.len() as u16, &types);
            let Ok(OptionRequest::Go(request)) = OptionRequest::parse(opt::GO, &data) else {
                panic!("refused {data:?}")
            };
            prop_assert_eq!(request.name, &name);
            prop_assert_eq!(request.wanted.block_size, types.contains(&info::BLOCK_SIZE));
            // Every other length of the same bytes is malformed.
            prop_assert!(OptionRequest::parse(opt::GO, &data[..data.len() - 1]).is_err());
        }

        #[test]
        fn any_bytes_have_an_answer(option in 0u32..16, data in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(OptionRequest::Info(r) | OptionRequest::Go(r)) = OptionRequest::parse(option, &data) {
                prop_assert!(r.name.len() + 6 <= data.len());
            }
        }
    }
}

//! Messages of the handshake, byte for byte (NBD `doc/proto.md`, "Newstyle negotiation", "Fixed newstyle negotiation",
//! "Values").
//!
//! Every integer is big-endian. Any bytes of the right length are a value of these types; what makes sense is decided
//! by `option` and `server`.

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `INIT_PASSWD`: the first eight bytes of every server, "NBDMAGIC".
pub const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second word of a newstyle greeting and first of every option request, "IHAVEOPT".
pub const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second word of an oldstyle greeting, `cliserv_magic`.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Port assigned by IANA.
pub const NBD_PORT: u16 = 10809;
/// Longest string of the protocol, bytes ("Conventions").
pub const MAX_STRING: usize = 4096;
/// Reserved bytes at the end of an EXPORT_NAME answer, unless both sides set NO_ZEROES.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// [`Greeting::flags`]: options other than EXPORT_NAME are answered.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// [`Greeting::flags`]: the server can leave out [`EXPORT_NAME_ZEROES`].
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// [`ClientFlags::flags`]: as [`FLAG_FIXED_NEWSTYLE`].
pub const FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// [`ClientFlags::flags`]: as [`FLAG_NO_ZEROES`].
pub const FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Options (`NBD_OPT_*`).
pub mod opt {
    /// Chooses an export and ends the handshake; has no way to say no but to hang up.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the session.
    pub const ABORT: u32 = 2;
    /// Names of exports.
    pub const LIST: u32 = 3;
    /// Withdrawn.
    pub const PEEK_EXPORT: u32 = 4;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// About one export.
    pub const INFO: u32 = 6;
    /// As INFO, and ends the handshake.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Metadata contexts wanted.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Reply types (`NBD_REP_*`).
pub mod rep {
    /// The option is done.
    pub const ACK: u32 = 1;
    /// One export of LIST.
    pub const SERVER: u32 = 2;
    /// One piece of information of INFO and GO.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error; its data is text for a person.
    pub const ERROR: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// Forbidden here.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// Malformed.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is about to end.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// Ask for the block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// Request or reply too large.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Extended headers first.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Information types of INFO and GO (`NBD_INFO_*`).
pub mod info {
    /// [`super::InfoExport`]; always sent.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// [`super::InfoBlockSize`].
    pub const BLOCK_SIZE: u16 = 3;
}

/// Name of the metadata context that tells holes from data ("Metadata contexts" → "base:allocation").
pub const BASE_ALLOCATION: &str = "base:allocation";

/// First message of a newstyle server, 18 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`NBDMAGIC`].
    pub magic: U64,
    /// [`IHAVEOPT`].
    pub style: U64,
    /// `FLAG_*`.
    pub flags: U16,
}

/// All that an oldstyle server says before the transmission, 152 bytes; it reads nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OldGreeting {
    /// [`NBDMAGIC`].
    pub magic: U64,
    /// [`OLDSTYLE_MAGIC`].
    pub style: U64,
    /// Of the only export, bytes.
    pub size: U64,
    /// Reserved: 0.
    pub global_flags: U16,
    /// Transmission flags; 0 from servers that know none.
    pub flags: U16,
    /// Reserved.
    pub zeroes: [u8; EXPORT_NAME_ZEROES],
}

/// The client's answer to it, 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ClientFlags {
    /// `FLAG_C_*`.
    pub flags: U32,
}

/// Head of an option request, 16 bytes; `len` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`IHAVEOPT`].
    pub magic: U64,
    /// One of [`opt`].
    pub option: U32,
    /// Bytes of data.
    pub len: U32,
}

/// Head of a reply to an option, 20 bytes; `len` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// One of [`rep`].
    pub kind: U32,
    /// Bytes of data.
    pub len: U32,
}

/// Answer to EXPORT_NAME, 10 bytes without the reserved ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExportNameReply {
    /// Of the export, bytes.
    pub size: U64,
    /// Transmission flags.
    pub flags: U16,
}

/// Data of an INFO reply of type EXPORT, 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InfoExport {
    /// [`info::EXPORT`].
    pub kind: U16,
    /// Of the export, bytes.
    pub size: U64,
    /// Transmission flags.
    pub flags: U16,
}

/// Data of an INFO reply of type BLOCK_SIZE, 14 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InfoBlockSize {
    /// [`info::BLOCK_SIZE`].
    pub kind: U16,
    /// Smallest unit and alignment of a request, bytes: a power of two up to 65536.
    pub minimum: U32,
    /// From here on efficient, bytes: a power of two, at least 512 and `minimum`.
    pub preferred: U32,
    /// Most bytes of data in a READ or WRITE.
    pub max_payload: U32,
}

const _: () = assert!(size_of::<Greeting>() == 18 && offset_of!(Greeting, flags) == 16);
const _: () = assert!(size_of::<OldGreeting>() == 152 && offset_of!(OldGreeting, flags) == 26);
const _: () = assert!(size_of::<OptionHeader>() == 16 && offset_of!(OptionHeader, len) == 12);
const _: () = assert!(size_of::<ReplyHeader>() == 20 && offset_of!(ReplyHeader, kind) == 12);
const _: () = assert!(size_of::<ExportNameReply>() == 10 && size_of::<InfoExport>() == 12);
const _: () = assert!(size_of::<InfoBlockSize>() == 14 && offset_of!(InfoBlockSize, max_payload) == 10);

/// The option's name, for logs; "option" for unknown ones.
pub fn option_name(option: u32) -> &'static str {
    match option {
        opt::EXPORT_NAME => "EXPORT_NAME",
        opt::ABORT => "ABORT",
        opt::LIST => "LIST",
        opt::PEEK_EXPORT => "PEEK_EXPORT",
        opt::STARTTLS => "STARTTLS",
        opt::INFO => "INFO",
        opt::GO => "GO",
        opt::STRUCTURED_REPLY => "STRUCTURED_REPLY",
        opt::LIST_META_CONTEXT => "LIST_META_CONTEXT",
        opt::SET_META_CONTEXT => "SET_META_CONTEXT",
        opt::EXTENDED_HEADERS => "EXTENDED_HEADERS",
        _ => "option",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let greeting = Greeting {
            magic: NBDMAGIC.into(),
            style: IHAVEOPT.into(),
            flags: (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).into(),
        };
        assert_eq!(greeting.as_bytes(), b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!((NBDMAGIC, IHAVEOPT), (0x4e42_444d_4147_4943, 0x4948_4156_454f_5054));
        let old = OldGreeting {
            magic: NBDMAGIC.into(),
            style: OLDSTYLE_MAGIC.into(),
            size: 0x0102_0304.into(),
            global_flags: 0.into(),
            flags: 0x8765.into(),
            zeroes: [0; EXPORT_NAME_ZEROES],
        };
        let golden =
            b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00\x00\x00\x01\x02\x03\x04\x00\x00\x87\x65";
        assert_eq!(old.as_bytes(), [golden.as_slice(), &[0; 124]].concat());
        let option = OptionHeader { magic: IHAVEOPT.into(), option: opt::GO.into(), len: 258.into() };
        assert_eq!(option.as_bytes(), b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x01\x02");
        let reply = ReplyHeader {
            magic: OPTION_REPLY_MAGIC.into(),
            option: opt::LIST.into(),
            kind: rep::ERR_POLICY.into(),
            len: 5.into(),
        };
        let golden = b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x02\x00\x00\x00\x05";
        assert_eq!(reply.as_bytes(), golden);
        let export = InfoExport { kind: info::EXPORT.into(), size: (1 << 40).into(), flags: 0x16d.into() };
        assert_eq!(export.as_bytes(), b"\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x01\x6d");
        let sizes = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: 512.into(),
            preferred: 4096.into(),
            max_payload: (32 << 20).into(),
        };
        assert_eq!(sizes.as_bytes(), b"\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00");
    }
}

//! How a server takes one request apart (`rtrs-srv.c`, `process_io_req`, `process_read`, `process_write`).
//!
//! ```text
//!  WRITE  chunk+0 [ data ][ user message ][ MsgRdmaWrite ]
//!  READ   chunk+0 [ hole ][ user message ][ MsgRdmaRead, 0 or 1 SgDesc ]
//!                         ^ data_len      ^ off, from the immediate
//! ```
//!
//! The client can write the chunk at any time, so the transport copies [`HDR_COPY_LEN`] bytes at `off` first and
//! gives the copy to [`Request::decode`]; it then copies the user message before anyone looks at it.
//!
//! The kernel server silently drops several kinds of bad request, which then hang forever, as clients have no
//! timeout. Here each is either answered with an errno or, if it shows that both sides disagree about the very
//! protocol, ends the path.

use std::fmt;

use zerocopy::FromBytes;

use crate::errno::Errno;
use crate::imm::ImmError;
use crate::limits::Geometry;
use crate::wire::{MAX_REQ_HDR_LEN, MSG_NEED_INVAL_F, MsgRdmaRead, MsgRdmaWrite, SgDesc, msg_type};

/// Bytes to copy from the chunk at `off`, fewer if the chunk ends before.
pub const HDR_COPY_LEN: usize = MAX_REQ_HDR_LEN;
/// Longest user message that is taken; RNBD's longest is 264 bytes.
pub const MAX_USR_LEN: u16 = 4096;

/// The RTRS header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// The request brings its data.
    Write {
        /// Bytes of the user message.
        usr_len: u16,
    },
    /// The request may be answered with data.
    Read {
        /// Bytes of the user message.
        usr_len: u16,
        /// Where to; `None` for requests without data, such as a flush.
        desc: Option<SgDesc>,
        /// The client would like its key invalidated. Only ever set together with `desc`.
        need_inval: bool,
    },
}

impl Header {
    /// Reads a header from a copy of the bytes at the immediate's offset. `avail`: how many bytes of `copy` lie
    /// within the chunk (the rest is not looked at).
    ///
    /// # Errors
    /// [`Refused`], with a bad type or length of header, or more than one descriptor.
    pub fn parse(copy: &[u8; HDR_COPY_LEN], avail: usize) -> Result<Header, Refused> {
        let bytes = &copy[..avail.min(HDR_COPY_LEN)];
        let cut = Refused::new(Problem::HeaderCut { avail: bytes.len() });
        let (hdr, _) = MsgRdmaWrite::ref_from_prefix(bytes).map_err(|_| cut)?;
        match hdr.msg_type.get() {
            msg_type::WRITE => Ok(Header::Write { usr_len: hdr.usr_len.get() }),
            msg_type::READ => Header::parse_read(bytes).ok_or(cut)?,
            other => Err(Refused::new(Problem::Type(other))),
        }
    }

    /// `None` if the chunk ends within the header.
    fn parse_read(bytes: &[u8]) -> Option<Result<Header, Refused>> {
        let (hdr, rest) = MsgRdmaRead::ref_from_prefix(bytes).ok()?;
        let desc = match hdr.sg_cnt.get() {
            0 => None,
            1 => Some(SgDesc::read_from_prefix(rest).ok()?.0),
            more => return Some(Err(Refused::new(Problem::SgCnt(more)))),
        };
        let need_inval = desc.is_some() && hdr.flags.get() & MSG_NEED_INVAL_F != 0;
        Some(Ok(Header::Read { usr_len: hdr.usr_len.get(), desc, need_inval }))
    }

    const fn usr_len(&self) -> u16 {
        match *self {
            Header::Write { usr_len } | Header::Read { usr_len, .. } => usr_len,
        }
    }

    const fn direction(&self) -> Direction {
        match *self {
            Header::Write { .. } => Direction::Write,
            Header::Read { desc, need_inval, .. } => Direction::Read { desc, need_inval },
        }
    }
}

/// Which way the data of a request goes. A transport notion: RNBD sends its flush as a read without descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the server: it lies at the start of the chunk.
    Write,
    /// To the client, on success: from the start of the chunk.
    Read {
        /// The client's buffer; its length is 1..=`data_len`.
        desc: Option<SgDesc>,
        /// The client would like SEND_WITH_INV for `desc`'s key.
        need_inval: bool,
    },
}

impl Direction {
    /// The key that the client would like to see invalidated with the answer.
    pub const fn inval_key(&self) -> Option<u32> {
        match *self {
            Direction::Read { desc: Some(desc), need_inval: true } => Some(desc.key.get()),
            _ => None,
        }
    }
}

/// One request whose parts lie within its chunk and do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Chunk and permit; names the request in its response.
    pub id: u16,
    /// Which way the data goes.
    pub direction: Direction,
    /// Bytes of data, or of room for it, at the start of the chunk. This is also where the user message starts.
    pub data_len: u32,
    /// Bytes of the user message, at most [`MAX_USR_LEN`].
    pub usr_len: u16,
}

impl Request {
    /// Bytes to copy for [`Request::decode`] from `off`, an offset that [`crate::imm::decode_at_server`] let pass.
    pub const fn hdr_copy_len(geometry: &Geometry, off: u32) -> usize {
        let avail = geometry.chunk_size().saturating_sub(off) as usize;
        if avail < HDR_COPY_LEN { avail } else { HDR_COPY_LEN }
    }

    /// Takes a request apart. `id`, `off`: from [`crate::imm::decode_at_server`]. `copy`: a private copy of the
    /// [`Request::hdr_copy_len`] bytes at `off` of chunk `id`.
    ///
    /// # Errors
    /// [`Refused`]: see [`Refused::action`].
    pub fn decode(
        geometry: &Geometry,
        id: u16,
        off: u32,
        copy: &[u8; HDR_COPY_LEN],
    ) -> Result<Request, Refused> {
        let header = Header::parse(copy, Request::hdr_copy_len(geometry, off))?;
        let direction = header.direction();
        let refuse = |problem| Err(Refused { problem, inval_key: direction.inval_key() });
        let usr_len = header.usr_len();
        if u32::from(usr_len) > off {
            return refuse(Problem::UsrBeforeChunk { usr_len, off });
        }
        if usr_len > MAX_USR_LEN || u32::from(usr_len) > geometry.max_hdr_size() {
            return refuse(Problem::UsrTooLong { usr_len });
        }
        let data_len = off - u32::from(usr_len);
        if let Direction::Read { desc: Some(desc), .. } = direction {
            let len = desc.len.get();
            if len == 0 || len > data_len {
                return refuse(Problem::DescLen { len, data_len });
            }
        }
        Ok(Request { id, direction, data_len, usr_len })
    }

    /// Offset of the user message in the chunk.
    pub const fn usr_off(&self) -> u32 {
        self.data_len
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Request { id, data_len, usr_len, .. } = self;
        match self.direction {
            Direction::Write => write!(f, "WRITE id {id} data {data_len} usr {usr_len}"),
            Direction::Read { desc: None, .. } => write!(f, "READ id {id} data {data_len} usr {usr_len}"),
            Direction::Read { desc: Some(desc), need_inval } => {
                let inval = if need_inval { " inval" } else { "" };
                write!(f, "READ id {id} data {data_len} usr {usr_len} to {desc}{inval}")
            }
        }
    }
}

/// A request that is not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct Refused {
    /// What is wrong.
    pub problem: Problem,
    /// The key the client would like to see invalidated with the answer, if it was legible.
    pub inval_key: Option<u32>,
}

/// What to do about a request that is not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Disconnect the whole path.
    ClosePath,
    /// Answer like any failed request; see [`crate::response::plan_refusal`].
    Answer(Errno),
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The immediate names no place in a chunk.
    #[error(transparent)]
    Imm(#[from] ImmError),
    /// The buffer id has a request in flight already. (The transport finds this; it keeps what is in flight.)
    #[error("buffer id {0} is still in use by an earlier request")]
    InFlight(u16),
    /// Neither read nor write.
    #[error("RTRS message type {0} is neither WRITE (2) nor READ (3)")]
    Type(u16),
    /// The chunk ends within the RTRS header.
    #[error("only {avail} bytes of the RTRS header lie within the chunk")]
    HeaderCut {
        /// Bytes up to the end of the chunk.
        avail: usize,
    },
    /// More than one descriptor.
    #[error("{0} descriptors: 0 or 1 supported")]
    SgCnt(u16),
    /// The user message would start before the chunk.
    #[error("user message of {usr_len} bytes does not fit before header offset {off}")]
    UsrBeforeChunk {
        /// From the header.
        usr_len: u16,
        /// From the immediate.
        off: u32,
    },
    /// The user message is longer than announced or than any message we know.
    #[error("user message of {usr_len} bytes is too long")]
    UsrTooLong {
        /// From the header.
        usr_len: u16,
    },
    /// The client's buffer is empty, or larger than the room for data, so that it would get bytes never read for it.
    #[error("descriptor of {len} bytes for {data_len} bytes of data")]
    DescLen {
        /// From the descriptor.
        len: u32,
        /// From immediate and header.
        data_len: u32,
    },
}

impl Refused {
    /// A refusal of a request whose descriptor is not known.
    pub const fn new(problem: Problem) -> Refused {
        Refused { problem, inval_key: None }
    }

    /// What to do about it.
    pub const fn action(&self) -> Action {
        match self.problem {
            Problem::Imm(_) | Problem::InFlight(_) | Problem::Type(_) => Action::ClosePath,
            Problem::UsrTooLong { .. } => Action::Answer(Errno::EMSGSIZE),
            Problem::HeaderCut { .. }
            | Problem::SgCnt(_)
            | Problem::UsrBeforeChunk { .. }
            | Problem::DescLen { .. } => Action::Answer(Errno::EINVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn read(usr_len: u16, flags: u16, sg_cnt: u16, len: u32) -> [u8; 24] {
        let hdr = MsgRdmaRead {
            msg_type: msg_type::READ.into(),
            usr_len: usr_len.into(),
            flags: flags.into(),
            sg_cnt: sg_cnt.into(),
        };
        let mut copy = [0xee; 24];
        copy[..8].copy_from_slice(hdr.as_bytes());
        copy[8..].copy_from_slice(SgDesc::new(0x1000, 0x77, len).as_bytes());
        copy
    }

    fn write(usr_len: u16) -> [u8; 24] {
        let mut copy = [0xee; 24];
        let hdr = MsgRdmaWrite { msg_type: msg_type::WRITE.into(), usr_len: usr_len.into() };
        copy[..4].copy_from_slice(hdr.as_bytes());
        copy
    }

    fn decode(off: u32, copy: &[u8; 24]) -> Result<Request, Refused> {
        Request::decode(&Geometry::default(), 5, off, copy)
    }

    fn answer(refused: Result<Request, Refused>) -> (Option<Errno>, Option<u32>) {
        let refused = refused.unwrap_err();
        match refused.action() {
            Action::ClosePath => (None, refused.inval_key),
            Action::Answer(errno) => (Some(errno), refused.inval_key),
        }
    }

    #[test]
    fn read_of_4_kib() {
        let r = decode(0x1020, &read(32, MSG_NEED_INVAL_F, 1, 4096)).unwrap();
        assert_eq!((r.data_len, r.usr_off(), r.usr_len), (4096, 4096, 32));
        assert_eq!(r.direction.inval_key(), Some(0x77));
        assert_eq!(r.to_string(), "READ id 5 data 4096 usr 32 to 0x1000+4096 key 0x77 inval");
    }

    #[test]
    fn write_of_4_kib() {
        let r = decode(0x1020, &write(32)).unwrap();
        assert_eq!(r, Request { id: 5, direction: Direction::Write, data_len: 4096, usr_len: 32 });
    }

    #[test]
    fn flush_is_a_read_without_descriptor() {
        let r = decode(32, &read(32, MSG_NEED_INVAL_F, 0, 0)).unwrap();
        assert_eq!(r.direction, Direction::Read { desc: None, need_inval: false });
        assert_eq!(r.data_len, 0);
    }

    #[test]
    fn unknown_types_close_the_path() {
        let mut copy = write(32);
        copy[0] = 4;
        assert_eq!(answer(decode(0x1020, &copy)), (None, None));
    }

    #[test]
    fn what_the_kernel_drops_silently_is_answered() {
        assert_eq!(answer(decode(31, &write(32))), (Some(Errno::EINVAL), None));
        assert_eq!(answer(decode(0x1020, &read(32, 1, 2, 4096))), (Some(Errno::EINVAL), None));
        assert_eq!(answer(decode(31, &read(32, 1, 1, 1))), (Some(Errno::EINVAL), Some(0x77)));
    }

    #[test]
    fn descriptors_must_match_the_room_for_data() {
        assert!(decode(0x1020, &read(32, 0, 1, 4096)).is_ok());
        assert!(decode(0x1020, &read(32, 0, 1, 1)).is_ok());
        for len in [0, 4097, u32::MAX] {
            let got = answer(decode(0x1020, &read(32, MSG_NEED_INVAL_F, 1, len)));
            assert_eq!(got, (Some(Errno::EINVAL), Some(0x77)));
        }
    }

    #[test]
    fn header_at_the_end_of_the_chunk() {
        let end = Geometry::default().chunk_size();
        assert!(decode(end - 4, &write(32)).is_ok());
        assert!(decode(end - 24, &read(32, 0, 1, 4096)).is_ok());
        assert!(decode(end - 8, &read(32, 0, 0, 0)).is_ok());
        assert_eq!(answer(decode(end - 23, &read(32, 1, 1, 4096))), (Some(Errno::EINVAL), None));
        assert_eq!(answer(decode(end - 7, &read(32, 0, 0, 0))), (Some(Errno::EINVAL), None));
    }

    #[test]
    fn user_messages_have_a_longest_length() {
        assert!(decode(8192, &write(4096)).is_ok());
        assert_eq!(answer(decode(8192, &write(4097))), (Some(Errno::EMSGSIZE), None));
        let small = Geometry::new(2, 4096, 512).unwrap();
        let refused = Request::decode(&small, 0, 600, &write(513)).unwrap_err();
        assert_eq!(refused.action(), Action::Answer(Errno::EMSGSIZE));
    }
}

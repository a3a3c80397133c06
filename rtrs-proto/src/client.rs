//! The initiator's side of a path: what to send, and what the answers mean (`rtrs-clt.c`).
//!
//! Order of use: [`crate::handshake::ConnectRequest::to_wire`] for each cid in turn, [`ServerParams::parse`] on the
//! answer of cid 0 ([`check_accept`] on the others), [`info_req`], [`Rbufs::parse`] on its answer; then, per request,
//! [`encode_read`] or [`encode_write`], and [`decode`] on every immediate that comes back.

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::errno::Errno;
use crate::handshake::same_major;
use crate::imm::{Imm, bits};
use crate::limits::{Geometry, GeometryError};
use crate::wire::{
    ConnRsp, InfoReq, InfoRspHdr, MSG_NEED_INVAL_F, MSG_NEW_RKEY_F, MsgRdmaRead, MsgRdmaWrite, MsgRkeyRsp,
    NAME_MAX, RTRS_MAGIC, SgDesc, msg_type,
};

/// An accept that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAccept {
    /// Not enough private data.
    #[error("private data of {0} bytes is too short: at least 56")]
    Short(usize),
    /// Not RTRS.
    #[error("magic {0:#06x} is not 0x1bbd")]
    Magic(u16),
    /// An RTRS we do not know.
    #[error("protocol version {0:#06x}: major version 2 is the only one supported")]
    Version(u16),
    /// An accept must say 0.
    #[error("errno {0} in an accept")]
    Errno(i16),
    /// The sizes do not work.
    #[error("server announces an impossible session: {0}")]
    Geometry(#[from] GeometryError),
}

/// Checks the private data of an accept of any cid.
///
/// # Errors
/// [`BadAccept`]; the connection fails with ECONNRESET.
pub fn check_accept(private_data: &[u8]) -> Result<ConnRsp, BadAccept> {
    let (rsp, _) =
        ConnRsp::read_from_prefix(private_data).map_err(|_| BadAccept::Short(private_data.len()))?;
    if rsp.magic.get() != RTRS_MAGIC {
        return Err(BadAccept::Magic(rsp.magic.get()));
    }
    if !same_major(rsp.version.get()) {
        return Err(BadAccept::Version(rsp.version.get()));
    }
    if rsp.errno.get() != 0 {
        return Err(BadAccept::Errno(rsp.errno.get()));
    }
    Ok(rsp)
}

/// What the accept of cid 0 says about the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerParams {
    /// Sizes. The queue depth must be the same on every path and every reconnect.
    pub geometry: Geometry,
    /// Each response brings its chunk's next rkey: post 8-byte receives on all cons, and see [`parse_rkey_rsp`].
    pub rotating_keys: bool,
}

impl ServerParams {
    /// Reads the private data of the accept of cid 0.
    ///
    /// # Errors
    /// [`BadAccept`].
    pub fn parse(private_data: &[u8]) -> Result<ServerParams, BadAccept> {
        let rsp = check_accept(private_data)?;
        let geometry =
            Geometry::from_server(rsp.queue_depth.get(), rsp.max_io_size.get(), rsp.max_hdr_size.get())?;
        Ok(ServerParams { geometry, rotating_keys: rsp.flags.get() & MSG_NEW_RKEY_F != 0 })
    }
}

/// What a consumer-defined reject (reason 28) means. A reject of any other reason means nobody listens: ECONNRESET.
///
/// A positive errno is ECONNABORTED as in the kernel. Where the kernel client would wait for its timeout (errno 0) or
/// guess (short data), this is ECONNRESET.
pub fn parse_reject(private_data: &[u8]) -> Errno {
    match ConnRsp::ref_from_prefix(private_data).map(|(rsp, _)| rsp.errno.get()) {
        Ok(errno) if errno > 0 => Errno::ECONNABORTED,
        Ok(errno) => Errno::from_raw(errno.into()).unwrap_or(Errno::ECONNRESET),
        Err(_) => Errno::ECONNRESET,
    }
}

/// Builds INFO_REQ, or `None` if no server would take `name`: it must have 1..=254 bytes, no NUL, '/' or '.'.
pub fn info_req(name: &str) -> Option<InfoReq> {
    if name.is_empty() || name.len() >= NAME_MAX || name.contains(['/', '.', '\0']) {
        return None;
    }
    let mut msg = InfoReq { msg_type: msg_type::INFO_REQ.into(), ..InfoReq::new_zeroed() };
    msg.pathname[..name.len()].copy_from_slice(name.as_bytes());
    Some(msg)
}

/// Bytes of the longest INFO_RSP: the first receive on con 0.
pub const fn info_rsp_len(queue_depth: u16) -> usize {
    size_of::<InfoRspHdr>() + queue_depth as usize * size_of::<SgDesc>()
}

/// One chunk of the server as this path reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rbuf {
    /// Start, as RDMA addresses it.
    pub addr: u64,
    /// Its rkey now.
    pub rkey: u32,
}

/// All chunks of the server as one path reaches them. Addresses and keys are per path and per connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rbufs(Box<[Rbuf]>);

/// An INFO_RSP that does not describe the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadInfoRsp {
    /// Not enough bytes for header or descriptors.
    #[error("INFO_RSP of {got} bytes is too short: at least {least}")]
    Short {
        /// Bytes received.
        got: usize,
        /// Bytes needed.
        least: usize,
    },
    /// Something else in its place.
    #[error("message type {0} where INFO_RSP (1) was due")]
    Type(u16),
    /// Descriptors that cannot hold equal numbers of chunks.
    #[error("{sg_cnt} descriptors for {queue_depth} chunks: it must divide them")]
    SgCnt {
        /// From the message.
        sg_cnt: u16,
        /// Of the session.
        queue_depth: u16,
    },
    /// The kernel client's form of the 28-bit rule.
    #[error("{sg_cnt} descriptors of chunks of {chunk_size} bytes exceed 28 bits")]
    ImmBits {
        /// From the message.
        sg_cnt: u16,
        /// Of the session.
        chunk_size: u32,
    },
    /// A descriptor with a broken chunk, or none.
    #[error("descriptor {index} of {len} bytes is no multiple of the chunk size {chunk_size}")]
    DescLen {
        /// Which.
        index: usize,
        /// From the message.
        len: u32,
        /// Of the session.
        chunk_size: u32,
    },
    /// A region that wraps around.
    #[error("descriptor {index} exceeds the address space")]
    Wraps {
        /// Which.
        index: usize,
    },
    /// Too few or too many chunks in all.
    #[error("descriptors hold {got} chunks, not {queue_depth}")]
    Chunks {
        /// In the message.
        got: u64,
        /// Of the session.
        queue_depth: u16,
    },
}

impl Rbufs {
    /// Reads INFO_RSP, `bytes` being exactly what arrived. Costs one allocation of 16 bytes per chunk.
    ///
    /// # Errors
    /// [`BadInfoRsp`]; the path fails.
    pub fn parse(geometry: &Geometry, bytes: &[u8]) -> Result<Rbufs, BadInfoRsp> {
        let descs = parse_info_rsp(geometry, bytes)?;
        let chunk_size = geometry.chunk_size();
        let mut rbufs = Vec::with_capacity(geometry.queue_depth().into());
        for desc in descs {
            let (addr, rkey) = (desc.addr.get(), desc.key.get());
            let starts = (0..desc.len.get()).step_by(chunk_size as usize);
            rbufs.extend(starts.map(|off| Rbuf { addr: addr + u64::from(off), rkey }));
        }
        Ok(Rbufs(rbufs.into()))
    }

    /// Chunk `id`, or `None` above the queue depth.
    pub fn rbuf(&self, id: u16) -> Option<Rbuf> {
        self.0.get(usize::from(id)).copied()
    }

    /// Chunk `id` has a new rkey. Do this before the id is used again.
    pub fn set_rkey(&mut self, id: u16, rkey: u32) {
        if let Some(rbuf) = self.0.get_mut(usize::from(id)) {
            rbuf.rkey = rkey;
        }
    }

    /// Chunks.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// The descriptors of an INFO_RSP that describes exactly the session's chunks.
fn parse_info_rsp<'a>(geometry: &Geometry, bytes: &'a [u8]) -> Result<&'a [SgDesc], BadInfoRsp> {
    let short = |least| BadInfoRsp::Short { got: bytes.len(), least };
    let (hdr, rest) = InfoRspHdr::ref_from_prefix(bytes).map_err(|_| short(size_of::<InfoRspHdr>()))?;
    if hdr.msg_type.get() != msg_type::INFO_RSP {
        return Err(BadInfoRsp::Type(hdr.msg_type.get()));
    }
    let (sg_cnt, queue_depth, chunk_size) = (hdr.sg_cnt.get(), geometry.queue_depth(), geometry.chunk_size());
    if sg_cnt == 0 || !queue_depth.is_multiple_of(sg_cnt) {
        return Err(BadInfoRsp::SgCnt { sg_cnt, queue_depth });
    }
    if bits(sg_cnt.into()) + bits(chunk_size) > crate::imm::PAYLOAD_BITS {
        return Err(BadInfoRsp::ImmBits { sg_cnt, chunk_size });
    }
    let (descs, _) = <[SgDesc]>::ref_from_prefix_with_elems(rest, sg_cnt.into())
        .map_err(|_| short(info_rsp_len(sg_cnt)))?;
    let mut chunks = 0;
    for (index, desc) in descs.iter().enumerate() {
        let len = desc.len.get();
        if len == 0 || !len.is_multiple_of(chunk_size) {
            return Err(BadInfoRsp::DescLen { index, len, chunk_size });
        }
        if desc.addr.get().checked_add(len.into()).is_none() {
            return Err(BadInfoRsp::Wraps { index });
        }
        chunks += u64::from(len / chunk_size);
    }
    if chunks != u64::from(queue_depth) {
        return Err(BadInfoRsp::Chunks { got: chunks, queue_depth });
    }
    Ok(descs)
}

/// How to post a request: one RDMA WRITE_WITH_IMM into chunk `id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Post {
    /// Where in the chunk the write goes: 0 for writes, `data_len` for reads.
    pub chunk_off: u32,
    /// Bytes put into `out`; for a write, the data goes before them in the same RDMA WRITE.
    pub hdr_len: usize,
    /// The immediate, in host order.
    pub imm: u32,
}

/// A request that does not fit its chunk, or whose `out` is too small. EMSGSIZE in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooLong {
    /// User message and RTRS header.
    #[error("message and header of {got} bytes exceed {most}")]
    Header {
        /// Bytes needed.
        got: usize,
        /// Bytes available, in the chunk or in `out`.
        most: usize,
    },
    /// Data, user message and header together.
    #[error("request of {got} bytes exceeds the chunk of {chunk_size}")]
    Chunk {
        /// Bytes needed.
        got: u64,
        /// Bytes available.
        chunk_size: u32,
    },
    /// A buffer id beyond the chunks.
    #[error("buffer id {id} is not below the queue depth {queue_depth}")]
    Id {
        /// As given.
        id: u16,
        /// Of the session.
        queue_depth: u16,
    },
}

/// Lays out a read in `out`: user message, header, descriptor. `data_len` is the room for data, and equals the
/// length of `desc` if there is one. `need_inval`: `desc`'s key is a fast-registration or memory-window key; with any
/// other the invalidation breaks the queue pair.
///
/// # Errors
/// [`TooLong`].
pub fn encode_read(
    geometry: &Geometry,
    id: u16,
    usr: &[u8],
    data_len: u32,
    desc: Option<SgDesc>,
    need_inval: bool,
    out: &mut [u8],
) -> Result<Post, TooLong> {
    let hdr = MsgRdmaRead {
        msg_type: msg_type::READ.into(),
        usr_len: U16::new(usr.len() as u16),
        flags: if need_inval && desc.is_some() { MSG_NEED_INVAL_F } else { 0 }.into(),
        sg_cnt: u16::from(desc.is_some()).into(),
    };
    let off =
        check_fit(geometry, id, usr, hdr.as_bytes().len() + desc.as_slice().as_bytes().len(), data_len)?;
    let hdr_len = put(out, usr, &hdr, desc.as_slice())?;
    Ok(Post { chunk_off: data_len, hdr_len, imm: geometry.imm_layout().io_req(id, off) })
}

/// Lays out a write in `out`: user message and header, to be sent behind `data_len` bytes of data.
///
/// # Errors
/// [`TooLong`].
pub fn encode_write(
    geometry: &Geometry,
    id: u16,
    usr: &[u8],
    data_len: u32,
    out: &mut [u8],
) -> Result<Post, TooLong> {
    let hdr = MsgRdmaWrite { msg_type: msg_type::WRITE.into(), usr_len: U16::new(usr.len() as u16) };
    let off = check_fit(geometry, id, usr, hdr.as_bytes().len(), data_len)?;
    let hdr_len = put(out, usr, &hdr, &[])?;
    Ok(Post { chunk_off: 0, hdr_len, imm: geometry.imm_layout().io_req(id, off) })
}

/// Returns the offset of the RTRS header. After this, `usr.len()` fits 16 bits.
fn check_fit(
    geometry: &Geometry,
    id: u16,
    usr: &[u8],
    rtrs_len: usize,
    data_len: u32,
) -> Result<u32, TooLong> {
    if id >= geometry.queue_depth() {
        return Err(TooLong::Id { id, queue_depth: geometry.queue_depth() });
    }
    let most = (geometry.max_hdr_size() as usize).min(usize::from(u16::MAX));
    let got = usr.len() + rtrs_len;
    if got > most {
        return Err(TooLong::Header { got, most });
    }
    let total = u64::from(data_len) + got as u64;
    if total > geometry.chunk_size().into() {
        return Err(TooLong::Chunk { got: total, chunk_size: geometry.chunk_size() });
    }
    Ok(data_len + usr.len() as u32)
}

fn put<H: IntoBytes + Immutable>(
    out: &mut [u8],
    usr: &[u8],
    hdr: &H,
    descs: &[SgDesc],
) -> Result<usize, TooLong> {
    let parts = [usr, hdr.as_bytes(), descs.as_bytes()];
    let got = parts.iter().map(|p| p.len()).sum();
    if got > out.len() {
        return Err(TooLong::Header { got, most: out.len() });
    }
    let mut at = 0;
    for part in parts {
        out[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    Ok(got)
}

/// What an immediate means to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientImm {
    /// The request in buffer `id` (below the queue depth) is done; ignore it if none is in flight there.
    Response {
        /// Buffer id; free it only after a new rkey is stored.
        id: u16,
        /// As the server says.
        result: Result<(), Errno>,
        /// The server has invalidated the read's key. If not, and a fast-registration or memory-window key was used,
        /// invalidate it locally before completing.
        inval: bool,
    },
    /// Answer with [`crate::imm::HB_ACK`] on con 0.
    HbMsg,
    /// Tell the heartbeat machine.
    HbAck,
    /// Log and ignore, as the kernel does: an id beyond the chunks, a request type, an unknown type.
    Ignore(Imm),
}

/// Decodes an immediate (host order) that a client received. Total.
pub const fn decode(geometry: &Geometry, imm: u32) -> ClientImm {
    match geometry.imm_layout().decode(imm) {
        Imm::IoRsp { id, errno, inval } if id < geometry.queue_depth() as u32 => {
            let result = match errno {
                None => Ok(()),
                Some(errno) => Err(errno),
            };
            ClientImm::Response { id: id as u16, result, inval }
        }
        Imm::HbMsg => ClientImm::HbMsg,
        Imm::HbAck => ClientImm::HbAck,
        other => ClientImm::Ignore(other),
    }
}

/// A key message that breaks the protocol. Reset the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRkeyRsp {
    /// Not enough bytes.
    #[error("RKEY_RSP of {0} bytes is too short: 8")]
    Short(usize),
    /// Something else in its place.
    #[error("message type {0} where RKEY_RSP (4) was due")]
    Type(u16),
    /// It is about some other chunk.
    #[error("RKEY_RSP for buffer {got} with an immediate for buffer {want}")]
    Id {
        /// In the message.
        got: u16,
        /// In the immediate.
        want: u16,
    },
}

/// Reads the 8 bytes that came with the response immediate for buffer `id`; returns that buffer's next rkey.
///
/// # Errors
/// [`BadRkeyRsp`].
pub fn parse_rkey_rsp(bytes: &[u8], id: u16) -> Result<u32, BadRkeyRsp> {
    let (rsp, _) = MsgRkeyRsp::ref_from_prefix(bytes).map_err(|_| BadRkeyRsp::Short(bytes.len()))?;
    if rsp.msg_type.get() != msg_type::RKEY_RSP {
        return Err(BadRkeyRsp::Type(rsp.msg_type.get()));
    }
    if rsp.buf_id.get() != id {
        return Err(BadRkeyRsp::Id { got: rsp.buf_id.get(), want: id });
    }
    Ok(rsp.rkey.get())
}

#[cfg(test)]
mod tests;

//! The 32-bit immediates: type in the high 4 bits, payload in the low 28 (`rtrs-pri.h`, `rtrs_to_imm`).
//!
//! Values here are in **host order**. On the wire an immediate is big-endian; verbs hand it over and take it as
//! `__be32`, so the transport converts (`u32::to_be` when posting, `u32::from_be` on a completion).
//!
//! | type | name         | direction | payload                                                 |
//! |------|--------------|-----------|---------------------------------------------------------|
//! | 0    | IO_REQ       | C→S       | buffer id, then the offset of the RTRS header in the chunk |
//! | 1    | IO_RSP       | S→C       | 9 bits of errno, 19 bits of buffer id                   |
//! | 2    | IO_RSP_W_INV | S→C       | the same; the client's key has been invalidated         |
//! | 8    | HB_MSG       | both      | 0                                                       |
//! | 9    | HB_ACK       | both      | 0                                                       |

use std::fmt;

use crate::errno::{Errno, MAX_ERRNO};
use crate::limits::Geometry;
use crate::wire::MsgRdmaWrite;

/// Payload bits (`MAX_IMM_PAYL_BITS`).
pub const PAYLOAD_BITS: u32 = 28;
const PAYLOAD_MASK: u32 = (1 << PAYLOAD_BITS) - 1;
/// Bits of buffer id in a response.
pub const RSP_ID_BITS: u32 = 19;
const RSP_ID_MASK: u32 = (1 << RSP_ID_BITS) - 1;

const IO_REQ: u32 = 0;
const IO_RSP: u32 = 1;
const IO_RSP_W_INV: u32 = 2;
/// A heartbeat, complete (host order).
pub const HB_MSG: u32 = 8 << PAYLOAD_BITS;
/// The answer to a heartbeat, complete (host order).
pub const HB_ACK: u32 = 9 << PAYLOAD_BITS;

/// `ceil(log2 n)`: bits that tell `n` values apart; 0 for `n <= 1`.
pub const fn bits(n: u32) -> u32 {
    if n <= 1 { 0 } else { 32 - (n - 1).leading_zeros() }
}

/// A decoded immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Imm {
    /// A request lies in chunk `id`, its RTRS header at byte `off` of the chunk.
    IoReq {
        /// Buffer id, below the queue depth if the peer is sane.
        id: u32,
        /// Offset of the RTRS header, below the chunk size if the peer is sane.
        off: u32,
    },
    /// The request in buffer `id` is done.
    IoRsp {
        /// Buffer id; up to 19 bits come from the wire, so compare it with the queue depth.
        id: u32,
        /// `None` is success.
        errno: Option<Errno>,
        /// A SEND_WITH_INV for this request came before (type 2).
        inval: bool,
    },
    /// Heartbeat; answer with [`HB_ACK`] on con 0.
    HbMsg,
    /// Answer to our heartbeat.
    HbAck,
    /// A type that nobody sends; log it and ignore it, as the kernel does.
    Unknown(u8),
}

impl fmt::Display for Imm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Imm::IoReq { id, off } => write!(f, "IO_REQ id {id} off {off}"),
            Imm::IoRsp { id, errno, inval } => {
                write!(f, "{} id {id} ", if inval { "IO_RSP_W_INV" } else { "IO_RSP" })?;
                match errno {
                    Some(e) => e.fmt(f),
                    None => f.write_str("ok"),
                }
            }
            Imm::HbMsg => f.write_str("HB_MSG"),
            Imm::HbAck => f.write_str("HB_ACK"),
            Imm::Unknown(t) => write!(f, "unknown immediate type {t}"),
        }
    }
}

/// Builds a response immediate (host order). `id` is the request's buffer id, of which 19 bits are kept.
pub const fn io_rsp(id: u32, errno: Option<Errno>, inval: bool) -> u32 {
    let code = match errno {
        Some(e) => e.get() as u32,
        None => 0,
    };
    let kind = if inval { IO_RSP_W_INV } else { IO_RSP };
    kind << PAYLOAD_BITS | code << RSP_ID_BITS | id & RSP_ID_MASK
}

/// How the payload of IO_REQ divides into buffer id and offset; follows from the queue depth alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImmLayout {
    off_bits: u32,
}

impl ImmLayout {
    /// `queue_depth`: as announced in CONN_RSP. The id takes `bits(queue_depth)` high bits of the payload.
    pub const fn new(queue_depth: u16) -> ImmLayout {
        ImmLayout { off_bits: PAYLOAD_BITS - bits(queue_depth as u32) }
    }

    /// Bits for the offset inside the chunk, 12..=28.
    pub const fn off_bits(self) -> u32 {
        self.off_bits
    }

    /// Builds a request immediate (host order). Surplus bits of `id` and `off` are cut off; neither has any
    /// within a valid [`Geometry`].
    pub const fn io_req(self, id: u16, off: u32) -> u32 {
        ((id as u32) << self.off_bits | off & ((1 << self.off_bits) - 1)) & PAYLOAD_MASK
    }

    /// Splits an immediate (host order). Total: any value decodes.
    pub const fn decode(self, imm: u32) -> Imm {
        let payload = imm & PAYLOAD_MASK;
        match imm >> PAYLOAD_BITS {
            IO_REQ => Imm::IoReq { id: payload >> self.off_bits, off: payload & ((1 << self.off_bits) - 1) },
            kind @ (IO_RSP | IO_RSP_W_INV) => Imm::IoRsp {
                id: payload & RSP_ID_MASK,
                errno: Errno::from_raw((payload >> RSP_ID_BITS & MAX_ERRNO as u32) as i32),
                inval: kind == IO_RSP_W_INV,
            },
            8 => Imm::HbMsg,
            9 => Imm::HbAck,
            kind => Imm::Unknown(kind as u8),
        }
    }

    /// The inverse of [`ImmLayout::decode`], payloads of unknown types being 0.
    pub const fn encode(self, imm: Imm) -> u32 {
        match imm {
            Imm::IoReq { id, off } => self.io_req(id as u16, off),
            Imm::IoRsp { id, errno, inval } => io_rsp(id, errno, inval),
            Imm::HbMsg => HB_MSG,
            Imm::HbAck => HB_ACK,
            Imm::Unknown(kind) => (kind as u32) << PAYLOAD_BITS,
        }
    }
}

/// A request immediate that a server cannot obey. The path must be closed: nothing tells which request it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImmError {
    /// `id` names no chunk.
    #[error("buffer id {id} is not below the queue depth {queue_depth}")]
    Id {
        /// From the immediate.
        id: u32,
        /// Of the session.
        queue_depth: u16,
    },
    /// Not even the shortest RTRS header fits between `off` and the chunk's end.
    #[error("header offset {off} leaves less than 4 bytes of the {chunk_size}-byte chunk")]
    Offset {
        /// From the immediate.
        off: u32,
        /// Of the session.
        chunk_size: u32,
    },
}

/// What an immediate means to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerImm {
    /// A request in chunk `id` (below the queue depth), whose header starts at `off` and has at least 4 bytes.
    Request {
        /// Buffer id.
        id: u16,
        /// Header offset.
        off: u32,
    },
    /// Answer with [`HB_ACK`] on con 0.
    HbMsg,
    /// Tell the heartbeat machine.
    HbAck,
    /// Log and ignore: a response type or an unknown one.
    Ignore(Imm),
}

/// Decodes an immediate (host order) that a server received.
///
/// # Errors
/// [`ImmError`]: close the path (`rtrs-srv.c`, `rtrs_srv_rdma_done`). The kernel lets an offset pass whose header
/// does not fit; here the 4 bytes every request needs must lie within the chunk.
pub const fn decode_at_server(geometry: &Geometry, imm: u32) -> Result<ServerImm, ImmError> {
    match geometry.imm_layout().decode(imm) {
        Imm::IoReq { id, off } => {
            if id >= geometry.queue_depth() as u32 {
                return Err(ImmError::Id { id, queue_depth: geometry.queue_depth() });
            }
            if off > geometry.chunk_size() - size_of::<MsgRdmaWrite>() as u32 {
                return Err(ImmError::Offset { off, chunk_size: geometry.chunk_size() });
            }
            Ok(ServerImm::Request { id: id as u16, off })
        }
        Imm::HbMsg => Ok(ServerImm::HbMsg),
        Imm::HbAck => Ok(ServerImm::HbAck),
        other => Ok(ServerImm::Ignore(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seen between Linux 6.12 peers.
    #[test]
    fn golden_immediates() {
        let qd512 = ImmLayout::new(512);
        assert_eq!(qd512.io_req(0, 0x48), 0x0000_0048);
        assert_eq!(qd512.io_req(1, 0x1020), 0x0008_1020);
        assert_eq!(qd512.io_req(5, 0x1020), 0x0028_1020);
        assert_eq!(ImmLayout::new(1000).io_req(1, 0x1020), 0x0004_1020);
        assert_eq!(io_rsp(0, None, false), 0x1000_0000);
        assert_eq!(io_rsp(1, None, true), 0x2000_0001);
        assert_eq!(io_rsp(0, Some(Errno::EPERM), true), 0x2008_0000);
        assert_eq!(io_rsp(0, Some(Errno::ENOTCONN), true), 0x2358_0000);
        assert_eq!((HB_MSG, HB_ACK), (0x8000_0000, 0x9000_0000));
    }

    #[test]
    fn id_bits_follow_the_queue_depth() {
        let id_bits = |qd| PAYLOAD_BITS - ImmLayout::new(qd).off_bits();
        assert_eq!([1, 2, 64, 512, 1000, 1024].map(id_bits), [0, 1, 6, 9, 10, 10]);
        assert_eq!(id_bits(65535), 16);
    }

    #[test]
    fn decode_inverts_encode() {
        let layout = ImmLayout::new(512);
        for imm in [
            Imm::IoReq { id: 511, off: (1 << 19) - 1 },
            Imm::IoRsp { id: 511, errno: Some(Errno::EIO), inval: true },
            Imm::IoRsp { id: 0, errno: None, inval: false },
            Imm::HbMsg,
            Imm::HbAck,
            Imm::Unknown(15),
        ] {
            assert_eq!(layout.decode(layout.encode(imm)), imm, "{imm}");
        }
    }

    #[test]
    fn server_closes_on_ids_and_offsets_outside() {
        let g = Geometry::new(1000, 61440, 4096).unwrap();
        let imm = |id, off| decode_at_server(&g, g.imm_layout().io_req(id, off));
        assert_eq!(imm(999, 65532), Ok(ServerImm::Request { id: 999, off: 65532 }));
        assert_eq!(imm(1000, 0), Err(ImmError::Id { id: 1000, queue_depth: 1000 }));
        assert_eq!(imm(0, 65533), Err(ImmError::Offset { off: 65533, chunk_size: 65536 }));
    }

    #[test]
    fn server_ignores_what_only_clients_get() {
        let g = Geometry::default();
        let rsp = Imm::IoRsp { id: 3, errno: None, inval: false };
        assert_eq!(decode_at_server(&g, 0x1000_0003), Ok(ServerImm::Ignore(rsp)));
        assert_eq!(decode_at_server(&g, 0x7000_0000), Ok(ServerImm::Ignore(Imm::Unknown(7))));
        assert_eq!(decode_at_server(&g, HB_MSG), Ok(ServerImm::HbMsg));
    }
}

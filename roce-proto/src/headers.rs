//! One packet of a reliable connection, without its payload.

use crate::Psn;

/// RC operations this implementation speaks. Source: IBTA 9.2, table 35; `ib_pack.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Opcode {
    SendFirst = 0x00,
    SendMiddle = 0x01,
    SendLast = 0x02,
    SendLastImm = 0x03,
    SendOnly = 0x04,
    SendOnlyImm = 0x05,
    WriteFirst = 0x06,
    WriteMiddle = 0x07,
    WriteLast = 0x08,
    WriteLastImm = 0x09,
    WriteOnly = 0x0a,
    WriteOnlyImm = 0x0b,
    ReadRequest = 0x0c,
    ReadResponseFirst = 0x0d,
    ReadResponseMiddle = 0x0e,
    ReadResponseLast = 0x0f,
    ReadResponseOnly = 0x10,
    Acknowledge = 0x11,
    AtomicAcknowledge = 0x12,
    CompareSwap = 0x13,
    FetchAdd = 0x14,
    SendLastInvalidate = 0x16,
    SendOnlyInvalidate = 0x17,
}

/// RDMA extended transport header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reth {
    /// Virtual address at the responder.
    pub va: u64,
    /// Its key.
    pub rkey: u32,
    /// Bytes of the whole message.
    pub len: u32,
}

/// ACK extended transport header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aeth {
    /// Kind and credits or timer.
    pub syndrome: u8,
    /// Message sequence number, 24 bits.
    pub msn: u32,
}

/// The transport headers of one RC packet. `reth`, `aeth`, `imm`, `inv_rkey` mean something where the opcode has them
/// and are zero elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// What it is.
    pub opcode: Opcode,
    /// Asks for an event at the receiver.
    pub solicited: bool,
    /// Asks for an acknowledgement.
    pub ack_req: bool,
    /// Queue pair it is for, 24 bits.
    pub dest_qpn: u32,
    /// Sequence number.
    pub psn: Psn,
    /// Of the first or only packet of a WRITE, of a READ request.
    pub reth: Reth,
    /// Of ACKs and READ responses but middle ones.
    pub aeth: Aeth,
    /// Immediate, host order.
    pub imm: u32,
    /// Key to invalidate.
    pub inv_rkey: u32,
}

impl Opcode {
    /// All, in order of their codes.
    pub const ALL: [Opcode; 23] = [
        Self::SendFirst,
        Self::SendMiddle,
        Self::SendLast,
        Self::SendLastImm,
        Self::SendOnly,
        Self::SendOnlyImm,
        Self::WriteFirst,
        Self::WriteMiddle,
        Self::WriteLast,
        Self::WriteLastImm,
        Self::WriteOnly,
        Self::WriteOnlyImm,
        Self::ReadRequest,
        Self::ReadResponseFirst,
        Self::ReadResponseMiddle,
        Self::ReadResponseLast,
        Self::ReadResponseOnly,
        Self::Acknowledge,
        Self::AtomicAcknowledge,
        Self::CompareSwap,
        Self::FetchAdd,
        Self::SendLastInvalidate,
        Self::SendOnlyInvalidate,
    ];

    /// The operation of byte 0 of the base transport header, or `None` for what is not spoken here.
    pub const fn from_wire(code: u8) -> Option<Self> {
        match code {
            0x00..=0x14 => Some(Self::ALL[code as usize]),
            0x16 => Some(Self::SendLastInvalidate),
            0x17 => Some(Self::SendOnlyInvalidate),
            _ => None,
        }
    }

    /// Byte 0 of the base transport header.
    pub const fn to_wire(self) -> u8 {
        self as u8
    }

    /// Bytes of all transport headers of such a packet, 12..=40.
    pub const fn headers_len(self) -> usize {
        match self {
            Self::CompareSwap | Self::FetchAdd => BTH_LEN + 28,
            Self::AtomicAcknowledge => BTH_LEN + 12,
            _ => {
                BTH_LEN
                    + if self.has_reth() { 16 } else { 0 }
                    + if self.has_aeth() || self.has_imm() || self.has_ieth() { 4 } else { 0 }
            }
        }
    }

    /// Carries an [`Reth`].
    pub const fn has_reth(self) -> bool {
        matches!(self, Self::WriteFirst | Self::WriteOnly | Self::WriteOnlyImm | Self::ReadRequest)
    }

    /// Carries an [`Aeth`].
    pub const fn has_aeth(self) -> bool {
        matches!(
            self,
            Self::ReadResponseFirst
                | Self::ReadResponseLast
                | Self::ReadResponseOnly
                | Self::Acknowledge
                | Self::AtomicAcknowledge
        )
    }

    /// Carries an immediate.
    pub const fn has_imm(self) -> bool {
        matches!(self, Self::SendLastImm | Self::SendOnlyImm | Self::WriteLastImm | Self::WriteOnlyImm)
    }

    /// Carries a key to invalidate.
    pub const fn has_ieth(self) -> bool {
        matches!(self, Self::SendLastInvalidate | Self::SendOnlyInvalidate)
    }
}

/// Bytes of the base transport header.
pub const BTH_LEN: usize = 12;

/// The default partition with full membership.
pub(crate) const DEFAULT_PKEY: u16 = 0xffff;

impl Headers {
    /// The most bytes that [`Headers::encode`] writes: BTH, RETH and an immediate.
    pub const MAX_LEN: usize = 32;

    /// Bytes on the wire, before the payload.
    #[allow(clippy::len_without_is_empty)]
    pub const fn len(&self) -> usize {
        self.opcode.headers_len()
    }

    /// Writes the headers and returns their length, 12..=32. `pad`, 0..=3, is the number of zero bytes that follow the
    /// payload. MigReq is 1, as NICs want it; the partition is the default one.
    ///
    /// Atomics exist here only to be refused when they arrive: of them, the base transport header alone is written.
    pub fn encode(&self, pad: u8, out: &mut [u8; Self::MAX_LEN]) -> usize {
        let (bth, ext) = out.split_at_mut(BTH_LEN);
        put_bth(
            bth,
            self.opcode.to_wire(),
            u8::from(self.solicited) << 7 | MIG_REQ | (pad & 3) << 4,
            self.dest_qpn,
            u32::from(self.ack_req) << 31 | self.psn.get(),
        );
        let op = self.opcode;
        let mut at = 0;
        if op.has_reth() {
            ext[..8].copy_from_slice(&self.reth.va.to_be_bytes());
            ext[8..12].copy_from_slice(&self.reth.rkey.to_be_bytes());
            ext[12..16].copy_from_slice(&self.reth.len.to_be_bytes());
            at = 16;
        }
        let word = if op.has_imm() {
            self.imm
        } else if op.has_ieth() {
            self.inv_rkey
        } else if op.has_aeth() && op != Opcode::AtomicAcknowledge {
            u32::from(self.aeth.syndrome) << 24 | self.aeth.msn & 0xff_ffff
        } else {
            return BTH_LEN + at;
        };
        ext[at..at + 4].copy_from_slice(&word.to_be_bytes());
        BTH_LEN + at + 4
    }
}

/// MigReq, "the path is the primary one": rxe sends 0 and ignores it, NICs send 1.
const MIG_REQ: u8 = 0x40;

/// Byte 1 of the BTH of a packet without pad that asks for nothing.
pub(crate) const PLAIN_FLAGS: u8 = MIG_REQ;

/// `last`: AckReq in bit 31, the PSN in the low 24 bits.
pub(crate) fn put_bth(out: &mut [u8], opcode: u8, flags: u8, dest_qpn: u32, last: u32) {
    out[0] = opcode;
    out[1] = flags;
    out[2..4].copy_from_slice(&DEFAULT_PKEY.to_be_bytes());
    out[4..8].copy_from_slice(&(dest_qpn & 0xff_ffff).to_be_bytes());
    out[8..12].copy_from_slice(&last.to_be_bytes());
}

//! CM messages as values: what a MAD says, without reserved fields and fields that RoCE does not use.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::wire::*;
use crate::Psn;

/// One CM message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Chosen by whoever began the exchange, repeated in answers.
    pub tid: u64,
    /// What it says.
    pub body: Body,
}

/// What a CM message says. "Local" is the sender of the message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Body {
    Req(Req),
    Mra(Mra),
    Rej(Rej),
    Rep(Rep),
    Rtu(Ids),
    Dreq { ids: Ids, remote_qpn: u32 },
    Drep(Ids),
}

/// The communication IDs that most messages begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Of the sender.
    pub local: u32,
    /// Of the receiver.
    pub remote: u32,
}

impl Ids {
    /// As the receiver of a message puts them into its answer.
    #[must_use]
    pub fn flip(self) -> Self {
        Self { local: self.remote, remote: self.local }
    }
}

/// Request for a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Req {
    /// The sender's communication ID.
    pub local_id: u32,
    /// See [`super::service_id`].
    pub service_id: u64,
    /// Identity of the sender's provider.
    pub guid: u64,
    /// The sender's queue pair, 24 bits.
    pub qpn: u32,
    /// RDMA READs the sender can serve.
    pub responder_resources: u8,
    /// RDMA READs the sender may issue.
    pub initiator_depth: u8,
    /// How long the receiver may take to answer, time code of 5 bits.
    pub remote_timeout: u8,
    /// 0 is RC; 2 bits.
    pub transport: u8,
    /// First PSN the receiver of this message sends.
    pub start_psn: Psn,
    /// How long the sender takes to answer, time code of 5 bits.
    pub local_timeout: u8,
    /// Transport retries of the receiver's queue pair, 3 bits.
    pub retry: u8,
    /// RNR retries of the receiver's queue pair, 3 bits.
    pub rnr_retry: u8,
    /// Partition.
    pub pkey: u16,
    /// 1 is 256 bytes, 5 is 4096; 4 bits.
    pub mtu_code: u8,
    /// How often CM messages may be repeated, 4 bits.
    pub max_retries: u8,
    /// The path to use.
    pub primary: Path,
    /// The path to fail over to; all zero if there is none.
    pub alternate: Path,
    /// Of the consumer, behind the header of rdma_cm.
    pub private: [u8; 92],
}

/// A path in a REQ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Not used by RoCE; 0xffff for paths over routers.
    pub local_lid: u16,
    /// As `local_lid`.
    pub remote_lid: u16,
    /// The sender's address, see [`super::gid`].
    pub local_gid: [u8; 16],
    /// The receiver's address.
    pub remote_gid: [u8; 16],
    /// 20 bits.
    pub flow_label: u32,
    /// 6 bits.
    pub rate: u8,
    /// For the receiver's packets.
    pub traffic_class: u8,
    /// For the receiver's packets.
    pub hop_limit: u8,
    /// For the receiver's queue pair: IBTA time code, 5 bits.
    pub ack_timeout: u8,
}

/// Reply to a REQ: yes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rep {
    /// Of replier and requester.
    pub ids: Ids,
    /// The sender's queue pair, 24 bits.
    pub qpn: u32,
    /// First PSN the receiver of this message sends.
    pub start_psn: Psn,
    /// RDMA READs the sender serves.
    pub responder_resources: u8,
    /// RDMA READs the sender may issue.
    pub initiator_depth: u8,
    /// How long the sender may delay acknowledgements, time code of 5 bits.
    pub ack_delay: u8,
    /// RNR retries of the receiver's queue pair, 3 bits.
    pub rnr_retry: u8,
    /// Identity of the sender's provider.
    pub guid: u64,
    /// Of the consumer.
    pub private: [u8; 196],
}

/// Asks for patience.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mra {
    /// Of both sides.
    pub ids: Ids,
    /// 0: a REQ, 1: a REP, 2: a LAP was received.
    pub of: u8,
    /// Time that the consumer may take, time code of 5 bits.
    pub timeout: u8,
}

/// A no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rej {
    /// Of both sides, 0 where unknown.
    pub ids: Ids,
    /// 0: to a REQ, 1: to a REP, 2: to something else.
    pub of: u8,
    /// See [`reason`].
    pub reason: u16,
    /// Bytes of `info` that mean something.
    pub info_len: u8,
    /// Depends on the reason.
    pub info: [u8; 72],
    /// Of the consumer.
    pub private: [u8; 148],
}

impl Rej {
    pub(super) fn new(ids: Ids, of: u8, reason: u16) -> Self {
        Self { ids, of, reason, info_len: 0, info: [0; 72], private: [0; 148] }
    }

    /// `info` is at most 72 bytes long.
    pub(super) fn with_info(ids: Ids, of: u8, reason: u16, info: &[u8]) -> Self {
        let mut rej = Self::new(ids, of, reason);
        rej.info_len = info.len() as u8;
        rej.info[..info.len()].copy_from_slice(info);
        rej
    }
}

/// Why a REJ. Source: IBTA 12.6.7.2; `ib_cm.h`.
pub mod reason {
    #![allow(missing_docs)]
    pub const TIMEOUT: u16 = 4;
    pub const UNSUPPORTED: u16 = 5;
    pub const INVALID_COMM_ID: u16 = 6;
    pub const INVALID_SERVICE_ID: u16 = 8;
    pub const INVALID_TRANSPORT: u16 = 9;
    pub const STALE_CONNECTION: u16 = 10;
    pub const INVALID_GID: u16 = 12;
    pub const INVALID_ALTERNATE_GID: u16 = 18;
    pub const INVALID_MTU: u16 = 26;
    pub const CONSUMER: u16 = 28;
}

/// Message numbers of MRA and REJ.
pub(super) mod of {
    pub const REQ: u8 = 0;
    pub const REP: u8 = 1;
    pub const OTHER: u8 = 2;
}

const BASE_VERSION: u8 = 1;
const CLASS_CM: u8 = 7;
const CLASS_VERSION: u8 = 2;
const METHOD_SEND: u8 = 3;

impl Message {
    /// `None`: not a message that RC connections use, or not one of this version.
    pub fn parse(mad: &MadBytes) -> Option<Self> {
        let (header, body) = MadHeader::read_from_prefix(mad).ok()?;
        let kind = (header.base_version, header.class, header.class_version, header.method);
        if kind != (BASE_VERSION, CLASS_CM, CLASS_VERSION, METHOD_SEND) {
            return None;
        }
        let body = match header.attribute.get() {
            attribute::REQ => Body::Req(view::<WireReq>(body)?.into()),
            attribute::MRA => Body::Mra(view::<WireMra>(body)?.into()),
            attribute::REJ => Body::Rej(view::<WireRej>(body)?.into()),
            attribute::REP => Body::Rep(view::<WireRep>(body)?.into()),
            attribute::RTU => Body::Rtu(view::<WireIds>(body)?.into()),
            attribute::DREP => Body::Drep(view::<WireIds>(body)?.into()),
            attribute::DREQ => {
                let wire = view::<WireDreq>(body)?;
                let ids = Ids { local: wire.local_id.get(), remote: wire.remote_id.get() };
                Body::Dreq { ids, remote_qpn: from24(wire.remote_qpn) }
            }
            _ => return None,
        };
        Some(Self { tid: header.tid.get(), body })
    }

    /// The bytes of the message.
    pub fn encode(&self) -> Box<MadBytes> {
        let mut mad = Box::new([0; 256]);
        let (header, body) = mad.split_at_mut(HEADER_LEN);
        let attribute = match &self.body {
            Body::Req(req) => put(body, attribute::REQ, &WireReq::from(req)),
            Body::Mra(mra) => put(body, attribute::MRA, &WireMra::from(mra)),
            Body::Rej(rej) => put(body, attribute::REJ, &WireRej::from(rej)),
            Body::Rep(rep) => put(body, attribute::REP, &WireRep::from(rep)),
            Body::Rtu(ids) => put(body, attribute::RTU, &WireIds::from(*ids)),
            Body::Drep(ids) => put(body, attribute::DREP, &WireIds::from(*ids)),
            Body::Dreq { ids, remote_qpn } => {
                let mut wire = WireDreq::new_zeroed();
                (wire.local_id, wire.remote_id) = (ids.local.into(), ids.remote.into());
                wire.remote_qpn = to24(*remote_qpn);
                put(body, attribute::DREQ, &wire)
            }
        };
        header.copy_from_slice(
            MadHeader {
                base_version: BASE_VERSION,
                class: CLASS_CM,
                class_version: CLASS_VERSION,
                method: METHOD_SEND,
                status: U16::ZERO,
                class_specific: U16::ZERO,
                tid: U64::new(self.tid),
                attribute: U16::new(attribute),
                reserved: U16::ZERO,
                modifier: U32::ZERO,
            }
            .as_bytes(),
        );
        mad
    }
}

fn view<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Option<T> {
    T::read_from_bytes(body).ok()
}

/// Every wire body has the length of `body` (asserted beside their definitions).
fn put<T: IntoBytes + Immutable>(body: &mut [u8], attribute: u16, wire: &T) -> u16 {
    body.copy_from_slice(wire.as_bytes());
    attribute
}

fn from24(bytes: [u8; 3]) -> u32 {
    u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]])
}

fn to24(value: u32) -> [u8; 3] {
    let [_, a, b, c] = value.to_be_bytes();
    [a, b, c]
}

impl From<WireIds> for Ids {
    fn from(wire: WireIds) -> Self {
        Self { local: wire.local_id.get(), remote: wire.remote_id.get() }
    }
}

impl From<Ids> for WireIds {
    fn from(ids: Ids) -> Self {
        Self { local_id: ids.local.into(), remote_id: ids.remote.into(), private: [0; 224] }
    }
}

impl From<WireMra> for Mra {
    fn from(wire: WireMra) -> Self {
        Self {
            ids: Ids { local: wire.local_id.get(), remote: wire.remote_id.get() },
            of: wire.of >> 6,
            timeout: wire.timeout >> 3,
        }
    }
}

impl From<&Mra> for WireMra {
    fn from(mra: &Mra) -> Self {
        Self {
            local_id: mra.ids.local.into(),
            remote_id: mra.ids.remote.into(),
            of: mra.of << 6,
            timeout: mra.timeout << 3,
            private: [0; 222],
        }
    }
}

impl From<WireRej> for Rej {
    fn from(wire: WireRej) -> Self {
        Self {
            ids: Ids { local: wire.local_id.get(), remote: wire.remote_id.get() },
            of: wire.of >> 6,
            reason: wire.reason.get(),
            info_len: wire.info_len >> 1,
            info: wire.info,
            private: wire.private,
        }
    }
}

impl From<&Rej> for WireRej {
    fn from(rej: &Rej) -> Self {
        Self {
            local_id: rej.ids.local.into(),
            remote_id: rej.ids.remote.into(),
            of: rej.of << 6,
            info_len: rej.info_len << 1,
            reason: rej.reason.into(),
            info: rej.info,
            private: rej.private,
        }
    }
}

impl From<WireRep> for Rep {
    fn from(wire: WireRep) -> Self {
        Self {
            ids: Ids { local: wire.local_id.get(), remote: wire.remote_id.get() },
            qpn: from24(wire.qpn),
            start_psn: Psn::new(from24(wire.psn)),
            responder_resources: wire.responder_resources,
            initiator_depth: wire.initiator_depth,
            ack_delay: wire.ack_delay >> 3,
            rnr_retry: wire.rnr_retry >> 5,
            guid: wire.guid.get(),
            private: wire.private,
        }
    }
}

impl From<&Rep> for WireRep {
    fn from(rep: &Rep) -> Self {
        Self {
            local_id: rep.ids.local.into(),
            remote_id: rep.ids.remote.into(),
            qpn: to24(rep.qpn),
            psn: to24(rep.start_psn.get()),
            responder_resources: rep.responder_resources,
            initiator_depth: rep.initiator_depth,
            ack_delay: rep.ack_delay << 3,
            rnr_retry: rep.rnr_retry << 5,
            guid: rep.guid.into(),
            private: rep.private,
            ..Self::new_zeroed()
        }
    }
}

impl From<WireReq> for Req {
    fn from(wire: WireReq) -> Self {
        Self {
            local_id: wire.local_id.get(),
            service_id: wire.service_id.get(),
            guid: wire.guid.get(),
            qpn: from24(wire.qpn),
            responder_resources: wire.responder_resources,
            initiator_depth: wire.initiator_depth,
            remote_timeout: wire.remote_timeout >> 3,
            transport: wire.remote_timeout >> 1 & 3,
            start_psn: Psn::new(from24(wire.psn)),
            local_timeout: wire.local_timeout >> 3,
            retry: wire.local_timeout & 7,
            rnr_retry: wire.mtu & 7,
            pkey: wire.pkey.get(),
            mtu_code: wire.mtu >> 4,
            max_retries: wire.max_retries >> 4,
            primary: wire.primary.into(),
            alternate: wire.alternate.into(),
            private: wire.private,
        }
    }
}

impl From<&Req> for WireReq {
    fn from(req: &Req) -> Self {
        Self {
            local_id: req.local_id.into(),
            service_id: req.service_id.into(),
            guid: req.guid.into(),
            qpn: to24(req.qpn),
            responder_resources: req.responder_resources,
            initiator_depth: req.initiator_depth,
            remote_timeout: req.remote_timeout << 3 | (req.transport & 3) << 1,
            psn: to24(req.start_psn.get()),
            local_timeout: req.local_timeout << 3 | req.retry & 7,
            pkey: req.pkey.into(),
            mtu: req.mtu_code << 4 | req.rnr_retry & 7,
            max_retries: req.max_retries << 4,
            primary: req.primary.into(),
            alternate: req.alternate.into(),
            private: req.private,
            ..Self::new_zeroed()
        }
    }
}

impl From<WirePath> for Path {
    fn from(wire: WirePath) -> Self {
        Self {
            local_lid: wire.local_lid.get(),
            remote_lid: wire.remote_lid.get(),
            local_gid: wire.local_gid,
            remote_gid: wire.remote_gid,
            flow_label: wire.flow_rate.get() >> 12,
            rate: (wire.flow_rate.get() & 0x3f) as u8,
            traffic_class: wire.traffic_class,
            hop_limit: wire.hop_limit,
            ack_timeout: wire.ack_timeout >> 3,
        }
    }
}

impl From<Path> for WirePath {
    fn from(path: Path) -> Self {
        Self {
            local_lid: path.local_lid.into(),
            remote_lid: path.remote_lid.into(),
            local_gid: path.local_gid,
            remote_gid: path.remote_gid,
            flow_rate: (path.flow_label << 12 | u32::from(path.rate & 0x3f)).into(),
            traffic_class: path.traffic_class,
            hop_limit: path.hop_limit,
            sl: 0,
            ack_timeout: path.ack_timeout << 3,
        }
    }
}

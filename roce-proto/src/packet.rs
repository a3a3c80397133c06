//! The UDP payload as a packet: base transport header, extensions, payload, pad, ICRC.
//!
//! Nothing here checks the ICRC ([`crate::icrc`] does), addresses, or whether lengths and opcode fit the connection's
//! state. Source: IBTA 9.2 to 9.3, annex A17; Linux `rxe_hdr.h`, `rxe_recv.c`.

use crate::headers::{BTH_LEN, PLAIN_FLAGS, put_bth};
use crate::{Aeth, Counter, Headers, Opcode, Psn, Reth};

/// Bytes of the invariant CRC at the end of every packet.
pub const ICRC_LEN: usize = 4;

/// Bytes of a management datagram.
pub const MAD_LEN: usize = 256;

/// Bytes of a packet with a management datagram, before the ICRC.
pub const MAD_PACKET_LEN: usize = BTH_LEN + DETH_LEN + MAD_LEN;

const DETH_LEN: usize = 8;

/// UD SEND Only.
const UD_SEND_ONLY: u8 = 0x64;

/// The queue pair of connection management, of both sides.
const GSI_QPN: u32 = 1;

/// Its Q_Key. Source: IBTA 10.2.5; `ib_verbs.h`, `IB_QP1_QKEY`.
const GSI_QKEY: u32 = 0x8001_0000;

/// A packet that has its headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// Of a reliable connection.
    Rc(Packet<'a>),
    /// For queue pair 1.
    Mad(Mad<'a>),
}

/// A packet of a reliable connection. `payload` may be longer than any MTU and present where the opcode has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Base transport header and extensions.
    pub headers: Headers,
    /// Without pad.
    pub payload: &'a [u8],
    /// Bytes of pad, 0..=3. Not checked against the payload's length.
    pub pad: u8,
}

/// A management datagram, sent to queue pair 1 with the right Q_Key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mad<'a> {
    /// The sender's own count; means nothing.
    pub psn: Psn,
    /// The whole datagram, from its common header on.
    pub mad: &'a [u8; MAD_LEN],
}

/// The queue pair that a packet is for, before anything of it is checked. For choosing a thread.
pub fn dest_qpn(udp: &[u8]) -> Option<u32> {
    udp.first_chunk::<8>().map(|b| u24(b, 5))
}

/// Takes a UDP payload apart.
/// # Errors
/// Why the packet must be dropped without an answer: `Short`, `UnknownOpcode`, `Version`, `PKey`, `UnknownQpn` (not one
/// that packets of this class can be for), `CmMalformed` (Q_Key, or not one management datagram).
pub fn parse(udp: &[u8]) -> Result<Parsed<'_>, Counter> {
    let (bth, rest) = udp.split_first_chunk::<BTH_LEN>().ok_or(Counter::Short)?;
    let (rest, _icrc) = rest.split_last_chunk::<ICRC_LEN>().ok_or(Counter::Short)?;
    let opcode = Opcode::from_wire(bth[0]);
    if opcode.is_none() && bth[0] != UD_SEND_ONLY {
        return Err(Counter::UnknownOpcode);
    }
    if bth[1] & 0x0f != 0 {
        return Err(Counter::Version);
    }
    if bth[2] & 0x7f != 0x7f || bth[3] != 0xff {
        return Err(Counter::PKey);
    }
    match opcode {
        Some(opcode) => parse_rc(opcode, bth, rest).map(Parsed::Rc),
        None => parse_mad(bth, rest).map(Parsed::Mad),
    }
}

/// `rest`: extensions, payload and pad.
fn parse_rc<'a>(opcode: Opcode, bth: &[u8; BTH_LEN], rest: &'a [u8]) -> Result<Packet<'a>, Counter> {
    let (ext, padded) = rest.split_at_checked(opcode.headers_len() - BTH_LEN).ok_or(Counter::Short)?;
    let pad = bth[1] >> 4 & 3;
    let len = padded.len().checked_sub(usize::from(pad)).ok_or(Counter::Short)?;
    let dest_qpn = u24(bth, 5);
    if matches!(dest_qpn, 0 | GSI_QPN | 0xff_ffff) {
        return Err(Counter::UnknownQpn);
    }
    let mut headers = Headers {
        opcode,
        solicited: bth[1] & 0x80 != 0,
        ack_req: bth[8] & 0x80 != 0,
        dest_qpn,
        psn: Psn::new(u24(bth, 9)),
        reth: Reth::default(),
        aeth: Aeth::default(),
        imm: 0,
        inv_rkey: 0,
    };
    let mut ext = ext;
    if opcode.has_reth()
        && let Some((reth, after)) = ext.split_first_chunk::<16>()
    {
        let [va @ .., k0, k1, k2, k3, l0, l1, l2, l3] = *reth;
        headers.reth = Reth {
            va: u64::from_be_bytes(va),
            rkey: u32::from_be_bytes([k0, k1, k2, k3]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        };
        ext = after;
    }
    if let Some(word) = ext.first_chunk::<4>() {
        let word = u32::from_be_bytes(*word);
        if opcode.has_imm() {
            headers.imm = word;
        } else if opcode.has_ieth() {
            headers.inv_rkey = word;
        } else if opcode.has_aeth() {
            headers.aeth = Aeth { syndrome: (word >> 24) as u8, msn: word & 0xff_ffff };
        }
    }
    Ok(Packet { headers, payload: &padded[..len], pad })
}

/// `rest`: DETH, payload and pad.
fn parse_mad<'a>(bth: &[u8; BTH_LEN], rest: &'a [u8]) -> Result<Mad<'a>, Counter> {
    let (deth, body) = rest.split_first_chunk::<DETH_LEN>().ok_or(Counter::Short)?;
    if u24(bth, 5) != GSI_QPN {
        return Err(Counter::UnknownQpn);
    }
    let pad = bth[1] >> 4 & 3;
    let mad = body.try_into().map_err(|_| Counter::CmMalformed)?;
    if pad != 0 || deth[..4] != GSI_QKEY.to_be_bytes() {
        return Err(Counter::CmMalformed);
    }
    Ok(Mad { psn: Psn::new(u24(bth, 9)), mad })
}

/// Writes a packet with a management datagram for queue pair 1, all but its ICRC. `psn`: any count; 24 bits are used.
pub fn encode_mad(psn: u32, mad: &[u8; MAD_LEN], out: &mut [u8; MAD_PACKET_LEN]) {
    put_bth(&mut out[..BTH_LEN], UD_SEND_ONLY, PLAIN_FLAGS, GSI_QPN, psn & 0xff_ffff);
    out[12..16].copy_from_slice(&GSI_QKEY.to_be_bytes());
    out[16..20].copy_from_slice(&GSI_QPN.to_be_bytes());
    out[20..].copy_from_slice(mad);
}

/// The three bytes from `at` on.
fn u24<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([0, bytes[at], bytes[at + 1], bytes[at + 2]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let nibble = |c: u8| (c as char).to_digit(16).unwrap() as u8;
        digits.chunks(2).map(|p| nibble(p[0]) << 4 | nibble(p[1])).collect()
    }

    fn rc(udp: &[u8]) -> Packet<'_> {
        match parse(udp) {
            Ok(Parsed::Rc(packet)) => packet,
            other => panic!("{other:?}"),
        }
    }

    fn plain(opcode: Opcode) -> Headers {
        Headers {
            opcode,
            solicited: false,
            ack_req: false,
            dest_qpn: 0x12_3456,
            psn: Psn::new(7),
            reth: Reth::default(),
            aeth: Aeth::default(),
            imm: 0,
            inv_rkey: 0,
        }
    }

    #[test]
    fn send_only_golden() {
        let udp = hex("0450ffff000000ab80000102 526f43457632207465737400 8ad3d1ca");
        let p = rc(&udp);
        let headers =
            Headers { ack_req: true, dest_qpn: 0xab, psn: Psn::new(0x102), ..plain(Opcode::SendOnly) };
        assert_eq!(p, Packet { headers, payload: b"RoCEv2 test", pad: 1 });
        let mut out = [0; 32];
        assert_eq!(headers.encode(1, &mut out), 12);
        assert_eq!(out[..12], udp[..12]);
    }

    #[test]
    fn acknowledge_of_rxe() {
        let p = rc(&hex("1100ffff000abcde00cb22381f00000133ffb89f")).headers;
        assert_eq!((p.opcode, p.dest_qpn, p.psn.get()), (Opcode::Acknowledge, 0xabcde, 0xcb2238));
        assert_eq!((p.ack_req, p.aeth), (false, Aeth { syndrome: 0x1f, msn: 1 }));
    }

    #[test]
    fn write_only_of_rxe() {
        let udp = hex("0a00ffff000abcde8012345800007f0000001000deadbe0100000018
            72646d612d70696e672d303a204142434445464748494a000403ae7c");
        let p = rc(&udp);
        assert_eq!(p.headers.reth, Reth { va: 0x7f00_0000_1000, rkey: 0xdead_be01, len: 24 });
        assert_eq!((p.payload, p.pad, p.headers.ack_req), (&b"rdma-ping-0: ABCDEFGHIJ\0"[..], 0, true));
    }

    #[test]
    fn every_opcode_has_its_length() {
        let lens =
            [12, 12, 12, 16, 12, 16, 28, 12, 12, 16, 28, 32, 28, 16, 12, 16, 16, 16, 24, 40, 40, 16, 16];
        for (op, len) in Opcode::ALL.into_iter().zip(lens) {
            assert_eq!(op.headers_len(), len, "{op:?}");
            assert_eq!(Opcode::from_wire(op.to_wire()), Some(op));
        }
        assert_eq!((0..=255).filter(|&c| Opcode::from_wire(c).is_some()).count(), 23);
    }

    #[test]
    fn shorter_than_headers_pad_and_icrc() {
        let mut udp = hex("0a30ffff000abcde80123458 00000000000010000000000000000000 000000 00000000");
        assert_eq!((rc(&udp).payload.len(), rc(&udp).pad), (0, 3));
        while udp.pop().is_some() {
            assert_eq!(parse(&udp), Err(Counter::Short));
        }
    }

    #[test]
    fn drops_by_reason() {
        let good = hex("0440ffff000abcde80123458 00000000");
        assert!(parse(&good).is_ok());
        let with = |at: usize, value: u8| {
            let mut udp = good.clone();
            udp[at] = value;
            parse(&udp).err()
        };
        // Reserved, FLUSH, UC, UD with immediate, CNP.
        for op in [0x15, 0x1c, 0x24, 0x65, 0x81] {
            assert_eq!(with(0, op), Some(Counter::UnknownOpcode));
        }
        assert_eq!(with(1, 0x41), Some(Counter::Version));
        assert_eq!(with(2, 0x7f), None);
        assert_eq!(with(2, 0x12), Some(Counter::PKey));
        assert_eq!(with(3, 0x34), Some(Counter::PKey));
        for qpn in ["000000", "000001", "ffffff"] {
            let udp = hex(&format!("0440ffff00{qpn}80123458 00000000"));
            assert_eq!(parse(&udp), Err(Counter::UnknownQpn));
        }
    }

    #[test]
    fn byte_4_and_reserved_bits_mean_nothing() {
        let p = hex("0440ffffff0abcdeff123458 00000000");
        assert_eq!(
            rc(&p).headers,
            Headers { ack_req: true, dest_qpn: 0xabcde, psn: Psn::new(0x123458), ..plain(Opcode::SendOnly) }
        );
    }

    #[test]
    fn mad_round_trip_and_refusals() {
        let mad: [u8; 256] = std::array::from_fn(|i| i as u8);
        let mut udp = [0; 280];
        encode_mad(0x7712_3456, &mad, udp.first_chunk_mut().unwrap());
        assert_eq!(udp[..20], hex("6440ffff 00000001 00123456 80010000 00000001")[..]);
        assert_eq!(parse(&udp), Ok(Parsed::Mad(Mad { psn: Psn::new(0x123456), mad: &mad })));
        // AckReq on UD, as rxe sets it.
        udp[8] = 0x80;
        assert!(parse(&udp).is_ok());
        assert_eq!(parse(&udp[..279]), Err(Counter::CmMalformed));
        assert_eq!(parse(&udp[..23]), Err(Counter::Short));
        assert_eq!(parse(&[&udp[..], &[0]].concat()), Err(Counter::CmMalformed));
        for (at, reason) in [(7, Counter::UnknownQpn), (15, Counter::CmMalformed), (1, Counter::CmMalformed)]
        {
            let mut bad = udp;
            bad[at] = 0x50;
            assert_eq!(parse(&bad), Err(reason), "byte {at}");
        }
    }

    #[test]
    fn peek_agrees() {
        assert_eq!(dest_qpn(&hex("0440ffffff0abcde")), Some(0xabcde));
        assert_eq!(dest_qpn(&[0; 7]), None);
    }

    prop_compose! {
        fn any_headers()(
            op in 0..Opcode::ALL.len(), solicited: bool, ack_req: bool, dest_qpn in 2u32..0xff_ffff, psn: u32,
            va: u64, rkey: u32, len: u32, syndrome: u8, msn in 0u32..1 << 24, word: u32,
        ) -> Headers {
            let opcode = Opcode::ALL[op];
            Headers {
                opcode, solicited, ack_req, dest_qpn, psn: Psn::new(psn),
                reth: if opcode.has_reth() { Reth { va, rkey, len } } else { Reth::default() },
                aeth: if opcode.has_aeth() { Aeth { syndrome, msn } } else { Aeth::default() },
                imm: if opcode.has_imm() { word } else { 0 },
                inv_rkey: if opcode.has_ieth() { word } else { 0 },
            }
        }
    }

    proptest! {
        #[test]
        fn parse_of_encode_is_identity(headers in any_headers(), payload: Vec<u8>) {
            prop_assume!(headers.len() <= Headers::MAX_LEN && headers.opcode != Opcode::AtomicAcknowledge);
            let pad = (payload.len().wrapping_neg() & 3) as u8;
            let mut out = [0; Headers::MAX_LEN];
            let n = headers.encode(pad, &mut out);
            prop_assert_eq!(n, headers.len());
            let udp = [&out[..n], &payload, &[0; 7][..usize::from(pad) + ICRC_LEN]].concat();
            prop_assert_eq!(parse(&udp), Ok(Parsed::Rc(Packet { headers, payload: &payload, pad })));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(udp: Vec<u8>) {
            if let Ok(Parsed::Rc(p)) = parse(&udp) {
                prop_assert_eq!(p.headers.len() + p.payload.len() + usize::from(p.pad) + ICRC_LEN, udp.len());
            }
        }
    }
}

//! Any UDP payload: what is parsed is encoded to something that is parsed alike, a sealed packet passes the check of its
//! CRC and with an error is never taken for the one sent. The first four bytes choose the family, the identification and the error.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libfuzzer_sys::fuzz_target;
use roce_proto::icrc::{Flow, FlowCrc, PeerIds};
use roce_proto::packet::{ICRC_LEN, MAD_PACKET_LEN, Packet, Parsed, dest_qpn, encode_mad, parse};
use roce_proto::{Headers, Opcode};

const OWN: PeerIds = PeerIds::Own { index_in_run: 0 };

fuzz_target!(|input: &[u8]| {
    let Some((head, udp)) = input.split_first_chunk::<4>() else { return };
    match parse(udp) {
        Ok(Parsed::Rc(packet)) => {
            assert_eq!(dest_qpn(udp), Some(packet.headers.dest_qpn));
            again(&packet);
        }
        Ok(Parsed::Mad(mad)) => {
            let mut out = [0; MAD_PACKET_LEN + ICRC_LEN];
            encode_mad(mad.psn.get(), mad.mad, out.first_chunk_mut().expect("shorter"));
            assert_eq!(parse(&out), Ok(Parsed::Mad(mad)));
        }
        Err(reason) => assert!(!reason.name().is_empty()),
    }
    crc(head, udp);
});

fn again(packet: &Packet<'_>) {
    if matches!(packet.headers.opcode, Opcode::AtomicAcknowledge | Opcode::CompareSwap | Opcode::FetchAdd) {
        return; // never sent
    }
    let mut out = [0; Headers::MAX_LEN];
    let n = packet.headers.encode(packet.pad, &mut out);
    assert_eq!(n, packet.headers.len());
    let tail = [0; 3 + ICRC_LEN];
    let udp = [&out[..n], packet.payload, &tail[..usize::from(packet.pad) + ICRC_LEN]].concat();
    assert_eq!(parse(&udp), Ok(Parsed::Rc(*packet)));
}

fn crc(head: &[u8; 4], udp: &[u8]) {
    let id = u16::from_be_bytes([head[0] & 0x81, head[1]]);
    let v4 = head[2] & 1 == 0;
    let (src, dst): (IpAddr, IpAddr) = if v4 {
        (Ipv4Addr::new(10, 9, head[2], 1).into(), Ipv4Addr::new(10, 9, 9, 2).into())
    } else {
        (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::from([head[2]; 16]).into())
    };
    let crc = FlowCrc::new(Flow { src, src_port: 49152, dst });
    // As received, most of them wrong.
    if crc.verify(udp, OWN) {
        assert!(crc.verify(udp, PeerIds::Foreign) && crc.recover_id(udp).is_some());
    }
    let mut udp = udp.to_vec();
    let len = udp.len();
    let Some((covered, icrc)) = udp.split_last_chunk_mut::<ICRC_LEN>() else { return };
    if covered.len() < 12 {
        return assert!(!crc.verify(&udp, PeerIds::Foreign));
    }
    // Headers of any length may be given at once.
    let at = (12 + usize::from(head[3]) % 29).min(covered.len());
    let mut digest = crc.begin(len, id, &covered[..at]);
    digest.update(&covered[at..]);
    *icrc = digest.finish();
    assert!(crc.verify(&udp, PeerIds::Foreign));
    assert_eq!(crc.verify(&udp, OWN), !v4 || id < 128);
    assert_eq!(crc.recover_id(&udp), Some(if v4 { id } else { 0 }));
    let bit = usize::from(u16::from_be_bytes([head[3], head[1]])) % (8 * len);
    udp[bit / 8] ^= 1 << (bit % 8);
    // It may look like another identification, but never like this one.
    if bit / 8 != 4 {
        assert_ne!(crc.recover_id(&udp), Some(if v4 { id } else { 0 }));
    }
}

//! Published and captured packets, and the recovery of identifications.

use proptest::prelude::*;

use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let nibble = |c: u8| (c as char).to_digit(16).unwrap() as u8;
    digits.chunks(2).map(|p| nibble(p[0]) << 4 | nibble(p[1])).collect()
}

/// A packet from its IP header on: what a socket shows of it, and its IPv4 identification.
fn received(packet: &[u8]) -> (FlowCrc, Vec<u8>, u16) {
    let v4 = packet[0] >> 4 == 4;
    let addr = |at: usize| -> IpAddr {
        if v4 {
            <[u8; 4]>::try_from(&packet[at..at + 4]).unwrap().into()
        } else {
            <[u8; 16]>::try_from(&packet[at..at + 16]).unwrap().into()
        }
    };
    let (src, dst, udp) = if v4 { (12, 16, 20) } else { (8, 24, 40) };
    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    assert_eq!(word(udp + 2), UDP_PORT);
    assert_eq!(usize::from(word(udp + 4)), packet.len() - udp);
    let flow = Flow { src: addr(src), src_port: word(udp), dst: addr(dst) };
    (FlowCrc::new(flow), packet[udp + 8..].to_vec(), if v4 { word(4) } else { 0 })
}

fn seal(crc: &FlowCrc, udp: &mut [u8], id: u16) {
    let len = udp.len();
    let (covered, icrc) = udp.split_last_chunk_mut::<4>().unwrap();
    let mut digest = crc.begin(len, id, &covered[..12]);
    digest.update(&covered[12..]);
    *icrc = digest.finish();
}

const OWN: PeerIds = PeerIds::Own { index_in_run: 0 };

const SEND_ONLY: &str = "4502003800004000 4011b6afc0000201 c0000202c00012b7 0024c07f0450ffff
    000000ab80000102 526f434576322074 65737400 8ad3d1ca";

/// From rxe, a ConnectX-4 Lx (published in scapy's `roce.uts`), and by calculation.
fn vectors() -> [String; 6] {
    [
        SEND_ONLY.into(),
        "60000000001c114020010db800000000000000000000000120010db800000000
         0000000000000002c00112b7001c03d51140ffff00000011000001021f000001cfb1ccad"
            .into(),
        "4500003062b640004011b1f20a0909010a090902caaf12b7001c00001100ffff000abcde00cb22381f00000133ffb89f"
            .into(),
        "4500005462bb40004011b1c90a0909010a090902caaf12b7004000000a00ffff000abcde8012345800007f0000001000dead
         be010000001872646d612d70696e672d303a204142434445464748494a000403ae7c"
            .into(),
        format!(
            "45c2003c718c4000401191610a0011010a001201000012b7002800008100ffff4000011800000000{}82fd002a",
            "00".repeat(16)
        ),
        "45000134667640004011ad2e0a0909010a090902d87212b7012000006400ffff00000001800000028001000000000001
         01070203000000000000000271b48e170010000000000000178eb4710000000000000000010604d2000000fffe000001
         00000000000000000000120000000000000000a0ea51d3a7ffff37f0ffffffff00000000000000000000ffff0a090901
         00000000000000000000ffff0a0909026f0a900000400088000000000000000000000000000000000000000000000000
         00000000000000000000000000000000000000000040bd490000000000000000000000000a0909010000000000000000
         000000000a0909020000bd1b00020000030001006a2db8b8e5634906afc2ae54cb233589b8f010f4b8244495bede91f3
         0d9414cd010000000000000000000000398e1ced"
            .into(),
    ]
}

#[test]
fn vectors_verify_and_are_sealed_alike() {
    for text in vectors() {
        let (crc, mut udp, id) = received(&hex(&text));
        assert!(crc.verify(&udp, PeerIds::Foreign), "{text}");
        assert_eq!(crc.recover_id(&udp), Some(id), "{text}");
        assert_eq!(crc.verify(&udp, OWN), id <= 127, "{text}");
        let before = udp.clone();
        let end = udp.len() - 4;
        udp[end..].fill(0);
        seal(&crc, &mut udp, id);
        assert_eq!(udp, before, "{text}");
    }
}

#[test]
fn identification_and_df_variants() {
    let (crc, udp, _) = received(&hex(SEND_ONLY));
    let with = |icrc: &str| [&udp[..udp.len() - 4], &hex(icrc)[..]].concat();
    let other_id = with("9a1bb5c1");
    assert_eq!(crc.recover_id(&other_id), Some(0x1234));
    assert!(crc.verify(&other_id, PeerIds::Foreign) && !crc.verify(&other_id, OWN));
    let no_df = with("995934e2");
    assert!(crc.verify(&no_df, PeerIds::Foreign) && !crc.verify(&no_df, OWN));
    assert_eq!(crc.recover_id(&no_df), None);
}

#[test]
fn congestion_bits_do_not_matter() {
    let (crc, mut udp, _) = received(&hex(SEND_ONLY));
    for byte in 0..=255 {
        udp[4] = byte;
        assert!(crc.verify(&udp, OWN));
    }
    // The reserved bits beside AckReq do.
    udp[8] ^= 1;
    assert!(!crc.verify(&udp, OWN));
}

#[test]
fn addresses_and_port_matter() {
    let flow = Flow { src: [192, 0, 2, 1].into(), src_port: 49152, dst: [192, 0, 2, 2].into() };
    let (_, udp, _) = received(&hex(SEND_ONLY));
    assert!(FlowCrc::new(flow).verify(&udp, OWN));
    for wrong in [
        Flow { src: [192, 0, 2, 3].into(), ..flow },
        Flow { dst: [192, 0, 2, 3].into(), ..flow },
        Flow { src_port: 49153, ..flow },
    ] {
        assert!(!FlowCrc::new(wrong).verify(&udp, OWN));
    }
}

#[test]
fn lengths_that_no_packet_has() {
    let (crc, _, _) = received(&hex(SEND_ONLY));
    let zeros = vec![0; 65508];
    for len in (0..16).chain([65508]) {
        assert!(!crc.verify(&zeros[..len], PeerIds::Foreign));
        assert_eq!(crc.recover_id(&zeros[..len]), None);
    }
    let mut longest = vec![0; 65507];
    seal(&crc, &mut longest, 0xfffe);
    assert_eq!(crc.recover_id(&longest), Some(0xfffe));
}

#[test]
fn fast_and_slow_products_agree() {
    let mut v = 1u32;
    for _ in 0..1000 {
        let w = v.wrapping_mul(0x9e37_79b1).rotate_left(7) ^ 0x5555;
        assert_eq!(multiply(v, w), multiply_slowly(v, w));
        v = w;
    }
    assert_eq!(multiply(0xffff_ffff, 0xffff_ffff), multiply_slowly(0xffff_ffff, 0xffff_ffff));
}

/// An error passes if it looks like another identification: 16 bits and DF for foreign peers, so one in 2^15; 7 bits for
/// our own, so one in 2^25. Always the same packets, so the counts are, too.
#[test]
fn errors_pass_as_rarely_as_calculated() {
    let (crc, mut udp, _) = received(&hex(SEND_ONLY));
    udp.resize(1044, 0x5a);
    seal(&crc, &mut udp, 3);
    let (mut state, mut foreign, mut own) = (0x2545_f491u32, 0, 0);
    const TRIES: u32 = 1 << 19;
    for _ in 0..TRIES {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let end = udp.len() - 4;
        let icrc = udp[end..].to_vec();
        udp[end..].copy_from_slice(&state.to_le_bytes());
        foreign += u32::from(crc.verify(&udp, PeerIds::Foreign));
        own += u32::from(crc.verify(&udp, OWN));
        udp[end..].copy_from_slice(&icrc);
    }
    // 16 are expected.
    assert!((4..=40).contains(&foreign), "{foreign}");
    assert!(own <= 1, "{own}");
}

proptest! {
    #[test]
    fn any_identification_is_recovered(body in prop::collection::vec(any::<u8>(), 16..4500), id: u16, at: prop::sample::Index, bit in 0..8) {
        let (crc, _, _) = received(&hex(SEND_ONLY));
        let mut udp = body;
        seal(&crc, &mut udp, id);
        prop_assert_eq!(crc.recover_id(&udp), Some(id));
        prop_assert!(crc.verify(&udp, PeerIds::Foreign));
        let run = PeerIds::Own { index_in_run: id };
        prop_assert!(crc.verify(&udp, run));
        prop_assert_eq!(crc.verify(&udp, PeerIds::Own { index_in_run: 5 }), id <= 127);
        // A single-bit error never looks like the packet that was sent. Byte 4 is not covered.
        let at = at.index(udp.len());
        udp[at] ^= 1u8 << bit;
        prop_assert_eq!(crc.recover_id(&udp) == Some(id), at == 4);
    }

    #[test]
    fn ipv6_has_nothing_to_recover(body in prop::collection::vec(any::<u8>(), 16..300), at: prop::sample::Index, bit in 0..8) {
        let (crc, _, _) = received(&hex(&vectors()[1]));
        let mut udp = body;
        seal(&crc, &mut udp, 99);
        prop_assert!(crc.verify(&udp, PeerIds::Foreign) && crc.verify(&udp, OWN));
        let at = at.index(udp.len());
        udp[at] ^= 1u8 << bit;
        prop_assert_eq!(crc.verify(&udp, PeerIds::Foreign), at == 4);
    }
}

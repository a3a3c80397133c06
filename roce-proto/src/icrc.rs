//! The invariant CRC: Ethernet's CRC-32 over the packet from the IP header on, with what routers change set to ones.
//!
//! A socket does not tell the identification field of IPv4, which is covered. The CRC is linear, though: of a packet
//! whose fields are right but for the identification, the CRC differs from the expected one by `id * x^(8k)`, where `k`
//! is the number of bytes from that field to the end. Multiplied by `x^(-8k)`, the difference is the identification
//! itself, a number below 2^16; that of a corrupted packet is any 32 bits. So the check keeps the strength of all bits
//! that the identification is known not to use: an error passes with a probability of 2^-25 from our own peers and of
//! 2^-15 from foreign ones, whose DF is not known either. Single-bit errors are no exception. With IPv6 it is 2^-32, and
//! errors of few bits never pass.
//!
//! Source: IBTA A17.3.3, 7.8.1; Linux `rxe_icrc.c`.

use std::net::IpAddr;

use crc32fast::Hasher;

use crate::UDP_PORT;
use crate::headers::{BTH_LEN, Headers};
use crate::packet::ICRC_LEN;

/// Packets from one port to an address, whose port is [`UDP_PORT`].
///
/// Both addresses are of one family. IPv4 addresses are not in their IPv6 form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Sender's address.
    pub src: IpAddr,
    /// Sender's UDP port.
    pub src_port: u16,
    /// Receiver's address.
    pub dst: IpAddr,
}

/// What is known of the IPv4 identification of received packets. Of IPv6, all is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerIds {
    /// This implementation sent it: the number of the segment in its GSO run, and DF is set. Where the run was split or
    /// merged on the way, any number that a segment can have.
    Own {
        /// Place in the buffer as received, the likeliest value.
        index_in_run: u16,
    },
    /// Any identification, DF set or not.
    Foreign,
}

/// The largest number of a segment in a GSO run. Source: Linux `udp.h`, `UDP_MAX_SEGMENTS` of 128.
const MAX_SEGMENT: u16 = 127;

const LRH_MASK: usize = 8;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const UDP_LEN: usize = 8;
/// Masked LRH, IP and UDP headers.
const TEMPLATE_LEN: usize = LRH_MASK + IPV6_LEN + UDP_LEN;
/// Transport headers that [`FlowCrc::begin`] takes at most.
const MAX_HEAD: usize = 64;

/// The CRC of one flow's packets: its masked IP and UDP headers, ready made. 80 bytes; cheap to make.
#[derive(Clone, Debug)]
pub struct FlowCrc {
    /// Lengths and identification are filled in per packet.
    template: [u8; TEMPLATE_LEN],
    v4: bool,
    /// Of nothing: what the CPU can do was found out when it was made.
    empty: Hasher,
}

impl FlowCrc {
    /// For the packets of `flow`.
    pub fn new(flow: Flow) -> Self {
        let mut template = [0xff; _];
        let udp_at = match (flow.src, flow.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                template[8] = 0x45;
                template[14..16].copy_from_slice(&[0x40, 0]);
                template[17] = 17;
                template[20..24].copy_from_slice(&src.octets());
                template[24..28].copy_from_slice(&dst.octets());
                LRH_MASK + IPV4_LEN
            }
            (src, dst) => {
                template[8] = 0x6f;
                template[14] = 17;
                template[16..32].copy_from_slice(&v6_octets(src));
                template[32..48].copy_from_slice(&v6_octets(dst));
                LRH_MASK + IPV6_LEN
            }
        };
        template[udp_at..udp_at + 2].copy_from_slice(&flow.src_port.to_be_bytes());
        template[udp_at + 2..udp_at + 4].copy_from_slice(&UDP_PORT.to_be_bytes());
        Self { template, v4: udp_at == LRH_MASK + IPV4_LEN, empty: Hasher::new() }
    }

    /// Begins a packet with `udp_payload_len` bytes of UDP payload, ICRC included, at most 65507. `ip_id`: the IPv4
    /// identification it will be sent with, which is the number of the segment in a GSO run, or 0. `head`: the base
    /// transport header, 12 bytes, and as much of what follows it as is at hand, in all at most 64 bytes.
    #[inline]
    pub fn begin(&self, udp_payload_len: usize, ip_id: u16, head: &[u8]) -> Digest {
        let udp_len = UDP_LEN + udp_payload_len;
        // In one piece: short updates cost as much as long ones.
        let mut bytes = [0; TEMPLATE_LEN + MAX_HEAD];
        bytes[..TEMPLATE_LEN].copy_from_slice(&self.template);
        let mut put = |at: usize, value: usize| {
            bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
        };
        let head_at = if self.v4 {
            put(10, IPV4_LEN + udp_len);
            put(12, usize::from(ip_id));
            put(32, udp_len);
            LRH_MASK + IPV4_LEN + UDP_LEN
        } else {
            put(12, udp_len);
            put(52, udp_len);
            TEMPLATE_LEN
        };
        let end = head_at + head.len();
        bytes[head_at..end].copy_from_slice(head);
        // FECN, BECN and reserved bits, which switches may set.
        bytes[head_at + 4] = 0xff;
        let mut crc = self.empty.clone();
        crc.update(&bytes[..end]);
        Digest(crc)
    }

    /// Whether the ICRC at the end of a received UDP payload is right. `false` also for payloads too short or too long
    /// to be packets.
    pub fn verify(&self, udp: &[u8], ids: PeerIds) -> bool {
        let guess = match ids {
            PeerIds::Own { index_in_run } => index_in_run,
            PeerIds::Foreign => 0,
        };
        let Some(wrong) = self.difference(udp, guess) else { return false };
        if wrong == 0 || !self.v4 {
            return wrong == 0;
        }
        let word = ip_word(wrong, udp.len());
        match ids {
            PeerIds::Own { .. } => word >> 16 == 0 && guess ^ id_of(word) <= MAX_SEGMENT,
            PeerIds::Foreign => (word & !DF) >> 16 == 0,
        }
    }

    /// The IPv4 identification with which a received packet must have been sent, DF set, or `None` if there is none that
    /// makes its ICRC right. 0 for IPv6. For tests of what a path does to packets.
    pub fn recover_id(&self, udp: &[u8]) -> Option<u16> {
        let wrong = self.difference(udp, 0)?;
        if wrong == 0 || !self.v4 {
            return (wrong == 0).then_some(0);
        }
        let word = ip_word(wrong, udp.len());
        (word >> 16 == 0).then(|| id_of(word))
    }

    /// Received ICRC xor the expected one.
    fn difference(&self, udp: &[u8], ip_id: u16) -> Option<u32> {
        let (covered, icrc) = udp.split_last_chunk::<ICRC_LEN>()?;
        if covered.len() < BTH_LEN || udp.len() > usize::from(u16::MAX) - IPV4_LEN - UDP_LEN {
            return None;
        }
        let (head, rest) = covered.split_at(covered.len().min(Headers::MAX_LEN));
        let mut digest = self.begin(udp.len(), ip_id, head);
        digest.update(rest);
        Some(u32::from_le_bytes(digest.finish()) ^ u32::from_le_bytes(*icrc))
    }
}

fn v6_octets(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}

/// The CRC of one packet under way: [`Digest::update`] for what follows its head, [`Digest::finish`].
#[derive(Clone, Debug)]
pub struct Digest(Hasher);

impl Digest {
    /// More extension headers, payload, pad.
    pub fn update(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.0.update(bytes);
        }
    }

    /// The ICRC as it goes on the wire.
    pub fn finish(self) -> [u8; ICRC_LEN] {
        self.0.finalize().to_le_bytes()
    }
}

/// DF in what [`ip_word`] gives.
const DF: u32 = 0x0040_0000;

/// By what the four bytes from the IPv4 identification on must differ to make the CRC of a packet with `udp_payload_len`
/// bytes differ by `crc_difference`; little-endian.
fn ip_word(crc_difference: u32, udp_payload_len: usize) -> u32 {
    // From the identification to the end of what is covered; `difference` has checked the length.
    let k = (IPV4_LEN - 4 + UDP_LEN + udp_payload_len - ICRC_LEN) & 0xffff;
    multiply(crc_difference, multiply(BACK_BY_1[k & 0xff], BACK_BY_256[k >> 8]))
}

/// The identification among the bytes of [`ip_word`].
fn id_of(word: u32) -> u16 {
    (word as u16).swap_bytes()
}

/// The CRC's polynomial. Bit 31 of a word is the coefficient of `x^0`, as everywhere below.
const POLYNOMIAL: u32 = 0xedb8_8320;

/// `x^(-8i)`.
static BACK_BY_1: [u32; 256] = powers(back_by_bytes(1));

/// `x^(-8*256*i)`.
static BACK_BY_256: [u32; 256] = powers(back_by_bytes(256));

/// `b * x^(8(j + 1))` for each byte `b` in the places of `x^24..x^31`: what leaves a register of which `4 - j` bytes are
/// left after it.
static FORWARD: [[u32; 256]; 4] = {
    let mut tables = [[0; 256]; 4];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut j = 0;
        while j < 4 {
            let mut bit = 0;
            while bit < 8 {
                value = value >> 1 ^ if value & 1 != 0 { POLYNOMIAL } else { 0 };
                bit += 1;
            }
            tables[j][byte] = value;
            j += 1;
        }
        byte += 1;
    }
    tables
};

/// `x^(-8 bytes)`.
const fn back_by_bytes(bytes: usize) -> u32 {
    let mut value = 1 << 31;
    let mut bit = 0;
    while bit < 8 * bytes {
        value = if value >> 31 != 0 { (value ^ POLYNOMIAL) << 1 | 1 } else { value << 1 };
        bit += 1;
    }
    value
}

/// `base^i`.
const fn powers(base: u32) -> [u32; 256] {
    let mut out = [1 << 31; 256];
    let mut i = 1;
    while i < 256 {
        out[i] = multiply_slowly(out[i - 1], base);
        i += 1;
    }
    out
}

/// The product modulo the polynomial, bit by bit.
const fn multiply_slowly(a: u32, b: u32) -> u32 {
    let (mut product, mut shifted, mut bit) = (0, a, 32);
    while bit > 0 {
        bit -= 1;
        if b >> bit & 1 != 0 {
            product ^= shifted;
        }
        shifted = shifted >> 1 ^ if shifted & 1 != 0 { POLYNOMIAL } else { 0 };
    }
    product
}

/// The product modulo the polynomial.
fn multiply(a: u32, b: u32) -> u32 {
    // Bit 63 - e is the coefficient of x^e; 32 and above must be brought below.
    let product = carryless(a, b) << 1;
    let high = (product as u32).to_le_bytes();
    let low = (product >> 32) as u32;
    low ^ FORWARD[3][usize::from(high[0])]
        ^ FORWARD[2][usize::from(high[1])]
        ^ FORWARD[1][usize::from(high[2])]
        ^ FORWARD[0][usize::from(high[3])]
}

/// The product of polynomials, of 63 bits. Every fourth bit is multiplied at a time: sums of up to eight ones then stay
/// within the three zeros before the next one. The carry-less instruction would need unsafe code.
fn carryless(a: u32, b: u32) -> u64 {
    const EVERY_FOURTH: u64 = 0x1111_1111_1111_1111;
    let split = |v: u32| std::array::from_fn::<u64, 4, _>(|i| u64::from(v) & EVERY_FOURTH << i);
    let (a, b) = (split(a), split(b));
    (0..4).fold(0, |product, i| {
        let sum = (0..4).fold(0, |sum, j| sum ^ a[j].wrapping_mul(b[(4 + i - j) % 4]));
        product | sum & EVERY_FOURTH << i
    })
}

#[cfg(test)]
mod tests;

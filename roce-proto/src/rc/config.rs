//! Parameters of a connected queue pair, and the IBTA codes among them.

use crate::{Nanos, Psn};

/// Most READ requests that can be outstanding in one direction.
pub const MAX_READS: u8 = 16;

/// Longest message (IBTA 9.7.7).
pub const MAX_MESSAGE: u32 = 1 << 31;

/// What the connection manager agreed on, and own limits.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Path MTU: 256, 512, 1024, 2048 or 4096 bytes of payload; other values are rounded down to one of these.
    pub mtu: u32,
    /// The peer's queue pair, 24 bits.
    pub dest_qpn: u32,
    /// First sequence number that we send.
    pub send_psn: Psn,
    /// First sequence number that we expect.
    pub recv_psn: Psn,
    /// Local ACK timeout code 1..=31, 4.096 µs × 2^code; 0 is taken as 17. Upper bound of the retransmission timer.
    pub ack_timeout: u8,
    /// The peer is given up after so long without progress; 0: as `retry` has it.
    pub give_up: Nanos,
    /// 0..=7. Without [`Config::give_up`], the peer is given up after `retry` + 1 tries and that many times four timeouts without progress, the
    /// longest that the standard lets a timer be.
    pub retry: u8,
    /// 0..=7, 7 is for ever.
    pub rnr_retry: u8,
    /// Code 0..=31 of the wait that we ask of a peer for which we have no receive.
    pub min_rnr_timer: u8,
    /// READs of the peer that we serve at the same time, at most [`MAX_READS`]; 0 refuses READs.
    pub serve_reads: u8,
    /// READs that the peer serves at the same time; capped to [`MAX_READS`].
    pub issue_reads: u8,
    /// Unacknowledged bytes, counting [`super::PACKET_OVERHEAD`] per packet.
    pub max_inflight: u32,
    /// The same at the beginning; grows while nothing is lost.
    pub initial_inflight: u32,
    /// How long the acknowledgement of a complete message may wait for company.
    pub ack_delay: Nanos,
    /// Lower bound of the retransmission timer: a peer may not be running for a moment.
    pub min_rto: Nanos,
}

impl Config {
    /// Usual values for all that the connection manager may leave open.
    pub fn new(mtu: u32, dest_qpn: u32, send_psn: Psn, recv_psn: Psn) -> Self {
        Self {
            mtu,
            dest_qpn,
            send_psn,
            recv_psn,
            ack_timeout: 17,
            give_up: 0,
            retry: 7,
            rnr_retry: 7,
            min_rnr_timer: 12,
            serve_reads: MAX_READS,
            issue_reads: MAX_READS,
            max_inflight: 512 << 10,
            initial_inflight: 64 << 10,
            ack_delay: 20_000,
            min_rto: 2_000_000,
        }
    }

    /// log2 of the MTU, 8..=12.
    pub(super) fn mtu_shift(&self) -> u32 {
        self.mtu.clamp(256, 4096).ilog2()
    }

    /// The timeout that the code stands for (IBTA 9.7.6.1.3), and some tries before the peer is given up.
    pub(super) fn timeout(&self) -> Nanos {
        let code = if self.ack_timeout == 0 { 17 } else { self.ack_timeout & 31 };
        let standard = 4096 << code;
        if self.give_up == 0 { standard } else { standard.min((self.give_up / 4).max(1)) }
    }
}

/// How long to wait after an RNR NAK with this timer code (IBTA 9.7.5.2.8, table 45).
pub(super) fn rnr_wait(code: u8) -> Nanos {
    const TENS_OF_MICROSECONDS: [u32; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
        3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    u64::from(TENS_OF_MICROSECONDS[usize::from(code & 31)]) * 10_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_for_the_times_of_the_standard() {
        assert_eq!(rnr_wait(0), 655_360_000);
        assert_eq!(rnr_wait(1), 10_000);
        assert_eq!(rnr_wait(12), 640_000);
        assert_eq!(rnr_wait(31), 491_520_000);
        let mut config = Config::new(1024, 2, Psn::new(0), Psn::new(0));
        assert_eq!(config.timeout(), 536_870_912);
        config.ack_timeout = 0;
        assert_eq!(config.timeout(), 536_870_912);
        config.ack_timeout = 31;
        assert_eq!(config.timeout(), 4096 << 31);
        config.give_up = 1_000_000_000;
        assert_eq!(config.timeout(), 250_000_000);
    }

    #[test]
    fn any_mtu_becomes_a_legal_one() {
        for (mtu, shift) in [(0, 8), (255, 8), (256, 8), (1023, 9), (1024, 10), (4096, 12), (u32::MAX, 12)] {
            assert_eq!(Config::new(mtu, 2, Psn::new(0), Psn::new(0)).mtu_shift(), shift);
        }
    }
}

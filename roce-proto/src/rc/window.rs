//! How much may be on the way, and for how long. Recovery is go-back-N and buffers of sockets are small, so that losing
//! packets to a full buffer costs much more than waiting: the window starts small, and halves with every loss.

use super::config::Config;
use crate::Nanos;

/// What a packet costs in a receive buffer beside its payload: about what Linux accounts for small packets.
pub const PACKET_OVERHEAD: u32 = 512;

/// Most unacknowledged packets; sequence numbers must stay far from half of their range, and peers hold state.
pub const MAX_PSNS: u64 = 256;

/// The congestion window, in bytes with [`PACKET_OVERHEAD`] per packet. After TCP's (RFC 5681).
pub(super) struct Window {
    size: u32,
    threshold: u32,
    max: u32,
    /// A full packet; the window is never smaller.
    packet: u32,
    /// Acknowledged bytes towards the next step above the threshold.
    credit: u32,
    mtu_shift: u32,
}

impl Window {
    pub(super) fn new(config: &Config) -> Self {
        let packet = (1 << config.mtu_shift()) + PACKET_OVERHEAD;
        let max = config.max_inflight.max(packet);
        Self {
            size: config.initial_inflight.clamp(packet, max),
            threshold: max,
            max,
            packet,
            credit: 0,
            mtu_shift: config.mtu_shift(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        u64::from(self.size)
    }

    /// A full packet.
    pub(super) fn packet(&self) -> u64 {
        u64::from(self.packet)
    }

    /// An acknowledgement is to be asked for at least every so many packets: four times per window.
    pub(super) fn ack_interval(&self) -> u32 {
        (self.size >> (self.mtu_shift + 2)).clamp(1, 32)
    }

    /// `bytes` were acknowledged of the `flight` before it. A window that was not used does not grow.
    pub(super) fn acked(&mut self, bytes: u64, flight: u64) {
        if self.size >= self.max || flight < u64::from(self.size / 2) {
            return;
        }
        let bytes = bytes.min(u64::from(self.max)) as u32;
        if self.size < self.threshold {
            self.size = self.size.saturating_add(bytes).min(self.max);
            return;
        }
        self.credit = self.credit.saturating_add(bytes);
        if self.credit >= self.size {
            self.credit -= self.size;
            self.size = (self.size + self.packet).min(self.max);
        }
    }

    /// Packets were lost while `flight` bytes were on the way. Some must stay on the way: only packets behind a lost one
    /// make the peer complain without a timeout.
    pub(super) fn lost(&mut self, flight: u64) {
        let used = flight.min(u64::from(self.size)) as u32;
        self.size = (used / 2).max(self.size.min(4 * self.packet));
        self.threshold = self.size;
        self.credit = 0;
    }

    /// Nobody answered. `first`: for the first time since there was progress. The threshold remembers what worked
    /// before: a peer that was merely not running is soon back at full speed.
    pub(super) fn silence(&mut self, flight: u64, first: bool) {
        if first {
            self.threshold = ((flight / 2) as u32).clamp(4 * self.packet, (4 * self.packet).max(self.max));
        }
        self.size = (self.size / 2).max(self.packet);
        self.credit = 0;
    }
}

/// Round-trip time and the timer made of it (RFC 6298).
pub(super) struct Rtt {
    smoothed: Nanos,
    variation: Nanos,
    min: Nanos,
    max: Nanos,
    backoff: u32,
}

impl Rtt {
    /// Timer before the first measurement: longer than any path this is meant for.
    const INITIAL: Nanos = 20_000_000;

    pub(super) fn new(config: &Config) -> Self {
        let max = config.timeout();
        Self { smoothed: 0, variation: 0, min: config.min_rto.min(max), max, backoff: 0 }
    }

    pub(super) fn measured(&mut self, rtt: Nanos) {
        let rtt = rtt.min(self.max);
        if self.smoothed == 0 {
            (self.smoothed, self.variation) = (rtt.max(1), rtt / 2);
        } else {
            let off = self.smoothed.abs_diff(rtt);
            self.variation = self.variation - self.variation / 4 + off / 4;
            self.smoothed = (self.smoothed - self.smoothed / 8 + rtt / 8).max(1);
        }
    }

    /// The retransmission timer.
    pub(super) fn timer(&self) -> Nanos {
        let base = if self.smoothed == 0 { Self::INITIAL } else { self.smoothed + 4 * self.variation };
        (base.clamp(self.min, self.max) << self.backoff).min(self.max)
    }

    /// Within this time after a retransmission, complaints are about the packets before it.
    pub(super) fn settling(&self) -> Nanos {
        (2 * self.smoothed).clamp(self.min / 8, self.min)
    }

    pub(super) fn back_off(&mut self) {
        self.backoff = (self.backoff + 1).min(10);
    }

    pub(super) fn progress(&mut self) {
        self.backoff = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Psn;

    fn config() -> Config {
        Config {
            max_inflight: 100_000,
            initial_inflight: 10_000,
            ..Config::new(4096, 2, Psn::new(0), Psn::new(0))
        }
    }

    #[test]
    fn window_grows_while_used_and_halves_on_loss_down_to_one_packet() {
        let mut window = Window::new(&config());
        window.acked(5_000, 1_000);
        assert_eq!(window.size(), 10_000, "an idle connection proves nothing");
        for _ in 0..20 {
            window.acked(window.size(), window.size());
        }
        assert_eq!(window.size(), 100_000);
        window.lost(100_000);
        assert_eq!(window.size(), 50_000);
        window.acked(50_000, 50_000);
        assert_eq!(window.size(), 50_000 + window.packet(), "one packet per round trip");
        window.lost(1);
        assert_eq!(window.size(), 4 * window.packet());
        for _ in 0..20 {
            window.silence(1, true);
        }
        assert_eq!(window.size(), window.packet());
        assert_eq!(window.ack_interval(), 1);
    }

    #[test]
    fn window_holds_a_packet_even_if_told_otherwise() {
        let window = Window::new(&Config { max_inflight: 0, initial_inflight: 0, ..config() });
        assert_eq!(window.size(), u64::from(4096 + PACKET_OVERHEAD));
    }

    #[test]
    fn timer_follows_the_round_trip_within_bounds_and_backs_off() {
        let mut rtt = Rtt::new(&config());
        assert_eq!(rtt.timer(), Rtt::INITIAL);
        for _ in 0..50 {
            rtt.measured(50_000);
        }
        assert_eq!(rtt.timer(), 2_000_000);
        for _ in 0..100 {
            rtt.measured(10_000_000);
        }
        assert!((10_000_000..20_000_000).contains(&rtt.timer()), "{}", rtt.timer());
        for _ in 0..100 {
            rtt.back_off();
        }
        assert_eq!(rtt.timer(), config().timeout());
        rtt.progress();
        assert!(rtt.timer() < 20_000_000);
    }

    #[test]
    fn timer_is_never_above_the_agreed_timeout() {
        let mut rtt = Rtt::new(&Config { ack_timeout: 4, ..config() });
        assert_eq!(rtt.timer(), 65_536);
        rtt.measured(1_000_000_000);
        assert_eq!(rtt.timer(), 65_536);
    }
}

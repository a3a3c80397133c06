//! Heartbeats of one path (`rtrs.c`, `hb_work`). Both ends run this, independently of each other.
//!
//! Every interval the machine ticks: with nothing outstanding it sends one HB_MSG on con 0; otherwise it counts. Any
//! message from the peer sets the count back. With the defaults a path dies 30 s after the first heartbeat without
//! any sign of life, which is 30 to 35 s after the peer's last message.

/// Interval and patience.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Nanoseconds between ticks (kernel: 5 s). Not below what a kernel peer needs: it answers late while it opens
    /// or closes a device.
    pub interval_ns: u64,
    /// Silent ticks that are forgiven (kernel: 5).
    pub missed_max: u32,
}

impl Default for Config {
    fn default() -> Config {
        Config { interval_ns: 5_000_000_000, missed_max: 5 }
    }
}

/// What to do after [`Heartbeat::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Hb {
    /// Nothing.
    Nothing,
    /// Post a zero-length RDMA WRITE with [`crate::imm::HB_MSG`] on con 0.
    SendMsg,
    /// The peer is gone: close the path.
    Dead,
}

/// The machine. Make it when the path comes up, not before: a client's first receive on con 0 is for INFO_RSP.
#[derive(Clone, Copy, Debug)]
pub struct Heartbeat {
    config: Config,
    /// Ticks since the last sign of life.
    missed: u32,
    next_tick_ns: u64,
    /// When the unanswered heartbeat went out.
    sent_ns: Option<u64>,
    latency_ns: Option<u64>,
    /// Of a peer that was [probed](Heartbeat::probe): when it must have shown a sign of life, and how long it has for it.
    probe: Option<(u64, u64)>,
    dead: bool,
}

impl Heartbeat {
    /// `now_ns`: any monotonic clock, the same in all calls.
    pub const fn new(config: Config, now_ns: u64) -> Heartbeat {
        let next_tick_ns = now_ns.saturating_add(config.interval_ns);
        Heartbeat {
            config,
            missed: 0,
            next_tick_ns,
            sent_ns: None,
            latency_ns: None,
            probe: None,
            dead: false,
        }
    }

    /// Somebody doubts that the peer is there: asks it now, and gives it `patience_ns` for a sign of life, however
    /// patient the configuration is.
    pub const fn probe(&mut self, now_ns: u64, patience_ns: u64) {
        if self.probe.is_some() {
            return;
        }
        self.probe = Some((now_ns.saturating_add(patience_ns), patience_ns));
        // Otherwise it has been asked already.
        if self.missed == 0 {
            self.next_tick_ns = now_ns;
        }
    }

    /// Any message of the peer arrived, on any con of the path. Costs one store; call it for every request.
    pub const fn on_traffic(&mut self) {
        self.missed = 0;
    }

    /// HB_ACK arrived.
    pub const fn on_ack(&mut self, now_ns: u64) {
        self.on_traffic();
        if let Some(sent) = self.sent_ns.take() {
            // A clock that stands still during a turn of its reactor can show the same time twice.
            self.latency_ns = Some(if now_ns > sent { now_ns - sent } else { 1 });
        }
    }

    /// Ticks if it is time to. However late the call comes, it is one tick: a stalled caller does not kill the path.
    pub const fn poll(&mut self, now_ns: u64) -> Hb {
        if self.dead {
            return Hb::Dead;
        }
        // A tick that is due comes first: a stalled caller may not have asked yet.
        if let Some((until, _)) = self.probe
            && now_ns >= until
            && self.next_tick_ns > now_ns
        {
            self.probe = None;
            self.dead = self.missed > 0;
            return if self.dead { Hb::Dead } else { Hb::Nothing };
        }
        if now_ns < self.next_tick_ns {
            return Hb::Nothing;
        }
        if self.missed > self.config.missed_max {
            self.dead = true;
            return Hb::Dead;
        }
        self.next_tick_ns = now_ns.saturating_add(self.config.interval_ns);
        self.missed += 1;
        if self.missed > 1 {
            return Hb::Nothing;
        }
        self.sent_ns = Some(now_ns);
        if let Some((until, patience_ns)) = &mut self.probe {
            *until = now_ns.saturating_add(*patience_ns);
        }
        Hb::SendMsg
    }

    /// When to call [`Heartbeat::poll`] next; `None` once dead.
    pub const fn deadline(&self) -> Option<u64> {
        match self.probe {
            _ if self.dead => None,
            Some((probe, _)) if probe < self.next_tick_ns => Some(probe),
            _ => Some(self.next_tick_ns),
        }
    }

    /// Time from the last answered heartbeat to its answer, in nanoseconds, at least 1; `None` before the first.
    pub const fn latency_ns(&self) -> Option<u64> {
        self.latency_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEC: u64 = 1_000_000_000;

    /// Polls at each deadline up to and including `until`; returns (second, what) of everything but `Nothing`.
    fn run(hb: &mut Heartbeat, until: u64) -> Vec<(u64, Hb)> {
        let mut seen = Vec::new();
        while let Some(at) = hb.deadline().filter(|&at| at <= until * SEC) {
            match hb.poll(at) {
                Hb::Nothing => {}
                what => seen.push((at / SEC, what)),
            }
        }
        seen
    }

    #[test]
    fn a_peer_that_is_probed_has_that_much_time() {
        let new = || Heartbeat::new(Config::default(), 0);
        // Silent: asked at once, dead after its time.
        let mut hb = new();
        hb.probe(SEC, 3 * SEC);
        // A second one changes nothing.
        hb.probe(2 * SEC, 3 * SEC);
        assert_eq!(run(&mut hb, 100), [(1, Hb::SendMsg), (4, Hb::Dead)]);
        // An answer: as if nothing had been.
        let mut hb = new();
        hb.probe(SEC, 3 * SEC);
        assert_eq!(hb.poll(SEC), Hb::SendMsg);
        hb.on_ack(SEC + 1);
        assert_eq!(run(&mut hb, 5), []);
        assert_eq!(run(&mut hb, 6), [(6, Hb::SendMsg)]);
        // A heartbeat was out already: no second one.
        let mut hb = new();
        assert_eq!(run(&mut hb, 5), [(5, Hb::SendMsg)]);
        hb.probe(6 * SEC, 3 * SEC);
        assert_eq!(run(&mut hb, 100), [(9, Hb::Dead)]);
        // The caller stood still, and has only asked now.
        let mut hb = new();
        hb.probe(SEC, 3 * SEC);
        assert_eq!(hb.poll(60 * SEC), Hb::SendMsg);
        assert_eq!(hb.poll(60 * SEC + 1), Hb::Nothing);
        assert_eq!(run(&mut hb, 100), [(63, Hb::Dead)]);
    }

    #[test]
    fn a_peer_silent_from_the_start_is_dead_after_35_s() {
        let mut hb = Heartbeat::new(Config::default(), 0);
        assert_eq!(run(&mut hb, 100), [(5, Hb::SendMsg), (35, Hb::Dead)]);
        assert_eq!((hb.poll(101 * SEC), hb.deadline()), (Hb::Dead, None));
    }

    #[test]
    fn an_answered_heartbeat_is_sent_every_interval() {
        let mut hb = Heartbeat::new(Config::default(), 0);
        for tick in 1..100 {
            assert_eq!(hb.poll(tick * 5 * SEC), Hb::SendMsg);
            hb.on_ack(tick * 5 * SEC + 250);
        }
        assert_eq!(hb.latency_ns(), Some(250));
    }

    #[test]
    fn other_traffic_counts_as_a_sign_of_life() {
        let mut hb = Heartbeat::new(Config::default(), 0);
        assert_eq!(run(&mut hb, 34), [(5, Hb::SendMsg)]);
        hb.on_traffic();
        assert_eq!(run(&mut hb, 64), [(35, Hb::SendMsg)]);
        assert_eq!(run(&mut hb, 65), [(65, Hb::Dead)]);
        assert_eq!(hb.latency_ns(), None, "no answer, no latency");
    }

    #[test]
    fn a_stalled_caller_ticks_once() {
        let mut hb = Heartbeat::new(Config::default(), 0);
        assert_eq!(hb.poll(1000 * SEC), Hb::SendMsg);
        assert_eq!(hb.poll(1001 * SEC), Hb::Nothing);
        assert_eq!(hb.deadline(), Some(1005 * SEC));
    }

    #[test]
    fn an_answer_in_the_same_turn_is_a_latency() {
        let mut hb = Heartbeat::new(Config::default(), 0);
        assert_eq!(hb.poll(5 * SEC), Hb::SendMsg);
        hb.on_ack(5 * SEC);
        assert_eq!(hb.latency_ns(), Some(1), "0 stands for a path without an answer");
    }

    #[test]
    fn an_unasked_answer_gives_no_latency() {
        let mut hb = Heartbeat::new(Config::default(), 0);
        hb.on_ack(SEC);
        assert_eq!(hb.latency_ns(), None);
    }

    #[test]
    fn interval_and_patience_are_configurable() {
        let mut hb = Heartbeat::new(Config { interval_ns: SEC, missed_max: 1 }, 0);
        assert_eq!(run(&mut hb, 10), [(1, Hb::SendMsg), (3, Hb::Dead)]);
    }
}

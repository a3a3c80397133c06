//! How often a connection with a deep queue is looked at.
//!
//! A server that is faster than its client finds every request alone, however deep the queue is: each then costs a
//! `recv` and a `send` here, and there a wake-up, and a `poll` and a `recv` that finds nothing more. Looked at only once
//! in a [`PERIOD`], a dozen requests have come together, and in between the core may sleep. A client with one request at
//! a time would wait for nothing, though, and nothing on the wire tells one from the other. So it is tried, and goes on
//! only while it is no slower.
//!
//! ```text
//!            every so often, if requests come alone               as many requests took no longer
//!  direct ───────────────────────────────────────────▶ on trial ──────────────────────────────────▶ paced
//!    ▲            they took longer, or came no closer     │                                            │
//!    ├────────────────────────────────────────────────────┘     now and then, to measure anew          │
//!    └─────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::time::{Duration, Instant};

/// A paced connection is looked at so often. A deep queue loses nothing by it: 32 requests in this time are 640 000 in a
/// second.
const PERIOD: Duration = Duration::from_micros(50);
/// Requests by which the two ways are compared.
const WINDOW: u32 = 256;
/// A longer silence begins the window anew.
const SILENCE: Duration = Duration::from_millis(2);
/// Requests that a direct look finds, at most, if pacing could help.
const ALONE: u32 = 4;
/// Requests that a paced look must find.
const TOGETHER: u32 = 3;
/// Looks after which a trial is given up early if it did not bring requests together.
const EARLY: u32 = 8;
/// Windows until the next trial after one that failed; twice as many with each further one.
const RETRY: u32 = 16;
const RETRY_MAX: u32 = 2048;
/// Windows that are paced before the direct way is measured again.
const HOLD: u32 = 128;
/// Looks in vain after which a paced connection is asked every turn, and watched while the core sleeps.
const PATIENCE: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Looked at every turn; so many windows until a trial.
    Direct {
        left: u32,
    },
    Trial,
    /// So many windows until the direct way is measured again.
    Paced {
        left: u32,
    },
}

/// One connection's.
#[derive(Debug)]
pub(super) struct Pace {
    mode: Mode,
    /// The next look; `None`: at any time.
    until: Option<Instant>,
    /// Of this window.
    began: Option<Instant>,
    last: Instant,
    requests: u32,
    looks: u32,
    /// Looks that found nothing since one that did.
    in_vain: u32,
    /// What the last two windows took the direct way. The shorter counts: whatever disturbs makes them longer.
    direct: [Duration; 2],
    retry: u32,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            mode: Mode::Direct { left: 2 },
            until: None,
            began: None,
            last: now,
            requests: 0,
            looks: 0,
            in_vain: 0,
            direct: [Duration::MAX; 2],
            retry: RETRY,
        }
    }

    /// The socket is to be left alone now.
    pub(super) fn rests(&self, now: Instant) -> bool {
        self.until.is_some_and(|t| t > now)
    }

    /// Until when; `None` if it is looked at every turn.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// A look in the turn that began at `now` has found so many requests.
    pub(super) fn found(&mut self, now: Instant, requests: usize) {
        if requests == 0 {
            // Late, or at its end. Watching the socket instead costs system calls here and there.
            self.in_vain += 1;
            self.until = self.until.filter(|_| self.in_vain <= PATIENCE).map(|_| now + PERIOD / 4);
            return;
        }
        if now.duration_since(self.last) > SILENCE {
            self.began = None;
        }
        self.last = now;
        self.in_vain = 0;
        let Some(began) = self.began else {
            // A window is what it takes from one look to another.
            (self.began, self.requests, self.looks) = (Some(now), 0, 0);
            return self.rest(now);
        };
        self.requests += requests as u32;
        self.looks += 1;
        if self.requests >= WINDOW {
            self.decide(now.duration_since(began) * WINDOW / self.requests);
            self.began = None;
        } else if self.mode == Mode::Trial && self.looks >= EARLY && self.requests < TOGETHER * self.looks {
            self.fail();
            self.began = None;
        }
        if self.began.is_none() {
            (self.began, self.requests, self.looks) = (Some(now), 0, 0);
        }
        self.rest(now);
    }

    fn rest(&mut self, now: Instant) {
        self.until = (!matches!(self.mode, Mode::Direct { .. })).then(|| now + PERIOD);
    }

    /// As many requests as a window has took so long.
    fn decide(&mut self, took: Duration) {
        let alone = self.requests <= ALONE * self.looks;
        let together = self.requests >= TOGETHER * self.looks;
        match self.mode {
            Mode::Direct { left } => {
                self.direct = [self.direct[1], took];
                self.mode = match left.checked_sub(1) {
                    Some(left) => Mode::Direct { left },
                    None if alone => Mode::Trial,
                    None => self.mode,
                };
            }
            // Three in a hundred are noise.
            Mode::Trial if together && took <= self.direct[0].min(self.direct[1]) / 32 * 33 => {
                (self.mode, self.retry) = (Mode::Paced { left: HOLD }, RETRY);
            }
            Mode::Trial => self.fail(),
            Mode::Paced { left } => {
                self.mode = match left.checked_sub(1) {
                    Some(left) if together => Mode::Paced { left },
                    _ => Mode::Direct { left: 1 },
                };
            }
        }
    }

    fn fail(&mut self) {
        self.mode = Mode::Direct { left: self.retry };
        self.retry = (self.retry * 2).min(RETRY_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that has `depth` requests in flight and works `client` on each answer; a server that works `request` on
    /// each and `look` on each look.
    struct Bench {
        pace: Pace,
        now: Instant,
        depth: u32,
        client: Duration,
        look: Duration,
        request: Duration,
    }

    const fn ns(n: u64) -> Duration {
        Duration::from_nanos(n)
    }

    impl Bench {
        fn new(depth: u32, client: u64, look: u64, request: u64) -> Self {
            let now = Instant::now();
            let (client, look, request) = (ns(client), ns(look), ns(request));
            Self { pace: Pace::new(now), now, depth, client, look, request }
        }

        /// Answers `total` requests; returns how long one took, and how many were found by a look.
        fn run(&mut self, total: u32) -> (Duration, f64) {
            let began = self.now;
            // When each request that was not looked at yet arrives, in order.
            let mut arrivals: std::collections::VecDeque<Instant> =
                (0..self.depth).map(|_| self.now).collect();
            let mut client_free = self.now;
            let (mut done, mut looks) = (0, 0);
            while done < total {
                if self.pace.rests(self.now) {
                    self.now = self.pace.until().unwrap();
                }
                let here = arrivals.iter().take_while(|t| **t <= self.now).count();
                let turn = self.now;
                self.now += self.look;
                self.pace.found(turn, here);
                if here == 0 {
                    continue;
                }
                looks += 1;
                for _ in 0..here {
                    arrivals.pop_front();
                    self.now += self.request;
                }
                for _ in 0..here {
                    client_free = client_free.max(self.now) + self.client;
                    arrivals.push_back(client_free);
                }
                done += here as u32;
            }
            ((self.now - began) / done, f64::from(done) / f64::from(looks))
        }
    }

    #[test]
    fn a_deep_queue_of_a_slow_client_is_paced() {
        // As fio over a unix socket: it needs longer for each than the server does.
        let mut bench = Bench::new(32, 4000, 2500, 1000);
        let (_, alone) = bench.run(WINDOW);
        assert!(alone < 3.0, "{alone}");
        bench.run(10 * WINDOW);
        assert!(matches!(bench.pace.mode, Mode::Paced { .. }), "{:?}", bench.pace);
        let (later, together) = bench.run(100 * WINDOW);
        assert!(together > 8.0, "{together}");
        assert!(later <= ns(4000) * 33 / 32, "{later:?}, where the client needs 4 µs");
    }

    #[test]
    fn one_request_at_a_time_is_hardly_disturbed() {
        let mut bench = Bench::new(1, 12_000, 2500, 1000);
        let (mean, _) = bench.run(100_000);
        // Ideal: what both need.
        assert!(mean < ns(16_500) * 101 / 100, "{mean:?}");
        assert!(matches!(bench.pace.mode, Mode::Direct { .. }));
    }

    #[test]
    fn a_queue_that_pacing_would_slow_down_is_left_alone() {
        // Four at a time, and both fast: 20 µs for the four of them, which must not become 50.
        let mut bench = Bench::new(4, 3000, 2000, 500);
        let mut direct = Bench::new(4, 3000, 2000, 500);
        let (ideal, _) = direct.run(WINDOW);
        bench.run(4 * WINDOW);
        let (mean, _) = bench.run(1000 * WINDOW);
        assert!(mean < ideal * 103 / 100, "{mean:?} in place of {ideal:?}");
    }

    #[test]
    fn what_comes_together_by_itself_is_not_tried() {
        let mut bench = Bench::new(32, 100, 2500, 1000);
        bench.run(100 * WINDOW);
        assert_eq!(bench.pace.retry, RETRY);
        assert!(matches!(bench.pace.mode, Mode::Direct { .. }), "{:?}", bench.pace);
    }

    #[test]
    fn a_paced_connection_that_falls_silent_is_looked_at_every_turn() {
        let mut bench = Bench::new(32, 4000, 2500, 1000);
        bench.run(20 * WINDOW);
        let mut now = bench.now;
        for _ in 0..PATIENCE {
            now = bench.pace.until().unwrap();
            bench.pace.found(now, 0);
        }
        assert!(now < bench.now + 4 * PERIOD);
        bench.pace.found(now + PERIOD, 0);
        assert!(bench.pace.until().is_none());
    }
}

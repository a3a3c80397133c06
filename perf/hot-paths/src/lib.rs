//! The data paths of the programs, to be measured one 4 KiB read or write at a time.
//!
//! A [`HotPath`] is set up once and then does rounds of [`BATCH`] requests. The program `instruction-budget` runs it under
//! valgrind and compares the instructions of each request with `budget.txt`; `benches/micro.rs` has the wall clock of
//! smaller parts.
//!
//! What is counted is one function, [`HotPath::function`], with all that it calls in user space: of a program the
//! poller of one lane. Rounds are made so that the same happens in each: requests become visible all at once, on a
//! reactor that sleeps, and the next round begins when it sleeps again.

mod disk;
mod gate;
mod nbd;
mod program;
mod rnbd;
mod soft_roce;
mod vhost;

/// Requests of a round.
pub const BATCH: usize = 32;

/// Bytes of a request.
pub const LEN: usize = 4096;

/// What the rounds consist of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Device to user.
    Read,
    /// User to device.
    Write,
}

/// A path that does one round of [`BATCH`] requests per call.
pub type Round = Box<dyn FnMut()>;

/// A way of a request through the programs.
pub struct HotPath {
    /// In `budget.txt`.
    pub name: &'static str,
    /// What its rounds consist of.
    pub kind: Kind,
    /// The function that is counted, in valgrind's words: demangled, `*` for anything.
    pub function: &'static str,
    set_up: fn(Kind) -> Round,
}

impl HotPath {
    /// Starts what the path needs: threads, sockets, memory.
    ///
    /// # Panics
    /// If this host does not give it, in words.
    pub fn set_up(&self) -> Round {
        (self.set_up)(self.kind)
    }
}

/// Both kinds of a path.
macro_rules! both {
    ($name:literal, $function:literal, $set_up:expr) => {
        [
            HotPath { name: concat!($name, "-read"), kind: Kind::Read, function: $function, set_up: $set_up },
            HotPath {
                name: concat!($name, "-write"),
                kind: Kind::Write,
                function: $function,
                set_up: $set_up,
            },
        ]
    };
}

/// Every path, in the order of `budget.txt`.
pub fn all() -> Vec<HotPath> {
    [
        both!("bdev-null", "hot_paths::disk::batch", disk::null),
        both!("bdev-malloc", "hot_paths::disk::batch", disk::malloc),
        both!(
            "vhost-split-null",
            "<vhost_poll::lane::LanePoller<*> as reactor::poller::Poller>::poll",
            vhost::split
        ),
        both!(
            "vhost-packed-null",
            "<vhost_poll::lane::LanePoller<*> as reactor::poller::Poller>::poll",
            vhost::packed
        ),
        both!(
            "nbd-server-null",
            "<exports::nbd_server::lane::LanePoller as reactor::poller::Poller>::poll",
            nbd::server
        ),
        both!(
            "rtrs-server-null",
            "<rtrs_poll::lane::LanePoller<*> as reactor::poller::Poller>::poll",
            rnbd::over_soft_roce
        ),
        both!(
            "rtrs-client-null",
            "<rtrs_poll::client::lane::LanePoller<*> as reactor::poller::Poller>::poll",
            rnbd::over_soft_roce
        ),
        [
            // A packet that carries 4 KiB, on its way out and on its way in, with what acknowledges it.
            HotPath {
                name: "soft-roce-out",
                kind: Kind::Write,
                function: "hot_paths::soft_roce::send_side",
                set_up: soft_roce::write_with_imm,
            },
            HotPath {
                name: "soft-roce-in",
                kind: Kind::Write,
                function: "hot_paths::soft_roce::receive_side",
                set_up: soft_roce::write_with_imm,
            },
        ],
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Marks the end of a part of a run: valgrind writes its counts when this is called.
#[inline(never)]
pub fn mark(part: u32) {
    std::hint::black_box(part);
}

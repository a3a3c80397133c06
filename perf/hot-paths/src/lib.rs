//! The data paths of the programs, to be measured one 4 KiB read or write at a time.
//!
//! A [`HotPath`] is set up once and then does rounds of requests, [`BATCH`] or one at a time: what is done once per turn
//! shows in the latter. The program `instruction-budget` runs it under
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

/// Requests of a round of a deep queue.
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

/// A path that does one round of requests per call.
pub type Round = Box<dyn FnMut()>;

/// A way of a request through the programs.
pub struct HotPath {
    /// In `budget.txt`.
    pub name: &'static str,
    /// What its rounds consist of.
    pub kind: Kind,
    /// Requests of a round.
    pub depth: usize,
    /// The function that is counted, in valgrind's words: demangled, `*` for anything.
    pub function: &'static str,
    set_up: fn(Kind, usize) -> Round,
}

impl HotPath {
    /// Starts what the path needs: threads, sockets, memory.
    ///
    /// # Panics
    /// If this host does not give it, in words.
    pub fn set_up(&self) -> Round {
        (self.set_up)(self.kind, self.depth)
    }
}

/// A path with both kinds of requests.
struct Way {
    /// Deep queue, then one at a time: where how often a reactor looks does not depend on timers.
    names: &'static [&'static str],
    function: &'static str,
    set_up: fn(Kind, usize) -> Round,
}

/// Its names: deep queues have no number.
macro_rules! names {
    ($name:literal) => {
        &[concat!($name, "-read"), concat!($name, "-write")]
    };
    ($name:literal, qd1) => {
        &[
            concat!($name, "-read"),
            concat!($name, "-write"),
            concat!($name, "-read-qd1"),
            concat!($name, "-write-qd1"),
        ]
    };
}

impl Way {
    fn paths(&self) -> impl Iterator<Item = HotPath> {
        let kinds = [(Kind::Read, BATCH), (Kind::Write, BATCH), (Kind::Read, 1), (Kind::Write, 1)];
        let (function, set_up) = (self.function, self.set_up);
        self.names.iter().copied().zip(kinds).map(move |(name, (kind, depth))| HotPath {
            name,
            kind,
            depth,
            function,
            set_up,
        })
    }
}

const VHOST_LANE: &str = "<vhost_poll::lane::LanePoller<*> as reactor::poller::Poller>::poll";

const WAYS: [Way; 7] = [
    Way { names: names!("bdev-null", qd1), function: "hot_paths::disk::batch", set_up: disk::null },
    Way { names: names!("bdev-malloc", qd1), function: "hot_paths::disk::batch", set_up: disk::malloc },
    Way { names: names!("vhost-split-null", qd1), function: VHOST_LANE, set_up: vhost::split },
    Way { names: names!("vhost-packed-null", qd1), function: VHOST_LANE, set_up: vhost::packed },
    Way {
        names: names!("nbd-server-null", qd1),
        function: "<exports::nbd_server::lane::LanePoller as reactor::poller::Poller>::poll",
        set_up: nbd::server,
    },
    Way {
        names: names!("rtrs-server-null"),
        function: "<rtrs_poll::lane::LanePoller<*> as reactor::poller::Poller>::poll",
        set_up: rnbd::over_soft_roce,
    },
    Way {
        names: names!("rtrs-client-null"),
        function: "<rtrs_poll::client::lane::LanePoller<*> as reactor::poller::Poller>::poll",
        set_up: rnbd::over_soft_roce,
    },
];

/// A packet that carries 4 KiB, on its way out and on its way in, with what acknowledges it.
const PACKETS: [(&str, usize, &str); 4] = [
    ("soft-roce-out", BATCH, "hot_paths::soft_roce::send_side"),
    ("soft-roce-in", BATCH, "hot_paths::soft_roce::receive_side"),
    ("soft-roce-out-qd1", 1, "hot_paths::soft_roce::send_side"),
    ("soft-roce-in-qd1", 1, "hot_paths::soft_roce::receive_side"),
];

/// Every path, in the order of `budget.txt`.
pub fn all() -> Vec<HotPath> {
    let packets = PACKETS.map(|(name, depth, function)| {
        let set_up = soft_roce::write_with_imm;
        HotPath { name, kind: Kind::Write, depth, function, set_up }
    });
    WAYS.iter().flat_map(Way::paths).chain(packets).collect()
}

/// Marks the end of a part of a run: valgrind writes its counts when this is called.
#[inline(never)]
pub fn mark(part: u32) {
    std::hint::black_box(part);
}

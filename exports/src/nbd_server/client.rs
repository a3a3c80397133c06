//! One connection, on its reactor and as the control thread knows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bdev::Descriptor;
use nbd_poll::listener::Socket;
use nbd_poll::{Buffers, Connection, End, Incoming, RequestId};
use nbd_proto::request::Command;
use quota::Source;

use nbd_proto::framing::Agreed;
use nbd_proto::wire::ErrorCode;

use super::fence::{Fence, Raised};
use super::pace::Pace;
use super::question::{Answer, Questions};
use super::ranges::{Armed, RangeLock};
use super::server::Rate;

/// How long a client may take to read its last answers.
const LINGER: Duration = Duration::from_secs(5);
/// After somebody has waited for its memory: whether anybody still does.
const LOOK_TWICE: Duration = Duration::from_millis(100);
/// After nobody has.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Turns without work after which a connection is waited for instead of asked. Some tens of microseconds.
const COLD_AFTER: u32 = 200;
/// Looks with traffic since the last sleep after which the socket need not tell anybody what arrives: the notification
/// is work of whoever sends. Switching it off and on are system calls.
const UNWATCHED_AFTER: u32 = 64;

/// What a reactor needs to serve a connection.
pub(super) struct NewClient {
    /// Of the connection.
    pub(super) id: u64,
    pub(super) socket: Socket,
    /// Number of the export.
    pub(super) export: u64,
    pub(super) descriptor: Descriptor,
    /// Of the export.
    pub(super) fence: Fence,
    /// Of the export.
    pub(super) ranges: RangeLock,
    /// Whom it counts for in what is shared.
    pub(super) source: Source,
    /// How long it may leave a request unfinished.
    pub(super) stall: Duration,
    /// How fast it must go on with what others need the memory of.
    pub(super) rate: Rate,
    /// What its requests are checked against.
    pub(super) limits: nbd_proto::request::Export,
    /// How it speaks.
    pub(super) agreed: Agreed,
    pub(super) stats: Arc<Stats>,
}

/// Requests of a connection. Written by its reactor only.
#[derive(Debug, Default)]
pub(super) struct Stats {
    pub(super) read_ops: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) write_ops: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) other_ops: AtomicU64,
    pub(super) errors: AtomicU64,
    /// The client has gone, and requests of it are still being executed.
    pub(super) lost: AtomicBool,
}

/// With one writer a load and a store are an addition.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

impl Stats {
    pub(super) fn count(&self, incoming: &Incoming) {
        let len = incoming.request.len();
        match incoming.request.command() {
            Command::Read => {
                add(&self.read_ops, 1);
                add(&self.bytes_read, len);
            }
            Command::Write { .. } => {
                add(&self.write_ops, 1);
                add(&self.bytes_written, len);
            }
            _ => add(&self.other_ops, 1),
        }
    }

    pub(super) fn count_result(&self, result: &Result<(), ErrorCode>) {
        if result.is_err() {
            add(&self.errors, 1);
        }
    }
}

/// What a client has to do with its memory, and by when.
#[derive(Clone, Copy, Debug)]
struct Progress {
    /// Bytes that had gone when the time began.
    from: u64,
    /// By then there must be enough.
    until: Instant,
    /// There were not, and somebody waited.
    seen: bool,
}

/// A connection in its lane.
pub(super) struct Client {
    pub(super) id: u64,
    pub(super) connection: Connection,
    /// Place of its disk in the lane.
    pub(super) disk: usize,
    pub(super) stats: Arc<Stats>,
    pub(super) questions: Questions,
    /// It has changed a part of a block.
    pub(super) armed: Option<Armed>,
    /// It is asked every turn.
    pub(super) hot: bool,
    quiet_turns: u32,
    busy_looks: u32,
    pace: Pace,
    /// Size that requests are checked against, bytes.
    size: u64,
    /// It is dropped by then, whether or not the client has read everything.
    drop_at: Option<Instant>,
    /// Nothing more has come of a request that was begun, and by then it is too late.
    stall_at: Option<Instant>,
    /// How it goes on, while memory waits for it.
    progress: Option<Progress>,
    stall: Duration,
    rate: Rate,
    fence: Fence,
    raised: Option<Raised>,
}

impl Client {
    pub(super) fn new(new: NewClient, disk: usize, buffers: Buffers, now: Instant) -> std::io::Result<Self> {
        let connection = Connection::with(new.socket, new.limits, new.agreed, buffers)?;
        Ok(Self {
            id: new.id,
            connection,
            disk,
            stats: new.stats,
            questions: Questions::default(),
            armed: None,
            hot: false,
            quiet_turns: 0,
            busy_looks: 0,
            pace: Pace::new(now),
            size: new.limits.size,
            drop_at: None,
            stall_at: None,
            progress: None,
            stall: new.stall,
            rate: new.rate,
            fence: new.fence,
            raised: None,
        })
    }

    /// Takes requests, unless they must wait for those of a connection that broke off, or for company. True if anything
    /// moved.
    pub(super) fn receive(&mut self, now: Instant, incoming: &mut Vec<Incoming>) -> bool {
        if self.pace.rests(now) || self.fence.is_up() {
            return false;
        }
        let moved = self.connection.receive(incoming);
        self.pace.found(now, incoming.len());
        if moved {
            self.quiet_turns = 0;
            self.stall_at = None;
            self.busy_looks += 1;
            if self.busy_looks == UNWATCHED_AFTER || self.pace.until().is_some() {
                self.connection.unwatch();
            }
        }
        moved
    }

    /// Until when it is left alone, although it has traffic; `None` if it is asked every turn.
    pub(super) fn rests_until(&self) -> Option<Instant> {
        self.pace.until()
    }

    /// The core is about to sleep: as [`Connection::before_sleep`], for a client that is not left alone anyway.
    pub(super) fn before_sleep(&mut self, now: Instant) -> bool {
        if self.pace.rests(now) {
            return false;
        }
        self.busy_looks = 0;
        self.connection.before_sleep()
    }

    /// Ends the connection of a client that has begun a request and does not go on, or goes on too slowly with what has
    /// `wanted` memory. True if it has.
    pub(super) fn shed_if_stalled(&mut self, now: Instant, wanted: bool) -> bool {
        // Behind a fence nobody gets on.
        let slow = self.progress.as_mut().filter(|p| p.until <= now && !self.fence.is_up());
        if let Some(progress) = slow {
            if wanted && progress.seen {
                self.connection.time_out(End::Slow);
                return true;
            }
            progress.seen = wanted;
            progress.until = now + if wanted { LOOK_TWICE } else { LOOK_AGAIN };
        } else if let Some(progress) = self.progress.as_mut().filter(|p| p.until <= now) {
            progress.until = now + self.rate.time;
        }
        if self.stall_at.is_none_or(|t| t > now) {
            return false;
        }
        // Behind a fence nobody gets on.
        self.stall_at = self.fence.is_up().then(|| now + self.stall);
        let stalled = self.stall_at.is_none() && self.connection.is_mid_request();
        if stalled {
            self.connection.time_out(End::Stalled);
        }
        stalled
    }

    /// Looks how the client goes on with what has memory; after answers were sent.
    pub(super) fn mind_progress(&mut self, now: Instant) {
        let gone = self.connection.keeps_waiting();
        self.progress = match (gone, self.progress) {
            (None, _) => None,
            (Some(gone), Some(progress)) if gone - progress.from < self.rate.bytes => Some(progress),
            (Some(from), _) => Some(Progress { from, until: now + self.rate.time, seen: false }),
        };
    }

    /// Answers the question that was the next.
    pub(super) fn answered(&mut self, request: RequestId, answer: &Answer) {
        self.questions.answered();
        match answer {
            Answer::Runs(runs) => self.connection.reply_status(request, runs),
            Answer::Done => self.connection.reply(request, Ok(())),
        }
    }

    /// Holds up others while requests are in flight that nobody waits for any more. True if that begins: then they are to be
    /// ended.
    pub(super) fn mind_fence(&mut self) -> bool {
        let orderly = matches!(self.connection.end(), None | Some(End::Disconnect));
        let stale = !orderly && self.connection.in_flight() > 0;
        if stale != self.raised.is_some() {
            self.raised = stale.then(|| self.fence.raise());
            self.stats.lost.store(stale, Ordering::Relaxed);
            return stale;
        }
        false
    }

    /// Keeps requests inside a bdev that changes its size.
    pub(super) fn follow_size(&mut self, size: u64) {
        if self.size != size {
            self.size = size;
            self.connection.resize(size);
        }
    }

    /// Takes no more requests.
    pub(super) fn close(&mut self, now: Instant) {
        self.connection.stop_receiving();
        let _ = self.ending(now);
    }

    /// Starts the clock of a connection that has ended. True if it may be dropped.
    pub(super) fn ending(&mut self, now: Instant) -> bool {
        if self.connection.end().is_none() {
            return false;
        }
        if self.connection.is_done() {
            return true;
        }
        // The device may use its buffers until nothing is in flight, however long that takes.
        let in_flight = self.connection.in_flight() > 0;
        let drop_at = *self.drop_at.get_or_insert(now + LINGER);
        !in_flight && drop_at <= now
    }

    /// For the reactor's sleep.
    pub(super) fn deadline(&self) -> Option<Instant> {
        if self.drop_at.is_none() && self.stall_at.is_none() && self.progress.is_none() {
            return None;
        }
        let progress = self.progress.map(|p| p.until);
        let drop_at = self.drop_at.filter(|_| self.connection.in_flight() == 0);
        drop_at.into_iter().chain(self.stall_at).chain(progress).min()
    }

    /// Counts quiet turns; true if the connection may be waited for from now on, and its descriptor is armed.
    pub(super) fn cools(&mut self, now: Instant) -> bool {
        self.quiet_turns += u32::from(!self.pace.rests(now));
        let cools = self.quiet_turns > COLD_AFTER
            && self.connection.end().is_none()
            && !self.connection.waits_for_memory()
            && !self.before_sleep(now);
        if cools && self.stall_at.is_none() && self.connection.is_mid_request() {
            self.stall_at = Some(now + self.stall);
        }
        cools
    }

    pub(super) fn warm(&mut self) {
        self.quiet_turns = 0;
    }
}

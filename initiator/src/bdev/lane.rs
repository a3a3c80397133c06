//! The consumer of the RNBD lane: joins the reactor's [`Disks`] to the sessions that are up there.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bdev::Op;
use iobuf::Registry;
use reactor::{Polled, Turn};
use rnbd_proto::Errno;
use rtrs_poll::client::{Io, PathId, Refused, Session, SessionId, SessionKey, Upper};

use super::channel::Here;
use super::request::{Message, Opened, Unsent, Wire};
use crate::client::{IoRequest, Op as WireOp, RnbdLane, submit};

/// How the control thread hears that a server does not know a device: number of the disk, and the epoch.
pub(super) type Unknown = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// One per reactor.
pub(super) struct DiskLane {
    pub here: Rc<Here>,
    /// Sessions that are up.
    sessions: Vec<(SessionId, SessionKey)>,
    unknown: Unknown,
}

impl DiskLane {
    pub fn new(index: usize, registry: Arc<Registry>, unknown: Unknown) -> Self {
        Self { here: Here::install(index, registry), sessions: Vec::new(), unknown }
    }

    /// What a turn does after all completions; true if anything.
    fn turn(&mut self, now: Instant, io: &mut Io) -> bool {
        let mut disks = self.here.disks();
        let any = disks.run(now, &mut Link { io, sessions: &self.sessions });
        disks.announce();
        while let Some((disk, epoch)) = disks.unknown.pop() {
            (self.unknown)(disk, epoch);
        }
        any
    }
}

impl Upper for DiskLane {
    fn session_up(&mut self, cx: &mut Turn<'_>, _: &mut Io, key: SessionKey, session: &Arc<Session>) {
        let lane = RnbdLane::<Self>::reference(cx);
        self.here.set_abandon(Box::new(move |cookies| {
            lane.abandon(cookies);
        }));
        self.sessions.push((session.id, key));
    }

    fn completed(
        &mut self,
        _: &mut Turn<'_>,
        _: &mut Io,
        _: SessionKey,
        cookie: u64,
        result: Result<(), Errno>,
    ) {
        self.here.disks().completed(cookie, result);
    }

    fn failing_over(&mut self, _: &mut Turn<'_>, _: SessionKey, cookie: u64, path: PathId) {
        self.here.disks().failing_over(cookie, path.number());
    }

    fn session_down(&mut self, cx: &mut Turn<'_>, _: &mut Io, key: SessionKey) {
        let Some(i) = self.sessions.iter().position(|(_, k)| *k == key) else { return };
        let (session, _) = self.sessions.swap_remove(i);
        self.here.disks().session_down(session, cx.now);
    }

    fn poll(&mut self, cx: &mut Turn<'_>, io: &mut Io) -> bool {
        self.turn(cx.now, io)
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        Polled::Idle
    }

    fn deadline(&self) -> Option<Instant> {
        self.here.disks().deadline()
    }
}

/// The RTRS lane as a [`Wire`].
struct Link<'a> {
    io: &'a mut Io,
    sessions: &'a [(SessionId, SessionKey)],
}

impl Wire for Link<'_> {
    fn send(&mut self, to: &Opened, message: &Message<'_>, cookie: u64) -> Result<(), Unsent> {
        let found = self.sessions.iter().find(|(id, _)| *id == to.session);
        let (_, key) = found.ok_or(Unsent::Down)?;
        let op = match (message.op, message.data) {
            (Op::Read, [target]) => WireOp::Read(*target),
            (Op::Write, from) => WireOp::Write { from, fua: message.fua },
            (Op::Flush, _) => WireOp::Flush,
            (Op::Discard, _) => WireOp::Discard(message.len),
            (Op::WriteZeroes, _) => WireOp::WriteZeroes(message.len),
            (Op::SecureErase, _) => WireOp::SecureErase(message.len),
            _ => return Err(Unsent::Never),
        };
        let request = IoRequest { op, sector: message.sector, cookie };
        submit(self.io, *key, to.id, &request).map_err(|refused| match refused {
            Refused::Busy => Unsent::Busy,
            Refused::Down => Unsent::Down,
            Refused::Unregistered | Refused::Pieces { .. } => Unsent::Memory,
            _ => Unsent::Never,
        })
    }
}

//! One front end's connection: the state that its messages build up, and the queues that run by it.
//!
//! ```text
//!   (connected) ── messages ──▶ a queue has size, addresses, memory, a kick ──▶ it runs on a lane, if enabled
//!   GET_VRING_BASE, a new memory table, RESET_DEVICE: the queues concerned finish what they took from their rings; until
//!   then no further message is read, and then comes the answer
//!   connection lost ─▶ all queues finish ─▶ lanes close ─▶ (gone)
//! ```

mod messages;
mod vring;

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use reactor::descriptors::Lease;
use reactor::{Handle, Polled, Poller, PollerId, Turn};

use crate::chain::Broken;
use crate::conn::{Conn, ConnError};
use crate::controller::{Shared, Then, session_ended};
use crate::disk::Disk;
use crate::inflight::InflightArea;
use crate::lane::LaneHandle;
use crate::memory::GuestMemory;
use crate::queue::Coalescing;
use crate::ring::Base;
use vring::Vring;

/// Messages read per turn.
const MESSAGES_PER_TURN: usize = 16;

/// Names a session to its lanes.
#[derive(Clone, Debug)]
pub(crate) struct SessionKey {
    pub(crate) id: u64,
    control: Handle,
}

/// What lanes have to say.
#[derive(Debug)]
pub(crate) enum Event {
    /// A queue runs.
    Started,
    /// A queue cannot run.
    Refused { index: u16, why: Broken },
    /// A queue has come to its end, where its ring then was; or it had never run.
    Stopped { index: u16, base: Option<Base> },
    /// A queue uses the new memory table.
    Swapped,
    /// A lane has let go of its disk.
    Detached,
    /// Shared memory of some front end was taken away.
    Loss,
    /// A lane is gone.
    Closed,
}

impl SessionKey {
    pub(crate) fn tell<D: Disk>(&self, event: Event) {
        let id = self.id;
        self.control.send(move |cx| {
            if let Some(session) = find::<D>(cx, id) {
                session.borrow_mut().event(cx, event);
            }
        });
    }
}

/// The sessions of the control thread, by id.
struct Sessions<D: Disk>(RefCell<HashMap<u64, Rc<RefCell<Session<D>>>>>);

fn find<D: Disk>(cx: &Turn<'_>, id: u64) -> Option<Rc<RefCell<Session<D>>>> {
    cx.local::<Sessions<D>>()?.0.borrow().get(&id).cloned()
}

/// A session as `vhost_get_controllers` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    /// Number, unique in this process.
    pub id: u64,
    /// Some queue runs.
    pub started: bool,
    /// Queues that the front end has set up.
    pub max_queues: usize,
    /// Requests in flight.
    pub inflight: u32,
    /// Descriptors that it holds: the connection, and what the front end has sent.
    pub descriptors: usize,
    /// Completed writes may be in a cache; else each is stable.
    pub write_cache: bool,
    /// The front end has closed its end, which the session has yet to see.
    pub hung_up: bool,
}

/// What the session waits for before it reads the next message.
enum Pending {
    Nothing,
    /// Queues finish; then GET_VRING_BASE is answered.
    Stop {
        request: u32,
    },
    /// Queues change over; the old table is unmapped here, not on a reactor.
    Swap {
        left: usize,
        ack: Option<u32>,
        _old: Arc<GuestMemory>,
    },
    /// All queues finish.
    Reset {
        left: usize,
        ack: Option<u32>,
        device: bool,
    },
    /// All queues finish, then the lanes end.
    Close {
        left: usize,
    },
    /// Lanes end.
    Lanes {
        left: usize,
    },
}

/// A lane and what it holds of the controller's placement.
struct LaneUse {
    handle: LaneHandle,
    reactor: usize,
    inflight: Arc<AtomicU32>,
}

pub(crate) struct Session<D: Disk> {
    key: SessionKey,
    shared: Rc<Shared<D>>,
    conn: Conn,
    /// For `descriptors()`, at least.
    lease: Lease,
    /// What the front end has sent and nobody wants, which may take time to close.
    rest: Vec<OwnedFd>,
    /// A whole message has come.
    has_spoken: bool,
    poller: Option<PollerId>,
    features: u64,
    protocol: u64,
    status: u64,
    memory: Arc<GuestMemory>,
    inflight: Option<InflightArea>,
    backend_req: Option<OwnedFd>,
    /// Completed writes may be in a cache; queues look at it.
    write_back: Arc<AtomicBool>,
    /// What the driver was told or has chosen, as far as this process knows.
    driver_write_back: Option<bool>,
    /// SET_FEATURES has come.
    negotiated: bool,
    /// Some queue has been started.
    has_run: bool,
    vrings: Vec<Vring>,
    lanes: Vec<LaneUse>,
    pending: Pending,
    /// Lanes that have not let go of the disk, and what is done then.
    detaching: Option<(usize, Then)>,
}

struct SessionPoller<D: Disk>(Rc<RefCell<Session<D>>>);

impl<D: Disk> Poller for SessionPoller<D> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }
}

impl<D: Disk> Session<D> {
    /// Serves the connection `socket`, which `lease` is for.
    pub(crate) fn start(
        cx: &mut Turn<'_>,
        shared: &Rc<Shared<D>>,
        id: u64,
        socket: OwnedFd,
        lease: Lease,
    ) -> rustix::io::Result<Rc<RefCell<Self>>> {
        let conn = Conn::new(socket);
        cx.watch(conn.raw())?;
        let session = Rc::new(RefCell::new(Self {
            key: SessionKey { id, control: cx.handle().clone() },
            shared: shared.clone(),
            conn,
            lease,
            rest: Vec::new(),
            has_spoken: false,
            poller: None,
            features: 0,
            protocol: 0,
            status: 0,
            memory: Arc::default(),
            inflight: None,
            backend_req: None,
            write_back: Arc::default(),
            driver_write_back: None,
            negotiated: false,
            has_run: false,
            vrings: Vec::new(),
            lanes: Vec::new(),
            pending: Pending::Nothing,
            detaching: None,
        }));
        let poller = cx.add_poller("vhost_session", Box::new(SessionPoller(session.clone())));
        session.borrow_mut().poller = Some(poller);
        let sessions = cx.local::<Sessions<D>>().unwrap_or_else(|| {
            let sessions = Rc::new(Sessions::<D>(RefCell::default()));
            cx.set_local(sessions.clone());
            sessions
        });
        sessions.0.borrow_mut().insert(id, session.clone());
        tracing::info!(controller = shared.name, session = id, "vhost: front end connected");
        Ok(session)
    }

    pub(crate) fn info(&self) -> SessionInfo {
        SessionInfo {
            id: self.key.id,
            started: self.vrings.iter().any(Vring::is_running),
            max_queues: self.vrings.len(),
            inflight: self.lanes.iter().map(|l| l.inflight.load(Ordering::Relaxed)).sum(),
            descriptors: self.descriptors(),
            write_cache: self.write_back.load(Ordering::Relaxed),
            hung_up: self.conn.hung_up(),
        }
    }

    /// Descriptors that it holds.
    fn descriptors(&self) -> usize {
        let vrings: usize = self.vrings.iter().map(Vring::descriptors).sum();
        1 + usize::from(self.backend_req.is_some()) + vrings + self.rest.len() + self.conn.descriptors()
    }

    /// Whether one descriptor more may be kept.
    fn room_for_one(&mut self) -> Result<(), End> {
        let (held, most) = (self.descriptors(), self.shared.options.max_descriptors);
        if held >= most {
            return Err(End::Descriptors { most });
        }
        if self.lease.set(held + 1) { Ok(()) } else { Err(End::NoDescriptors { held }) }
    }

    /// Gives back what is not held any more, and counts what has come with half a message.
    fn count_descriptors(&mut self) -> Result<(), End> {
        let (held, most) = (self.descriptors(), self.shared.options.max_descriptors);
        if held > most {
            return Err(End::Descriptors { most });
        }
        if self.lease.set(held) { Ok(()) } else { Err(End::NoDescriptors { held }) }
    }

    /// How little is lost if it is closed for another front end's sake; `None` if queues of it have run.
    pub(crate) fn idleness(&self) -> Option<bool> {
        (!self.has_run).then_some(self.has_spoken)
    }

    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        for n in 0..MESSAGES_PER_TURN {
            if !matches!(self.pending, Pending::Nothing) {
                return n > 0;
            }
            match self.receive().and_then(|any| self.count_descriptors().map(|()| any)) {
                Ok(true) => self.has_spoken = true,
                Ok(false) => return n > 0,
                Err(why) => {
                    self.lost(cx, &why);
                    return true;
                }
            }
        }
        true
    }

    /// One message. False: there is none.
    fn receive(&mut self) -> Result<bool, End> {
        let Some((header, payload, mut fds)) = self.conn.recv()? else { return Ok(false) };
        let done = match crate::wire::parse(&header, payload, fds.len()) {
            Ok(message) => {
                tracing::debug!(session = self.key.id, ?message, "vhost: message");
                self.obey(header, message, &mut fds)
            }
            Err(e) => Err(ConnError::Wire(e).into()),
        };
        if done.is_err() {
            self.rest.append(&mut fds);
        }
        done.map(|()| true)
    }

    /// Makes room for another front end.
    pub(crate) fn make_room(&mut self, cx: &mut Turn<'_>) {
        self.lost(cx, &End::MakesRoom);
    }

    /// The connection is of no use any more.
    fn lost(&mut self, cx: &mut Turn<'_>, why: &End) {
        match why {
            End::Conn(ConnError::Closed) => {
                tracing::info!(controller = self.shared.name, session = self.key.id, "vhost: {why}");
            }
            // Strangers could fill the log with it; the controller says so now and then.
            End::MakesRoom => {
                tracing::debug!(controller = self.shared.name, session = self.key.id, "vhost: {why}");
            }
            _ => tracing::warn!(controller = self.shared.name, session = self.key.id, "vhost: {why}"),
        }
        self.close(cx);
    }

    /// Ends the session once its requests are done. The front end hears nothing any more.
    pub(crate) fn close(&mut self, cx: &mut Turn<'_>) {
        if matches!(self.pending, Pending::Close { .. } | Pending::Lanes { .. }) {
            return;
        }
        cx.unwatch(self.conn.raw());
        let left = self.stop_all();
        self.pending = Pending::Close { left };
        self.step_close(cx);
    }

    fn step_close(&mut self, cx: &mut Turn<'_>) {
        match &self.pending {
            Pending::Close { left: 0 } => {
                self.lanes.iter().for_each(|l| l.handle.close::<D>());
                self.pending = Pending::Lanes { left: self.lanes.len() };
                self.step_close(cx);
            }
            Pending::Lanes { left: 0 } => self.gone(cx),
            _ => {}
        }
    }

    fn gone(&mut self, cx: &mut Turn<'_>) {
        if let Some(poller) = self.poller.take() {
            cx.remove_poller(poller);
        }
        if let Some(sessions) = cx.local::<Sessions<D>>() {
            sessions.0.borrow_mut().remove(&self.key.id);
        }
        if let Some((_, done)) = self.detaching.take() {
            done(cx);
        }
        tracing::debug!(controller = self.shared.name, session = self.key.id, "vhost: session ended");
        session_ended(cx, &self.shared, self.key.id);
    }

    fn event(&mut self, cx: &mut Turn<'_>, event: Event) {
        match event {
            Event::Started => {}
            Event::Refused { index, why } => {
                let (controller, session) = (self.shared.name.as_str(), self.key.id);
                tracing::warn!(controller, session, queue = index, "vhost: the queue cannot run: {why}");
                if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
                    vring.refused();
                }
            }
            Event::Stopped { index, base } => {
                if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
                    vring.stopped(base);
                }
                self.one_stopped(cx, index);
            }
            Event::Swapped => self.one_swapped(cx),
            Event::Loss => {
                if self.memory.is_lost() || self.inflight.as_ref().is_some_and(InflightArea::is_lost) {
                    self.lost(cx, &End::Truncated);
                }
            }
            Event::Detached => {
                let Some((left, done)) = self.detaching.take() else { return };
                match left - 1 {
                    0 => done(cx),
                    left => self.detaching = Some((left, done)),
                }
            }
            Event::Closed => {
                if let Pending::Lanes { left } = &mut self.pending {
                    *left -= 1;
                    self.step_close(cx);
                }
            }
        }
    }

    fn one_stopped(&mut self, cx: &mut Turn<'_>, index: u16) {
        match &mut self.pending {
            Pending::Stop { request } => {
                let request = *request;
                self.pending = Pending::Nothing;
                let base = self.vrings.get(usize::from(index)).map_or(0, Vring::base);
                let answer = self.answer_base(request, index.into(), base);
                self.resume(cx, answer);
            }
            Pending::Reset { left, ack, device } => {
                *left -= 1;
                if *left == 0 {
                    let (ack, device) = (*ack, *device);
                    self.pending = Pending::Nothing;
                    let answer = self.reset(device, ack);
                    self.resume(cx, answer);
                }
            }
            Pending::Close { left } => {
                *left -= 1;
                self.step_close(cx);
            }
            Pending::Nothing | Pending::Swap { .. } | Pending::Lanes { .. } => {}
        }
    }

    fn one_swapped(&mut self, cx: &mut Turn<'_>) {
        let Pending::Swap { left, ack, .. } = &mut self.pending else { return };
        *left -= 1;
        if *left == 0 {
            let ack = *ack;
            self.pending = Pending::Nothing;
            let answer = self.acknowledge(ack);
            self.resume(cx, answer);
        }
    }

    /// What was waited for has happened; further messages may be there already.
    fn resume(&mut self, cx: &mut Turn<'_>, answer: Result<(), End>) {
        if let Err(why) = answer {
            return self.lost(cx, &why);
        }
        self.poll(cx);
    }

    /// Requests fail from now on; `done` runs when no reactor uses the disk any more.
    pub(crate) fn detach(&mut self, cx: &mut Turn<'_>, done: Then) {
        if self.lanes.is_empty() || matches!(self.pending, Pending::Lanes { .. }) {
            return done(cx);
        }
        self.detaching = Some((self.lanes.len(), done));
        self.lanes.iter().for_each(|l| l.handle.detach::<D>());
    }

    pub(crate) fn set_coalescing(&self, config: Coalescing) {
        self.lanes.iter().for_each(|l| l.handle.set_coalescing::<D>(config));
    }

    /// Tells the guest to read its configuration again.
    pub(crate) fn config_changed(&self) {
        let Some(socket) = &self.backend_req else { return };
        let request = vhost::vhost_user::message::BackendReq::CONFIG_CHANGE_MSG.into();
        let header = crate::wire::Header::message(request, 0);
        if let Err(e) = crate::conn::send(std::os::fd::AsFd::as_fd(socket), &header, &[], None) {
            let (controller, session) = (self.shared.name.as_str(), self.key.id);
            tracing::warn!(controller, session, "vhost: the guest was not told of its new size: {e}");
        }
    }
}

impl<D: Disk> Drop for Session<D> {
    fn drop(&mut self) {
        let mut left = std::mem::take(&mut self.rest);
        left.extend(self.conn.end());
        left.extend(self.backend_req.take());
        if !left.is_empty() {
            self.shared.closing.close(left, self.lease.take());
        }
    }
}

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum End {
    #[error(transparent)]
    Conn(#[from] ConnError),
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    #[error(transparent)]
    Inflight(#[from] crate::inflight::AreaError),
    #[error(transparent)]
    EventFd(#[from] crate::fd::EventFdError),
    #[error("queue {index} of {most}; queues 0 to {} are there", most - 1)]
    NoQueue { index: u32, most: u16 },
    #[error("features {got:#x} of which {offered:#x} are offered")]
    Features { got: u64, offered: u64 },
    #[error(
        "the front end has taken its memory away: it made the file shorter, or the file system has no page left for it"
    )]
    Truncated,
    #[error(
        "the front end has sent more descriptors than the {most} that one may have (vhost_set_options, max_descriptors)"
    )]
    Descriptors { most: usize },
    #[error(
        "the front end has {held} descriptors, and no more are left for it of those that the limit of open files gives to vhost-user"
    )]
    NoDescriptors { held: usize },
    #[error("another front end has come, of as many as there may be, and this one has not started a queue")]
    MakesRoom,
    #[error("{0} while the queue runs; GET_VRING_BASE stops it")]
    Running(&'static str),
}

/// What holds a queue's place on its reactor.
pub(crate) type PlaceGuard = Box<dyn Any>;

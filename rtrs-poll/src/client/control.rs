//! The control side of the client: its poller, connection-manager events, and what lanes report.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iobuf::Registry;
use reactor::{Handle, Polled, Poller, Turn};
use verbs::{Cm, CmEvent, CmId};

use super::entry::{PathEntry, PathPhase, SessionEntry};
use super::error::{PathError, SessionEnd};
use super::event::Event;
use super::keys::{KeyTable, Keys};
use super::lane::{Lane, Remains, Reports};
use super::path::PathId;
use super::session::SessionId;
use super::silence::Change;
use super::upper::Upper;
use crate::cqs::Cqs;

/// Entries of a completion queue; another one is made when its queue pairs could need more.
const CQ_ENTRIES: u32 = 8192;

/// One reactor, as the control thread sees it.
pub(super) struct LanePort {
    pub handle: Handle,
    pub cqs: Cqs,
}

impl LanePort {
    fn new(handle: Handle) -> Self {
        Self { handle, cqs: Cqs::new(CQ_ENTRIES) }
    }
}

type Handler = Rc<dyn Fn(&mut Turn<'_>, Event)>;
type Done = Box<dyn FnOnce(&mut Turn<'_>)>;

/// An RTRS client on the control thread, over any number of sessions, providers and reactors.
pub struct Client<U: Upper> {
    pub(super) lanes: Vec<LanePort>,
    pub(super) cms: Vec<Box<dyn Cm>>,
    pub(super) conns: HashMap<CmId, ConnRef>,
    pub(super) sessions: BTreeMap<SessionId, SessionEntry>,
    /// Disconnects that the peer has not confirmed, and until when to wait for it.
    pub(super) leaving: HashMap<CmId, (usize, Instant)>,
    /// For [`Client::expire`].
    due: Vec<SessionId>,
    pub(super) events: Vec<Event>,
    pub(super) keys: Keys,
    /// When to look for memory that nobody else holds.
    look_at_memory: Option<Instant>,
    handler: Handler,
    next_session: u64,
    next_path: u64,
    pub(super) drained: Option<Done>,
    _upper: std::marker::PhantomData<U>,
}

/// Where a connection-manager id belongs.
#[derive(Clone, Copy)]
pub(super) struct ConnRef {
    pub path: PathId,
    pub cid: u16,
}

/// How long a server may take to confirm a disconnect before the connection is forgotten all the same.
pub(super) const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often to look for memory that nobody else holds.
const MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// How messages find the client on the control thread.
struct ClientCell<U: Upper>(Rc<RefCell<Client<U>>>);

struct ClientPoller<U: Upper>(Rc<RefCell<Client<U>>>);

impl<U: Upper> Poller for ClientPoller<U> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let (busy, events, handler, done) = {
            let mut client = self.0.borrow_mut();
            let busy = client.poll_events(cx);
            client.expire(cx.now);
            let events = std::mem::take(&mut client.events);
            let done = if events.is_empty() && client.is_empty() { client.drained.take() } else { None };
            (busy, events, client.handler.clone(), done)
        };
        // Not while the client is borrowed: handlers may use it.
        let any = !events.is_empty() || done.is_some();
        events.into_iter().for_each(|e| handler(cx, e));
        if let Some(done) = done {
            done(cx);
        }
        (busy || any).into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        let client = self.0.borrow();
        (!client.events.is_empty() || client.drained.is_some() && client.is_empty()).into()
    }

    fn deadline(&self) -> Option<Instant> {
        let client = self.0.borrow();
        let sessions = client.sessions.values().filter_map(SessionEntry::deadline);
        let leaving = client.leaving.values().map(|(_, until)| *until);
        sessions.chain(leaving).chain(client.look_at_memory).min()
    }
}

/// Reports of lanes as messages to the control thread.
struct ToControl<U: Upper> {
    control: Handle,
    _upper: std::marker::PhantomData<fn() -> U>,
}

impl<U: Upper> ToControl<U> {
    fn send(&self, f: impl FnOnce(&mut Client<U>, &mut Turn<'_>) + Send + 'static) {
        self.control.send(move |cx| {
            if let Some(cell) = cx.local::<ClientCell<U>>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }
}

/// A lane reports on a link only between opening it and `link_closed`, in order, and a path is connected again only
/// after all its links are closed: so a report never is about an earlier connection than the present one.
impl<U: Upper> Reports for ToControl<U> {
    fn link_broken(&self, path: PathId, why: String) {
        self.send(move |c, cx| c.close_path(cx.now, path, PathError::Lost(why)));
    }
    fn link_ended(&self, path: PathId, cid: u16) {
        self.send(move |c, cx| c.path_ended(cx.now, path, format!("con {cid}: the connection has ended")));
    }
    fn info_rsp(&self, path: PathId, message: Vec<u8>) {
        self.send(move |c, cx| c.info_rsp(cx.now, path, &message));
    }
    fn link_closed(&self, path: PathId, remains: Option<Remains>) {
        self.send(move |c, cx| {
            drop(remains);
            c.link_closed(cx.now, path);
        });
    }
    fn session_drained(&self, session: SessionId) {
        self.send(move |c, cx| c.lane_drained(cx.now, session));
    }
    fn memory_changed(&self) {
        self.send(|c, _| c.refresh_memory());
    }
    fn keys_back(&self, keys: Arc<KeyTable>) {
        self.send(move |_, _| drop(keys));
    }
}

impl<U: Upper> Client<U> {
    /// Sets a client up on the control thread `cx`, with a lane on each of `reactors`. `registry`: the memory that
    /// requests may use; each device gets all of it registered for RDMA WRITEs of servers (see [the module](super)).
    /// `upper` makes each lane's upper layer, on its reactor; `handler` hears what becomes of sessions, here, while
    /// the client is not borrowed.
    pub fn install(
        cx: &mut Turn<'_>,
        reactors: &[Handle],
        registry: Arc<Registry>,
        upper: impl Fn(&mut Turn<'_>) -> U + Send + Sync + 'static,
        handler: impl Fn(&mut Turn<'_>, Event) + 'static,
    ) -> Rc<RefCell<Self>> {
        let reports: Arc<dyn Reports> =
            Arc::new(ToControl::<U> { control: cx.handle().clone(), _upper: std::marker::PhantomData });
        let upper = Arc::new(upper);
        for r in reactors {
            let (upper, reports, registry) = (upper.clone(), reports.clone(), registry.clone());
            r.send(move |cx| {
                let u = upper(cx);
                Lane::install(cx, u, registry, reports);
            });
        }
        let client = Rc::new(RefCell::new(Self {
            lanes: reactors.iter().cloned().map(LanePort::new).collect(),
            cms: Vec::new(),
            conns: HashMap::new(),
            sessions: BTreeMap::new(),
            leaving: HashMap::new(),
            due: Vec::new(),
            events: Vec::new(),
            keys: Keys::new(registry),
            look_at_memory: None,
            handler: Rc::new(handler),
            next_session: 1,
            next_path: 1,
            drained: None,
            _upper: std::marker::PhantomData,
        }));
        cx.set_local(Rc::new(ClientCell(client.clone())));
        cx.add_poller("rtrs_client_cm", Box::new(ClientPoller(client.clone())));
        client
    }

    /// Adds a provider's connection manager, which serves this client alone.
    ///
    /// # Errors
    /// Its descriptor cannot be watched.
    pub fn add_cm(&mut self, cx: &mut Turn<'_>, cm: Box<dyn Cm>) -> std::io::Result<()> {
        cx.watch(cm.wait_fd())?;
        self.cms.push(cm);
        Ok(())
    }

    /// The providers that were added.
    pub fn providers(&self) -> Vec<&'static str> {
        self.cms.iter().map(|c| c.provider()).collect()
    }

    /// Nothing is left that could still happen.
    fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.leaving.is_empty()
    }

    pub(super) fn new_session_id(&mut self) -> SessionId {
        self.next_session += 1;
        SessionId(self.next_session - 1)
    }

    pub(super) fn new_path_id(&mut self) -> PathId {
        self.next_path += 1;
        PathId(self.next_path - 1)
    }

    /// The session of a path.
    pub(super) fn session_of(&mut self, path: PathId) -> Option<&mut SessionEntry> {
        self.sessions.values_mut().find(|s| s.paths.iter().any(|p| p.id == path))
    }

    pub(super) fn path(&mut self, path: PathId) -> Option<&mut PathEntry> {
        self.session_of(path)?.path(path)
    }

    /// Sends `f` to the lanes that serve a session.
    pub(super) fn to_lanes(
        &self,
        session: &SessionEntry,
        f: impl Fn(&mut Turn<'_>, &mut Lane<U>) + Send + Clone + 'static,
    ) {
        for reactor in session.options.used_reactors() {
            Lane::<U>::send(&self.lanes[*reactor].handle, f.clone());
        }
    }

    /// Registers regions that came into the registry and lets go of those that nobody else holds any more. Happens by
    /// itself soon after a change; call it where memory must be given back at once.
    pub fn refresh_memory(&mut self) {
        for device in self.keys.refresh() {
            let Some(table) = self.keys.table(&device) else { continue };
            for lane in &self.lanes {
                let (device, table) = (device.clone(), table.clone());
                Lane::<U>::send(&lane.handle, move |_, l| l.set_keys(&device, &table));
            }
        }
    }

    fn poll_events(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        for cm in 0..self.cms.len() {
            for _ in 0..64 {
                match self.cms[cm].poll() {
                    Ok(Some(event)) => self.event(cx.now, event),
                    Ok(None) => break,
                    Err(error) => {
                        // Its descriptor stays readable, so watching it further would keep this thread awake.
                        cx.unwatch(self.cms[cm].wait_fd());
                        self.cm_failed(cx.now, cm, &error.to_string());
                        break;
                    }
                }
                busy = true;
            }
        }
        busy
    }

    fn event(&mut self, now: Instant, event: CmEvent) {
        let id = event.id();
        let Some(conn) = self.conns.get(&id).copied() else {
            if matches!(event, CmEvent::Disconnected(_) | CmEvent::Failed { .. } | CmEvent::DeviceRemoved(_))
            {
                self.left(id);
            }
            return;
        };
        match event {
            CmEvent::Resolved(_) => self.resolved(now, conn),
            CmEvent::Established { private, .. } => self.established(now, conn, &private),
            CmEvent::Rejected { reason, private, .. } => self.rejected(now, conn, reason, &private),
            CmEvent::Disconnected(_) => {
                let why = format!("con {}: disconnected by the server", conn.cid);
                self.confirmed(conn);
                self.path_ended(now, conn.path, why);
            }
            CmEvent::Failed { reason, .. } => {
                self.confirmed(conn);
                self.con_failed(now, conn, &reason);
            }
            CmEvent::DeviceRemoved(_) => self.con_failed(now, conn, "its RDMA device is gone"),
            // Only listeners get those.
            CmEvent::ConnectRequest { id, .. } => {
                if let Some(cm) = self.path(conn.path).and_then(|p| Some(p.attempt.as_ref()?.cm)) {
                    self.cms[cm].destroy(id);
                }
            }
        }
    }

    /// A connection manager that fails once is not asked again: its paths end.
    fn cm_failed(&mut self, now: Instant, cm: usize, why: &str) {
        let on_it = |p: &&PathEntry| p.attempt.as_ref().is_some_and(|a| a.cm == cm);
        let all = self.sessions.values().flat_map(|s| &s.paths);
        let paths: Vec<PathId> = all.filter(on_it).map(|p| p.id).collect();
        for path in paths {
            self.close_path(now, path, PathError::Verbs(format!("connection manager failed: {why}")));
        }
    }

    /// Does what is due.
    fn expire(&mut self, now: Instant) {
        let due = |s: &&SessionEntry| s.deadline().is_some_and(|d| d <= now);
        // Sessions with traffic are due all the time: this does not allocate.
        let mut sessions = std::mem::take(&mut self.due);
        sessions.extend(self.sessions.values().filter(due).map(|s| s.id));
        sessions.drain(..).for_each(|id| self.expire_session(now, id));
        self.due = sessions;
        let gone: Vec<CmId> =
            self.leaving.iter().filter(|(_, (_, d))| *d <= now).map(|(id, _)| *id).collect();
        gone.into_iter().for_each(|id| self.left(id));
        if self.look_at_memory.is_some_and(|at| at <= now) {
            self.refresh_memory();
            self.look_at_memory = None;
        }
        if self.look_at_memory.is_none() && self.keys.in_use() {
            self.look_at_memory = Some(now + MEMORY_INTERVAL);
        }
    }

    fn expire_session(&mut self, now: Instant, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.loss_deadline().is_some_and(|d| d <= now) {
            let after = session.options.loss_timeout.unwrap_or_default();
            let last = session.last_failure.clone().unwrap_or_else(|| "none".into());
            return self.end_session(now, id, SessionEnd::LossTimeout { after, last });
        }
        let (mut late, mut retiring, mut quiet) = (Vec::new(), Vec::new(), Vec::new());
        for path in &mut session.paths {
            match path.phase {
                PathPhase::Up => {
                    quiet.extend(path.is_quiet(now, &session.options.name).then_some(path.id));
                    retiring.extend(path.retire.as_ref().map(|_| path.id));
                }
                PathPhase::Resting(until) if until <= now => path.phase = PathPhase::Waiting,
                _ => late.extend(path.timeout(now, session.options.connect_timeout).map(|e| (path.id, e))),
            }
        }
        late.into_iter().for_each(|(path, error)| self.close_path(now, path, error));
        for path in quiet {
            if let Some(session) = self.sessions.get(&id) {
                self.to_lanes(session, move |_, lane| lane.ask(path));
            }
        }
        retiring.into_iter().for_each(|path| self.look_at_retiring(now, path));
        self.start_waiting(now, id);
    }
}

impl PathEntry {
    /// Says when the server does not answer, and when it does again. True if it is to be asked whether it is there.
    fn is_quiet(&mut self, now: Instant, session: &str) -> bool {
        let Some(silence) = self.silence.as_mut().filter(|s| s.look <= now) else { return false };
        let (answered, inflight) = self.shared.answered();
        let change = silence.look(now, answered, inflight);
        match change {
            Some(Change::Silent(since)) => tracing::warn!(
                session, path = %self.spec, requests = inflight, ?since,
                "the server does not answer; requests wait until it does, or until the path is given up"
            ),
            Some(Change::Answers(after)) => {
                tracing::info!(session, path = %self.spec, ?after, "the server answers again")
            }
            Some(Change::Quiet) | None => {}
        }
        change == Some(Change::Quiet)
    }

    /// What there was no answer to in time.
    fn timeout(&self, now: Instant, within: Duration) -> Option<PathError> {
        let attempt = self.attempt.as_ref().filter(|a| a.deadline.is_some_and(|d| d <= now))?;
        let what = match self.phase {
            PathPhase::Info => "INFO_REQ".into(),
            _ => format!("the connection request of con {}", attempt.cons.len().saturating_sub(1)),
        };
        Some(PathError::Timeout { what, within })
    }
}

//! The control side of the server: listeners, admission, and the life of paths.
//!
//! Runs on the control thread. A connection is created here, handed to the least loaded reactor, and accepted only
//! when that reactor has posted its receives:
//! ```text
//! ConnectRequest ─▶ admit ─▶ [path memory] ─▶ create_qp ─▶ lane.add_con ─▶ (message back) ─▶ accept
//! path_broken / Disconnected / timeout ─▶ begin_close: disconnect all cons ─▶ lane.close_con each
//!    ─▶ con_closed each: destroy id ─▶ path_closed ─▶ last path of the session: SessionEvents::session_down
//! ```

mod close;
mod connect;
mod identity;
mod info;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iobuf::Registry;
use reactor::{Handle, Polled, Poller, Turn};
use rtrs_proto::admission::{Limits, PathId, SessionId, SessionTable};
use verbs::{Cm, CmEvent, CmId, Device};

use crate::cqs::{Cqs, Share};
use crate::lane::{ConKey, Lane, Reports};
use crate::options::Options;
use crate::path::Path;
use crate::session::Session;
use crate::upper::Upper;

pub use info::{PathInfo, SessionInfo};

/// Entries of a completion queue; another one is made when its queue pairs could need more.
const CQ_ENTRIES: u32 = 32768;

/// What the layer above does on the control thread.
pub trait SessionEvents {
    /// The operator expects clients at `peer`: what is kept for known clients is for them, too.
    fn expects(&self, _peer: IpAddr) -> bool {
        false
    }

    /// The first path of a session came up, from `peer`.
    fn session_up(&mut self, cx: &mut Turn<'_>, session: &Arc<Session>);
    /// Its last path is gone and nothing of it is in flight: close its devices.
    fn session_down(&mut self, cx: &mut Turn<'_>, session: &Arc<Session>);

    /// May a path from `peer` join the session, which is called `name` and has paths from `present`?
    fn judge_join(&self, _: &Session, _name: &str, _peer: IpAddr, _present: &[IpAddr]) -> Verdict {
        Verdict::Welcome
    }

    /// May a new session from `peer` have the name of one that has paths from `holders`? [`Verdict::Displaces`]
    /// ends that one; anything else leaves it the name.
    fn judge_name(&self, name: &str, _peer: IpAddr, _holders: &[IpAddr]) -> Verdict {
        Verdict::Refused(format!("the name {name:?} is in use"))
    }
}

/// What the layer above says of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may come up.
    Welcome,
    /// It may not, for this reason.
    Refused(String),
    /// It may, and those that are there have no right to be: their session ends.
    Displaces,
}

/// A listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The provider's refusal.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
    /// No connection manager of that name.
    #[error("provider '{0}' is not available; available: {1}")]
    Provider(String, String),
    /// Already there.
    #[error("already listening on {0}")]
    Exists(SocketAddr),
    /// Not there.
    #[error("not listening on {0}")]
    NotFound(SocketAddr),
    /// Shutting down.
    #[error("the server is shutting down")]
    Stopping,
}

/// One listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listening {
    /// As asked for, port 0 resolved.
    pub addr: SocketAddr,
    /// "rdma-core", …
    pub provider: &'static str,
    /// As [`ConnParams::ack_delay`](verbs::ConnParams::ack_delay), for its clients.
    pub ack_delay: Option<u8>,
}

/// An RTRS server on the control thread, over any number of providers and reactors.
pub struct Server<U: Upper> {
    options: Options,
    table: SessionTable,
    registry: Arc<Registry>,
    lanes: Vec<LanePort>,
    cms: Vec<Box<dyn Cm>>,
    listeners: HashMap<CmId, (usize, Listening)>,
    conns: HashMap<CmId, ConnRef>,
    paths: HashMap<u32, PathEntry>,
    tags: HashMap<PathId, u32>,
    sessions: HashMap<SessionId, Arc<Session>>,
    next_tag: u32,
    events: Rc<RefCell<dyn SessionEvents>>,
    reports: Arc<dyn Reports>,
    epoch: Instant,
    /// Run when the last path is gone.
    drained: Option<Done>,
    stopping: bool,
    /// Bytes of queues that were freed and that the allocator may keep.
    freed: u64,
    /// INFO_REQs that wait for a session to end.
    claims: Vec<identity::Claim>,
    failed_cms: HashSet<usize>,
    _upper: std::marker::PhantomData<U>,
}

type Done = Box<dyn FnOnce(&mut Turn<'_>)>;

/// One reactor, as seen from here.
struct LanePort {
    handle: Handle,
    connections: usize,
    cqs: Cqs,
}

/// Where a connection-manager id belongs.
#[derive(Clone, Copy)]
struct ConnRef {
    tag: u32,
    cid: u16,
}

struct PathEntry {
    id: PathId,
    session_id: SessionId,
    path: Arc<Path>,
    /// Of all its connections.
    device: Arc<dyn Device>,
    cons: Vec<Option<ConEntry>>,
    closing: bool,
    since: Instant,
}

struct ConEntry {
    cm: usize,
    id: CmId,
    ack_delay: Option<u8>,
    lane: usize,
    cq: Share,
    /// Known once the lane has taken the connection.
    key: Option<ConKey>,
    /// The client has been told yes.
    accepted: bool,
    /// Close was asked for; the lane answers.
    closing: bool,
    closed: bool,
    drained: bool,
}

/// How messages and reports find the server on the control thread.
pub struct ServerCell<U: Upper>(Rc<RefCell<Server<U>>>);

/// Polls connection-manager events.
struct CmPoller<U: Upper>(Rc<RefCell<Server<U>>>);

impl<U: Upper> Poller for CmPoller<U> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let mut server = self.0.borrow_mut();
        let busy = server.poll_events(cx);
        server.expire(cx);
        busy.into()
    }

    fn deadline(&self) -> Option<Instant> {
        let server = self.0.borrow();
        server.table.deadline().map(|ns| server.epoch + Duration::from_nanos(ns))
    }
}

/// Reports of lanes as messages to the control thread.
struct ToControl<U: Upper> {
    control: Handle,
    _upper: std::marker::PhantomData<fn() -> U>,
}

impl<U: Upper> ToControl<U> {
    fn send(&self, f: impl FnOnce(&mut Server<U>, &mut Turn<'_>) + Send + 'static) {
        self.control.send(move |cx| {
            if let Some(cell) = cx.local::<ServerCell<U>>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }
}

impl<U: Upper> Reports for ToControl<U> {
    fn path_broken(&self, tag: u32, why: String) {
        self.send(move |s, cx| s.close_path(cx, tag, &why));
    }
    fn info_req(&self, tag: u32, message: [u8; crate::path::INFO_REQ_LEN], byte_len: u32) {
        self.send(move |s, cx| s.info_req(cx, tag, &message[..message.len().min(byte_len as usize)]));
    }
    fn con_closed(&self, tag: u32, cid: u16) {
        self.send(move |s, cx| s.con_closed(cx, tag, cid));
    }
    fn con_drained(&self, tag: u32, cid: u16) {
        self.send(move |s, cx| s.con_drained(cx, tag, cid));
    }
}

impl<U: Upper> Server<U> {
    /// Sets a server up on the control thread `cx`, with a lane on each of `reactors`. `upper` makes each lane's
    /// upper layer, on its reactor.
    pub fn install(
        cx: &mut Turn<'_>,
        options: Options,
        registry: Arc<Registry>,
        reactors: &[Handle],
        upper: impl Fn(&mut Turn<'_>) -> U + Send + Sync + 'static,
        events: Rc<RefCell<dyn SessionEvents>>,
    ) -> Rc<RefCell<Self>> {
        let reports: Arc<dyn Reports> =
            Arc::new(ToControl::<U> { control: cx.handle().clone(), _upper: std::marker::PhantomData });
        let upper = Arc::new(upper);
        for r in reactors {
            let (upper, reports) = (upper.clone(), reports.clone());
            r.send(move |cx| {
                let u = upper(cx);
                Lane::install(cx, u, reports);
            });
        }
        let limits = limits(&options);
        let port = |h: &Handle| LanePort { handle: h.clone(), connections: 0, cqs: Cqs::new(CQ_ENTRIES) };
        let lanes = reactors.iter().map(port);
        let server = Rc::new(RefCell::new(Self {
            options,
            table: SessionTable::new(limits),
            registry,
            lanes: lanes.collect(),
            cms: Vec::new(),
            listeners: HashMap::new(),
            conns: HashMap::new(),
            paths: HashMap::new(),
            tags: HashMap::new(),
            sessions: HashMap::new(),
            next_tag: 1,
            events,
            reports,
            epoch: cx.now,
            drained: None,
            stopping: false,
            freed: 0,
            claims: Vec::new(),
            failed_cms: HashSet::new(),
            _upper: std::marker::PhantomData,
        }));
        cx.set_local(Rc::new(ServerCell(server.clone())));
        cx.add_poller("rtrs_cm", Box::new(CmPoller(server.clone())));
        server
    }

    /// Adds a provider's connection manager.
    ///
    /// # Errors
    /// Its descriptor cannot be watched.
    pub fn add_cm(&mut self, cx: &mut Turn<'_>, cm: Box<dyn Cm>) -> std::io::Result<()> {
        cx.watch(cm.wait_fd())?;
        self.cms.push(cm);
        Ok(())
    }

    /// Whether a provider is there.
    pub fn has_provider(&self, name: &str) -> bool {
        self.cms.iter().any(|c| c.provider() == name)
    }

    /// Devices that listeners and connections use or used, of all providers, by name.
    pub fn devices(&self) -> Vec<Arc<dyn Device>> {
        let mut all: Vec<_> = self.cms.iter().flat_map(|c| c.devices()).collect();
        all.sort_by(|a, b| a.info().name.cmp(&b.info().name));
        all
    }

    /// Listens on `addr` through `provider`. `ack_delay`: [`Listening::ack_delay`].
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(
        &mut self,
        addr: SocketAddr,
        provider: &str,
        ack_delay: Option<u8>,
    ) -> Result<Listening, ListenError> {
        if self.stopping {
            return Err(ListenError::Stopping);
        }
        if self.listeners.values().any(|(_, l)| l.addr == addr) {
            return Err(ListenError::Exists(addr));
        }
        let Some(cm) = self.cms.iter().position(|c| c.provider() == provider) else {
            let have: Vec<_> = self.cms.iter().map(|c| c.provider()).collect();
            return Err(ListenError::Provider(provider.into(), have.join(", ")));
        };
        let id = self.cms[cm].listen(addr, 64)?;
        let addr = self.cms[cm].local_addr(id).unwrap_or(addr);
        let listening = Listening { addr, provider: self.cms[cm].provider(), ack_delay };
        self.listeners.insert(id, (cm, listening.clone()));
        tracing::info!(%addr, provider = listening.provider, "listening for RTRS");
        Ok(listening)
    }

    /// Stops listening on `addr`; connected paths stay.
    ///
    /// # Errors
    /// [`ListenError::NotFound`].
    pub fn unlisten(&mut self, addr: SocketAddr) -> Result<(), ListenError> {
        let found = self.listeners.iter().find(|(_, (_, l))| l.addr == addr).map(|(id, (cm, _))| (*id, *cm));
        let (id, cm) = found.ok_or(ListenError::NotFound(addr))?;
        self.listeners.remove(&id);
        self.cms[cm].destroy(id);
        Ok(())
    }

    /// All listeners.
    pub fn listeners(&self) -> Vec<Listening> {
        let mut all: Vec<_> = self.listeners.values().map(|(_, l)| l.clone()).collect();
        all.sort_by_key(|l| l.addr);
        all
    }

    fn now_ns(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_nanos() as u64
    }

    fn poll_events(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        for cm in 0..self.cms.len() {
            for _ in 0..64 {
                match self.cms[cm].poll() {
                    Ok(Some(event)) => self.event(cx, cm, event),
                    Ok(None) => break,
                    Err(error) => {
                        // Its descriptor stays readable, so watching it further would keep this thread awake.
                        if self.failed_cms.insert(cm) {
                            cx.unwatch(self.cms[cm].wait_fd());
                            tracing::error!(%error, "connection manager failed: no new connections through it");
                        }
                        break;
                    }
                }
                busy = true;
            }
        }
        busy
    }

    fn event(&mut self, cx: &mut Turn<'_>, cm: usize, event: CmEvent) {
        match event {
            CmEvent::ConnectRequest { listener, id, private, local, peer } => {
                let ack_delay = self.listeners.get(&listener).and_then(|(_, l)| l.ack_delay);
                self.connect_request(cx, cm, id, ack_delay, &private, local, peer);
            }
            CmEvent::Established { id, .. } => self.established(cx, id),
            CmEvent::Resolved(_) => {}
            CmEvent::Rejected { id, reason, .. } => {
                self.id_broken(cx, id, &format!("rejected by the client ({reason})"));
            }
            CmEvent::Disconnected(id) => self.id_broken(cx, id, "disconnected by the client"),
            CmEvent::Failed { id, reason } => self.id_broken(cx, id, &reason),
            CmEvent::DeviceRemoved(id) => self.device_removed(cx, cm, id),
        }
    }

    fn device_removed(&mut self, cx: &mut Turn<'_>, cm: usize, id: CmId) {
        if let Some((_, listening)) = self.listeners.remove(&id) {
            tracing::error!(addr = %listening.addr, "the RDMA device of this listener is gone");
            self.cms[cm].destroy(id);
        } else {
            self.id_broken(cx, id, "its RDMA device is gone");
        }
    }

    fn id_broken(&mut self, cx: &mut Turn<'_>, id: CmId, why: &str) {
        if let Some(conn) = self.conns.get(&id).copied() {
            self.close_path(cx, conn.tag, &format!("con {}: {why}", conn.cid));
        }
    }

    fn expire(&mut self, cx: &mut Turn<'_>) {
        if self.table.deadline().is_none_or(|d| d > self.now_ns(cx.now)) {
            return;
        }
        let late: Vec<PathId> = self.table.expired(self.now_ns(cx.now)).collect();
        for id in late {
            match self.tags.get(&id).copied() {
                Some(tag) => self.close_path(cx, tag, "the client did not finish connecting in time"),
                None => drop(self.table.path_closed(id)),
            }
        }
    }
}

/// What the operator has chosen, for the session table.
fn limits(options: &Options) -> Limits {
    let limits = Limits {
        max_sessions: options.max_sessions as usize,
        max_paths: options.max_paths as usize,
        max_connections: options.max_connections as usize,
        path_bytes: options.geometry.total_bytes().into(),
        connection_bytes: options.queue_bytes(),
        share_percent: options.share_percent,
        half_open_ns: options.half_open_timeout.as_nanos() as u64,
        ..Limits::default()
    };
    let half = || (iobuf::usable_memory() / 2).max(limits.usual_path());
    Limits { max_memory: options.max_memory.unwrap_or_else(half), ..limits }
}

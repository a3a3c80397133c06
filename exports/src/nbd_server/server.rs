//! The server on the control thread: exports, listeners, and which connections there are.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Event as BdevEvent, Manager, Mode};
use engine::App;
use engine::placement::{Place, Placement};
use nbd_poll::listener::{
    Accepted, Acceptor, AcceptorOptions, Address, Event, HandshakeError, Identity, Listener, Peer,
};
use reactor::{Handle, Polled, Poller, Turn};

use super::allow::AllowList;
use super::client::{NewClient, Stats};
use super::dialect::Speech;
use super::error::ServerError;
use super::export::{Export, Exports, View};
use super::fence::Fence;
use super::lane::Lane;
use super::limit::LogLimit;

/// Refused and broken handshakes that are logged, per second.
const LOGGED_FAILURES: u32 = 10;

/// Limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// Connections in all, handshakes included.
    pub(super) max_connections: usize,
    /// Handshakes at once on one listener.
    pub(super) max_handshakes: usize,
    /// How long a client may take to choose an export.
    pub(super) handshake_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let AcceptorOptions { timeout, max_handshakes, .. } = AcceptorOptions::default();
        Self { max_connections: 1024, max_handshakes, handshake_timeout: timeout }
    }
}

pub(super) struct Listening {
    acceptor: Acceptor,
    /// The name of the socket that was passed to the program.
    pub(super) activated: Option<String>,
    pub(super) speech: Speech,
    /// For clients that do not name one.
    pub(super) export: Option<String>,
}

impl Listening {
    pub(super) fn address(&self) -> &Address {
        self.acceptor.address()
    }

    pub(super) fn handshakes(&self) -> usize {
        self.acceptor.handshakes()
    }
}

/// A connection in its transmission phase.
pub(super) struct Connected {
    export: u64,
    pub(super) export_name: String,
    pub(super) who: Identity,
    /// Where it came in.
    pub(super) listener: Address,
    pub(super) place: Place,
    pub(super) stats: Arc<Stats>,
    pub(super) since: Instant,
    pub(super) closing: bool,
}

/// Runs here when connections have ended.
type Then = Box<dyn FnOnce(&mut Server, &mut Turn<'_>)>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    OfExport(u64),
    One(u64),
}

pub(super) struct Server {
    manager: Arc<Manager>,
    control: Handle,
    reactors: Vec<Handle>,
    placement: Placement,
    pub(super) options: Options,
    pub(super) exports: Exports,
    pub(super) listeners: Vec<Listening>,
    pub(super) connections: BTreeMap<u64, Connected>,
    waiters: Vec<(Which, Then)>,
    next_id: u64,
    stopping: bool,
    /// The program is there for one client.
    single: bool,
    failures: LogLimit,
    events: Vec<Event>,
}

/// How messages find the server on the control thread.
struct ServerCell(Rc<RefCell<Server>>);

struct ServerPoller(Rc<RefCell<Server>>);

impl Server {
    pub(super) fn new(
        manager: Arc<Manager>,
        control: Handle,
        reactors: Vec<Handle>,
        placement: Placement,
    ) -> Self {
        Self {
            manager,
            control,
            reactors,
            placement,
            options: Options::default(),
            exports: Exports::default(),
            listeners: Vec::new(),
            connections: BTreeMap::new(),
            waiters: Vec::new(),
            next_id: 1,
            stopping: false,
            single: false,
            failures: LogLimit::new(LOGGED_FAILURES),
            events: Vec::new(),
        }
    }

    /// Makes lanes, and lets messages find `server`.
    pub(super) fn install(server: &Rc<RefCell<Self>>, cx: &mut Turn<'_>) {
        cx.set_local(Rc::new(ServerCell(server.clone())));
        cx.add_poller("nbd_server", Box::new(ServerPoller(server.clone())));
        let this = server.borrow();
        for reactor in &this.reactors {
            let (control, registry) = (this.control.clone(), this.manager.registry().clone());
            let this = reactor.clone();
            reactor.send(move |cx| Lane::install(cx, this, control, registry));
        }
    }

    /// Runs `f` with the server of the control thread `control`.
    pub(super) fn send(control: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        control.send(move |cx| {
            if let Some(cell) = cx.local::<ServerCell>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }

    /// Offers a bdev under `name`.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(super) fn create_export(
        &mut self,
        name: String,
        bdev: &str,
        read_only: bool,
        description: String,
        allow: AllowList,
    ) -> Result<(), ServerError> {
        if self.stopping {
            return Err(ServerError::Stopping);
        }
        self.exports.check(&name, &description)?;
        let id = self.take_id();
        let writes = !read_only && !self.manager.get(bdev)?.info().read_only;
        let mode = if writes { Mode::ReadWrite } else { Mode::ReadOnly };
        let control = self.control.clone();
        let events = move |event| {
            if event == BdevEvent::Removed {
                Self::send(&control, move |server, cx| server.bdev_removed(cx, id));
            }
        };
        let descriptor = self.manager.open(bdev, mode, Box::new(events))?;
        let bdev_name = descriptor.info().name.clone();
        tracing::info!(export = name, bdev = bdev_name, read_only, "NBD export created");
        let fence = Fence::default();
        self.exports.insert(name, Export { id, bdev_name, description, read_only, allow, descriptor, fence });
        Ok(())
    }

    /// Ends an export: its connections are closed when their requests in flight are answered; then `done` runs.
    ///
    /// # Errors
    /// There is none of this name.
    pub(super) fn delete_export(
        &mut self,
        cx: &mut Turn<'_>,
        name: &str,
        done: impl FnOnce() + 'static,
    ) -> Result<(), ServerError> {
        let export = self.exports.remove(name)?;
        tracing::info!(export = name, "NBD export deleted");
        self.close(
            cx,
            Which::OfExport(export.id),
            Box::new(move |_, _| {
                drop(export);
                done();
            }),
        );
        Ok(())
    }

    fn bdev_removed(&mut self, cx: &mut Turn<'_>, id: u64) {
        let Some(name) = self.exports.by_id(id).map(|(name, _)| name.clone()) else { return };
        tracing::warn!(export = name, "NBD export ends: its bdev is being removed");
        // Found just now, so it is there.
        let _ = self.delete_export(cx, &name, || {});
    }

    /// Listens on an address; what it became.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(super) fn listen(
        &mut self,
        cx: &mut Turn<'_>,
        address: &Address,
        speech: Speech,
        export: Option<String>,
    ) -> Result<Address, ServerError> {
        if self.listeners.iter().any(|l| l.address() == address) {
            return Err(ServerError::ListenerExists(address.clone()));
        }
        let options = self.check_listener(address, &speech, export.as_deref())?;
        let watch = |e| ServerError::Watch(address.clone(), e);
        let acceptor = Acceptor::new(Listener::bind(address)?, options).map_err(watch)?;
        self.add_acceptor(cx, acceptor, None, speech, export)
    }

    /// As [`Server::listen`], on a socket that was passed to the program, by its name or number.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(super) fn listen_activated(
        &mut self,
        cx: &mut Turn<'_>,
        name: String,
        speech: Speech,
        export: Option<String>,
    ) -> Result<Address, ServerError> {
        let options = self.check_listener(&name, &speech, export.as_deref())?;
        let listener = Listener::adopt(super::activation::take(&name)?, &name)?;
        let address = listener.address().clone();
        let acceptor = Acceptor::new(listener, options).map_err(|e| ServerError::Watch(address, e))?;
        self.add_acceptor(cx, acceptor, Some(name), speech, export)
    }

    /// Serves one client on a socket of its own, and ends the program with it.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(super) fn serve_single(
        &mut self,
        cx: &mut Turn<'_>,
        socket: OwnedFd,
        peer: Peer,
        export: Option<String>,
    ) -> Result<(), ServerError> {
        let speech = Speech::default();
        let options = self.check_listener(&Address::Stdio, &speech, export.as_deref())?;
        let acceptor = Acceptor::single(socket, peer, cx.now, options)
            .map_err(|e| ServerError::Watch(Address::Stdio, e))?;
        self.single = true;
        self.add_acceptor(cx, acceptor, None, speech, export).map(|_| ())
    }

    /// Whether the single client of [`Server::serve_single`] has gone.
    fn single_is_gone(&self) -> bool {
        let here = |l: &Listening| l.address() == &Address::Stdio && l.handshakes() > 0;
        self.single
            && !self.stopping
            && !self.listeners.iter().any(here)
            && !self.connections.values().any(|c| c.listener == Address::Stdio)
    }

    fn add_acceptor(
        &mut self,
        cx: &mut Turn<'_>,
        acceptor: Acceptor,
        activated: Option<String>,
        speech: Speech,
        export: Option<String>,
    ) -> Result<Address, ServerError> {
        let watch = |e| ServerError::Watch(acceptor.address().clone(), e);
        cx.watch(acceptor.wait_fd()).map_err(|e| watch(e.into()))?;
        let bound = acceptor.address().clone();
        tracing::info!(address = %bound, dialect = ?speech.dialect, tls = ?speech.tls, "listening for NBD");
        self.listeners.push(Listening { acceptor, activated, speech, export });
        Ok(bound)
    }

    /// What a listener will need, and whether its export can be had by its dialect.
    fn check_listener(
        &self,
        address: &dyn std::fmt::Display,
        speech: &Speech,
        export: Option<&str>,
    ) -> Result<AcceptorOptions, ServerError> {
        if self.stopping {
            return Err(ServerError::Stopping);
        }
        if let Some(name) = export.filter(|name| !name.is_empty()) {
            match self.exports.get(name) {
                Some(export) => speech.fits(name, export.size())?,
                None => tracing::warn!(%address, export = name, "the listener's export does not exist yet"),
            }
        }
        speech.options(&self.options)
    }

    /// Accepts nothing there any more; connections stay.
    ///
    /// # Errors
    /// Nothing listens there.
    pub(super) fn unlisten(&mut self, cx: &mut Turn<'_>, address: &Address) -> Result<(), ServerError> {
        let found = self.listeners.iter().position(|l| l.address() == address);
        let place = found.ok_or_else(|| ServerError::NoListener(address.clone()))?;
        let mut listening = self.listeners.remove(place);
        Self::end_listener(cx, &mut listening, &mut self.events);
        tracing::info!(%address, "no longer listening for NBD");
        Ok(())
    }

    /// Closes one connection when its requests in flight are answered; then `done` runs.
    ///
    /// # Errors
    /// There is none of this number.
    pub(super) fn disconnect(
        &mut self,
        cx: &mut Turn<'_>,
        id: u64,
        done: impl FnOnce() + 'static,
    ) -> Result<(), ServerError> {
        if !self.connections.contains_key(&id) {
            return Err(ServerError::NoConnection(id));
        }
        self.close(cx, Which::One(id), Box::new(|_, _| done()));
        Ok(())
    }

    /// Ends the server: nothing new is taken on, requests in flight are answered; then `done` runs.
    pub(super) fn shutdown(&mut self, cx: &mut Turn<'_>, done: impl FnOnce() + 'static) {
        self.stopping = true;
        self.listeners.iter_mut().for_each(|l| l.acceptor.stop());
        self.close(
            cx,
            Which::All,
            Box::new(|server, cx| {
                for mut listening in std::mem::take(&mut server.listeners) {
                    Self::end_listener(cx, &mut listening, &mut server.events);
                }
                server.exports.clear();
                done();
            }),
        );
    }

    /// Gives up what [`Server::shutdown`] waits for.
    pub(super) fn abort(&mut self) {
        for reactor in &self.reactors {
            Lane::send(reactor, Lane::abort);
        }
    }

    /// A lane has let go of a connection.
    pub(super) fn connection_ended(&mut self, cx: &mut Turn<'_>, id: u64, why: &str) {
        let Some(gone) = self.connections.remove(&id) else { return };
        tracing::info!(id, peer = %gone.who, export = gone.export_name, why, "NBD client has gone");
        let (ready, others) =
            std::mem::take(&mut self.waiters).into_iter().partition(|(which, _)| !self.has(*which));
        self.waiters = others;
        let ready: Vec<(Which, Then)> = ready;
        ready.into_iter().for_each(|(_, then)| then(self, cx));
    }

    fn has(&self, which: Which) -> bool {
        self.connections.iter().any(|(id, c)| which.matches(*id, c))
    }

    /// Closes connections in order; `then` runs when they are gone.
    fn close(&mut self, cx: &mut Turn<'_>, which: Which, then: Then) {
        for (id, connected) in self.connections.iter_mut().filter(|(id, c)| which.matches(**id, c)) {
            connected.closing = true;
            let id = *id;
            Lane::send(connected.place.reactor(), move |lane, cx| lane.close(cx, id));
        }
        if self.has(which) {
            self.waiters.push((which, then));
        } else {
            then(self, cx);
        }
    }

    fn end_listener(cx: &mut Turn<'_>, listening: &mut Listening, events: &mut Vec<Event>) {
        cx.unwatch(listening.acceptor.wait_fd());
        listening.acceptor.stop();
        listening.acceptor.close_handshakes(events);
        events.clear();
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        for place in 0..self.listeners.len() {
            let handshakes: usize = self.listeners.iter().map(Listening::handshakes).sum();
            let listening = &mut self.listeners[place];
            // Handshakes of other listeners count, the acceptor counts its own.
            let taken = self.connections.len() + handshakes - listening.handshakes();
            let room = self.options.max_connections.saturating_sub(taken);
            let view = View { exports: &self.exports, default: listening.export.as_deref() };
            busy |= listening.acceptor.poll(cx.now, room, &view, &mut self.events);
            let address = listening.address().clone();
            for event in std::mem::take(&mut self.events) {
                self.event(cx, &address, event);
            }
        }
        if self.single_is_gone() {
            self.single = false;
            App::send(&self.control, App::shutdown);
        }
        busy
    }

    fn event(&mut self, cx: &mut Turn<'_>, listener: &Address, event: Event) {
        match event {
            Event::Accepted(accepted) => self.accepted(cx, listener, accepted),
            Event::Left(peer) => tracing::debug!(%peer, "NBD client looked and left"),
            Event::Failed(peer, why @ HandshakeError::Closed) => {
                tracing::debug!(%peer, %why, "NBD handshake");
            }
            Event::Failed(peer, why) => {
                if self.failures.allows(cx.now) {
                    tracing::warn!(%peer, %listener, %why, "NBD client refused");
                }
            }
            Event::Paused(why) => {
                if self.failures.allows(cx.now) {
                    tracing::error!(%listener, %why, "cannot accept NBD clients for now");
                }
            }
        }
    }

    /// Gives a connection to the reactor with the fewest users.
    fn accepted(&mut self, cx: &mut Turn<'_>, listener: &Address, accepted: Accepted) {
        // It may have gone after it was chosen and before the answer was sent.
        let Some((name, export)) = self.exports.by_id(accepted.chosen.export) else { return };
        if self.stopping {
            return;
        }
        let export_name = name.clone();
        let (stats, place) = (Arc::<Stats>::default(), self.placement.take());
        let new = NewClient {
            id: self.next_id,
            socket: accepted.socket,
            export: export.id,
            descriptor: export.descriptor.clone(),
            fence: export.fence.clone(),
            // As the client was told; a size that moved meanwhile is followed at its first request.
            limits: nbd_proto::request::Export {
                size: accepted.chosen.size,
                flags: accepted.chosen.flags,
                ..export.limits()
            },
            agreed: accepted.chosen.agreed,
            stats: stats.clone(),
        };
        let id = self.take_id();
        let reactor = place.reactor().clone();
        tracing::info!(
            id, peer = %accepted.who, %listener, export = export_name, reactor = reactor.name(),
            framing = ?accepted.chosen.agreed.framing, "NBD client connected"
        );
        self.connections.insert(
            id,
            Connected {
                export: new.export,
                export_name,
                who: accepted.who,
                listener: listener.clone(),
                place,
                stats,
                since: cx.now,
                closing: false,
            },
        );
        Lane::send(&reactor, move |lane, cx| lane.add(cx, new));
    }

    fn deadline(&self) -> Option<Instant> {
        self.listeners.iter().filter_map(|l| l.acceptor.deadline()).min()
    }

    /// Connections of an export.
    pub(super) fn users(&self, export: &Export) -> usize {
        self.connections.values().filter(|c| c.export == export.id).count()
    }
}

impl Which {
    fn matches(self, id: u64, connected: &Connected) -> bool {
        match self {
            Self::All => true,
            Self::OfExport(export) => connected.export == export,
            Self::One(one) => one == id,
        }
    }
}

impl Poller for ServerPoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.borrow().deadline()
    }
}

//! The server on the control thread: exports, listeners, and which connections there are.

mod arrivals;
mod listening;

pub(super) use listening::Listening;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Event as BdevEvent, Manager, Mode, User};
use engine::placement::{Place, Placement};
use nbd_poll::listener::{AcceptorOptions, Address, Event, Identity, Peer};
use reactor::descriptors::{Budget, Part};
use reactor::{Handle, Polled, Poller, Turn};

use super::allow::AllowList;
use super::census::{Census, Entrance};
use super::client::Stats;
use super::error::ServerError;
use super::export::{Export, Exports};
use super::fence::Fence;
use super::lane::Lane;
use super::ranges::RangeLock;

/// Limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// Connections in all.
    pub(super) max_connections: usize,
    /// Handshakes at once on one listener.
    pub(super) max_handshakes: usize,
    /// How long a client may take to choose an export.
    pub(super) handshake_timeout: Duration,
    /// How long a client may leave a request unfinished, whose memory is of use to nobody meanwhile.
    pub(super) stall_timeout: Duration,
    /// How fast a client must go on with what holds memory that others wait for.
    pub(super) rate: Rate,
}

/// So many bytes in so long a time, at least, or all there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) bytes: u64,
    pub(super) time: Duration,
}

impl Default for Rate {
    fn default() -> Self {
        Self { bytes: 1 << 20, time: Duration::from_secs(10) }
    }
}

/// What became of clients that were not let in, or not kept.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turned {
    /// For want of room.
    pub(super) away: u64,
    /// Their handshakes took too long.
    pub(super) late: u64,
    /// Their handshakes made room for others.
    pub(super) displaced: u64,
    /// They did not go on with a request, or too slowly with what others waited for.
    pub(super) out: u64,
}

/// Descriptors of a connection: its socket, and an epoll set around it. A handshake with TLS has as many.
const DESCRIPTORS_EACH: usize = 2;

impl Default for Options {
    fn default() -> Self {
        let AcceptorOptions { timeout, max_handshakes, .. } = AcceptorOptions::default();
        let stall_timeout = Duration::from_secs(30);
        let rate = Rate::default();
        Self { max_connections: 1024, max_handshakes, handshake_timeout: timeout, stall_timeout, rate }
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
    /// Descriptors that there may be for clients.
    pub(super) descriptors: usize,
    pub(super) census: Census,
    pub(super) turned: Turned,
    pub(super) exports: Exports,
    pub(super) listeners: Vec<Listening>,
    pub(super) connections: BTreeMap<u64, Connected>,
    waiters: Vec<(Which, Then)>,
    next_id: u64,
    stopping: bool,
    /// The program is there for one client.
    single: bool,
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
            descriptors: Budget::of_process().share(Part::Nbd),
            census: Census::default(),
            turned: Turned::default(),
            exports: Exports::default(),
            listeners: Vec::new(),
            connections: BTreeMap::new(),
            waiters: Vec::new(),
            next_id: 1,
            stopping: false,
            single: false,
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
        let user = User::Export(format!("NBD export '{name}'"));
        let descriptor = self.manager.open_as(user, bdev, mode, Box::new(events))?;
        let bdev_name = descriptor.info().name.clone();
        tracing::info!(export = name, bdev = bdev_name, read_only, "NBD export created");
        let (fence, ranges) = (Fence::default(), RangeLock::default());
        let export = Export { id, bdev_name, description, read_only, allow, descriptor, fence, ranges };
        self.exports.insert(name, export);
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

    /// Connections that there may be: as many as are wanted, if the limit of open files has enough for them.
    pub(super) fn max_connections(&self) -> usize {
        let fit = self.descriptors / 4 * 3 / DESCRIPTORS_EACH;
        self.options.max_connections.min(fit.max(1))
    }

    /// Handshakes that there may be on each of `listeners` listeners, likewise.
    pub(super) fn max_handshakes(&self, listeners: usize) -> usize {
        let fit = self.descriptors / 4 / DESCRIPTORS_EACH / listeners.max(1);
        self.options.max_handshakes.min(fit.max(1))
    }

    /// How one connection more from there is let in, if it is.
    pub(super) fn entrance(&self, peer: &Peer) -> Option<Entrance> {
        self.census.entrance(self.max_connections(), peer.source(), self.exports.name(peer))
    }

    /// A lane has let go of a connection. `shed`: the client has not kept to its times.
    pub(super) fn connection_ended(&mut self, cx: &mut Turn<'_>, id: u64, why: &str, shed: bool) {
        let Some(gone) = self.connections.remove(&id) else { return };
        self.census.leave(gone.who.peer.source());
        if shed {
            self.turned.out += 1;
            tracing::warn!(id, peer = %gone.who, export = gone.export_name, why, "NBD client is ended");
        } else {
            tracing::info!(id, peer = %gone.who, export = gone.export_name, why, "NBD client has gone");
        }
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

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
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

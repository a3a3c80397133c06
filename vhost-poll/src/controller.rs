//! A vhost-user-blk controller: a listening socket whose front ends share one disk.
//!
//! Everything here runs on the control thread.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use iobuf::Registry;
use reactor::descriptors::Share;
use reactor::{AcceptPause, Handle, Polled, Poller, PollerId, Turn};
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::closing::Closing;
use crate::disk::{Disk, DiskInfo};
use crate::queue::Coalescing;
use crate::session::{PlaceGuard, Session, SessionInfo};

/// Front ends at once. One more takes the place of one that has not started a queue, if there is such a one.
pub const MAX_SESSIONS: usize = 64;
/// Descriptors that a front end needs besides those of queues: its connection, the channel back, and some on their way.
const BESIDES_QUEUES: usize = 4;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Chooses a reactor for a queue: its index in [`ControllerOptions::reactors`], and what to keep while the queue is
/// there.
pub type Place = Box<dyn Fn() -> (usize, PlaceGuard)>;

/// What is to be done when something has ended.
pub(crate) type Then = Box<dyn FnOnce(&mut Turn<'_>)>;

/// How a controller is set up.
pub struct ControllerOptions {
    /// For logs.
    pub name: String,
    /// Of the socket.
    pub path: PathBuf,
    /// Offer packed rings.
    pub packed_ring: bool,
    /// Queues that a front end may use, 1 to 256.
    pub max_queues: u16,
    /// Where queues may run.
    pub reactors: Vec<Handle>,
    /// Where the next queue runs.
    pub place: Place,
    /// Guests' memory is registered here.
    pub registry: Arc<Registry>,
    /// Descriptors that one front end may hold here: its connection, kick, call and error of each queue, the channel back.
    /// Files of memory are mapped and closed.
    pub max_descriptors: usize,
    /// What this controller may have of all.
    pub descriptors: Share,
}

impl ControllerOptions {
    /// Queues that a front end may have: as many as it may have kick and call descriptors for.
    pub(crate) fn queues(&self) -> u16 {
        queues(self.max_queues, self.max_descriptors)
    }
}

/// Queues that a front end may have, of `max_queues`, with `max_descriptors` descriptors: each needs two, kick and call. An
/// error descriptor is kept while there is room.
pub fn queues(max_queues: u16, max_descriptors: usize) -> u16 {
    let most = max_descriptors.saturating_sub(BESIDES_QUEUES) / 2;
    max_queues.min(u16::try_from(most).unwrap_or(u16::MAX)).max(1)
}

/// Descriptors of a front end with `queues` queues that all have all three of theirs.
pub fn descriptors(queues: u16) -> usize {
    BESIDES_QUEUES + 3 * usize::from(queues)
}

/// Why a controller cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody serves it.
    #[error("{} is in use by another process or controller", .0.display())]
    InUse(PathBuf),
    /// Not ours to remove.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// A path of a Unix socket has at most 107 bytes.
    #[error("the socket path {} has {} bytes; at most 107 are possible", .0.display(), .0.as_os_str().len())]
    PathTooLong(PathBuf),
    /// The kernel's refusal.
    #[error("cannot listen on {}: {source}", path.display())]
    System {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What sessions need of their controller.
pub(crate) struct Shared<D: Disk> {
    pub(crate) name: String,
    pub(crate) options: ControllerOptions,
    pub(crate) coalescing: Cell<Coalescing>,
    /// What ended sessions have left.
    pub(crate) closing: Closing,
    /// `None` once the disk is gone.
    disk: RefCell<Option<Arc<D>>>,
    /// The properties last seen.
    info: RefCell<DiskInfo>,
    owner: RefCell<Weak<RefCell<Inner<D>>>>,
}

impl<D: Disk> Shared<D> {
    pub(crate) fn disk(&self) -> Option<Arc<D>> {
        self.disk.borrow().clone()
    }

    pub(crate) fn info(&self) -> DiskInfo {
        if let Some(disk) = &*self.disk.borrow() {
            *self.info.borrow_mut() = disk.info();
        }
        self.info.borrow().clone()
    }

    pub(crate) fn place(&self) -> (usize, PlaceGuard) {
        (self.options.place)()
    }
}

struct Inner<D: Disk> {
    shared: Rc<Shared<D>>,
    listener: Option<Listener>,
    poller: Option<PollerId>,
    /// When accepting has failed.
    pause: AcceptPause,
    /// When a front end was turned away, or took another's place.
    turned_away: AcceptPause,
    /// By age.
    sessions: Vec<(u64, Rc<RefCell<Session<D>>>)>,
    closed: Vec<Then>,
}

/// A running controller. Clones are the same one. Call [`Controller::close`] before dropping the last.
pub struct Controller<D: Disk>(Rc<RefCell<Inner<D>>>);

impl<D: Disk> Clone for Controller<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct ListenPoller<D: Disk>(Rc<RefCell<Inner<D>>>);

impl<D: Disk> Poller for ListenPoller<D> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let accepted = self.0.borrow_mut().accept(cx);
        let Some(socket) = accepted else { return Polled::Idle };
        connected(cx, &self.0, socket);
        Polled::Busy
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.borrow().pause.until()
    }
}

impl<D: Disk> Inner<D> {
    /// The next connection; a pause, if there are no descriptors for it.
    fn accept(&mut self, cx: &mut Turn<'_>) -> Option<OwnedFd> {
        let listener = self.listener.as_mut()?;
        if self.pause.holds(cx.now) {
            return None;
        }
        listener.watch(cx, true);
        match listener.accept() {
            Ok(socket) => socket,
            Err(e) => {
                if self.pause.failed(cx.now) {
                    let path = listener.path.display();
                    tracing::error!(%path, "vhost: cannot accept front ends for now: {e}");
                }
                listener.watch(cx, false);
                None
            }
        }
    }

    /// The front end that loses least if it makes room for another one: one that has said nothing, the oldest; else one that
    /// has started no queue.
    fn most_idle(&self) -> Option<Rc<RefCell<Session<D>>>> {
        let idle = self.sessions.iter().filter_map(|(_, s)| Some((s.borrow().idleness()?, s)));
        idle.min_by_key(|(has_spoken, _)| *has_spoken).map(|(_, s)| s.clone())
    }
}

fn connected<D: Disk>(cx: &mut Turn<'_>, inner: &Rc<RefCell<Inner<D>>>, socket: OwnedFd) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut lease = inner.borrow().shared.options.descriptors.lease();
    // So many threads may close what others have left, if that takes them long.
    let is_full = |inner: &Inner<D>| inner.sessions.len().max(inner.shared.closing.count()) >= MAX_SESSIONS;
    if is_full(&inner.borrow()) || !lease.set(1) {
        let idle = inner.borrow().most_idle();
        if let Some(idle) = idle {
            let mut inner = inner.borrow_mut();
            if inner.turned_away.failed(cx.now) {
                let controller = &inner.shared.name;
                tracing::warn!(
                    controller,
                    "vhost: front ends come that find no room; idle ones make room for them"
                );
            }
            drop(inner);
            idle.borrow_mut().make_room(cx);
        }
    }
    let mut inner = inner.borrow_mut();
    let why = if is_full(&inner) {
        Some("as many are connected as there may be")
    } else if !lease.set(1) {
        Some("no descriptors are left of those that the limit of open files gives to vhost-user")
    } else {
        None
    };
    if let Some(why) = why {
        if inner.turned_away.failed(cx.now) {
            tracing::warn!(controller = inner.shared.name, "vhost: a front end is turned away: {why}");
        }
        return;
    }
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    match Session::start(cx, &inner.shared, id, socket, lease) {
        Ok(session) => inner.sessions.push((id, session)),
        Err(e) => tracing::warn!(controller = inner.shared.name, "vhost: cannot serve a front end: {e}"),
    }
}

/// A session has ended by itself.
pub(crate) fn session_ended<D: Disk>(cx: &mut Turn<'_>, shared: &Shared<D>, id: u64) {
    let Some(inner) = shared.owner.borrow().upgrade() else { return };
    let closed = {
        let mut inner = inner.borrow_mut();
        inner.sessions.retain(|(session, _)| *session != id);
        let over = inner.sessions.is_empty() && inner.listener.is_none();
        if over { std::mem::take(&mut inner.closed) } else { Vec::new() }
    };
    closed.into_iter().for_each(|done| done(cx));
}

impl<D: Disk> Controller<D> {
    /// Listens on `options.path` for front ends of `disk`.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn start(cx: &mut Turn<'_>, disk: Arc<D>, options: ControllerOptions) -> Result<Self, ListenError> {
        let mut listener = Listener::bind(&options.path)?;
        let info = RefCell::new(disk.info());
        let shared = Rc::new(Shared {
            name: options.name.clone(),
            options,
            coalescing: Cell::default(),
            closing: Closing::default(),
            disk: RefCell::new(Some(disk)),
            info,
            owner: RefCell::default(),
        });
        if !listener.watch(cx, true) {
            let source = std::io::Error::other("it cannot be waited for");
            return Err(ListenError::System { path: listener.path.clone(), source });
        }
        let inner = Rc::new(RefCell::new(Inner {
            shared: shared.clone(),
            listener: Some(listener),
            poller: None,
            pause: AcceptPause::default(),
            turned_away: AcceptPause::default(),
            sessions: Vec::new(),
            closed: Vec::new(),
        }));
        *shared.owner.borrow_mut() = Rc::downgrade(&inner);
        let poller = cx.add_poller("vhost_listener", Box::new(ListenPoller(inner.clone())));
        inner.borrow_mut().poller = Some(poller);
        Ok(Self(inner))
    }

    /// The front ends connected now.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.0.borrow().sessions.iter().map(|(_, s)| s.borrow().info()).collect()
    }

    /// The socket.
    pub fn path(&self) -> PathBuf {
        self.0.borrow().shared.options.path.clone()
    }

    /// Interrupt coalescing, from now on and of all queues.
    pub fn set_coalescing(&self, config: Coalescing) {
        let inner = self.0.borrow();
        inner.shared.coalescing.set(config);
        inner.sessions.iter().for_each(|(_, s)| s.borrow().set_coalescing(config));
    }

    /// As set.
    pub fn coalescing(&self) -> Coalescing {
        self.0.borrow().shared.coalescing.get()
    }

    /// The disk has changed its size: guests are told to look.
    pub fn config_changed(&self) {
        self.0.borrow().sessions.iter().for_each(|(_, s)| s.borrow().config_changed());
    }

    /// The disk goes away: requests fail from now on. `done` runs when nothing uses it any more.
    pub fn detach(&self, cx: &mut Turn<'_>, done: impl FnOnce(&mut Turn<'_>) + 'static) {
        let sessions: Vec<_> = {
            let inner = self.0.borrow();
            inner.shared.info();
            inner.shared.disk.borrow_mut().take();
            inner.sessions.iter().map(|(_, s)| s.clone()).collect()
        };
        // One more than there are, so that it cannot come to its end before the last was asked.
        let left = Rc::new(Cell::new(sessions.len() + 1));
        let done = Rc::new(Cell::new(Some(done)));
        let one = move |cx: &mut Turn<'_>| {
            left.set(left.get() - 1);
            if let Some(done) = done.take_if(left.get() == 0) {
                done(cx);
            }
        };
        for session in sessions {
            session.borrow_mut().detach(cx, Box::new(one.clone()));
        }
        one(cx);
    }

    /// Ends the controller: no front end can connect, requests in flight finish, connections are closed. `done` runs
    /// then.
    pub fn close(&self, cx: &mut Turn<'_>, done: impl FnOnce(&mut Turn<'_>) + 'static) {
        let sessions: Vec<_> = {
            let mut inner = self.0.borrow_mut();
            if let Some(mut listener) = inner.listener.take() {
                listener.watch(cx, false);
            }
            if let Some(poller) = inner.poller.take() {
                cx.remove_poller(poller);
            }
            if !inner.sessions.is_empty() {
                inner.closed.push(Box::new(done));
                inner.sessions.iter().map(|(_, s)| s.clone()).collect()
            } else {
                drop(inner);
                return done(cx);
            }
        };
        for session in sessions {
            session.borrow_mut().close(cx);
        }
    }
}

/// `Cell<Option<T>>` that is emptied on a condition.
trait TakeIf<T> {
    fn take_if(&self, condition: bool) -> Option<T>;
}

impl<T> TakeIf<T> for Rc<Cell<Option<T>>> {
    fn take_if(&self, condition: bool) -> Option<T> {
        if condition { self.take() } else { None }
    }
}

#[derive(Debug)]
struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// The reactor wakes for it.
    watched: bool,
}

impl Listener {
    fn bind(path: &Path) -> Result<Self, ListenError> {
        let system = |e: Errno| ListenError::System { path: path.to_owned(), source: e.into() };
        let address = SocketAddrUnix::new(path).map_err(|_| ListenError::PathTooLong(path.to_owned()))?;
        remove_stale(path, &address)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(system)?;
        // Linux gives the file the mode of the socket's inode, less the umask (`unix_bind` in net/unix/af_unix.c), so that
        // there is no moment in which others could connect; what the umask has taken away from us comes back below.
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&socket, mode).map_err(system)?;
        rustix::net::bind(&socket, &address).map_err(|e| match e {
            Errno::ADDRINUSE => ListenError::InUse(path.to_owned()),
            e => system(e),
        })?;
        // From here on the file is ours, and goes if the rest fails.
        let listener = Self { socket, path: path.to_owned(), watched: false };
        rustix::fs::chmodat(CWD, path, mode, AtFlags::empty()).map_err(system)?;
        rustix::net::listen(&listener.socket, BACKLOG).map_err(system)?;
        Ok(listener)
    }

    /// Whether the reactor wakes for it, from now on. False if that cannot be had.
    fn watch(&mut self, cx: &mut Turn<'_>, on: bool) -> bool {
        match (self.watched, on) {
            (false, true) => self.watched = cx.watch(self.socket.as_raw_fd()).is_ok(),
            (true, false) => {
                cx.unwatch(self.socket.as_raw_fd());
                self.watched = false;
            }
            _ => {}
        }
        self.watched == on
    }

    fn accept(&self) -> rustix::io::Result<Option<OwnedFd>> {
        match rustix::net::accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A socket on which nobody listens any more is removed, for it is what a killed process leaves behind.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ListenError::System { path: path.to_owned(), source }),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    let system = |source| ListenError::System { path: path.to_owned(), source };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| system(e.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(system),
        _ => Err(ListenError::InUse(path.to_owned())),
    }
}

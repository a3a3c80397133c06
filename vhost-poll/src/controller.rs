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

use iobuf::Registry;
use reactor::{Handle, Polled, Poller, PollerId, Turn};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::disk::{Disk, DiskInfo};
use crate::queue::Coalescing;
use crate::session::{PlaceGuard, Session, SessionInfo};

/// Front ends at once; more are turned away.
const MAX_SESSIONS: usize = 64;

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
        let accepted = self.0.borrow().listener.as_ref().and_then(Listener::accept);
        let Some(socket) = accepted else { return Polled::Idle };
        connected(cx, &self.0, socket);
        Polled::Busy
    }
}

fn connected<D: Disk>(cx: &mut Turn<'_>, inner: &Rc<RefCell<Inner<D>>>, socket: OwnedFd) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut inner = inner.borrow_mut();
    if inner.sessions.len() >= MAX_SESSIONS {
        tracing::warn!(
            controller = inner.shared.name,
            "vhost: front end turned away, {MAX_SESSIONS} are connected"
        );
        return;
    }
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    match Session::start(cx, &inner.shared, id, socket) {
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
        let listener = Listener::bind(&options.path)?;
        let info = RefCell::new(disk.info());
        let shared = Rc::new(Shared {
            name: options.name.clone(),
            options,
            coalescing: Cell::default(),
            disk: RefCell::new(Some(disk)),
            info,
            owner: RefCell::default(),
        });
        let fd = listener.socket.as_raw_fd();
        let path = listener.path.clone();
        cx.watch(fd).map_err(|e| ListenError::System { path, source: e.into() })?;
        let inner = Rc::new(RefCell::new(Inner {
            shared: shared.clone(),
            listener: Some(listener),
            poller: None,
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
            if let Some(listener) = inner.listener.take() {
                cx.unwatch(listener.socket.as_raw_fd());
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
}

impl Listener {
    fn bind(path: &Path) -> Result<Self, ListenError> {
        let system = |e: Errno| ListenError::System { path: path.to_owned(), source: e.into() };
        let address = SocketAddrUnix::new(path).map_err(|_| ListenError::PathTooLong(path.to_owned()))?;
        remove_stale(path, &address)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(system)?;
        rustix::net::bind(&socket, &address).map_err(|e| match e {
            Errno::ADDRINUSE => ListenError::InUse(path.to_owned()),
            e => system(e),
        })?;
        rustix::net::listen(&socket, 16).map_err(system)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    fn accept(&self) -> Option<OwnedFd> {
        match rustix::net::accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => Some(socket),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => None,
            Err(e) => {
                tracing::warn!(path = %self.path.display(), "vhost: accept: {e}");
                None
            }
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

//! The socket server: polled, never blocking.
//!
//! The server owns an epoll instance with the listener, an eventfd and the connections. That epoll instance is itself
//! a file descriptor that becomes readable when there is work ([`Server::as_fd`]), so a loop that sleeps needs to know
//! only this one; a loop that does not sleep just calls [`Server::poll`].

use crate::conn::{Connection, ReplyTo};
use crate::listener::{ListenError, Listener};
use crate::responder::{Outcome, Responder};
use crate::table::MethodTable;
use crate::wire::{Message, Refusal, Request};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::time::Timespec;
use serde_json::Value;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use reactor::AcceptPause;

/// The most connections at a time; further ones wait in the listen queue (SPDK `SPDK_JSONRPC_MAX_CONNS`).
pub const MAX_CONNECTIONS: usize = 64;

/// The most messages of one connection that one [`Server::poll`] starts.
const MESSAGES_PER_POLL: usize = 64;

const LISTENER: u64 = u64::MAX;
const WAKER: u64 = u64::MAX - 1;

/// Wakes the server from any thread.
struct Waker {
    fd: OwnedFd,
    /// Whether `fd` is readable already, to save the system call.
    raised: AtomicBool,
}

impl Waker {
    fn wake(&self) {
        if !self.raised.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, and then the descriptor is readable anyway.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    fn clear(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        self.raised.store(false, Ordering::Release);
    }
}

type Answer = (ReplyTo, Outcome);

/// A JSON-RPC server on a Unix socket, for handlers that work on a `C`.
///
/// Dropping it closes all connections and removes the socket and its lock file; replies that come later go nowhere.
pub struct Server<C> {
    table: Arc<MethodTable<C>>,
    listener: Listener,
    epoll: OwnedFd,
    waker: Arc<Waker>,
    outbox: mpsc::Sender<Answer>,
    answers: mpsc::Receiver<Answer>,
    connections: Vec<Option<Connection>>,
    next_generation: u64,
    /// Whether epoll watches the listener; not while all slots are taken, or in a pause.
    accepting: bool,
    /// When there was no descriptor for a connection, not even to refuse it.
    pause: AcceptPause,
    /// When a connection was refused.
    refusals: AcceptPause,
    /// A descriptor to give up when there are no others, so that a connection can be refused instead of waiting for
    /// ever in the queue and keeping `epoll` readable.
    reserve: Option<OwnedFd>,
    scratch: Vec<u8>,
}

impl<C: 'static> Server<C> {
    /// Listens on `path` with mode 0600 and the lock file `<path>.lock`.
    ///
    /// # Errors
    /// [`ListenError::InUse`] if another instance runs; a stale socket of one that does not is replaced.
    pub fn listen(path: &Path, table: Arc<MethodTable<C>>) -> Result<Self, ListenError> {
        let listener = Listener::bind(path)?;
        let system = |what: &'static str| {
            let path = path.to_owned();
            move |errno: Errno| ListenError::System { what, path, source: errno.into() }
        };
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(system("create epoll for"))?;
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(system("create eventfd for"))?;
        let add = |fd: BorrowedFd<'_>, data| epoll::add(&epoll, fd, EventData::new_u64(data), EventFlags::IN);
        add(listener.as_fd(), LISTENER).and_then(|()| add(fd.as_fd(), WAKER)).map_err(system("watch"))?;
        let (outbox, answers) = mpsc::channel();
        Ok(Self {
            table,
            listener,
            epoll,
            waker: Arc::new(Waker { fd, raised: AtomicBool::new(false) }),
            outbox,
            answers,
            connections: (0..MAX_CONNECTIONS).map(|_| None).collect(),
            next_generation: 0,
            accepting: true,
            pause: AcceptPause::default(),
            refusals: AcceptPause::default(),
            reserve: open_reserve(),
            scratch: vec![0; 64 << 10],
        })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// The methods.
    pub fn table(&self) -> &Arc<MethodTable<C>> {
        &self.table
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.connections.iter().flatten().count()
    }

    /// Does what can be done now: accepts, receives, calls handlers with `cx`, sends. Never blocks, and starts at most
    /// 64 messages per connection. Returns whether there was anything to do; if not, and once [`Server::as_fd`]
    /// becomes readable, there is again.
    ///
    /// Requests of a connection are started in their order, without waiting for deferred replies of earlier ones, in
    /// batches as well; replies are sent in the order of completion, those of a batch together.
    pub fn poll(&mut self, cx: &mut C) -> bool {
        if !self.accepting {
            self.update_accepting();
        }
        let mut events = [const { MaybeUninit::uninit() }; MAX_CONNECTIONS + 2];
        // Fails with EINTR only, and the next call will see the same events.
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, Some(&Timespec::default())) else {
            return false;
        };
        let busy = !events.is_empty();
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                WAKER => self.waker.clear(),
                slot => self.note_hang_up(slot, event.flags),
            }
        }
        if busy {
            self.take_answers();
            for slot in 0..self.connections.len() {
                self.serve(slot, cx);
            }
            for slot in 0..self.connections.len() {
                self.finish_turn(slot);
            }
            self.update_accepting();
        }
        busy
    }

    /// When there is something to do though [`Server::as_fd`] is quiet.
    pub fn deadline(&self) -> Option<Instant> {
        self.pause.until()
    }

    fn accept(&mut self) {
        if self.pause.holds(Instant::now()) {
            return;
        }
        while let Some(slot) = self.connections.iter().position(Option::is_none) {
            match self.listener.accept() {
                Ok(Some(fd)) => self.add_connection(slot, fd),
                Ok(None) => return,
                Err(errno) => return self.refuse_connection(errno),
            }
        }
    }

    fn add_connection(&mut self, slot: usize, fd: OwnedFd) {
        if let Err(error) = epoll::add(&self.epoll, &fd, EventData::new_u64(slot as u64), EventFlags::IN) {
            tracing::warn!(%error, "cannot watch a new RPC connection; it is closed");
            return;
        }
        self.connections[slot] = Some(Connection::new(fd, self.next_generation));
        self.next_generation += 1;
    }

    /// No descriptors are left (or worse): closes the connection, which the peer notices at once; or, if not even that is
    /// possible, waits.
    fn refuse_connection(&mut self, errno: Errno) {
        let now = Instant::now();
        if self.refusals.failed(now) {
            tracing::warn!(error = %errno, "cannot accept an RPC connection; it is refused");
        }
        drop(self.reserve.take());
        if self.listener.accept().is_err() {
            self.pause.failed(now);
        }
        self.reserve = open_reserve();
    }

    /// A peer that has closed both directions reads nothing any more. What it sent before is executed all the same.
    fn note_hang_up(&mut self, slot: u64, flags: EventFlags) {
        let connection = usize::try_from(slot).ok().and_then(|slot| self.connections.get_mut(slot)?.as_mut());
        if let Some(connection) = connection
            && flags.intersects(EventFlags::HUP | EventFlags::ERR)
        {
            connection.hung_up();
        }
    }

    /// Receives, decodes and starts requests of one connection, as far as budget and flow control allow.
    fn serve(&mut self, slot: usize, cx: &mut C) {
        for _ in 0..MESSAGES_PER_POLL {
            let Some(connection) = &mut self.connections[slot] else { return };
            connection.flush();
            if !connection.may_start() {
                connection.held_back = true;
                return;
            }
            match connection.decoder.next_message() {
                Some(Ok(message)) => {
                    self.start(slot, message, cx);
                    self.take_answers();
                }
                Some(Err(error)) => return connection.parse_error(error),
                None if connection.receive(&mut self.scratch) => {}
                None => return,
            }
        }
        // More may be waiting in the decoder, where epoll does not see it.
        self.waker.wake();
    }

    fn start(&mut self, slot: usize, message: Message, cx: &mut C) {
        let Some(connection) = &mut self.connections[slot] else { return };
        let generation = connection.generation;
        connection.started(message.requests());
        match message {
            Message::Single(request) => {
                self.start_one(ReplyTo { slot, generation, batch: None, id: Value::Null }, request, cx);
            }
            Message::Batch(requests) => {
                let batch = connection.open_batch(requests.len());
                for (position, request) in requests.into_iter().enumerate() {
                    let to = ReplyTo { slot, generation, batch: Some((batch, position)), id: Value::Null };
                    self.start_one(to, request, cx);
                }
            }
        }
    }

    fn start_one(&self, to: ReplyTo, request: Result<Request, Refusal>, cx: &mut C) {
        let outbox = self.outbox.clone();
        let waker = Arc::clone(&self.waker);
        // Fails only when the server is gone, and then nobody waits.
        let answer = move |to, outcome| {
            if outbox.send((to, outcome)).is_ok() {
                waker.wake();
            }
        };
        match request {
            Ok(Request { method, params, id }) => {
                let to = ReplyTo { id, ..to };
                let responder = Responder::new(&method, move |outcome| answer(to, outcome));
                self.table.call_remote(cx, &method, params.as_ref(), responder);
            }
            Err(Refusal { id, error }) => answer(ReplyTo { id, ..to }, Err(error)),
        }
    }

    /// Gives the answers to their connections, if those still exist.
    fn take_answers(&mut self) {
        while let Ok((to, outcome)) = self.answers.try_recv() {
            if let Some(connection) = &mut self.connections[to.slot]
                && connection.generation == to.generation
            {
                connection.finished(to.batch, &to.id, outcome);
            }
        }
    }

    /// Sends, removes the connection if it is over, or tells epoll what it waits for.
    fn finish_turn(&mut self, slot: usize) {
        let Some(connection) = &mut self.connections[slot] else { return };
        connection.flush();
        if connection.is_over() {
            connection.discard_input(&mut self.scratch);
            self.connections[slot] = None;
            return;
        }
        if connection.held_back && connection.may_start() {
            connection.held_back = false;
            self.waker.wake();
        }
        let wants = connection.wants();
        if wants == connection.watched {
            return;
        }
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, wants.0);
        flags.set(EventFlags::OUT, wants.1);
        match epoll::modify(&self.epoll, &connection.fd, EventData::new_u64(slot as u64), flags) {
            Ok(()) => connection.watched = wants,
            Err(error) => {
                tracing::warn!(%error, "cannot watch an RPC connection; it is closed");
                self.connections[slot] = None;
            }
        }
    }

    fn update_accepting(&mut self) {
        let accepting = !self.pause.holds(Instant::now()) && self.connections.iter().any(Option::is_none);
        if accepting == self.accepting {
            return;
        }
        let flags = if accepting { EventFlags::IN } else { EventFlags::empty() };
        if epoll::modify(&self.epoll, &self.listener, EventData::new_u64(LISTENER), flags).is_ok() {
            self.accepting = accepting;
        }
    }

    /// Whether any reply waits to be sent: a program that ends may poll until there is none.
    pub fn has_unsent_replies(&self) -> bool {
        self.connections.iter().flatten().any(|connection| connection.wants().1)
    }
}

/// Readable when [`Server::poll`] has something to do.
impl<C> AsFd for Server<C> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn open_reserve() -> Option<OwnedFd> {
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}

//! A server and a client in this process, each with a control thread and reactors, on a loopback fabric.

// Each test program uses its part of this.
#![allow(dead_code)]

pub mod cms;
pub mod disk;
pub mod load;
pub mod probe;
pub mod rogue;

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::Duration;

use iobuf::Registry;
use reactor::{Handle, IdlePolicy, Reactor, Turn};
use rtrs_poll::client::{
    Client, Event, Lane, PathError, PathId, PathInfo, PathSpec, Reconnect, Session, SessionEnd, SessionId,
    SessionInfo, SessionKey, SessionOptions,
};
use rtrs_poll::{Options, Server, SessionEvents};
use rtrs_proto::Errno;
use rtrs_proto::heartbeat;
use rtrs_proto::limits::Geometry;
pub use test_support::until as wait_for;
use test_support::{limit, patience, recv};
use verbs::loopback::Fabric;

use disk::Disk;
use probe::{Memory, Probe, Seen};

pub const MAX_IO: u32 = 61440;
pub const DEPTH: u16 = 24;

/// A reactor on a thread of its own, stopped and joined on drop.
pub struct Thread {
    pub handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Thread {
    pub fn start(name: &str) -> Self {
        let name = name.to_owned();
        let (tx, rx) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let idle = IdlePolicy::Adaptive { spin: Duration::from_micros(20) };
            let reactor = Reactor::new(&name, None, idle).expect("descriptors are there");
            tx.send(reactor.handle()).expect("the test waits for it");
            reactor.run();
        });
        Self { handle: rx.recv().expect("the reactor starts"), thread: Some(thread) }
    }

    /// Runs `f` there and returns its result.
    pub fn call<R: Send + 'static>(&self, f: impl FnOnce(&mut Turn<'_>) -> R + Send + 'static) -> R {
        let (tx, rx) = mpsc::channel();
        self.handle.send(move |cx| tx.send(f(cx)).expect("the test waits for it"));
        recv(&rx)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.handle.stop();
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended
            && !std::thread::panicking()
        {
            panic!("a reactor panicked");
        }
    }
}

struct Quiet;
impl SessionEvents for Quiet {
    fn session_up(&mut self, _: &mut Turn<'_>, _: &Arc<rtrs_poll::Session>) {}
    fn session_down(&mut self, _: &mut Turn<'_>, _: &Arc<rtrs_poll::Session>) {}
}

/// How the server finds its state in a message.
struct ServerLocal(Rc<RefCell<Server<Disk>>>);

pub struct TestServer {
    control: Thread,
    reactors: Vec<Thread>,
}

pub fn server_options(rotate_rkeys: bool) -> Options {
    let geometry = Geometry::new(DEPTH, MAX_IO, 4096).expect("valid");
    Options { geometry, rotate_rkeys, ..Options::default() }
}

/// Address pair of the `n`th path: ours and the server's.
pub fn ends(n: u8) -> (IpAddr, SocketAddr) {
    (IpAddr::from([10, 0, n, 2]), SocketAddr::from(([10, 0, n, 1], 1234)))
}

pub fn path(n: u8) -> PathSpec {
    let (src, dst) = ends(n);
    PathSpec::new("loopback", dst).from(src)
}

/// So many ports are cut: those that the loopback provider gives out first.
const PORTS: std::ops::Range<u16> = 49152..49152 + 800;

/// Packets of the `n`th path vanish from now on.
pub fn cut(fabric: &Fabric, n: u8) {
    let (src, dst) = ends(n);
    PORTS.for_each(|port| fabric.cut(SocketAddr::new(src, port), dst));
}

pub fn restore(fabric: &Fabric, n: u8) {
    let (src, dst) = ends(n);
    PORTS.for_each(|port| fabric.restore(SocketAddr::new(src, port), dst));
}

/// Breaks one queue pair of the `n`th path on the client's side.
pub fn break_qp(fabric: &Fabric, n: u8) -> bool {
    let (src, dst) = ends(n);
    PORTS.rev().any(|port| fabric.break_qp(SocketAddr::new(src, port), dst))
}

impl TestServer {
    /// Listens on the server's ends of the first four paths.
    pub fn start(fabric: &Fabric, options: Options) -> Self {
        Self::with_store(fabric, options, disk::Store::new())
    }

    /// With contents that outlive it.
    pub fn with_store(fabric: &Fabric, options: Options, disk: disk::Store) -> Self {
        Self::listening(fabric, options, disk, 0..4)
    }

    /// On the server's ends of `paths`.
    pub fn listening(
        fabric: &Fabric,
        options: Options,
        disk: disk::Store,
        paths: std::ops::Range<u8>,
    ) -> Self {
        let control = Thread::start("srv-control");
        let reactors = vec![Thread::start("srv-0"), Thread::start("srv-1")];
        let handles: Vec<Handle> = reactors.iter().map(|r| r.handle.clone()).collect();
        let cm = fabric.cm();
        control.call(move |cx| {
            let server = Server::install(
                cx,
                options,
                Arc::new(Registry::default()),
                &handles,
                move |_| Disk::new(disk.clone()),
                Rc::new(RefCell::new(Quiet)),
            );
            server.borrow_mut().add_cm(cx, cm).expect("watchable");
            for n in paths {
                server.borrow_mut().listen(ends(n).1, "loopback", None).expect("free");
            }
            cx.set_local(Rc::new(ServerLocal(server)));
        });
        Self { control, reactors }
    }

    /// Runs `f` on the server.
    pub fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Server<Disk>, &mut Turn<'_>) -> R + Send + 'static,
    ) -> R {
        self.control.call(move |cx| {
            let local = cx.local::<ServerLocal>().expect("set at start");
            f(&mut local.0.borrow_mut(), cx)
        })
    }

    pub fn sessions(&self) -> usize {
        self.with(|s, cx| s.sessions(cx.now).len())
    }

    /// Requests that the server holds unanswered.
    pub fn held(&self) -> usize {
        (0..self.reactors.len()).map(|n| self.on_disk(n, |disk, _| disk.held.len())).sum()
    }

    /// Answers them.
    pub fn release(&self) {
        (0..self.reactors.len()).for_each(|n| self.on_disk(n, Disk::release));
    }

    fn on_disk<R: Send + 'static>(
        &self,
        n: usize,
        f: impl FnOnce(&mut Disk, &mut rtrs_poll::Io) -> R + Send + 'static,
    ) -> R {
        let (tx, rx) = mpsc::channel();
        rtrs_poll::Lane::<Disk>::with_upper(&self.reactors[n].handle, move |_, disk, io| {
            tx.send(f(disk, io)).expect("the test waits for it");
        });
        recv(&rx)
    }
}

/// How the client finds its state in a message.
struct ClientLocal(Rc<RefCell<Client<Probe>>>);

pub struct TestClient {
    pub control: Thread,
    pub reactors: Vec<Thread>,
    pub registry: Arc<Registry>,
    pub heard: Receiver<Event>,
    pub seen: Receiver<(usize, Seen)>,
}

/// A connected session with memory for data.
pub struct Connected {
    pub id: SessionId,
    /// The first one.
    pub path: PathId,
    pub session: Arc<Session>,
    pub memory: Memory,
    /// By reactor.
    pub keys: Vec<(usize, SessionKey)>,
}

/// A session over the first `paths` paths that reconnects quickly.
pub fn session_options(paths: u8) -> SessionOptions {
    let mut o = SessionOptions::new("test", (0..paths).map(path).collect());
    o.connect_timeout = patience();
    o.name_timeout = Duration::ZERO;
    o.reconnect = Reconnect { delay: Duration::from_millis(20), max_attempts: None };
    o
}

/// One path that is not tried again.
pub fn once() -> SessionOptions {
    let mut o = session_options(1);
    o.reconnect.max_attempts = Some(0);
    o
}

/// A peer is given up after 5 to 6 s: soon enough to wait for, and later than one that is only slow answers.
pub fn short_heartbeat() -> heartbeat::Config {
    heartbeat::Config { interval_ns: limit(1).as_nanos() as u64, missed_max: 4 }
}

/// None within the time of a test.
pub fn no_heartbeat() -> heartbeat::Config {
    heartbeat::Config { interval_ns: (10 * patience()).as_nanos() as u64, missed_max: 3 }
}

impl TestClient {
    pub fn start(fabric: &Fabric, reactors: usize) -> Self {
        Self::with_cms(vec![fabric.cm()], reactors)
    }

    pub fn with_cms(cms: Vec<Box<dyn verbs::Cm>>, reactors: usize) -> Self {
        let control = Thread::start("clt-control");
        let reactors: Vec<Thread> = (0..reactors).map(|n| Thread::start(&format!("clt-{n}"))).collect();
        let handles: Vec<Handle> = reactors.iter().map(|r| r.handle.clone()).collect();
        let (seen_tx, seen) = mpsc::channel();
        let (heard_tx, heard) = mpsc::channel();
        let registry = Registry::new();
        let memory = registry.clone();
        control.call(move |cx| {
            let client = Client::install(
                cx,
                &handles,
                memory,
                move |cx| {
                    let number = cx.handle().name().rsplit('-').next().and_then(|n| n.parse().ok());
                    Probe::new(number.expect("reactors are named so"), seen_tx.clone())
                },
                move |_, event| {
                    let _ = heard_tx.send(event);
                },
            );
            for cm in cms {
                client.borrow_mut().add_cm(cx, cm).expect("watchable");
            }
            cx.set_local(Rc::new(ClientLocal(client)));
        });
        Self { control, reactors, registry, heard, seen }
    }

    /// Runs `f` on the client.
    pub fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Client<Probe>, &mut Turn<'_>) -> R + Send + 'static,
    ) -> R {
        self.control.call(move |cx| {
            let local = cx.local::<ClientLocal>().expect("set at start");
            f(&mut local.0.borrow_mut(), cx)
        })
    }

    pub fn create(&self, options: SessionOptions) -> SessionId {
        self.with(move |c, cx| c.create_session(cx, options)).expect("good options")
    }

    /// Connects over the first path and waits until every reactor has heard of it.
    pub fn connect(&self, options: SessionOptions) -> Connected {
        let memory = Memory::new(&self.registry);
        let id = self.create(options);
        self.wait_up(id, memory)
    }

    pub fn wait_up(&self, id: SessionId, memory: Memory) -> Connected {
        let session = self.await_event(|e| match e {
            Event::SessionUp { session, .. } => Some(session.clone()),
            Event::SessionEnded { why, .. } => panic!("a session should come up; it ended: {why}"),
            _ => None,
        });
        assert_eq!(session.id, id);
        let path = self.info(id).paths[0].id;
        let mut keys = Vec::new();
        while keys.len() < session.reactors.len() {
            match self.next_seen() {
                (reactor, Seen::Up(key)) => keys.push((reactor, key)),
                (_, other) => panic!("a session should come up, not {other:?}"),
            }
        }
        Connected { id, path, session, memory, keys }
    }

    /// The next thing heard on the control thread.
    pub fn event(&self) -> Event {
        recv(&self.heard)
    }

    /// Skips events until `f` finds what it wants.
    pub fn await_event<R>(&self, mut f: impl FnMut(&Event) -> Option<R>) -> R {
        loop {
            if let Some(found) = f(&self.event()) {
                return found;
            }
        }
    }

    /// Why a path ended next, and whether it will be tried again.
    pub fn path_down(&self) -> (PathId, PathError, Option<Duration>) {
        self.await_event(|e| match e {
            Event::PathDown { path, why, next_attempt, .. } => Some((*path, why.clone(), *next_attempt)),
            _ => None,
        })
    }

    pub fn path_up(&self) -> PathId {
        self.await_event(|e| if let Event::PathUp { path, .. } = e { Some(*path) } else { None })
    }

    pub fn session_end(&self) -> SessionEnd {
        self.await_event(|e| if let Event::SessionEnded { why, .. } = e { Some(why.clone()) } else { None })
    }

    /// Connects, and returns why that failed.
    pub fn connect_fails(&self, options: SessionOptions) -> (String, Errno) {
        let id = self.create(options);
        let (_, why, _) = self.path_down();
        self.close(id);
        (why.to_string(), why.errno())
    }

    /// Ends a session and waits until it is gone.
    pub fn close(&self, id: SessionId) {
        self.with(move |c, cx| c.close_session(cx, id)).expect("it is there");
        assert_eq!(self.session_end(), SessionEnd::Closed);
    }

    pub fn info(&self, id: SessionId) -> SessionInfo {
        self.with(move |c, cx| c.session(cx.now, id)).expect("it is there")
    }

    pub fn path_info(&self, id: SessionId, path: PathId) -> PathInfo {
        self.info(id).paths.into_iter().find(|p| p.id == path).expect("it is there")
    }

    pub fn next_seen(&self) -> (usize, Seen) {
        recv(&self.seen)
    }

    /// The next completion; anything else fails the test.
    pub fn completion(&self) -> (u64, Result<(), Errno>) {
        match self.next_seen().1 {
            Seen::Completed(cookie, result) => (cookie, result),
            other => panic!("a completion is due, not {other:?}"),
        }
    }

    /// Runs `f` with the probe and its lane on reactor `n`.
    pub fn on_lane<R: Send + 'static>(
        &self,
        n: usize,
        f: impl FnOnce(&mut Probe, &mut rtrs_poll::client::Io) -> R + Send + 'static,
    ) -> R {
        let (tx, rx) = mpsc::channel();
        Lane::<Probe>::with_upper(&self.reactors[n].handle, move |_, probe, io| {
            tx.send(f(probe, io)).expect("the test waits for it");
        });
        recv(&rx)
    }

    /// Starts a load of `slots` on each reactor of a session.
    pub fn start_load(&self, c: &Connected, slots: usize) {
        for (i, (reactor, key)) in c.keys.iter().enumerate() {
            let (key, memory, first) = (*key, Memory::new(&self.registry), (i * slots) as u64);
            self.on_lane(*reactor, move |probe, _| {
                probe.load = Some(load::Load::new(key, memory, first, slots))
            });
        }
    }

    /// What the loads of a session have done so far.
    pub fn load_counts(&self, c: &Connected) -> load::Counts {
        let mut sum = load::Counts::default();
        for (reactor, _) in &c.keys {
            let counts = self.on_lane(*reactor, |probe, _| probe.load.as_ref().expect("it runs").counts);
            sum.verified += counts.verified;
            sum.aborted += counts.aborted;
            sum.running += counts.running;
        }
        sum
    }

    /// Waits until the loads have verified `more` blocks from now on.
    pub fn verify_more(&self, c: &Connected, more: u64) {
        let enough = self.load_counts(c).verified + more;
        wait_for("the load to go on", || self.load_counts(c).verified >= enough);
    }

    /// Ends the loads and returns what they have done.
    pub fn stop_load(&self, c: &Connected) -> load::Counts {
        for (reactor, _) in &c.keys {
            self.on_lane(*reactor, |probe, _| probe.load.as_mut().expect("it runs").stop());
        }
        wait_for("the load to end", || self.load_counts(c).running == 0);
        self.load_counts(c)
    }
}

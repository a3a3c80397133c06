//! NBD servers in this process that speak every dialect, in their own words, and misbehave when they are told to; and
//! bdev_nbd on a control thread and reactors of its own.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bdev::Manager;
use engine::placement::Placement;
use iobuf::Registry;
use nbd_proto::client::Server as Place;
use reactor::{Handle, IdlePolicy, Reactor, Team};
use rnbd_initiator::bdev::nbd::{DriveInfo, Drives, NbdError, NbdParams, Timeouts};

use crate::world::until;

/// What a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Y1997,
    Oldstyle,
    /// EXPORT_NAME only.
    Newstyle,
    Simple,
    Structured,
    Extended,
}

/// How a server misbehaves; changed while it runs.
#[derive(Debug, Default)]
pub struct Mood {
    /// Cut a connection after so many requests, 0: never.
    pub cut_after: AtomicU64,
    /// With the cut, what has arrived is executed and not answered; otherwise it is left in the socket.
    pub execute_before_cut: AtomicBool,
    /// Cut by a reset.
    pub reset: AtomicBool,
    /// So many milliseconds after the cut the request is executed: something in between has cut, and the server reads
    /// on.
    pub late_ms: AtomicU64,
    /// How late that was at most, as the machine let it be.
    pub latest_ms: AtomicU64,
    /// One connection stands still: it reads nothing more.
    pub stall: Stall,
    /// Answers in another order than that of the requests.
    pub reorder: AtomicBool,
    /// Error for everything, once.
    pub error: AtomicU64,
    /// New connections are closed at once.
    pub closed: AtomicBool,
}

/// A connection that stands still, until it is told to go on.
#[derive(Debug, Default)]
pub struct Stall(AtomicU64);

impl Stall {
    const WANTED: u64 = 1;
    const STANDS: u64 = 2;

    /// The connection that gets its next request first, or is between two of them, shall stand still.
    pub fn begin(&self) {
        assert_eq!(self.0.swap(Self::WANTED, Ordering::Relaxed), 0, "one stall at a time");
    }

    /// A connection stands still.
    pub fn stands(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::STANDS
    }

    pub fn end(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Where a connection stands, if it is to.
    fn here(&self) {
        let wanted =
            self.0.compare_exchange(Self::WANTED, Self::STANDS, Ordering::Relaxed, Ordering::Relaxed);
        while wanted.is_ok() && self.stands() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// One server with a disk in memory.
pub struct Server {
    pub address: SocketAddr,
    pub mood: Arc<Mood>,
    pub disk: Arc<Mutex<Vec<u8>>>,
    /// Transmission flags.
    pub flags: Arc<AtomicU64>,
    pub connections: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN.
pub const FLAGS: u64 = 0x16d;

impl Server {
    pub fn start(speaks: Speaks, size: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (mood, stop) = (Arc::<Mood>::default(), Arc::<AtomicBool>::default());
        let disk = Arc::new(Mutex::new(vec![0; size]));
        let flags = Arc::new(AtomicU64::new(FLAGS));
        let connections = Arc::<AtomicU64>::default();
        let (m, s, d, f, c) = (mood.clone(), stop.clone(), disk.clone(), flags.clone(), connections.clone());
        let thread = std::thread::spawn(move || {
            for socket in listener.incoming() {
                let Ok(socket) = socket else { continue };
                if s.load(Ordering::Acquire) {
                    return;
                }
                if m.closed.load(Ordering::Relaxed) {
                    continue;
                }
                socket.set_nodelay(true).unwrap();
                c.fetch_add(1, Ordering::Relaxed);
                let mut connection = Connection {
                    socket,
                    speaks,
                    mood: m.clone(),
                    disk: d.clone(),
                    flags: f.clone(),
                    count: 0,
                };
                std::thread::spawn(move || {
                    // How a connection ends is the client's to say.
                    let _ = connection.serve();
                });
            }
        });
        Self { address, mood, disk, flags, connections, stop, thread: Some(thread) }
    }

    pub fn place(&self) -> Place {
        Place::Tcp { host: self.address.ip().to_string(), port: self.address.port() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Connection {
    socket: TcpStream,
    speaks: Speaks,
    mood: Arc<Mood>,
    disk: Arc<Mutex<Vec<u8>>>,
    flags: Arc<AtomicU64>,
    count: u64,
}

struct Request {
    command: u16,
    cookie: [u8; 8],
    offset: u64,
    len: usize,
    data: Vec<u8>,
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

impl Connection {
    fn read(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn serve(&mut self) -> io::Result<()> {
        self.greet()?;
        let mut held: VecDeque<Vec<u8>> = VecDeque::new();
        loop {
            self.mood.stall.here();
            let request = match self.request() {
                Ok(request) => request,
                Err(e) => {
                    // As a server that finishes what it has before it closes.
                    held.iter().for_each(|answer| drop(self.socket.write_all(answer)));
                    return Err(e);
                }
            };
            if request.command == 2 {
                return Ok(());
            }
            self.count += 1;
            let limit = self.mood.cut_after.load(Ordering::Relaxed);
            let cut = limit > 0 && self.count > limit;
            if cut && !self.mood.execute_before_cut.load(Ordering::Relaxed) {
                return self.cut();
            }
            let late = self.mood.late_ms.load(Ordering::Relaxed);
            if cut && late > 0 {
                let cut = Instant::now();
                self.cut()?;
                std::thread::sleep(Duration::from_millis(late));
                self.execute(&request);
                self.mood.latest_ms.fetch_max(cut.elapsed().as_millis() as u64, Ordering::Relaxed);
                return Ok(());
            }
            let answer = self.execute(&request);
            if cut {
                return self.cut();
            }
            held.push_back(answer);
            // One answer is held back while there is more to read, so that the next one overtakes it.
            let more = self.mood.reorder.load(Ordering::Relaxed) && self.has_input() && held.len() < 4;
            while !more && let Some(answer) = held.pop_back() {
                self.socket.write_all(&answer)?;
            }
        }
    }

    fn has_input(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let any = self.socket.peek(&mut [0]).is_ok_and(|n| n > 0);
        self.socket.set_nonblocking(false).unwrap();
        any
    }

    fn cut(&mut self) -> io::Result<()> {
        if self.mood.reset.load(Ordering::Relaxed) {
            let linger = Some(Duration::ZERO);
            rustix::net::sockopt::set_socket_linger(&self.socket, linger)?;
        } else {
            self.socket.shutdown(Shutdown::Both)?;
        }
        Ok(())
    }

    fn greet(&mut self) -> io::Result<()> {
        let (size, flags) =
            (self.disk.lock().unwrap().len() as u64, self.flags.load(Ordering::Relaxed) as u16);
        let export = [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
        match self.speaks {
            Speaks::Y1997 => return Ok(()),
            Speaks::Oldstyle => {
                let head =
                    [b"NBDMAGIC".as_slice(), &0x0000_4202_8186_1253_u64.to_be_bytes(), &size.to_be_bytes()];
                self.socket.write_all(&head.concat())?;
                self.socket.write_all(&[&[0, 0], &flags.to_be_bytes()[..], &[0; 124]].concat())?;
                return Ok(());
            }
            Speaks::Newstyle => self.socket.write_all(b"NBDMAGICIHAVEOPT\0\0")?,
            _ => self.socket.write_all(b"NBDMAGICIHAVEOPT\0\x03")?,
        }
        self.read(4)?;
        loop {
            let head = self.read(16)?;
            let (option, len) = (u32::from_be_bytes(take(&head, 8)), u32::from_be_bytes(take(&head, 12)));
            self.read(len as usize)?;
            let reply = |kind: u32, data: &[u8]| {
                let head =
                    [0x0003_e889_0455_65a9_u64.to_be_bytes().as_slice(), &option.to_be_bytes()].concat();
                [&head[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
            };
            let has = |wanted| self.speaks == wanted;
            let answer = match option {
                1 => {
                    let zeroes = if self.speaks == Speaks::Newstyle { vec![0; 124] } else { Vec::new() };
                    self.socket.write_all(&[export, zeroes].concat())?;
                    return Ok(());
                }
                8 if has(Speaks::Structured) => reply(1, &[]),
                11 if has(Speaks::Extended) => reply(1, &[]),
                7 => {
                    let info = reply(3, &[&[0, 0], &export[..]].concat());
                    self.socket.write_all(&[info, reply(1, &[])].concat())?;
                    return Ok(());
                }
                _ => reply(0x8000_0001, b"not here"),
            };
            self.socket.write_all(&answer)?;
        }
    }

    fn request(&mut self) -> io::Result<Request> {
        let (command, cookie, offset, len) = match self.speaks {
            Speaks::Y1997 => {
                let h = self.read(24)?;
                assert_eq!(h[..4], 0x1256_0953_u32.to_be_bytes());
                let offset = u32::from_be_bytes(take(&h, 4));
                let kind = u32::from_be_bytes(take(&h, 20));
                (kind as u16, take(&h, 12), u64::from(offset), u32::from_be_bytes(take(&h, 8)) as usize)
            }
            Speaks::Extended => {
                let h = self.read(32)?;
                assert_eq!(h[..4], 0x21e4_1c71_u32.to_be_bytes());
                let (flags, command) = (u16::from_be_bytes(take(&h, 4)), u16::from_be_bytes(take(&h, 6)));
                assert_eq!(flags & 32 != 0, command == 1, "a payload length goes with a WRITE");
                let len = u64::from_be_bytes(take(&h, 24)) as usize;
                (command, take(&h, 8), u64::from_be_bytes(take(&h, 16)), len)
            }
            _ => {
                let h = self.read(28)?;
                assert_eq!(h[..4], 0x2560_9513_u32.to_be_bytes());
                let command = u16::from_be_bytes(take(&h, 6));
                (
                    command,
                    take(&h, 8),
                    u64::from_be_bytes(take(&h, 16)),
                    u32::from_be_bytes(take(&h, 24)) as usize,
                )
            }
        };
        let data = if command == 1 { self.read(len)? } else { Vec::new() };
        Ok(Request { command, cookie, offset, len, data })
    }

    /// Does it, and makes the answer.
    fn execute(&mut self, r: &Request) -> Vec<u8> {
        let error = self.mood.error.swap(0, Ordering::Relaxed) as u32;
        let mut data = Vec::new();
        if error == 0 {
            let mut disk = self.disk.lock().unwrap();
            let range = r.offset as usize..r.offset as usize + r.len;
            match r.command {
                0 => data = disk[range].to_vec(),
                1 => disk[range].copy_from_slice(&r.data),
                4 | 6 => disk[range].fill(0),
                3 => {}
                other => panic!("command {other} was not offered"),
            }
        }
        match self.speaks {
            Speaks::Y1997 => {
                let magic = 0x9674_4668_u32.to_be_bytes();
                [&magic[..], &r.cookie, &error.to_be_bytes(), &data].concat()
            }
            Speaks::Structured if r.command == 0 => self.chunks(r, error, &data),
            Speaks::Extended => self.chunks(r, error, &data),
            _ => {
                let magic = 0x6744_6698_u32.to_be_bytes();
                [&magic[..], &error.to_be_bytes(), &r.cookie, &data].concat()
            }
        }
    }

    /// A reply in chunks: the second half of the data first, and holes where there are zeroes.
    fn chunks(&self, r: &Request, error: u32, data: &[u8]) -> Vec<u8> {
        let chunk = |flags: u16, kind: u16, payload: &[u8]| {
            let what = [&flags.to_be_bytes()[..], &kind.to_be_bytes(), &r.cookie].concat();
            match self.speaks {
                Speaks::Extended => {
                    let len = (payload.len() as u64).to_be_bytes();
                    let magic = 0x6e8a_278c_u32.to_be_bytes();
                    [&magic[..], &what, &r.offset.to_be_bytes(), &len, payload].concat()
                }
                _ => {
                    let len = (payload.len() as u32).to_be_bytes();
                    [&0x668e_33ef_u32.to_be_bytes()[..], &what, &len, payload].concat()
                }
            }
        };
        if error != 0 {
            let text = [&error.to_be_bytes()[..], &[0, 4], b"oops"].concat();
            return chunk(1, 0x8001, &text);
        }
        if data.is_empty() {
            return chunk(1, 0, &[]);
        }
        let part = |from: usize, to: usize, flags| {
            let offset = (r.offset + from as u64).to_be_bytes();
            if data[from..to].iter().all(|b| *b == 0) {
                chunk(flags, 2, &[&offset[..], &((to - from) as u32).to_be_bytes()].concat())
            } else {
                chunk(flags, 1, &[&offset[..], &data[from..to]].concat())
            }
        };
        let middle = data.len() / 2;
        [part(middle, data.len(), 0), part(0, middle, 1)].concat()
    }
}

/// bdev_nbd without a program around it.
pub struct Client {
    pub manager: Arc<Manager>,
    pub control: Handle,
    pub reactors: Vec<Handle>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    pub fn new() -> Self {
        let (tx, rx) = mpsc::channel();
        let manager = Manager::new(Registry::new());
        let m = manager.clone();
        let thread = std::thread::spawn(move || {
            let mut control =
                Reactor::new("control", None, IdlePolicy::Adaptive { spin: Duration::ZERO }).unwrap();
            let several = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
            let cores = if several { &[0, 1][..] } else { &[0] };
            let team = Team::start(cores, IdlePolicy::Adaptive { spin: Duration::from_micros(20) }).unwrap();
            let placement = Placement::new(team.handles());
            control.setup(|cx| drop(Drives::install(cx, m, team.handles(), placement)));
            tx.send((control.handle(), team.handles().to_vec())).unwrap();
            control.run();
            drop(team);
        });
        let (control, reactors) = rx.recv().unwrap();
        Self { manager, control, reactors, thread: Some(thread) }
    }

    /// A device with short delays.
    pub fn params(&self, server: &Server) -> NbdParams {
        let reconnect_delay = Duration::from_millis(50);
        let timeouts = Timeouts { reconnect_delay, connect: test_support::patience(), ..Timeouts::default() };
        NbdParams { timeouts, ..NbdParams::new("N", server.place(), "") }
    }

    fn ask<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Drives, &mut reactor::Turn<'_>, Box<dyn FnOnce(T)>) + Send + 'static,
    ) -> T {
        let (tx, rx) = mpsc::channel();
        Drives::send(&self.control, move |d, cx| f(d, cx, Box::new(move |r| tx.send(r).unwrap())));
        test_support::recv(&rx)
    }

    pub fn create(&self, params: NbdParams) -> Result<String, NbdError> {
        self.ask(|d, cx, done| d.create(cx, params, done))
    }

    pub fn delete(&self, force: bool) -> Result<(), NbdError> {
        self.ask(move |d, cx, done| d.delete(cx, "N", force, done))
    }

    pub fn reconnect(&self) -> Result<String, NbdError> {
        self.ask(|d, cx, done| d.reconnect(cx, "N", done))
    }

    pub fn device(&self) -> DriveInfo {
        self.ask(|d, _, done| done(d.devices(Instant::now(), Some("N")).pop())).expect("there is one")
    }

    pub fn wait_state(&self, state: &str) {
        until(format_args!("N is {state}"), || self.device().state == state);
    }

    pub fn up(&self) -> usize {
        self.device().connections.iter().filter(|c| c.up.is_some()).count()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        Drives::send(&self.control, |d, cx| d.shutdown(cx, |cx| cx.handle().stop()));
        if thread.join().is_err() && !std::thread::panicking() {
            panic!("the client panicked");
        }
    }
}

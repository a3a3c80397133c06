//! Honest clients beside an attack: one that was there before, and one that comes anew all the time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rnbd_proto::wire::Flags;
use test_client::{Client, Opts, Outcome};
use test_support::{limit, until};

use crate::program::Program;

/// A client gets in within this time, whatever happens: far less than half-open connections last here, and far more than it
/// takes, which is printed.
fn most() -> Duration {
    limit(20)
}

const BLOCK: usize = 4096;
/// Blocks that the client works on.
const BLOCKS: u64 = 512;

/// Both, each on a thread.
pub struct Bystanders {
    stop: Arc<AtomicBool>,
    done: [Arc<AtomicUsize>; 2],
    /// Requests of the worker before the attack.
    alone: usize,
    worker: JoinHandle<Vec<Duration>>,
    newcomer: JoinHandle<Vec<Duration>>,
}

impl Bystanders {
    pub fn start(program: &Program) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done: [Arc<AtomicUsize>; 2] = Default::default();
        let (addr, worker, newcomer) = (program.addr, program.ip(2), program.ip(3));
        let opts = |src, name: &str| Opts { src: Some(src), timeout: limit(60), ..Opts::new(name) };
        let (worker, newcomer) = (opts(worker, "worker"), opts(newcomer, "newcomer"));
        let (flag, count) = (stop.clone(), done[0].clone());
        let worker = std::thread::spawn(move || work(addr, worker, &flag, &count));
        let (flag, count) = (stop.clone(), done[1].clone());
        let newcomer = std::thread::spawn(move || come_anew(addr, &newcomer, &flag, &count));
        Self { stop, done, alone: 0, worker, newcomer }
    }

    /// Returns once each of them has done something, and counts what follows as under attack.
    pub fn have_all_worked(&mut self) {
        let count = |i: usize| self.done[i].load(Ordering::Relaxed);
        until("bystanders work", || count(0) > 400 && count(1) > 1);
        self.alone = count(0);
    }

    /// Ends them; what they saw, in words.
    ///
    /// # Panics
    /// One of them saw an error, or had to wait too long.
    pub fn stop(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let mut requests = self.worker.join().expect("no request may fail");
        let mut connects = self.newcomer.join().expect("a client must get in at any time");
        connects.sort();
        let slowest = connects.last().copied().unwrap_or_default();
        assert!(slowest < most(), "a client waited for {slowest:?}");
        let (alone, attacked) = requests.split_at_mut(self.alone);
        format!(
            "alone: {}; under attack: {}; {} clients came, the slowest took {slowest:?}",
            spread(alone),
            spread(attacked),
            connects.len()
        )
    }
}

/// How long requests took.
fn spread(times: &mut [Duration]) -> String {
    times.sort();
    let part = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    format!("{} requests, half within {:?}, 99 of 100 within {:?}", times.len(), part(50), part(99))
}

/// Writes blocks and reads them back; the times of its requests.
fn work(addr: SocketAddr, opts: Opts, stop: &AtomicBool, done: &AtomicUsize) -> Vec<Duration> {
    let mut client = Client::connect(soft_roce::open().unwrap(), addr, opts).unwrap();
    client.sess_info().unwrap();
    let device = client.open("disk0", 1).unwrap().device_id.get();
    let mut times = Vec::new();
    for n in 1u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let block = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let sector = block % BLOCKS * (BLOCK as u64 / 512);
        let data: Vec<u8> = n.to_le_bytes().into_iter().cycle().take(BLOCK).collect();
        let began = Instant::now();
        assert_eq!(client.write(device, sector, &data, Flags::default()).unwrap(), Outcome::Ok);
        times.push(began.elapsed());
        let began = Instant::now();
        assert_eq!(client.read(device, sector, BLOCK as u32).unwrap(), data, "sector {sector}");
        times.push(began.elapsed());
        done.store(times.len(), Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
    times
}

/// Connects, opens the device, goes away, and so on; how long it took each time.
fn come_anew(addr: SocketAddr, opts: &Opts, stop: &AtomicBool, done: &AtomicUsize) -> Vec<Duration> {
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let fresh =
            Opts { src: opts.src, timeout: opts.timeout, ..Opts::new(&format!("new{}", times.len())) };
        let began = Instant::now();
        let mut client = Client::connect(soft_roce::open().unwrap(), addr, fresh).unwrap();
        client.sess_info().unwrap();
        client.open("disk0", 0).unwrap();
        times.push(began.elapsed());
        client.disconnect();
        done.store(times.len(), Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(50));
    }
    times
}

//! One local address: its sockets, its memory keys, its engines. What the outside knows as a [`verbs::Device`].

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use iobuf::Region;
use roce_proto::{Counter, Counters, UDP_PORT, keys};
use verbs::{Access, Cq, Device, DeviceInfo, Domain, Error, Mr, Window, WindowKind};

use crate::clock::Random;
use crate::cq::SoftCq;
use crate::engine::{Engine, Parts};
use crate::memory::{MrKeep, WindowKeep, entry_of};
use crate::neighbours::{Claim, Neighbours, slot_name};
use crate::shared::{Options, Shared};
use crate::udp::{Receiver, Transmitter, open_rx, open_tx, sys};

/// Sockets of one address, of all processes: queue pair numbers have 7 bits for them.
pub const SLOTS: u8 = 128;

/// A local address, or all of a family.
pub struct Port {
    pub ip: IpAddr,
    pub info: DeviceInfo,
    pub keys: keys::Table,
    pub shared: Arc<Shared>,
    /// The protection domain that was given out last. After 2^32 of them one comes again; its keys are gone long since.
    domains: AtomicU32,
    pool: Mutex<Pool>,
    /// Of the connection manager's socket.
    cm_counters: Arc<Counters>,
    /// Of the connection manager's slot.
    _claim: Claim,
    /// Of engines that are gone.
    past: Mutex<[u64; Counter::ALL.len()]>,
}

/// Sockets in the order in which they joined their SO_REUSEPORT group.
#[derive(Default)]
struct Pool {
    slots: Vec<Slot>,
}

struct Slot {
    /// Low bits of queue pair numbers; the index in the group, unless processes on this address came and went.
    number: u8,
    state: State,
    _claim: Claim,
}

enum State {
    Free(Box<Sockets>),
    Used(Weak<Engine>),
}

/// An engine's sockets. They outlive it when others were opened after them: a group's indices must not shift.
pub struct Sockets {
    pub rx: Receiver,
    pub tx: Transmitter,
}

impl Port {
    /// Opens a port's first socket, which is the connection manager's.
    ///
    /// # Errors
    /// As `bind(2)`; the words are for the operator.
    pub fn open(ip: IpAddr, shared: Arc<Shared>) -> Result<(Arc<Self>, Sockets), Error> {
        let neighbours = &shared.neighbours;
        let name = |slot| slot_name(ip, slot);
        let claimed = neighbours.claim_first_and(0..SLOTS, name, |claim| is_alone(ip, neighbours, claim));
        let (_, claim, alone) = claimed.map_err(|e| explain(ip, e))?;
        let sockets = open_sockets(ip, true, &shared.options).map_err(|e| explain(ip, e))?;
        if !alone {
            return Err(strangers_group(ip));
        }
        let info = DeviceInfo {
            name: format!("roce-{ip}"),
            provider: crate::PROVIDER,
            max_qp_wr: 16384,
            max_cqe: 1 << 24,
            cq_grows: true,
            max_sge: verbs::SgeList::MAX as u32,
            max_mr_bytes: 1 << 40,
            windows: WindowKind::PerDomain,
            pins: false,
        };
        let port = Self {
            ip,
            info,
            keys: keys::Table::new(),
            shared,
            domains: AtomicU32::new(0),
            pool: Mutex::default(),
            cm_counters: Arc::default(),
            _claim: claim,
            past: Mutex::new([0; Counter::ALL.len()]),
        };
        Ok((Arc::new(port), sockets))
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the connection manager counts; it is its only writer.
    pub fn cm_counters(&self) -> &Counters {
        &self.cm_counters
    }

    /// Engines that exist.
    pub fn engines(&self) -> Vec<Arc<Engine>> {
        let pool = self.pool();
        let used = pool.slots.iter().filter_map(|slot| match &slot.state {
            State::Used(engine) => engine.upgrade(),
            State::Free(_) => None,
        });
        used.collect()
    }

    /// An engine in the first free slot.
    fn open_engine(self: &Arc<Self>, entries: u32) -> io::Result<Arc<Engine>> {
        let mut pool = self.pool();
        let free = pool.slots.iter().position(|slot| matches!(slot.state, State::Free(_)));
        let index = match free {
            Some(index) => index,
            None => {
                let (number, _claim) =
                    self.shared.neighbours.claim_first(1..SLOTS, |slot| slot_name(self.ip, slot))?;
                let sockets = open_sockets(self.ip, false, &self.shared.options)?;
                pool.slots.push(Slot { number, state: State::Free(Box::new(sockets)), _claim });
                pool.slots.len() - 1
            }
        };
        let slot = &mut pool.slots[index];
        let State::Free(sockets) = std::mem::replace(&mut slot.state, State::Used(Weak::new())) else {
            unreachable!("`index` is that of a free slot, and the pool is locked");
        };
        let parts = Parts { port: self.clone(), slot: slot.number, entries };
        match Engine::new(parts, sockets) {
            Ok(engine) => {
                slot.state = State::Used(Arc::downgrade(&engine));
                Ok(engine)
            }
            Err((error, sockets)) => {
                slot.state = State::Free(sockets);
                Err(error)
            }
        }
    }

    /// Slot `number` is this process'.
    pub fn has_slot(&self, number: u8) -> bool {
        self.pool().slots.iter().any(|slot| slot.number == number)
    }

    /// Takes back the sockets of an engine that is going, and closes those at the end of the group. If another process
    /// joined the group after them they stay: the kernel would move its last socket into the gap.
    pub fn close_engine(&self, slot: u8, mut sockets: Box<Sockets>, counters: &Counters) {
        {
            let mut past = self.past.lock().unwrap_or_else(|e| e.into_inner());
            for (sum, counter) in past.iter_mut().zip(Counter::ALL) {
                *sum += counters.get(*counter);
            }
        }
        sockets.tx.clear();
        let mut pool = self.pool();
        if let Some(place) = pool.slots.iter_mut().find(|place| place.number == slot) {
            place.state = State::Free(sockets);
        }
        while let Some(Slot { number, state: State::Free(_), .. }) = pool.slots.last()
            && !self.shared.neighbours.is_taken(&slot_name(self.ip, number.saturating_add(1)))
        {
            pool.slots.pop();
        }
    }
}

fn open_sockets(ip: IpAddr, first: bool, options: &Options) -> io::Result<Sockets> {
    let mut random = Random::new();
    let rx = open_rx(SocketAddr::new(ip, UDP_PORT), first, options.receive_buffer)?;
    warn_about_buffer(rx.buffer, options);
    let tx = open_tx(ip, || random.u32())?;
    Ok(Sockets { rx: Receiver::new(rx.fd), tx: Transmitter::new(tx, options.segmentation) })
}

/// Once per process: everything else is at the system's mercy when its buffers are small.
fn warn_about_buffer(got: usize, options: &Options) {
    use std::sync::atomic::AtomicBool;
    static SAID: AtomicBool = AtomicBool::new(false);
    const ENOUGH: usize = 1 << 20;
    if options.receive_buffer >= ENOUGH && got < ENOUGH && !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            bytes = got,
            "the system caps UDP receive buffers, which limits throughput; raise it: sysctl -w net.core.rmem_max={}",
            options.receive_buffer
        );
    }
}

/// Whether the group of `ip` has only those sockets whose names show. Others of this user (another user's let nobody in) would
/// be programs that have their names elsewhere, and the same numbers as this one. `claim`: our slot. To be called while nobody
/// can claim another: for a moment this takes the address.
fn is_alone(ip: IpAddr, neighbours: &Neighbours, claim: &Claim) -> bool {
    // A process that was killed may lose its name a moment before its sockets.
    const LOOKS: u32 = 5;
    neighbours.has_company(ip, claim)
        || (0..LOOKS).any(|look| {
            if look > 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
            sys::is_free((ip, UDP_PORT).into())
        })
}

/// See [`is_alone`].
fn strangers_group(ip: IpAddr) -> Error {
    Error {
        what: format!("open UDP {}", SocketAddr::new(ip, UDP_PORT)),
        source: io::Error::from_raw_os_error(libc::EADDRINUSE),
        hint: "another program of this user has it, but not its name in the same directory: programs on one address must see \
               the same /run/rnbd or /tmp/rnbd-UID (containers: give them one in common), or use addresses of their own"
            .into(),
    }
}

/// Why an address cannot be used, in words for who runs this.
fn explain(ip: IpAddr, source: io::Error) -> Error {
    let hint = match source.raw_os_error() {
        Some(libc::EADDRINUSE) => format!(
            "another program, another user's or the kernel's rdma_rxe, owns UDP port {UDP_PORT} on {ip}; \
             see `ss -ulpn sport = {UDP_PORT}` and `rdma link`"
        ),
        Some(libc::EADDRNOTAVAIL) => format!("{ip} is no address of this host; see `ip address`"),
        Some(libc::EACCES | libc::EPERM) => "not permitted here (a sandbox or security module?)".into(),
        Some(libc::EAFNOSUPPORT) => "this system has no such address family".into(),
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)".into(),
        _ => String::new(),
    };
    Error { what: format!("open UDP {}", SocketAddr::new(ip, UDP_PORT)), source, hint }
}

impl Device for Port {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn counters(&self, each: &mut dyn FnMut(&'static str, u64)) {
        let engines = self.engines();
        let past = *self.past.lock().unwrap_or_else(|e| e.into_inner());
        for (counter, past) in Counter::ALL.iter().zip(past) {
            let live: u64 = engines.iter().map(|engine| engine.counters().get(*counter)).sum();
            each(counter.name(), past + live + self.cm_counters.get(*counter));
        }
    }

    fn alloc_domain(&self) -> Domain {
        // Not the common one.
        match self.domains.fetch_add(1, Ordering::Relaxed).wrapping_add(1) {
            0 => self.alloc_domain(),
            n => Domain(n),
        }
    }

    fn register(self: Arc<Self>, region: Arc<Region>, access: Access) -> Result<Mr, Error> {
        let what = || format!("register {} bytes on {}", region.len(), self.info.name);
        if region.len() as u64 > self.info.max_mr_bytes {
            let source = io::Error::from_raw_os_error(libc::ENOMEM);
            return Err(Error { what: what(), source, hint: format!("at most {}", self.info.max_mr_bytes) });
        }
        let entry = entry_of(&region, 0, region.len() as u64, access);
        let mut random = Random::new();
        let Some(key) = self.keys.insert(entry, || random.u32()) else {
            let source = io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(Error { what: what(), source, hint: "every key of the device is in use".into() });
        };
        let keep = MrKeep { port: self.clone(), key, access, region: region.clone() };
        Ok(Mr::new(region, key, key, Box::new(keep)))
    }

    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Box<dyn Cq>, Error> {
        let what = || format!("create a completion queue of {entries} on {}", self.info.name);
        if entries == 0 || entries > self.info.max_cqe {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(Error { what: what(), source, hint: format!("1..={} entries", self.info.max_cqe) });
        }
        match self.open_engine(entries) {
            Ok(engine) => Ok(Box::new(SoftCq::new(engine))),
            Err(source) => {
                let hint = match source.raw_os_error() {
                    Some(libc::ENOSPC) => {
                        format!("at most {SLOTS} sockets per address, of all processes together")
                    }
                    _ => {
                        explain(self.ip, io::Error::from_raw_os_error(source.raw_os_error().unwrap_or(0)))
                            .hint
                    }
                };
                Err(Error { what: what(), source, hint })
            }
        }
    }

    fn alloc_window(self: Arc<Self>) -> Result<Window, Error> {
        let (keep, rkey) = WindowKeep::new(self)?;
        Ok(Window { handle: Box::new(keep), rkey, bound: false })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::RwLock;

    use super::*;
    use crate::mailbox::Mailbox;
    use crate::places::Place;

    #[test]
    fn programs_that_cannot_see_each_other_do_not_share_an_address() {
        let dir = test_support::Dir::new("port");
        let uid = rustix::process::geteuid().as_raw();
        let shared = |name: &str| {
            let places = Place::among(&[dir.join(name)], uid).unwrap();
            Arc::new(Shared {
                options: Options::default(),
                notices: Mailbox::new().unwrap(),
                neighbours: Neighbours::in_places(places).unwrap(),
                directory: RwLock::default(),
            })
        };
        let ip: IpAddr = test_support::address(test_support::network(), 1).into();
        let first = Port::open(ip, shared("a")).unwrap();
        // As in another container of the same network.
        let refused = Port::open(ip, shared("b")).err().expect("its numbers would be the same");
        assert_eq!(refused.source.raw_os_error(), Some(libc::EADDRINUSE), "{refused}");
        assert!(refused.to_string().contains("/run/rnbd"), "{refused}");
        let second = Port::open(ip, shared("a")).unwrap();
        drop((first, second));
        Port::open(ip, shared("b")).unwrap();
    }
}

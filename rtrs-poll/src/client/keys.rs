//! Keys of data memory: every region of the registry, registered with every device that a path is on.
//!
//! Devices are asked on the control thread; reactors look keys up in a [`KeyTable`], which is never changed, only
//! replaced. A registration goes when no table has it any more, and tables come back here to be dropped, for that
//! takes system calls.

use std::sync::Arc;

use iobuf::{Region, Registry, Segment, Snapshot};
use verbs::{Access, Device, Mr};

/// What servers may do to data memory: see [the module](super) for what that means.
const ACCESS: Access = Access {
    domain: verbs::Domain::COMMON,
    local_write: true,
    remote_write: true,
    remote_read: false,
    window_bind: false,
};

/// The keys of one device, by region.
pub(super) struct KeyTable {
    /// Of the registry when it was made.
    pub generation: u64,
    entries: Box<[Entry]>,
    /// Kept registered.
    mrs: Box<[Option<Arc<Mr>>]>,
}

/// Keys of the bytes `start..end`; none if that is empty.
#[derive(Clone, Copy, Default)]
struct Entry {
    start: u64,
    end: u64,
    lkey: u32,
    rkey: u32,
}

impl KeyTable {
    fn empty() -> Arc<Self> {
        Arc::new(Self { generation: u64::MAX, entries: Box::default(), mrs: Box::default() })
    }

    fn new(generation: u64, mrs: Vec<Option<Arc<Mr>>>) -> Arc<Self> {
        let entry = |mr: &Option<Arc<Mr>>| {
            mr.as_ref().map_or(Entry::default(), |mr| {
                let start = mr.region().as_ptr() as u64;
                Entry { start, end: start + mr.region().len() as u64, lkey: mr.lkey(), rkey: mr.rkey() }
            })
        };
        Arc::new(Self { generation, entries: mrs.iter().map(entry).collect(), mrs: mrs.into() })
    }

    /// Keys for a segment, own and peer's; `None` unless all of it is registered.
    pub fn find(&self, segment: &Segment) -> Option<(u32, u32)> {
        let entry = self.entries.get(usize::from(segment.region.index()?))?;
        let end = segment.addr.checked_add(segment.len.into())?;
        (segment.addr >= entry.start && end <= entry.end).then_some((entry.lkey, entry.rkey))
    }
}

/// The devices that paths are on.
pub(super) struct Keys {
    registry: Arc<Registry>,
    devices: Vec<DeviceKeys>,
}

struct DeviceKeys {
    device: Arc<dyn Device>,
    /// Paths on it.
    users: usize,
    table: Arc<KeyTable>,
    /// Counts of a region that one registration of it holds.
    holds: usize,
}

impl Keys {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry, devices: Vec::new() }
    }

    fn position(&self, device: &Arc<dyn Device>) -> Option<usize> {
        self.devices.iter().position(|d| Arc::ptr_eq(&d.device, device))
    }

    /// A path comes to be on `device`: registers all memory with it, if it is the first. Give it back with
    /// [`Keys::leave`].
    pub fn enter(&mut self, device: &Arc<dyn Device>) -> Arc<KeyTable> {
        let i = self.position(device).unwrap_or_else(|| {
            let (holds, table) = (holds_per_mr(device), KeyTable::empty());
            let mut keys = DeviceKeys { device: device.clone(), users: 0, table, holds };
            keys.renew(&self.registry.snapshot(), &[]);
            self.devices.push(keys);
            self.devices.len() - 1
        });
        self.devices[i].users += 1;
        self.devices[i].table.clone()
    }

    /// The path has left; the last one takes the registrations along.
    pub fn leave(&mut self, device: &Arc<dyn Device>) {
        let Some(i) = self.position(device) else { return };
        self.devices[i].users -= 1;
        if self.devices[i].users == 0 {
            self.devices.swap_remove(i);
        }
    }

    /// The present table of a device.
    pub fn table(&self, device: &Arc<dyn Device>) -> Option<&Arc<KeyTable>> {
        self.position(device).map(|i| &self.devices[i].table)
    }

    /// Registers what is new in the registry and lets go of what nobody else holds; returns the devices whose tables
    /// were replaced.
    pub fn refresh(&mut self) -> Vec<Arc<dyn Device>> {
        if self.devices.is_empty() {
            return Vec::new();
        }
        let snapshot = self.registry.snapshot();
        let orphans: Vec<bool> =
            snapshot.regions.iter().map(|r| r.as_ref().is_some_and(|r| self.is_orphan(r))).collect();
        let any = orphans.contains(&true);
        let stale = |d: &&mut DeviceKeys| any || d.table.generation != snapshot.generation;
        let renewed = self.devices.iter_mut().filter(stale).map(|d| {
            d.renew(&snapshot, &orphans);
            d.device.clone()
        });
        renewed.collect()
    }

    /// Only registrations, and the snapshot at hand, hold the region: whoever made it has dropped it, and no segment
    /// can point to it any more (see [`iobuf::Region::segment`]). If somebody takes a snapshot at this moment it
    /// looks alive, until the next time.
    fn is_orphan(&self, region: &Arc<Region>) -> bool {
        let holds = self.devices.iter().filter(|d| d.has(region)).map(|d| d.holds).sum::<usize>();
        holds > 0 && Arc::strong_count(region) == holds + 1
    }

    /// Something is registered, and might have to be given up.
    pub fn in_use(&self) -> bool {
        !self.devices.is_empty()
    }
}

impl DeviceKeys {
    fn has(&self, region: &Arc<Region>) -> bool {
        self.table.mrs.iter().flatten().any(|mr| Arc::ptr_eq(mr.region(), region))
    }

    /// Makes the table anew: registrations that exist are taken over.
    fn renew(&mut self, snapshot: &Snapshot, orphans: &[bool]) {
        let orphan = |i: usize| orphans.get(i).copied().unwrap_or(false);
        let mr_of = |(i, region): (usize, &Option<Arc<Region>>)| {
            let region = region.as_ref().filter(|_| !orphan(i))?;
            let old = self.table.mrs.get(i).and_then(Option::as_ref);
            let kept = old.filter(|mr| Arc::ptr_eq(mr.region(), region)).cloned();
            kept.or_else(|| self.register(region))
        };
        let mrs = snapshot.regions.iter().enumerate().map(mr_of).collect();
        self.table = KeyTable::new(snapshot.generation, mrs);
    }

    /// `None` if the region must not be pinned, and, said aloud, if the device refuses: requests with data there are, too.
    fn register(&self, region: &Arc<Region>) -> Option<Arc<Mr>> {
        if self.device.info().pins && !region.may_pin() {
            return None;
        }
        match self.device.clone().register(region.clone(), ACCESS) {
            Ok(mr) => Some(Arc::new(mr)),
            Err(error) => {
                let (device, bytes) = (&self.device.info().name, region.len());
                tracing::error!(%error, device, bytes, "data memory cannot be registered; requests with it will be copied");
                None
            }
        }
    }
}

/// How often a registration holds its region: once itself, and what the provider keeps. Found out with a region that
/// nobody else has.
fn holds_per_mr(device: &Arc<dyn Device>) -> usize {
    let Ok(region) = Region::new(iobuf::PAGE_SIZE) else { return 1 };
    match device.clone().register(region.clone(), ACCESS) {
        Ok(mr) => {
            let holds = Arc::strong_count(&region) - 1;
            drop(mr);
            holds
        }
        Err(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iobuf::Pool;
    use verbs::loopback::Fabric;

    fn device(fabric: &Fabric) -> Arc<dyn Device> {
        fabric.cm().devices().remove(0)
    }

    fn segment(region: &Region, at: usize, len: usize) -> Segment {
        // SAFETY: no I/O is made with it.
        unsafe { region.segment(at, len) }.expect("inside")
    }

    #[test]
    fn what_is_in_the_registry_has_keys() {
        let registry = Registry::new();
        let (a, b) = (registry.map(8192).unwrap(), registry.map(4096).unwrap());
        let mut keys = Keys::new(registry.clone());
        let device = device(&Fabric::new());
        let table = keys.enter(&device);
        let of = |t: &KeyTable, r: &Region| t.find(&segment(r, 4096 - 512, 512));
        assert!(of(&table, &a).is_some() && of(&table, &a) != of(&table, &b));
        // Nothing that is not wholly inside, whatever it says it is in.
        let inside = segment(&a, 0, 8192);
        for bad in [
            Segment { addr: inside.addr + 1, ..inside },
            Segment { addr: inside.addr - 1, ..inside },
            Segment { addr: u64::MAX, ..inside },
            Segment { region: b.id(), ..inside },
            Segment { region: iobuf::RegionId::NONE, ..inside },
        ] {
            assert_eq!(table.find(&bad), None, "{bad:?}");
        }
        let c = registry.map(4096).unwrap();
        assert_eq!(of(&table, &c), None);
        assert_eq!(keys.refresh().len(), 1);
        let new = keys.table(&device).unwrap().clone();
        assert!(of(&new, &c).is_some());
        assert_eq!(of(&new, &a), of(&table, &a), "what stays is not registered again");
        assert!(keys.refresh().is_empty());
    }

    #[test]
    fn a_device_that_pins_gets_no_guests_memory() {
        use std::os::fd::AsFd;
        use verbs::loopback::Config;
        let dir = test_support::Dir::new("guests-memory");
        let file = dir.file("ram", 4096);
        let fd = std::fs::File::options().read(true).write(true).open(file).unwrap();
        for pins in [false, true] {
            let registry = Registry::new();
            let own = registry.map(4096).unwrap();
            let guests = registry.map_shared(fd.as_fd(), 0, 4096).unwrap();
            let mut config = Config::default();
            config.device.pins = pins;
            let table = Keys::new(registry).enter(&device(&Fabric::with_config(config)));
            assert!(table.find(&segment(&own, 0, 512)).is_some());
            assert_eq!(table.find(&segment(&guests, 0, 512)).is_none(), pins);
        }
    }

    #[test]
    fn memory_nobody_else_holds_is_given_back() {
        let registry = Registry::new();
        let mut keys = Keys::new(registry.clone());
        let (one, two) = (device(&Fabric::new()), device(&Fabric::new()));
        let pool = Pool::new(&registry, 2, 4096).unwrap();
        let lent = pool.take().unwrap();
        drop((keys.enter(&one), keys.enter(&two)));
        drop(pool);
        assert!(keys.refresh().is_empty(), "a buffer of it is still lent");
        let weak = Arc::downgrade(lent.region());
        drop(lent);
        assert!(weak.upgrade().is_some(), "registrations keep it");
        assert_eq!(keys.refresh().len(), 2);
        assert!(weak.upgrade().is_none());
        keys.leave(&one);
        keys.leave(&two);
        assert!(!keys.in_use());
    }
}

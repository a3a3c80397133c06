//! The devices that one RNBD session has open, and the version it speaks.
//!
//! A session begins when the first RTRS path of a client comes up and ends with its last; then every device is closed
//! ([`Session::drain`]).

use std::collections::VecDeque;
use std::fmt;

use crate::open::{AccessMode, BadOpen, device_name};
use crate::wire::{MsgOpen, MsgSessInfo, RNBD_PROTO_VER_MAJOR};

/// Devices that one session may have open, unless configured otherwise.
pub const DEFAULT_MAX_DEVICES: usize = 1024;

const INDEX_BITS: u32 = 16;

/// Names an open device within its session: `device_id` on the wire. The low 16 bits are a place in the session's
/// table, the high 16 count how often that place has been used. Places are used in turn, so an id comes back only after
/// every free place has been used 65536 times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(u32);

impl DeviceId {
    /// From a message.
    pub const fn from_wire(id: u32) -> DeviceId {
        DeviceId(id)
    }

    /// For a message.
    pub const fn to_wire(self) -> u32 {
        self.0
    }

    /// Place in the session's table, below its limit.
    pub const fn index(self) -> usize {
        (self.0 & ((1 << INDEX_BITS) - 1)) as usize
    }

    const fn new(index: u16, generation: u16) -> DeviceId {
        DeviceId((generation as u32) << INDEX_BITS | index as u32)
    }

    const fn generation(self) -> u16 {
        (self.0 >> INDEX_BITS) as u16
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device<D> {
    /// As the client wrote it, without the search path.
    pub name: Box<str>,
    /// As at the first OPEN.
    pub mode: AccessMode,
    /// The server's own.
    pub data: D,
}

/// What an OPEN asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open<'m> {
    /// It is open under exactly this name: answer with the same id and fresh geometry. The access mode is not looked
    /// at. Clients do this after a reconnect.
    Again(DeviceId),
    /// Find and open it, then call [`Session::insert`].
    New {
        /// As written; check it with [`crate::open::SearchPath::full_path`].
        name: &'m str,
        /// As wanted; check it with [`crate::open::AccessTable::acquire`].
        mode: AccessMode,
    },
}

#[derive(Debug)]
struct Slot<D> {
    generation: u16,
    device: Option<Device<D>>,
}

/// The devices that a session has open. `D` is what the server keeps for each.
#[derive(Debug)]
pub struct Session<D> {
    version: u8,
    max_devices: usize,
    first_generation: u16,
    slots: Vec<Slot<D>>,
    /// Places to use again, the longest unused first.
    free: VecDeque<u16>,
}

impl<D> Session<D> {
    /// A session without devices. `max_devices`: bounds what a client can make the server keep; at most 65536.
    pub fn new(max_devices: usize) -> Session<D> {
        Session::starting_at(max_devices, 0)
    }

    /// As [`Session::new`], with `generation` in the high bits of the first ids. A server that keeps tables by session
    /// and device id gives each session its own, so that ids of a session that has ended find nothing.
    pub fn starting_at(max_devices: usize, generation: u16) -> Session<D> {
        let max_devices = max_devices.min(1 << INDEX_BITS);
        Session {
            version: RNBD_PROTO_VER_MAJOR,
            max_devices,
            first_generation: generation,
            slots: Vec::new(),
            free: VecDeque::new(),
        }
    }

    /// Takes SESS_INFO: from now on both speak the lower version of the two. Returns the answer.
    pub fn sess_info(&mut self, msg: &MsgSessInfo) -> MsgSessInfo {
        self.version = msg.ver.min(RNBD_PROTO_VER_MAJOR);
        MsgSessInfo::response(self.version)
    }

    /// The version spoken; below 2, `prio` of an I/O means nothing.
    pub const fn version(&self) -> u8 {
        self.version
    }

    /// Finds out what an OPEN asks for.
    ///
    /// # Errors
    /// [`BadOpen`]; the limit of devices is checked here too.
    pub fn open<'m>(&self, msg: &'m MsgOpen) -> Result<Open<'m>, BadOpen> {
        let name = device_name(msg)?;
        if let Some(id) = self.find(name) {
            return Ok(Open::Again(id));
        }
        let mode = AccessMode::from_wire(msg.access_mode).ok_or(BadOpen::AccessMode(msg.access_mode))?;
        self.check_room()?;
        Ok(Open::New { name, mode })
    }

    /// Enters a device that has been opened.
    ///
    /// # Errors
    /// [`BadOpen::TooMany`], as [`Session::open`]; `device` is back.
    pub fn insert(&mut self, device: Device<D>) -> Result<DeviceId, (BadOpen, Device<D>)> {
        if let Err(full) = self.check_room() {
            return Err((full, device));
        }
        let index = match self.free.pop_front() {
            Some(index) => index,
            None => {
                self.slots.push(Slot { generation: self.first_generation, device: None });
                (self.slots.len() - 1) as u16
            }
        };
        let slot = &mut self.slots[usize::from(index)];
        slot.device = Some(device);
        Ok(DeviceId::new(index, slot.generation))
    }

    fn check_room(&self) -> Result<(), BadOpen> {
        if self.count() >= self.max_devices { Err(BadOpen::TooMany(self.max_devices)) } else { Ok(()) }
    }

    /// The device with this exact name. Linear.
    pub fn find(&self, name: &str) -> Option<DeviceId> {
        self.devices().find(|(_, d)| *d.name == *name).map(|(id, _)| id)
    }

    /// The device an I/O names, in constant time. `None`: answer ENOTCONN.
    pub fn device(&self, id: DeviceId) -> Option<&Device<D>> {
        let slot = self.slots.get(id.index())?;
        if slot.generation == id.generation() { slot.device.as_ref() } else { None }
    }

    /// As [`Session::device`].
    pub fn device_mut(&mut self, id: DeviceId) -> Option<&mut Device<D>> {
        let slot = self.slots.get_mut(id.index())?;
        if slot.generation == id.generation() { slot.device.as_mut() } else { None }
    }

    /// Removes a device: on CLOSE once its I/O is done, or by force. Its id finds nothing from now on. `None` if there
    /// is none; CLOSE is answered with success even then, as by the kernel.
    pub fn remove(&mut self, id: DeviceId) -> Option<Device<D>> {
        let slot = self.slots.get_mut(id.index()).filter(|s| s.generation == id.generation())?;
        let device = slot.device.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push_back(id.index() as u16);
        Some(device)
    }

    /// Removes all devices; the session ends.
    pub fn drain(&mut self) -> impl Iterator<Item = Device<D>> {
        let ids: Vec<_> = self.devices().map(|(id, _)| id).collect();
        ids.into_iter().filter_map(|id| self.remove(id))
    }

    /// Devices open.
    pub fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// All devices open.
    pub fn devices(&self) -> impl Iterator<Item = (DeviceId, &Device<D>)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let id = DeviceId::new(index as u16, slot.generation);
            slot.device.as_ref().map(|device| (id, device))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> Device<u32> {
        Device { name: name.into(), mode: AccessMode::ReadWrite, data: 0 }
    }

    fn open(name: &str, mode: u8) -> MsgOpen {
        MsgOpen::request(mode, name.as_bytes()).unwrap()
    }

    #[test]
    fn versions() {
        let mut s: Session<u32> = Session::new(1);
        assert_eq!(s.version(), 2);
        for (theirs, both) in [(2, 2), (1, 1), (255, 2), (0, 0)] {
            let answer = s.sess_info(&MsgSessInfo { ver: theirs, ..MsgSessInfo::request() });
            assert_eq!((answer, s.version()), (MsgSessInfo::response(both), both));
        }
    }

    #[test]
    fn opening_again_gives_the_same_id_whatever_the_mode() {
        let mut s = Session::new(1);
        let msg = open("a", 1);
        assert_eq!(s.open(&msg), Ok(Open::New { name: "a", mode: AccessMode::ReadWrite }));
        let id = s.insert(device("a")).unwrap();
        assert_eq!(id.to_wire(), 0, "like the kernel's first");
        assert_eq!(s.open(&open("a", 0)), Ok(Open::Again(id)));
        assert_eq!(s.open(&open("a", 77)), Ok(Open::Again(id)));
        assert_eq!(s.open(&open("b", 77)), Err(BadOpen::AccessMode(77)));
        assert_eq!(s.open(&open("/a", 1)), Err(BadOpen::TooMany(1)), "names are compared as written");
    }

    #[test]
    fn ids_are_not_reused_soon() {
        let mut s = Session::new(4);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            let id = s.insert(device("a")).unwrap();
            assert!(seen.insert(id), "{id} came twice");
            assert!(s.remove(id).is_some() && s.remove(id).is_none());
            assert!(s.device(id).is_none() && s.device_mut(id).is_none());
        }
    }

    #[test]
    fn the_limit_counts_open_devices() {
        let mut s = Session::new(2);
        let a = s.insert(device("a")).unwrap();
        s.insert(device("b")).unwrap();
        assert_eq!(s.insert(device("c")), Err((BadOpen::TooMany(2), device("c"))));
        s.remove(a);
        let c = s.insert(device("c")).unwrap();
        assert_eq!((c.index(), s.device(a).is_none()), (a.index(), true));
        s.device_mut(c).unwrap().data = 7;
        assert_eq!(s.device(c).unwrap().data, 7);
    }

    #[test]
    fn ids_from_nowhere_find_nothing() {
        let mut s = Session::new(2);
        s.insert(device("a")).unwrap();
        for id in [1, 2, 0x1_0000, u32::MAX] {
            assert!(s.device(DeviceId::from_wire(id)).is_none(), "{id:#x}");
        }
    }

    #[test]
    fn drain_closes_everything() {
        let mut s = Session::new(8);
        for name in ["a", "b", "c"] {
            s.insert(device(name)).unwrap();
        }
        let names: Vec<_> = s.drain().map(|d| d.name).collect();
        assert_eq!(names, ["a".into(), "b".into(), "c".into()]);
        assert_eq!(s.count(), 0);
    }
}

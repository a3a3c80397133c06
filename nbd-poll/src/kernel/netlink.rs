//! Devices over generic netlink (Linux 4.12). Each call is one message; the driver has done the work when it returns.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_packet_generic::ctrl::nlas::{GenlCtrlAttrs, McastGrpAttrs};
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

use super::message::{Attr, FAMILY, MULTICAST_GROUP, NbdMessage, SockItem, cmd};
use super::{Disk, Error};

/// More than any answer of the driver: a status of some thousand devices.
const ANSWER_MAX: usize = 64 << 10;

/// A way to the driver.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    family: u16,
    /// Multicast group of the driver's events.
    group: Option<u32>,
}

/// What a RECONFIGURE changes; `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct Change<'a> {
    /// Bytes.
    pub size: Option<u64>,
    /// As in [`Disk::timeout_sec`].
    pub timeout_sec: Option<u64>,
    /// As in [`Disk::dead_conn_timeout_sec`].
    pub dead_conn_timeout_sec: Option<u64>,
    /// As the device was made with. Must be given if it was.
    pub backend: Option<&'a str>,
    /// In place of dead sockets. **The driver ignores those for which it has no dead one, and reports success**; who
    /// then closes its own copy finds the other end closed.
    pub sockets: &'a [BorrowedFd<'a>],
}

impl Netlink {
    /// Asks for the family.
    ///
    /// # Errors
    /// `NoDriver` if it is not there.
    pub fn open() -> Result<Self, Error> {
        let what = "generic netlink";
        let system = |source| Error::new(what, source);
        let mut socket = Socket::new(NETLINK_GENERIC).map_err(system)?;
        socket.bind_auto().map_err(system)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(system)?;
        let mut netlink = Self { socket, family: 0, group: None };
        let ask =
            GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.into())] };
        let answers: Vec<GenlCtrl> = netlink.ask(ask).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => Error::NoDriver,
            _ => Error::new(what, e),
        })?;
        for attr in answers.into_iter().flat_map(|a| a.nlas) {
            match attr {
                GenlCtrlAttrs::FamilyId(id) => netlink.family = id,
                GenlCtrlAttrs::McastGroups(groups) => netlink.group = group_of(&groups),
                _ => {}
            }
        }
        if netlink.family == 0 { Err(Error::NoDriver) } else { Ok(netlink) }
    }

    /// CONNECT: makes a device of connected sockets and returns its number; `index` `None`: the first that is free,
    /// or a new one. The driver keeps references of its own to the sockets.
    ///
    /// # Errors
    /// EBUSY: made already, or open. EINVAL: a socket that cannot be shut down, or a number out of range.
    pub fn connect(
        &mut self,
        index: Option<u32>,
        disk: &Disk,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<u32, Error> {
        let mut attrs: Vec<Attr> = index.map(Attr::Index).into_iter().collect();
        attrs.extend([
            Attr::SizeBytes(disk.size),
            Attr::BlockSizeBytes(disk.block_size.into()),
            Attr::TimeoutSec(disk.timeout_sec),
            Attr::ServerFlags(disk.flags.0.into()),
            Attr::Sockets(items(sockets)),
            Attr::DeadConnTimeoutSec(disk.dead_conn_timeout_sec),
        ]);
        attrs.extend(disk.backend.clone().map(Attr::BackendIdentifier));
        let device = index.map_or("a free NBD device".to_owned(), |i| format!("/dev/nbd{i}"));
        let answers = self.call(cmd::CONNECT, attrs, || format!("cannot make {device}"))?;
        answers
            .iter()
            .find_map(NbdMessage::index)
            .or(index)
            .ok_or_else(|| Error::new("the driver made a device", io::Error::other("but did not say which")))
    }

    /// RECONFIGURE: changes a device that was made with CONNECT.
    ///
    /// # Errors
    /// EINVAL: not made, or another backend.
    pub fn reconfigure(&mut self, index: u32, change: &Change<'_>) -> Result<(), Error> {
        let mut attrs = vec![Attr::Index(index)];
        attrs.extend(change.size.map(Attr::SizeBytes));
        attrs.extend(change.timeout_sec.map(Attr::TimeoutSec));
        attrs.extend(change.dead_conn_timeout_sec.map(Attr::DeadConnTimeoutSec));
        attrs.extend(change.backend.map(|b| Attr::BackendIdentifier(b.into())));
        if !change.sockets.is_empty() {
            attrs.push(Attr::Sockets(items(change.sockets)));
        }
        self.call(cmd::RECONFIGURE, attrs, || format!("cannot change /dev/nbd{index}"))?;
        Ok(())
    }

    /// DISCONNECT: what is in flight fails, the sockets get `DISC` and are shut down. The device is free once nobody
    /// has it open; no error if it was free already.
    ///
    /// # Errors
    /// EINVAL: no such device.
    pub fn disconnect(&mut self, index: u32) -> Result<(), Error> {
        self.call(cmd::DISCONNECT, vec![Attr::Index(index)], || {
            format!("cannot disconnect /dev/nbd{index}")
        })?;
        Ok(())
    }

    /// STATUS: numbers of the devices, and whether each is in use (made, or open).
    ///
    /// # Errors
    /// The system's.
    pub fn status(&mut self, index: Option<u32>) -> Result<Vec<(u32, bool)>, Error> {
        let attrs = index.map(Attr::Index).into_iter().collect();
        let answers =
            self.call(cmd::STATUS, attrs, || "cannot ask for the status of NBD devices".to_owned())?;
        Ok(answers.iter().flat_map(NbdMessage::devices).map(|d| (d.index, d.connected)).collect())
    }

    /// Hears of dead links from now on.
    ///
    /// # Errors
    /// The driver has no events, or the system refuses.
    pub fn monitor(&self) -> Result<Monitor, Error> {
        let system = |source| Error::new("cannot follow the events of the NBD driver", source);
        let group = self.group.ok_or_else(|| system(io::ErrorKind::Unsupported.into()))?;
        let mut socket = Socket::new(NETLINK_GENERIC).map_err(system)?;
        socket.bind_auto().map_err(system)?;
        socket.add_membership(group).map_err(system)?;
        socket.set_non_blocking(true).map_err(system)?;
        Ok(Monitor { socket })
    }

    fn call(
        &mut self,
        cmd: u8,
        attrs: Vec<Attr>,
        what: impl Fn() -> String,
    ) -> Result<Vec<NbdMessage>, Error> {
        self.ask(NbdMessage { cmd, attrs }).map_err(|source| Error::new(what(), source))
    }

    /// Sends a message and returns the answers before the acknowledgement.
    fn ask<T>(&mut self, message: T) -> io::Result<Vec<T>>
    where
        T: GenlFamily + Emitable + std::fmt::Debug,
        GenlMessage<T>: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut message = GenlMessage::from_payload(message);
        message.set_resolved_family_id(self.family);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let mut bytes = Vec::with_capacity(ANSWER_MAX);
            self.socket.recv(&mut bytes, 0)?;
            for payload in payloads::<T>(&bytes)? {
                match payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer.into_parts().1),
                    NetlinkPayload::Error(e) if e.code.is_some() => return Err(e.to_io()),
                    NetlinkPayload::Error(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

/// The messages in a datagram.
fn payloads<T>(mut bytes: &[u8]) -> io::Result<Vec<NetlinkPayload<GenlMessage<T>>>>
where
    T: std::fmt::Debug,
    GenlMessage<T>: NetlinkDeserializable,
{
    let mut payloads = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkMessage::<GenlMessage<T>>::deserialize(bytes)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        // Messages begin at multiples of four.
        let len = (message.header.length as usize).next_multiple_of(4).max(4);
        bytes = bytes.get(len..).unwrap_or(&[]);
        payloads.push(message.payload);
    }
    Ok(payloads)
}

fn items(sockets: &[BorrowedFd<'_>]) -> Vec<SockItem> {
    sockets.iter().map(|s| SockItem(s.as_raw_fd() as u32)).collect()
}

fn group_of(groups: &[Vec<McastGrpAttrs>]) -> Option<u32> {
    let ours = groups.iter().find(|g| g.contains(&McastGrpAttrs::Name(MULTICAST_GROUP.into())))?;
    ours.iter().find_map(|a| if let McastGrpAttrs::Id(id) = a { Some(*id) } else { None })
}

/// Events of the driver.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
}

impl Monitor {
    /// The number of a device one of whose sockets has died unasked; `None`: nothing more now. Some may have been
    /// missed in a flood.
    pub fn next_dead_link(&self) -> Option<u32> {
        loop {
            let mut bytes = Vec::with_capacity(4096);
            match self.socket.recv(&mut bytes, 0) {
                // ENOBUFS: some were lost, the rest is still there.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(_) => return None,
                Ok(_) => {}
            }
            for payload in payloads::<NbdMessage>(&bytes).unwrap_or_default() {
                if let NetlinkPayload::InnerMessage(message) = payload {
                    let (header, message) = message.into_parts();
                    if header.cmd == cmd::LINK_DEAD && message.index().is_some() {
                        return message.index();
                    }
                }
            }
        }
    }
}

impl AsFd for Monitor {
    /// Readable when there is an event.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket is open as long as it lives, and the borrow keeps `self`.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

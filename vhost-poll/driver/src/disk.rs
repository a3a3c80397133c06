//! A disk as a guest has it: rings, requests, and how they are set up over the control socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::VhostUserProtocolFeatures as P;
use vhost::vhost_user::message::{FrontendReq as R, VhostUserInflight};
use vm_memory::ByteValued;

use crate::NO_STATUS;
use crate::frontend::FrontEnd;
use crate::ram::Ram;
use crate::ring::{Buf, DriverRing};

/// Virtio feature bits.
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const PACKED: u64 = 1 << 34;

/// What the guest is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtqueues.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Packed rings.
    pub packed: bool,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// Requests in indirect tables.
    pub indirect: bool,
    /// Feature bits that the driver does not want although they are offered.
    pub without: u64,
    /// Memory for requests in flight.
    pub inflight: bool,
    /// Bytes of each request's buffer.
    pub max_io: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            packed: false,
            event_idx: true,
            indirect: false,
            without: 0,
            inflight: false,
            max_io: 64 << 10,
        }
    }
}

/// A request and the memory it has to itself.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Guest address of the 16-byte header.
    pub header: u64,
    /// Guest address of the data.
    pub data: u64,
    /// Guest address of the status byte.
    pub status: u64,
    /// Guest address of an indirect table.
    pub table: u64,
}

#[derive(Debug)]
struct Queue {
    ring: DriverRing,
    kick: OwnedFd,
    call: OwnedFd,
    requests: Vec<Request>,
    free: Vec<u16>,
    /// Request by head or id of its chain.
    by_id: Vec<u16>,
}

/// A guest's disk.
pub struct Disk {
    /// The control socket.
    pub front: FrontEnd,
    /// The guest's memory.
    pub ram: Ram,
    /// As given.
    pub options: Options,
    /// As negotiated.
    pub features: u64,
    queues: Vec<Queue>,
    inflight: Option<(OwnedFd, VhostUserInflight)>,
    /// The back end's end of its own socket, from the next negotiation on.
    pub backend_req: Option<OwnedFd>,
    /// Kicks sent.
    pub kicks: u64,
}

fn state(index: usize, num: u32) -> Vec<u8> {
    [(index as u32).to_ne_bytes(), num.to_ne_bytes()].concat()
}

impl Disk {
    /// Connects to the back end at `path` and starts all queues.
    ///
    /// # Errors
    /// The system's; what the back end does not offer.
    pub fn connect(path: &Path, options: Options) -> io::Result<Self> {
        let per_queue = usize::from(options.queue_size);
        let len = usize::from(options.queues) * per_queue * (options.max_io as usize + 8192) + (4 << 20);
        let mut ram = Ram::new(len.next_multiple_of(4096));
        let queues =
            (0..options.queues).map(|_| Queue::new(&mut ram, &options)).collect::<io::Result<_>>()?;
        let front = FrontEnd::connect(path)?;
        let mut disk =
            Self { front, ram, options, features: 0, queues, inflight: None, backend_req: None, kicks: 0 };
        disk.negotiate()?;
        disk.start()?;
        Ok(disk)
    }

    /// Negotiates and starts all queues again, after a reset.
    ///
    /// # Errors
    /// As [`Disk::connect`].
    pub fn resume(&mut self) -> io::Result<()> {
        self.negotiate()?;
        self.start()
    }

    /// Connects once more, as a front end does whose back end was restarted: with the same memory, rings and memory for
    /// requests in flight.
    ///
    /// # Errors
    /// As [`Disk::connect`].
    pub fn reconnect(&mut self, path: &Path) -> io::Result<()> {
        self.front = FrontEnd::connect(path)?;
        self.resume()
    }

    fn negotiate(&mut self) -> io::Result<()> {
        let offered = self.front.number(R::GET_FEATURES)?;
        let o = &self.options;
        let mut features = offered & !o.without;
        for (bit, wanted) in [(PACKED, o.packed), (EVENT_IDX, o.event_idx), (INDIRECT, o.indirect)] {
            if wanted && offered & bit == 0 {
                return Err(io::Error::other(format!("feature {bit:#x} is not offered")));
            }
            features = if wanted { features } else { features & !bit };
        }
        let protocol = self.front.number(R::GET_PROTOCOL_FEATURES)?;
        let wanted =
            (P::MQ | P::REPLY_ACK | P::CONFIG | P::INFLIGHT_SHMFD | P::BACKEND_REQ | P::STATUS).bits();
        self.front.send(R::SET_PROTOCOL_FEATURES, &(protocol & wanted).to_ne_bytes(), &[])?;
        self.front.send(R::SET_OWNER, &[], &[])?;
        if let Some(fd) = &self.backend_req {
            self.front.send(R::SET_BACKEND_REQ_FD, &[], &[fd.as_fd()])?;
        }
        if self.features == 0 {
            // QEMU reads it once, before it negotiates, and shows its copy to the guest ever after.
            self.config()?;
        }
        self.front.send(R::SET_FEATURES, &features.to_ne_bytes(), &[])?;
        self.features = features;
        if self.options.inflight {
            self.share_inflight()?;
        }
        let table = self.ram.table();
        if !self.front.send_acked(R::SET_MEM_TABLE, &table, &[self.ram.fd()])? {
            return Err(io::Error::other("the back end refused the memory table"));
        }
        Ok(())
    }

    fn share_inflight(&mut self) -> io::Result<()> {
        if self.inflight.is_none() {
            let ask = VhostUserInflight::new(0, 0, self.options.queues, self.options.queue_size);
            let (reply, fds) = self.front.call(R::GET_INFLIGHT_FD, ask.as_slice(), &[])?;
            let mut area = VhostUserInflight::default();
            area.as_mut_slice().copy_from_slice(&reply);
            let fd = fds.into_iter().next().ok_or_else(|| io::Error::other("no in-flight memory"))?;
            self.inflight = Some((fd, area));
        }
        let Some((fd, area)) = &self.inflight else { return Ok(()) };
        self.front.send(R::SET_INFLIGHT_FD, area.as_slice(), &[fd.as_fd()])
    }

    fn start(&mut self) -> io::Result<()> {
        for index in 0..self.queues.len() {
            self.start_queue(index, self.queues[index].ring.base())?;
        }
        Ok(())
    }

    /// Sets one queue up and enables it, to go on at `base`.
    ///
    /// # Errors
    /// The system's.
    pub fn start_queue(&mut self, index: usize, base: u32) -> io::Result<()> {
        let (front, queue) = (&self.front, &self.queues[index]);
        front.send(R::SET_VRING_NUM, &state(index, self.options.queue_size.into()), &[])?;
        front.send(R::SET_VRING_BASE, &state(index, base), &[])?;
        let a = queue.ring.addrs;
        let mut addr = state(index, 0);
        for part in [a.desc, a.used, a.avail] {
            addr.extend(self.ram.user(part).to_ne_bytes());
        }
        addr.extend(0u64.to_ne_bytes());
        front.send(R::SET_VRING_ADDR, &addr, &[])?;
        front.send(R::SET_VRING_CALL, &(index as u64).to_ne_bytes(), &[queue.call.as_fd()])?;
        front.send(R::SET_VRING_KICK, &(index as u64).to_ne_bytes(), &[queue.kick.as_fd()])?;
        front.send(R::SET_VRING_ENABLE, &state(index, 1), &[])
    }

    /// Stops a queue; returns where its ring stands.
    ///
    /// # Errors
    /// The system's.
    pub fn stop_queue(&self, index: usize) -> io::Result<u32> {
        let (reply, _) = self.front.call(R::GET_VRING_BASE, &state(index, 0), &[])?;
        let base = reply.get(4..8).and_then(|b| b.try_into().ok());
        base.map(u32::from_ne_bytes).ok_or_else(|| io::Error::other("a short answer"))
    }

    /// The configuration space.
    ///
    /// # Errors
    /// The system's.
    pub fn config(&self) -> io::Result<Vec<u8>> {
        let mut ask: Vec<u8> = [0u32, 60, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
        ask.resize(72, 0);
        Ok(self.front.call(R::GET_CONFIG, &ask, &[])?.0.split_off(12))
    }

    /// Turns the write cache on or off.
    ///
    /// # Errors
    /// The system's.
    pub fn set_write_back(&self, on: bool) -> io::Result<()> {
        let mut set: Vec<u8> = [32u32, 1, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
        set.push(u8::from(on));
        self.front.send(R::SET_CONFIG, &set, &[])
    }

    /// Sectors of the disk.
    ///
    /// # Errors
    /// The system's.
    pub fn sectors(&self) -> io::Result<u64> {
        let config = self.config()?;
        let bytes = config.get(..8).and_then(|b| b.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(|| io::Error::other("a short configuration"))
    }

    /// The ring of a queue.
    pub fn ring(&mut self, queue: usize) -> &mut DriverRing {
        &mut self.queues[queue].ring
    }

    /// A request that is not in flight, `None` if all are.
    pub fn take(&mut self, queue: usize) -> Option<u16> {
        self.queues[queue].free.pop()
    }

    /// The memory of a request.
    pub fn request(&self, queue: usize, slot: u16) -> Request {
        self.queues[queue].requests[usize::from(slot)]
    }

    /// Adds a request to the ring: `kind` is VIRTIO_BLK_T_*, data goes from the guest if `out`. False: the ring is full,
    /// and the slot is free again.
    pub fn submit(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, len: u32, out: bool) -> bool {
        let r = self.request(queue, slot);
        let data = Buf { addr: r.data, len, write: !out };
        if len == 0 {
            self.submit_bufs(queue, slot, kind, sector, &[])
        } else {
            self.submit_bufs(queue, slot, kind, sector, &[data])
        }
    }

    /// As [`Disk::submit`], with any data buffers.
    pub fn submit_bufs(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, data: &[Buf]) -> bool {
        let r = self.request(queue, slot);
        // SAFETY: the request's own header and status in the guest's memory, aligned to 16.
        unsafe {
            let header = self.ram.ptr(r.header, 16);
            header.cast::<u64>().write_volatile(kind.into());
            header.add(8).cast::<u64>().write_volatile(sector);
            self.ram.ptr(r.status, 1).write_volatile(NO_STATUS);
        }
        let header = Buf { addr: r.header, len: 16, write: false };
        let status = Buf { addr: r.status, len: 1, write: true };
        let mut list = [header; 3];
        let long: Vec<Buf>;
        let bufs: &[Buf] = match data {
            [] => {
                list[1] = status;
                &list[..2]
            }
            [one] => {
                (list[1], list[2]) = (*one, status);
                &list
            }
            many => {
                long = [header].iter().chain(many).chain(&[status]).copied().collect();
                &long
            }
        };
        let q = &mut self.queues[queue];
        let id = if self.options.indirect {
            let table = q.ring.write_table(&self.ram, r.table, bufs);
            q.ring.add(&[table], true)
        } else {
            q.ring.add(bufs, false)
        };
        match id {
            Some(id) => q.by_id[usize::from(id)] = slot,
            None => q.free.push(slot),
        }
        id.is_some()
    }

    /// Shows the device what was submitted, and kicks it if it wants that.
    pub fn publish(&mut self, queue: usize) {
        let q = &mut self.queues[queue];
        if q.ring.publish() {
            self.kick(queue);
        }
    }

    /// Kicks the device, whether it wants that or not.
    pub fn kick(&mut self, queue: usize) {
        self.kicks += 1;
        let _ = rustix::io::write(&self.queues[queue].kick, &1u64.to_ne_bytes());
    }

    /// The next completed request: its slot and status. The slot is free again.
    pub fn poll(&mut self, queue: usize) -> Option<(u16, u8)> {
        let q = &mut self.queues[queue];
        let (id, _) = q.ring.pop()?;
        let slot = q.by_id[usize::from(id)];
        q.free.push(slot);
        // SAFETY: the request's status byte.
        let status = unsafe { self.ram.ptr(q.requests[usize::from(slot)].status, 1).read_volatile() };
        Some((slot, status))
    }

    /// Interrupts that came since the last look.
    pub fn calls(&self, queue: usize) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.queues[queue].call, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// The eventfd of kicks.
    pub fn kick_fd(&self, queue: usize) -> &OwnedFd {
        &self.queues[queue].kick
    }

    /// The eventfd of interrupts.
    pub fn call_fd(&self, queue: usize) -> &OwnedFd {
        &self.queues[queue].call
    }

    /// One request from beginning to end, on an idle queue 0: its status. Data of a read is at the request's buffer.
    ///
    /// # Errors
    /// No answer within 20 s.
    pub fn run(&mut self, kind: u32, sector: u64, len: u32, out: bool) -> io::Result<(u16, u8)> {
        let slot = self.take(0).ok_or_else(|| io::Error::other("no request is free"))?;
        if !self.submit(0, slot, kind, sector, len, out) {
            return Err(io::Error::other("the ring is full"));
        }
        self.publish(0);
        self.wait(0)
    }

    /// The next completion of `queue`.
    ///
    /// # Errors
    /// None within two minutes.
    pub fn wait(&mut self, queue: usize) -> io::Result<(u16, u8)> {
        let until = std::time::Instant::now() + crate::PATIENCE;
        while std::time::Instant::now() < until {
            if let Some(done) = self.poll(queue) {
                return Ok(done);
            }
            std::thread::yield_now();
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Writes `data` at `sector`.
    ///
    /// # Errors
    /// No answer, or another status than success.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> io::Result<()> {
        let slot = *self.queues[0].free.last().ok_or_else(|| io::Error::other("no request is free"))?;
        self.ram.write(self.request(0, slot).data, data);
        succeeded(self.run(1, sector, data.len() as u32, true)?).map(drop)
    }

    /// Reads `len` bytes at `sector`.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn read(&mut self, sector: u64, len: u32) -> io::Result<Vec<u8>> {
        let slot = succeeded(self.run(0, sector, len, false)?)?;
        Ok(self.ram.read(self.request(0, slot).data, len as usize))
    }

    /// Makes all completed writes stable.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn flush(&mut self) -> io::Result<()> {
        succeeded(self.run(4, 0, 0, true)?).map(drop)
    }
}

fn succeeded((slot, status): (u16, u8)) -> io::Result<u16> {
    if status == 0 { Ok(slot) } else { Err(io::Error::other(format!("status {status}"))) }
}

impl Queue {
    fn new(ram: &mut Ram, options: &Options) -> io::Result<Self> {
        let ring = DriverRing::new(ram, options.queue_size, options.packed, options.event_idx);
        let requests: Vec<Request> = (0..options.queue_size)
            .map(|_| {
                let header = ram.alloc(64, 64);
                Request {
                    header,
                    status: header + 16,
                    data: ram.alloc(options.max_io as usize, 4096),
                    table: ram.alloc(16 * 130, 16),
                }
            })
            .collect();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            ring,
            kick: event()?,
            call: event()?,
            requests,
            free: (0..options.queue_size).rev().collect(),
            by_id: vec![0; options.queue_size.into()],
        })
    }
}

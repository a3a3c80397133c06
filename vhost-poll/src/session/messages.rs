//! What each message does.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vhost::vhost_user::VhostUserProtocolFeatures as P;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight};
use vm_memory::ByteValued;

use super::vring::Vring;
use super::{End, LaneUse, Pending, Session};
use crate::blk;
use crate::disk::Disk;
use crate::fd::{Kick, bell, check};
use crate::inflight::InflightArea;
use crate::lane::LaneHandle;
use crate::memory::{GuestMemory, MAX_REGIONS, RegionSpec};
use crate::queue::{PACKED_START, QueueSetup};
use crate::ring::{Base, RingConfig};
use crate::wire::{Header, Message, VringFd};

/// Bytes of configuration space that GET_CONFIG may ask for: what is behind the defined ones reads as zero.
const MAX_CONFIG: usize = 256;

fn protocol_features() -> P {
    P::MQ
        | P::REPLY_ACK
        | P::BACKEND_REQ
        | P::CONFIG
        | P::INFLIGHT_SHMFD
        | P::RESET_DEVICE
        | P::CONFIGURE_MEM_SLOTS
        | P::STATUS
}

impl<D: Disk> Session<D> {
    /// Does what `message` says. What is left in `fds` afterwards may be closed here, if all is well.
    pub(super) fn obey(
        &mut self,
        header: Header,
        message: Message,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<(), End> {
        let request = header.request;
        let ack = (header.needs_reply() && self.protocol & P::REPLY_ACK.bits() != 0).then_some(request);
        match message {
            Message::GetFeatures => return self.answer(request, self.offered()),
            Message::GetProtocolFeatures => return self.answer(request, protocol_features().bits()),
            Message::GetQueueNum => return self.answer(request, self.shared.options.queues().into()),
            Message::GetMaxMemSlots => return self.answer(request, MAX_REGIONS as u64),
            Message::GetStatus => return self.answer(request, self.status),
            Message::GetConfig { offset, size, flags } => return self.config(request, offset, size, flags),
            Message::GetVringBase { index } => return self.stop(request, index),
            Message::GetInflightFd { queues, queue_size } => {
                return self.new_inflight(request, queues, queue_size);
            }
            Message::SetMemTable(list) => return self.set_memory_table(&list, fds, ack),
            Message::AddMemReg(spec) => return self.add_memory(spec, fds, ack),
            Message::RemMemReg(spec) => {
                // Of use to nobody, but it has to be closed.
                if let Some(fd) = fds.first() {
                    GuestMemory::check(spec, fd.as_fd())?;
                }
                let new = self.memory.without(spec)?;
                return self.set_memory(new, ack);
            }
            Message::ResetDevice => return self.start_reset(true, ack),
            Message::ResetOwner => return self.start_reset(false, ack),
            Message::SetStatus(status) => {
                self.status = status & 0xff;
                if self.status == 0 {
                    return self.start_reset(false, ack);
                }
            }
            Message::SetOwner => {}
            Message::SetFeatures(features) => self.set_features(features)?,
            Message::SetProtocolFeatures(features) => {
                let offered = protocol_features().bits();
                if features & !offered != 0 {
                    return Err(End::Features { got: features, offered });
                }
                self.protocol = features;
            }
            Message::SetVringNum { index, num } => {
                self.stopped_vring(index, "SET_VRING_NUM")?.config.size = num
            }
            Message::SetVringAddr { index, desc, avail, used } => {
                // QEMU repeats it while the ring runs, to switch logging: then it says nothing new.
                let vring = self.vring(index)?;
                let c = vring.config;
                if vring.is_running() && (c.desc, c.avail, c.used) != (desc, avail, used) {
                    return Err(End::Running("SET_VRING_ADDR with other addresses"));
                }
                vring.set_addr(desc, avail, used);
            }
            Message::SetVringBase { index, base } => {
                self.stopped_vring(index, "SET_VRING_BASE")?.base = Some(base);
            }
            Message::SetVringFd { index, which, .. } => self.set_vring_fd(index, which, fds)?,
            Message::SetVringEnable { index, enable } => self.set_enabled(index, enable)?,
            Message::SetBackendReqFd => {
                if self.backend_req.is_none() {
                    self.room_for_one()?;
                }
                // The old one may not be closed here.
                self.rest.extend(std::mem::replace(&mut self.backend_req, fds.pop()));
            }
            Message::SetConfig { offset, data } => self.set_config(offset, &data),
            Message::SetInflightFd { len, offset, queues, queue_size } => {
                if let Some(fd) = fds.first() {
                    self.use_inflight(InflightArea::open(fd.as_fd(), offset, len, queues, queue_size)?);
                }
            }
        }
        self.acknowledge(ack)
    }

    fn answer(&self, request: u32, value: u64) -> Result<(), End> {
        Ok(self.conn.reply(request, &value.to_ne_bytes(), None)?)
    }

    /// Success, to a front end that wants to know.
    pub(super) fn acknowledge(&self, ack: Option<u32>) -> Result<(), End> {
        match ack {
            Some(request) => self.answer(request, 0),
            None => Ok(()),
        }
    }

    fn offered(&self) -> u64 {
        blk::features(&self.shared.info(), self.shared.options.packed_ring)
    }

    fn set_features(&mut self, features: u64) -> Result<(), End> {
        // What was offered before a resize or change to read-only stays right; bits that never were offered do not.
        let offered = self.offered();
        if features & !offered != 0 {
            return Err(End::Features { got: features, offered });
        }
        self.features = features;
        self.negotiated = true;
        self.renew_write_back();
        Ok(())
    }

    /// Virtio 1.2, 5.2.6.2. Without a way to flush there must be nothing to flush, and a driver that can choose is asked.
    /// What it chose outlives SET_FEATURES, which front ends send at every start, and a reset of the guest, after which QEMU
    /// still shows it. Unknown (the front end knows it from a former process of this kind, or of another): the safe one.
    fn renew_write_back(&self) {
        let has = |feature| self.features & feature != 0;
        let chosen = !has(blk::F_CONFIG_WCE) || self.driver_write_back == Some(true);
        self.write_back.store(has(blk::F_FLUSH) && chosen, Ordering::Relaxed);
    }

    fn driver_chose(&mut self, write_back: bool) {
        self.driver_write_back = Some(write_back);
        if let Some(area) = &self.inflight {
            area.set_write_back(write_back);
        }
        self.renew_write_back();
    }

    /// The memory says what a former process of this kind knew. Two that differ come from a migration.
    fn use_inflight(&mut self, area: InflightArea) {
        let before = area.write_back();
        self.inflight = Some(area);
        let both = [self.driver_write_back, before];
        if let Some(write_back) = both.into_iter().flatten().reduce(|a, b| a && b) {
            self.driver_chose(write_back);
        }
    }

    fn config(&mut self, request: u32, offset: u32, size: u32, flags: u32) -> Result<(), End> {
        let (from, len) = (offset as usize, size as usize);
        let mut payload: Vec<u8> = [offset, size, flags].iter().flat_map(|n| n.to_ne_bytes()).collect();
        if from + len > MAX_CONFIG {
            // As the specification has it: no payload says that it failed.
            return Ok(self.conn.reply(request, &[], None)?);
        }
        let mut space = [0; MAX_CONFIG];
        // Front ends copy what they read before they negotiate, and show it to their driver from then on.
        if !self.negotiated
            && self.driver_write_back.is_none()
            && (from..from + len).contains(&blk::CONFIG_WCE)
        {
            self.driver_write_back = Some(true);
        }
        let write_back = self.driver_write_back.unwrap_or(self.write_back.load(Ordering::Relaxed));
        let config = blk::config(&self.shared.info(), self.shared.options.queues(), write_back);
        space[..config.len()].copy_from_slice(&config);
        payload.extend(&space[from..from + len]);
        Ok(self.conn.reply(request, &payload, None)?)
    }

    fn set_config(&mut self, offset: u32, data: &[u8]) {
        // Before the negotiation it is for what will be negotiated.
        let may_choose = !self.negotiated || self.features & blk::F_CONFIG_WCE != 0;
        if offset as usize == blk::CONFIG_WCE && data.len() == 1 && may_choose {
            self.driver_chose(data[0] != 0);
        } else {
            tracing::debug!(session = self.key.id, offset, "vhost: a write to read-only configuration");
        }
    }

    fn new_inflight(&mut self, request: u32, queues: u16, queue_size: u16) -> Result<(), End> {
        let (area, fd, len) = InflightArea::create(queues, queue_size)?;
        self.use_inflight(area);
        let answer =
            VhostUserInflight { mmap_size: len as u64, mmap_offset: 0, num_queues: queues, queue_size };
        Ok(self.conn.reply(request, answer.as_slice(), Some(fd.as_fd()))?)
    }

    fn set_memory_table(
        &mut self,
        list: &[RegionSpec],
        fds: &[OwnedFd],
        ack: Option<u32>,
    ) -> Result<(), End> {
        let table: Vec<_> = list.iter().copied().zip(fds.iter()).collect();
        let new = GuestMemory::map(&self.shared.options.registry, &self.memory, &table)?;
        self.set_memory(new, ack)
    }

    fn add_memory(&mut self, spec: RegionSpec, fds: &[OwnedFd], ack: Option<u32>) -> Result<(), End> {
        let Some(fd) = fds.first() else { return self.acknowledge(ack) };
        let new = self.memory.with(&self.shared.options.registry, spec, fd.as_fd())?;
        self.set_memory(new, ack)
    }

    /// Running queues change over when nothing of them is in flight.
    fn set_memory(&mut self, new: GuestMemory, ack: Option<u32>) -> Result<(), End> {
        let old = std::mem::replace(&mut self.memory, Arc::new(new));
        let mut left = 0;
        for (index, lane) in self.running() {
            lane.set_memory::<D>(index, self.memory.clone());
            left += 1;
        }
        if left > 0 {
            self.pending = Pending::Swap { left, ack, _old: old };
            return Ok(());
        }
        self.start_all();
        self.acknowledge(ack)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, End> {
        let most = self.shared.options.queues();
        if index >= u32::from(most) {
            return Err(End::NoQueue { index, most });
        }
        let at = index as usize;
        if self.vrings.len() <= at {
            // Without protocol features there is no message to enable a ring.
            let enabled = self.features & blk::F_PROTOCOL_FEATURES == 0;
            self.vrings.resize_with(at + 1, || Vring::new(enabled));
        }
        Ok(&mut self.vrings[at])
    }

    fn stopped_vring(&mut self, index: u32, what: &'static str) -> Result<&mut Vring, End> {
        let vring = self.vring(index)?;
        if vring.is_running() { Err(End::Running(what)) } else { Ok(vring) }
    }

    fn set_vring_fd(&mut self, index: u32, which: VringFd, fds: &mut Vec<OwnedFd>) -> Result<(), End> {
        fds.first().map(check).transpose()?;
        let mut fd = fds.pop();
        if fd.is_some() && !self.vring(index)?.has_fd(which) {
            match self.room_for_one() {
                // Nothing but a word about a broken ring goes there: a front end does without.
                Err(why) if which == VringFd::Err => {
                    tracing::debug!(
                        session = self.key.id,
                        queue = index,
                        "vhost: no error descriptor: {why}"
                    );
                    fd = None;
                }
                room => room?,
            }
        }
        let vring = self.vring(index)?;
        let lane = vring.lane();
        let at = index as u16;
        match which {
            VringFd::Kick => {
                let kick = fd.map(Kick::new).map(Arc::new);
                vring.set_kick(kick.clone());
                match lane {
                    Some(lane) => self.lanes[lane].handle.set_kick::<D>(at, kick),
                    None => self.start_all(),
                }
            }
            VringFd::Call | VringFd::Err => {
                let bell = fd.map(bell).transpose()?.map(Arc::new);
                let place = if which == VringFd::Call { &mut vring.call } else { &mut vring.err };
                place.clone_from(&bell);
                match lane.map(|lane| &self.lanes[lane].handle) {
                    Some(lane) if which == VringFd::Call => lane.set_call::<D>(at, bell),
                    Some(lane) => lane.set_err::<D>(at, bell),
                    None => {}
                }
            }
        }
        Ok(())
    }

    fn set_enabled(&mut self, index: u32, enable: bool) -> Result<(), End> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        match vring.lane() {
            Some(lane) => self.lanes[lane].handle.set_enabled::<D>(index as u16, enable),
            None => self.start_all(),
        }
        Ok(())
    }

    /// Starts the queues that have all that they need.
    fn start_all(&mut self) {
        if self.memory.is_empty() {
            return;
        }
        for index in 0..self.vrings.len() {
            if self.vrings[index].may_start() {
                self.start_queue(index);
            }
        }
    }

    fn start_queue(&mut self, index: usize) {
        let (reactor, place) = self.shared.place();
        let lane = self.lane_on(reactor);
        let has = |feature| self.features & feature != 0;
        let packed = has(blk::F_RING_PACKED);
        let vring = &mut self.vrings[index];
        let ring = RingConfig {
            packed,
            event_idx: has(blk::F_EVENT_IDX),
            indirect: has(blk::F_INDIRECT_DESC),
            ..vring.config
        };
        let setup = QueueSetup {
            controller: self.shared.name.as_str().into(),
            index: index as u16,
            ring,
            memory: self.memory.clone(),
            base: vring.base.unwrap_or(if packed { PACKED_START } else { 0 }),
            inflight: self.inflight.clone(),
            kick: vring.kick.clone(),
            call: vring.call.clone(),
            err: vring.err.clone(),
            enabled: vring.enabled,
            write_back: self.write_back.clone(),
            serial: blk::serial(&self.shared.info()),
            coalescing: self.shared.coalescing.get(),
        };
        vring.started(lane, place);
        self.lanes[lane].handle.start::<D>(setup);
        if !std::mem::replace(&mut self.has_run, true) {
            // The disk may have changed its size while nobody served this front end, which asks only when it is told.
            self.config_changed();
        }
    }

    /// The lane on reactor `reactor`, made if it is not there.
    fn lane_on(&mut self, reactor: usize) -> usize {
        if let Some(lane) = self.lanes.iter().position(|l| l.reactor == reactor) {
            return lane;
        }
        let handle =
            LaneHandle { session: self.key.clone(), reactor: self.shared.options.reactors[reactor].clone() };
        let inflight = Arc::new(AtomicU32::new(0));
        handle.open::<D>(self.shared.disk(), inflight.clone());
        self.lanes.push(LaneUse { handle, reactor, inflight });
        self.lanes.len() - 1
    }

    fn running(&self) -> impl Iterator<Item = (u16, &LaneHandle)> {
        let lane = |v: &Vring| v.lane().map(|l| &self.lanes[l].handle);
        self.vrings.iter().enumerate().filter_map(move |(i, v)| Some((i as u16, lane(v)?)))
    }

    /// Asks all running queues to finish; returns how many.
    pub(super) fn stop_all(&self) -> usize {
        self.running().map(|(index, lane)| lane.stop::<D>(index)).count()
    }

    fn stop(&mut self, request: u32, index: u32) -> Result<(), End> {
        let vring = self.vring(index)?;
        let base = vring.base();
        match vring.lane() {
            Some(lane) => {
                self.lanes[lane].handle.stop::<D>(index as u16);
                self.pending = Pending::Stop { request };
                Ok(())
            }
            None => {
                vring.refused();
                self.answer_base(request, index, base)
            }
        }
    }

    pub(super) fn answer_base(&self, request: u32, index: u32, base: Base) -> Result<(), End> {
        debug_assert_eq!(request, u32::from(FrontendReq::GET_VRING_BASE));
        let payload = [index.to_ne_bytes(), base.to_ne_bytes()].concat();
        Ok(self.conn.reply(request, &payload, None)?)
    }

    fn start_reset(&mut self, device: bool, ack: Option<u32>) -> Result<(), End> {
        match self.stop_all() {
            0 => self.reset(device, ack),
            left => {
                self.pending = Pending::Reset { left, ack, device };
                Ok(())
            }
        }
    }

    /// All queues are stopped.
    pub(super) fn reset(&mut self, device: bool, ack: Option<u32>) -> Result<(), End> {
        if device {
            self.vrings.clear();
            (self.features, self.status, self.inflight) = (0, 0, None);
            self.renew_write_back();
        }
        self.acknowledge(ack)
    }
}

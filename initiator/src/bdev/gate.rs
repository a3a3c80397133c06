//! When requests may go: devices that open, are lost, and are given up.

use std::time::Instant;

use bdev::Status;

use super::disks::{Device, Disks, Gate};
use super::request::Opened;

impl<S: Copy + Eq> Disks<S> {
    /// Control: `disk` is open at its server. Requests that change data and were left unanswered by a lost session
    /// wait until `repeat_at`; all others go now.
    pub fn open(&mut self, disk: u64, open: Opened<S>, repeat_at: Option<Instant>) {
        let Some(device) = self.find(disk) else { return };
        let Some(d) = self.devices.get_mut(device).filter(|d| d.epoch < open.epoch) else { return };
        d.epoch = open.epoch;
        d.gate = Gate::Open(open);
        d.look = true;
        d.repeat_at = repeat_at.filter(|_| !d.lost.is_empty());
        self.activate(device);
    }

    /// Control: nothing of what lost sessions left of `disk` can be under way any more.
    pub fn repeat(&mut self, disk: u64) {
        if let Some(d) = self.find(disk).and_then(|d| self.devices.get_mut(d)) {
            d.repeat_at = None;
            d.look = true;
        }
    }

    /// Control: some of what the fence of `disk` kept may be changed now.
    pub fn unfence(&mut self, disk: u64) {
        if let Some(device) = self.find(disk) {
            self.release_fenced(device);
        }
    }

    /// Puts what the fence holds back into the queue, in its old order and before everything newer; what is still
    /// fenced comes back when it is to be cut.
    pub(super) fn release_fenced(&mut self, device: u32) {
        let Some(d) = self.devices.get_mut(device) else { return };
        d.fenced_until = None;
        while let Some(place) = d.fenced.pop_back() {
            if let Some(r) = self.requests.get_mut(place) {
                r.listed = true;
                d.queue.push_front(place);
            }
        }
        self.activate(device);
    }

    /// Control: the opening `epoch` of `disk` has ended; requests wait.
    pub fn close(&mut self, disk: u64, epoch: u64, now: Instant) {
        let Some(device) = self.find(disk) else { return };
        if self.devices.get(device).is_some_and(|d| d.epoch <= epoch) {
            self.hold(device, now);
        }
    }

    /// Control: `disk` is given up. Requests end with `status`, new ones too.
    pub fn fail(&mut self, disk: u64, status: Status) {
        if let Some(device) = self.find(disk) {
            self.fail_device(device, status);
        }
    }

    /// Control: requests may wait again for a device that was given up.
    pub fn revive(&mut self, disk: u64, now: Instant) {
        let device = self.find(disk).and_then(|d| self.devices.get_mut(d));
        if let Some(d) = device.filter(|d| matches!(d.gate, Gate::Failed(_))) {
            d.gate = Gate::Held { since: now };
        }
    }

    fn fail_device(&mut self, device: u32, status: Status) {
        let Some(d) = self.devices.get_mut(device) else { return };
        d.gate = Gate::Failed(status);
        self.end_unsent(|r| r.device == device, status);
    }

    /// All devices of `session` wait: it is lost here.
    pub fn session_down(&mut self, session: S, now: Instant) {
        let of_it = |gate: &Gate<S>| matches!(gate, Gate::Open(open) if open.session == session);
        let devices: Vec<u32> = self.devices.iter().filter(|(_, d)| of_it(&d.gate)).map(|(i, _)| i).collect();
        devices.into_iter().for_each(|device| self.hold(device, now));
    }

    /// Requests of an open device wait from now on.
    pub(super) fn hold(&mut self, device: u32, now: Instant) {
        let device = self.devices.get_mut(device).filter(|d| matches!(d.gate, Gate::Open(_)));
        if let Some(d) = device {
            d.gate = Gate::Held { since: now };
            d.repeat_at = None;
        }
    }

    /// Ends the wait of devices that nobody should wait for any longer.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let late = |(i, d): (u32, &Device<S>)| d.fail_at().filter(|at| *at <= now).map(|_| i);
        // One at a time: nothing is late in an ordinary turn, so nothing is gathered.
        let Some(device) = self.devices.iter().find_map(late) else { return false };
        self.fail_device(device, Status::TimedOut);
        true
    }

    /// When [`Disks::run`] has something to do though nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let repeat = |d: &Device<S>| d.repeat_at.filter(|_| !d.lost.is_empty());
        let is_open = |d: &Device<S>| matches!(d.gate, Gate::Open(_));
        let fenced = |d: &Device<S>| d.fenced_until.filter(|_| is_open(d) && !d.fenced.is_empty());
        let waits = self.devices.iter().flat_map(|(_, d)| [d.fail_at(), repeat(d), fenced(d)]);
        waits.chain([self.retry_at]).flatten().min()
    }
}

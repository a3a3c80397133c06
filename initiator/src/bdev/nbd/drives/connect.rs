//! Connections come up, and are lost.

use std::sync::Arc;

use super::*;
use crate::bdev::nbd::lane::{NewLink, STALE};

/// Pause before the first attempt after a loss: a server that closes one connection closes the others, too.
const AT_ONCE: Duration = Duration::from_millis(50);

impl Drives {
    /// Begins an attempt.
    pub(super) fn connect(&mut self, cx: &mut Turn<'_>, who: Who) {
        let Some(drive) = self.drives.get_mut(&who.0) else { return };
        let Some(conn) = drive.conns.get_mut(who.1 as usize) else { return };
        if conn.dialling || conn.up.is_some() {
            return;
        }
        (conn.trying, conn.dialling) = (true, true);
        let (server, options) = (drive.params.server.clone(), drive.options.clone());
        let started = self.dialer.borrow_mut().start(cx, who, &server, options);
        if let Err(e) = started {
            self.not_connected(cx, who, &e);
        }
    }

    /// An attempt is over.
    pub(super) fn dialled(&mut self, cx: &mut Turn<'_>, who: Who, result: Result<Dialled, NbdError>) {
        let dead = |d: &Drive| d.given_up || d.state == State::Deleted;
        if self.drives.get(&who.0).is_none_or(dead) {
            return;
        }
        match result {
            Ok(dialled) => match self.connected(cx, who, dialled) {
                Ok(()) => {}
                Err(e) if self.drives.get(&who.0).is_some_and(|d| d.disk.is_some()) => {
                    let text = if let NbdError::Export(text) = e { text } else { e.to_string() };
                    self.give_up(cx, who.0, &text);
                }
                Err(e) => self.not_connected(cx, who, &e),
            },
            Err(e) => self.not_connected(cx, who, &e),
        }
    }

    /// A connection is up: makes the bdev if it is the first, and hands it to its reactor.
    fn connected(&mut self, cx: &mut Turn<'_>, who: Who, dialled: Dialled) -> Result<(), NbdError> {
        let disk = self.disk_for(who.0, &dialled.agreed)?;
        let Some(drive) = self.drives.get_mut(&who.0) else { return Ok(()) };
        let Some(conn) = drive.conns.get_mut(who.1 as usize) else { return Ok(()) };
        let agreed = dialled.agreed.clone();
        conn.reconnects += u64::from(conn.failures > 0);
        (conn.trying, conn.dialling, conn.failures) = (false, false, 0);
        let (address, cipher) = (dialled.address.clone(), dialled.cipher.clone());
        conn.up = Some(Up { address, cipher, since: cx.now });
        let link = NewLink {
            index: who.1,
            dialled,
            limits: geometry::limits(&agreed),
            always_fua: geometry::always_fua(&agreed),
            io_timeout: drive.params.timeouts.io,
        };
        let reactor = self.reactors[conn.reactor].clone();
        drive.agreed = Some(agreed);
        drive.reason = None;
        let (name, was) = (drive.params.name.clone(), drive.state);
        drive.state = State::Open;
        let lane_disk = disk.clone();
        NbdLane::send(&reactor, move |lane, cx| lane.add(cx, lane_disk, link));
        self.resize(who.0, &disk);
        if was != State::Open {
            tracing::info!(bdev = name, blocks = disk.blocks(), "NBD device open");
        }
        self.connect_others(cx, who.0);
        self.shown(who.0);
        self.answer_open(who.0);
        Ok(())
    }

    /// Tells those who wait for a device that it is open, once every connection has been tried: whoever opens a channel
    /// then finds those that there are.
    fn answer_open(&mut self, number: u64) {
        let Some(drive) = self.drives.get_mut(&number).filter(|d| d.state == State::Open) else { return };
        if drive.conns.iter().all(|c| c.up.is_some() || c.failures > 0) {
            let name = drive.params.name.clone();
            drive.waiting.drain(..).for_each(|done| done(Ok(name.clone())));
        }
    }

    /// The bdev that the server's description goes with, made if there is none yet.
    fn disk_for(&mut self, number: u64, agreed: &Agreed) -> Result<Arc<NbdDisk>, NbdError> {
        let drive = self.drives.get_mut(&number).ok_or_else(|| NbdError::Export("it was deleted".into()))?;
        let several = drive.conns.len() > 1;
        if let Some(disk) = &drive.disk {
            let misfit = geometry::misfit(disk.info(), several, agreed);
            return misfit.map_or_else(|| Ok(disk.clone()), |text| Err(NbdError::Export(text)));
        }
        if let Some(text) = geometry::unusable(agreed) {
            return Err(NbdError::Export(text));
        }
        let (reactors, home) = (self.reactors.len(), drive.place.index());
        let multi = agreed.flags.has(nbd_proto::wire::TransmissionFlags::CAN_MULTI_CONN);
        let wanted = usize::from(drive.params.connections.unwrap_or(reactors.min(4) as u16));
        let count = if multi { wanted } else { 1 };
        drive.conns.extend((1..count).map(|i| Conn::new((home + i) % reactors)));
        let p = &drive.params;
        // The same after a restart with the same configuration, for which `save_config` writes it.
        let uuid = p.uuid.unwrap_or_else(uuid::Uuid::new_v4);
        let info = geometry::info(&p.name, uuid, p.read_only, agreed);
        // The first of them is home.
        let mut places: Vec<usize> = Vec::new();
        for conn in &drive.conns {
            if !places.contains(&conn.reactor) {
                places.push(conn.reactor);
            }
        }
        let home = self.reactors[home].clone();
        let blocks = geometry::blocks(agreed);
        let disk = Arc::new(NbdDisk::new(info, number, blocks, p.timeouts.fast_io_fail, (places, home)));
        // For writes of users that leave without waiting.
        disk.fence().set_hold(STALE);
        let registered = self.manager.register(disk.clone());
        if let Err(e) = registered {
            drive.conns.truncate(1);
            return Err(NbdError::Bdev { text: e.to_string(), errno: e.errno() });
        }
        drive.params.uuid = Some(uuid);
        drive.disk = Some(disk.clone());
        drive.registered = true;
        Ok(disk)
    }

    /// Begins to connect what else the device is to have.
    fn connect_others(&mut self, cx: &mut Turn<'_>, number: u64) {
        for index in self.idle(number) {
            let fresh = self.drives.get(&number).and_then(|d| d.conns.get(index as usize));
            if fresh.is_some_and(|c| c.failures == 0) {
                self.connect(cx, (number, index));
            }
        }
    }

    /// An attempt failed: who waits is told, and a device that nobody wants to keep goes.
    pub(super) fn not_connected(&mut self, cx: &mut Turn<'_>, who: Who, error: &NbdError) {
        let Some(drive) = self.drives.get_mut(&who.0) else { return };
        if let Some(conn) = drive.conns.get_mut(who.1 as usize) {
            (conn.trying, conn.dialling) = (false, false);
            conn.failures = conn.failures.saturating_add(1);
        }
        let text = error.to_string();
        if drive.reason.as_ref() != Some(&text) {
            tracing::warn!(bdev = drive.params.name, why = text, "NBD server not connected");
            drive.reason = Some(text);
        }
        let first = drive.state == State::Init && !drive.waiting.is_empty() && !drive.params.keep_trying;
        if first {
            self.drives
                .remove(&who.0)
                .into_iter()
                .flat_map(|d| d.waiting)
                .for_each(|done| done(Err(error.clone())));
            return;
        }
        if drive.state == State::Init {
            let name = drive.params.name.clone();
            drive.waiting.drain(..).for_each(|done| done(Ok(name.clone())));
        } else if drive.state == State::Closed {
            self.answer_waiting(who.0, error);
        }
        self.answer_open(who.0);
        self.shown(who.0);
        self.try_later(cx, who);
    }

    /// A connection was lost.
    pub(super) fn link_ended(&mut self, cx: &mut Turn<'_>, ended: LinkEnded) {
        let Some(drive) = self.drives.get_mut(&ended.number) else { return };
        let Some(conn) = drive.conns.get_mut(ended.index as usize) else { return };
        // Closed here, or lost before it was given up.
        if conn.up.take().is_none() || drive.given_up {
            return;
        }
        conn.failures = 1;
        let name = &drive.params.name;
        tracing::warn!(bdev = name, connection = ended.index, why = ended.why, "NBD connection lost");
        drive.reason = Some(ended.why);
        if drive.state == State::Deleted {
            // Nothing will let requests go on that its last users wait for.
            let number = ended.number;
            self.on_lanes(move |lane, cx| lane.fail(cx, number, GONE));
            return;
        }
        if drive.conns.iter().all(|c| c.up.is_none()) {
            drive.state = State::Closed;
            drive.since = cx.now;
        }
        self.shown(ended.number);
        self.try_later(cx, (ended.number, ended.index));
    }

    /// Begins the next attempt in its time, unless the device has been closed for too long.
    fn try_later(&mut self, cx: &mut Turn<'_>, who: Who) {
        let Some(drive) = self.drives.get_mut(&who.0) else { return };
        let timeouts = drive.params.timeouts;
        let Some(conn) = drive.conns.get_mut(who.1 as usize) else { return };
        conn.trying = true;
        let delay = if conn.failures <= 1 { AT_ONCE } else { timeouts.reconnect_delay };
        let left = timeouts.ctrlr_loss.map(|loss| (drive.since + loss).saturating_duration_since(cx.now));
        let wait = if drive.state == State::Closed { left.map_or(delay, |l| delay.min(l)) } else { delay };
        Self::after(cx, wait, move |d, cx| d.try_again(cx, who));
    }

    fn try_again(&mut self, cx: &mut Turn<'_>, who: Who) {
        let Some(drive) = self.drives.get_mut(&who.0) else { return };
        if drive.given_up || drive.state == State::Deleted || self.ending {
            return;
        }
        let late = drive.params.timeouts.ctrlr_loss.is_some_and(|loss| cx.now >= drive.since + loss);
        if drive.state == State::Closed && late {
            let why = drive.reason.clone().unwrap_or_default();
            return self.give_up(cx, who.0, &format!("not open within ctrlr_loss_timeout_sec: {why}"));
        }
        let waits = drive.conns.get(who.1 as usize).is_some_and(|c| c.trying && c.up.is_none());
        if waits {
            self.connect(cx, who);
        }
    }

    /// Gives the bdev the size that the server said last.
    fn resize(&mut self, number: u64, disk: &NbdDisk) {
        let Some(agreed) = self.drives.get(&number).and_then(|d| d.agreed.as_ref()) else { return };
        let (old, new) = (disk.blocks(), geometry::blocks(agreed));
        if new == old {
            return;
        }
        disk.set_blocks(new);
        let name = disk.info().name.clone();
        tracing::info!(bdev = name, old, new, "NBD device resized");
        if let Err(error) = self.manager.resized(&name) {
            tracing::debug!(%error, "resize");
        }
    }
}

//! A device on one reactor: its connections, and what is left of former ones.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bdev::Op;
use nbd_poll::client::{Connection, Remains};
use nbd_proto::client::{Ask, Command, Unsendable};
use reactor::Turn;
use rnbd_proto::Errno;

use super::lane::{NbdDisk, SETTLE, STALE};
use super::link::NbdLink;
use crate::bdev::channel::Here;
use crate::bdev::disks::Gate;
use crate::bdev::request::{Limits, Message, Opened, Unsent, Wire};

/// Bytes of a sector, as a shift: the unit of [`Message::sector`].
const SECTOR_SHIFT: u32 = 9;

/// A connection.
pub(super) struct OneLink {
    pub index: u32,
    pub connection: Connection,
    pub fd: RawFd,
    /// The server is about to end: nothing more is asked of it.
    pub draining: bool,
    /// Requests were taken back that the server may still execute.
    pub abandoned: bool,
    pub io_timeout: Option<Duration>,
}

impl OneLink {
    pub fn is_usable(&self) -> bool {
        !self.draining && self.connection.end().is_none()
    }
}

/// What is left of a connection whose server may still be working for it.
pub(super) struct Old {
    pub remains: Remains,
    pub fd: RawFd,
    pub since: Instant,
}

/// A device on this reactor.
pub(super) struct Drive {
    pub number: u64,
    pub disk: Arc<NbdDisk>,
    pub links: Vec<OneLink>,
    pub old: Vec<Old>,
    /// When what the last connection that a server closed has carried is over.
    pub settled_at: Option<Instant>,
    pub limits: Limits,
    pub always_fua: bool,
    /// Since when there has been no connection; `None` while there is one.
    pub held_since: Option<Instant>,
}

/// Moves with each change of connections of any device, so that what belongs to an earlier one is known.
static EPOCH: AtomicU64 = AtomicU64::new(0);

impl Drive {
    pub fn new(disk: Arc<NbdDisk>, now: Instant) -> Self {
        Self {
            number: disk.number(),
            disk,
            links: Vec::new(),
            old: Vec::new(),
            settled_at: None,
            limits: Limits::default(),
            always_fua: false,
            held_since: Some(now),
        }
    }

    /// What a connection leaves behind: its requests go back, and what its server may still do is waited for.
    pub fn lost(&mut self, here: &Here<NbdLink>, cx: &mut Turn<'_>, mut link: OneLink) {
        let mut any = link.abandoned;
        link.connection.lost(|token| {
            any = true;
            here.disks().completed(token, Err(Errno::ECONNABORTED));
        });
        let is_servers = link.connection.end().is_none_or(nbd_poll::client::End::is_servers);
        if any && !is_servers {
            self.old.push(Old { remains: link.connection.into_remains(), fd: link.fd, since: cx.now });
        } else {
            if any {
                self.settled_at = Some(cx.now + SETTLE);
            }
            cx.unwatch(link.fd);
            // Nothing of what the socket still holds is to arrive.
            link.connection.abort();
        }
    }

    /// The connections have changed: lets requests go, or wait. Each call is a new opening, so that what was lost
    /// before it is repeated after it.
    pub fn regate(&mut self, here: &Here<NbdLink>, now: Instant) {
        let epoch = EPOCH.fetch_add(1, Ordering::Relaxed) + 1;
        if self.links.iter().any(OneLink::is_usable) {
            let opened = Opened { epoch, session: NbdLink(self.number), id: 0, limits: self.limits };
            let settled = self.settled_at.filter(|at| *at > now);
            let repeat_at = self.old.iter().map(|o| o.since + STALE).chain(settled).max();
            self.held_since = None;
            self.disk.set_gate_of(here.index, Gate::Open(opened));
            here.disks().open(self.number, opened, repeat_at);
        } else {
            let since = *self.held_since.get_or_insert(now);
            self.disk.set_gate_of(here.index, Gate::Held { since });
            here.disks().close(self.number, epoch, now);
        }
    }
}

impl OneLink {
    /// Ends it if it is to end.
    pub fn mind(&mut self, now: Instant) {
        if self.draining && self.connection.in_flight() == 0 {
            self.connection.disconnect();
        }
        if self.silent_until().is_some_and(|at| at <= now) {
            let seconds = self.io_timeout.unwrap_or_default().as_secs();
            self.connection.give_up(format!("the server has not answered for {seconds} s (io_timeout_sec)"));
        }
    }

    pub fn silent_until(&self) -> Option<Instant> {
        Some(self.connection.silent_since()? + self.io_timeout?)
    }
}

/// The connections as a [`Wire`].
pub(super) struct Wires<'a> {
    pub drives: &'a mut [Drive],
    pub now: Instant,
}

impl Wire<NbdLink> for Wires<'_> {
    fn send(&mut self, to: &Opened<NbdLink>, message: &Message<'_>, cookie: u64) -> Result<(), Unsent> {
        let drive = self.drives.iter_mut().find(|d| d.number == to.session.0).ok_or(Unsent::Down)?;
        let fua = message.fua || drive.always_fua;
        let usable = drive.links.iter_mut().filter(|l| l.is_usable());
        let link = usable.min_by_key(|l| l.connection.in_flight()).ok_or(Unsent::Down)?;
        let command = match message.op {
            Op::Read => Command::Read,
            Op::Write => Command::Write { fua },
            Op::Flush => Command::Flush,
            Op::Discard => Command::Trim { fua: drive.always_fua },
            Op::WriteZeroes => Command::WriteZeroes { fua, no_hole: message.keep },
            Op::SecureErase | Op::Reset => return Err(Unsent::Never),
        };
        let ask = Ask { command, offset: message.sector << SECTOR_SHIFT, len: message.len, token: cookie };
        // SAFETY: the part of the request is in flight from here on: its user keeps the memory until it has completed,
        // which it does only with what comes out of `Connection::receive` or `lost`.
        unsafe { link.connection.submit(&ask, message.data, self.now) }.map_err(|e| match e {
            Unsendable::Full => Unsent::Busy,
            Unsendable::Dialect => Unsent::Never,
        })
    }
}

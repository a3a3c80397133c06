//! Completion queues of one reactor, as the control thread and the reactor see them.
//!
//! The control thread knows how many entries are spoken for ([`Cqs`]); the reactor polls ([`LaneCqs`]). A queue is
//! made when a connection finds no room in another one of its device, and goes with its last connection: it may hold
//! sockets, and every turn asks every queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reactor::Turn;
use verbs::{Cq, CqHandle, Device};

/// The completion queues of one reactor on the control thread.
pub(crate) struct Cqs {
    entries: u32,
    ports: Vec<CqPort>,
    next: u64,
}

/// A completion queue, with the entries spoken for.
struct CqPort {
    id: CqId,
    device: Arc<dyn Device>,
    handle: CqHandle,
    entries: u32,
    used: u32,
    /// Set by the lane when it failed.
    lost: Arc<AtomicBool>,
}

/// Names a completion queue of a reactor. Never means another one later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CqId(u64);

/// Entries of one queue, to be given back once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    cq: CqId,
    entries: u32,
}

/// A queue that was just made, on its way to its lane.
pub(crate) struct NewCq {
    pub id: CqId,
    pub cq: Box<dyn Cq>,
    pub device: Arc<dyn Device>,
    /// To be set when it fails.
    pub lost: Arc<AtomicBool>,
}

/// What [`Cqs::reserve`] gives.
pub(crate) struct Reserved {
    pub share: Share,
    pub handle: CqHandle,
    /// As [`NewCq::lost`].
    pub lost: Arc<AtomicBool>,
    /// To be sent to the lane before the connection.
    pub new: Option<NewCq>,
}

impl Cqs {
    /// None yet; each will have `entries`, or what its device has to offer.
    pub fn new(entries: u32) -> Self {
        Self { entries, ports: Vec::new(), next: 0 }
    }

    /// Reserves `entries` in a completion queue of `device`; makes one if none has room.
    ///
    /// # Errors
    /// In words: the device cannot make one, or not of that size.
    pub fn reserve(&mut self, device: &Arc<dyn Device>, entries: u32) -> Result<Reserved, String> {
        let room = |c: &&mut CqPort| {
            !c.lost.load(Ordering::Acquire) && Arc::ptr_eq(&c.device, device) && c.entries - c.used >= entries
        };
        if let Some(port) = self.ports.iter_mut().find(room) {
            port.used += entries;
            return Ok(port.reserved(entries, None));
        }
        let info = device.info();
        let wanted = if info.cq_grows { info.max_cqe } else { self.entries.max(entries).min(info.max_cqe) };
        let cq = device.clone().create_cq(wanted).map_err(|e| e.to_string())?;
        if cq.entries() < entries {
            return Err(format!(
                "device {} has completion queues of {} entries, a connection needs {entries}: lower queue_depth",
                info.name,
                cq.entries()
            ));
        }
        let (id, lost) = (CqId(self.next), Arc::new(AtomicBool::new(false)));
        self.next += 1;
        let port = CqPort {
            id,
            device: device.clone(),
            handle: cq.handle(),
            entries: cq.entries(),
            used: entries,
            lost: lost.clone(),
        };
        let reserved = port.reserved(entries, Some(NewCq { id, cq, device: device.clone(), lost }));
        self.ports.push(port);
        Ok(reserved)
    }

    /// Gives entries back. `Some`: nobody uses the queue any more, and the lane is to drop it ([`LaneCqs::drop_cq`]).
    pub fn release(&mut self, share: Share) -> Option<CqId> {
        let i = self.ports.iter().position(|port| port.id == share.cq)?;
        let port = &mut self.ports[i];
        port.used -= share.entries;
        (port.used == 0).then(|| self.ports.swap_remove(i).id)
    }
}

impl CqPort {
    fn reserved(&self, entries: u32, new: Option<NewCq>) -> Reserved {
        let share = Share { cq: self.id, entries };
        Reserved { share, handle: self.handle.clone(), lost: self.lost.clone(), new }
    }
}

/// The completion queues that a reactor polls.
#[derive(Default)]
pub(crate) struct LaneCqs(Vec<NewCq>);

impl LaneCqs {
    /// Takes over a completion queue.
    pub fn add(&mut self, cx: &mut Turn<'_>, new: NewCq) {
        if let Err(error) = cx.watch(new.cq.wait_fd()) {
            tracing::error!(%error, "cannot watch a completion channel");
            return new.lost.store(true, Ordering::Release);
        }
        self.0.push(new);
    }

    /// Lets go of a queue that no connection uses. One that has failed is gone already.
    pub fn drop_cq(&mut self, cx: &mut Turn<'_>, id: CqId) {
        if let Some(i) = self.0.iter().position(|cq| cq.id == id) {
            self.take(cx, i);
        }
    }

    /// Number `i` has failed: says so to the control thread, and hands it out.
    pub fn fail(&mut self, cx: &mut Turn<'_>, i: usize, why: &str) -> NewCq {
        let failed = self.take(cx, i);
        tracing::error!(why, device = failed.device.info().name, "completion queue lost");
        failed.lost.store(true, Ordering::Release);
        failed
    }

    fn take(&mut self, cx: &mut Turn<'_>, i: usize) -> NewCq {
        let cq = self.0.swap_remove(i);
        cx.unwatch(cq.cq.wait_fd());
        cq
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn get(&mut self, i: usize) -> &mut dyn Cq {
        &mut *self.0[i].cq
    }
}

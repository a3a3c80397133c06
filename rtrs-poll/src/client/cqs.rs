//! Completion queues on reactors, with the entries spoken for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reactor::Handle;
use verbs::{Cq, CqHandle, Device};

/// Entries of a completion queue; another one is made when its queue pairs could need more.
const CQ_ENTRIES: u32 = 8192;

/// One reactor, as the control thread sees it.
pub(super) struct LanePort {
    pub handle: Handle,
    cqs: Vec<CqPort>,
}

struct CqPort {
    device: Arc<dyn Device>,
    handle: CqHandle,
    entries: u32,
    used: u32,
    /// Set by the lane when it failed.
    lost: Arc<AtomicBool>,
}

/// Entries of one queue, to be given back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    cq: usize,
    entries: u32,
}

/// A queue that was just made, on its way to its lane.
pub(super) struct NewCq {
    pub cq: Box<dyn Cq>,
    pub device: Arc<dyn Device>,
    /// To be set when it fails.
    pub lost: Arc<AtomicBool>,
}

impl LanePort {
    pub fn new(handle: Handle) -> Self {
        Self { handle, cqs: Vec::new() }
    }

    /// Reserves `entries` in a completion queue of `device`; makes one if none has room.
    pub fn reserve(
        &mut self,
        device: &Arc<dyn Device>,
        entries: u32,
    ) -> Result<(Share, CqHandle, Option<NewCq>), String> {
        let room = |c: &CqPort| {
            !c.lost.load(Ordering::Acquire) && Arc::ptr_eq(&c.device, device) && c.entries - c.used >= entries
        };
        if let Some(i) = self.cqs.iter().position(room) {
            self.cqs[i].used += entries;
            return Ok((Share { cq: i, entries }, self.cqs[i].handle.clone(), None));
        }
        let wanted = CQ_ENTRIES.max(entries).min(device.info().max_cqe);
        let cq = device.clone().create_cq(wanted).map_err(|e| e.to_string())?;
        if cq.entries() < entries {
            return Err(format!(
                "device {} has completion queues of {} entries, a connection needs {entries}",
                device.info().name,
                cq.entries()
            ));
        }
        let (handle, lost) = (cq.handle(), Arc::new(AtomicBool::new(false)));
        self.cqs.push(CqPort {
            device: device.clone(),
            handle: handle.clone(),
            entries: cq.entries(),
            used: entries,
            lost: lost.clone(),
        });
        Ok((
            Share { cq: self.cqs.len() - 1, entries },
            handle,
            Some(NewCq { cq, device: device.clone(), lost }),
        ))
    }

    /// Gives entries back.
    pub fn release(&mut self, share: Share) {
        self.cqs[share.cq].used -= share.entries;
    }
}

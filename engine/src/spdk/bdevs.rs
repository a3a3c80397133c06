//! SPDK's bdevs on their way into this program's table.
//!
//! SPDK answers a call that makes a bdev before its modules have looked at it, and tells of the bdev afterwards: late if a
//! device is slow, never if it hangs, and with the first 127 bytes of its name. So its list is read, after each answer. A new
//! bdev is offered when the modules have looked, because they may claim it (the base of a store, of a RAID), or when that
//! takes too long: a claim that comes later is refused to whoever is second, here or there.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::Manager;
use bdev::spdk::{self, Change, Examination, Runtime};
use rpc::RpcError;

/// How long SPDK's modules may look at a new bdev before it is offered all the same.
const EXAMINE_TIME: Duration = Duration::from_secs(3);

/// How often SPDK's list is read though nothing happened that is known of.
const LOOK: Duration = Duration::from_secs(1);

/// Bytes of a name that SPDK's events have (`SPDK_NOTIFY_MAX_CTX_SIZE` less the end).
const TOLD: usize = 127;

/// See the module.
pub(super) struct Bdevs {
    manager: Arc<Manager>,
    known: HashMap<String, Known>,
    /// Of the bdevs that were there when it began.
    examination: Option<(Examination, Instant)>,
    looked: Instant,
}

/// A bdev that SPDK has.
enum Known {
    /// Seen first then.
    New(Instant),
    Offered,
    /// Why not, and when it was seen first.
    Refused(RpcError, Instant),
}

impl Bdevs {
    pub(super) fn new(manager: Arc<Manager>) -> Self {
        Self { manager, known: HashMap::new(), examination: None, looked: Instant::now() }
    }

    /// Takes notice of what SPDK made and removed, and offers what is ready. `answered`: SPDK has answered a call. Returns the
    /// bdevs that were not known before.
    pub(super) fn turn(&mut self, runtime: &mut Runtime, answered: bool) -> Vec<String> {
        let mut changed = false;
        while let Some(change) = runtime.next_change() {
            changed = true;
            // One of the same name may be there again.
            if let Change::Unregistered(told) = change {
                let same = |name: &String| *name == told || (told.len() >= TOLD && name.starts_with(&told));
                self.known.retain(|name, _| !same(name));
            }
        }
        let mut new = Vec::new();
        if changed || answered || self.looked.elapsed() >= LOOK {
            new = self.look();
        }
        self.offer_ready(runtime);
        new
    }

    /// Bdevs wait to be offered.
    pub(super) fn busy(&self) -> bool {
        self.known.values().any(|known| matches!(known, Known::New(_)))
    }

    /// `name`, which may be an alias, is new and not offered yet.
    pub(super) fn is_new(&self, name: &str) -> bool {
        matches!(self.find(name), Some(Known::New(_)))
    }

    /// Why SPDK's bdev `name`, which may be an alias, is not offered here. `None` if it is, is none of SPDK's, or was there
    /// before `since`: whoever called then has nothing to do with it.
    pub(super) fn refusal(&self, name: &str, since: Instant) -> Option<&RpcError> {
        match self.find(name) {
            Some(Known::Refused(why, seen)) if *seen >= since => Some(why),
            _ => None,
        }
    }

    fn find(&self, name: &str) -> Option<&Known> {
        self.known.get(name).or_else(|| self.known.get(&spdk::name_of(name)?))
    }

    fn look(&mut self) -> Vec<String> {
        self.looked = Instant::now();
        let names: HashSet<String> = spdk::bdevs().into_iter().collect();
        let new: Vec<String> = names.iter().filter(|n| !self.known.contains_key(*n)).cloned().collect();
        self.known.retain(|name, _| names.contains(name));
        self.known.extend(new.iter().map(|name| (name.clone(), Known::New(self.looked))));
        new
    }

    /// Offers those that SPDK's modules have looked at, in order of their creation.
    fn offer_ready(&mut self, runtime: &Runtime) {
        if !self.busy() {
            return;
        }
        let now = Instant::now();
        let over =
            |known: &Option<(Examination, Instant)>| known.as_ref().filter(|(e, _)| e.over()).map(|e| e.1);
        // Those of before it began. One that hangs stays: each has a poller in SPDK until it is over.
        let examined = over(&self.examination);
        if examined.is_some() || self.examination.is_none() {
            self.examination = Some((runtime.examination(), now));
        }
        let ready = |since: Instant| {
            examined.is_some_and(|began| since <= began) || now.duration_since(since) >= EXAMINE_TIME
        };
        let due = |known: &Known| match known {
            Known::New(since) if ready(*since) => Some(*since),
            _ => None,
        };
        if !self.known.values().any(|known| due(known).is_some()) {
            return;
        }
        let due = |name: String| self.known.get(&name).and_then(due).map(|since| (name, since));
        for (name, seen) in spdk::bdevs().into_iter().filter_map(due).collect::<Vec<_>>() {
            match self.offer(&name, seen) {
                Some(known) => drop(self.known.insert(name, known)),
                None => drop(self.known.remove(&name)),
            }
        }
    }

    /// `None`: it is going.
    fn offer(&self, name: &str, seen: Instant) -> Option<Known> {
        match spdk::offer(&self.manager, name) {
            Ok(_) => Some(Known::Offered),
            Err(bdev::Error::NotFound { .. }) => None,
            Err(e) => {
                let text = format!("SPDK made its bdev {name}, which is not offered by this program: {e}");
                tracing::error!("{text}");
                Some(Known::Refused(RpcError::errno(e.errno(), text), seen))
            }
        }
    }
}

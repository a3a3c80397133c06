//! Events for `notify_get_notifications`: a ring of the newest 1024 (SPDK lib/notify).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bdev::{Manager, Notice};
use reactor::Handle;
use serde::Serialize;

use crate::app::App;

const CAPACITY: usize = 1024;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notification {
    /// `bdev_register`, `bdev_unregister`, `bdev_resize`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Name of the object.
    pub ctx: String,
    /// Counts from 0.
    pub id: u64,
}

/// The ring.
#[derive(Debug, Default)]
pub struct Notifications(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    next: u64,
    events: VecDeque<Notification>,
}

impl Notifications {
    /// Types there are, as `notify_get_types` lists them.
    pub const TYPES: [&'static str; 3] = ["bdev_register", "bdev_unregister", "bdev_resize"];

    /// A ring that hears of `manager`'s bdevs. The application on `control` is told of new ones.
    pub fn hook(manager: &Manager, control: Handle) -> Arc<Self> {
        let ring = Arc::<Self>::default();
        let hook = ring.clone();
        manager.set_notify(move |notice, name| {
            hook.push(notice.name(), name);
            if notice == Notice::Registered {
                let name = name.to_owned();
                App::send(&control, move |app, _| app.bdev_registered(name));
            }
        });
        ring
    }

    fn push(&self, kind: &'static str, ctx: &str) {
        let mut ring = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let id = ring.next;
        ring.next += 1;
        if ring.events.len() == CAPACITY {
            ring.events.pop_front();
        }
        ring.events.push_back(Notification { kind, ctx: ctx.into(), id });
    }

    /// At most `max` events from number `id` on.
    pub fn since(&self, id: u64, max: usize) -> Vec<Notification> {
        let ring = self.0.lock().unwrap_or_else(|e| e.into_inner());
        ring.events.iter().filter(|n| n.id >= id).take(max).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest() {
        let n = Notifications::default();
        (0..1030).for_each(|i| n.push("bdev_register", &format!("M{i}")));
        assert_eq!(n.since(0, usize::MAX).len(), 1024);
        assert_eq!(n.since(0, 1)[0].ctx, "M6");
        assert_eq!(n.since(1029, 5), [Notification { kind: "bdev_register", ctx: "M1029".into(), id: 1029 }]);
    }
}

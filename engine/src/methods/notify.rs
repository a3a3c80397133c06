//! `notify_*`.

use rpc::{MethodTable, States};
use serde::Deserialize;

use crate::app::App;
use crate::notify::Notifications;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_without_params("notify_get_types", States::ANY, |_, r| r.ok(Notifications::TYPES));
    t.method_sync::<Get, _>("notify_get_notifications", States::ANY, |app, p| {
        let max = p.max.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
        Ok(app.notifications.since(p.id, max))
    });
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Get {
    /// Number of the first event wanted.
    #[serde(default)]
    id: u64,
    max: Option<u64>,
}

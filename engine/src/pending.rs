//! Calls of the configuration that wait for a bdev which is not there yet.
//!
//! A server may be down when this program starts. The bdevs that come from it appear later, and what the configuration
//! makes of them (layers, exports) must not fail for that. So a run-time call with a parameter that names such a bdev
//! is put off until the bdev is registered, and with it every later call that names something which that call makes. So is a
//! layer that stands before its base, as SPDK saves it.

use std::collections::HashMap;

use rpc::{Call, State};
use serde_json::{Value, json};

use crate::app::App;

/// What is put off.
#[derive(Default)]
pub(crate) struct Pending {
    /// With the bdev that each waits for, in the order of the configuration.
    calls: Vec<(String, Call)>,
    /// What the calls will make, by its name, and the bdev it waits for.
    made: HashMap<String, String>,
}

impl Pending {
    fn put_off(&mut self, bdev: String, call: Call) {
        tracing::warn!(bdev, method = call.method, "waits until the bdev is there");
        if let Some(name) = made_by(&call) {
            self.made.insert(name, bdev.clone());
        }
        self.calls.push((bdev, call));
    }

    /// The next call that waits for `bdev`.
    fn take(&mut self, bdev: &str) -> Option<Call> {
        let at = self.calls.iter().position(|(waits_for, _)| waits_for == bdev);
        if at.is_none() {
            self.made.retain(|_, waits_for| waits_for != bdev);
        }
        at.map(|i| self.calls.remove(i).1)
    }

    /// Those that stand under a subsystem, for its saved configuration.
    pub(crate) fn config<'a>(&'a self, subsystem: &'a str) -> impl Iterator<Item = Value> + 'a {
        let of_it = self.calls.iter().filter(move |(_, call)| call.subsystem == subsystem);
        of_it.map(|(_, call)| match &call.params {
            Some(params) => json!({"method": call.method, "params": params}),
            None => json!({"method": call.method}),
        })
    }

    /// Nothing will be done any more.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

fn param<'a>(call: &'a Call, key: &str) -> Option<&'a str> {
    call.params.as_ref()?.get(key)?.as_str()
}

/// The name of what a call makes, if it makes anything.
fn made_by(call: &Call) -> Option<String> {
    let error_bdev = || {
        let base = param(call, "base_name").filter(|_| call.method == "bdev_error_create")?;
        Some(bdev::error::name_on(base))
    };
    param(call, "name").map(str::to_owned).or_else(error_bdev)
}

impl App {
    /// Puts `call` off if it has to wait for a bdev; gives it back if not.
    pub(crate) fn put_off(&mut self, call: Call) -> Option<Call> {
        let startup = self.table.states_of(&call.method).is_none_or(|s| s.contains(State::Startup));
        match self.awaited(&call).filter(|_| !startup) {
            None => Some(call),
            Some(bdev) => {
                // Nobody else gets it in the moment between its arrival and the call.
                self.manager.reserve(&bdev, true);
                self.pending.put_off(bdev, call);
                None
            }
        }
    }

    /// The bdev that `call` has to wait for.
    fn awaited(&self, call: &Call) -> Option<String> {
        let params = call.params.as_ref()?.as_object()?;
        params.values().filter_map(Value::as_str).find_map(|name| {
            let of_another = self.pending.made.get(name).cloned();
            let expected = || self.subsystems.iter().any(|s| s.expects_bdev(self, name));
            of_another.or_else(|| (expected() || self.comes_later(call, name)).then(|| name.to_owned()))
        })
    }

    /// A layer's base `name` is not there, and a call that comes later makes it.
    fn comes_later(&self, call: &Call, name: &str) -> bool {
        let is_base = ["base_bdev_name", "base_name"].iter().any(|key| param(call, key) == Some(name));
        let makes_it =
            |later: &Call| later.method.starts_with("bdev_") && made_by(later).as_deref() == Some(name);
        let later = || self.startup.left().any(makes_it);
        is_base && self.manager.get(name).is_err() && later()
    }

    /// A bdev was registered: makes the calls that wait for it, each when the one before has been answered.
    pub(crate) fn bdev_arrived(&mut self, bdev: String) {
        let Some(Call { method, params, .. }) = self.pending.take(&bdev) else {
            return self.manager.reserve(&bdev, false);
        };
        let name = method.clone();
        self.call(&name, &params.unwrap_or_default(), move |app, _, answer| {
            if let Err(error) = answer {
                tracing::error!(bdev, method, %error, "a call of the configuration that waited for this bdev failed");
            }
            app.bdev_arrived(bdev);
        });
    }
}

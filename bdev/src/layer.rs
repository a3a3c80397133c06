//! What layers have in common: an open, claimed base whose removal and resizes pass upwards, and properties and
//! slots derived from it.

use std::sync::Arc;

use uuid::Uuid;

use crate::descriptor::{Descriptor, Event, Mode, User};
use crate::device::{Bdev, Info};
use crate::io::Op;
use crate::manager::{Error, Manager};

/// Opens `base` for the layer `name` and claims it. The base's events become the layer's.
pub(crate) fn open_base(
    manager: &Arc<Manager>,
    base: &str,
    kind: &str,
    name: &str,
) -> Result<Descriptor, Error> {
    let (weak, layer) = (Arc::downgrade(manager), name.to_owned());
    let events = move |event| {
        let Some(manager) = weak.upgrade() else { return };
        // Not found: the layer is not registered yet (`register` looks again) or is being removed already.
        let _ = match event {
            Event::Removed => manager.unregister(&layer, Box::new(|| ())),
            Event::Resized { .. } => manager.resized(&layer),
        };
    };
    let read_only = manager.get(base)?.info().read_only;
    let mode = if read_only { Mode::ReadOnly } else { Mode::ReadWrite };
    let descriptor = manager.open_as(User::Layer(name.to_owned()), base, mode, Box::new(events))?;
    if mode == Mode::ReadWrite {
        descriptor.claim(&format!("{kind} bdev {name}"))?;
    }
    Ok(descriptor)
}

/// Registers a layer, unless its base went away meanwhile.
pub(crate) fn register(manager: &Arc<Manager>, layer: Arc<dyn Bdev>, base: &Descriptor) -> Result<(), Error> {
    let name = layer.info().name.clone();
    manager.register(layer)?;
    if base.is_removed() {
        // Its event may have come before the layer had a name; unregistering twice does no harm.
        let _ = manager.unregister(&name, Box::new(|| ()));
        return Err(Error::NotFound { name: base.info().name.clone() });
    }
    Ok(())
}

/// Properties of a layer: those of the base's `IoChannel`, which does all that the base lacks.
pub(crate) fn info(base: &Info, name: String, product_name: &'static str, uuid: Option<Uuid>) -> Info {
    Info {
        name,
        aliases: Vec::new(),
        product_name,
        uuid: uuid.unwrap_or_else(Uuid::new_v4),
        native: base.supported(),
        native_fua: true,
        max_unmap_blocks: u64::MAX,
        ..base.clone()
    }
}

/// Requests at the base, by the cookie that the base sees. Grows to the deepest queue it saw.
pub(crate) struct Table<T> {
    slots: Vec<T>,
    free: Vec<u32>,
}

impl<T: Copy> Table<T> {
    pub(crate) fn new() -> Self {
        Self { slots: Vec::with_capacity(64), free: Vec::with_capacity(64) }
    }

    pub(crate) fn put(&mut self, value: T) -> u64 {
        if let Some(i) = self.free.pop() {
            self.slots[i as usize] = value;
            return u64::from(i);
        }
        self.slots.push(value);
        self.slots.len() as u64 - 1
    }

    pub(crate) fn take(&mut self, cookie: u64) -> T {
        self.free.push(cookie as u32);
        self.slots[cookie as usize]
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// Which latencies and errors people set by name ("read", "unmap").
pub(crate) fn rpc_name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write => "write",
        Op::Flush => "flush",
        Op::WriteZeroes => "write_zeroes",
        Op::Discard => "unmap",
        Op::SecureErase => "secure_erase",
        Op::Reset => "reset",
    }
}

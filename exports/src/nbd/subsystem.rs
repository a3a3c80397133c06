//! How kernel NBD joins the engine.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::{App, Error, InUse, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::MethodTable;
use serde_json::Value;

use super::disk::{Disk, Disks, Key, Phase, disk_name, disks};
use super::{claim, methods, stop};
use crate::host;

/// Subsystem "nbd", as SPDK names it.
#[derive(Debug)]
pub struct Nbd {
    depends_on: &'static [&'static str],
    run_dir: PathBuf,
}

impl Default for Nbd {
    fn default() -> Self {
        Self::new(&[])
    }
}

impl Nbd {
    /// `depends_on`: subsystems that are configured before; "bdev", and what else brings bdevs to the program.
    pub fn new(depends_on: &'static [&'static str]) -> Self {
        Self { depends_on, run_dir: claim::RUN_DIR.into() }
    }
}

impl Subsystem for Nbd {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        if self.depends_on.is_empty() { &["bdev"] } else { self.depends_on }
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        methods::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("nbd", "nbd_poll"), ("nbd", "exports::nbd")]
    }

    fn exporting(&self) -> &'static [&'static str] {
        &["nbd_start_disk"]
    }

    fn initialise(&self, app: &mut App, _: &mut Turn<'_>) -> Result<(), Error> {
        app.set_state(Rc::new(RefCell::new(Disks::new(self.run_dir.clone()))));
        Ok(())
    }

    fn config(&self, app: &App) -> Vec<Value> {
        methods::config(app)
    }

    fn in_use(&self, app: &App) -> Vec<InUse> {
        let Ok(disks) = disks(app) else { return Vec::new() };
        let disks = disks.borrow();
        let running = disks.disks.values().filter(|d| d.phase == Phase::Running);
        let of = |disk: &Disk| {
            let kept = disk.can_keep();
            let users = disk.index.map(|index| host::users(&disk_name(index)));
            users.into_iter().flatten().map(move |text| InUse { text, kept }).collect::<Vec<_>>()
        };
        running.flat_map(of).collect()
    }

    /// Disks in use stay with the kernel, which holds their I/O back for a while, so that the next run of the program can
    /// take them over, if the program keeps such. The others are stopped.
    fn shutdown(&self, app: &mut App, _: &mut Turn<'_>, done: ShutdownDone) {
        let Ok(disks) = disks(app) else { return };
        let keys: Vec<Key> = disks.borrow().disks.keys().copied().collect();
        // Dropped with the last disk, or here if there is none.
        let done = Arc::new(done);
        for key in keys {
            let done = done.clone();
            stop::stop(app, key, stop::How::Shutdown, Box::new(move |_| drop(done)));
        }
    }

    /// Nothing is waited for but the kernel's own end of a device.
    fn abort(&self, app: &mut App, _: &mut Turn<'_>) {
        if let Ok(disks) = disks(app) {
            for disk in disks.borrow_mut().disks.values_mut() {
                disk.hurry.store(true, Ordering::Relaxed);
                if let (Phase::Starting, Some(index)) = (disk.phase, disk.index) {
                    // The kernel looks for partitions, and waits for the bdev as long as that waits.
                    stop::cut_off(&app.control, index);
                }
            }
        }
    }
}

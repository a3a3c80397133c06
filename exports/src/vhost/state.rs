//! The controllers, on the control thread.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use bdev::{Event, Mode, User};
use engine::App;
use engine::placement::Placement;
use reactor::descriptors::{Budget, Part, Pool, Share};
use reactor::{CpuMask, Handle, Turn};
use rpc::RpcError;
use rustix::io::Errno;
use serde_json::{Value, json};
use vhost_poll::{Coalescing, Controller, ControllerOptions, ListenError, controller};

use super::disk::BdevDisk;

/// The only transport.
pub(super) const TRANSPORT: &str = "vhost_user_blk";

/// What start-up methods change.
pub(super) struct Options {
    /// Where controllers' sockets are, unless their names are absolute paths.
    pub socket_dir: PathBuf,
    /// Queues that a guest may have, if that was set.
    pub max_queues: Option<u16>,
    /// Descriptors that a front end may hold, if that was set.
    pub max_descriptors: Option<u16>,
}

/// Descriptors that a front end may hold, unless somebody has said how many, or how many queues it may have.
const FEW_DESCRIPTORS: usize = 64;

impl Default for Options {
    fn default() -> Self {
        Self { socket_dir: "/var/tmp".into(), max_queues: None, max_descriptors: None }
    }
}

/// State of the subsystem.
pub(super) struct VhostState {
    pub(super) options: Options,
    pub(super) controllers: BTreeMap<String, Entry>,
    last_run: u64,
    /// Descriptors of all front ends.
    pub(super) descriptors: Pool,
}

impl Default for VhostState {
    fn default() -> Self {
        let descriptors = Pool::new(Budget::of_process().share(Part::Vhost));
        Self { options: Options::default(), controllers: BTreeMap::new(), last_run: 0, descriptors }
    }
}

/// As `vhost_create_blk_controller` asks for it.
#[derive(Clone)]
pub(super) struct Spec {
    pub name: String,
    pub bdev: String,
    pub read_only: bool,
    pub packed_ring: bool,
    pub cpumask: Option<CpuMask>,
}

/// One controller.
pub(super) struct Entry {
    pub(super) spec: Spec,
    pub(super) mask: CpuMask,
    pub(super) controller: Controller<BdevDisk>,
    disk: Arc<BdevDisk>,
    /// Tells it from a former one of the same name.
    run: u64,
    /// That one front end may hold.
    max_descriptors: usize,
    /// Of all its front ends.
    descriptors: Share,
    /// The bdev was removed.
    pub(super) gone: bool,
    /// It is being deleted, or the program ends.
    pub(super) closing: bool,
}

pub(super) fn state(app: &App) -> Result<Rc<RefCell<VhostState>>, RpcError> {
    app.state::<VhostState>().ok_or_else(|| RpcError::internal("vhost is not initialised yet"))
}

const CREATE: &str = "vhost_create_blk_controller";

fn failed(errno: Errno, text: String) -> RpcError {
    RpcError::errno(errno.raw_os_error(), text)
}

/// Makes a controller.
pub(super) fn create(app: &mut App, cx: &mut Turn<'_>, spec: Spec) -> Result<bool, RpcError> {
    if app.shutting_down() {
        let text = format!("{CREATE}: the program is ending");
        return Err(failed(Errno::SHUTDOWN, text).method(CREATE));
    }
    let state = state(app)?;
    if state.borrow().controllers.contains_key(&spec.name) {
        let text = format!("{CREATE}: controller '{}' exists already", spec.name);
        return Err(failed(Errno::EXIST, text).method(CREATE).object("controller", spec.name));
    }
    let (mask, reactors, placement) = reactors(app, spec.cpumask.as_ref())?;
    let run = state.borrow().last_run + 1;
    state.borrow_mut().last_run = run;
    let disk = Arc::new(BdevDisk::new(open(app, &spec, run)?));
    let path = state.borrow().options.socket_dir.join(&spec.name);
    let descriptors = state.borrow().descriptors.share();
    let options = ControllerOptions {
        name: spec.name.clone(),
        path,
        packed_ring: spec.packed_ring,
        max_queues: state.borrow().options.max_queues(),
        max_descriptors: state.borrow().options.max_descriptors(),
        descriptors: descriptors.clone(),
        reactors,
        place: Box::new(move || {
            let place = placement.take();
            (place.index(), Box::new(place) as Box<dyn Any>)
        }),
        registry: app.manager.registry().clone(),
    };
    let controller = Controller::start(cx, disk.clone(), options).map_err(|e| listen_error(&e))?;
    let name = spec.name.clone();
    let max_descriptors = state.borrow().options.max_descriptors();
    let entry = Entry {
        spec,
        mask,
        controller,
        disk,
        run,
        max_descriptors,
        descriptors,
        gone: false,
        closing: false,
    };
    state.borrow_mut().controllers.insert(name, entry);
    Ok(true)
}

fn listen_error(e: &ListenError) -> RpcError {
    let errno = match e {
        ListenError::InUse(_) => Errno::ADDRINUSE,
        ListenError::NotASocket(_) => Errno::EXIST,
        ListenError::PathTooLong(_) => Errno::NAMETOOLONG,
        ListenError::System { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
        _ => Errno::IO,
    };
    failed(errno, format!("{CREATE}: {e}")).method(CREATE).param("ctrlr")
}

/// The reactors of `mask`, and how queues are spread over them.
fn reactors(app: &App, mask: Option<&CpuMask>) -> Result<(CpuMask, Vec<Handle>, Placement), RpcError> {
    let Some(mask) = mask else {
        return Ok((app.cpumask.clone(), app.reactors.clone(), app.placement.clone()));
    };
    let on = |core: &usize| app.reactors.iter().find(|r| r.core() == Some(*core)).cloned();
    let found: Option<Vec<Handle>> = mask.cores().iter().map(on).collect();
    let Some(found) = found else {
        let text = format!(
            "{CREATE}: cpumask {} has cores without a reactor; this program's are {}",
            mask.to_hex(),
            app.cpumask.to_hex()
        );
        return Err(failed(Errno::INVAL, text).method(CREATE).param("cpumask"));
    };
    let placement = Placement::new(&found);
    Ok((mask.clone(), found, placement))
}

fn open(app: &App, spec: &Spec, run: u64) -> Result<bdev::Descriptor, RpcError> {
    let bdev = |e: &bdev::Error| engine::methods::bdev_error(CREATE, &spec.bdev, e);
    let read_only = spec.read_only || app.manager.get(&spec.bdev).map_err(|e| bdev(&e))?.info().read_only;
    let mode = if read_only { Mode::ReadOnly } else { Mode::ReadWrite };
    let (control, name) = (app.control.clone(), spec.name.clone());
    let events = move |event: Event| {
        let name = name.clone();
        App::send(&control, move |app, cx| bdev_event(app, cx, &name, run, event));
    };
    let user = User::Export(format!("vhost controller '{}'", spec.name));
    app.manager.open_as(user, &spec.bdev, mode, Box::new(events)).map_err(|e| bdev(&e))
}

/// The bdev of controller `name` changed.
fn bdev_event(app: &mut App, cx: &mut Turn<'_>, name: &str, run: u64, event: Event) {
    let Ok(state) = state(app) else { return };
    let (controller, disk) = {
        let mut state = state.borrow_mut();
        let Some(entry) = state.controllers.get_mut(name).filter(|e| e.run == run) else { return };
        if event == Event::Removed {
            if std::mem::replace(&mut entry.gone, true) {
                return;
            }
            tracing::warn!(controller = name, bdev = entry.spec.bdev, "the bdev was removed: requests fail");
        }
        (entry.controller.clone(), entry.disk.clone())
    };
    match event {
        Event::Resized { .. } => controller.config_changed(),
        Event::Removed => controller.detach(cx, move |_| disk.release()),
    }
}

/// Ends a controller; `done` runs when it has ended and its bdev is let go of.
pub(super) fn close(
    state: &Rc<RefCell<VhostState>>,
    cx: &mut Turn<'_>,
    name: &str,
    done: impl FnOnce(&mut Turn<'_>) + 'static,
) {
    let controller = {
        let mut borrowed = state.borrow_mut();
        let Some(entry) = borrowed.controllers.get_mut(name) else { return };
        entry.closing = true;
        entry.controller.clone()
    };
    let (state, name) = (state.clone(), name.to_owned());
    controller.close(cx, move |cx| {
        if let Some(entry) = state.borrow_mut().controllers.remove(&name) {
            entry.disk.release();
        }
        done(cx);
    });
}

impl Entry {
    pub(super) fn path(&self) -> PathBuf {
        self.controller.path()
    }

    /// As `vhost_get_controllers` lists it.
    pub(super) fn show(&self) -> Value {
        let Coalescing { delay_base_us, iops_threshold } = self.controller.coalescing();
        let sessions: Vec<Value> = self
            .controller
            .sessions()
            .iter()
            .map(|s| {
                json!({
                    "vid": s.id,
                    "id": s.id,
                    "name": format!("{}s{}", self.spec.name, s.id),
                    "started": s.started,
                    "max_queues": s.max_queues,
                    "inflight_task_cnt": s.inflight,
                    "write_cache": s.write_cache,
                    "descriptors": s.descriptors,
                })
            })
            .collect();
        let bdev = if self.gone { Value::Null } else { self.spec.bdev.clone().into() };
        json!({
            "ctrlr": self.spec.name,
            "cpumask": self.mask.to_hex(),
            "delay_base_us": delay_base_us,
            "iops_threshold": iops_threshold,
            "socket": self.path(),
            "sessions": sessions,
            "limits": {
                "sessions": controller::MAX_SESSIONS,
                "descriptors_per_session": self.max_descriptors,
                "descriptors": self.descriptors.limit(),
                "descriptors_used": self.descriptors.used(),
            },
            "backend_specific": {
                "block": { "readonly": self.spec.read_only, "bdev": bdev, "transport": TRANSPORT },
            },
        })
    }

    /// The calls that make it again.
    pub(super) fn config(&self) -> Vec<Value> {
        let mut params = json!({
            "ctrlr": self.spec.name,
            "dev_name": self.spec.bdev,
            "readonly": self.spec.read_only,
            "packed_ring": self.spec.packed_ring,
        });
        if let Some(mask) = &self.spec.cpumask {
            params["cpumask"] = mask.to_hex().into();
        }
        let mut calls = vec![json!({ "method": CREATE, "params": params })];
        let Coalescing { delay_base_us, iops_threshold } = self.controller.coalescing();
        if delay_base_us > 0 {
            calls.push(json!({
                "method": "vhost_controller_set_coalescing",
                "params": {
                    "ctrlr": self.spec.name,
                    "delay_base_us": delay_base_us,
                    "iops_threshold": iops_threshold,
                },
            }));
        }
        calls
    }
}

impl Options {
    /// Queues that a guest may have, if it may have as many descriptors.
    pub(super) fn max_queues(&self) -> u16 {
        self.max_queues.unwrap_or(256)
    }

    /// Descriptors that a front end may hold.
    pub(super) fn max_descriptors(&self) -> usize {
        let for_queues = self.max_queues.map_or(0, controller::descriptors);
        self.max_descriptors.map_or(FEW_DESCRIPTORS.max(for_queues), usize::from)
    }

    /// The calls that make them again.
    pub(super) fn config(&self) -> Vec<Value> {
        let default = Self::default();
        let own = self.max_queues.is_some() || self.max_descriptors.is_some();
        if self.socket_dir == default.socket_dir && !own {
            return Vec::new();
        }
        let mut params = json!({ "socket_dir": self.socket_dir });
        if let Some(n) = self.max_queues {
            params["max_queues"] = n.into();
        }
        if let Some(n) = self.max_descriptors {
            params["max_descriptors"] = n.into();
        }
        vec![json!({ "method": "vhost_set_options", "params": params })]
    }
}

/// A directory for sockets must be there: the first controller would fail otherwise.
pub(super) fn is_directory(path: &Path) -> bool {
    path.is_dir()
}

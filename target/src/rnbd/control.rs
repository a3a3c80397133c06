//! RNBD on the control thread: sessions, OPEN, CLOSE, access rules.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bdev::{Descriptor, Event, Manager, Mode, User};
use reactor::{Handle, Turn};
use rnbd_proto::device::DevGeometry;
use rnbd_proto::errno::Errno;
use rnbd_proto::io::Data;
use rnbd_proto::open::{AccessMode, AccessTable, device_name};
use rnbd_proto::session::{DEFAULT_MAX_DEVICES, Device, DeviceId, Open, Session};
use rnbd_proto::wire::{MsgClose, MsgOpen, MsgSessInfo, msg_type};
use rtrs_poll::{Lane, SessionEvents, Verdict};
use zerocopy::{FromBytes, IntoBytes};

use super::bdevs::TableOfBdevs;
use super::export::{Exports, allowed};
use super::geometry::geometry;
use super::lane::RnbdLane;
use super::names::{Asking, By, File, Found, Refused};
use super::shared::{Shared, SharedDevice};

/// Sends the answer to an admin message to the reactor it came from: the message, empty for none, or the errno.
pub(super) type Answer = Box<dyn FnOnce(Result<Vec<u8>, Errno>) + Send>;

/// An admin message of a client.
pub(super) struct Admin {
    pub session: Arc<rtrs_poll::Session>,
    pub peer: IpAddr,
    pub usr: Vec<u8>,
    pub room: Data,
    /// Called exactly once.
    pub answer: Answer,
}

/// RNBD sessions and their devices.
pub struct Control {
    manager: Arc<Manager>,
    exports: Rc<RefCell<Exports>>,
    shared: Arc<Shared>,
    reactors: Vec<Handle>,
    handle: Handle,
    sessions: HashMap<u32, ClientSession>,
    /// Writers by bdev name, over all sessions.
    access: AccessTable<String>,
    /// bdevs made for `open_files`, with their opens.
    file_bdevs: HashMap<String, usize>,
    /// Of the device ids of the next session.
    generation: u16,
    /// OPENs that came while the configuration was carried out. A bdev may yet get an export, or a layer; `None`: it has
    /// been carried out.
    early: Option<Vec<Admin>>,
}

struct ClientSession {
    name: String,
    rtrs: Arc<rtrs_poll::Session>,
    devices: Session<OpenDevice>,
}

struct OpenDevice {
    descriptor: Descriptor,
    /// The name it counts under in [`AccessTable`].
    bdev: String,
    read_only: bool,
    by: By,
    /// Who opened it, for the log.
    peer: IpAddr,
}

/// A device that a client has open, for listings.
#[derive(Clone, Debug)]
pub struct OpenInfo {
    /// On the wire.
    pub device_id: u32,
    /// As the client asked for it.
    pub device_path: String,
    /// Behind it.
    pub bdev_name: String,
    /// `ro`, `rw` or `migration`.
    pub access_mode: &'static str,
    /// Writes are refused.
    pub read_only: bool,
    /// By which rule it was opened.
    pub by: By,
    /// The same would be opened again now. What was open by the bdev's own name before the first export, or by an export that is
    /// gone, stays open all the same.
    pub offered: bool,
}

/// A session with what it has open, for listings.
#[derive(Clone, Debug)]
pub struct SessionDevices {
    /// Session name.
    pub session: String,
    /// Its devices.
    pub devices: Vec<OpenInfo>,
}

/// How messages find the control part.
struct ControlCell(Rc<RefCell<Control>>);

impl Control {
    /// Sets up the control part on the thread of `cx`.
    pub fn install(
        cx: &mut Turn<'_>,
        manager: Arc<Manager>,
        exports: Rc<RefCell<Exports>>,
        shared: Arc<Shared>,
        reactors: Vec<Handle>,
    ) -> Rc<RefCell<Self>> {
        let control = Rc::new(RefCell::new(Self {
            manager,
            exports,
            shared,
            reactors,
            handle: cx.handle().clone(),
            sessions: HashMap::new(),
            access: AccessTable::new(),
            file_bdevs: HashMap::new(),
            generation: 0,
            early: Some(Vec::new()),
        }));
        cx.set_local(Rc::new(ControlCell(control.clone())));
        control
    }

    /// Runs `f` on the control thread.
    pub(super) fn send(control: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        control.send(move |cx| {
            if let Some(cell) = cx.local::<ControlCell>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }

    pub(super) fn admin(&mut self, _: &mut Turn<'_>, admin: Admin) {
        let kind = admin.usr.first_chunk::<2>().map(|b| u16::from_le_bytes(*b));
        match kind {
            Some(msg_type::SESS_INFO) => {
                let result = self.sess_info(&admin);
                (admin.answer)(result);
            }
            Some(msg_type::OPEN) if self.is_too_early(&admin) => {
                self.early.get_or_insert_default().push(admin)
            }
            Some(msg_type::OPEN) => {
                let result = self.open(&admin);
                (admin.answer)(result);
            }
            Some(msg_type::CLOSE) => self.close(admin),
            _ => (admin.answer)(Err(Errno::EINVAL)),
        }
    }

    /// Whether an OPEN has to wait for the configuration: what it asks for is not exported, but may yet be, or may get a layer.
    fn is_too_early(&self, admin: &Admin) -> bool {
        let name = MsgOpen::ref_from_prefix(&admin.usr).ok().and_then(|(msg, _)| device_name(msg).ok());
        let Some(name) = name.filter(|_| self.early.is_some()) else { return false };
        let found = self.resolve(admin.session.name(), &[admin.peer], name);
        !matches!(found, Ok(Found::Bdev { by: By::Export { .. }, .. }))
    }

    /// The configuration has been carried out: devices may be opened.
    pub(super) fn ready(&mut self) {
        for admin in self.early.take().unwrap_or_default() {
            let result = self.open(&admin);
            (admin.answer)(result);
        }
    }

    fn session(&mut self, admin: &Admin) -> Result<&mut ClientSession, Errno> {
        self.sessions.get_mut(&admin.session.key).ok_or(Errno::ENOTCONN)
    }

    fn sess_info(&mut self, admin: &Admin) -> Result<Vec<u8>, Errno> {
        let (msg, _) = MsgSessInfo::ref_from_prefix(&admin.usr).map_err(|_| Errno::EINVAL)?;
        check_room(admin, size_of::<MsgSessInfo>())?;
        Ok(self.session(admin)?.devices.sess_info(msg).as_bytes().to_vec())
    }

    fn open(&mut self, admin: &Admin) -> Result<Vec<u8>, Errno> {
        let (msg, _) = MsgOpen::ref_from_prefix(&admin.usr).map_err(|_| Errno::EINVAL)?;
        check_room(admin, size_of::<rnbd_proto::wire::MsgOpenRsp>())?;
        let session = self.session(admin)?;
        let id = match session.devices.open(msg) {
            Ok(Open::Again(id)) => id,
            Ok(Open::New { name, mode }) => {
                let name = name.to_owned();
                let id = self.open_new(admin, &name, mode)?;
                admin.session.set_opened();
                id
            }
            Err(bad) => {
                tracing::debug!(session = session.name, %bad, "OPEN refused");
                return Err(bad.errno());
            }
        };
        let rsp = self.geometry_of(admin.session.key, id)?.open_rsp(id.to_wire());
        Ok(rsp.as_bytes().to_vec())
    }

    fn open_new(&mut self, admin: &Admin, name: &str, mode: AccessMode) -> Result<DeviceId, Errno> {
        let session = admin.session.name();
        let refused = |errno: Errno, why: String| {
            tracing::warn!(session, peer = %admin.peer, device_path = name, mode = mode_name(mode), %errno, why, "OPEN refused");
            errno
        };
        let mut peers = admin.session.peers();
        peers.push(admin.peer);
        peers.dedup();
        let found = self.resolve(session, &peers, name).map_err(|r| refused(r.errno, r.why))?;
        let (Found::Bdev { read_only, .. } | Found::File(File { read_only, .. })) = &found;
        if *read_only && mode.writes() {
            return Err(refused(Errno::EROFS, "the export is read-only".into()));
        }
        let (bdev, by) = match found {
            Found::Bdev { name, by, .. } => (name, by),
            Found::File(file) => (self.file_bdev(&file).map_err(|(e, why)| refused(e, why))?, By::File),
        };
        let result = self.enter(admin, name, mode, &bdev, by);
        if result.is_err() {
            self.forget_unused_file(&bdev);
        }
        result.map_err(|(e, why)| refused(e, why))
    }

    /// Opens `bdev` and gives it a device id.
    fn enter(
        &mut self,
        admin: &Admin,
        name: &str,
        mode: AccessMode,
        bdev: &str,
        by: By,
    ) -> Result<DeviceId, (Errno, String)> {
        // Aliases of one bdev count as one device.
        let backend = self.manager.get(bdev).map_err(|e| (Errno::ENOENT, e.to_string()))?;
        let bdev = backend.info().name.clone();
        self.access
            .acquire(&bdev, mode)
            .map_err(|e| (e, format!("bdev {bdev} has {} writers already", self.access.writers(&bdev))))?;
        let result = self.enter_acquired(admin, name, mode, &bdev, by);
        if result.is_err() {
            self.access.release(&bdev, mode);
        }
        result
    }

    fn enter_acquired(
        &mut self,
        admin: &Admin,
        name: &str,
        mode: AccessMode,
        bdev: &str,
        by: By,
    ) -> Result<DeviceId, (Errno, String)> {
        let io_mode = if mode.writes() { Mode::ReadWrite } else { Mode::ReadOnly };
        let events = self.events(bdev);
        let user = User::Client(format!("RNBD session {}", admin.session.name()));
        let descriptor = self.manager.open_as(user, bdev, io_mode, events).map_err(|e| {
            let errno = Errno::from_raw(e.errno()).unwrap_or(Errno::EIO);
            (errno, e.to_string())
        })?;
        let read_only = !mode.writes();
        let device = Device {
            name: name.into(),
            mode,
            data: OpenDevice {
                descriptor: descriptor.clone(),
                bdev: bdev.into(),
                read_only,
                by,
                peer: admin.peer,
            },
        };
        let session =
            self.sessions.get_mut(&admin.session.key).ok_or((Errno::ENOTCONN, "session is gone".into()))?;
        let id = session.devices.insert(device).map_err(|(bad, _)| (bad.errno(), bad.to_string()))?;
        self.shared.insert((admin.session.key, id), SharedDevice { descriptor, read_only });
        if let Some(opens) = self.file_bdevs.get_mut(bdev) {
            *opens += 1;
        }
        tracing::info!(
            session = admin.session.name(),
            peer = %admin.peer,
            device_path = name,
            bdev,
            mode = mode_name(mode),
            id = id.to_wire(),
            "device opened"
        );
        Ok(id)
    }

    /// What happens when the bdev of an open device goes away: its I/O is refused from now on, and the device closed.
    fn events(&self, bdev: &str) -> Box<dyn Fn(Event) + Send + Sync> {
        let (control, bdev) = (self.handle.clone(), bdev.to_owned());
        Box::new(move |event| {
            if event == Event::Removed {
                let bdev = bdev.clone();
                Self::send(&control, move |c, _| c.bdev_removed(&bdev));
            }
        })
    }

    fn geometry_of(&self, session: u32, id: DeviceId) -> Result<DevGeometry, Errno> {
        let device = self.sessions.get(&session).and_then(|s| s.devices.device(id)).ok_or(Errno::ENOTCONN)?;
        let d = &device.data.descriptor;
        geometry(d.info(), d.blocks(), device.data.read_only).map_err(|bad| {
            tracing::error!(peer = %device.data.peer, bdev = device.data.bdev, %bad, "not a device that RNBD can carry");
            Errno::EINVAL
        })
    }

    fn close(&mut self, admin: Admin) {
        let Ok((msg, _)) = MsgClose::ref_from_prefix(&admin.usr) else {
            return (admin.answer)(Err(Errno::EINVAL));
        };
        let id = DeviceId::from_wire(msg.device_id.get());
        let answer = admin.answer;
        // Unknown ids are closed, as for the kernel server.
        self.close_device(admin.session.key, id, Box::new(move |_| answer(Ok(Vec::new()))));
    }

    /// Closes a device on all reactors; its access count is released when its I/O is done.
    fn close_device(&mut self, session: u32, id: DeviceId, done: Box<dyn FnOnce(&mut Self) + Send>) {
        let Some(device) = self.sessions.get_mut(&session).and_then(|s| s.devices.remove(id)) else {
            return done(self);
        };
        self.shared.remove((session, id));
        self.let_go(session, id, move |control| {
            control.closed(device);
            done(control);
        });
    }

    /// Makes every reactor drop its channel to a device; `done` runs here when the last one has.
    fn let_go(&self, session: u32, id: DeviceId, done: impl FnOnce(&mut Self) + Send + 'static) {
        let left = Arc::new(AtomicUsize::new(self.reactors.len()));
        let done = Arc::new(std::sync::Mutex::new(Some(done)));
        for reactor in &self.reactors {
            let (left, done, control) = (left.clone(), done.clone(), self.handle.clone());
            let closed = Box::new(move || {
                if left.fetch_sub(1, Ordering::AcqRel) > 1 {
                    return;
                }
                let done = done.lock().unwrap_or_else(|e| e.into_inner()).take();
                if let Some(done) = done {
                    Self::send(&control, move |c, _| done(c));
                }
            });
            Lane::<RnbdLane>::with_upper(reactor, move |cx, upper, _| {
                upper.close_device(cx, (session, id), closed)
            });
        }
    }

    fn closed(&mut self, device: Device<OpenDevice>) {
        self.access.release(&device.data.bdev, device.mode);
        self.drop_device(device);
    }

    fn drop_device(&mut self, device: Device<OpenDevice>) {
        let OpenDevice { descriptor, bdev, peer, .. } = device.data;
        drop(descriptor);
        if let Some(opens) = self.file_bdevs.get_mut(&bdev) {
            *opens -= 1;
        }
        self.forget_unused_file(&bdev);
        tracing::info!(%peer, device_path = device.name, bdev, "device closed");
    }

    /// Looks a device path up, for a session with paths from `peers`.
    fn resolve(&self, session: &str, peers: &[IpAddr], name: &str) -> Result<Found, Refused> {
        let bdevs = TableOfBdevs { manager: &self.manager, for_files: &self.file_bdevs };
        self.exports.borrow().resolve(&bdevs, Asking { session, peers }, name)
    }

    /// The bdev for a file of the search path, made at its first open.
    fn file_bdev(&mut self, file: &File) -> Result<String, (Errno, String)> {
        let name = file.path.to_string_lossy().into_owned();
        if !self.file_bdevs.contains_key(&name) {
            let params =
                bdev::uring::Params { read_only: file.read_only, ..bdev::uring::Params::new(&name, &name) };
            bdev::uring::create(&self.manager, params)
                .map_err(|e| (Errno::from_raw(e.errno()).unwrap_or(Errno::EIO), e.to_string()))?;
            self.file_bdevs.insert(name.clone(), 0);
        }
        // The name may have become another file's, since it was looked at or since it was opened.
        if !bdev::uring::on_file(&self.manager, file.id).contains(&name) {
            self.forget_unused_file(&name);
            return Err((Errno::EACCES, format!("{name} is not the file any more that was looked up")));
        }
        Ok(name)
    }

    fn forget_unused_file(&mut self, bdev: &str) {
        if self.file_bdevs.get(bdev) == Some(&0) {
            self.file_bdevs.remove(bdev);
            if let Err(error) = self.manager.unregister(bdev, Box::new(|| {})) {
                tracing::debug!(%error, "file bdev");
            }
        }
    }

    fn close_matching(&mut self, wanted: impl Fn(&str, &Device<OpenDevice>) -> bool) -> usize {
        let mut found = Vec::new();
        for (key, s) in &self.sessions {
            found.extend(s.devices.devices().filter(|(_, d)| wanted(&s.name, d)).map(|(id, _)| (*key, id)));
        }
        for (session, id) in &found {
            self.close_device(*session, *id, Box::new(|_| {}));
        }
        found.len()
    }

    fn bdev_removed(&mut self, bdev: &str) {
        let closed = self.close_matching(|_, d| d.data.bdev == bdev);
        tracing::warn!(bdev, closed, "bdev was removed while clients had it open");
    }

    /// Closes what `session` has open under `device_path`, whether it likes it or not. Returns how many.
    pub fn force_close(&mut self, session: &str, device_path: &str) -> usize {
        let normal = |p: &str| p.trim_start_matches('/').to_owned();
        let wanted = normal(device_path);
        self.close_matching(|name, d| name == session && normal(&d.name) == wanted)
    }

    /// What every session has open.
    pub fn sessions(&self) -> Vec<SessionDevices> {
        let open = |s: &ClientSession, id: DeviceId, d: &Device<OpenDevice>| OpenInfo {
            device_id: id.to_wire(),
            device_path: d.name.to_string(),
            bdev_name: d.data.bdev.clone(),
            access_mode: mode_name(d.mode),
            read_only: d.data.read_only,
            by: d.data.by.clone(),
            offered: self.is_offered(s, d),
        };
        let session = |s: &ClientSession| SessionDevices {
            session: s.name.clone(),
            devices: s.devices.devices().map(|(id, d)| open(s, id, d)).collect(),
        };
        let mut all: Vec<_> = self.sessions.values().map(session).collect();
        all.sort_by(|a, b| a.session.cmp(&b.session));
        all
    }

    /// Whether a session would be given an open device again.
    fn is_offered(&self, session: &ClientSession, device: &Device<OpenDevice>) -> bool {
        let own = |name: &str| self.manager.get(name).map(|bdev| bdev.info().name.clone());
        match self.resolve(&session.name, &session.rtrs.peers(), &device.name) {
            Ok(Found::Bdev { name, read_only, .. }) => {
                own(&name).is_ok_and(|own| own == device.data.bdev) && !(read_only && device.mode.writes())
            }
            Ok(Found::File(file)) => file.path.to_str() == Some(&device.data.bdev),
            Err(_) => false,
        }
    }

    /// Somebody has exported something for the first time: bdevs are not given to whoever says their names any more, but
    /// nobody's device is closed for that. The operator should know.
    pub(super) fn first_export(&self) {
        for session in self.sessions.values() {
            for (_, device) in session.devices.devices().filter(|(_, d)| !self.is_offered(session, d)) {
                tracing::warn!(
                    session = session.name,
                    bdev = device.data.bdev,
                    mode = mode_name(device.mode),
                    "opened by its own name before the first export, and stays open; rnbd_force_close ends that"
                );
            }
        }
    }

    /// What a session has open of exports that are not for everybody must be for `peer`, too.
    fn judge_devices(&self, session: u32, name: &str, peer: IpAddr) -> Verdict {
        let devices = self.sessions.get(&session).map(|s| &s.devices);
        for (_, device) in devices.into_iter().flat_map(Session::devices) {
            if let By::Export { device_path, allow } = &device.data.by
                && !allowed(allow, name, peer)
            {
                let why = format!(
                    "the session has '{device_path}' open, which no allow entry gives to this address"
                );
                return Verdict::Refused(why);
            }
        }
        Verdict::Welcome
    }
}

impl SessionEvents for Control {
    fn expects(&self, peer: IpAddr) -> bool {
        self.exports.borrow().expects(peer)
    }

    fn session_up(&mut self, _: &mut Turn<'_>, session: &Arc<rtrs_poll::Session>) {
        // A reactor may still be about to forget a device of the session that had this key before.
        self.generation = self.generation.wrapping_add(1);
        let devices = Session::starting_at(DEFAULT_MAX_DEVICES, self.generation);
        let client = ClientSession { name: session.name().into(), devices, rtrs: session.clone() };
        self.sessions.insert(session.key, client);
    }

    fn session_down(&mut self, _: &mut Turn<'_>, session: &Arc<rtrs_poll::Session>) {
        if let Some(early) = &mut self.early {
            early.retain(|admin| !Arc::ptr_eq(&admin.session, session));
        }
        let Some(mut client) = self.sessions.remove(&session.key) else { return };
        let ids: Vec<DeviceId> = client.devices.devices().map(|(id, _)| id).collect();
        let peer = session.peer().map(tracing::field::display);
        tracing::info!(session = session.name(), peer, devices = ids.len(), "session ended");
        for id in ids {
            let Some(device) = client.devices.remove(id) else { continue };
            self.shared.remove((session.key, id));
            // At once, not when the reactors have answered: nothing of the session is in flight any more, and the
            // client may be back with its OPENs before that.
            self.access.release(&device.data.bdev, device.mode);
            self.let_go(session.key, id, move |control| control.drop_device(device));
        }
    }

    fn judge_join(
        &self,
        session: &rtrs_poll::Session,
        name: &str,
        peer: IpAddr,
        present: &[IpAddr],
    ) -> Verdict {
        match self.exports.borrow().may_join(name, peer, present) {
            Verdict::Welcome => self.judge_devices(session.key, name, peer),
            other => other,
        }
    }

    fn judge_name(&self, name: &str, peer: IpAddr, holders: &[IpAddr]) -> Verdict {
        self.exports.borrow().may_take_name(name, peer, holders)
    }
}

fn check_room(admin: &Admin, len: usize) -> Result<(), Errno> {
    if admin.room.has_room(len) { Ok(()) } else { Err(Errno::EINVAL) }
}

fn mode_name(mode: AccessMode) -> &'static str {
    match mode {
        AccessMode::ReadOnly => "ro",
        AccessMode::ReadWrite => "rw",
        AccessMode::Migration => "migration",
    }
}

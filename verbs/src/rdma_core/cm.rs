//! The connection manager: one event channel, its ids, and the events that come out of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rdma_mummy_sys as sys;
use sys::rdma_cm_event_type as kind;

use super::addr::{self, RawAddr};
use super::cq::RawCq;
use super::device::RdmaDevice;
use super::qp::RdmaQp;
use super::{PROVIDER, invalid, last, set_nonblocking};
use crate::{Cm, CmEvent, CmId, ConnParams, CqHandle, Device, Error, Qp, QpCaps};

/// From `rdma/rdma_cma.h`; an enum the bindings leave out.
const RDMA_OPTION_ID: i32 = 0;
const RDMA_OPTION_ID_REUSEADDR: i32 = 1;

/// The event channel. Lives as long as an id on it.
struct Channel {
    raw: *mut sys::rdma_event_channel,
    /// Held for every librdmacm call on the channel and its ids.
    lock: Mutex<()>,
}

// SAFETY: every use of `raw` but reading its descriptor goes under `lock`.
unsafe impl Send for Channel {}
// SAFETY: as for `Send`.
unsafe impl Sync for Channel {}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: created in `RdmaCm::open`, destroyed once, after all its ids, which hold an `Arc` of this.
        unsafe { sys::rdma_destroy_event_channel(self.raw) };
    }
}

/// An `rdma_cm_id`, destroyed when the connection manager and the queue pair have both let go of it.
pub(super) struct Id {
    raw: *mut sys::rdma_cm_id,
    channel: Arc<Channel>,
}

// SAFETY: every use of `raw` goes under the channel's lock, but for `qp`, which its one owner reads.
unsafe impl Send for Id {}
// SAFETY: as for `Send`.
unsafe impl Sync for Id {}

impl Id {
    pub fn raw(&self) -> *mut sys::rdma_cm_id {
        self.raw
    }

    pub fn destroy_qp(&self) {
        let _guard = self.channel.lock();
        // SAFETY: a live id under the lock, so that no event handling of librdmacm touches the queue pair meanwhile.
        // Called by the one owner of the queue pair, when it is dropped.
        unsafe { sys::rdma_destroy_qp(self.raw) };
    }

    /// Runs a call of librdmacm that answers -1 and errno.
    fn call(&self, f: impl FnOnce(*mut sys::rdma_cm_id) -> i32) -> io::Result<()> {
        let _guard = self.channel.lock();
        if f(self.raw) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        let _guard = self.channel.lock();
        // SAFETY: a live id without a queue pair (its owner held an `Arc` of this). No event of it is unacknowledged,
        // as `RdmaCm::poll` acknowledges under the same lock it fetches them; so the call does not wait.
        if unsafe { sys::rdma_destroy_id(self.raw) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "rdma_destroy_id");
        }
    }
}

struct Known {
    id: Arc<Id>,
    listener: bool,
    /// Of the second step of a resolution.
    timeout_ms: i32,
}

pub(super) struct RdmaCm {
    entries: HashMap<CmId, Known>,
    /// By address of the `rdma_cm_id`, as events name them.
    by_raw: HashMap<usize, CmId>,
    /// By address of the `ibv_context`.
    devices: HashMap<usize, Arc<RdmaDevice>>,
    channel: Arc<Channel>,
    fd: RawFd,
}

/// An event, copied out of librdmacm's memory.
struct Event {
    kind: u32,
    status: i32,
    id: *mut sys::rdma_cm_id,
    listener: *mut sys::rdma_cm_id,
    private: Vec<u8>,
}

impl Event {
    /// # Safety
    /// `raw` is an event that was fetched and not acknowledged yet.
    unsafe fn copy(raw: *const sys::rdma_cm_event) -> Self {
        // SAFETY: live until acknowledged. Connections of RDMA_PS_TCP use the `conn` member (rdma_get_cm_event(3)),
        // zero where an event has no parameters; private data has the length beside it.
        unsafe {
            let conn = (*raw).param.conn;
            let private = if conn.private_data.is_null() {
                Vec::new()
            } else {
                std::slice::from_raw_parts(conn.private_data.cast::<u8>(), usize::from(conn.private_data_len))
                    .to_vec()
            };
            Self {
                kind: (*raw).event,
                status: (*raw).status,
                id: (*raw).id,
                listener: (*raw).listen_id,
                private,
            }
        }
    }

    fn words(&self) -> String {
        // SAFETY: librdmacm answers a string constant for every number.
        let name = unsafe { CStr::from_ptr(sys::rdma_event_str(self.kind)) }.to_string_lossy();
        match self.status {
            0 => name.into_owned(),
            s if s < 0 => format!("{name}: {}", io::Error::from_raw_os_error(-s)),
            s => format!("{name}, reason {s}"),
        }
    }
}

impl RdmaCm {
    pub fn open() -> Result<Self, Error> {
        // SAFETY: no arguments; the library exists (checked by the caller).
        let raw = unsafe { sys::rdma_create_event_channel() };
        if raw.is_null() {
            let hint = "load the kernel's connection manager (modprobe rdma_ucm), and see that there is an RDMA device (rdma link)";
            return Err(last("open the RDMA connection manager (/dev/infiniband/rdma_cm)", hint));
        }
        let channel = Arc::new(Channel { raw, lock: Mutex::new(()) });
        // SAFETY: the channel just created.
        let fd = unsafe { (*raw).fd };
        set_nonblocking(fd, "connection manager")?;
        let (entries, by_raw, devices) = (HashMap::new(), HashMap::new(), HashMap::new());
        Ok(Self { entries, by_raw, devices, channel, fd })
    }

    fn create_id(&self) -> Result<Arc<Id>, Error> {
        let (guard, mut raw) = (self.channel.lock(), null_mut());
        let space = sys::rdma_port_space::RDMA_PS_TCP;
        // SAFETY: a live channel and room for the answer.
        if unsafe { sys::rdma_create_id(self.channel.raw, &mut raw, null_mut(), space) } != 0 {
            return Err(last("rdma_create_id", ""));
        }
        drop(guard);
        Ok(Arc::new(Id { raw, channel: self.channel.clone() }))
    }

    fn insert(&mut self, id: Arc<Id>, listener: bool, timeout_ms: i32) -> CmId {
        let cm_id = CmId::next();
        self.by_raw.insert(id.raw as usize, cm_id);
        self.entries.insert(cm_id, Known { id, listener, timeout_ms });
        cm_id
    }

    fn id(&self, id: CmId, what: &str) -> Result<&Arc<Id>, Error> {
        let entry = self.entries.get(&id).filter(|e| !e.listener);
        entry.map(|e| &e.id).ok_or_else(|| invalid(what, "no such connection"))
    }

    /// The device an id is bound to, opened when first seen.
    fn bind_device(&mut self, id: &Id) -> Result<(), Error> {
        let _guard = self.channel.lock();
        // SAFETY: a live id under the lock.
        let context = unsafe { (*id.raw).verbs };
        if context.is_null() {
            return Err(invalid("find the device of a connection", "the connection has none yet"));
        }
        if let Entry::Vacant(slot) = self.devices.entry(context as usize) {
            // SAFETY: the open context of a bound id.
            slot.insert(unsafe { RdmaDevice::open(context) }?);
        }
        Ok(())
    }

    fn raw_device(&self, id: &Id) -> Option<Arc<RdmaDevice>> {
        let _guard = self.channel.lock();
        // SAFETY: a live id under the lock.
        let context = unsafe { (*id.raw).verbs };
        self.devices.get(&(context as usize)).cloned()
    }

    /// Fetches, copies and acknowledges an event.
    fn fetch(&self) -> Result<Option<Event>, Error> {
        let _guard = self.channel.lock();
        let mut raw = null_mut();
        // SAFETY: a live, non-blocking channel and room for the answer.
        if unsafe { sys::rdma_get_cm_event(self.channel.raw, &mut raw) } != 0 {
            let error = last("rdma_get_cm_event", "");
            let none = error.source.kind() == io::ErrorKind::WouldBlock;
            return if none { Ok(None) } else { Err(error) };
        }
        // SAFETY: just fetched; acknowledged once, after it was copied.
        unsafe {
            let event = Event::copy(raw);
            sys::rdma_ack_cm_event(raw);
            Ok(Some(event))
        }
    }

    fn translate(&mut self, event: Event) -> Option<CmEvent> {
        if event.kind == kind::RDMA_CM_EVENT_CONNECT_REQUEST {
            return self.request(event);
        }
        let id = *self.by_raw.get(&(event.id as usize))?;
        match event.kind {
            kind::RDMA_CM_EVENT_ADDR_RESOLVED => self.resolve_route(id),
            kind::RDMA_CM_EVENT_ROUTE_RESOLVED => Some(self.resolved(id)),
            kind::RDMA_CM_EVENT_ESTABLISHED => Some(CmEvent::Established { id, private: event.private }),
            kind::RDMA_CM_EVENT_REJECTED => {
                Some(CmEvent::Rejected { id, reason: event.status, private: event.private })
            }
            kind::RDMA_CM_EVENT_DISCONNECTED => Some(CmEvent::Disconnected(id)),
            kind::RDMA_CM_EVENT_DEVICE_REMOVAL => Some(CmEvent::DeviceRemoved(id)),
            // Only says that the transport could reuse the numbers now.
            kind::RDMA_CM_EVENT_TIMEWAIT_EXIT => None,
            kind::RDMA_CM_EVENT_ADDR_CHANGE if self.entries.get(&id).is_some_and(|e| e.listener) => None,
            // ADDR_ERROR, ROUTE_ERROR, CONNECT_ERROR, UNREACHABLE; ADDR_CHANGE of a connection, whose address has
            // moved to another device, and what later versions add.
            _ => Some(CmEvent::Failed { id, reason: event.words() }),
        }
    }

    fn request(&mut self, event: Event) -> Option<CmEvent> {
        // librdmacm made this id for us; owned from here on, so that every way out destroys (and so rejects) it.
        let raw = Arc::new(Id { raw: event.id, channel: self.channel.clone() });
        let listener = *self.by_raw.get(&(event.listener as usize))?;
        let guard = self.channel.lock();
        // SAFETY: a live id under the lock.
        let (local, peer) = unsafe { addr::of_id(raw.raw) };
        drop(guard);
        let (local, peer) = (local?, peer?);
        if let Err(error) = self.bind_device(&raw) {
            tracing::warn!(%peer, %error, "connection request refused");
            return None;
        }
        let id = self.insert(raw, false, 0);
        Some(CmEvent::ConnectRequest { listener, id, private: event.private, local, peer })
    }

    fn resolve_route(&self, id: CmId) -> Option<CmEvent> {
        let entry = self.entries.get(&id)?;
        let timeout = entry.timeout_ms;
        // SAFETY: a live id under the lock that `call` takes.
        let result = entry.id.call(|raw| unsafe { sys::rdma_resolve_route(raw, timeout) });
        result.err().map(|e| CmEvent::Failed { id, reason: format!("rdma_resolve_route: {e}") })
    }

    fn resolved(&mut self, id: CmId) -> CmEvent {
        let result = self.id(id, "resolve").cloned().and_then(|raw| self.bind_device(&raw));
        match result {
            Ok(()) => CmEvent::Resolved(id),
            Err(error) => CmEvent::Failed { id, reason: error.to_string() },
        }
    }
}

/// The kernel says "address not available" of an address that is not there, and also of one whose port somebody has on all
/// addresses, such as its own rnbd_server (`cma_check_port` in cma.c).
fn is_taken(error: &io::Error, addr: IpAddr) -> bool {
    let is_local = || addr.is_unspecified() || std::net::UdpSocket::bind((addr, 0)).is_ok();
    error.raw_os_error() == Some(libc::EADDRNOTAVAIL) && is_local()
}

fn no_device_hint(error: &io::Error, addr: IpAddr) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            "another listener has this port, perhaps on all addresses, as the kernel's rnbd_server has: stop \
                                   it or choose another port"
                .into()
        }
        Some(libc::ENODEV | libc::EADDRNOTAVAIL) => format!(
            "no RDMA device behind address {addr}: add one (rdma link add rxe0 type rxe netdev <interface>), \
             choose an address that `rdma link` shows a device for, or use the provider soft-roce, which needs none"
        ),
        Some(libc::EACCES) => "ports below 1024 need CAP_NET_BIND_SERVICE".into(),
        _ => String::new(),
    }
}

fn conn_param(
    params: ConnParams,
    private: &[u8],
    room: usize,
    what: &str,
) -> Result<sys::rdma_conn_param, Error> {
    if private.len() > room {
        let hint = format!("at most {room} bytes of private data fit, not {}", private.len());
        return Err(invalid(what, &hint));
    }
    // SAFETY: integers and a nullable pointer: all zero is valid. No RDMA READs or atomics either way.
    let mut p: sys::rdma_conn_param = unsafe { MaybeUninit::zeroed().assume_init() };
    p.private_data = private.as_ptr().cast();
    p.private_data_len = private.len() as u8;
    p.retry_count = params.retry.min(7);
    p.rnr_retry_count = params.rnr_retry.min(7);
    p.responder_resources = params.read_depth;
    p.initiator_depth = params.read_depth;
    Ok(p)
}

impl Cm for RdmaCm {
    fn provider(&self) -> &'static str {
        PROVIDER
    }

    fn wait_fd(&self) -> RawFd {
        self.fd
    }

    fn poll(&mut self) -> Result<Option<CmEvent>, Error> {
        while let Some(event) = self.fetch()? {
            if let Some(event) = self.translate(event) {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    fn listen(&mut self, addr: SocketAddr, backlog: u32) -> Result<CmId, Error> {
        let fail = |call: &str, source: io::Error| {
            let source =
                if is_taken(&source, addr.ip()) { rustix::io::Errno::ADDRINUSE.into() } else { source };
            let hint = no_device_hint(&source, addr.ip());
            Error { what: format!("{call} {addr}"), source, hint }
        };
        let id = self.create_id()?;
        let mut reuse = 1i32;
        let len = size_of_val(&reuse);
        // SAFETY: a live id under `call`'s lock; the option is an int (rdma_set_option(3)).
        id.call(|raw| unsafe {
            let value = (&raw mut reuse).cast();
            sys::rdma_set_option(raw, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, value, len)
        })
        .map_err(|e| fail("rdma_set_option REUSEADDR for", e))?;
        let mut at = RawAddr::new(addr);
        // SAFETY: a live id under `call`'s lock, and an address that outlives the call.
        id.call(|raw| unsafe { sys::rdma_bind_addr(raw, at.as_mut_ptr()) })
            .map_err(|e| fail("rdma_bind_addr", e))?;
        let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
        // SAFETY: a live id under `call`'s lock.
        id.call(|raw| unsafe { sys::rdma_listen(raw, backlog) }).map_err(|e| fail("rdma_listen", e))?;
        Ok(self.insert(id, true, 0))
    }

    fn local_addr(&self, id: CmId) -> Option<SocketAddr> {
        let entry = self.entries.get(&id)?;
        let _guard = self.channel.lock();
        // SAFETY: a live id under the lock.
        unsafe { addr::of_id(entry.id.raw) }.0
    }

    fn resolve(&mut self, src: Option<IpAddr>, dst: SocketAddr, timeout: Duration) -> Result<CmId, Error> {
        let id = self.create_id()?;
        let mut from = src.map(|ip| RawAddr::new(SocketAddr::new(ip, 0)));
        let from = from.as_mut().map_or(null_mut(), RawAddr::as_mut_ptr);
        let mut to = RawAddr::new(dst);
        let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: a live id under `call`'s lock; addresses (null: the system's choice) that outlive the call.
        id.call(|raw| unsafe { sys::rdma_resolve_addr(raw, from, to.as_mut_ptr(), timeout_ms) }).map_err(
            |source| {
                let hint = no_device_hint(&source, src.unwrap_or(Ipv4Addr::UNSPECIFIED.into()));
                Error { what: format!("rdma_resolve_addr {dst}"), source, hint }
            },
        )?;
        Ok(self.insert(id, false, timeout_ms))
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.devices.values().map(|d| d.clone() as Arc<dyn Device>).collect()
    }

    fn device(&self, id: CmId) -> Option<Arc<dyn Device>> {
        let id = self.id(id, "device").ok()?;
        self.raw_device(id).map(|d| d as Arc<dyn Device>)
    }

    fn port(&self, id: CmId) -> u8 {
        let Ok(id) = self.id(id, "port") else { return 1 };
        let _guard = self.channel.lock();
        // SAFETY: a live id under the lock. librdmacm sets the number when it binds the id to a device; before it is 0.
        unsafe { (*id.raw).port_num }.max(1)
    }

    fn create_qp(&mut self, id: CmId, caps: &QpCaps, cq: &CqHandle) -> Result<Box<dyn Qp>, Error> {
        let what = format!("rdma_create_qp ({caps:?})");
        let id = self.id(id, &what)?.clone();
        let device = self.raw_device(&id).ok_or_else(|| invalid(&what, "resolve the address first"))?;
        let cq = Arc::downcast::<RawCq>(cq.clone()).ok().filter(|cq| cq.device.context == device.context);
        let cq = cq.ok_or_else(|| invalid(&what, "the completion queue is of another device"))?;
        // SAFETY: integers and nullable pointers: all zero is valid.
        let mut attr: sys::ibv_qp_init_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        (attr.send_cq, attr.recv_cq) = (cq.cq, cq.cq);
        attr.qp_type = sys::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = caps.max_send_wr;
        attr.cap.max_recv_wr = caps.max_recv_wr;
        attr.cap.max_send_sge = caps.max_send_sge;
        attr.cap.max_recv_sge = caps.max_recv_sge;
        // SAFETY: a live id under `call`'s lock that has no queue pair yet; domain and completion queue are of its
        // device (checked) and live in `device` and `cq`.
        id.call(|raw| unsafe {
            if (*raw).qp.is_null() {
                sys::rdma_create_qp(raw, device.pd, &mut attr)
            } else {
                *libc::__errno_location() = libc::EEXIST;
                -1
            }
        })
        .map_err(|source| {
            let info = device.info();
            let hint =
                format!("{} allows {} work requests of {} entries", info.name, info.max_qp_wr, info.max_sge);
            Error { what, source, hint }
        })?;
        // SAFETY: just created, and `RdmaQp` is the only one to destroy it.
        Ok(Box::new(unsafe { RdmaQp::new(id, cq, device) }))
    }

    fn connect(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        let mut param = conn_param(params, private, 56, "rdma_connect")?;
        let id = self.id(id, "rdma_connect")?;
        // SAFETY: a live id under `call`'s lock; `private` outlives the call.
        id.call(|raw| unsafe { sys::rdma_connect(raw, &mut param) }).map_err(|source| Error {
            what: "rdma_connect".into(),
            source,
            hint: String::new(),
        })
    }

    fn accept(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        let mut param = conn_param(params, private, 196, "rdma_accept")?;
        let id = self.id(id, "rdma_accept")?;
        // SAFETY: as in `connect`.
        id.call(|raw| unsafe { sys::rdma_accept(raw, &mut param) }).map_err(|source| Error {
            what: "rdma_accept".into(),
            source,
            hint: String::new(),
        })
    }

    fn reject(&mut self, id: CmId, private: &[u8]) -> Result<(), Error> {
        if private.len() > 148 {
            return Err(invalid("rdma_reject", "at most 148 bytes of private data fit"));
        }
        let id = self.id(id, "rdma_reject")?;
        // SAFETY: a live id under `call`'s lock; `private` outlives the call.
        id.call(|raw| unsafe { sys::rdma_reject(raw, private.as_ptr().cast(), private.len() as u8) })
            .map_err(|source| Error { what: "rdma_reject".into(), source, hint: String::new() })
    }

    fn disconnect(&mut self, id: CmId) -> Result<(), Error> {
        let id = self.id(id, "rdma_disconnect")?;
        // SAFETY: a live id under `call`'s lock. librdmacm moves the queue pair to the error state first.
        match id.call(|raw| unsafe { sys::rdma_disconnect(raw) }) {
            // Not connected, or not any more.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTCONN)) => Ok(()),
            Err(source) => Err(Error { what: "rdma_disconnect".into(), source, hint: String::new() }),
            Ok(()) => Ok(()),
        }
    }

    fn destroy(&mut self, id: CmId) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.by_raw.remove(&(entry.id.raw as usize));
        if !entry.listener {
            // The queue pair may live on for a while: stop it, and tell the peer, now. Errors: was not connected.
            // SAFETY: a live id under `call`'s lock.
            let _ = entry.id.call(|raw| unsafe { sys::rdma_disconnect(raw) });
        }
    }
}

impl Drop for RdmaCm {
    fn drop(&mut self) {
        let all: Vec<CmId> = self.entries.keys().copied().collect();
        all.into_iter().for_each(|id| self.destroy(id));
    }
}

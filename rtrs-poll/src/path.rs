//! What the connections of one path share across reactors: its chunks and their keys, its state, its counters.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use iobuf::{Registry, Segment};
use rtrs_proto::limits::Geometry;
use rtrs_proto::response::Policy;
use rtrs_proto::wire::{SgDesc, Uuid};
use verbs::{Access, Device, Domain, Mr, Sge, Window, WindowKind};

use crate::options::Options;
use crate::session::Session;

/// Bytes of INFO_REQ.
pub(crate) const INFO_REQ_LEN: usize = 272;

const CONNECTING: u8 = 0;
const UP: u8 = 1;
const DRAINING: u8 = 2;
const CLOSING: u8 = 3;

/// The memory of a path could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Mapping refused.
    #[error(transparent)]
    Map(#[from] iobuf::MapError),
    /// Registration refused.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
    /// Rotating keys asked for on a device without the means.
    #[error(
        "rotate_rkeys needs memory windows that work on every queue pair; device {0} has none: set rotate_rkeys to false"
    )]
    NoWindows(String),
}

/// One path: every connection holds an `Arc` of it while it has requests in flight.
pub struct Path {
    /// Its session.
    pub session: Arc<Session>,
    /// Client's uuid of the path (`sess_uuid`).
    pub uuid: Uuid,
    /// Client's address.
    pub peer: SocketAddr,
    /// Ours.
    pub local: SocketAddr,
    /// Name of the RDMA device.
    pub device: String,
    /// Provider of the device.
    pub provider: &'static str,
    /// Sizes.
    pub geometry: Geometry,
    pub(crate) policy: Policy,
    /// Of its memory and queue pairs: no other client's keys are good here, and its own are good nowhere else.
    pub(crate) domain: Domain,
    /// Non-zero, unique among living paths: owner tag in [`Session`].
    pub(crate) tag: u32,
    /// From INFO_REQ on: who has not come so far has cost no memory.
    chunks: OnceLock<Chunks>,
    service: Mr,
    state: AtomicU8,
    /// Set by every received request, cleared by the heartbeat.
    pub(crate) traffic: AtomicBool,
    /// Last heartbeat round trip in ns, 0 before the first.
    pub(crate) latency_ns: AtomicU64,
    counters: Mutex<Vec<Arc<Counters>>>,
    stats_base: Mutex<PathStats>,
}

/// Where a client's requests and data land.
struct Chunks {
    // Fields are dropped in this order: a region cannot be deregistered while windows are bound to it.
    windows: Option<Box<[Mutex<Window>]>>,
    mr: Mr,
}

/// Counts of one connection. One writer, so plain loads and stores.
#[derive(Debug, Default)]
pub struct Counters {
    rd_cnt: AtomicU64,
    rd_bytes: AtomicU64,
    wr_cnt: AtomicU64,
    wr_bytes: AtomicU64,
}

/// Requests and bytes (user message plus data) of a path, as the kernel's `stats/rdma` counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathStats {
    /// READ requests.
    pub rd_cnt: u64,
    /// Their bytes.
    pub rd_bytes: u64,
    /// WRITE requests.
    pub wr_cnt: u64,
    /// Their bytes.
    pub wr_bytes: u64,
}

impl Counters {
    pub(crate) fn count(&self, read: bool, bytes: u64) {
        let (cnt, sum) = if read { (&self.rd_cnt, &self.rd_bytes) } else { (&self.wr_cnt, &self.wr_bytes) };
        cnt.store(cnt.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        sum.store(sum.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }
}

/// Who the path belongs to and where it runs.
pub(crate) struct Identity {
    pub session: Arc<Session>,
    pub uuid: Uuid,
    pub tag: u32,
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

impl Path {
    /// A path without chunks yet ([`Path::make_chunks`]). Control thread only.
    pub(crate) fn new(
        who: Identity,
        options: &Options,
        device: &Arc<dyn Device>,
    ) -> Result<Self, MemoryError> {
        let info = device.info();
        if options.rotate_rkeys && info.windows != WindowKind::PerDomain {
            return Err(MemoryError::NoWindows(info.name.clone()));
        }
        let domain = device.alloc_domain();
        let local_only = Access { domain, local_write: true, ..Access::default() };
        let service = iobuf::Region::new(service_len(options.geometry.queue_depth()))?;
        Ok(Self {
            session: who.session,
            uuid: who.uuid,
            peer: who.peer,
            local: who.local,
            tag: who.tag,
            device: info.name.clone(),
            provider: info.provider,
            geometry: options.geometry,
            policy: options.policy(),
            domain,
            chunks: OnceLock::new(),
            service: device.clone().register(service, local_only)?,
            state: AtomicU8::new(CONNECTING),
            traffic: AtomicBool::new(false),
            latency_ns: AtomicU64::new(0),
            counters: Mutex::default(),
            stats_base: Mutex::default(),
        })
    }

    /// Maps and registers the chunks, once. Control thread only: it takes milliseconds where the device pins.
    pub(crate) fn make_chunks(
        &self,
        options: &Options,
        device: &Arc<dyn Device>,
        registry: &Registry,
    ) -> Result<(), MemoryError> {
        let access = Access {
            domain: self.domain,
            local_write: true,
            remote_write: !options.rotate_rkeys,
            window_bind: options.rotate_rkeys,
            ..Access::default()
        };
        let region = registry.map(self.geometry.total_bytes() as usize)?;
        if !device.info().pins {
            region.populate_by_page();
        }
        let mr = device.clone().register(region, access)?;
        let depth = self.geometry.queue_depth();
        let windows = options.rotate_rkeys.then(|| make_windows(device, depth)).transpose()?;
        let made = self.chunks.set(Chunks { windows, mr });
        debug_assert!(made.is_ok(), "INFO_REQ is accepted once");
        Ok(())
    }

    /// INFO_REQ has been accepted: requests are welcome.
    pub fn is_up(&self) -> bool {
        self.state.load(Ordering::Acquire) == UP
    }

    /// `connecting`, `connected`, `draining` or `closing`.
    pub fn state_name(&self) -> &'static str {
        match self.state.load(Ordering::Acquire) {
            CONNECTING => "connecting",
            UP => "connected",
            DRAINING => "draining",
            _ => "closing",
        }
    }

    pub(crate) fn set_up(&self) {
        self.state.store(UP, Ordering::Release);
    }

    pub(crate) fn set_draining(&self) {
        self.state.store(DRAINING, Ordering::Release);
    }

    pub(crate) fn set_closing(&self) {
        self.state.store(CLOSING, Ordering::Release);
    }

    /// Round trip of the last heartbeat.
    pub fn latency_ns(&self) -> u64 {
        self.latency_ns.load(Ordering::Relaxed)
    }

    pub(crate) fn add_counters(&self) -> Arc<Counters> {
        let c = Arc::<Counters>::default();
        self.counters.lock().unwrap_or_else(|e| e.into_inner()).push(c.clone());
        c
    }

    /// Sums over its connections since the last reset.
    pub fn stats(&self) -> PathStats {
        let (now, base) = (self.totals(), *self.stats_base.lock().unwrap_or_else(|e| e.into_inner()));
        PathStats {
            rd_cnt: now.rd_cnt - base.rd_cnt,
            rd_bytes: now.rd_bytes - base.rd_bytes,
            wr_cnt: now.wr_cnt - base.wr_cnt,
            wr_bytes: now.wr_bytes - base.wr_bytes,
        }
    }

    /// Starts counting at 0 again. The counters themselves have one writer each, so their present values become the
    /// base instead.
    pub fn reset_stats(&self) {
        *self.stats_base.lock().unwrap_or_else(|e| e.into_inner()) = self.totals();
    }

    fn totals(&self) -> PathStats {
        let all = self.counters.lock().unwrap_or_else(|e| e.into_inner());
        all.iter().fold(PathStats::default(), |s, c| PathStats {
            rd_cnt: s.rd_cnt + c.rd_cnt.load(Ordering::Relaxed),
            rd_bytes: s.rd_bytes + c.rd_bytes.load(Ordering::Relaxed),
            wr_cnt: s.wr_cnt + c.wr_cnt.load(Ordering::Relaxed),
            wr_bytes: s.wr_bytes + c.wr_bytes.load(Ordering::Relaxed),
        })
    }

    /// Offset of chunk `id` (below the queue depth) in the chunk region.
    fn chunk_offset(&self, id: u16) -> usize {
        id as usize * self.geometry.chunk_size() as usize
    }

    /// Copies out of chunk `id` at `off`; the client may be writing there, so the copy is what gets checked.
    pub(crate) fn copy_out(&self, id: u16, off: u32, out: &mut [u8]) -> bool {
        self.chunks.get().is_some_and(|c| c.mr.region().copy_out(self.chunk_offset(id) + off as usize, out))
    }

    /// Copies `data` to the start of chunk `id`.
    pub(crate) fn copy_in(&self, id: u16, data: &[u8]) -> bool {
        data.len() <= self.geometry.chunk_size() as usize
            && self.chunks.get().is_some_and(|c| c.mr.region().copy_in(self.chunk_offset(id), data))
    }

    /// The first `len` bytes of chunk `id` for a bdev request.
    ///
    /// # Safety
    /// The caller owns buffer `id` ([`Session::acquire`]) and keeps an `Arc` of this path until the request that uses
    /// the segment has completed.
    pub(crate) unsafe fn segment(&self, id: u16, len: u32) -> Option<Segment> {
        if len > self.geometry.chunk_size() {
            return None;
        }
        // SAFETY: alive and unshared by this function's own contract.
        unsafe { self.chunks.get()?.mr.region().segment(self.chunk_offset(id), len as usize) }
    }

    /// The first `len` bytes of chunk `id` as source of an RDMA write.
    pub(crate) fn chunk_sge(&self, id: u16, len: u32) -> Option<Sge> {
        self.chunks.get()?.mr.sge(self.chunk_offset(id), len.min(self.geometry.chunk_size()))
    }

    /// Where INFO_REQ lands.
    pub(crate) fn info_req_sge(&self) -> Option<Sge> {
        self.service.sge(0, INFO_REQ_LEN as u32)
    }

    pub(crate) fn info_req(&self) -> [u8; INFO_REQ_LEN] {
        let mut bytes = [0; INFO_REQ_LEN];
        let inside = self.service.region().copy_out(0, &mut bytes);
        debug_assert!(inside, "the service region starts with room for INFO_REQ");
        bytes
    }

    /// Puts an INFO_RSP where it can be sent from.
    pub(crate) fn stage_info_rsp(&self, message: &[u8]) -> Option<Sge> {
        let at = info_rsp_at(self.geometry.queue_depth());
        if !self.service.region().copy_in(at, message) {
            return None;
        }
        self.service.sge(at, message.len() as u32)
    }

    /// Puts the 8-byte RKEY_RSP of buffer `id` where it can be sent from.
    pub(crate) fn stage_rkey_rsp(&self, id: u16, message: &[u8; 8]) -> Option<Sge> {
        let at = RKEY_RSPS_AT + 8 * id as usize;
        if !self.service.region().copy_in(at, message) {
            return None;
        }
        self.service.sge(at, 8)
    }

    /// Calls `f` with the window of chunk `id` and the chunk's place, if keys rotate.
    pub(crate) fn with_window<R>(
        &self,
        id: u16,
        f: impl FnOnce(&mut Window, &Mr, usize, u32) -> R,
    ) -> Option<R> {
        // One owner per buffer id, so this lock is never contended.
        let Chunks { windows, mr } = self.chunks.get()?;
        let mut window = windows.as_ref()?.get(id as usize)?.lock().unwrap_or_else(|e| e.into_inner());
        Some(f(&mut window, mr, self.chunk_offset(id), self.geometry.chunk_size()))
    }

    /// Descriptors for INFO_RSP: one over all chunks, or one per chunk with its window's key. None before there are chunks.
    pub(crate) fn descriptors(&self) -> Vec<SgDesc> {
        let Some(Chunks { windows, mr }) = self.chunks.get() else { return Vec::new() };
        let base = mr.region().as_ptr() as u64;
        let Some(windows) = windows else {
            return vec![SgDesc::new(base, mr.rkey(), self.geometry.total_bytes())];
        };
        let key = |w: &Mutex<Window>| w.lock().unwrap_or_else(|e| e.into_inner()).rkey;
        let chunk = self.geometry.chunk_size();
        let desc = |(i, w)| SgDesc::new(base + i as u64 * u64::from(chunk), key(w), chunk);
        windows.iter().enumerate().map(desc).collect()
    }
}

/// Service region: INFO_REQ at 0, one RKEY_RSP per buffer here, then INFO_RSP.
const RKEY_RSPS_AT: usize = 1024;

fn info_rsp_at(queue_depth: u16) -> usize {
    RKEY_RSPS_AT + 8 * queue_depth as usize
}

fn service_len(queue_depth: u16) -> usize {
    info_rsp_at(queue_depth) + 8 + 16 * queue_depth as usize
}

fn make_windows(device: &Arc<dyn Device>, n: u16) -> Result<Box<[Mutex<Window>]>, verbs::Error> {
    (0..n).map(|_| device.clone().alloc_window().map(Mutex::new)).collect()
}

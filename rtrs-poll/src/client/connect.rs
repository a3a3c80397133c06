//! From an attempt's first connection to INFO_RSP.

use std::sync::Arc;
use std::time::Instant;

use rtrs_proto::client::{Rbufs, ServerParams, check_accept, info_req, parse_reject};
use rtrs_proto::handshake::ConnectRequest;
use rtrs_proto::wire::SERVICE_CON_QUEUE_DEPTH;
use verbs::{ConnParams, Device, QpCaps, RejectReason, SgeList};
use zerocopy::IntoBytes;

use super::control::{Client, ConnRef};
use super::entry::{After, Attempt, ConEntry, PathEntry, PathPhase, SessionEntry, SessionPhase};
use super::error::PathError;
use super::event::Event;
use super::lane::{ConSetup, ConSizes, Lane, LinkMemory, LinkSetup, MAX_PIECES};
use super::options::SessionOptions;
use super::path::{Path, PathId};
use super::session::{SessionId, id_share};
use super::upper::Upper;

/// Receives beyond those of answers, for heartbeats and their answers.
const SPARE_RECEIVES: u32 = 16;
/// Send-queue entries beyond twice the requests: unsignaled ones not yet known to be done, and heartbeats.
const SPARE_SENDS: u32 = 128;
/// How often both ends send a packet again, which is the requester's to say. One less than the kernel's client, and than the
/// field holds: Linux' rxe takes 7 as "for ever" (`rxe_comp.c`: `COMPST_ERROR_RETRY`), and a dead path would be known by its
/// missing heartbeats only, after 30 s.
const RETRY_COUNT: u8 = 6;

impl<U: Upper> Client<U> {
    /// Begins attempts of paths that wait. As long as the server may not know the session, one path at a time is
    /// tried, as it makes the session there; the others join when it is up.
    pub(super) fn start_waiting(&mut self, now: Instant, id: SessionId) {
        while let Some(session) = self.sessions.get_mut(&id)
            && let Some((path, first)) = session.next_attempt()
        {
            self.begin(now, path, first);
        }
        self.tell_if_stalled(id);
    }

    fn tell_if_stalled(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id).filter(|s| s.phase == SessionPhase::Down) else {
            return;
        };
        let stalled = session.paths.iter().all(|p| p.phase == PathPhase::Closed);
        if stalled && !session.stalled {
            self.events.push(Event::SessionStalled { session: id });
        }
        session.stalled = stalled;
    }

    /// The connection managers that a path may use, in order.
    pub(super) fn candidates(&self, path: &PathEntry) -> Vec<usize> {
        let of = |name: &String| self.cms.iter().position(|c| c.provider() == name);
        path.spec.providers.iter().filter_map(of).collect()
    }

    fn begin(&mut self, now: Instant, id: PathId, first: bool) {
        let Some(path) = self.path(id) else { return };
        (path.phase, path.after) = (PathPhase::Connecting, After::Retry);
        path.attempts += 1;
        let cm = self.candidate(id);
        if let Some(path) = self.path(id) {
            path.attempt = Some(Attempt::new(cm, first));
        }
        if let Err(error) = self.dial(now, id) {
            self.close_path(now, id, error);
        }
    }

    /// The connection manager for the next attempt; there is one, or the path would not have been taken.
    fn candidate(&self, id: PathId) -> usize {
        let path = self.sessions.values().flat_map(|s| &s.paths).find(|p| p.id == id);
        path.and_then(|p| self.candidates(p).get(p.provider).copied()).unwrap_or(0)
    }

    /// Starts the next connection of a path.
    fn dial(&mut self, now: Instant, id: PathId) -> Result<(), PathError> {
        let Some(session) = self.sessions.values_mut().find(|s| s.has(id)) else { return Ok(()) };
        let timeout = session.options.connect_timeout;
        let Some(path) = session.path(id) else { return Ok(()) };
        let Some(attempt) = &mut path.attempt else { return Ok(()) };
        let cid = attempt.cons.len() as u16;
        let con = self.cms[attempt.cm]
            .resolve(path.spec.src, path.spec.dst, timeout)
            .map_err(|e| PathError::Verbs(format!("con {cid}: {e}")))?;
        attempt.deadline = now.checked_add(timeout);
        attempt.cons.push(ConEntry::new(con));
        self.conns.insert(con, ConnRef { path: id, cid });
        Ok(())
    }

    /// Address and route are known: give the connection its queue pair, and connect.
    pub(super) fn resolved(&mut self, now: Instant, conn: ConnRef) {
        if let Err(why) = self.try_connect(conn) {
            self.con_failed(now, conn, &why);
        }
    }

    fn try_connect(&mut self, conn: ConnRef) -> Result<(), String> {
        let Some(session) = self.sessions.values_mut().find(|s| s.has(conn.path)) else { return Ok(()) };
        let (options, session_uuid) = (session.options.clone(), session.uuid);
        let Some(path) = session.path(conn.path) else { return Ok(()) };
        let (path_uuid, recon_cnt) = (path.uuid, path.attempts as u16);
        if path.phase != PathPhase::Connecting {
            return Ok(());
        }
        let Some(attempt) = &mut path.attempt else { return Ok(()) };
        let cm = &mut self.cms[attempt.cm];
        let Some(con) = attempt.cons.get_mut(usize::from(conn.cid)) else { return Ok(()) };
        con.resolved = true;
        let device = cm.device(con.id).ok_or("the connection has no device")?;
        path.hca_name = Some(device.info().name.clone());
        path.hca_port = cm.port(con.id);
        // Keys of one path are those of one device.
        if !Arc::ptr_eq(attempt.device.get_or_insert_with(|| device.clone()), &device) {
            return Err(format!("it would go by another device, {}", device.info().name));
        }
        let links = options.used_reactors().len();
        let sizes = con_sizes(options.connections, conn.cid, attempt.params.as_ref(), links, &device);
        let caps = QpCaps {
            max_send_wr: sizes.send_wr,
            // One more for INFO_RSP.
            max_recv_wr: sizes.receives + 1,
            max_send_sge: sizes.send_sge,
            max_recv_sge: 1,
            domain: verbs::Domain::COMMON,
        };
        let lane = options.used_reactors()[options.reactor_of(conn.cid)];
        let cq = self.lanes[lane].cqs.reserve(&device, caps.max_send_wr + caps.max_recv_wr)?;
        con.share = Some((lane, cq.share));
        if let Some(new) = cq.new {
            Lane::<U>::send(&self.lanes[lane].handle, move |cx, l| l.cqs.add(cx, new));
        }
        con.qp = Some(cm.create_qp(con.id, &caps, &cq.handle).map_err(|e| e.to_string())?);
        con.sizes = Some(sizes);
        let request = ConnectRequest {
            cid: conn.cid,
            cid_num: options.connections,
            recon_cnt,
            path_uuid,
            session_uuid,
            first_conn: attempt.first,
        };
        let params = ConnParams { retry: RETRY_COUNT, give_up: options.ack_timeout, ..ConnParams::FOREVER };
        cm.connect(con.id, params, request.to_wire().as_bytes()).map_err(|e| e.to_string())
    }

    /// The server said yes: on to the next connection, or to INFO_REQ.
    pub(super) fn established(&mut self, now: Instant, conn: ConnRef, private: &[u8]) {
        if let Err(error) = self.try_established(now, conn, private) {
            self.close_path(now, conn.path, error);
        }
    }

    fn try_established(&mut self, now: Instant, conn: ConnRef, private: &[u8]) -> Result<(), PathError> {
        let Some(session) = self.sessions.values_mut().find(|s| s.has(conn.path)) else { return Ok(()) };
        let (connections, limits) = (session.options.connections, session.demands());
        let Some(attempt) = session.path(conn.path).and_then(|p| p.attempt_in(PathPhase::Connecting)) else {
            return Ok(());
        };
        if let Some(con) = attempt.cons.get_mut(usize::from(conn.cid)) {
            con.established = true;
        }
        let broken = |e| PathError::Protocol(format!("con {}: {e}", conn.cid));
        if conn.cid == 0 {
            let params = ServerParams::parse(private).map_err(broken)?;
            let sizes = attempt.cons.first().and_then(|c| c.sizes);
            limits.check(&params, sizes.as_ref()).map_err(PathError::Misfit)?;
            attempt.params = Some(params);
        } else {
            check_accept(private).map_err(broken)?;
        }
        if attempt.cons.len() == usize::from(connections) {
            self.open_links(now, conn.path)
        } else {
            self.dial(now, conn.path)
        }
    }

    pub(super) fn rejected(&mut self, now: Instant, conn: ConnRef, reason: i32, private: &[u8]) {
        let cid = conn.cid;
        let error = match reason {
            RejectReason::CONSUMER => PathError::Refused { cid, errno: parse_reject(private) },
            _ => PathError::NoListener { cid, reason },
        };
        self.close_path(now, conn.path, error);
    }

    pub(super) fn con_failed(&mut self, now: Instant, conn: ConnRef, why: &str) {
        let up = self.path(conn.path).is_some_and(|p| p.phase == PathPhase::Up);
        let why = format!("con {}: {why}", conn.cid);
        self.close_path(now, conn.path, if up { PathError::Lost(why) } else { PathError::Verbs(why) });
    }

    /// All connections are there: give them to their reactors.
    fn open_links(&mut self, now: Instant, id: PathId) -> Result<(), PathError> {
        let Some(session) = self.sessions.values_mut().find(|s| s.has(id)) else { return Ok(()) };
        let options = session.options.clone();
        let Some(path) = session.path(id) else { return Ok(()) };
        path.phase = PathPhase::Info;
        let shared = path.shared.clone();
        let Some(attempt) = &mut path.attempt else { return Ok(()) };
        let (Some(params), Some(device)) = (attempt.params, attempt.device.clone()) else { return Ok(()) };
        attempt.deadline = now.checked_add(options.connect_timeout);
        // Milliseconds, if it is the device's first path; the server waits for nothing meanwhile.
        self.keys.enter(&device);
        attempt.keyed = true;
        path.rotating_keys = params.rotating_keys;
        let setups: Result<Vec<LinkSetup>, String> = (0..options.used_reactors().len())
            .map(|i| link_setup(attempt, &options, &shared, &params, &device, i))
            .collect();
        for (setup, reactor) in setups.map_err(PathError::Verbs)?.into_iter().zip(options.used_reactors()) {
            attempt.open_links += 1;
            Lane::<U>::send(&self.lanes[*reactor].handle, move |_, lane| lane.open_link(setup));
        }
        Ok(())
    }

    /// INFO_RSP came in: the path is connected, or the server is no good.
    pub(super) fn info_rsp(&mut self, now: Instant, id: PathId, message: &[u8]) {
        let Some(path) = self.path(id) else { return };
        let Some(attempt) = path.attempt_in(PathPhase::Info) else { return };
        let Some(params) = attempt.params else { return };
        match Rbufs::parse(&params.geometry, message) {
            Ok(rbufs) => {
                attempt.rbufs = Some(rbufs);
                attempt.deadline = None;
                path.phase = PathPhase::Ready;
                self.path_ready(now, id);
            }
            Err(e) => self.close_path(now, id, PathError::Protocol(e.to_string())),
        }
    }
}

impl SessionEntry {
    pub(super) fn has(&self, path: PathId) -> bool {
        self.paths.iter().any(|p| p.id == path)
    }

    /// A path whose turn it is, and whether it may make the session at the server: one that has been there before, or
    /// any if none has. Not while another path is up: a server that does not know the session then has forgotten it,
    /// with all that is open in it, though that path has not noticed yet. The refusal (ENXIO) is repeated until it has.
    fn next_attempt(&self) -> Option<(PathId, bool)> {
        let known = self.is_known();
        if self.phase == SessionPhase::Ending || !known && self.paths.iter().any(PathEntry::is_active) {
            return None;
        }
        let path = self.paths.iter().find(|p| p.phase == PathPhase::Waiting)?;
        Some((path.id, self.phase != SessionPhase::Up && (path.ever_up || !known)))
    }

    /// What its paths that are up have settled; without one, nothing is.
    pub(super) fn demands(&self) -> Demands {
        let limits = self.shared.as_ref().map(|s| s.limits).filter(|_| self.phase == SessionPhase::Up);
        Demands {
            reactors: self.options.used_reactors().len(),
            queue_depth: limits.map(|l| l.queue_depth),
            max_io_size: limits.map_or(0, |l| l.max_io_size),
            max_hdr_size: limits.map_or(0, |_| self.max_hdr_size),
            max_pieces: limits.map_or(1, |l| l.max_pieces),
        }
    }
}

/// What a server and a device must offer to serve a session.
pub(super) struct Demands {
    reactors: usize,
    queue_depth: Option<u16>,
    max_io_size: u32,
    max_hdr_size: u32,
    max_pieces: usize,
}

impl Demands {
    /// `Err` says what is wrong.
    pub(super) fn check(&self, params: &ServerParams, sizes: Option<&ConSizes>) -> Result<(), String> {
        let g = &params.geometry;
        if let Some(depth) = self.queue_depth.filter(|d| *d != g.queue_depth()) {
            let got = g.queue_depth();
            return Err(format!("its queue depth is {got}, that of the session's other paths {depth}"));
        }
        if usize::from(g.queue_depth()) < self.reactors {
            let (n, depth) = (self.reactors, g.queue_depth());
            return Err(format!("{n} reactors cannot share a queue depth of {depth}: use fewer reactors"));
        }
        for (what, got, least) in [
            ("max_io_size", g.max_io_size(), self.max_io_size),
            ("max_hdr_size", g.max_hdr_size(), self.max_hdr_size),
        ] {
            if got < least {
                return Err(format!(
                    "its {what} is {got}, less than the {least} of the session's other paths"
                ));
            }
        }
        let pieces = sizes.map_or(0, ConSizes::max_pieces);
        if pieces < self.max_pieces {
            return Err(format!(
                "the device sends {} pieces at once, fewer than the {} of the session's other paths",
                pieces + 1,
                self.max_pieces + 1
            ));
        }
        Ok(())
    }
}

/// The connections of a path that belong to its `index`th link, with the memory they need.
fn link_setup(
    attempt: &mut Attempt,
    options: &SessionOptions,
    path: &Arc<Path>,
    params: &ServerParams,
    device: &Arc<dyn Device>,
    index: usize,
) -> Result<LinkSetup, String> {
    let mut cons = Vec::new();
    for cid in (0..attempt.cons.len() as u16).filter(|cid| options.reactor_of(*cid) == index) {
        let con = &mut attempt.cons[usize::from(cid)];
        let (Some(qp), Some(sizes)) = (con.qp.take(), con.sizes) else {
            return Err(format!("con {cid} has no queue pair"));
        };
        cons.push(ConSetup { cid, qp, sizes });
    }
    let receives: u32 = cons.iter().map(|c| c.sizes.receives).sum();
    let keyed = if params.rotating_keys { receives as usize } else { 0 };
    let (service, depth) = (index == 0, params.geometry.queue_depth());
    let (_, ids) = id_share(depth, index, options.used_reactors().len());
    let memory = LinkMemory::new(device, ids.into(), keyed, service.then_some(depth))?;
    Ok(LinkSetup {
        cons,
        memory,
        path: path.clone(),
        index,
        geometry: params.geometry,
        rotating_keys: params.rotating_keys,
        // The name was checked by `Client::create_session`.
        info_req: if service { info_req(&options.name) } else { None },
    })
}

/// Queue sizes of connection `cid`. Con 0 comes before the queue depth is known, so it has a fixed size, as the
/// kernel's (`SERVICE_CON_QUEUE_DEPTH`), and so has its share of I/O if it is the only one.
fn con_sizes(
    connections: u16,
    cid: u16,
    params: Option<&ServerParams>,
    links: usize,
    device: &Arc<dyn Device>,
) -> ConSizes {
    let info = device.info();
    let requests = match params {
        Some(p) if cid > 0 => u32::from(p.geometry.queue_depth()).div_ceil(links as u32),
        _ => u32::from(SERVICE_CON_QUEUE_DEPTH),
    };
    debug_assert!(cid < connections);
    let send_wr = (2 * requests + SPARE_SENDS).min(info.max_qp_wr);
    let receives = (requests + SPARE_RECEIVES).min(info.max_qp_wr.saturating_sub(1));
    let max_inflight = receives.saturating_sub(SPARE_RECEIVES).max(1);
    let send_sge = info.max_sge.min(SgeList::MAX as u32);
    debug_assert!(send_sge as usize <= MAX_PIECES + 1);
    ConSizes { send_wr, receives, max_inflight, send_sge }
}

//! From connect request to accept, and INFO_REQ.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use reactor::Turn;
use rtrs_proto::admission::{Admitted, CloseReason, PathId, PathUp, Refusal};
use rtrs_proto::errno::Errno;
use rtrs_proto::handshake::{self, ConnectRequest};
use verbs::{CmId, ConnParams, Device, Qp, QpCaps};
use zerocopy::IntoBytes;

use super::{ConEntry, ConnRef, PathEntry, Server, ServerCell};
use crate::cqs::Share;
use crate::lane::{ConKey, Lane};
use crate::options::{SPARE_RECEIVES, queue_lengths};
use crate::path::{Identity, Path};
use crate::session::Session;
use crate::upper::Upper;

impl<U: Upper> Server<U> {
    #[expect(clippy::too_many_arguments, reason = "a connect request has these parts")]
    pub(super) fn connect_request(
        &mut self,
        cx: &mut Turn<'_>,
        cm: usize,
        id: CmId,
        ack_delay: Option<u8>,
        private: &[u8],
        local: SocketAddr,
        peer: SocketAddr,
    ) {
        let (request, admitted) = match self.admit(cx, private, local.ip(), peer.ip()) {
            Ok(admitted) => admitted,
            Err((errno, why)) => return self.refuse(cm, id, peer, errno, &why),
        };
        self.make_room(cx, &admitted.evicted);
        let result = self
            .path_of(cx, cm, id, &request, &admitted, local, peer)
            .and_then(|tag| self.create_con(cx, cm, id, ack_delay, tag, admitted.cid));
        if let Err(why) = result {
            self.refuse(cm, id, peer, Errno::ENOMEM, &why);
            match self.tags.get(&admitted.path).copied() {
                Some(tag) => self.close_path(cx, tag, "a connection could not be set up"),
                None => self.forget(&admitted),
            }
        }
    }

    fn admit(
        &mut self,
        cx: &mut Turn<'_>,
        private: &[u8],
        local: IpAddr,
        peer: IpAddr,
    ) -> Result<(ConnectRequest, Admitted), (Errno, String)> {
        if self.stopping {
            return Err((Errno::ECONNRESET, "the server is shutting down".into()));
        }
        let refusal = |r: Refusal| (r.errno(), r.to_string());
        let request = ConnectRequest::parse(private).map_err(|e| refusal(Refusal::Malformed(e)))?;
        self.judge_connection(cx, &request, peer)?;
        // Whoever has a device open is a client, whatever comes.
        for entry in self.paths.values().filter(|e| e.path.session.has_opened()) {
            self.table.remember(entry.path.peer.ip());
        }
        let expected = self.events.borrow().expects(peer);
        let admitted = self.table.admit(self.now_ns(cx.now), &request, peer, local, expected);
        Ok((request, admitted.map_err(refusal)?))
    }

    /// Closes paths that the session table has picked for it.
    fn make_room(&mut self, cx: &mut Turn<'_>, evicted: &[PathId]) {
        for id in evicted {
            if let Some(tag) = self.tags.get(id).copied() {
                self.close_path(cx, tag, "it was not up yet, and another client needs its place");
            }
        }
    }

    /// The client of a connection has answered what was sent to its address.
    pub(super) fn established(&mut self, cx: &mut Turn<'_>, id: CmId) {
        let Some(tag) = self.conns.get(&id).map(|conn| conn.tag) else { return };
        if let Some(entry) = self.paths.get(&tag).filter(|entry| !entry.closing) {
            match self.table.prove(entry.id) {
                Ok(evicted) => self.make_room(cx, &evicted),
                Err(refusal) => self.close_path(cx, tag, &refusal.to_string()),
            }
        }
    }

    fn refuse(&mut self, cm: usize, id: CmId, peer: SocketAddr, errno: Errno, why: &str) {
        tracing::warn!(%peer, %errno, why, "connection refused");
        if let Err(error) = self.cms[cm].reject(id, handshake::reject(errno).as_bytes()) {
            tracing::debug!(%peer, %error, "the reject could not be sent");
        }
        self.cms[cm].destroy(id);
    }

    /// A path that never got its memory.
    fn forget(&mut self, admitted: &Admitted) {
        self.table.begin_close(admitted.path);
        if self.table.path_closed(admitted.path).is_some_and(|c| c.session_gone) {
            self.sessions.remove(&admitted.session);
        }
    }

    /// The admitted connection's path, made with its first connection.
    #[expect(clippy::too_many_arguments, reason = "a connect request has these parts")]
    fn path_of(
        &mut self,
        cx: &Turn<'_>,
        cm: usize,
        id: CmId,
        request: &ConnectRequest,
        admitted: &Admitted,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> Result<u32, String> {
        if let Some(tag) = self.tags.get(&admitted.path) {
            return Ok(*tag);
        }
        let device = self.cms[cm].device(id).ok_or("the connection has no device")?;
        let depth = self.options.geometry.queue_depth();
        let session = self.sessions.entry(admitted.session).or_insert_with(|| {
            Arc::new(Session::new(admitted.session.index() as u32, request.session_uuid, depth))
        });
        let tag = self.next_tag;
        let who = Identity { session: session.clone(), uuid: request.path_uuid, tag, peer, local };
        let path = Path::new(who, &self.options, &device).map_err(|e| e.to_string())?;
        // 0 means "free" in the session's owner table; 2^32 paths later old tags are long gone.
        self.next_tag = self.next_tag.checked_add(1).unwrap_or(1);
        let cons = (0..admitted.cid_num).map(|_| None).collect();
        self.tags.insert(admitted.path, tag);
        self.paths.insert(
            tag,
            PathEntry {
                id: admitted.path,
                session_id: admitted.session,
                path: Arc::new(path),
                device,
                cons,
                closing: false,
                since: cx.now,
            },
        );
        Ok(tag)
    }

    /// Creates the queue pair and hands it to a reactor, which answers with [`Server::con_ready`].
    fn create_con(
        &mut self,
        cx: &mut Turn<'_>,
        cm: usize,
        id: CmId,
        ack_delay: Option<u8>,
        tag: u32,
        cid: u16,
    ) -> Result<(), String> {
        let device = self.cms[cm].device(id).ok_or("the connection has no device")?;
        let entry = self.paths.get(&tag).ok_or("the path is gone")?;
        let path = entry.path.clone();
        let caps = queue_sizes(&path, &device);
        // `bind_all` posts a bind for every chunk at once, and a work-request id counts 14 bits of them.
        let depth = u32::from(path.geometry.queue_depth());
        if self.options.rotate_rkeys && (depth >= 1 << 13 || caps.max_send_wr <= depth) {
            return Err(format!("rotate_rkeys cannot serve queue_depth {depth} on this device: lower it"));
        }
        let lane = self.least_loaded().ok_or("no reactor")?;
        let cq = self.lanes[lane].cqs.reserve(&device, caps.max_send_wr + caps.max_recv_wr)?;
        if let Some(new) = cq.new {
            Lane::<U>::send(&self.lanes[lane].handle, move |cx, lane| lane.cqs.add(cx, new));
        }
        let qp = match self.cms[cm].create_qp(id, &caps, &cq.handle) {
            Ok(qp) => qp,
            Err(e) => {
                self.release_cq(lane, cq.share);
                return Err(e.to_string());
            }
        };
        self.lanes[lane].connections += 1;
        self.conns.insert(id, ConnRef { tag, cid });
        let con = ConEntry {
            cm,
            id,
            ack_delay,
            lane,
            cq: cq.share,
            key: None,
            accepted: false,
            closing: false,
            closed: false,
            drained: false,
        };
        if let Some(slot) = self.paths.get_mut(&tag).and_then(|p| p.cons.get_mut(cid as usize)) {
            *slot = Some(con);
        }
        self.hand_over(cx, lane, path, cid, qp, caps, cq.lost);
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "a new connection has these parts")]
    fn hand_over(
        &self,
        cx: &Turn<'_>,
        lane: usize,
        path: Arc<Path>,
        cid: u16,
        qp: Box<dyn Qp>,
        caps: QpCaps,
        cq_lost: Arc<AtomicBool>,
    ) {
        let control = cx.handle().clone();
        let receives = u32::from(path.geometry.queue_depth()) + SPARE_RECEIVES;
        let tag = path.tag;
        Lane::<U>::send(&self.lanes[lane].handle, move |_, lane| {
            let result = lane.add_con(path, cid, qp, caps.max_send_wr, receives, cq_lost);
            control.send(move |cx| {
                if let Some(cell) = cx.local::<ServerCell<U>>() {
                    cell.0.borrow_mut().con_ready(cx, tag, cid, result);
                }
            });
        });
    }

    fn least_loaded(&self) -> Option<usize> {
        (0..self.lanes.len()).min_by_key(|&i| self.lanes[i].connections)
    }

    /// Gives entries of a completion queue back, and the queue with the last of them.
    pub(super) fn release_cq(&mut self, lane: usize, share: Share) {
        let lane = &mut self.lanes[lane];
        if let Some(cq) = lane.cqs.release(share) {
            Lane::<U>::send(&lane.handle, move |cx, lane| lane.cqs.drop_cq(cx, cq));
        }
    }

    /// The lane has posted the receives of a connection: accept it.
    fn con_ready(&mut self, cx: &mut Turn<'_>, tag: u32, cid: u16, result: Result<ConKey, String>) {
        let rotating = self.options.rotate_rkeys;
        let Some(entry) = self.paths.get_mut(&tag) else { return };
        let Some(con) = entry.cons.get_mut(cid as usize).and_then(Option::as_mut) else { return };
        match result {
            Ok(key) => con.key = Some(key),
            Err(why) => {
                // The lane has dropped the queue pair with the error.
                con.closed = true;
                self.close_path(cx, tag, &format!("con {cid}: {why}"));
                return self.finish_path(cx, tag);
            }
        }
        if con.closing {
            return self.close_con(tag, cid);
        }
        let (cm, id) = (con.cm, con.id);
        let rsp = handshake::accept(&entry.path.geometry, rotating);
        let params = ConnParams { ack_delay: con.ack_delay, ..ConnParams::FOREVER };
        match self.cms[cm].accept(id, params, rsp.as_bytes()) {
            Ok(()) => con.accepted = true,
            Err(e) => self.close_path(cx, tag, &format!("con {cid}: {e}")),
        }
    }

    /// INFO_REQ came in: the path comes up, or is closed.
    pub(super) fn info_req(&mut self, cx: &mut Turn<'_>, tag: u32, message: &[u8]) {
        let Some(entry) = self.paths.get(&tag) else { return };
        if entry.closing || !self.judge_info(cx, tag, message) {
            return;
        }
        let Some(entry) = self.paths.get(&tag) else { return };
        let (path, device) = (entry.path.clone(), entry.device.clone());
        let up = match self.bring_up(cx, entry.id, message) {
            Ok(up) => up,
            Err(why) => {
                if let CloseReason::NameTaken(name) = &why {
                    self.probe_holder(cx, path.peer.ip(), name);
                }
                return self.close_path(cx, tag, &why.to_string());
            }
        };
        if let Err(why) = path.make_chunks(&self.options, &device, &self.registry) {
            return self.close_path(cx, tag, &why.to_string());
        }
        let connections = self.paths.get(&tag).map_or(0, |entry| entry.cons.len());
        path.session.set_name(&up.name, path.peer);
        path.session.arrived(tag, path.peer.ip());
        if up.first_of_session {
            let events = self.events.clone();
            events.borrow_mut().session_up(cx, &path.session);
        }
        tracing::info!(
            session = %up.name, peer = %path.peer, local = %path.local, device = path.device,
            connections, "path connected"
        );
        path.set_up();
        self.answer_info(tag, path);
    }

    fn bring_up(&mut self, cx: &mut Turn<'_>, id: PathId, message: &[u8]) -> Result<PathUp, CloseReason> {
        let up = self.table.info_req(id, message)?;
        self.make_room(cx, &up.evicted);
        Ok(up)
    }

    /// A client at `peer` wants the name of a session that has a path to that very address. The session may be what a crash
    /// of that client has left, which heartbeats would find out only after half a minute.
    fn probe_holder(&self, cx: &Turn<'_>, peer: IpAddr, name: &str) {
        let holders = || self.paths.values().filter(|e| e.path.is_up() && e.path.session.name() == name);
        if !holders().any(|e| e.path.peer.ip().to_canonical() == peer.to_canonical()) {
            return;
        }
        for con in holders().filter_map(|e| e.cons.first()?.as_ref()) {
            let Some(key) = con.key else { continue };
            let now = cx.now;
            Lane::<U>::send(&self.lanes[con.lane].handle, move |_, lane| lane.probe(key, now));
        }
    }

    fn answer_info(&self, tag: u32, path: Arc<Path>) {
        let Some(con) = self.paths.get(&tag).and_then(|p| p.cons.first()).and_then(Option::as_ref) else {
            return;
        };
        let Some(key) = con.key else { return };
        let (hb, reports, rotating) =
            (self.options.heartbeat, self.reports.clone(), self.options.rotate_rkeys);
        Lane::<U>::send(&self.lanes[con.lane].handle, move |cx, lane| {
            if rotating && let Err(why) = lane.bind_all(key) {
                return reports.path_broken(path.tag, why);
            }
            match handshake::info_rsp(&path.descriptors()) {
                Some(message) => lane.path_up(key, &message, hb, cx.now),
                None => reports.path_broken(path.tag, "no chunks to announce".into()),
            }
        });
    }
}

/// Work requests per queue, as the device allows.
fn queue_sizes(path: &Path, device: &Arc<dyn Device>) -> QpCaps {
    let most = device.info().max_qp_wr;
    let (send, receive) = queue_lengths(path.geometry, path.policy);
    QpCaps {
        max_send_wr: send.min(most),
        max_recv_wr: receive.min(most),
        max_send_sge: 1,
        max_recv_sge: 1,
        domain: path.domain,
    }
}

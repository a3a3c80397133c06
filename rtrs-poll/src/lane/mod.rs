//! The reactor side of the server: one [`Lane`] per reactor polls its completion queues, takes requests apart, hands
//! them to the [`Upper`] and posts the answers, all in one turn and on one thread.
//!
//! A turn: up to 64 completions per queue → requests to the upper layer → the upper layer's devices → answers →
//! per connection one chain of receives and one of sends.

mod con;
mod io;
mod requests;
mod tag;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reactor::{Handle, Polled, Poller, Turn};
use rtrs_proto::heartbeat::{self, Heartbeat};
use rtrs_proto::imm::{self, ServerImm, decode_at_server};
use rtrs_proto::request::{Action, HDR_COPY_LEN, Problem, Refused, Request};
use rtrs_proto::response::Keys;
use verbs::{Qp, SendOp, SgeList, Wc, WcOp, WcStatus};

use crate::cqs::{LaneCqs, NewCq};
use crate::path::Path;
use crate::upper::{Incoming, MAX_USR_LEN, Upper};
use con::{Broken, Con};
pub use io::Io;
use io::nanos;
pub(crate) use tag::ConKey;
use tag::Tag;

/// Completions taken from one queue per turn.
const POLL_BATCH: usize = 64;

/// How long a client may take to show that it is there, once somebody else at its address wants the name of its session.
/// A kernel client opens and closes devices on the thread that answers heartbeats.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);

/// What a lane tells the control thread.
pub(crate) trait Reports: Send + Sync {
    /// A connection broke or its peer misbehaved: close the path.
    fn path_broken(&self, tag: u32, why: String);
    /// INFO_REQ came in on con 0.
    fn info_req(&self, tag: u32, message: [u8; crate::path::INFO_REQ_LEN], byte_len: u32);
    /// A closed connection's queue pair is gone and nothing of it is in flight.
    fn con_closed(&self, tag: u32, cid: u16);
    /// A path that drains has nothing left on this connection.
    fn con_drained(&self, tag: u32, cid: u16);
}

/// A request whose buffer id is still being worked on for another path of the session.
struct Held {
    con: ConKey,
    /// Of its path.
    tag: u32,
    request: Request,
    usr: Box<[u8]>,
}

/// One reactor's share of an RTRS server.
pub struct Lane<U> {
    upper: U,
    io: Io,
    pub(crate) cqs: LaneCqs,
    held: Vec<Held>,
    wcs: Box<[Wc; POLL_BATCH]>,
    usr: Box<[u8; MAX_USR_LEN]>,
}

/// How messages find the lane of their reactor.
pub(crate) struct LaneCell<U>(pub Rc<RefCell<Lane<U>>>);

struct LanePoller<U>(Rc<RefCell<Lane<U>>>);

impl<U: Upper> Poller for LanePoller<U> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }

    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().before_sleep(cx)
    }

    fn deadline(&self) -> Option<Instant> {
        let lane = self.0.borrow();
        // No descriptor tells when another reactor gives a buffer id back, or a device I/O of a lost path ends.
        let waiting = !lane.held.is_empty() || !lane.io.lingering.is_empty();
        let look_again = waiting.then(|| Instant::now() + Duration::from_millis(1));
        [lane.io.next_beat, lane.upper.deadline(), look_again].into_iter().flatten().min()
    }
}

impl<U: Upper> Lane<U> {
    /// Puts a lane with `upper` on the reactor of `cx`.
    pub(crate) fn install(cx: &mut Turn<'_>, upper: U, reports: Arc<dyn Reports>) {
        let io = Io::new(reports, cx.now);
        let lane = Rc::new(RefCell::new(Self {
            upper,
            io,
            cqs: LaneCqs::default(),
            held: Vec::new(),
            wcs: Box::new([Wc::default(); POLL_BATCH]),
            usr: Box::new([0; MAX_USR_LEN]),
        }));
        cx.set_local(Rc::new(LaneCell(lane.clone())));
        cx.add_poller("rtrs_lane", Box::new(LanePoller(lane)));
    }

    /// Sends `f` to the lane of `reactor`.
    pub(crate) fn send(reactor: &Handle, f: impl FnOnce(&mut Turn<'_>, &mut Self) + Send + 'static) {
        reactor.send(move |cx| {
            if let Some(cell) = cx.local::<LaneCell<U>>() {
                f(cx, &mut cell.0.borrow_mut());
            }
        });
    }

    /// For messages of the upper layer's control part: its state and the lane's I/O side.
    pub fn with_upper(reactor: &Handle, f: impl FnOnce(&mut Turn<'_>, &mut U, &mut Io) + Send + 'static) {
        Self::send(reactor, move |cx, lane| {
            f(cx, &mut lane.upper, &mut lane.io);
            lane.io.post();
        });
    }

    /// A completion queue failed: its connections are lost, those on others are not.
    fn cq_failed(&mut self, cx: &mut Turn<'_>, i: usize, why: &str) {
        let NewCq { lost, .. } = self.cqs.fail(cx, i, why);
        self.io.broken_on(&lost, why);
    }

    /// Takes over a connection that is about to be accepted, and posts its receives.
    pub(crate) fn add_con(
        &mut self,
        path: Arc<Path>,
        cid: u16,
        qp: Box<dyn Qp>,
        sq_size: u32,
        receives: u32,
        cq_lost: Arc<AtomicBool>,
    ) -> Result<ConKey, Broken> {
        if cq_lost.load(Ordering::Acquire) {
            return Err("its completion queue is lost".into());
        }
        let depth = path.geometry.queue_depth() as usize;
        let key = self.io.free_key();
        let mut con = Con::new(key, cid, path, qp, sq_size, cq_lost);
        con.post_first_receives(receives)?;
        self.io.reqs.promise(depth);
        self.io.cons[key.index as usize] = Some(con);
        self.io.dirty.reserve(self.io.cons.len());
        Ok(key)
    }

    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        let mut i = 0;
        while i < self.cqs.len() {
            match self.cqs.get(i).poll(&mut self.wcs[..]) {
                Ok(0) => {}
                Ok(n) => {
                    busy = true;
                    for w in 0..n {
                        let wc = self.wcs[w];
                        self.completion(cx, &wc);
                    }
                }
                Err(e) => {
                    self.cq_failed(cx, i, &e.to_string());
                    continue;
                }
            }
            i += 1;
        }
        busy |= !self.held.is_empty() && self.retry_held(cx);
        busy |= self.upper.poll(cx, &mut self.io);
        self.io.beat(cx.now);
        self.io.post();
        self.io.settle(&self.held);
        busy
    }

    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        for i in (0..self.cqs.len()).rev() {
            if let Err(e) = self.cqs.get(i).arm() {
                self.cq_failed(cx, i, &e.to_string());
            }
        }
        // Completions that came before arming notify nobody.
        if self.poll(cx) {
            return Polled::Busy;
        }
        self.upper.before_sleep(cx)
    }

    fn completion(&mut self, cx: &mut Turn<'_>, wc: &Wc) {
        let (tag, key) = tag::unpack(wc.wr_id);
        let Some(con) = self.io.con(key) else { return };
        match (wc.status, tag) {
            (WcStatus::Success, Tag::Send(retires)) => {
                con.retire(retires);
                self.io.mark(key);
            }
            (WcStatus::Success, Tag::Recv) => {
                con.recvs_due += 1;
                self.io.mark(key);
                self.received(cx, key, wc);
            }
            (WcStatus::Success, Tag::InfoRecv) => self.info_received(key, wc),
            (WcStatus::Flushed, _) => self.io.broken(key, "the connection has ended"),
            (WcStatus::Error(code), _) => self.io.broken(key, &format!("work completion error {code}")),
        }
    }

    fn info_received(&mut self, key: ConKey, wc: &Wc) {
        let Some(con) = self.io.con(key) else { return };
        if wc.op != WcOp::Recv || wc.imm.is_some() {
            return self.io.broken(key, "a message other than INFO_REQ came first");
        }
        let (tag, message) = (con.path.tag, con.path.info_req());
        self.io.reports.info_req(tag, message, wc.byte_len);
    }

    /// A zero-SGE receive was used.
    fn received(&mut self, cx: &mut Turn<'_>, key: ConKey, wc: &Wc) {
        let Some(con) = self.io.con(key) else { return };
        if con.closing {
            return;
        }
        let (WcOp::RecvWriteImm, Some(imm)) = (wc.op, wc.imm) else {
            return self.io.broken(key, "a SEND where only RDMA WRITE with immediate is spoken");
        };
        if !con.path.traffic.load(Ordering::Relaxed) {
            con.path.traffic.store(true, Ordering::Relaxed);
        }
        match decode_at_server(&con.path.geometry, imm) {
            Ok(ServerImm::Request { id, off }) => self.requested(cx, key, id, off),
            Ok(ServerImm::HbMsg) => {
                if con.can_beat() {
                    con.push(SendOp::WriteImm { addr: 0, rkey: 0, imm: imm::HB_ACK }, SgeList::EMPTY);
                }
            }
            Ok(ServerImm::HbAck) => self.io.hb_acked(key, cx.now),
            Ok(ServerImm::Ignore(what)) => {
                tracing::debug!(%what, peer = %con.path.peer, "ignored immediate");
            }
            Err(e) => self.io.broken(key, &e.to_string()),
        }
    }

    fn requested(&mut self, cx: &mut Turn<'_>, key: ConKey, id: u16, off: u32) {
        let Some(con) = self.io.con(key) else { return };
        if !con.path.is_up() {
            // While draining a request stays unanswered: the client repeats it elsewhere or after its reconnect.
            if con.path.state_name() == "connecting" {
                self.io.broken(key, "a request came before INFO_REQ was answered");
            }
            return;
        }
        match decode(&con.path, id, off, &mut self.usr) {
            Ok(request) => self.claim(cx, key, request),
            Err(refused) => match refused.action() {
                Action::ClosePath => self.io.broken(key, &refused.to_string()),
                Action::Answer(errno) => self.io.refuse(key, id, &refused, errno),
            },
        }
    }

    /// Makes the path own the buffer id, or holds the request until another path's execution has ended.
    fn claim(&mut self, cx: &mut Turn<'_>, key: ConKey, request: Request) {
        let Some(con) = self.io.con(key) else { return };
        match con.path.session.acquire(request.id, con.path.tag) {
            Ok(()) => self.start(cx, key, request),
            Err(owner) if owner == con.path.tag => {
                self.io.broken(key, &Problem::InFlight(request.id).to_string());
            }
            // Held once already: two requests with one id on one path, as above.
            Err(_) if self.held.iter().any(|h| h.request.id == request.id && h.tag == con.path.tag) => {
                self.io.broken(key, &Problem::InFlight(request.id).to_string());
            }
            Err(owner) => {
                tracing::debug!(id = request.id, peer = %con.path.peer, "request waits for its execution on a lost path");
                let usr = self.usr[..request.usr_len as usize].into();
                self.held.push(Held { con: key, tag: con.path.tag, request, usr });
                self.io.reports.path_broken(owner, "its client repeats requests on another path".into());
            }
        }
    }

    fn retry_held(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        let mut i = 0;
        while i < self.held.len() {
            let held = &self.held[i];
            let Some(con) = self.io.con(held.con) else {
                self.held.swap_remove(i);
                continue;
            };
            if con.path.session.acquire(held.request.id, con.path.tag).is_err() {
                i += 1;
                continue;
            }
            let held = self.held.swap_remove(i);
            self.usr[..held.usr.len()].copy_from_slice(&held.usr);
            self.start(cx, held.con, held.request);
            busy = true;
        }
        busy
    }

    /// Hands an owned request up.
    fn start(&mut self, cx: &mut Turn<'_>, key: ConKey, request: Request) {
        let Some(con) = self.io.con(key) else { return };
        if con.path.policy.keys == Keys::Rotating && con.bind(request.id, false).is_none() {
            con.path.session.release(request.id);
            return self.io.broken(key, "a key could not be withdrawn");
        }
        con.inflight += 1;
        let read = matches!(request.direction, rtrs_proto::request::Direction::Read { .. });
        con.counters.count(read, u64::from(request.data_len) + u64::from(request.usr_len));
        let session = con.path.session.key;
        // SAFETY: the buffer id is owned (claim), and `Requests` remembers the connection, which keeps its `Arc<Path>`
        // until `inflight` is back at 0, which is after the completion of the bdev request.
        let data = (request.data_len > 0)
            .then(|| unsafe { con.path.segment(request.id, request.data_len) })
            .flatten();
        let req = self.io.reqs.insert(key, request);
        let usr = &self.usr[..request.usr_len as usize];
        let incoming = Incoming { req, session, usr, data, direction: request.direction };
        self.upper.request(cx, &mut self.io, incoming);
    }

    /// Control: INFO_REQ was accepted. Starts heartbeats and answers.
    pub(crate) fn path_up(&mut self, key: ConKey, info_rsp: &[u8], hb: heartbeat::Config, now: Instant) {
        let epoch = self.io.epoch;
        let Some(con) = self.io.con(key) else { return };
        con.heartbeat = Some(Heartbeat::new(hb, nanos(now, epoch)));
        match con.send_info_rsp(info_rsp) {
            Ok(()) => self.io.mark(key),
            Err(why) => self.io.broken(key, &why),
        }
        self.io.next_beat = None;
        self.io.find_next_beat();
        self.io.post();
    }

    /// Control: somebody doubts that the client of `key`, con 0 of a path, is still there. [`Reports::path_broken`] follows if
    /// it is not.
    pub(crate) fn probe(&mut self, key: ConKey, now: Instant) {
        self.io.probe(key, now, PROBE_PATIENCE);
    }

    /// Control: gives every chunk its first key, on con 0.
    pub(crate) fn bind_all(&mut self, key: ConKey) -> Result<(), Broken> {
        let con = self.io.con(key).ok_or("connection is gone")?;
        for id in 0..con.path.geometry.queue_depth() {
            con.bind(id, true).ok_or("memory window could not be bound")?;
        }
        Ok(())
    }

    /// Control: give the connection up. [`Reports::con_closed`] follows when nothing of it is in flight.
    pub(crate) fn close_con(&mut self, key: ConKey) {
        let Some(con) = self.io.con(key) else { return };
        con.close();
        self.io.linger(key.index);
        self.held.retain(|h| h.con != key);
        self.io.settle(&self.held);
    }

    /// Control: finish what is in flight; [`Reports::con_drained`] follows.
    pub(crate) fn drain_con(&mut self, key: ConKey) {
        let Some(con) = self.io.con(key) else { return };
        con.start_draining();
        self.io.mark(key);
        self.io.linger(key.index);
        self.io.post();
    }
}

/// Copies header and user message out of the chunk before anything looks at them.
fn decode(path: &Path, id: u16, off: u32, usr: &mut [u8; MAX_USR_LEN]) -> Result<Request, Refused> {
    let mut header = [0; HDR_COPY_LEN];
    let avail = Request::hdr_copy_len(&path.geometry, off);
    let inside = path.copy_out(id, off, &mut header[..avail]);
    debug_assert!(inside, "decode_at_server checked id and offset");
    let request = Request::decode(&path.geometry, id, off, &header)?;
    let usr_len = request.usr_len as usize;
    if usr_len > MAX_USR_LEN {
        let problem = Problem::UsrTooLong { usr_len: request.usr_len };
        return Err(Refused { problem, inval_key: request.direction.inval_key() });
    }
    let inside = path.copy_out(id, request.usr_off(), &mut usr[..usr_len]);
    debug_assert!(inside, "Request::decode checked the user message");
    Ok(request)
}

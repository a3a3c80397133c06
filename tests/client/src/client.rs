//! One path of a session, as its client.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rtrs_proto::Errno;
use rtrs_proto::client::{Rbufs, ServerParams};
use rtrs_proto::limits::Geometry;
use rtrs_proto::wire::SgDesc;
use verbs::{Cm, Cq, Device, SendOp, SgeList, Window};
use zerocopy::IntoBytes;

use crate::frame::Frame;
use crate::link::{Con, parse_info};
use crate::memory::Memory;
use crate::opts::Opts;
use crate::outcome::{ConnectError, Outcome};

/// An answer that came in.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    /// Index of the connection.
    pub con: usize,
    /// Buffer id.
    pub id: u16,
    /// As the server says.
    pub result: Result<(), Errno>,
    /// Type 2: the key has been invalidated.
    pub inval: bool,
}

/// One path. Fields are dropped in this order: queue pairs, their queue and memory, then the connection manager,
/// which makes the server hear of it.
pub struct Client {
    pub(crate) cons: Vec<Con>,
    pub(crate) cq: Option<Box<dyn Cq>>,
    pub(crate) windows: HashMap<u16, Window>,
    pub(crate) memory: Option<Memory>,
    pub(crate) device: Option<Arc<dyn Device>>,
    pub(crate) cm: Box<dyn Cm>,
    pub(crate) dst: SocketAddr,
    /// How it connects; may be changed between steps.
    pub opts: Opts,
    pub(crate) params: Option<ServerParams>,
    pub(crate) accept_bytes: Vec<u8>,
    pub(crate) info_rsp: Option<usize>,
    pub(crate) rbufs: Option<Rbufs>,
    pub(crate) replies: VecDeque<Reply>,
    /// Answers due, by buffer id.
    pub(crate) expected: HashMap<u16, u32>,
    /// HB_MSGs received.
    pub heartbeats: u32,
    /// HB_ACKs received.
    pub heartbeat_acks: u32,
    faults: Vec<String>,
    pub(crate) rnbd: crate::rnbd::State,
}

impl Client {
    /// A client that has not done anything yet.
    pub fn new(cm: Box<dyn Cm>, dst: SocketAddr, opts: Opts) -> Self {
        Self {
            cons: Vec::new(),
            cq: None,
            windows: HashMap::new(),
            memory: None,
            device: None,
            cm,
            dst,
            opts,
            params: None,
            accept_bytes: Vec::new(),
            info_rsp: None,
            rbufs: None,
            replies: VecDeque::new(),
            expected: HashMap::new(),
            heartbeats: 0,
            heartbeat_acks: 0,
            faults: Vec::new(),
            rnbd: crate::rnbd::State::default(),
        }
    }

    /// Brings a path up, in the order of the kernel's client.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(cm: Box<dyn Cm>, dst: SocketAddr, opts: Opts) -> Result<Self, ConnectError> {
        let mut client = Self::new(cm, dst, opts);
        client.dial_all()?;
        let info_req = client.opts.info_req();
        client.send_info(info_req.as_bytes())?;
        client.wait_info()?;
        Ok(client)
    }

    /// Opens all connections, one after the other.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn dial_all(&mut self) -> Result<(), ConnectError> {
        for cid in 0..self.opts.cid_num {
            let request = self.opts.conn_req(cid);
            self.dial(request.as_bytes())?;
        }
        Ok(())
    }

    /// Registers memory and posts receives, which the size of INFO_RSP and the number of connections decide.
    fn prepare(&mut self) -> Result<(), ConnectError> {
        if self.memory.is_some() {
            return Ok(());
        }
        let params =
            ServerParams::parse(&self.accept_bytes).map_err(|e| ConnectError::Protocol(e.to_string()))?;
        let device = self.device.as_ref().ok_or(ConnectError::Failed("not connected".into()))?;
        let depth = self.opts.recv_depth as usize;
        self.memory =
            Some(Memory::new(device, &params.geometry, self.cons.len(), depth, self.opts.need_inval)?);
        self.params = Some(params);
        self.post_first_receives();
        Ok(())
    }

    /// SENDs `bytes` on con 0, as INFO_REQ.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn send_info(&mut self, bytes: &[u8]) -> Result<(), ConnectError> {
        self.prepare()?;
        self.send_plain(0, bytes)
    }

    /// SENDs `bytes`; they stay in use until it has completed.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn send_plain(&mut self, con: usize, bytes: &[u8]) -> Result<(), ConnectError> {
        self.prepare()?;
        let sge = self.memory.as_ref().expect("prepared").stage_send(bytes);
        self.post(con, SendOp::Send, SgeList::one(sge))
    }

    /// Waits for INFO_RSP.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn wait_info(&mut self) -> Result<(), ConnectError> {
        let came = |c: &mut Self| (c.info_rsp.is_some() || c.any_dropped()).then_some(());
        self.pump_until(self.opts.timeout, came).ok_or(ConnectError::Timeout("INFO_RSP"))?;
        if let Some(len) = self.info_rsp {
            self.rbufs = Some(parse_info(self, len)?);
            return Ok(());
        }
        if self.wait_closed(self.opts.timeout) {
            return Err(ConnectError::Closed);
        }
        Err(ConnectError::Protocol("only some connections were closed".into()))
    }

    /// Sizes of the session.
    ///
    /// # Panics
    /// Before [`Client::send_info`].
    pub fn geometry(&self) -> Geometry {
        self.params.expect("the session's sizes come with the accept").geometry
    }

    /// The server changes keys with each request.
    pub fn rotating_keys(&self) -> bool {
        self.params.is_some_and(|p| p.rotating_keys)
    }

    /// Address and key of chunk `id` on this path.
    ///
    /// # Panics
    /// Before [`Client::wait_info`], or for an id beyond the chunks.
    pub fn chunk(&self, id: u16) -> rtrs_proto::client::Rbuf {
        self.rbufs.as_ref().and_then(|r| r.rbuf(id)).expect("INFO_RSP named it")
    }

    /// A descriptor of `len` bytes of the read area of buffer `id`.
    ///
    /// # Panics
    /// Before [`Client::send_info`].
    pub fn desc(&self, id: u16, len: u32) -> SgDesc {
        let memory = self.memory.as_ref().expect("connected");
        SgDesc::new(
            memory.mr().region().as_ptr() as u64 + memory.read_area(id) as u64,
            memory.mr().rkey(),
            len,
        )
    }

    /// What lies in the read area of buffer `id`, at most a chunk's length.
    ///
    /// # Panics
    /// As [`Client::desc`].
    pub fn read_area(&self, id: u16, len: usize) -> Vec<u8> {
        let memory = self.memory.as_ref().expect("connected");
        memory.read(memory.read_area(id), len.min(memory.chunk()))
    }

    /// Fills the whole read area of buffer `id`.
    ///
    /// # Panics
    /// As [`Client::desc`].
    pub fn fill_read_area(&self, id: u16, byte: u8) {
        let memory = self.memory.as_ref().expect("connected");
        memory.fill(memory.read_area(id), memory.chunk(), byte);
    }

    /// Posts `bytes` to offset `chunk_off` of chunk `id` with the immediate `imm`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn request_raw(
        &mut self,
        con: usize,
        id: u16,
        chunk_off: u32,
        bytes: &[u8],
        imm: u32,
    ) -> Result<(), ConnectError> {
        let chunk = self.chunk(id);
        let op = SendOp::WriteImm { addr: chunk.addr + u64::from(chunk_off), rkey: chunk.rkey, imm };
        let sge = self.memory.as_ref().expect("connected").stage(id, bytes);
        self.note_expected(imm);
        self.post(con, op, SgeList::one(sge))
    }

    /// As [`Client::post_imm`], for an immediate that may be a request: its answer is expected.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn send_imm(&mut self, con: usize, imm: u32) -> Result<(), ConnectError> {
        if self.params.is_some() {
            self.note_expected(imm);
        }
        self.post_imm(con, imm)
    }

    /// Lets two connections change places; before [`Client::send_info`], so that nothing is in flight.
    pub fn swap_connections(&mut self, a: usize, b: usize) {
        self.cons.swap(a, b);
    }

    /// Counts an answer as due if `imm` is a request.
    pub(crate) fn note_expected(&mut self, imm: u32) {
        let geometry = self.geometry();
        if let rtrs_proto::Imm::IoReq { id, .. } = geometry.imm_layout().decode(imm)
            && id < u32::from(geometry.queue_depth())
        {
            *self.expected.entry(id as u16).or_insert(0) += 1;
        }
    }

    /// Posts `frame` in buffer `id`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn send(&mut self, con: usize, id: u16, frame: &Frame) -> Result<(), ConnectError> {
        let imm = frame.imm(&self.geometry(), id);
        self.request_raw(con, id, frame.hole, &frame.bytes(), imm)
    }

    /// [`Client::send`] and [`Client::wait_reply`].
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn call(&mut self, con: usize, id: u16, frame: &Frame) -> Result<Outcome, ConnectError> {
        self.send(con, id, frame)?;
        Ok(self.wait_reply(id, self.opts.timeout))
    }

    /// The next answer for buffer `id`, or the end of the path.
    pub fn wait_reply(&mut self, id: u16, timeout: Duration) -> Outcome {
        let end = Instant::now() + timeout;
        let took = self.pump_until(timeout, |c| match c.take_reply(id) {
            Some(reply) => Some(Some(reply)),
            None => c.any_dropped().then_some(None),
        });
        match took {
            Some(Some(Reply { result: Ok(()), .. })) => Outcome::Ok,
            Some(Some(Reply { result: Err(errno), .. })) => Outcome::Errno(errno),
            Some(None) => {
                let closed = self.wait_closed(end.saturating_duration_since(Instant::now()));
                if closed { Outcome::PathClosed } else { Outcome::Timeout }
            }
            None => Outcome::Timeout,
        }
    }

    /// Takes an answer for buffer `id` if it is there.
    pub fn take_reply(&mut self, id: u16) -> Option<Reply> {
        let at = self.replies.iter().position(|r| r.id == id)?;
        self.replies.remove(at)
    }

    fn any_dropped(&self) -> bool {
        self.cons.iter().any(|c| c.dropped_by_server)
    }

    /// Waits until the server has disconnected *every* connection, as it must if it closes one of them.
    pub fn wait_closed(&mut self, timeout: Duration) -> bool {
        self.pump_until(timeout, |c| c.cons.iter().all(|c| c.dropped_by_server).then_some(())).is_some()
    }

    /// [`Client::wait_closed`] as an outcome.
    pub fn closed_or_timeout(&mut self) -> Outcome {
        if self.wait_closed(self.opts.timeout) { Outcome::PathClosed } else { Outcome::Timeout }
    }

    /// No connection has been lost so far.
    pub fn is_up(&mut self) -> bool {
        self.pump();
        !self.cons.is_empty() && self.cons.iter().all(|c| c.up) && self.faults.is_empty()
    }

    /// Disconnects all connections and waits for the answers.
    pub fn disconnect(&mut self) {
        let ids: Vec<_> = self.cons.iter().filter(|c| c.up).map(|c| c.id).collect();
        for id in ids {
            if let Err(e) = self.cm.disconnect(id) {
                self.fault(e.to_string());
            }
        }
        self.wait_closed(self.opts.timeout);
    }

    /// Own address of each connection.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.cons.iter().filter_map(|c| self.cm.local_addr(c.id)).collect()
    }

    /// Disconnects one connection, without waiting.
    pub fn disconnect_con(&mut self, con: usize) {
        if let Err(e) = self.cm.disconnect(self.cons[con].id) {
            self.fault(e.to_string());
        }
    }

    /// RDMA WRITE of `bytes` to any address of the server, at most one chunk's length.
    ///
    /// # Errors
    /// [`ConnectError`].
    ///
    /// # Panics
    /// Before [`Client::send_info`].
    pub fn write_memory(
        &mut self,
        con: usize,
        addr: u64,
        rkey: u32,
        bytes: &[u8],
    ) -> Result<(), ConnectError> {
        // Not the slot of a buffer id that the tables use.
        let sge = self.memory.as_ref().expect("connected").stage(crate::memory::SLOTS as u16 - 1, bytes);
        self.post(con, SendOp::Write { addr, rkey }, SgeList::one(sge))
    }

    pub(crate) fn fault(&mut self, what: String) {
        self.faults.push(what);
    }

    pub(crate) fn violation(&mut self, what: String) {
        self.opts.violations.lock().unwrap_or_else(|e| e.into_inner()).push(what);
    }

    /// What went wrong on the way: work completions, connections.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }
}

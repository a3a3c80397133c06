//! The client's registered memory: one region, cut up.

use std::sync::Arc;

use iobuf::Region;
use rtrs_proto::limits::Geometry;
use verbs::{Access, Device, Mr, Sge};

/// Buffer ids with memory of their own; id `n` uses slot `n % SLOTS`.
pub(crate) const SLOTS: usize = 32;
/// Room behind a chunk's worth of outgoing bytes, for frames that are too long.
const SURPLUS: usize = 4096;
/// Room for INFO_REQ and other things sent by SEND.
const SEND_ROOM: usize = 8192;

pub(crate) struct Memory {
    mr: Mr,
    info_rsp_len: usize,
    chunk: usize,
    recv_depth: usize,
    cons: usize,
}

impl Memory {
    /// Memory for `cons` connections of `recv_depth` receives each.
    pub fn new(
        device: &Arc<dyn Device>,
        geometry: &Geometry,
        cons: usize,
        recv_depth: usize,
        window_bind: bool,
    ) -> Result<Self, crate::ConnectError> {
        let chunk = geometry.chunk_size() as usize;
        let info_rsp_len = rtrs_proto::client::info_rsp_len(geometry.queue_depth());
        let len = SEND_ROOM + info_rsp_len + 8 * cons * recv_depth + SLOTS * (2 * chunk + SURPLUS);
        let access = Access { local_write: true, remote_write: true, window_bind, ..Access::default() };
        let mr = device.clone().register(Region::new(len + 4096)?, access)?;
        Ok(Self { mr, info_rsp_len, chunk, recv_depth, cons })
    }

    pub fn mr(&self) -> &Mr {
        &self.mr
    }

    fn sge(&self, at: usize, len: usize) -> Sge {
        self.mr.sge(at, len as u32).expect("the layout is within the region")
    }

    /// Puts bytes for a SEND.
    pub fn stage_send(&self, bytes: &[u8]) -> Sge {
        assert!(bytes.len() <= SEND_ROOM, "SENDs have at most {SEND_ROOM} bytes");
        assert!(self.mr.region().copy_in(0, bytes), "the layout is within the region");
        self.sge(0, bytes.len())
    }

    /// Where INFO_RSP lands.
    pub fn info_rsp(&self) -> Sge {
        self.sge(SEND_ROOM, self.info_rsp_len)
    }

    pub fn read_info_rsp(&self, len: usize) -> Vec<u8> {
        self.read(SEND_ROOM, len.min(self.info_rsp_len))
    }

    fn key_at(&self, con: usize, index: usize) -> usize {
        debug_assert!(con < self.cons && index < self.recv_depth);
        SEND_ROOM + self.info_rsp_len + 8 * (con * self.recv_depth + index)
    }

    /// Where an RKEY_RSP lands.
    pub fn key_sge(&self, con: usize, index: usize) -> Sge {
        self.sge(self.key_at(con, index), 8)
    }

    pub fn read_key(&self, con: usize, index: usize, len: usize) -> Vec<u8> {
        self.read(self.key_at(con, index), len.min(8))
    }

    fn slot_at(&self, id: u16) -> usize {
        let slots = (self.key_at(0, 0) + 8 * self.cons * self.recv_depth).next_multiple_of(512);
        slots + (id as usize % SLOTS) * (2 * self.chunk + SURPLUS)
    }

    /// Puts a request for buffer `id`.
    pub fn stage(&self, id: u16, bytes: &[u8]) -> Sge {
        assert!(bytes.len() <= self.chunk + SURPLUS, "a frame has at most {} bytes", self.chunk + SURPLUS);
        assert!(self.mr.region().copy_in(self.slot_at(id), bytes), "the layout is within the region");
        self.sge(self.slot_at(id), bytes.len())
    }

    /// Offset in the region of where reads of buffer `id` land: one chunk's length of bytes.
    pub fn read_area(&self, id: u16) -> usize {
        self.slot_at(id) + self.chunk + SURPLUS
    }

    pub fn chunk(&self) -> usize {
        self.chunk
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.mr.region().copy_out(at, &mut out), "the layout is within the region");
        out
    }

    pub fn fill(&self, at: usize, len: usize, byte: u8) {
        assert!(self.mr.region().copy_in(at, &vec![byte; len]), "the layout is within the region");
    }
}

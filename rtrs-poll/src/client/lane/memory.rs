//! Registered memory of a link that no data goes through: headers, key messages, the INFO exchange.

use std::sync::Arc;

use iobuf::Region;
use rtrs_proto::client::info_rsp_len;
use rtrs_proto::wire::{InfoReq, MAX_REQ_HDR_LEN, MsgRkeyRsp};
use verbs::{Access, Device, Mr, Sge};
use zerocopy::IntoBytes;

use crate::upper::MAX_USR_LEN;

/// Longest user message with the longest RTRS header.
pub(super) const HEADER_LEN: usize = MAX_USR_LEN + MAX_REQ_HDR_LEN;
/// Room for one, in whole cache lines.
const HEADER_ROOM: usize = HEADER_LEN.next_multiple_of(64);
const KEY_ROOM: usize = size_of::<MsgRkeyRsp>();

/// One per link; see the parts of [`LinkMemory::new`].
pub(in crate::client) struct LinkMemory {
    device: Arc<dyn Device>,
    mr: Mr,
    keys_at: usize,
    receives: usize,
    info_at: usize,
    info_rsp_len: usize,
}

impl LinkMemory {
    /// A header for each of `ids` buffer ids; with rotating keys, 8 bytes for each of `keyed_receives`; if con 0 is
    /// here, INFO_REQ and an INFO_RSP of `queue_depth` descriptors. Control thread only: registering takes long.
    pub fn new(
        device: &Arc<dyn Device>,
        ids: usize,
        keyed_receives: usize,
        queue_depth: Option<u16>,
    ) -> Result<Self, String> {
        let keys_at = ids * HEADER_ROOM;
        let info_at = keys_at + keyed_receives * KEY_ROOM;
        let info_rsp_len = queue_depth.map_or(0, info_rsp_len);
        let len = info_at + size_of::<InfoReq>() + info_rsp_len;
        let access = Access { local_write: true, ..Access::default() };
        let region = Region::new(len).map_err(|e| e.to_string())?;
        let mr = device.clone().register(region, access).map_err(|e| e.to_string())?;
        Ok(Self { device: device.clone(), mr, keys_at, receives: keyed_receives, info_at, info_rsp_len })
    }

    /// Puts the header of the `index`th buffer id where it can be sent from.
    pub fn stage_header(&self, index: usize, header: &[u8]) -> Option<Sge> {
        let at = index.checked_mul(HEADER_ROOM)?;
        let inside = at < self.keys_at && header.len() <= HEADER_ROOM && self.mr.region().copy_in(at, header);
        if inside { self.mr.sge(at, header.len() as u32) } else { None }
    }

    /// Copies the start of the header that was last staged for the `index`th buffer id: its user message.
    pub fn header(&self, index: usize, out: &mut [u8]) {
        let inside = out.len() <= HEADER_ROOM && self.mr.region().copy_out(index * HEADER_ROOM, out);
        debug_assert!(inside, "there is a header for each id");
    }

    /// It is of a path by `device`.
    pub fn is_on(&self, device: &Arc<dyn Device>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// Where the key message of keyed receive `n` lands.
    pub fn key_sge(&self, n: u32) -> Option<Sge> {
        self.mr.sge(self.key_at(n)?, KEY_ROOM as u32)
    }

    /// What landed there.
    pub fn key_message(&self, n: u32) -> Option<[u8; KEY_ROOM]> {
        let mut bytes = [0; KEY_ROOM];
        self.mr.region().copy_out(self.key_at(n)?, &mut bytes).then_some(bytes)
    }

    fn key_at(&self, n: u32) -> Option<usize> {
        ((n as usize) < self.receives).then(|| self.keys_at + n as usize * KEY_ROOM)
    }

    /// Puts INFO_REQ where it can be sent from.
    pub fn stage_info_req(&self, message: &InfoReq) -> Option<Sge> {
        let bytes = message.as_bytes();
        if !self.mr.region().copy_in(self.info_at, bytes) {
            return None;
        }
        self.mr.sge(self.info_at, bytes.len() as u32)
    }

    fn info_rsp_at(&self) -> usize {
        self.info_at + size_of::<InfoReq>()
    }

    /// Where INFO_RSP lands.
    pub fn info_rsp_sge(&self) -> Option<Sge> {
        self.mr.sge(self.info_rsp_at(), self.info_rsp_len as u32)
    }

    /// The `len` bytes that landed there.
    pub fn info_rsp(&self, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; (len as usize).min(self.info_rsp_len)];
        let inside = self.mr.region().copy_out(self.info_rsp_at(), &mut bytes);
        debug_assert!(inside, "the region has room for all of INFO_RSP");
        bytes
    }
}

//! Queue pairs: work requests become chains on the stack, posted with one call per piece.

use std::io;
use std::mem::{MaybeUninit, offset_of, size_of};
use std::ptr::null_mut;
use std::sync::Arc;

use rdma_mummy_sys as sys;
use sys::ibv_wr_opcode as opcode;

use super::cm::Id;
use super::cq::RawCq;
use super::device::RdmaDevice;
use super::mr::{self, RawWindow};
use super::os_error;
use crate::{
    BIND_WR_ID, Device, Error, Mr, PostError, Qp, RecvWr, SendOp, SendWr, Sge, SgeList, Window, WindowKind,
};

/// Work requests of one call: 64 × 128 bytes of stack.
const PIECE: usize = 64;

// Scatter lists are passed as they are.
const _: () = assert!(size_of::<Sge>() == size_of::<sys::ibv_sge>());
const _: () = assert!(offset_of!(Sge, addr) == offset_of!(sys::ibv_sge, addr));
const _: () = assert!(offset_of!(Sge, len) == offset_of!(sys::ibv_sge, length));
const _: () = assert!(offset_of!(Sge, lkey) == offset_of!(sys::ibv_sge, lkey));

pub(super) struct RdmaQp {
    qp: *mut sys::ibv_qp,
    num: u32,
    /// The connection was seen to allow RDMA READs. Asked at the first one.
    reads: bool,
    // What the queue pair needs, let go after `drop` destroyed it.
    _cq: Arc<RawCq>,
    device: Arc<RdmaDevice>,
    id: Arc<Id>,
}

// SAFETY: one owner uses it at a time; posting to and destroying a queue pair is not tied to a thread.
unsafe impl Send for RdmaQp {}

impl RdmaQp {
    /// # Safety
    /// `id` has just got its queue pair, on `cq`, and nobody else destroys it.
    pub unsafe fn new(id: Arc<Id>, cq: Arc<RawCq>, device: Arc<RdmaDevice>) -> Self {
        // SAFETY: a live id with a live queue pair, by the caller's word.
        let (qp, num) = unsafe { ((*id.raw()).qp, (*(*id.raw()).qp).qp_num) };
        Self { qp, num, reads: false, _cq: cq, device, id }
    }

    /// Refuses the first RDMA READ of `wrs` if both sides did not agree on any: rxe would wait for ever for a free one.
    fn check_reads(&mut self, wrs: &[SendWr]) -> Result<(), PostError> {
        let Some(first) = wrs.iter().position(|wr| matches!(wr.op, SendOp::Read { .. })) else {
            return Ok(());
        };
        // SAFETY: integers, nullable pointers and unions of such: all zero is valid.
        let mut attr: sys::ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: as above.
        let mut init: sys::ibv_qp_init_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        let mask = sys::ibv_qp_attr_mask::IBV_QP_MAX_QP_RD_ATOMIC.0 as i32;
        // SAFETY: a live queue pair, and both structures to be filled are ours.
        match unsafe { sys::ibv_query_qp(self.qp, &mut attr, mask, &mut init) } {
            0 if attr.max_rd_atomic > 0 => {
                self.reads = true;
                Ok(())
            }
            0 => Err(refused(first, libc::EINVAL)),
            e => Err(PostError { accepted: first, source: os_error(e) }),
        }
    }

    /// Posts `n` ≤ [`PIECE`] requests that `fill` writes (all but the links between them).
    fn post(
        &mut self,
        n: usize,
        mut fill: impl FnMut(usize) -> sys::ibv_send_wr,
    ) -> Result<(), (usize, io::Error)> {
        let mut chain = [const { MaybeUninit::<sys::ibv_send_wr>::uninit() }; PIECE];
        let base = chain.as_mut_ptr().cast::<sys::ibv_send_wr>();
        for (i, slot) in chain.iter_mut().enumerate().take(n) {
            let mut wr = fill(i);
            wr.next = if i + 1 < n { base.wrapping_add(i + 1) } else { null_mut() };
            slot.write(wr);
        }
        let mut bad = null_mut();
        // SAFETY: a live queue pair used by this thread only; a chain of `n` initialised requests ending in null,
        // whose scatter lists live in the caller's slices. The provider reads all of it before it returns.
        match unsafe { sys::ibv_post_send(self.qp, base, &mut bad) } {
            0 => Ok(()),
            e => Err((index_of(bad, base, n), os_error(e))),
        }
    }
}

/// Which request of a chain was refused. Providers that do not say mean the first.
fn index_of<T>(bad: *mut T, base: *mut T, n: usize) -> usize {
    let index = (bad as usize).wrapping_sub(base as usize) / size_of::<T>();
    if index < n { index } else { 0 }
}

fn sges(list: &SgeList) -> (*mut sys::ibv_sge, i32) {
    let list = list.as_slice();
    // The provider only reads them.
    (list.as_ptr().cast_mut().cast(), list.len() as i32)
}

fn blank() -> sys::ibv_send_wr {
    // SAFETY: integers, nullable pointers and unions of such: all zero is valid.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn send_wr(from: &SendWr) -> sys::ibv_send_wr {
    let mut wr = blank();
    wr.wr_id = from.wr_id;
    (wr.sg_list, wr.num_sge) = sges(&from.sges);
    if from.signaled {
        wr.send_flags = sys::ibv_send_flags::IBV_SEND_SIGNALED.0;
    }
    let imm = |imm: u32| sys::imm_data_invalidated_rkey_union_t { imm_data: imm.to_be() };
    let key = |invalidated_rkey| sys::imm_data_invalidated_rkey_union_t { invalidated_rkey };
    match from.op {
        SendOp::Send => wr.opcode = opcode::IBV_WR_SEND,
        SendOp::SendImm(i) => {
            wr.opcode = opcode::IBV_WR_SEND_WITH_IMM;
            wr.imm_data_invalidated_rkey_union = imm(i);
        }
        SendOp::SendInvalidate(k) => {
            wr.opcode = opcode::IBV_WR_SEND_WITH_INV;
            wr.imm_data_invalidated_rkey_union = key(k);
        }
        SendOp::Write { addr, rkey } => {
            wr.opcode = opcode::IBV_WR_RDMA_WRITE;
            wr.wr.rdma = sys::rdma_t { remote_addr: addr, rkey };
        }
        SendOp::WriteImm { addr, rkey, imm: i } => {
            wr.opcode = opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
            wr.wr.rdma = sys::rdma_t { remote_addr: addr, rkey };
            wr.imm_data_invalidated_rkey_union = imm(i);
        }
        SendOp::Read { addr, rkey } => {
            wr.opcode = opcode::IBV_WR_RDMA_READ;
            wr.wr.rdma = sys::rdma_t { remote_addr: addr, rkey };
        }
        SendOp::LocalInvalidate(k) => {
            wr.opcode = opcode::IBV_WR_LOCAL_INV;
            wr.imm_data_invalidated_rkey_union = key(k);
        }
    }
    wr
}

fn refused(accepted: usize, errno: i32) -> PostError {
    PostError { accepted, source: io::Error::from_raw_os_error(errno) }
}

impl Qp for RdmaQp {
    fn num(&self) -> u32 {
        self.num
    }

    fn post_send(&mut self, wrs: &[SendWr]) -> Result<(), PostError> {
        // What stands before a refused request is posted.
        let checked = if self.reads { Ok(()) } else { self.check_reads(wrs) };
        let good = checked.as_ref().map_or_else(|refused| refused.accepted, |()| wrs.len());
        for (i, piece) in wrs[..good].chunks(PIECE).enumerate() {
            self.post(piece.len(), |k| send_wr(&piece[k]))
                .map_err(|(k, source)| PostError { accepted: i * PIECE + k, source })?;
        }
        checked
    }

    fn post_recv(&mut self, wrs: &[RecvWr]) -> Result<(), PostError> {
        for (i, piece) in wrs.chunks(PIECE).enumerate() {
            let mut chain = [const { MaybeUninit::<sys::ibv_recv_wr>::uninit() }; PIECE];
            let base = chain.as_mut_ptr().cast::<sys::ibv_recv_wr>();
            for (k, from) in piece.iter().enumerate() {
                let (sg_list, num_sge) = sges(&from.sges);
                let next = if k + 1 < piece.len() { base.wrapping_add(k + 1) } else { null_mut() };
                chain[k].write(sys::ibv_recv_wr { wr_id: from.wr_id, next, sg_list, num_sge });
            }
            let mut bad = null_mut();
            // SAFETY: as in `post`.
            let e = unsafe { sys::ibv_post_recv(self.qp, base, &mut bad) };
            if e != 0 {
                let accepted = i * PIECE + index_of(bad, base, piece.len());
                return Err(PostError { accepted, source: os_error(e) });
            }
        }
        Ok(())
    }

    fn bind_window(
        &mut self,
        window: &mut Window,
        mr: &Mr,
        offset: usize,
        len: u32,
    ) -> Result<u32, PostError> {
        let inside = offset.checked_add(len as usize).is_some_and(|end| end <= mr.region().len());
        let (Some(raw), Some(mr), true) = (window.handle.downcast_ref::<RawWindow>(), mr::raw(mr), inside)
        else {
            return Err(refused(0, libc::EINVAL));
        };
        // SAFETY: `mr` is a live registration; its start address does not change.
        let addr = unsafe { (*mr).addr } as u64 + offset as u64;
        let info = sys::ibv_mw_bind_info {
            mr,
            addr,
            length: u64::from(len),
            mw_access_flags: sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0,
        };
        let mw = raw.mw;
        match self.device.info().windows {
            WindowKind::PerDomain => window.rkey = self.bind_type1(mw, info)?,
            WindowKind::PerQp => self.bind_type2(window, mw, info)?,
            WindowKind::Unsupported => return Err(refused(0, libc::EOPNOTSUPP)),
        }
        window.bound = len > 0;
        Ok(window.rkey)
    }

    fn set_min_rnr_timer(&mut self, code: u8) -> Result<(), Error> {
        // SAFETY: integers and unions of such: all zero is valid, and the mask says which field counts.
        let mut attr: sys::ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        attr.min_rnr_timer = code;
        let mask = sys::ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0 as i32;
        // SAFETY: a live queue pair and filled attributes.
        match unsafe { sys::ibv_modify_qp(self.qp, &mut attr, mask) } {
            0 => Ok(()),
            e => Err(Error {
                what: format!("set the minimum RNR timer of queue pair {} to code {code}", self.num),
                source: os_error(e),
                hint: "the code is 0..=31 and the queue pair must be connected".into(),
            }),
        }
    }
}

impl RdmaQp {
    /// The library makes the key.
    fn bind_type1(
        &mut self,
        mw: *mut sys::ibv_mw,
        mut info: sys::ibv_mw_bind_info,
    ) -> Result<u32, PostError> {
        if info.length == 0 {
            info = sys::ibv_mw_bind_info { mr: info.mr, addr: info.addr, length: 0, mw_access_flags: 0 };
        }
        let mut bind = sys::ibv_mw_bind { wr_id: BIND_WR_ID, send_flags: 0, bind_info: info };
        // SAFETY: a live queue pair of this thread, a live window of type 1 that its one owner lent us, and a bind
        // request that the call reads before it returns.
        match unsafe { sys::ibv_bind_mw(self.qp, mw, &mut bind) } {
            // SAFETY: the window still lives, and its key has been set by the call.
            0 => Ok(unsafe { (*mw).rkey }),
            e => Err(PostError { accepted: 0, source: os_error(e) }),
        }
    }

    /// Type 2 windows must be free to be bound, and are freed by invalidating their key: up to two requests.
    fn bind_type2(
        &mut self,
        window: &mut Window,
        mw: *mut sys::ibv_mw,
        info: sys::ibv_mw_bind_info,
    ) -> Result<(), PostError> {
        let mut wrs: [Option<sys::ibv_send_wr>; 2] = [None, None];
        if window.bound {
            let mut wr = blank();
            wr.wr_id = BIND_WR_ID;
            wr.opcode = opcode::IBV_WR_LOCAL_INV;
            wr.imm_data_invalidated_rkey_union =
                sys::imm_data_invalidated_rkey_union_t { invalidated_rkey: window.rkey };
            wrs[0] = Some(wr);
        }
        // SAFETY: a computation on the number.
        let rkey = unsafe { sys::ibv_inc_rkey(window.rkey) };
        if info.length > 0 {
            let mut wr = blank();
            wr.wr_id = BIND_WR_ID;
            wr.opcode = opcode::IBV_WR_BIND_MW;
            wr.bind_mw_tso_union =
                sys::bind_mw_tso_union_t { bind_mw: sys::bind_mw_t { mw, rkey, bind_info: info } };
            wrs[1] = Some(wr);
        }
        let n = wrs.iter().flatten().count();
        let mut wrs = wrs.into_iter().flatten();
        if n > 0 {
            self.post(n, |_| wrs.next().unwrap_or_else(blank))
                .map_err(|(accepted, source)| PostError { accepted, source })?;
        }
        window.rkey = rkey;
        Ok(())
    }
}

impl Drop for RdmaQp {
    fn drop(&mut self) {
        self.id.destroy_qp();
    }
}

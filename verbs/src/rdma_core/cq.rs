//! Completion queues and their channels.

use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::Arc;

use rdma_mummy_sys as sys;

use super::device::RdmaDevice;
use super::{last, os_error, set_nonblocking};
use crate::{Cq, CqHandle, Device, Error, Wc, WcOp, WcStatus};

/// Completions fetched with one call.
const BATCH: usize = 64;

/// The system's queue; its queue pairs keep it.
pub(super) struct RawCq {
    pub cq: *mut sys::ibv_cq,
    channel: *mut sys::ibv_comp_channel,
    pub device: Arc<RdmaDevice>,
}

// SAFETY: polling, arming and destroying are thread-safe in libibverbs, and only `RdmaCq` polls and arms.
unsafe impl Send for RawCq {}
// SAFETY: as for `Send`; queue pairs use their `Arc<RawCq>` only to keep it alive.
unsafe impl Sync for RawCq {}

impl Drop for RawCq {
    fn drop(&mut self) {
        // SAFETY: created in `RdmaCq::new`, destroyed once, the queue before its channel. No queue pair is left on it
        // (each holds an `Arc`), and all channel events were acknowledged when they were read, so neither call blocks.
        let ret = unsafe {
            match sys::ibv_destroy_cq(self.cq) {
                0 => sys::ibv_destroy_comp_channel(self.channel),
                e => e,
            }
        };
        if ret != 0 {
            tracing::warn!(device = %self.device.info().name, error = %os_error(ret), "completion queue not freed");
        }
    }
}

pub(super) struct RdmaCq {
    raw: Arc<RawCq>,
    entries: u32,
    fd: RawFd,
}

impl RdmaCq {
    pub fn new(device: Arc<RdmaDevice>, entries: u32) -> Result<Self, Error> {
        let what = || format!("create a completion queue of {entries} on {}", device.info().name);
        // SAFETY: an open context.
        let channel = unsafe { sys::ibv_create_comp_channel(device.context) };
        if channel.is_null() {
            return Err(last(what(), "raise the limit of open files (ulimit -n)"));
        }
        // SAFETY: the channel just created on the same context; vector 0 always exists. Size 0 and sizes beyond
        // `int` fail as the device's limit would.
        let cq = unsafe {
            let size = i32::try_from(entries).unwrap_or(-1);
            sys::ibv_create_cq(device.context, size, null_mut(), channel, 0)
        };
        if cq.is_null() {
            let error = last(what(), &format!("the device allows 1..={}", device.info().max_cqe));
            // SAFETY: nothing uses the channel.
            unsafe { sys::ibv_destroy_comp_channel(channel) };
            return Err(error);
        }
        let raw = Arc::new(RawCq { cq, channel, device });
        // SAFETY: both were just created and live in `raw`.
        let (fd, entries) = unsafe { ((*channel).fd, (*cq).cqe as u32) };
        set_nonblocking(fd, "completion channel")?;
        Ok(Self { raw, entries, fd })
    }

    fn failed(&self, what: &str, ret: i32) -> Error {
        let source = os_error(ret);
        let what = format!("{what} completion queue on {}", self.raw.device.info().name);
        Error {
            what,
            source,
            hint: "the queue overran or the device failed; its connections are lost".into(),
        }
    }
}

impl Cq for RdmaCq {
    fn handle(&self) -> CqHandle {
        self.raw.clone()
    }

    fn entries(&self) -> u32 {
        self.entries
    }

    fn poll(&mut self, out: &mut [Wc]) -> Result<usize, Error> {
        let mut raw = [const { MaybeUninit::<sys::ibv_wc>::uninit() }; BATCH];
        let mut done = 0;
        while done < out.len() {
            let want = BATCH.min(out.len() - done);
            // SAFETY: room for `want` completions; the queue lives in `self.raw`.
            let n = unsafe { sys::ibv_poll_cq(self.raw.cq, want as i32, raw.as_mut_ptr().cast()) };
            let Ok(n) = usize::try_from(n) else { return Err(self.failed("poll", n)) };
            for (to, from) in out[done..].iter_mut().zip(&raw[..n.min(want)]) {
                // SAFETY: the first `n` entries were written by the call.
                *to = completion(unsafe { from.assume_init_ref() });
            }
            done += n.min(want);
            if n < want {
                break;
            }
        }
        Ok(done)
    }

    fn wait_fd(&self) -> RawFd {
        self.fd
    }

    fn arm(&mut self) -> Result<(), Error> {
        let (mut cq, mut context) = (null_mut(), null_mut());
        // SAFETY: a live channel, non-blocking, and room for both answers. Only this thread reads it, and the channel
        // has this one queue, so every event is of `self.raw.cq`; each is acknowledged at once.
        unsafe {
            while sys::ibv_get_cq_event(self.raw.channel, &mut cq, &mut context) == 0 {
                sys::ibv_ack_cq_events(self.raw.cq, 1);
            }
        }
        // SAFETY: a live queue.
        match unsafe { sys::ibv_req_notify_cq(self.raw.cq, 0) } {
            0 => Ok(()),
            e => Err(self.failed("arm", e)),
        }
    }
}

fn completion(raw: &sys::ibv_wc) -> Wc {
    let status = match raw.status {
        sys::ibv_wc_status::IBV_WC_SUCCESS => WcStatus::Success,
        sys::ibv_wc_status::IBV_WC_WR_FLUSH_ERR => WcStatus::Flushed,
        other => WcStatus::Error(other),
    };
    let mut wc = Wc { wr_id: raw.wr_id, qp_num: raw.qp_num, status, ..Wc::default() };
    if status != WcStatus::Success {
        // All else is undefined (ibv_poll_cq(3)).
        return wc;
    }
    wc.op = match raw.opcode {
        sys::ibv_wc_opcode::IBV_WC_RECV => WcOp::Recv,
        sys::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => WcOp::RecvWriteImm,
        _ => WcOp::Send,
    };
    if wc.op == WcOp::Send {
        return wc;
    }
    wc.byte_len = raw.byte_len;
    // SAFETY: both members of the union are plain 32-bit integers.
    let (imm, invalidated) = unsafe {
        let u = raw.imm_data_invalidated_rkey_union;
        (u32::from_be(u.imm_data), u.invalidated_rkey)
    };
    let has = |flag: sys::ibv_wc_flags| raw.wc_flags & flag.0 != 0;
    wc.imm = has(sys::ibv_wc_flags::IBV_WC_WITH_IMM).then_some(imm);
    wc.invalidated = has(sys::ibv_wc_flags::IBV_WC_WITH_INV).then_some(invalidated);
    wc
}

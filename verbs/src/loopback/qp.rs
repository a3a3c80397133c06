//! The user's end of a queue pair.

use std::sync::Arc;

use rustix::io::Errno;

use super::Shared;
use super::conn::error;
use super::device::CqKeep;
use super::engine::{Phase, QpState, Work};
use super::keys::next_window_key;
use super::state::State;
use crate::{Error, Mr, PostError, Qp, QpCaps, RecvWr, SendWr, Window};

pub(super) struct LoopQp {
    pub shared: Arc<Shared>,
    pub num: u32,
    pub caps: QpCaps,
    // After the queue pair: completions need it.
    pub _cq: Arc<CqKeep>,
}

fn refused(accepted: usize, source: Errno) -> PostError {
    PostError { accepted, source: source.into() }
}

impl LoopQp {
    fn state<'a>(&self, state: &'a mut State) -> Result<&'a mut QpState, Errno> {
        state.qps.get_mut(&self.num).ok_or(Errno::INVAL)
    }

    fn queue_send(&self, state: &mut State, work: Work) -> Result<(), Errno> {
        let qp = self.state(state)?;
        if qp.phase == Phase::Init {
            return Err(Errno::INVAL);
        }
        if qp.send_used >= self.caps.max_send_wr {
            return Err(Errno::NOMEM);
        }
        qp.send_used += 1;
        qp.sq.push_back(work);
        Ok(())
    }

    fn queue_recv(&self, state: &mut State, wr: RecvWr) -> Result<(), Errno> {
        let qp = self.state(state)?;
        if wr.sges.as_slice().len() > self.caps.max_recv_sge as usize {
            return Err(Errno::INVAL);
        }
        if qp.recv_used >= self.caps.max_recv_wr {
            return Err(Errno::NOMEM);
        }
        qp.recv_used += 1;
        qp.rq.push_back(wr);
        Ok(())
    }

    /// Does what became possible: sends, or the flushing of a queue pair in the error state.
    fn settle(&self, state: &mut State) {
        match state.qps.get(&self.num).map(|q| (q.phase, q.peer)) {
            Some((Phase::Error, _)) => state.break_off(self.num),
            Some((_, peer)) => {
                state.run(self.num);
                if let Some(peer) = peer {
                    state.run(peer);
                }
            }
            None => {}
        }
    }
}

impl Qp for LoopQp {
    fn num(&self) -> u32 {
        self.num
    }

    fn post_send(&mut self, wrs: &[SendWr]) -> Result<(), PostError> {
        let mut state = self.shared.lock();
        let mut result = Ok(());
        for (i, wr) in wrs.iter().enumerate() {
            let sges = wr.sges.as_slice().len() <= self.caps.max_send_sge as usize;
            let queued = if sges { self.queue_send(&mut state, Work::Wr(*wr)) } else { Err(Errno::INVAL) };
            if let Err(e) = queued {
                result = Err(refused(i, e));
                break;
            }
        }
        self.settle(&mut state);
        result
    }

    fn post_recv(&mut self, wrs: &[RecvWr]) -> Result<(), PostError> {
        let mut state = self.shared.lock();
        let mut result = Ok(());
        for (i, wr) in wrs.iter().enumerate() {
            if let Err(e) = self.queue_recv(&mut state, *wr) {
                result = Err(refused(i, e));
                break;
            }
        }
        self.settle(&mut state);
        result
    }

    fn bind_window(
        &mut self,
        window: &mut Window,
        mr: &Mr,
        offset: usize,
        len: u32,
    ) -> Result<u32, PostError> {
        let rkey = next_window_key(window.rkey);
        let addr =
            (mr.region().as_ptr() as u64).checked_add(offset as u64).ok_or(refused(0, Errno::INVAL))?;
        let work = Work::Bind { lkey: mr.lkey(), addr, len: u64::from(len), rkey };
        let mut state = self.shared.lock();
        self.queue_send(&mut state, work).map_err(|e| refused(0, e))?;
        window.rkey = rkey;
        window.bound = len > 0;
        self.settle(&mut state);
        Ok(rkey)
    }

    fn set_min_rnr_timer(&mut self, code: u8) -> Result<(), Error> {
        let fail = |source, hint: &str| Err(error("set the minimum RNR timer".into(), source, hint));
        if code > 31 {
            return fail(Errno::INVAL, "the code is 0..=31");
        }
        // Senders wait for a receive, not for a time: nothing to remember.
        match self.shared.lock().qps.get(&self.num).map(|q| q.phase) {
            Some(Phase::ReadyToSend) => Ok(()),
            _ => fail(Errno::INVAL, "the queue pair is not connected"),
        }
    }
}

impl Drop for LoopQp {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let Some(qp) = state.qps.remove(&self.num) else { return };
        if let Some(conn) = state.conns.get_mut(&qp.id) {
            conn.qp = None;
        }
        if let Some(peer) = qp.peer {
            state.run(peer);
        }
    }
}

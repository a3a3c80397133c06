//! Well-formed RNBD on top of [`Client::call`].

use rnbd_proto::wire::{Flags, MsgClose, MsgIo, MsgOpen, MsgOpenRsp, MsgSessInfo, Op};
use verbs::{SendOp, SgeList};
use zerocopy::{FromBytes, IntoBytes};

use crate::client::Client;
use crate::frame::Frame;
use crate::outcome::{ConnectError, Outcome};

/// Whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct State {
    next_id: u16,
}

/// A request whose answer was not what the helper needs.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It could not be sent.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It was answered, but not with success.
    #[error("{0}")]
    Outcome(Outcome),
}

/// `bytes` as a well-formed message; an error if some test asked for an impossible one.
fn open_msg(name: &str, mode: u8) -> MsgOpen {
    MsgOpen::request(mode, name.as_bytes()).expect("device names of helpers have at most 254 bytes")
}

impl Client {
    /// Buffer ids in turn, so that key rotation and all chunks get used.
    fn some_id(&mut self) -> u16 {
        let depth = self.geometry().queue_depth().min(crate::memory::SLOTS as u16);
        self.rnbd.next_id = (self.rnbd.next_id + 1) % depth;
        self.rnbd.next_id
    }

    /// The connection for I/O: the last one.
    pub fn io_con(&self) -> usize {
        self.cons.len() - 1
    }

    /// A read-direction frame with the read area of `id` as target; binds a window first if reads ask for
    /// invalidation.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn read_frame(&mut self, con: usize, id: u16, usr: &[u8], len: u32) -> Result<Frame, ConnectError> {
        let mut desc = self.desc(id, len);
        let mut flags = 0;
        if self.opts.need_inval {
            desc.key = self.bind(con, id, len)?.into();
            flags = rtrs_proto::wire::MSG_NEED_INVAL_F;
        }
        Ok(Frame { flags, ..Frame::read(len, usr, Some(desc)) })
    }

    fn bind(&mut self, con: usize, id: u16, len: u32) -> Result<u32, ConnectError> {
        if !self.windows.contains_key(&id) {
            let device = self.device.clone().ok_or(ConnectError::Failed("not connected".into()))?;
            self.windows.insert(id, device.alloc_window()?);
        }
        let memory = self.memory.as_ref().expect("connected");
        let window = self.windows.get_mut(&id).expect("inserted above");
        let at = memory.read_area(id);
        Ok(self.cons[con].qp.bind_window(window, memory.mr(), at, len)?)
    }

    /// A read-direction call that returns its data.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_read(&mut self, con: usize, usr: &[u8], len: u32) -> Result<Vec<u8>, CallError> {
        let id = self.some_id();
        self.fill_read_area(id, 0xa5);
        let frame = self.read_frame(con, id, usr, len)?;
        self.send(con, id, &frame)?;
        let end = std::time::Instant::now() + self.opts.timeout;
        let inval = loop {
            if let Some(reply) = self.take_reply(id) {
                reply.result.map_err(|e| CallError::Outcome(Outcome::Errno(e)))?;
                break reply.inval;
            }
            if !self.is_up() {
                return Err(CallError::Outcome(self.closed_or_timeout()));
            }
            if std::time::Instant::now() > end {
                return Err(CallError::Outcome(Outcome::Timeout));
            }
        };
        if self.opts.need_inval && !inval {
            let key = frame.descs[0].key.get();
            self.post(con, SendOp::LocalInvalidate(key), SgeList::EMPTY)?;
        }
        let rest = self.read_area(id, usize::MAX);
        if rest[len as usize..].iter().any(|b| *b != 0xa5) {
            self.violation(format!("bytes behind the {len} of a read were written"));
        }
        Ok(rest[..len as usize].into())
    }

    /// Exchanges versions; returns the server's.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn sess_info(&mut self) -> Result<u8, CallError> {
        let rsp = self.call_read(0, MsgSessInfo::request().as_bytes(), size_of::<MsgSessInfo>() as u32)?;
        Ok(MsgSessInfo::read_from_bytes(&rsp).expect("as long as asked for").ver)
    }

    /// Opens a device: 0 ro, 1 rw, 2 migration.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn open(&mut self, name: &str, mode: u8) -> Result<MsgOpenRsp, CallError> {
        self.open_raw(open_msg(name, mode).as_bytes())
    }

    /// As [`Client::open`], any bytes.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn open_raw(&mut self, msg: &[u8]) -> Result<MsgOpenRsp, CallError> {
        let rsp = self.call_read(0, msg, size_of::<MsgOpenRsp>() as u32)?;
        Ok(MsgOpenRsp::read_from_bytes(&rsp).expect("as long as asked for"))
    }

    /// A write-direction call on connection `con`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn call_write(&mut self, con: usize, data: &[u8], usr: &[u8]) -> Result<Outcome, ConnectError> {
        let id = self.some_id();
        self.call(con, id, &Frame::write(data, usr))
    }

    /// Closes a device.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn close(&mut self, device: u32) -> Result<Outcome, ConnectError> {
        self.call_write(0, &[], MsgClose::request(device).as_bytes())
    }

    /// Reads `len` bytes from `sector`.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn read(&mut self, device: u32, sector: u64, len: u32) -> Result<Vec<u8>, CallError> {
        let msg = MsgIo::request(device, Op::Read, Flags::SYNC, sector, len, 0x4004);
        self.call_read(self.io_con(), msg.as_bytes(), len)
    }

    /// Writes.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn write(
        &mut self,
        device: u32,
        sector: u64,
        data: &[u8],
        flags: Flags,
    ) -> Result<Outcome, ConnectError> {
        let msg = MsgIo::request(device, Op::Write, flags, sector, data.len() as u32, 0x4004);
        self.call_write(self.io_con(), data, msg.as_bytes())
    }

    /// Flushes, as the kernel does: a read without descriptor.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn flush(&mut self, device: u32) -> Result<Outcome, ConnectError> {
        let flags = Flags::SYNC.with(Flags::FUA);
        let msg = MsgIo::request(device, Op::Flush, flags, u64::MAX, 0, 0);
        let (con, id) = (self.io_con(), self.some_id());
        self.call(con, id, &Frame::read(0, msg.as_bytes(), None))
    }

    /// Any operation without data on a range.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn range_op(&mut self, device: u32, op: Op, sector: u64, len: u32) -> Result<Outcome, ConnectError> {
        let msg = MsgIo::request(device, op, Flags::SYNC, sector, len, 0x4004);
        self.call_write(self.io_con(), &[], msg.as_bytes())
    }

    /// Discards.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn discard(&mut self, device: u32, sector: u64, len: u32) -> Result<Outcome, ConnectError> {
        self.range_op(device, Op::Discard, sector, len)
    }

    /// Zeroes.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn write_zeroes(&mut self, device: u32, sector: u64, len: u32) -> Result<Outcome, ConnectError> {
        self.range_op(device, Op::WriteZeroes, sector, len)
    }
}

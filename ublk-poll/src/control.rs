//! /dev/ublk-control: commands that end as completions, so that nobody waits for the kernel.

mod command;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes;

pub use command::{Command, Reply};

use crate::abi::CtrlCmd;

/// The driver's device for commands.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// Commands in flight at once.
const ENTRIES: u32 = 64;
/// Of an unprivileged command: the path of the char device comes before its payload.
const PATH_LEN: usize = 64;
/// Room for the largest payload.
pub(crate) const PAYLOAD_LEN: usize = 128;

/// Memory that the kernel may read and write while a command is in flight.
#[repr(C, align(8))]
#[derive(Default)]
pub(crate) struct Buffer {
    path: [[u8; 32]; PATH_LEN / 32],
    payload: [[u8; 32]; PAYLOAD_LEN / 32],
}

/// A command has ended.
#[derive(Debug)]
pub struct Done {
    /// As given to [`Control::submit`].
    pub token: u64,
    /// The answer, or the kernel's refusal.
    pub result: Result<Reply, Errno>,
}

/// An open control device. Lives on one thread, which polls it.
pub struct Control {
    ring: IoUring<squeue::Entry128>,
    slots: Vec<Option<Pending>>,
    free: Vec<u32>,
    privileged: bool,
    file: OwnedFd,
}

/// A command in flight.
struct Pending {
    token: u64,
    /// From `Box::leak`; the kernel's until the completion.
    buffer: NonNull<Buffer>,
    answer: command::Answer,
}

impl Control {
    /// Opens the control device.
    ///
    /// # Errors
    /// What is missing, in words: the module, rights, io_uring.
    pub fn open() -> Result<Self, OpenError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(CONTROL_PATH, flags, Mode::empty())
            .map_err(|errno| OpenError::Device { errno })?;
        let ring = crate::ring::build(ENTRIES).map_err(|e| OpenError::Ring(crate::ring::explain(&e)))?;
        Ok(Self {
            ring,
            slots: (0..ENTRIES).map(|_| None).collect(),
            free: (0..ENTRIES).rev().collect(),
            privileged: is_privileged(),
            file,
        })
    }

    /// Whether this process may make devices with user copy and recovery (CAP_SYS_ADMIN).
    pub fn is_privileged(&self) -> bool {
        self.privileged
    }

    /// Sends `command` about device `id`; [`Control::poll`] brings its end, with `token`.
    ///
    /// # Errors
    /// `BUSY`: too many commands in flight.
    pub fn submit(&mut self, id: u32, command: Command, token: u64) -> Result<(), Errno> {
        let slot = *self.free.last().ok_or(Errno::BUSY)?;
        let mut buffer = Box::<Buffer>::default();
        let (header, with_path) = self.header(id, &command, &mut buffer);
        let header = command::address(header, &raw mut *buffer, with_path);
        let (answer, entry) = (command.answer(), self.entry(command.code(), &header));
        // The box moves into the slot as a raw pointer, so its address stays as the entry has it.
        let buffer = NonNull::from(Box::leak(buffer));
        self.free.pop();
        self.slots[slot as usize] = Some(Pending { token, buffer, answer });
        self.push(entry.user_data(u64::from(slot)));
        Ok(())
    }

    /// Fills in what the command carries, and the path that unprivileged commands begin with.
    fn header(&self, id: u32, command: &Command, buffer: &mut Buffer) -> (CtrlCmd, bool) {
        let with_path = command.wants_path(self.privileged);
        if with_path {
            set_path(buffer, &format!("/dev/ublkc{id}"));
        }
        let payload = command.write_payload(buffer.payload.as_mut_bytes());
        let path = if with_path { PATH_LEN as u16 } else { 0 };
        let header = CtrlCmd {
            dev_id: id,
            queue_id: u16::MAX,
            len: path + payload,
            addr: 0,
            data: command.data(),
            dev_path_len: path,
            ..CtrlCmd::default()
        };
        (header, with_path)
    }

    fn entry(&self, code: u32, header: &CtrlCmd) -> squeue::Entry128 {
        let mut bytes = [0; 80];
        bytes[..size_of::<CtrlCmd>()].copy_from_slice(header.as_bytes());
        opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), code).cmd(bytes).build()
    }

    fn push(&mut self, entry: squeue::Entry128) {
        // SAFETY: the buffer that the entry points to belongs to the slot until its completion, and is leaked if this
        // object goes first. One entry per slot and as many entries as slots, so the queue has room.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "one entry per slot");
        self.send();
    }

    fn send(&mut self) {
        match self.ring.submit() {
            Ok(_) => {}
            // Again at the next poll.
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INTR | Errno::AGAIN | Errno::BUSY)) => {}
            Err(e) => tracing::error!(error = %e, "io_uring_enter of {CONTROL_PATH} failed"),
        }
    }

    /// Appends what has ended; true if there was anything. Never blocks.
    pub fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        if self.idle() {
            return false;
        }
        if self.ready() {
            self.send();
        }
        let before = done.len();
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            self.ended(entry.user_data() as u32, entry.result(), done);
        }
        done.len() > before
    }

    /// No command is in flight.
    pub fn idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// True while there is work for the next [`Control::poll`], so the thread must not sleep.
    pub fn ready(&mut self) -> bool {
        let queue = self.ring.submission();
        let pending = queue.taskrun() || !queue.is_empty();
        drop(queue);
        pending || !self.ring.completion().is_empty()
    }

    /// Readable when a command has ended.
    pub fn wait_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    fn ended(&mut self, slot: u32, result: i32, done: &mut Vec<Done>) {
        // The number is ours, given with an entry; it is checked all the same.
        let Some(pending) = self.slots.get_mut(slot as usize).and_then(Option::take) else { return };
        self.free.push(slot);
        // SAFETY: the pointer is of a box leaked in `submit`, taken back once, as the slot is empty now; the kernel let
        // go of it with this completion.
        let buffer = unsafe { Box::from_raw(pending.buffer.as_ptr()) };
        let result = if result < 0 {
            Err(Errno::from_raw_os_error(-result))
        } else {
            pending.answer.read(buffer.payload.as_bytes())
        };
        done.push(Done { token: pending.token, result });
    }
}

/// Writes `path` and a NUL to the front of the buffer.
fn set_path(buffer: &mut Buffer, path: &str) {
    // At most "/dev/ublkc" and ten digits.
    buffer.path.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
}

/// CAP_SYS_ADMIN, as the driver asks for it.
fn is_privileged() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN))
}

/// The control device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// open(2).
    #[error("cannot open {CONTROL_PATH}: {errno}{}", device_hint(errno))]
    Device {
        /// The refusal.
        errno: Errno,
    },
    /// io_uring.
    #[error("{0}")]
    Ring(String),
}

impl OpenError {
    /// As a positive errno.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Device { errno } => *errno,
            Self::Ring(_) => Errno::NOSYS,
        }
    }
}

fn device_hint(errno: &Errno) -> &'static str {
    match *errno {
        Errno::NOENT => "; load the driver: modprobe ublk_drv (Linux 6.4 or later)",
        Errno::ACCESS | Errno::PERM => "; run as root, or give this user the device by a udev rule",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;
    use crate::abi::{DevInfo, Params};

    #[test]
    fn the_buffer_is_path_then_payload() {
        assert_eq!(std::mem::offset_of!(Buffer, payload), PATH_LEN);
        assert_eq!(size_of::<Buffer>(), PATH_LEN + PAYLOAD_LEN);
        assert!(size_of::<DevInfo>() <= PAYLOAD_LEN && size_of::<Params>() <= PAYLOAD_LEN);
        let mut buffer = Buffer::default();
        set_path(&mut buffer, "/dev/ublkc4294967295");
        let bytes = buffer.path.as_bytes();
        assert!(bytes.starts_with(b"/dev/ublkc4294967295\0"));
    }

    #[test]
    fn a_missing_driver_is_explained() {
        let e = OpenError::Device { errno: Errno::NOENT };
        assert!(e.to_string().contains("modprobe ublk_drv"), "{e}");
        assert_eq!(e.errno(), Errno::NOENT);
    }

    #[test]
    fn answers_are_read_back() {
        let info = DevInfo { dev_id: 7, ..DevInfo::default() };
        let mut payload = [0u8; PAYLOAD_LEN];
        Command::Info.write_payload(&mut payload);
        payload[..size_of::<DevInfo>()].copy_from_slice(info.as_bytes());
        match Command::Info.answer().read(&payload) {
            Ok(Reply::Info(read)) => assert_eq!(read, info),
            other => panic!("{other:?}"),
        }
        assert!(DevInfo::read_from_bytes(&payload[..10]).is_err());
    }
}

//! The control commands: number, argument, payload and answer of each.

use std::mem::size_of;

use libublk_rs_sys as sys;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::{Buffer, PATH_LEN};
use crate::abi::{CtrlCmd, DevInfo, Params};
use crate::features::Features;

/// A command about one device (Documentation/block/ublk.rst, "Control plane").
#[derive(Clone, Debug)]
pub enum Command {
    /// What the driver can do. The device number means nothing. `OPNOTSUPP` before Linux 6.5.
    Features,
    /// Makes /dev/ublkcN. `EXIST`: the number is taken.
    Add(DevInfo),
    /// Sets size and limits, before the start.
    SetParams(Params),
    /// Reads size and limits.
    GetParams,
    /// Reads state, flags and owner. `NODEV`: no such device.
    Info,
    /// Makes /dev/ublkbN and reads its partition table. Ends after every tag of every queue was fetched.
    Start,
    /// Removes /dev/ublkbN when its requests in flight have ended; then every FETCH ends with `NODEV`.
    Stop,
    /// Removes /dev/ublkcN. Ends when the last use of it is gone: queues and char device must be dropped.
    Delete,
    /// Takes over a quiesced device. `BUSY`: its former server is not quite gone yet.
    StartRecovery,
    /// Lets requests of a quiesced device flow again. Ends after every tag of every queue was fetched.
    EndRecovery,
    /// Changes the size of a live device to so many 512-byte sectors.
    UpdateSize(u64),
}

/// What a command answers.
#[derive(Debug)]
pub enum Reply {
    /// Done.
    Done,
    /// To [`Command::Features`].
    Features(Features),
    /// To [`Command::Info`], and to [`Command::Add`] as the kernel granted it.
    Info(DevInfo),
    /// To [`Command::GetParams`].
    Params(Params),
}

/// How to read the payload after the end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    Nothing,
    Features,
    Info,
    Params,
}

impl Command {
    pub(super) fn code(&self) -> u32 {
        match self {
            Self::Features => sys::UBLK_U_CMD_GET_FEATURES,
            Self::Add(_) => sys::UBLK_U_CMD_ADD_DEV,
            Self::SetParams(_) => sys::UBLK_U_CMD_SET_PARAMS,
            Self::GetParams => sys::UBLK_U_CMD_GET_PARAMS,
            Self::Info => sys::UBLK_U_CMD_GET_DEV_INFO2,
            Self::Start => sys::UBLK_U_CMD_START_DEV,
            Self::Stop => sys::UBLK_U_CMD_STOP_DEV,
            Self::Delete => sys::UBLK_U_CMD_DEL_DEV,
            Self::StartRecovery => sys::UBLK_U_CMD_START_USER_RECOVERY,
            Self::EndRecovery => sys::UBLK_U_CMD_END_USER_RECOVERY,
            Self::UpdateSize(_) => sys::UBLK_U_CMD_UPDATE_SIZE,
        }
    }

    /// Whether the path of the char device goes before the payload: so that the kernel can check a user's right to
    /// it. GET_DEV_INFO2 always has it.
    pub(super) fn wants_path(&self, privileged: bool) -> bool {
        match self {
            Self::Features | Self::Add(_) => false,
            Self::Info => true,
            _ => !privileged,
        }
    }

    /// `data[0]` of the command.
    pub(super) fn data(&self) -> u64 {
        match self {
            Self::Start | Self::EndRecovery => u64::from(std::process::id()),
            Self::UpdateSize(sectors) => *sectors,
            _ => 0,
        }
    }

    /// Writes what goes in, and returns the length of what goes in or comes out.
    pub(super) fn write_payload(&self, out: &mut [u8]) -> u16 {
        let len = match self {
            Self::Add(info) => {
                out[..size_of::<DevInfo>()].copy_from_slice(info.as_bytes());
                size_of::<DevInfo>()
            }
            Self::SetParams(params) => {
                out[..size_of::<Params>()].copy_from_slice(params.as_bytes());
                size_of::<Params>()
            }
            // Its first field tells the kernel how much to fill in.
            Self::GetParams => {
                let wanted = Params { len: size_of::<Params>() as u32, ..Params::default() };
                out[..size_of::<Params>()].copy_from_slice(wanted.as_bytes());
                size_of::<Params>()
            }
            Self::Info => size_of::<DevInfo>(),
            Self::Features => sys::UBLK_FEATURES_LEN as usize,
            _ => 0,
        };
        len as u16
    }

    pub(super) fn answer(&self) -> Answer {
        match self {
            Self::Features => Answer::Features,
            Self::Add(_) | Self::Info => Answer::Info,
            Self::GetParams => Answer::Params,
            _ => Answer::Nothing,
        }
    }
}

/// The header with the address of path or payload.
pub(super) fn address(header: CtrlCmd, buffer: *mut Buffer, with_path: bool) -> CtrlCmd {
    let skip = if with_path { 0 } else { PATH_LEN as u64 };
    let addr = if header.len == 0 { 0 } else { buffer as u64 + skip };
    CtrlCmd { addr, ..header }
}

impl Answer {
    pub(super) fn read(self, payload: &[u8]) -> Result<Reply, Errno> {
        // Lengths are constants that fit (see the tests), so a short payload cannot be.
        Ok(match self {
            Self::Nothing => Reply::Done,
            Self::Features => {
                let (bits, _) = u64::read_from_prefix(payload).map_err(|_| Errno::IO)?;
                Reply::Features(Features::new(bits))
            }
            Self::Info => Reply::Info(DevInfo::read_from_prefix(payload).map_err(|_| Errno::IO)?.0),
            Self::Params => Reply::Params(Params::read_from_prefix(payload).map_err(|_| Errno::IO)?.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::PAYLOAD_LEN;
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header_file() {
        // _IOR('u', …) and _IOWR('u', …) of a 32-byte structure.
        assert_eq!(Command::Add(DevInfo::default()).code(), 0xc020_7504);
        assert_eq!(Command::Delete.code(), 0xc020_7505);
        assert_eq!(Command::Start.code(), 0xc020_7506);
        assert_eq!(Command::Stop.code(), 0xc020_7507);
        assert_eq!(Command::Info.code(), 0x8020_7512);
        assert_eq!(Command::Features.code(), 0x8020_7513);
        assert_eq!(Command::UpdateSize(1).code(), 0xc020_7515);
    }

    #[test]
    fn payloads_and_arguments() {
        let mut out = [0; PAYLOAD_LEN];
        let info = DevInfo { dev_id: 5, nr_hw_queues: 2, ..DevInfo::default() };
        assert_eq!(Command::Add(info).write_payload(&mut out), 64);
        assert_eq!(DevInfo::read_from_bytes(&out[..64]).unwrap(), info);
        assert_eq!(Command::Start.data(), u64::from(std::process::id()));
        assert_eq!(Command::UpdateSize(9).data(), 9);
        assert_eq!(Command::Features.write_payload(&mut out), 8);
        assert!(Command::Info.wants_path(true) && !Command::Stop.wants_path(true));
        assert!(Command::Stop.wants_path(false) && !Command::Features.wants_path(false));
    }
}

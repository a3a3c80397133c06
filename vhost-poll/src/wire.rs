//! vhost-user messages (QEMU, docs/interop/vhost-user.rst): bytes to meaning, without any state.
//!
//! ```text
//! header: request u32, flags u32 (version 1 in bits 0–1, reply 2, need_reply 3), size u32; then `size` bytes
//! ```
//! Numbers are in the byte order of the machine. The structures are those of the crate `vhost`.

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserMsgValidator, VhostUserSingleMemoryRegion, VhostUserU64,
    VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;

use crate::memory::{MAX_REGIONS, RegionSpec};

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;
/// A message's payload is at most this long; longer ones end the connection.
pub const MAX_PAYLOAD: usize = 4096;
/// Descriptors of one message at most.
pub const MAX_FDS: usize = MAX_REGIONS;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// A vring message without a descriptor.
const NO_FD: u64 = 1 << 8;

/// A message that cannot be obeyed. The connection ends with it: what follows has no meaning either.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Flags.
    #[error("a message with flags {0:#x}; version 1 and no reply are right")]
    Flags(u32),
    /// Length.
    #[error("message {request} with {got} bytes; {want} are right")]
    Length {
        /// Its number.
        request: u32,
        /// As announced.
        got: usize,
        /// In words.
        want: &'static str,
    },
    /// Number of descriptors.
    #[error("{request:?} with {got} descriptors; {want} are right")]
    Descriptors {
        /// Message.
        request: FrontendReq,
        /// Received.
        got: usize,
        /// Needed.
        want: usize,
    },
    /// Not one of this device.
    #[error("message {0} is unknown to a block device")]
    Unknown(u32),
    /// Contents.
    #[error("{0:?} with values that mean nothing")]
    Invalid(FrontendReq),
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `VHOST_USER_*`.
    pub request: u32,
    /// Version and wishes.
    pub flags: u32,
    /// Bytes of the payload.
    pub size: u32,
}

impl Header {
    /// Reads a header of the front end.
    ///
    /// # Errors
    /// Flags and length.
    pub fn parse(bytes: [u8; HEADER_LEN]) -> Result<Self, WireError> {
        let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let header = Self { request: word(0), flags: word(4), size: word(8) };
        if header.flags & VERSION_MASK != VERSION || header.flags & REPLY != 0 {
            return Err(WireError::Flags(header.flags));
        }
        if header.size as usize > MAX_PAYLOAD {
            let (request, got) = (header.request, header.size as usize);
            return Err(WireError::Length { request, got, want: "at most 4096" });
        }
        Ok(header)
    }

    /// The front end waits for an answer to any message.
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The header of an answer of `size` bytes.
    pub fn reply(request: u32, size: usize) -> [u8; HEADER_LEN] {
        Self { request, flags: VERSION | REPLY, size: size as u32 }.bytes()
    }

    /// The header of a message of the back end.
    pub fn message(request: u32, size: usize) -> [u8; HEADER_LEN] {
        Self { request, flags: VERSION, size: size as u32 }.bytes()
    }

    fn bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.size.to_ne_bytes());
        bytes
    }
}

/// Which of a vring's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VringFd {
    /// Driver to device.
    Kick,
    /// Device to driver.
    Call,
    /// Something is wrong with the ring.
    Err,
}

/// What a front end can say to a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the specification's own names and fields")]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionSpec>),
    SetVringNum { index: u32, num: u32 },
    SetVringAddr { index: u32, desc: u64, avail: u64, used: u64 },
    SetVringBase { index: u32, base: u32 },
    GetVringBase { index: u32 },
    SetVringFd { index: u32, which: VringFd, has_fd: bool },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { index: u32, enable: bool },
    SetBackendReqFd,
    GetConfig { offset: u32, size: u32, flags: u32 },
    SetConfig { offset: u32, data: Vec<u8> },
    GetInflightFd { queues: u16, queue_size: u16 },
    SetInflightFd { len: u64, offset: u64, queues: u16, queue_size: u16 },
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec),
    RemMemReg(RegionSpec),
    SetStatus(u64),
    GetStatus,
}

/// A structure at the beginning of `payload`.
fn head<T: ByteValued + Default>(payload: &[u8]) -> Option<(T, &[u8])> {
    let (bytes, rest) = payload.split_at_checked(size_of::<T>())?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(bytes);
    Some((value, rest))
}

/// A structure and nothing else, valid in itself.
fn whole<T: ByteValued + Default + VhostUserMsgValidator>(
    request: FrontendReq,
    payload: &[u8],
    want: &'static str,
) -> Result<T, WireError> {
    match head::<T>(payload) {
        Some((value, [])) if value.is_valid() => Ok(value),
        Some((_, [])) => Err(WireError::Invalid(request)),
        _ => Err(WireError::Length { request: request.into(), got: payload.len(), want }),
    }
}

fn number(request: FrontendReq, payload: &[u8]) -> Result<u64, WireError> {
    Ok(whole::<VhostUserU64>(request, payload, "8")?.value)
}

fn state(request: FrontendReq, payload: &[u8]) -> Result<(u32, u32), WireError> {
    let VhostUserVringState { index, num } = whole(request, payload, "8")?;
    Ok((index, num))
}

fn region(r: VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: r.guest_phys_addr,
        size: r.memory_size,
        user_addr: r.user_addr,
        mmap_offset: r.mmap_offset,
    }
}

fn regions(request: FrontendReq, payload: &[u8]) -> Result<Vec<RegionSpec>, WireError> {
    let wrong =
        || WireError::Length { request: request.into(), got: payload.len(), want: "8, and 32 per region" };
    let (VhostUserMemory { num_regions, .. }, mut rest) = head(payload).ok_or_else(wrong)?;
    if num_regions as usize > MAX_REGIONS {
        return Err(WireError::Invalid(request));
    }
    let mut list = Vec::with_capacity(num_regions as usize);
    for _ in 0..num_regions {
        let (one, more) = head::<VhostUserMemoryRegion>(rest).ok_or_else(wrong)?;
        list.push(region(one));
        rest = more;
    }
    // Some front ends send their whole array, unused entries and all.
    Ok(list)
}

fn inflight(request: FrontendReq, payload: &[u8]) -> Result<VhostUserInflight, WireError> {
    // 20 bytes, or 24 with the padding of the C structure.
    let mut padded = [0; size_of::<VhostUserInflight>()];
    match payload.len() {
        20 | 24 => padded[..payload.len()].copy_from_slice(payload),
        got => return Err(WireError::Length { request: request.into(), got, want: "20 or 24" }),
    }
    whole(request, &padded, "24")
}

fn config(request: FrontendReq, payload: &[u8]) -> Result<(VhostUserConfig, &[u8]), WireError> {
    let wrong =
        || WireError::Length { request: request.into(), got: payload.len(), want: "12 and the contents" };
    let (config, data) = head::<VhostUserConfig>(payload).ok_or_else(wrong)?;
    if !config.is_valid() || data.len() != config.size as usize {
        return Err(WireError::Invalid(request));
    }
    Ok((config, data))
}

/// Reads a message that came with `fds` descriptors.
///
/// # Errors
/// [`WireError`].
pub fn parse(header: &Header, payload: &[u8], fds: usize) -> Result<Message, WireError> {
    let request = FrontendReq::try_from(header.request).map_err(|_| WireError::Unknown(header.request))?;
    let message = parse_payload(request, payload)?;
    let want = match &message {
        Message::SetMemTable(list) => list.len(),
        Message::SetVringFd { has_fd, .. } => usize::from(*has_fd),
        Message::SetBackendReqFd | Message::SetInflightFd { .. } | Message::AddMemReg(_) => 1,
        // Some front ends send the region's descriptor once more.
        Message::RemMemReg(_) => fds.min(1),
        _ => 0,
    };
    if fds == want { Ok(message) } else { Err(WireError::Descriptors { request, got: fds, want }) }
}

fn parse_payload(request: FrontendReq, payload: &[u8]) -> Result<Message, WireError> {
    use FrontendReq as R;
    let empty = |message| match payload {
        [] => Ok(message),
        _ => Err(WireError::Length { request: request.into(), got: payload.len(), want: "none" }),
    };
    Ok(match request {
        R::GET_FEATURES => empty(Message::GetFeatures)?,
        R::SET_FEATURES => Message::SetFeatures(number(request, payload)?),
        R::SET_OWNER => empty(Message::SetOwner)?,
        R::RESET_OWNER => empty(Message::ResetOwner)?,
        R::SET_MEM_TABLE => Message::SetMemTable(regions(request, payload)?),
        R::SET_VRING_NUM => {
            let (index, num) = state(request, payload)?;
            Message::SetVringNum { index, num }
        }
        R::SET_VRING_ADDR => {
            let VhostUserVringAddr { index, descriptor, used, available, .. } =
                whole(request, payload, "40")?;
            Message::SetVringAddr { index, desc: descriptor, avail: available, used }
        }
        R::SET_VRING_BASE => {
            let (index, base) = state(request, payload)?;
            Message::SetVringBase { index, base }
        }
        R::GET_VRING_BASE => Message::GetVringBase { index: state(request, payload)?.0 },
        R::SET_VRING_KICK => vring_fd(request, payload, VringFd::Kick)?,
        R::SET_VRING_CALL => vring_fd(request, payload, VringFd::Call)?,
        R::SET_VRING_ERR => vring_fd(request, payload, VringFd::Err)?,
        R::GET_PROTOCOL_FEATURES => empty(Message::GetProtocolFeatures)?,
        R::SET_PROTOCOL_FEATURES => Message::SetProtocolFeatures(number(request, payload)?),
        R::GET_QUEUE_NUM => empty(Message::GetQueueNum)?,
        R::SET_VRING_ENABLE => match state(request, payload)? {
            (index, num @ (0 | 1)) => Message::SetVringEnable { index, enable: num == 1 },
            _ => return Err(WireError::Invalid(request)),
        },
        R::SET_BACKEND_REQ_FD => empty(Message::SetBackendReqFd)?,
        R::GET_CONFIG => {
            let (VhostUserConfig { offset, size, flags }, _) = config(request, payload)?;
            Message::GetConfig { offset, size, flags }
        }
        R::SET_CONFIG => {
            let (VhostUserConfig { offset, flags, .. }, data) = config(request, payload)?;
            if flags & VhostUserConfigFlags::LIVE_MIGRATION.bits() != 0 {
                return Err(WireError::Invalid(request));
            }
            Message::SetConfig { offset, data: data.to_vec() }
        }
        R::GET_INFLIGHT_FD => {
            let VhostUserInflight { num_queues, queue_size, .. } = inflight(request, payload)?;
            Message::GetInflightFd { queues: num_queues, queue_size }
        }
        R::SET_INFLIGHT_FD => {
            let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } =
                inflight(request, payload)?;
            Message::SetInflightFd { len: mmap_size, offset: mmap_offset, queues: num_queues, queue_size }
        }
        R::RESET_DEVICE => empty(Message::ResetDevice)?,
        R::GET_MAX_MEM_SLOTS => empty(Message::GetMaxMemSlots)?,
        R::ADD_MEM_REG => Message::AddMemReg(single(request, payload)?),
        R::REM_MEM_REG => Message::RemMemReg(single(request, payload)?),
        R::SET_STATUS => Message::SetStatus(number(request, payload)?),
        R::GET_STATUS => empty(Message::GetStatus)?,
        other => return Err(WireError::Unknown(other.into())),
    })
}

fn single(request: FrontendReq, payload: &[u8]) -> Result<RegionSpec, WireError> {
    Ok(region(*whole::<VhostUserSingleMemoryRegion>(request, payload, "40")?))
}

fn vring_fd(request: FrontendReq, payload: &[u8], which: VringFd) -> Result<Message, WireError> {
    let value = number(request, payload)?;
    if value & !(NO_FD | 0xff) != 0 {
        return Err(WireError::Invalid(request));
    }
    Ok(Message::SetVringFd { index: (value & 0xff) as u32, which, has_fd: value & NO_FD == 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: FrontendReq, payload: &[u8], fds: usize) -> Result<Message, WireError> {
        let header = Header { request: request.into(), flags: 1, size: payload.len() as u32 };
        parse(&header, payload, fds)
    }

    #[test]
    fn headers() {
        let ok = Header { request: 5, flags: 9, size: 8 };
        assert_eq!(Header::parse(ok.bytes()), Ok(ok));
        assert!(ok.needs_reply());
        for bad in [Header { flags: 0, ..ok }, Header { flags: 5, ..ok }, Header { size: 4097, ..ok }] {
            assert!(Header::parse(bad.bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(Header::reply(1, 8)[4..8], 5u32.to_ne_bytes());
    }

    #[test]
    fn descriptors_are_counted() {
        let kick = |value: u64, fds| ask(FrontendReq::SET_VRING_KICK, &value.to_ne_bytes(), fds);
        assert_eq!(kick(3, 1), Ok(Message::SetVringFd { index: 3, which: VringFd::Kick, has_fd: true }));
        assert_eq!(kick(0x103, 0), Ok(Message::SetVringFd { index: 3, which: VringFd::Kick, has_fd: false }));
        assert!(kick(3, 0).is_err() && kick(0x103, 1).is_err() && kick(0x203, 1).is_err());
        assert!(ask(FrontendReq::GET_FEATURES, &[], 1).is_err());
    }

    #[test]
    fn memory_tables() {
        let mut table = Vec::from(2u64.to_ne_bytes());
        for i in 0..2u64 {
            for field in [i << 30, 1 << 30, 0x7000_0000_0000 + (i << 30), i << 30] {
                table.extend(field.to_ne_bytes());
            }
        }
        let Ok(Message::SetMemTable(list)) = ask(FrontendReq::SET_MEM_TABLE, &table, 2) else { panic!() };
        assert_eq!(list[1].user_addr, 0x7000_4000_0000);
        assert!(ask(FrontendReq::SET_MEM_TABLE, &table, 1).is_err());
        assert!(ask(FrontendReq::SET_MEM_TABLE, &table[..71], 2).is_err());
        table[..8].copy_from_slice(&65u64.to_ne_bytes());
        assert!(ask(FrontendReq::SET_MEM_TABLE, &table, 65).is_err());
    }

    #[test]
    fn values_are_checked() {
        let state = |index: u32, num: u32| [index.to_ne_bytes(), num.to_ne_bytes()].concat();
        assert!(ask(FrontendReq::SET_VRING_ENABLE, &state(0, 2), 0).is_err());
        assert!(ask(FrontendReq::SET_VRING_NUM, &state(0, 128)[..7], 0).is_err());
        let config = |offset: u32, size: u32, data: usize| {
            let mut c: Vec<u8> = [offset, size, 1].iter().flat_map(|n| n.to_ne_bytes()).collect();
            c.resize(12 + data, 7);
            c
        };
        assert_eq!(
            ask(FrontendReq::SET_CONFIG, &config(32, 1, 1), 0),
            Ok(Message::SetConfig { offset: 32, data: vec![7] })
        );
        assert!(ask(FrontendReq::SET_CONFIG, &config(32, 2, 1), 0).is_err());
        assert!(ask(FrontendReq::GET_CONFIG, &config(u32::MAX, 2, 2), 0).is_err());
        assert!(ask(FrontendReq::GET_INFLIGHT_FD, &[0; 20], 0).is_err());
        assert_eq!(ask(FrontendReq::NET_SET_MTU, &[0; 8], 0), Err(WireError::Unknown(20)));
    }
}

//! The kernel's structures and numbers (include/uapi/linux/ublk_cmd.h), checked against libublk's bindings of them.

use std::mem::{offset_of, size_of};

use libublk_rs_sys as sys;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most tags of a queue (`UBLK_MAX_QUEUE_DEPTH`).
pub const MAX_QUEUE_DEPTH: u16 = sys::UBLK_MAX_QUEUE_DEPTH as u16;
/// Most queues of a device (`UBLK_MAX_NR_QUEUES`); the kernel gives no more than there are CPUs.
pub const MAX_QUEUES: u16 = sys::UBLK_MAX_NR_QUEUES as u16;

/// `struct ublksrv_ctrl_cmd`: what a control command carries in its submission entry. 32 of its 80 bytes.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(crate) struct CtrlCmd {
    /// Device number, `u32::MAX` where the kernel shall choose one (ADD_DEV).
    pub dev_id: u32,
    /// `u16::MAX`: not about a queue.
    pub queue_id: u16,
    /// Bytes at `addr`.
    pub len: u16,
    /// Buffer of the command, in or out.
    pub addr: u64,
    /// Inline argument.
    pub data: u64,
    /// Unprivileged devices: so many bytes at `addr` are the path of the char device, NUL included.
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}

/// `struct ublksrv_ctrl_dev_info`: a device as ADD_DEV asks for it and GET_DEV_INFO shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct DevInfo {
    /// Number of queues; the kernel lowers it to the number of CPUs.
    pub nr_hw_queues: u16,
    /// Tags of each queue, 1..=4096.
    pub queue_depth: u16,
    /// See [`DevInfo::dev_state`].
    pub state: u16,
    /// Padding.
    pub pad0: u16,
    /// Largest request, bytes; the kernel rounds down to whole pages.
    pub max_io_buf_bytes: u32,
    /// N of /dev/ublkbN.
    pub dev_id: u32,
    /// Process that serves it, -1 if none.
    pub ublksrv_pid: i32,
    /// Padding.
    pub pad1: u32,
    /// `UBLK_F_*`: asked for, then granted. See [`crate::DeviceFlags`].
    pub flags: u64,
    /// Kept by the kernel for the server and not interpreted by it.
    pub ublksrv_flags: u64,
    /// User that added it.
    pub owner_uid: u32,
    /// Group that added it.
    pub owner_gid: u32,
    /// Zero.
    pub reserved1: u64,
    /// Zero.
    pub reserved2: u64,
}

/// State of a device (`UBLK_S_DEV_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DevState {
    /// Added, not started, or stopped.
    Dead,
    /// /dev/ublkbN is there and served.
    Live,
    /// Its server ended; requests wait for a new one.
    Quiesced,
    /// Its server ended; requests fail until there is a new one (Linux 6.13, not asked for here).
    FailIo,
    /// A kernel that knows more.
    Unknown(u16),
}

impl DevInfo {
    /// `state`.
    pub fn dev_state(&self) -> DevState {
        match u32::from(self.state) {
            sys::UBLK_S_DEV_DEAD => DevState::Dead,
            sys::UBLK_S_DEV_LIVE => DevState::Live,
            sys::UBLK_S_DEV_QUIESCED => DevState::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => DevState::FailIo,
            _ => DevState::Unknown(self.state),
        }
    }
}

/// `struct ublk_param_basic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct ParamBasic {
    /// `UBLK_ATTR_*`.
    pub attrs: u32,
    /// log2 of the logical block, bytes: 9..=12.
    pub logical_bs_shift: u8,
    /// log2 of the physical block, bytes.
    pub physical_bs_shift: u8,
    /// log2 of the optimal I/O size, bytes.
    pub io_opt_shift: u8,
    /// log2 of the smallest efficient I/O, bytes.
    pub io_min_shift: u8,
    /// Largest request, 512-byte units.
    pub max_sectors: u32,
    /// Requests do not cross multiples of this, 512-byte units; 0: no such limit.
    pub chunk_sectors: u32,
    /// Size, 512-byte units.
    pub dev_sectors: u64,
    /// Gaps between segments must lie on multiples of this plus 1; 0: anywhere.
    pub virt_boundary_mask: u64,
}

/// `struct ublk_param_discard`, limits of discard and write-zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct ParamDiscard {
    /// Offset of the first granule, bytes.
    pub discard_alignment: u32,
    /// Bytes; never 0.
    pub discard_granularity: u32,
    /// 512-byte units; 0: no discard.
    pub max_discard_sectors: u32,
    /// 512-byte units; 0: no write-zeroes.
    pub max_write_zeroes_sectors: u32,
    /// 1.
    pub max_discard_segments: u16,
    /// Zero.
    pub reserved0: u16,
}

/// `struct ublk_params` as far as this crate sets it; `len` tells the kernel so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Params {
    /// Bytes of this structure.
    pub len: u32,
    /// `UBLK_PARAM_TYPE_*` that are valid.
    pub types: u32,
    /// `UBLK_PARAM_TYPE_BASIC`
    pub basic: ParamBasic,
    /// `UBLK_PARAM_TYPE_DISCARD`
    pub discard: ParamDiscard,
    /// Zero: where the kernel's structure goes on.
    pub pad: u32,
}

/// `struct ublksrv_io_desc`: a request, written by the kernel before its FETCH command ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(crate) struct IoDesc {
    /// `UBLK_IO_OP_*` in bits 0..8, `UBLK_IO_F_*` above.
    pub op_flags: u32,
    /// 512-byte units.
    pub nr_sectors: u32,
    /// 512-byte units.
    pub start_sector: u64,
    /// The buffer given with FETCH.
    pub addr: u64,
}

/// `struct ublksrv_io_cmd`: what FETCH and COMMIT carry.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(crate) struct IoCmd {
    pub q_id: u16,
    pub tag: u16,
    /// COMMIT: bytes of a read or write, 0 of others, or -errno.
    pub result: i32,
    /// Buffer of the tag's next request; 0 with user copy.
    pub addr: u64,
}

/// Position of byte 0 of a request's data in /dev/ublkcN (`UBLK_F_USER_COPY`).
pub(crate) fn data_position(queue: u16, tag: u16) -> u64 {
    u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
        + (u64::from(queue) << sys::UBLK_QID_OFF)
        + (u64::from(tag) << sys::UBLK_TAG_OFF)
}

/// Position and length of the descriptors of `queue` in /dev/ublkcN, for mmap(2).
pub(crate) fn descriptors(queue: u16, depth: u16) -> (u64, usize) {
    let page = iobuf::PAGE_SIZE;
    let largest = (usize::from(MAX_QUEUE_DEPTH) * size_of::<IoDesc>()).next_multiple_of(page);
    let position = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(queue) * largest as u64;
    (position, (usize::from(depth) * size_of::<IoDesc>()).next_multiple_of(page))
}

macro_rules! same_layout {
    ($ours:ty, $kernel:ty, $($field:ident),*) => {
        const _: () = {
            $(assert!(offset_of!($ours, $field) == offset_of!($kernel, $field));)*
        };
    };
}
same_layout!(CtrlCmd, sys::ublksrv_ctrl_cmd, dev_id, queue_id, len, addr, data, dev_path_len);
same_layout!(
    DevInfo,
    sys::ublksrv_ctrl_dev_info,
    nr_hw_queues,
    queue_depth,
    state,
    max_io_buf_bytes,
    dev_id,
    ublksrv_pid,
    flags,
    ublksrv_flags,
    owner_uid,
    owner_gid
);
same_layout!(Params, sys::ublk_params, len, types, basic, discard);
same_layout!(
    ParamBasic,
    sys::ublk_param_basic,
    attrs,
    logical_bs_shift,
    physical_bs_shift,
    io_opt_shift,
    io_min_shift,
    max_sectors,
    chunk_sectors,
    dev_sectors,
    virt_boundary_mask
);
same_layout!(
    ParamDiscard,
    sys::ublk_param_discard,
    discard_alignment,
    discard_granularity,
    max_discard_sectors,
    max_write_zeroes_sectors,
    max_discard_segments
);
same_layout!(IoDesc, sys::ublksrv_io_desc, op_flags, start_sector, addr);
same_layout!(IoCmd, sys::ublksrv_io_cmd, q_id, tag, result);
const _: () = assert!(size_of::<CtrlCmd>() == size_of::<sys::ublksrv_ctrl_cmd>());
const _: () = assert!(size_of::<DevInfo>() == size_of::<sys::ublksrv_ctrl_dev_info>());
const _: () = assert!(size_of::<ParamBasic>() == size_of::<sys::ublk_param_basic>());
const _: () = assert!(size_of::<ParamDiscard>() == size_of::<sys::ublk_param_discard>());
const _: () = assert!(size_of::<IoDesc>() == size_of::<sys::ublksrv_io_desc>());
const _: () = assert!(size_of::<IoCmd>() == size_of::<sys::ublksrv_io_cmd>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_the_kernels() {
        // ublk_cmd.h: 25 bits of offset, then 16 of the tag, then the queue, from 0x80000000 on.
        assert_eq!(data_position(0, 0), 0x8000_0000);
        assert_eq!(data_position(0, 1), 0x8000_0000 + (1 << 25));
        assert_eq!(data_position(2, 3), 0x8000_0000 + (2 << 41) + (3 << 25));
        // ublk_drv.c, ublk_ch_mmap: every queue has room for the deepest one.
        assert_eq!(descriptors(0, 1), (0, 4096));
        assert_eq!(descriptors(1, 128), (98304, 4096));
        assert_eq!(descriptors(3, 4096), (3 * 98304, 98304));
    }

    #[test]
    fn states_have_names() {
        let state = |n| DevInfo { state: n, ..DevInfo::default() }.dev_state();
        assert_eq!(state(0), DevState::Dead);
        assert_eq!(state(1), DevState::Live);
        assert_eq!(state(2), DevState::Quiesced);
        assert_eq!(state(77), DevState::Unknown(77));
    }
}

//! Which work requests answer a request (`rtrs-srv.c`, `rdma_write_sg`, `send_io_resp_imm`).
//!
//! The client orders by queue pair alone: data first, then SEND_WITH_INV, then the immediate, all on the con that
//! the request came in on. Rules that [`plan`] keeps, each fatal to a kernel client if broken:
//! - type 2 immediate if and only if a SEND_WITH_INV goes before it;
//! - with rotating keys the immediate always rides on a SEND of [`MsgRkeyRsp`], never on an RDMA WRITE;
//! - data only on success, and then all of the descriptor;
//! - exactly one immediate.

use crate::errno::Errno;
use crate::imm::io_rsp;
use crate::request::{Direction, Refused, Request};
use crate::wire::{MsgRkeyRsp, SgDesc, msg_type};

/// What the server announced in CONN_RSP about the rkeys of its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// They stay until the path ends.
    Static,
    /// Each response brings the next one ([`crate::wire::MSG_NEW_RKEY_F`]).
    Rotating,
}

/// How reads are answered. All of these are understood by every client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadStyle {
    /// Data and immediate in a single message where keys are static: fastest for the server; a client that asked for
    /// an invalidation does it itself.
    OneMessage,
    /// Data, SEND_WITH_INV, immediate for a client that asked for an invalidation: what the kernel server does. For
    /// others as [`ReadStyle::OneMessage`], because they look at the immediate alone either way.
    Invalidate,
}

/// What a server decided for a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// As announced.
    pub keys: Keys,
    /// Free choice, at any time.
    pub reads: ReadStyle,
}

/// How the final immediate travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// RDMA WRITE_WITH_IMM of length 0; remote address and rkey mean nothing.
    WriteImm,
    /// RDMA WRITE_WITH_IMM that carries [`Reply::data`]; there is no separate data message then.
    WriteDataImm,
    /// SEND_WITH_IMM of a [`MsgRkeyRsp`], see [`Reply::rkey_rsp`].
    SendRkeyImm,
}

/// What to post, in this order: RDMA WRITE of `data` (unless `last` carries it), SEND_WITH_INV of `inval`, `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Reply {
    /// Write this many bytes from the start of the chunk to there.
    pub data: Option<SgDesc>,
    /// Zero-length SEND_WITH_INV of this key of the client.
    pub inval: Option<u32>,
    /// The final message.
    pub last: Last,
    /// Its immediate, in host order.
    pub imm: u32,
}

impl Reply {
    /// Work requests that this takes, 1..=3.
    pub const fn wr_count(&self) -> usize {
        let data = self.data.is_some() && !matches!(self.last, Last::WriteDataImm);
        1 + data as usize + self.inval.is_some() as usize
    }

    /// The message for [`Last::SendRkeyImm`]: chunk `id` has key `rkey` from now on.
    pub fn rkey_rsp(id: u16, rkey: u32) -> MsgRkeyRsp {
        MsgRkeyRsp { msg_type: msg_type::RKEY_RSP.into(), buf_id: id.into(), rkey: rkey.into() }
    }
}

/// Plans the answer to `request`.
pub const fn plan(policy: Policy, request: &Request, result: Result<(), Errno>) -> Reply {
    let errno = match result {
        Ok(()) => None,
        Err(errno) => Some(errno),
    };
    let data = match request.direction {
        Direction::Read { desc, .. } if errno.is_none() => desc,
        _ => None,
    };
    reply(policy, request.id, data, request.direction.inval_key(), errno)
}

/// Plans the answer to a request that was refused with `errno` (see [`Refused::action`]).
pub const fn plan_refusal(policy: Policy, id: u16, refused: &Refused, errno: Errno) -> Reply {
    reply(policy, id, None, refused.inval_key, Some(errno))
}

const fn reply(
    policy: Policy,
    id: u16,
    data: Option<SgDesc>,
    wanted: Option<u32>,
    errno: Option<Errno>,
) -> Reply {
    let inval = match policy.reads {
        ReadStyle::Invalidate => wanted,
        ReadStyle::OneMessage => None,
    };
    let last = match policy.keys {
        Keys::Rotating => Last::SendRkeyImm,
        Keys::Static if data.is_some() && inval.is_none() => Last::WriteDataImm,
        Keys::Static => Last::WriteImm,
    };
    Reply { data, inval, last, imm: io_rsp(id as u32, errno, inval.is_some()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Problem;

    const DESC: SgDesc = SgDesc::new(0x1000, 0x77, 4096);

    fn request(direction: Direction) -> Request {
        Request { id: 5, direction, data_len: 4096, usr_len: 32 }
    }

    fn read(need_inval: bool) -> Request {
        request(Direction::Read { desc: Some(DESC), need_inval })
    }

    fn policy(keys: Keys, reads: ReadStyle) -> Policy {
        Policy { keys, reads }
    }

    #[test]
    fn kernel_style_static_keys() {
        let p = policy(Keys::Static, ReadStyle::Invalidate);
        let (last, one) = (Last::WriteImm, Last::WriteDataImm);
        let eio = Err(Errno::EIO);
        let table = [
            (read(true), Ok(()), Reply { data: Some(DESC), inval: Some(0x77), last, imm: 0x2000_0005 }),
            (read(false), Ok(()), Reply { data: Some(DESC), inval: None, last: one, imm: 0x1000_0005 }),
            (read(true), eio, Reply { data: None, inval: Some(0x77), last, imm: 0x2028_0005 }),
            (read(false), eio, Reply { data: None, inval: None, last, imm: 0x1028_0005 }),
            (request(Direction::Write), Ok(()), Reply { data: None, inval: None, last, imm: 0x1000_0005 }),
            (request(Direction::Write), eio, Reply { data: None, inval: None, last, imm: 0x1028_0005 }),
        ];
        for (request, result, want) in table {
            assert_eq!(plan(p, &request, result), want, "{request} {result:?}");
        }
    }

    #[test]
    fn flush_is_answered_without_data_or_invalidation() {
        let flush = request(Direction::Read { desc: None, need_inval: false });
        let r = plan(policy(Keys::Static, ReadStyle::Invalidate), &flush, Ok(()));
        assert_eq!((r.data, r.inval, r.imm, r.wr_count()), (None, None, 0x1000_0005, 1));
    }

    #[test]
    fn one_message_reads() {
        let p = policy(Keys::Static, ReadStyle::OneMessage);
        let r = plan(p, &read(true), Ok(()));
        assert_eq!(r, Reply { data: Some(DESC), inval: None, last: Last::WriteDataImm, imm: 0x1000_0005 });
        assert_eq!(r.wr_count(), 1);
        let failed = plan(p, &read(true), Err(Errno::EIO));
        assert_eq!((failed.data, failed.last, failed.imm), (None, Last::WriteImm, 0x1028_0005));
    }

    #[test]
    fn refusals_invalidate_when_asked_to() {
        let refused = Refused { problem: Problem::SgCnt(2), inval_key: Some(9) };
        let r = plan_refusal(policy(Keys::Rotating, ReadStyle::Invalidate), 0, &refused, Errno::EINVAL);
        assert_eq!((r.inval, r.last, r.imm), (Some(9), Last::SendRkeyImm, 0x20b0_0000));
    }

    /// The rules of the module's head, over every combination.
    #[test]
    fn rules_hold_for_every_combination() {
        let directions = [
            Direction::Write,
            Direction::Read { desc: None, need_inval: false },
            Direction::Read { desc: Some(DESC), need_inval: false },
            Direction::Read { desc: Some(DESC), need_inval: true },
        ];
        for keys in [Keys::Static, Keys::Rotating] {
            for reads in [ReadStyle::OneMessage, ReadStyle::Invalidate] {
                for direction in directions {
                    for result in [Ok(()), Err(Errno::EIO)] {
                        let r = plan(policy(keys, reads), &request(direction), result);
                        assert_eq!(r.imm >> 28 == 2, r.inval.is_some());
                        assert_eq!(keys == Keys::Rotating, r.last == Last::SendRkeyImm);
                        assert!(r.data.is_none() || result.is_ok());
                        assert!(r.last != Last::WriteDataImm || r.data.is_some());
                        assert!((1..=3).contains(&r.wr_count()));
                        assert_eq!(r.imm & 0x7ffff, 5);
                    }
                }
            }
        }
    }
}

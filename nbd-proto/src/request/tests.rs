//! Every rule of the table, and the edges of ranges.

use super::*;
use crate::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};

const ALL: TransmissionFlags = TransmissionFlags(0b1101_0111_1101);
const SIMPLE: Agreed = Agreed { framing: Framing::Simple, allocation: false };
const EXTENDED: Agreed = Agreed { framing: Framing::Extended, allocation: true };
const EXPORT: Export =
    Export { size: 1 << 20, block_size: 512, any_range: false, max_payload: 65536, flags: ALL };

fn head(command: u16, flags: u16, offset: u64, length: u64) -> Head {
    Head { magic: REQUEST_MAGIC, flags, command, cookie: 7, offset, length }
}

fn check(export: Export, command: u16, flags: u16, offset: u64, length: u64) -> Result<Request, ErrorCode> {
    check_as(export, SIMPLE, command, flags, offset, length)
}

fn check_as(
    export: Export,
    agreed: Agreed,
    command: u16,
    flags: u16,
    offset: u64,
    length: u64,
) -> Result<Request, ErrorCode> {
    Request::check(&head(command, flags, offset, length), &export, &agreed).map_err(|r| {
        assert_eq!((r.cookie, r.offset), (7, offset));
        r.error
    })
}

#[test]
fn every_command_and_its_flags() {
    let fua = cmd_flag::FUA;
    let zeroes = |fua, no_hole, fast| Command::WriteZeroes { fua, no_hole, fast };
    let cases = [
        (cmd::READ, 0, Command::Read),
        (cmd::READ, fua, Command::Read),
        (cmd::WRITE, 0, Command::Write { fua: false }),
        (cmd::WRITE, fua, Command::Write { fua: true }),
        (cmd::TRIM, fua, Command::Trim { fua: true }),
        (cmd::CACHE, 0, Command::Cache),
        (cmd::WRITE_ZEROES, 0, zeroes(false, false, false)),
        (cmd::WRITE_ZEROES, fua | cmd_flag::NO_HOLE, zeroes(true, true, false)),
        (cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, zeroes(false, false, true)),
    ];
    for (command, flags, wanted) in cases {
        let request = check(EXPORT, command, flags, 512, 1024).unwrap();
        assert_eq!((request.command(), request.offset(), request.len()), (wanted, 512, 1024));
        assert_eq!(request.payload_len(), if command == cmd::WRITE { 1024 } else { 0 });
    }
    assert_eq!(check(EXPORT, cmd::FLUSH, 0, 0, 0).unwrap().command(), Command::Flush);
}

#[test]
fn any_range_is_covered_by_whole_blocks() {
    let any = Export { any_range: true, ..EXPORT };
    let cover = |offset, len| check(any, cmd::READ, 0, offset, len).unwrap().cover(512);
    for (offset, len, from, to, before) in [
        (0, 1, 0, 512, 0),
        (511, 1, 0, 512, 511),
        (511, 2, 0, 1024, 511),
        (512, 512, 512, 1024, 0),
        (513, 1022, 512, 1536, 1),
        ((1 << 20) - 1, 1, (1 << 20) - 512, 1 << 20, 511),
    ] {
        assert_eq!(cover(offset, len), Cover { offset: from, len: to - from, before }, "{len} at {offset}");
    }
    assert_eq!(check(any, cmd::WRITE, 0, (1 << 20) - 1, 2), Err(ErrorCode::Enospc));
    assert_eq!(check(any, cmd::READ, 0, 7, 0), Err(ErrorCode::Einval));
}

#[test]
fn unknown_commands_and_flags_are_einval() {
    let einval = Err(ErrorCode::Einval);
    for command in [cmd::BLOCK_STATUS, 8, 9, 0xffff] {
        assert_eq!(check(EXPORT, command, 0, 0, 512), einval);
    }
    for (command, flag) in [
        (cmd::READ, cmd_flag::DF),
        (cmd::READ, 1 << 15),
        (cmd::WRITE, cmd_flag::NO_HOLE),
        (cmd::WRITE_ZEROES, cmd_flag::REQ_ONE),
    ] {
        assert_eq!(check(EXPORT, command, flag, 0, 512), einval, "{command} {flag}");
    }
}

#[test]
fn what_was_not_offered_is_einval() {
    let plain = Export { flags: TransmissionFlags::HAS_FLAGS, ..EXPORT };
    let einval = Err(ErrorCode::Einval);
    assert!(check(plain, cmd::WRITE, 0, 0, 512).is_ok());
    assert_eq!(check(plain, cmd::WRITE, cmd_flag::FUA, 0, 512), einval);
    for command in [cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
        assert_eq!(check(plain, command, 0, 0, 512), einval);
    }
    assert_eq!(check(plain, cmd::FLUSH, 0, 0, 0), einval);
    let slow = Export { flags: TransmissionFlags::SEND_WRITE_ZEROES, ..EXPORT };
    assert_eq!(check(slow, cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 512), einval);
}

#[test]
fn changes_of_a_read_only_export_are_eperm() {
    let ro = Export { flags: ALL | TransmissionFlags::READ_ONLY, ..EXPORT };
    let poor = Export { flags: TransmissionFlags::READ_ONLY, ..EXPORT };
    for command in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
        assert_eq!(check(ro, command, 0, 0, 512), Err(ErrorCode::Eperm));
        assert_eq!(check(poor, command, 0, 0, 512), Err(ErrorCode::Eperm), "not offered, all the same");
    }
    assert!(check(ro, cmd::READ, 0, 0, 512).is_ok() && check(ro, cmd::FLUSH, 0, 0, 0).is_ok());
}

#[test]
fn ranges_are_whole_blocks_inside() {
    let end = EXPORT.size;
    assert!(check(EXPORT, cmd::READ, 0, end - 512, 512).is_ok());
    for (command, error) in [
        (cmd::READ, ErrorCode::Einval),
        (cmd::TRIM, ErrorCode::Einval),
        (cmd::WRITE, ErrorCode::Enospc),
        (cmd::WRITE_ZEROES, ErrorCode::Enospc),
    ] {
        for (offset, len) in [(end - 512, 1024), (end, 512), (u64::MAX - 511, 512), (!511, 0xffff_fe00)] {
            assert_eq!(check(EXPORT, command, 0, offset, len), Err(error), "{command} {offset}+{len}");
        }
    }
    for (offset, len) in [(0, 0), (1, 512), (0, 511), (256, 256)] {
        assert_eq!(check(EXPORT, cmd::READ, 0, offset, len), Err(ErrorCode::Einval));
    }
    assert_eq!(check(EXPORT, cmd::FLUSH, 0, 512, 0), Err(ErrorCode::Einval));
    assert_eq!(check(EXPORT, cmd::FLUSH, 0, 0, 512), Err(ErrorCode::Einval));
}

#[test]
fn only_data_is_limited_by_the_payload() {
    assert!(check(EXPORT, cmd::READ, 0, 0, 65536).is_ok());
    assert_eq!(check(EXPORT, cmd::READ, 0, 0, 65536 + 512), Err(ErrorCode::Einval));
    assert!(check(EXPORT, cmd::WRITE_ZEROES, 0, 0, 1 << 20).is_ok());
    assert!(check(EXPORT, cmd::TRIM, 0, 0, 1 << 20).is_ok());
    let whole = Export { flags: ALL | TransmissionFlags::SEND_DF, ..EXPORT };
    assert!(check(whole, cmd::READ, cmd_flag::DF, 0, 65536).is_ok());
    assert_eq!(check(whole, cmd::READ, cmd_flag::DF, 0, 65536 + 512), Err(ErrorCode::Eoverflow));
}

#[test]
fn block_status_needs_a_context() {
    let einval = Err(ErrorCode::Einval);
    let structured = Agreed { framing: Framing::Structured, allocation: true };
    let check = |agreed, flags, offset, len| check_as(EXPORT, agreed, cmd::BLOCK_STATUS, flags, offset, len);
    for one in [false, true] {
        let flags = if one { cmd_flag::REQ_ONE } else { 0 };
        let request = check(structured, flags, 512, 1 << 19).unwrap();
        assert_eq!((request.command(), request.payload_len()), (Command::BlockStatus { one }, 0));
    }
    assert_eq!(check(Agreed { allocation: false, ..structured }, 0, 0, 512), einval);
    assert_eq!(check(structured, cmd_flag::DF, 0, 512), einval);
    assert_eq!(check(structured, 0, 0, 0), einval);
    assert_eq!(check(structured, 0, 512, 1 << 20), einval);
    assert_eq!(check(EXTENDED, cmd_flag::PAYLOAD_LEN, 0, 12), einval, "not offered");
}

#[test]
fn extended_lengths_have_64_bits() {
    let huge = Export { size: 1 << 50, ..EXPORT };
    for command in [cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE, cmd::BLOCK_STATUS] {
        let request = check_as(huge, EXTENDED, command, 0, 512, 1 << 49).unwrap();
        assert_eq!((request.offset(), request.len(), request.data_len()), (512, 1 << 49, 0));
    }
    assert_eq!(check_as(huge, EXTENDED, cmd::READ, 0, 0, 1 << 32), Err(ErrorCode::Einval));
    assert_eq!(check_as(huge, EXTENDED, cmd::TRIM, 0, 512, u64::MAX - 511), Err(ErrorCode::Einval));
}

#[test]
fn only_extended_writes_may_flag_their_payload() {
    let flag = cmd_flag::PAYLOAD_LEN;
    assert!(check_as(EXPORT, EXTENDED, cmd::WRITE, flag, 0, 512).is_ok());
    assert!(check_as(EXPORT, EXTENDED, cmd::WRITE, 0, 0, 512).is_ok(), "as QEMU's client sends it");
    for command in [cmd::READ, cmd::TRIM, cmd::FLUSH, cmd::WRITE_ZEROES, cmd::CACHE] {
        assert_eq!(check_as(EXPORT, EXTENDED, command, flag, 0, 512), Err(ErrorCode::Einval));
    }
    assert_eq!(check(EXPORT, cmd::WRITE, flag, 0, 512), Err(ErrorCode::Einval), "a compact request");
}

#[test]
fn a_payload_names_contexts_once() {
    let export = Export { flags: ALL | TransmissionFlags::BLOCK_STATUS_PAYLOAD, ..EXPORT };
    let ask = |payload: &[u8]| {
        let flags = cmd_flag::PAYLOAD_LEN | cmd_flag::REQ_ONE;
        let head = Head { magic: EXTENDED_REQUEST_MAGIC, ..head(cmd::BLOCK_STATUS, flags, 512, 12) };
        assert!(names_contexts(&head, &export, &EXTENDED));
        Request::check_status(&head, payload, &export, &EXTENDED).map_err(|r| r.error)
    };
    let len = 1024u64.to_be_bytes();
    let id = ALLOCATION_CONTEXT.to_be_bytes();
    let request = ask(&[len.as_slice(), &id].concat()).unwrap();
    assert_eq!((request.offset(), request.len()), (512, 1024));
    assert_eq!(request.command(), Command::BlockStatus { one: true });
    for bad in [
        vec![],
        len[1..].to_vec(),
        len.to_vec(),
        [len.as_slice(), &id, &id].concat(),
        [len.as_slice(), &id, &[0]].concat(),
        [len.as_slice(), &[0, 0, 0, 2]].concat(),
        [len.as_slice(), &id, &[0, 0, 0, 2]].concat(),
        [0u64.to_be_bytes().as_slice(), &id].concat(),
        [u64::MAX.to_be_bytes().as_slice(), &id].concat(),
    ] {
        assert_eq!(ask(&bad), Err(ErrorCode::Einval), "{bad:?}");
    }
}

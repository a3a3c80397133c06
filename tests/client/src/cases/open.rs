//! SESS_INFO, OPEN and CLOSE (`rnbd-srv.c`, `process_msg_open`).

use rnbd_proto::wire::{MsgClose, MsgOpen, MsgSessInfo};
use zerocopy::IntoBytes;

use crate::frame::Frame;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("rnbd_unknown_types", "RNBD message types that no client sends", INVAL, |cx| {
        let mut client = cx.connect()?;
        let mut last = Outcome::Ok;
        for kind in [1u16, 3, 6, 7, 0x100, u16::MAX] {
            let usr = [&kind.to_le_bytes()[..], &[0; 62]].concat();
            last = client.call_write(0, &[], &usr)?;
            expect(&format!("type {kind}"), last, Outcome::Errno(Errno::EINVAL))?;
        }
        Ok(last)
    }),
    case("sess_info_short", "SESS_INFO without its last byte", INVAL, |cx| {
        short(cx, MsgSessInfo::request().as_bytes())
    }),
    case("open_short", "OPEN without its last byte", INVAL, |cx| short(cx, open(b"m512", 1).as_bytes())),
    case("close_short", "CLOSE without its last byte", INVAL, |cx| {
        short(cx, MsgClose::request(0).as_bytes())
    }),
    case("sess_info_versions", "SESS_INFO of versions 0, 1, 2 and 255", OK, |cx| {
        let mut client = cx.connect()?;
        for ver in [0, 1, 255, 2] {
            let msg = MsgSessInfo { ver, ..MsgSessInfo::request() };
            let rsp = client.call_read(0, msg.as_bytes(), 36)?;
            ensure(rsp[4] == ver.min(2), "the answer is not the lower version")?;
        }
        Ok(Outcome::Ok)
    }),
    case("sess_info_no_room", "SESS_INFO as a write, so without room for its answer", INVAL, |cx| {
        Ok(cx.connect()?.call_write(0, &[], MsgSessInfo::request().as_bytes())?)
    }),
    case("open_no_room", "OPEN as a write, so without room for its answer", INVAL, |cx| {
        Ok(cx.connect()?.call_write(0, &[], open(b"m512", 1).as_bytes())?)
    }),
    case("open_little_room", "OPEN with one byte too few of room for its answer", INVAL, |cx| {
        called(cx.connect()?.call_read(0, open(b"m512", 0).as_bytes(), 55))
    }),
    case("open_much_room", "OPEN with more room than its answer needs", OK, |cx| {
        let rsp = cx.connect()?.call_read(0, open(b"m512", 0).as_bytes(), 512)?;
        ensure(rsp[56..].iter().all(|b| *b == 0), "what lies behind the answer was sent too")?;
        Ok(Outcome::Ok)
    }),
    case("open_unterminated", "a device name without NUL", INVAL, |cx| {
        called(cx.connect()?.open_raw(MsgOpen { dev_name: [b'm'; 255], ..open(b"", 1) }.as_bytes()))
    }),
    case("open_empty", "an empty device name", INVAL, |cx| named(cx, b"")),
    case("open_dot_dot", "'..' in the device name", INVAL, |cx| named(cx, b"../m512")),
    case("open_dot_dot_inside", "'..' within a word of the device name", INVAL, |cx| named(cx, b"m5..12")),
    case("open_not_utf8", "a device name that is no UTF-8", INVAL, |cx| named(cx, b"m\xff\xfe")),
    case("open_missing", "a device that does not exist", NOENT, |cx| named(cx, b"nothing")),
    case("open_longest", "a device name of 254 bytes", NOENT, |cx| named(cx, &[b'm'; 254])),
    case(
        "open_slash",
        "the search path itself",
        &[Outcome::Errno(Errno::ENOENT), Outcome::Errno(Errno::EINVAL)],
        |cx| named(cx, b"/"),
    ),
    case("open_file", "a file of the server that was not exported", NOENT, |cx| named(cx, b"/etc/passwd")),
    case("open_mode_3", "an unknown access mode", INVAL, |cx| called(cx.connect()?.open("m512", 3))),
    case("open_mode_255", "access mode 255", INVAL, |cx| called(cx.connect()?.open("m512", 255))),
    case("open_rw_twice", "read-write while another session has it read-write", PERM, |cx| {
        let (_first, _) = cx.opened("m512", 1)?;
        called(cx.connect_with(second(cx))?.open("m512", 1))
    }),
    case("open_rw_of_witness", "the bystander's device, read-write", PERM, |cx| {
        called(cx.connect()?.open("witness", 1))
    }),
    case("open_migration_third", "a third writer, in migration mode", PERM, |cx| {
        let (_first, _) = cx.opened("m512", 1)?;
        let mut second = cx.connect_with(second(cx))?;
        second.open("m512", 2)?;
        called(cx.connect_with(Opts { sessname: b"third".into(), ..cx.opts("third") })?.open("m512", 2))
    }),
    case("open_ro_beside_rw", "read-only while another session has it read-write", OK, |cx| {
        let (_first, _) = cx.opened("m512", 1)?;
        let mut second = cx.connect_with(second(cx))?;
        let device = second.open("m512", 0)?.device_id.get();
        second.read(device, 0, 4096)?;
        Ok(Outcome::Ok)
    }),
    case("open_again", "the same device again: the same id, and still read-only", ROFS, |cx| {
        let (mut client, first) = cx.opened("m512", 0)?;
        let again = client.open("m512", 1)?.device_id.get();
        ensure(first == again, "another id")?;
        Ok(client.write(again, 0, &[0; 512], Flags::empty())?)
    }),
    case("open_alias", "the same device by another name, read-write", PERM, |cx| {
        let (mut client, _) = cx.opened("m512", 1)?;
        called(client.open("//m512", 1))
    }),
    case("open_and_go", "twenty OPENs without waiting, then gone", OK, |cx| {
        let mut client = cx.connect()?;
        for id in 0..20 {
            let frame = client.read_frame(0, id, open(b"m512", 0).as_bytes(), 56)?;
            client.send(0, id, &frame)?;
        }
        drop(client);
        // The device is free again as soon as the session is gone, however far the OPENs had come.
        let mut next = cx.connect_with(second(cx))?;
        next.open("m512", 1)?;
        Ok(Outcome::Ok)
    }),
    case("open_aliases", "one device by two hundred names, each used", OK, |cx| {
        let mut client = cx.connect()?;
        for slashes in 0..200 {
            let name = "/".repeat(slashes) + "m512";
            let device = client.open(&name, 0)?.device_id.get();
            client.read(device, 0, 512)?;
        }
        Ok(Outcome::Ok)
    }),
    case("open_close_many", "a hundred times opened, used and closed", OK, |cx| {
        let mut client = cx.connect()?;
        for round in 0..100u64 {
            let device = client.open("m512", 1)?.device_id.get();
            expect("write", client.write(device, round, &[round as u8; 512], Flags::empty())?, Outcome::Ok)?;
            expect("close", client.close(device)?, Outcome::Ok)?;
            expect("after close", client.flush(device)?, Outcome::Errno(Errno::ENOTCONN))?;
        }
        Ok(Outcome::Ok)
    }),
    case("close_unknown", "CLOSE of ids that nobody has", OK, |cx| {
        let mut client = cx.connect()?;
        for device in [0, 1, 0xffff, 0x1_0000, u32::MAX] {
            expect("close", client.close(device)?, Outcome::Ok)?;
        }
        Ok(Outcome::Ok)
    }),
    case("close_twice", "CLOSE twice", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        expect("first", client.close(device)?, Outcome::Ok)?;
        Ok(client.close(device)?)
    }),
    case("close_of_stranger", "CLOSE of the bystander's id", OK, |cx| Ok(cx.connect()?.close(cx.witness)?)),
    case("close_as_read", "CLOSE with a descriptor", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        called(client.call_read(0, MsgClose::request(device).as_bytes(), 512))
    }),
    case("close_while_busy", "CLOSE while a write is executed, and I/O behind it", NOTCONN, |cx| {
        let (mut client, device) = cx.opened("slow", 1)?;
        let con = client.io_con();
        client.send(con, 6, &Frame::write(&[3; 512], write_msg(device, 0, 512).as_bytes()))?;
        client.pump_for(cx.place.delay() / 4);
        client.send(0, 7, &Frame::write(&[], MsgClose::request(device).as_bytes()))?;
        client.pump_for(cx.place.delay() / 4);
        let after = client.call(con, 8, &Frame::write(&[4; 512], write_msg(device, 0, 512).as_bytes()))?;
        expect("the write", client.wait_reply(6, cx.place.timeout()), Outcome::Ok)?;
        expect("the close", client.wait_reply(7, cx.place.timeout()), Outcome::Ok)?;
        Ok(after)
    }),
    case("close_then_io", "I/O after CLOSE", NOTCONN, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        expect("close", client.close(device)?, Outcome::Ok)?;
        still_serves(&mut client, device)
    }),
    case("close_releases", "CLOSE lets the next writer in", OK, |cx| {
        let (mut first, device) = cx.opened("m512", 1)?;
        expect("close", first.close(device)?, Outcome::Ok)?;
        called(cx.connect_with(second(cx))?.open("m512", 1))
    }),
];

fn open(name: &[u8], mode: u8) -> MsgOpen {
    MsgOpen::request(mode, name).expect("names in this table have at most 254 bytes and no NUL")
}

fn named(cx: &Ctx<'_>, name: &[u8]) -> Ran {
    called(cx.connect()?.open_raw(open(name, 1).as_bytes()))
}

fn second(cx: &Ctx<'_>) -> Opts {
    cx.opts("second")
}

/// A message without its last byte.
fn short(cx: &Ctx<'_>, msg: &[u8]) -> Ran {
    let mut client = cx.connect()?;
    called(client.call_read(0, &msg[..msg.len() - 1], 64))
}

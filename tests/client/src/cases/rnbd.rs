//! I/O messages (`rnbd-srv.c`, `process_rdma`; here everything is checked, see `rnbd_proto::io`).

use zerocopy::IntoBytes;

use crate::frame::Frame;

use super::*;

/// Buffer id where it matters.
const ID: u16 = 9;

pub(super) const CASES: &[Case] = &[
    case("io_unknown_device", "a device id that nobody has", NOTCONN, |cx| {
        let mut client = cx.connect()?;
        called(client.read(77, 0, 512))
    }),
    case(
        "io_ids_of_others",
        "ids next to the own one, and the bystander's with another generation",
        NOTCONN,
        |cx| {
            let (mut client, device) = cx.opened("m512", 1)?;
            let mut last = Outcome::Ok;
            for id in [device + 1, device ^ 0x1_0000, device | 0xffff, u32::MAX, cx.witness ^ 0x8000_0000] {
                last = client.flush(id)?;
                expect(&format!("device {id:#x}"), last, Outcome::Errno(Errno::ENOTCONN))?;
            }
            Ok(last)
        },
    ),
    case("io_short", "an I/O message of 23 bytes", INVAL, |cx| {
        usr(cx, |device| flush_msg(device).as_bytes()[..23].into())
    }),
    case("io_version_1", "an I/O message of version 1, 24 bytes", OK, |cx| {
        usr(cx, |device| flush_msg(device).as_bytes()[..24].into())
    }),
    case("io_long", "an I/O message with 200 more bytes", OK, |cx| {
        usr(cx, |device| [flush_msg(device).as_bytes(), &[0xcc; 200]].concat())
    }),
    case("io_garbage_padding", "padding and priority of garbage", OK, |cx| {
        usr(cx, |device| {
            let mut msg = flush_msg(device);
            (msg.hdr.padding, msg.prio, msg.tail) = (0xffff.into(), 0xffff.into(), [0xff; 6]);
            msg.as_bytes().into()
        })
    }),
    case("io_unknown_flags", "all flag bits set", OK, |cx| {
        usr(cx, |device| {
            let mut msg = flush_msg(device);
            msg.rw = (msg.rw.get() | !0xff).into();
            msg.as_bytes().into()
        })
    }),
    case("io_unknown_ops", "operations 6 to 255", NOTSUPP, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let mut last = Outcome::Ok;
        for op in [6, 7, 9, 13, 127, 255] {
            last = client.range_op(device, Op::from_wire(op), 0, 512)?;
            expect(&format!("operation {op}"), last, Outcome::Errno(Errno::EOPNOTSUPP))?;
        }
        Ok(last)
    }),
    case("io_secure_erase", "an operation that was not announced", NOTSUPP, |cx| {
        range(cx, "m512", Op::SecureErase, 0, 4096)
    }),
    case("io_past_end", "the block behind the last", IO, |cx| {
        at_end(cx, |client, device, end| called(client.read(device, end, 512)))
    }),
    case("io_across_end", "a write that starts on the device and ends behind it", IO, |cx| {
        at_end(cx, |client, device, end| Ok(client.write(device, end - 1, &[1; 1024], Flags::empty())?))
    }),
    case("io_last_block", "the last block", OK, |cx| {
        at_end(cx, |client, device, end| called(client.read(device, end - 1, 512)))
    }),
    case("io_sector_max", "sector 2^64-1", IO, |cx| {
        at_end(cx, |client, device, _| called(client.read(device, u64::MAX, 512)))
    }),
    case("io_sector_wraps", "a range that wraps around to sector 0", IO, |cx| {
        at_end(cx, |client, device, _| Ok(client.write(device, u64::MAX - 7, &[1; 8192], Flags::empty())?))
    }),
    case("io_byte_offset_wraps", "a sector whose byte offset is 2^64", IO, |cx| {
        at_end(cx, |client, device, _| Ok(client.write(device, 1 << 55, &[1; 512], Flags::empty())?))
    }),
    case("io_discard_past_end", "a discard of 4 GiB", IO, |cx| {
        range(cx, "m512", Op::Discard, 0, 0xffff_fe00)
    }),
    case("io_discard_unaligned_4g", "a discard of 4 GiB less one byte", INVAL, |cx| {
        range(cx, "m512", Op::Discard, 0, u32::MAX)
    }),
    case("io_empty_ops", "reads, writes, discards and zeroes of nothing", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let mut last = Outcome::Ok;
        for op in [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes] {
            last = client.range_op(device, op, 0, 0)?;
            expect(&format!("{op}"), last, Outcome::Errno(Errno::EINVAL))?;
        }
        Ok(last)
    }),
    case("io_511_bytes", "a write of 511 bytes", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        Ok(client.write(device, 0, &[1; 511], Flags::empty())?)
    }),
    case("io_513_bytes", "a read of 513 bytes", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        called(client.read(device, 0, 513))
    }),
    case("io_half_block", "512 bytes of a device with blocks of 4096", INVAL, |cx| {
        let (mut client, device) = cx.opened("m4k", 1)?;
        Ok(client.write(device, 0, &[1; 512], Flags::empty())?)
    }),
    case("io_between_blocks", "a block that starts within a block", INVAL, |cx| {
        let (mut client, device) = cx.opened("m4k", 1)?;
        called(client.read(device, 1, 4096))
    }),
    case("io_discard_between_blocks", "a discard that starts within a block", INVAL, |cx| {
        range(cx, "m4k", Op::WriteZeroes, 1, 4096)
    }),
    case("io_write_little_data", "less data than bi_size", INVAL, |cx| {
        data(cx, 512, |device| write_msg(device, 0, 4096))
    }),
    case("io_write_much_data", "more data than bi_size", INVAL, |cx| {
        data(cx, 4096, |device| write_msg(device, 0, 512))
    }),
    case("io_write_no_data", "a write without its data", INVAL, |cx| range(cx, "m512", Op::Write, 0, 4096)),
    case("io_read_no_desc", "a read without a descriptor", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let con = client.io_con();
        Ok(client.call(con, ID, &Frame::read(4096, read_msg(device, 0, 4096).as_bytes(), None))?)
    }),
    case("io_read_long_desc", "a read with a longer descriptor", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        called(client.call_read(1, read_msg(device, 0, 4096).as_bytes(), 8192))
    }),
    case("io_write_as_read", "a write in read direction", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        called(client.call_read(1, write_msg(device, 0, 4096).as_bytes(), 4096))
    }),
    case("io_read_as_write", "a read in write direction", INVAL, |cx| {
        data(cx, 4096, |device| read_msg(device, 0, 4096))
    }),
    case("io_discard_as_read", "a discard in read direction", INVAL, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let msg = MsgIo::request(device, Op::Discard, Flags::SYNC, 0, 4096, 0);
        called(client.call_read(1, msg.as_bytes(), 4096))
    }),
    case("io_largest", "the largest write and read that fit", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let data: Vec<u8> = (0..client.geometry().max_io_size()).map(|i| (i % 253) as u8).collect();
        expect("write", client.write(device, 0, &data, Flags::FUA)?, Outcome::Ok)?;
        ensure(client.read(device, 0, data.len() as u32)? == data, "wrong bytes came back")?;
        Ok(Outcome::Ok)
    }),
    case("io_into_header_room", "data that reaches into the room for headers", OK, |cx| {
        // Whoever writes no more than the chunk holds is right, whatever max_io_size says.
        let (mut client, device) = cx.opened("m512", 1)?;
        let data = vec![0x42; client.geometry().max_io_size() as usize + 512];
        Ok(client.write(device, 0, &data, Flags::empty())?)
    }),
    case("io_flush_as_write", "a flush in write direction", OK, |cx| {
        range(cx, "m512", Op::Flush, u64::MAX, 0)
    }),
    case("io_flush_with_size", "a flush of 4096 bytes", INVAL, |cx| range(cx, "m512", Op::Flush, 0, 4096)),
    case("io_flush_with_data", "a flush with data", INVAL, |cx| data(cx, 512, flush_msg)),
    case("io_flush_unknown_device", "a flush of a device that nobody has", NOTCONN, |cx| {
        Ok(cx.connect()?.flush(3)?)
    }),
    case("ro_write", "a write through a read-only open", ROFS, |cx| {
        let (mut client, device) = cx.opened("m512", 0)?;
        Ok(client.write(device, 0, &[0xbb; 512], Flags::empty())?)
    }),
    case("ro_write_fua", "a FUA write through a read-only open", ROFS, |cx| {
        let (mut client, device) = cx.opened("m512", 0)?;
        Ok(client.write(device, 0, &[0xbb; 4096], Flags::FUA.with(Flags::PREFLUSH))?)
    }),
    case("ro_witness", "writes through a read-only open of the bystander's device", ROFS, |cx| {
        let (mut client, device) = cx.opened("witness", 0)?;
        let mut last = Outcome::Ok;
        for sector in 0..64 {
            last = client.write(device, sector * 8, &[0xbb; 4096], Flags::empty())?;
            expect("write", last, Outcome::Errno(Errno::EROFS))?;
        }
        Ok(last)
    }),
    case("ro_discard", "a discard through a read-only open", ROFS, |cx| ro(cx, Op::Discard)),
    case("ro_write_zeroes", "zeroes through a read-only open", ROFS, |cx| ro(cx, Op::WriteZeroes)),
    case("ro_flush", "a flush through a read-only open", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 0)?;
        still_serves(&mut client, device)
    }),
    case("io_random", "a thousand random I/O messages", OK, random),
];

fn usr(cx: &Ctx<'_>, make: impl FnOnce(u32) -> Vec<u8>) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    let con = client.io_con();
    Ok(client.call(con, ID, &Frame::read(0, &make(device), None))?)
}

fn range(cx: &Ctx<'_>, name: &str, op: Op, sector: u64, len: u32) -> Ran {
    let (mut client, device) = cx.opened(name, 1)?;
    Ok(client.range_op(device, op, sector, len)?)
}

fn ro(cx: &Ctx<'_>, op: Op) -> Ran {
    let (mut client, device) = cx.opened("m512", 0)?;
    Ok(client.range_op(device, op, 0, 4096)?)
}

fn data(cx: &Ctx<'_>, len: usize, msg: impl FnOnce(u32) -> MsgIo) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    Ok(client.call_write(1, &vec![0x99; len], msg(device).as_bytes())?)
}

fn at_end(cx: &Ctx<'_>, run: impl FnOnce(&mut Client, u32, u64) -> Ran) -> Ran {
    let mut client = cx.connect()?;
    let opened = client.open("m512", 1)?;
    run(&mut client, opened.device_id.get(), opened.nsectors.get())
}

/// Random operations, sizes and directions: every one is answered.
fn random(cx: &Ctx<'_>) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    let mut rng = Rng::new(0x10);
    for _ in 0..1000 {
        let op = Op::from_wire(rng.below(8) as u8);
        let len = [0, 1, 512, 4096, rng.below(20_000) as u32, rng.next() as u32][rng.below(6) as usize];
        let sector = [0, 8, 16_383, rng.below(20_000), rng.next()][rng.below(5) as usize];
        let id = [device, device, device, rng.next() as u32][rng.below(4) as usize];
        let mut msg = MsgIo::request(id, op, Flags::empty(), sector, len, 0);
        msg.rw = (msg.rw.get() | (rng.next() as u32) << 8).into();
        let room = [len.min(20_000), rng.below(8192) as u32][rng.below(2) as usize];
        let desc = (room > 0 && rng.below(4) > 0).then(|| client.desc(ID, room));
        let frame = match rng.below(2) {
            0 => Frame::write(&vec![0x66; room as usize], msg.as_bytes()),
            _ => Frame::read(room, msg.as_bytes(), desc),
        };
        match client.call(rng.below(2) as usize, ID, &frame)? {
            Outcome::Ok | Outcome::Errno(_) => {}
            other => return Err(format!("{other} after {msg}").into()),
        }
    }
    still_serves(&mut client, device)
}

//! The RTRS header of a request (`rtrs-srv.c`, `process_io_req`, `process_read`, `process_write`).

use rtrs_proto::wire::SgDesc;
use zerocopy::IntoBytes;

use crate::frame::Frame;

use super::*;

/// Buffer id of these requests.
const ID: u16 = 5;
/// Bytes of their data.
const LEN: u32 = 4096;

pub(super) const CASES: &[Case] = &[
    case("hdr_type_0", "type 0", CLOSED, |cx| write(cx, |f| f.msg_type = 0)),
    case("hdr_type_1", "type 1", CLOSED, |cx| write(cx, |f| f.msg_type = 1)),
    case("hdr_type_4", "type 4, a server's", CLOSED, |cx| write(cx, |f| f.msg_type = 4)),
    case("hdr_type_max", "type 65535", CLOSED, |cx| write(cx, |f| f.msg_type = u16::MAX)),
    case("hdr_usr_before_chunk", "a user message that would start before the chunk", INVAL, |cx| {
        flush(cx, |f| f.usr_len = Some(33))
    }),
    case("hdr_usr_len_max_small_off", "usr_len 65535 at a small offset", INVAL, |cx| {
        flush(cx, |f| f.usr_len = Some(u16::MAX))
    }),
    case("hdr_usr_len_huge", "a user message as long as the data, and longer than any", MSGSIZE, |cx| {
        write(cx, |f| f.usr_len = Some(4100))
    }),
    case("hdr_usr_len_513", "a user message longer than any RNBD knows", MSGSIZE, |cx| {
        write(cx, |f| f.usr_len = Some(513))
    }),
    case("hdr_usr_len_0", "no user message", INVAL, |cx| flush(cx, |f| f.usr_len = Some(0))),
    case("hdr_usr_len_1", "a user message of one byte", INVAL, |cx| flush(cx, |f| f.usr_len = Some(1))),
    case("hdr_sg_cnt_2", "two descriptors", INVAL, |cx| read(cx, |f| f.descs.push(f.descs[0]))),
    case("hdr_sg_cnt_max", "65535 descriptors announced", INVAL, |cx| {
        read(cx, |f| f.sg_cnt = Some(u16::MAX))
    }),
    case("hdr_desc_missing", "a descriptor announced behind the end of the chunk", INVAL, |cx| {
        at_chunk_end(cx, 8, 1)
    }),
    case("hdr_read_cut", "a chunk that ends within a read's header", INVAL, |cx| at_chunk_end(cx, 6, 0)),
    case("hdr_read_cut_4", "a read's header in the last 4 bytes of the chunk", INVAL, |cx| {
        at_chunk_end(cx, 4, 0)
    }),
    case("hdr_desc_len_0", "a descriptor of no bytes", INVAL, |cx| read(cx, |f| f.descs[0].len = 0.into())),
    case("hdr_desc_len_above_data", "a descriptor longer than the room for data", INVAL, |cx| {
        read(cx, |f| f.descs[0].len = (LEN + 1).into())
    }),
    case("hdr_desc_len_above_chunk", "a descriptor longer than the chunk", INVAL, |cx| {
        read(cx, |f| f.descs[0].len = (1 << 20).into())
    }),
    case("hdr_desc_len_max", "a descriptor of 4 GiB less one", INVAL, |cx| {
        read(cx, |f| f.descs[0].len = u32::MAX.into())
    }),
    case("hdr_desc_len_below_data", "a descriptor shorter than the read", INVAL, |cx| {
        read(cx, |f| f.descs[0].len = 512.into())
    }),
    case("hdr_room_to_spare", "more room than the read and its descriptor need", OK, room_to_spare),
    case("hdr_inval_without_desc", "NEED_INVAL without a descriptor", OK, |cx| flush(cx, |f| f.flags = 1)),
    case("hdr_flags_garbage", "unknown flags", OK, |cx| flush(cx, |f| f.flags = 0xfffe)),
    case(
        "hdr_inval_ordinary_key",
        "NEED_INVAL with a key that cannot be invalidated",
        OK_OR_CLOSED,
        inval_ordinary_key,
    ),
    case("hdr_desc_wrong_key", "a read into a key that does not exist", CLOSED, |cx| {
        read(cx, |f| f.descs[0].key = (f.descs[0].key.get() ^ 0x5500).into())
    }),
    case("hdr_desc_outside", "a read to an address outside of the key's memory", CLOSED, |cx| {
        read(cx, |f| f.descs[0].addr = (f.descs[0].addr.get() + (1 << 40)).into())
    }),
    case("hdr_desc_wraps", "a read to the end of the address space", CLOSED, |cx| {
        read(cx, |f| f.descs[0].addr = (u64::MAX - 7).into())
    }),
    case("hdr_random", "five hundred random headers and offsets", OK, random),
];

fn io(cx: &Ctx<'_>, make: impl FnOnce(&Client, u32) -> Frame) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    let frame = make(&client, device);
    let con = client.io_con();
    Ok(client.call(con, ID, &frame)?)
}

fn write(cx: &Ctx<'_>, lie: impl FnOnce(&mut Frame)) -> Ran {
    io(cx, |_, device| {
        let mut frame = Frame::write(&[0x77; LEN as usize], write_msg(device, 8, LEN).as_bytes());
        lie(&mut frame);
        frame
    })
}

fn read(cx: &Ctx<'_>, lie: impl FnOnce(&mut Frame)) -> Ran {
    io(cx, |client, device| {
        let desc = client.desc(ID, LEN);
        let mut frame = Frame::read(LEN, read_msg(device, 8, LEN).as_bytes(), Some(desc));
        lie(&mut frame);
        frame
    })
}

fn flush(cx: &Ctx<'_>, lie: impl FnOnce(&mut Frame)) -> Ran {
    io(cx, |_, device| {
        let mut frame = Frame::read(0, flush_msg(device).as_bytes(), None);
        lie(&mut frame);
        frame
    })
}

/// A flush whose read header lies in the last `left` bytes of the chunk, with `sg_cnt` descriptors announced.
fn at_chunk_end(cx: &Ctx<'_>, left: usize, sg_cnt: u16) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    let frame = Frame { sg_cnt: Some(sg_cnt), ..Frame::read(0, flush_msg(device).as_bytes(), None) };
    let bytes = &frame.bytes()[..32 + left];
    let geometry = client.geometry();
    let off = geometry.chunk_size() - left as u32;
    let con = client.io_con();
    client.request_raw(con, ID, off - 32, bytes, geometry.imm_layout().io_req(ID, off))?;
    Ok(client.wait_reply(ID, cx.place.timeout()))
}

/// A server that does as it is told breaks its client's queue pair. The server itself hears only silence (IBTA 9.9.2.3,
/// class J), and rxe retries for ever; an honest client disconnects (`rtrs-clt.c`, `rtrs_rdma_error_recovery`).
fn inval_ordinary_key(cx: &Ctx<'_>) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    let desc = client.desc(ID, LEN);
    let frame = Frame { flags: 1, ..Frame::read(LEN, read_msg(device, 8, LEN).as_bytes(), Some(desc)) };
    client.send(1, ID, &frame)?;
    let end = std::time::Instant::now() + cx.place.timeout();
    while client.faults().is_empty() && std::time::Instant::now() < end {
        match client.wait_reply(ID, std::time::Duration::from_millis(100)) {
            Outcome::Timeout => {}
            other => return Ok(other),
        }
    }
    ensure(!client.faults().is_empty(), "neither an answer nor an error")?;
    client.disconnect();
    Ok(client.closed_or_timeout())
}

fn room_to_spare(cx: &Ctx<'_>) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    expect("write", client.write(device, 8, &[0x3c; 512], Flags::empty())?, Outcome::Ok)?;
    client.fill_read_area(ID, 0);
    let frame = Frame::read(LEN, read_msg(device, 8, 512).as_bytes(), Some(client.desc(ID, 512)));
    let con = client.io_con();
    expect("read", client.call(con, ID, &frame)?, Outcome::Ok)?;
    let got = client.read_area(ID, LEN as usize);
    ensure(got[..512] == [0x3c; 512] && got[512..].iter().all(|b| *b == 0), "wrong bytes came back")?;
    Ok(Outcome::Ok)
}

/// Random bytes where a header is due: every one is answered, or ends its path.
fn random(cx: &Ctx<'_>) -> Ran {
    let mut rng = Rng::new(0x5eed);
    let mut client = cx.connect()?;
    for _ in 0..500 {
        let id = rng.below(u64::from(client.geometry().queue_depth())) as u16;
        let off = rng.below(2000) as u32;
        let mut bytes = vec![0; off as usize + 24];
        bytes.iter_mut().for_each(|b| *b = rng.next() as u8);
        // Types 2 and 3 mostly, and lengths that are sometimes right.
        bytes[off as usize] = if rng.below(16) == 0 { rng.next() as u8 } else { 2 + rng.below(2) as u8 };
        bytes[off as usize + 1] = 0;
        bytes[off as usize + 3] &= 1;
        // Not NEED_INVAL: see hdr_inval_ordinary_key.
        bytes[off as usize + 4] &= !1;
        if rng.below(2) == 0 {
            (bytes[off as usize + 6], bytes[off as usize + 7]) = (rng.below(3) as u8, 0);
        }
        let desc = client.desc(id, rng.below(3000) as u32);
        if rng.below(2) == 0 {
            bytes[off as usize + 8..].copy_from_slice(SgDesc::as_bytes(&desc));
        }
        let imm = client.geometry().imm_layout().io_req(id, off);
        let con = rng.below(2) as usize;
        client.request_raw(con, id, 0, &bytes, imm)?;
        match client.wait_reply(id, cx.place.timeout()) {
            Outcome::Timeout => return Ok(Outcome::Timeout),
            Outcome::PathClosed => client = cx.connect()?,
            _ => {}
        }
    }
    Ok(Outcome::Ok)
}

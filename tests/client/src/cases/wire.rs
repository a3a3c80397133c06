//! Verbs that RTRS does not use, and memory that is none of the client's business.

use rtrs_proto::wire::SgDesc;
use verbs::{SendOp, SgeList};
use zerocopy::IntoBytes;

use crate::frame::Frame;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("send_on_io_con", "a SEND where only RDMA WRITE with immediate is spoken", CLOSED, |cx| {
        plain(cx, 1, &[0; 64])
    }),
    case("send_empty", "a SEND without a byte on con 1", CLOSED, |cx| plain(cx, 1, &[])),
    case("send_empty_con_0", "a SEND without a byte on con 0", CLOSED, |cx| plain(cx, 0, &[])),
    case("send_long", "a SEND of 8 KiB", CLOSED, |cx| plain(cx, 0, &[0x55; 8192])),
    case("send_imm", "a SEND with immediate", CLOSED, |cx| op(cx, SendOp::SendImm(0x48))),
    case("send_inval_bogus", "a SEND that invalidates a key that does not exist", CLOSED, |cx| {
        op(cx, SendOp::SendInvalidate(0xdead_0001))
    }),
    case("send_inval_chunks", "a SEND that invalidates the chunks' own key", CLOSED, |cx| {
        let mut client = cx.connect()?;
        let key = client.chunk(0).rkey;
        client.post(1, SendOp::SendInvalidate(key), SgeList::EMPTY)?;
        Ok(client.closed_or_timeout())
    }),
    case("write_silent", "RDMA WRITEs without immediate all over an own chunk", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let chunk = client.chunk(7);
        for _ in 0..100 {
            client.write_memory(1, chunk.addr, chunk.rkey, &[0xee; 4096])?;
        }
        still_serves(&mut client, device)
    }),
    case("write_wrong_key", "an RDMA WRITE with another key", CLOSED, |cx| {
        write(cx, |c| (c.chunk(0).addr, c.chunk(0).rkey ^ 0x0100_0000))
    }),
    case("write_key_0", "an RDMA WRITE with key 0", CLOSED, |cx| write(cx, |c| (c.chunk(0).addr, 0))),
    case("write_before_chunks", "an RDMA WRITE just before the first chunk", CLOSED, |cx| {
        write(cx, |c| (c.chunk(0).addr - 64, c.chunk(0).rkey))
    }),
    case("write_behind_chunks", "an RDMA WRITE across the end of the last chunk", CLOSED, |cx| {
        write(cx, |c| {
            let last = c.chunk(c.geometry().queue_depth() - 1);
            (last.addr + u64::from(c.geometry().chunk_size()) - 32, last.rkey)
        })
    }),
    case("write_address_0", "an RDMA WRITE to address 0", CLOSED, |cx| write(cx, |c| (0, c.chunk(0).rkey))),
    case("write_address_max", "an RDMA WRITE to the end of the address space", CLOSED, |cx| {
        write(cx, |c| (u64::MAX - 15, c.chunk(0).rkey))
    }),
    case("write_into_neighbour", "an RDMA WRITE across the end of an own chunk", OK_OR_CLOSED, |cx| {
        // One key covers all chunks of a path unless keys rotate; either way they are all this client's.
        let (mut client, device) = cx.opened("m512", 1)?;
        let (chunk, size) = (client.chunk(2), client.geometry().chunk_size());
        client.write_memory(1, chunk.addr + u64::from(size) - 32, chunk.rkey, &[0xee; 64])?;
        let got = still_serves(&mut client, device)?;
        if !client.rotating_keys() || cx.place.exact_windows() {
            let wanted = if client.rotating_keys() { Outcome::PathClosed } else { Outcome::Ok };
            expect("with these keys", got, wanted)?;
        }
        Ok(got)
    }),
    case("key_of_last_request", "a request under the key of the chunk's former one", CLOSED, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let stale = client.chunk(4);
        let flush = Frame::read(0, flush_msg(device).as_bytes(), None);
        let con = client.io_con();
        expect("the former request", client.call(con, 4, &flush)?, Outcome::Ok)?;
        client.write_memory(con, stale.addr, stale.rkey, &[1; 64])?;
        Ok(client.closed_or_timeout())
    })
    .needs(Needs::RotatingKeys),
    case("key_while_executing", "a write to the chunk of a request being executed", CLOSED, |cx| {
        let (mut client, device) = cx.opened("slow", 1)?;
        let (con, chunk) = (client.io_con(), client.chunk(4));
        let frame = Frame::write(&[1; 4096], write_msg(device, 0, 4096).as_bytes());
        client.send(con, 4, &frame)?;
        client.pump_for(cx.place.delay() / 4);
        client.write_memory(con, chunk.addr, chunk.rkey, &[2; 64])?;
        Ok(client.closed_or_timeout())
    })
    .needs(Needs::RotatingKeys),
    case(
        "overwritten_while_executing",
        "header and message changed while the request is executed",
        OK_OR_CLOSED,
        |cx| {
            let (mut client, device) = cx.opened("slow", 1)?;
            let (con, chunk) = (client.io_con(), client.chunk(4));
            let desc = client.desc(4, 4096);
            let frame = Frame::read(4096, read_msg(device, 0, 4096).as_bytes(), Some(desc));
            client.send(con, 4, &frame)?;
            client.pump_for(cx.place.delay() / 4);
            let lies = SgDesc::new(0x1000, 0x1234, u32::MAX);
            let lies = [&[0xff; 40][..], lies.as_bytes()].concat();
            client.write_memory(con, chunk.addr + 4096, chunk.rkey, &lies)?;
            Ok(client.wait_reply(4, cx.place.timeout()))
        },
    ),
    case("invalidated_reads", "reads through memory windows, with invalidation", OK, |cx| {
        let mut client = cx.connect_with(Opts { need_inval: true, ..cx.opts("hostile") })?;
        let device = client.open("m512", 1)?.device_id.get();
        for i in 0..50 {
            let data = [i as u8; 4096];
            expect("write", client.write(device, 8 * i, &data, Flags::empty())?, Outcome::Ok)?;
            ensure(client.read(device, 8 * i, 4096)? == data, "wrong bytes came back")?;
        }
        still_serves(&mut client, device)
    })
    .needs(Needs::Invalidation),
];

fn plain(cx: &Ctx<'_>, con: usize, bytes: &[u8]) -> Ran {
    let mut client = cx.connect()?;
    client.send_plain(con, bytes)?;
    Ok(client.closed_or_timeout())
}

fn op(cx: &Ctx<'_>, op: SendOp) -> Ran {
    let mut client = cx.connect()?;
    client.post(1, op, SgeList::EMPTY)?;
    Ok(client.closed_or_timeout())
}

/// 64 bytes to where they do not belong.
fn write(cx: &Ctx<'_>, to: impl FnOnce(&Client) -> (u64, u32)) -> Ran {
    let mut client = cx.connect()?;
    let (addr, rkey) = to(&client);
    client.write_memory(1, addr, rkey, &[0xbb; 64])?;
    Ok(client.closed_or_timeout())
}

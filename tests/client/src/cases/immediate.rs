//! The 32 bits of an immediate (`rtrs-srv.c`, `rtrs_srv_rdma_done`).

use rtrs_proto::imm::{HB_ACK, HB_MSG, io_rsp};
use zerocopy::IntoBytes;

use crate::frame::Frame;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("imm_id_is_depth", "a buffer id equal to the queue depth", CLOSED, |cx| {
        imm(cx, |g| Some(g.imm_layout().io_req(g.queue_depth(), 32)))
    }),
    case("imm_id_max", "the largest buffer id that fits", CLOSED, |cx| {
        imm(cx, |g| {
            let id = (1u32 << (28 - g.imm_layout().off_bits())) - 1;
            (id >= g.queue_depth().into()).then(|| g.imm_layout().io_req(id as u16, 32))
        })
    }),
    case("imm_off_is_chunk", "a header offset equal to the chunk size", CLOSED, |cx| {
        imm(cx, |g| Some(g.imm_layout().io_req(0, g.chunk_size())))
    }),
    case("imm_off_max", "the largest header offset that fits", CLOSED, |cx| {
        imm(cx, |g| Some(g.imm_layout().io_req(0, (1 << g.imm_layout().off_bits()) - 1)))
    }),
    case("imm_header_cut", "a chunk that ends within the first 4 bytes of the header", CLOSED, |cx| {
        imm(cx, |g| Some(g.imm_layout().io_req(0, g.chunk_size() - 3)))
    }),
    case("imm_unknown_types", "types 3 to 7 and 10 to 15, on both connections", OK, |cx| {
        ignored(cx, &[3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15].map(|t| t << 28 | 0x48))
    }),
    case("imm_responses", "responses from a client", OK, |cx| {
        ignored(cx, &[io_rsp(0, None, false), io_rsp(0, Some(Errno::EIO), true), 0x1fff_ffff, 0x2fff_ffff])
    }),
    case("imm_heartbeat_payload", "heartbeats with a payload", OK, |cx| {
        ignored(cx, &[HB_MSG | 0x0fff_ffff, HB_ACK | 0x0fff_ffff])
    }),
    case("imm_acks_unasked", "answers to heartbeats that nobody sent", OK, |cx| ignored(cx, &[HB_ACK; 40])),
    case("imm_heartbeat_flood", "two thousand heartbeats", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        for i in 0..2000 {
            client.post_imm(i % 2, HB_MSG)?;
        }
        expect("after the flood", still_serves(&mut client, device)?, Outcome::Ok)?;
        let answered = |c: &mut crate::Client| (c.heartbeat_acks > 0).then_some(());
        client.pump_until(cx.place.timeout(), answered).ok_or("no heartbeat was answered")?;
        Ok(Outcome::Ok)
    }),
    case("imm_fresh_chunk", "a request without a byte, in a chunk never written", CLOSED, |cx| {
        imm(cx, |g| Some(g.imm_layout().io_req(g.queue_depth() - 1, 64)))
    }),
    case("imm_stale_header", "a request without a byte, over an earlier one's header", OK, |cx| {
        let (mut client, device) = cx.opened("m512", 1)?;
        let flush = Frame::read(0, flush_msg(device).as_bytes(), None);
        let (con, id) = (client.io_con(), 3);
        expect("the earlier request", client.call(con, id, &flush)?, Outcome::Ok)?;
        let imm = flush.imm(&client.geometry(), id);
        client.send_imm(con, imm)?;
        Ok(client.wait_reply(id, cx.place.timeout()))
    }),
];

/// Sends one immediate without data and expects the path's end; `None` from `make` cannot be said with this depth.
fn imm(cx: &Ctx<'_>, make: impl FnOnce(&rtrs_proto::Geometry) -> Option<u32>) -> Ran {
    let mut client = cx.connect()?;
    let geometry = client.geometry();
    let imm = make(&geometry).ok_or("the queue depth must not be a power of two for this case")?;
    let con = client.io_con();
    client.send_imm(con, imm)?;
    Ok(client.closed_or_timeout())
}

/// Sends immediates that change nothing.
fn ignored(cx: &Ctx<'_>, imms: &[u32]) -> Ran {
    let (mut client, device) = cx.opened("m512", 1)?;
    for con in 0..2 {
        for imm in imms {
            client.post_imm(con, *imm)?;
        }
    }
    still_serves(&mut client, device)
}

//! Connection requests (`rtrs-srv.c`, `rtrs_rdma_connect`).

use rtrs_proto::wire::Uuid;
use zerocopy::IntoBytes;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("conn_empty", "private data without a byte", RESET, |cx| {
        dialed(cx.fresh(cx.opts("hostile"))?.dial(&[]))
    }),
    case(
        "conn_short",
        "private data that ends in the middle of the first uuid",
        &[Outcome::Rejected(-6)],
        |cx| {
            // Transports pad with zeroes, so this arrives as a request of an unknown session without first_conn.
            let opts = cx.opts("hostile");
            let request = opts.conn_req(0);
            dialed(cx.fresh(opts)?.dial(&request.as_bytes()[..20]))
        },
    ),
    case("conn_magic", "a magic number that is not RTRS's", RESET, |cx| cx.dial(|r| r.magic = 0x1bbe.into())),
    case("conn_version_1", "major version 1", RESET, |cx| cx.dial(|r| r.version = 0x100.into())),
    case("conn_version_3", "major version 3", RESET, |cx| cx.dial(|r| r.version = 0x300.into())),
    case("conn_minor_version", "an unknown minor version", OK, |cx| cx.dial(|r| r.version = 0x2ff.into())),
    case("conn_cid_is_cid_num", "cid equal to cid_num", RESET, |cx| cx.dial(|r| r.cid = 2.into())),
    case("conn_cid_max", "cid 65535", RESET, |cx| cx.dial(|r| r.cid = u16::MAX.into())),
    case("conn_cid_num_0", "a path of no connections", RESET, |cx| cx.dial(|r| r.cid_num = 0.into())),
    case("conn_cid_num_4097", "more connections than RTRS allows", RESET, |cx| {
        cx.dial(|r| r.cid_num = 4097.into())
    }),
    case("conn_reserved_garbage", "reserved bytes and flags all set", OK, |cx| {
        cx.dial(|r| (r.reserved, r.flags) = ([0xff; 11], 0xff))
    }),
    case("conn_zero_uuids", "uuids of zeroes", OK, |cx| {
        cx.dial(|r| (r.sess_uuid, r.paths_uuid) = (Uuid([0; 16]), Uuid([0; 16])))
    }),
    case("conn_recon_cnt", "the 65535th attempt at the first", OK, |cx| {
        cx.dial(|r| r.recon_cnt = u16::MAX.into())
    }),
    case("conn_not_first", "first_conn clear, session unknown", &[Outcome::Rejected(-6)], |cx| {
        cx.dial(|r| r.flags = 0)
    }),
    case("conn_cid_twice", "the same cid twice", RESET, |cx| second_con(cx, |r| r.cid = 0.into())),
    case("conn_cid_num_changes", "another cid_num in the second request", RESET, |cx| {
        second_con(cx, |r| r.cid_num = 3.into())
    }),
    case("conn_cid_num_shrinks", "a second request with cid_num 1", RESET, |cx| {
        second_con(cx, |r| (r.cid, r.cid_num) = (0.into(), 1.into()))
    }),
    case("conn_reversed", "cid 1 before cid 0", OK, reversed),
    case("conn_same_addresses", "a second path between the same addresses", EXIST, |cx| {
        let first = cx.connect()?;
        let mut second = cx.fresh(Opts { path_uuid: crate::opts::random_uuid(), ..first.opts.clone() })?;
        let request = second.opts.conn_req(0);
        dialed(second.dial(request.as_bytes()))
    }),
    case("conn_up_again", "the first request again while the path is up", RESET, |cx| {
        let first = cx.connect()?;
        let mut again = cx.fresh(Opts { recon_cnt: 2, ..first.opts.clone() })?;
        let request = again.opts.conn_req(0);
        dialed(again.dial(request.as_bytes()))
    }),
    case("conn_join_stranger", "a path into another client's session", EXIST, |cx| {
        let mut thief = cx.fresh(Opts {
            session_uuid: cx.bystander.session_uuid,
            first_conn: false,
            ..cx.opts("hostile")
        })?;
        let request = thief.opts.conn_req(0);
        dialed(thief.dial(request.as_bytes()))
    }),
    case("conn_path_of_stranger", "an own session with another client's path uuid", OK, |cx| {
        let mut client = cx.connect_with(Opts { path_uuid: cx.bystander.path_uuid, ..cx.opts("hostile") })?;
        let device = client.open("m512", 0)?.device_id.get();
        still_serves(&mut client, device)
    }),
    case("conn_replace_stranger", "all uuids of another client whose path is up", RESET, |cx| {
        let mut thief = cx.fresh(Opts { recon_cnt: 2, ..cx.bystander.clone() })?;
        let request = thief.opts.conn_req(0);
        dialed(thief.dial(request.as_bytes()))
    }),
    case("conn_gives_up", "fifty requests given up before the answer", OK, |cx| {
        let mut client = cx.fresh(cx.opts("hostile"))?;
        for n in 0..50 {
            let request = Opts { cid_num: 2, ..cx.opts("hostile") }.conn_req(n % 2);
            client.knock(request.as_bytes())?;
        }
        Ok(Outcome::Ok)
    }),
    case("conn_half_open", "cid 0 only, then silence", CLOSED, |cx| half_open(cx, 1)),
    case("conn_no_info", "all connections, then no INFO_REQ", CLOSED, |cx| half_open(cx, 2)),
];

fn second_con(cx: &Ctx<'_>, change: impl FnOnce(&mut ConnReq)) -> Ran {
    let mut client = cx.fresh(cx.opts("hostile"))?;
    let first = client.opts.conn_req(0);
    client.dial(first.as_bytes())?;
    let mut second = client.opts.conn_req(1);
    change(&mut second);
    dialed(client.dial(second.as_bytes()))
}

fn reversed(cx: &Ctx<'_>) -> Ran {
    let mut client = cx.fresh(cx.opts("hostile"))?;
    for cid in [1, 0] {
        let request = client.opts.conn_req(cid);
        client.dial(request.as_bytes())?;
    }
    // From here on connection 0 of the client must be cid 0.
    client.swap_connections(0, 1);
    let info = client.opts.info_req();
    client.send_info(info.as_bytes())?;
    client.wait_info()?;
    let device = client.open("m512", 0)?.device_id.get();
    still_serves(&mut client, device)
}

fn half_open(cx: &Ctx<'_>, cids: u16) -> Ran {
    let mut client = cx.fresh(cx.opts("hostile"))?;
    for cid in 0..cids {
        let request = client.opts.conn_req(cid);
        client.dial(request.as_bytes())?;
    }
    let patience = cx.place.half_open() + cx.place.timeout();
    Ok(if client.wait_closed(patience) { Outcome::PathClosed } else { Outcome::Timeout })
}

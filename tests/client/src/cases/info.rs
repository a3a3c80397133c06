//! INFO_REQ (`rtrs-srv.c`, `process_info_req`). A bad one cannot be rejected any more: the path is closed.

use rtrs_proto::imm::HB_MSG;
use rtrs_proto::wire::InfoReq;
use verbs::{SendOp, SgeList};
use zerocopy::IntoBytes;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("info_empty", "a SEND without a byte", CLOSED, |cx| info(cx, |_| Vec::new())),
    case("info_1", "one byte", CLOSED, |cx| info(cx, |m| m.as_bytes()[..1].into())),
    case("info_271", "one byte too few", CLOSED, |cx| info(cx, |m| m.as_bytes()[..271].into())),
    case("info_273", "one byte too many", CLOSED, |cx| info(cx, |m| [m.as_bytes(), &[0]].concat())),
    case("info_8192", "many bytes too many", CLOSED, |cx| {
        info(cx, |m| [m.as_bytes(), &[0x41; 7920]].concat())
    }),
    case("info_type", "another message type", CLOSED, |cx| change(cx, |m| m.msg_type = 1.into())),
    case("info_unterminated", "a session name without NUL", CLOSED, |cx| {
        change(cx, |m| m.pathname = [b'x'; 255])
    }),
    case("info_slash", "'/' in the session name", CLOSED, |cx| name(cx, b"a/b")),
    case("info_dot", "'.' in the session name", CLOSED, |cx| name(cx, b"a.b")),
    case("info_no_name", "an empty session name", CLOSED, |cx| name(cx, b"")),
    case("info_not_utf8", "a session name that is no UTF-8", CLOSED, |cx| name(cx, b"a\xffb")),
    case("info_long_name", "a session name of 254 bytes", OK, |cx| name(cx, &[b'n'; 254])),
    case("info_control_characters", "a session name of quotes and control characters", OK, |cx| {
        name(cx, b"\"\n\x1b[31m\\u0000")
    }),
    case("info_reserved_garbage", "reserved bytes set", OK, |cx| change(cx, |m| m.reserved = [0xff; 15])),
    case("info_name_taken", "the session name of another client", CLOSED, |cx| {
        let taken = cx.bystander.sessname.clone();
        name(cx, &taken)
    }),
    case("info_too_early", "before the last connection", CLOSED, |cx| {
        let mut client = cx.fresh(cx.opts("hostile"))?;
        let first = client.opts.conn_req(0);
        client.dial(first.as_bytes())?;
        let info = client.opts.info_req();
        client.send_info(info.as_bytes())?;
        dialed(client.wait_info())
    }),
    case("info_twice", "again, on a path that is up", CLOSED, |cx| {
        let mut client = cx.connect()?;
        let info = client.opts.info_req();
        client.send_plain(0, info.as_bytes())?;
        Ok(client.closed_or_timeout())
    }),
    case("info_two_at_once", "twice without waiting", CLOSED, |cx| {
        let mut client = cx.fresh(cx.opts("hostile"))?;
        client.dial_all()?;
        let info = client.opts.info_req();
        client.send_info(info.as_bytes())?;
        client.send_plain(0, info.as_bytes())?;
        Ok(client.closed_or_timeout())
    }),
    case("info_on_con_1", "on the wrong connection", CLOSED, |cx| {
        let mut client = cx.fresh(cx.opts("hostile"))?;
        client.dial_all()?;
        let info = client.opts.info_req();
        client.send_plain(1, info.as_bytes())?;
        Ok(client.closed_or_timeout())
    }),
    case("info_heartbeat_first", "a heartbeat on con 0 before it", CLOSED, |cx| instead(cx, 0, HB_MSG)),
    case("info_request_first_con_0", "a request on con 0 before it", CLOSED, |cx| instead(cx, 0, 0x48)),
    case("info_request_first_con_1", "a request on con 1 before it", CLOSED, |cx| instead(cx, 1, 0x48)),
    case("info_heartbeat_first_con_1", "a heartbeat on con 1 before it", OK_OR_CLOSED, |cx| {
        let mut client = dialed_client(cx)?;
        client.send_imm(1, HB_MSG)?;
        let info = client.opts.info_req();
        client.send_info(info.as_bytes())?;
        dialed(client.wait_info())
    }),
];

fn dialed_client(cx: &Ctx<'_>) -> Result<Client, Box<dyn Error>> {
    let mut client = cx.fresh(cx.opts("hostile"))?;
    client.dial_all()?;
    Ok(client)
}

fn info(cx: &Ctx<'_>, bytes: impl FnOnce(&InfoReq) -> Vec<u8>) -> Ran {
    let mut client = dialed_client(cx)?;
    let bytes = bytes(&client.opts.info_req());
    client.send_info(&bytes)?;
    dialed(client.wait_info())
}

fn change(cx: &Ctx<'_>, change: impl FnOnce(&mut InfoReq)) -> Ran {
    info(cx, |m| {
        let mut m = *m;
        change(&mut m);
        m.as_bytes().into()
    })
}

fn name(cx: &Ctx<'_>, name: &[u8]) -> Ran {
    change(cx, |m| {
        m.pathname = [0; 255];
        m.pathname[..name.len()].copy_from_slice(name);
    })
}

fn instead(cx: &Ctx<'_>, con: usize, imm: u32) -> Ran {
    let mut client = dialed_client(cx)?;
    client.post(con, SendOp::WriteImm { addr: 0, rkey: 0, imm }, SgeList::EMPTY)?;
    Ok(client.closed_or_timeout())
}

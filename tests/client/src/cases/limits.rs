//! As much of everything as the server allows, and one more.

use std::time::Instant;

use rtrs_proto::wire::MAX_PATHS_NUM;
use zerocopy::IntoBytes;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("too_many_sessions", "sessions up to the limit, and one more", NOMEM, |cx| {
        let (sessions, _) = cx.place.limits().ok_or("limits unknown")?;
        let mut clients = Vec::new();
        // The bystander is one.
        for n in 1..sessions {
            clients.push(cx.connect_with(cx.opts(&format!("hostile-{n}")))?);
        }
        dial_one(cx, &mut clients)
    })
    .needs(Needs::Limits),
    case(
        "half_open_sessions",
        "twice as many half-open sessions as there may be give way to one that comes up",
        OK,
        |cx| {
            let (sessions, _) = cx.place.limits().ok_or("limits unknown")?;
            let mut clients = Vec::new();
            for n in 0..2 * sessions {
                expect("a half-open session", dial_one(cx, &mut clients)?, Outcome::Ok)
                    .map_err(|e| format!("session {n}: {e}"))?;
            }
            cx.connect().map(|_| Outcome::Ok)
        },
    )
    .needs(Needs::Limits),
    case("too_many_connections", "one path of more connections than the server has", NOMEM, |cx| {
        let (_, connections) = cx.place.limits().ok_or("limits unknown")?;
        until_fast(cx, || {
            let began = Instant::now();
            let mut client = cx.fresh(Opts { cid_num: 4096, ..cx.opts("hostile") })?;
            for cid in 0..=connections as u16 {
                let request = client.opts.conn_req(cid);
                match dialed(client.dial(request.as_bytes()))? {
                    Outcome::Ok => {}
                    _ if began.elapsed() >= cx.place.half_open() => return Ok(None),
                    other => return Ok(Some(other)),
                }
            }
            Ok(Some(Outcome::Ok))
        })
    })
    .needs(Needs::Limits),
    case("path_129", "the 129th path of a session", RESET, |cx| {
        let first = cx.connect()?;
        until_fast(cx, || {
            // Paths that do not come up are closed after a while: that they are not yet is part of it.
            let began = Instant::now();
            let mut paths = Vec::new();
            for n in 1..=MAX_PATHS_NUM {
                let src = cx.place.src(n).ok_or("not enough addresses")?;
                let mut path = cx.fresh(Opts { cid_num: 1, ..first.opts.another_path(src) })?;
                let request = path.opts.conn_req(0);
                match dialed(path.dial(request.as_bytes()))? {
                    Outcome::Ok if n < MAX_PATHS_NUM => paths.push(path),
                    Outcome::Ok if began.elapsed() >= cx.place.half_open() => return Ok(None),
                    other if n == MAX_PATHS_NUM => return Ok(Some(other)),
                    // Some of an attempt that was too slow are being closed still.
                    Outcome::Rejected(-104) => return Ok(None),
                    other => return Err(format!("path {}: {other}", n + 1).into()),
                }
            }
            Ok(Some(Outcome::Ok))
        })
    })
    .needs(Needs::Addresses(MAX_PATHS_NUM + 1)),
    case("path_closes_all", "paths of one session on many addresses, one after the other", OK, |cx| {
        let first = cx.connect()?;
        for n in 1..20 {
            let src = cx.place.src(n).ok_or("not enough addresses")?;
            let mut path = cx.connect_with(first.opts.another_path(src))?;
            path.disconnect();
        }
        Ok(Outcome::Ok)
    })
    .needs(Needs::Addresses(20)),
];

fn dial_one(cx: &Ctx<'_>, clients: &mut Vec<Client>) -> Ran {
    let mut client = cx.fresh(cx.opts("hostile"))?;
    let request = client.opts.conn_req(0);
    let result = dialed(client.dial(request.as_bytes()));
    clients.push(client);
    result
}

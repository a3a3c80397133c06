//! Requests that overlap, clients that vanish, and clients that come back.

use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use crate::frame::Frame;

use super::*;

pub(super) const CASES: &[Case] = &[
    case("id_twice", "a buffer id again while it is being executed", CLOSED, |cx| twice(cx, 1)),
    case("id_twice_other_con", "the same on another connection", CLOSED, |cx| twice(cx, 0)),
    case(
        "id_malformed_while_busy",
        "a malformed request on a buffer id in use",
        &[Outcome::Errno(Errno::EINVAL), Outcome::PathClosed],
        |cx| {
            let (mut client, device) = cx.opened("slow", 1)?;
            client.send(1, 2, &slow_write(device))?;
            client.pump_for(cx.place.delay() / 4);
            match client.call(1, 2, &Frame { usr_len: Some(u16::MAX), ..Frame::read(0, &[0; 32], None) })? {
                // The answer to the first one, on a machine that is slow itself.
                Outcome::Ok => Ok(client.wait_reply(2, cx.place.timeout())),
                other => Ok(other),
            }
        },
    ),
    case("vanish_while_busy", "gone while writes are executed", OK, |cx| {
        let (client, _) = busy_client(cx)?;
        drop(client);
        // Its device is free again once its last write is done.
        free_again(cx, "slow")
    }),
    case("disconnect_while_busy", "disconnected while writes are executed", OK, |cx| {
        let (mut client, _) = busy_client(cx)?;
        client.disconnect();
        drop(client);
        free_again(cx, "slow")
    }),
    case(
        "disconnect_one_con",
        "one connection disconnected: the server gives up the whole path",
        CLOSED,
        |cx| {
            let (mut client, _) = busy_client(cx)?;
            client.disconnect_con(1);
            Ok(client.closed_or_timeout())
        },
    ),
    case(
        "reconnect_while_busy",
        "back with the same uuids while the former path's writes are executed",
        RESET,
        |cx| {
            until_fast(cx, || {
                let (client, _) = busy_client(cx)?;
                let opts = client.opts.clone();
                drop(client);
                let mut again = cx.fresh(Opts { recon_cnt: 2, ..opts })?;
                let request = again.opts.conn_req(0);
                match dialed(again.dial(request.as_bytes()))? {
                    // Too late: the writes were done.
                    Outcome::Ok => {}
                    other => return Ok(Some(other)),
                }
                drop(again);
                free_again(cx, "slow")?;
                Ok(None)
            })
        },
    ),
    case("reconnect_until_in", "the same, tried until it is let in", OK, |cx| {
        let (client, _) = busy_client(cx)?;
        let opts = client.opts.clone();
        drop(client);
        let mut client = reconnect(cx, &opts)?;
        let device = client.open("slow", 1)?.device_id.get();
        still_serves(&mut client, device)
    }),
    case("reconnect_many", "twenty times connected, opened and gone with the same uuids", OK, |cx| {
        let (client, _) = cx.opened("m512", 1)?;
        let opts = client.opts.clone();
        drop(client);
        for round in 2..22 {
            let mut client = reconnect(cx, &Opts { recon_cnt: round, ..opts.clone() })?;
            let device = client.open("m512", 1)?.device_id.get();
            expect("flush", still_serves(&mut client, device)?, Outcome::Ok)?;
            if round % 2 == 0 {
                client.disconnect();
            }
        }
        Ok(Outcome::Ok)
    }),
    case("no_receives", "ten thousand requests whose answers are never taken", CLOSED, |cx| {
        let mut client = cx.connect_with(Opts { post_receives: false, ..cx.opts("hostile") })?;
        let depth = client.geometry().queue_depth();
        let frame = Frame::write(&[], &[0xff; 32]);
        for i in 0..10_000u16 {
            // Rotating keys give out after one request per chunk, which closes the path as well.
            let id = i % depth;
            if !client.is_up() || client.send(1, id, &frame).is_err() {
                break;
            }
        }
        Ok(client.closed_or_timeout())
    }),
    case(
        "late_receives",
        "as many requests as there are chunks, their answers taken late",
        OK_OR_CLOSED,
        late_receives,
    ),
    case("all_ids_at_once", "every chunk in use at once, on a slow device", OK, |cx| {
        let (mut client, device) = cx.opened("slow", 1)?;
        let depth = client.geometry().queue_depth();
        for id in 0..depth {
            client.send(
                usize::from(id % 2),
                id,
                &Frame::write(&[id as u8; 512], write_msg(device, id.into(), 512).as_bytes()),
            )?;
        }
        for id in 0..depth {
            expect("write", client.wait_reply(id, cx.place.timeout()), Outcome::Ok)?;
        }
        let data = client.read(device, 0, 512 * u32::from(depth))?;
        ensure(data.chunks(512).enumerate().all(|(i, c)| c == [i as u8; 512]), "wrong bytes came back")?;
        Ok(Outcome::Ok)
    }),
    case(
        "second_path_half_open",
        "a second path that never comes up; the first one works on",
        CLOSED,
        |cx| {
            let (mut first, device) = cx.opened("m512", 1)?;
            let mut second = second_path(cx, &first)?;
            let request = second.opts.conn_req(0);
            second.dial(request.as_bytes())?;
            let end = Instant::now() + cx.place.half_open() + cx.place.timeout();
            while Instant::now() < end {
                expect("the first path", still_serves(&mut first, device)?, Outcome::Ok)?;
                if second.wait_closed(Duration::from_millis(20)) {
                    expect("the first path", still_serves(&mut first, device)?, Outcome::Ok)?;
                    return Ok(Outcome::PathClosed);
                }
            }
            Ok(Outcome::Timeout)
        },
    )
    .needs(Needs::Addresses(2)),
    case("second_path_other_name", "a second path with another session name", OK_OR_CLOSED, |cx| {
        let (mut first, device) = cx.opened("m512", 1)?;
        let mut second = second_path(cx, &first)?;
        second.opts.sessname = b"other".into();
        second.dial_all()?;
        let info = second.opts.info_req();
        second.send_info(info.as_bytes())?;
        let second = dialed(second.wait_info())?;
        expect("the first path", still_serves(&mut first, device)?, Outcome::Ok)?;
        Ok(second)
    })
    .needs(Needs::Addresses(2)),
    case(
        "second_path_shares_devices",
        "a device opened on one path, used on the other, after the first is gone",
        OK,
        |cx| {
            let (mut first, device) = cx.opened("m512", 1)?;
            let mut second =
                cx.connect_with(first.opts.another_path(cx.place.src(1).ok_or("no second address")?))?;
            expect("write", first.write(device, 0, &[0x21; 512], Flags::empty())?, Outcome::Ok)?;
            first.disconnect();
            drop(first);
            ensure(second.read(device, 0, 512)? == [0x21; 512], "wrong bytes came back")?;
            still_serves(&mut second, device)
        },
    )
    .needs(Needs::Addresses(2)),
    case("failover_flood", "a request in execution repeated on another path again and again", CLOSED, |cx| {
        let (mut first, device) = cx.opened("slow", 1)?;
        let mut second =
            cx.connect_with(first.opts.another_path(cx.place.src(1).ok_or("no second address")?))?;
        first.send(1, 2, &slow_write(device))?;
        first.pump_for(cx.place.delay() / 8);
        for _ in 0..1000 {
            // With rotating keys the first repetition makes the key invalid, which ends the path as well.
            if !second.is_up() || second.send(1, 2, &slow_write(device)).is_err() {
                break;
            }
        }
        Ok(second.closed_or_timeout())
    })
    .needs(Needs::Addresses(2)),
];

fn late_receives(cx: &Ctx<'_>) -> Ran {
    let mut client = cx.connect_with(Opts { post_receives: false, ..cx.opts("hostile") })?;
    let depth = client.geometry().queue_depth();
    for id in 0..depth {
        client.send(1, id, &Frame::write(&[], &[0xff; 32]))?;
    }
    client.pump_for(Duration::from_millis(50));
    client.post_all_receives();
    for id in 0..depth {
        match client.wait_reply(id, cx.place.timeout()) {
            // What had no receive is sent again, and with it the binds behind it.
            Outcome::PathClosed if client.rotating_keys() && !cx.place.exact_windows() => {
                return Ok(Outcome::PathClosed);
            }
            got => expect("answer", got, Outcome::Errno(Errno::EINVAL))?,
        }
    }
    Ok(Outcome::Ok)
}

fn slow_write(device: u32) -> Frame {
    Frame::write(&[0x5a; 512], write_msg(device, 0, 512).as_bytes())
}

/// A buffer id in use sent again, on the connection that `con` says.
fn twice(cx: &Ctx<'_>, con: usize) -> Ran {
    until_fast(cx, || {
        let (mut client, device) = cx.opened("slow", 1)?;
        let frame = slow_write(device);
        client.send(1, 2, &frame)?;
        client.pump_for(cx.place.delay() / 4);
        // Without data, so that a key that has been taken away is not what ends the path.
        let imm = frame.imm(&client.geometry(), 2);
        client.send_imm(con, imm)?;
        let first = client.wait_reply(2, cx.place.timeout());
        if first != Outcome::Ok {
            return Ok(Some(first));
        }
        // Two answers: they were executed one after the other.
        expect("the second one", client.wait_reply(2, cx.place.timeout()), Outcome::Ok)?;
        Ok(None)
    })
}

/// A client with writes in execution.
fn busy_client(cx: &Ctx<'_>) -> Result<(Client, u32), Box<dyn Error>> {
    let end = Instant::now() + cx.place.timeout();
    while Instant::now() < end {
        let (mut client, device) = cx.opened("slow", 1)?;
        for id in 0..8 {
            client.send(1, id, &slow_write(device))?;
        }
        client.pump_for(cx.place.delay() / 4);
        if (0..8).all(|id| client.take_reply(id).is_none()) {
            return Ok((client, device));
        }
        client.disconnect();
        drop(client);
        free_again(cx, "slow")?;
    }
    Err("the slow device was faster than this client at every attempt".into())
}

/// Waits until `device` has no writer any more.
fn free_again(cx: &Ctx<'_>, device: &str) -> Ran {
    let mut next = cx.connect_with(cx.opts("second"))?;
    let end = Instant::now() + cx.place.timeout();
    loop {
        match called(next.open(device, 1))? {
            Outcome::Errno(Errno::EPERM) if Instant::now() < end => next.pump_for(Duration::from_millis(10)),
            other => return Ok(other),
        }
    }
}

/// Connects with the uuids of a path that is being torn down; -104 means to try again.
fn reconnect(cx: &Ctx<'_>, opts: &Opts) -> Result<Client, Box<dyn Error>> {
    let end = Instant::now() + cx.place.timeout();
    loop {
        match Client::connect(cx.place.cm()?, cx.place.dst(), opts.clone()) {
            Err(ConnectError::Rejected(-104)) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return Ok(other?),
        }
    }
}

fn second_path(cx: &Ctx<'_>, first: &Client) -> Result<Client, Box<dyn Error>> {
    cx.fresh(first.opts.another_path(cx.place.src(1).ok_or("no second address")?))
}

//! A request that fails over is sent again, with the same buffer id, on another path of the session, while the lost
//! path's server side may still be executing it. The stale execution must not overwrite what the client writes after
//! the repetition was acknowledged (`rtrs-clt.c`, `fail_all_outstanding_reqs`).

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Target;
use common::lazy::Lazy;
use rnbd_proto::wire::{Flags, MsgIo, Op};
use serde_json::json;
use test_client::{Client, ConnectError, Frame, Opts, Outcome, Place};
use test_support::{until, until_some};
use zerocopy::IntoBytes;

/// Requests in flight at once.
const WIDTH: u16 = 20;
const LONGEST: Duration = Duration::from_millis(40);
const ROUNDS: u32 = 24;

fn frame(device: u32, lba: u16, data: [u8; 2]) -> Frame {
    let msg = MsgIo::request(device, Op::Write, Flags::SYNC, lba.into(), 512, 0);
    Frame::write(&data.repeat(256), msg.as_bytes())
}

/// Connects, as soon as the server has forgotten the path's former incarnation.
fn connect(target: &Target, opts: &Opts) -> Client {
    until_some("the path comes up", || {
        match Client::connect(target.cm().unwrap(), target.dst(), opts.clone()) {
            Err(ConnectError::Rejected(-104)) => None,
            other => Some(other.unwrap()),
        }
    })
}

/// One failover; `wait` is how long the first path has had its requests when they are sent again.
fn round(target: &Target, paths: &[Opts; 2], second: &mut Client, device: u32, number: u8, wait: Duration) {
    let mut first = connect(target, &paths[0]);
    for id in 0..WIDTH {
        first.send(usize::from(id % 2), id, &frame(device, id, [number, b'A'])).unwrap();
    }
    second.pump_for(wait);
    // A reactor that has not run since then would find the first path's requests after the repetitions, and cannot tell
    // them from new ones (docs/architecture.md): this is about executions that were begun.
    target.reactors_have_turned();
    for id in 0..WIDTH {
        second.send(usize::from(id / 2 % 2), id, &frame(device, id, [number, b'A'])).unwrap();
    }
    for id in 0..WIDTH {
        assert_eq!(second.wait_reply(id, target.timeout()), Outcome::Ok, "repetition of {id}");
        // At once, under another id, to the block whose write has just been acknowledged.
        let other = 23 - id % 3;
        second.send(usize::from(id % 2), other, &frame(device, id, [number, b'B'])).unwrap();
        assert_eq!(second.wait_reply(other, target.timeout()), Outcome::Ok, "second write of {id}");
    }
    // Some request may have been answered before it was repeated; a path all of whose requests were, stays.
    first.pump_for(Duration::from_millis(2));
    let answered = (0..WIDTH).filter(|id| first.take_reply(*id).is_some()).count();
    if answered < usize::from(WIDTH) && wait < LONGEST / 2 {
        assert!(first.wait_closed(target.timeout()), "the lost path was not closed");
    }
    drop(first);
    // Its last execution is over when the server has forgotten the path.
    until("the path is forgotten", || {
        second.pump_for(Duration::from_millis(1));
        target.paths().unwrap().len() == 1
    });
    let data = second.read(device, 0, 512 * u32::from(WIDTH)).unwrap();
    for (id, block) in data.chunks(512).enumerate() {
        assert_eq!(block, [number, b'B'].repeat(256), "block {id} of round {number}, {wait:?}");
    }
}

fn failovers(name: &str, rotate_rkeys: bool) {
    let target = Target::start(name, &json!({"rotate_rkeys": rotate_rkeys}));
    let disk = Lazy::new("lazy", 64, LONGEST);
    target.register(disk.clone() as Arc<dyn bdev::Bdev>);
    let opts = Opts { src: target.src(0), ..Opts::new("failover") };
    let other = opts.another_path(target.src(1).unwrap());
    let mut second = connect(&target, &Opts { first_conn: true, ..other.clone() });
    let device = second.open("lazy", 1).unwrap().device_id.get();
    let paths = [Opts { first_conn: false, ..opts }, other];
    for n in 0..ROUNDS {
        // From "at once" to "after most have finished".
        let wait = LONGEST.mul_f64(f64::from(n) / f64::from(ROUNDS));
        round(&target, &paths, &mut second, device, n as u8 + 1, wait);
    }
    assert_eq!(disk.overlaps(), 0, "two executions of one request at a time");
    let violations = second.opts.violations.lock().unwrap();
    assert!(violations.is_empty(), "{violations:?}");
}

#[test]
fn stale_executions_do_not_overwrite_later_writes() {
    failovers("failover", false);
}

#[test]
fn nor_with_rotating_keys() {
    failovers("failover-rotating", true);
}

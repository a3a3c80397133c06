//! Strangers use up what a real program has to give, over soft-roce: while they do their worst, a client that was there
//! before works on, a new one gets in, and afterwards the program is as it was before.

#[path = "../../../soft-roce/tests/raw/mod.rs"]
#[allow(dead_code, reason = "a peer of which this needs the requests only")]
mod raw;

mod bystander;
mod program;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use bystander::Bystanders;
use program::Program;
use serde_json::json;
use test_client::{Client, Opts};
use test_support::{limit, patience, until};
use zerocopy::IntoBytes;

/// A client at `src`, which has not connected yet.
fn client(program: &Program, src: IpAddr, name: &str) -> Client {
    let opts = Opts {
        src: Some(src),
        timeout: limit(10),
        // Many of them shall fit into this process.
        send_depth: 16,
        recv_depth: 32,
        ..Opts::new(name)
    };
    Client::new(soft_roce::open().unwrap(), program.addr, opts)
}

/// Opens `n` of the `announced` connections of a path; returns how many it could.
fn dial(client: &mut Client, announced: u16, n: u16) -> u16 {
    client.opts.cid_num = announced;
    for cid in 0..n {
        let request = client.opts.conn_req(cid);
        if client.dial(request.as_bytes()).is_err() {
            return cid;
        }
    }
    n
}

/// Has `attack` done while bystanders work, and looks that nothing of it stays.
fn under_attack(program: &Program, attack: impl FnOnce(&Program)) {
    let mut bystanders = Bystanders::start(program);
    // With what they need, which is made once.
    bystanders.have_all_worked();
    let before = program.usage();
    let began = Instant::now();
    attack(program);
    let during = program.usage();
    println!("{:?} of attack; before: {before}; at its end: {during}", began.elapsed());
    until("paths of strangers are gone", || program.paths_of_strangers() == 0);
    until(format_args!("descriptors and memory as before, {before}"), || {
        let now = program.usage();
        now.descriptors <= before.descriptors && now.memory < before.memory + (16 << 20)
    });
    println!("after: {}", program.usage());
    println!("{}", bystanders.stop());
}

#[test]
fn a_burst_of_connections_leaves_nothing() {
    let program = Program::start(&json!({"queue_depth": 64, "half_open_timeout_ms": 120_000}));
    under_attack(&program, |program| {
        let before = program.usage();
        let mut stranger = client(program, program.ip(100), "burst");
        assert_eq!(
            dial(&mut stranger, 4096, 1500),
            1024,
            "one address may have a quarter of 4096 connections"
        );
        let with_all = program.usage();
        let more = with_all.descriptors - before.descriptors;
        assert!(more <= 8, "{more} descriptors for connections that need none: {with_all}");
    });
}

#[test]
fn half_open_sessions_shut_nobody_out() {
    let program = Program::start(&json!({"max_sessions": 16, "half_open_timeout_ms": 120_000}));
    under_attack(&program, |program| {
        let until = Instant::now() + Duration::from_secs(3);
        let (mut strangers, mut count) = (VecDeque::new(), 0);
        while Instant::now() < until {
            let mut stranger = client(program, program.ip(100 + (count % 4) as u8), "half");
            dial(&mut stranger, 100, 3);
            strangers.push_back(stranger);
            if strangers.len() > 64 {
                // There is no room for more in this process.
                strangers.pop_front();
            }
            count += 1;
        }
        assert!(count > 16, "{count} is no attack");
        assert!(program.paths_of_strangers() <= 16);
    });
}

#[test]
fn requests_in_the_names_of_others_shut_nobody_out() {
    let program = Program::start(&json!({"max_sessions": 16, "half_open_timeout_ms": 120_000}));
    under_attack(&program, |program| {
        // Nobody reads what these get.
        let sockets: Vec<_> = (100..164).map(|n| (program.ip(n), raw::socket(program.ip(n)))).collect();
        let until = Instant::now() + Duration::from_secs(3);
        let mut sent = 0;
        while Instant::now() < until {
            for (ip, socket) in &sockets {
                let request = Opts::new("").conn_req(0);
                let packet = raw::connect_request(*ip, program.addr, sent, request.as_bytes());
                socket.send_to(&packet, SocketAddr::new(program.addr.ip(), roce_proto::UDP_PORT)).unwrap();
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("{sent} requests");
    });
}

#[test]
fn small_packets_cost_little_memory() {
    let program = Program::start(&json!({"max_sessions": 64}));
    under_attack(&program, |program| {
        let before = program.usage();
        let mut strangers = Vec::new();
        for n in 0..20 {
            let mut stranger = client(program, program.ip(100), &format!("s{n}"));
            if stranger.dial_all().is_err() {
                break;
            }
            come_up(&mut stranger);
            // A byte here and there.
            let depth = stranger.geometry().queue_depth();
            for id in (0..depth).step_by(8) {
                let chunk = stranger.chunk(id);
                stranger.write_memory(0, chunk.addr, chunk.rkey, &[1]).unwrap();
            }
            strangers.push(stranger);
        }
        assert_eq!(strangers.len(), 16, "one address may have a quarter of 64 sessions");
        let more = program.usage().memory - before.memory;
        println!("{} MiB for {} sessions", more >> 20, strangers.len());
        assert!(more < 64 << 20, "{more} bytes");
    });
}

/// A client that is up.
fn connected(program: &Program, src: IpAddr, name: &str) -> Client {
    let mut client = client(program, src, name);
    client.dial_all().unwrap();
    come_up(&mut client);
    client
}

/// All its connections are there.
fn come_up(client: &mut Client) {
    let info = client.opts.info_req();
    client.send_info(info.as_bytes()).unwrap();
    client.wait_info().unwrap();
}

#[test]
fn keys_of_others_open_nothing() {
    let program = Program::start(&json!({}));
    let mut owner = connected(&program, program.ip(2), "owner");
    let mut thief = connected(&program, program.ip(100), "thief");
    let (own, of_owner) = (thief.chunk(3), owner.chunk(3));
    thief.write_memory(0, own.addr, own.rkey, &[1; 64]).unwrap();
    thief.pump_for(Duration::from_millis(100));
    assert!(thief.is_up(), "its own key is good");
    thief.write_memory(0, of_owner.addr, of_owner.rkey, &[2; 64]).unwrap();
    assert!(thief.wait_closed(patience()), "the key of another client must break the connection");
    owner.sess_info().unwrap();
}

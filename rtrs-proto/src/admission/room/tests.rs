//! Attackers and bystanders.

use super::super::tests::{admit, info, ip, request, table};
use super::super::{CloseReason, Limits, PathId, PathState, Refusal, Resource, SessionTable};
use crate::errno::Errno;
use crate::handshake::ConnectRequest;
use crate::wire::Uuid;
use quota::Over;

/// Session and path number `n`, of one connection.
fn nth(n: u16) -> ConnectRequest {
    let mut uuid = [0; 16];
    uuid[..2].copy_from_slice(&n.to_le_bytes());
    ConnectRequest { path_uuid: Uuid(uuid), session_uuid: Uuid(uuid), ..request(0, 0, 0, 1) }
}

/// What a driver does with paths that had to make room.
fn close(t: &mut SessionTable, evicted: &[PathId]) {
    for id in evicted {
        assert_eq!(t.path(*id).unwrap().state, PathState::Closing);
        t.path_closed(*id).unwrap();
    }
}

/// A path of one connection that is proved and not up.
fn half_open(t: &mut SessionTable, now: u64, n: u16, src: u8) -> Result<PathId, Refusal> {
    let a = admit(t, now, &nth(n), src, 0)?;
    close(t, &a.evicted);
    match t.prove(a.path) {
        Ok(evicted) => close(t, &evicted),
        Err(refusal) => {
            t.begin_close(a.path);
            t.path_closed(a.path);
            return Err(refusal);
        }
    }
    Ok(a.path)
}

fn up(t: &mut SessionTable, n: u16, src: u8) -> Result<PathId, Refusal> {
    let path = half_open(t, 0, n, src)?;
    t.info_req(path, &info(&format!("s{n}"))).unwrap();
    Ok(path)
}

fn used(t: &SessionTable, what: Resource) -> u64 {
    t.in_use().find(|(w, ..)| *w == what).unwrap().1
}

#[test]
fn requests_in_the_names_of_others_cost_nobody_anything() {
    let mut t = table(Limits { max_sessions: 4, max_unproved: 8, ..Limits::default() });
    let bystander = admit(&mut t, 0, &nth(0), 1, 0).unwrap();
    for n in 1..8 {
        assert_eq!(admit(&mut t, 1, &nth(n), n as u8 + 1, 0).unwrap().evicted, []);
    }
    assert_eq!(used(&t, Resource::Sessions), 0);
    let one_more = admit(&mut t, 1, &nth(100), 100, 0).unwrap();
    assert_eq!(one_more.evicted, [bystander.path], "the oldest goes");
    close(&mut t, &one_more.evicted);
    let again = admit(&mut t, 2, &nth(0), 1, 0).unwrap();
    close(&mut t, &again.evicted);
    assert_eq!(t.prove(again.path), Ok(vec![]), "its answer came in time");
    for n in 200..300 {
        let evicted = admit(&mut t, 3, &nth(n), (n % 100) as u8, 0).unwrap().evicted;
        assert!(!evicted.contains(&again.path));
        close(&mut t, &evicted);
    }
}

#[test]
fn one_source_pushes_out_its_own_requests_first() {
    let mut t = table(Limits { max_unproved: 8, ..Limits::default() });
    let bystander = admit(&mut t, 0, &nth(0), 1, 0).unwrap();
    for n in 1..100 {
        let a = admit(&mut t, 1, &nth(n), 2, 0).unwrap();
        assert!(!a.evicted.contains(&bystander.path));
        close(&mut t, &a.evicted);
    }
}

#[test]
fn strangers_do_not_push_out_known_clients() {
    let mut t = table(Limits { max_unproved: 2, ..Limits::default() });
    t.remember(ip(1));
    let known = admit(&mut t, 0, &nth(0), 1, 0).unwrap();
    let named = t.admit(0, &nth(1), ip(2), ip(0), true).unwrap();
    assert_eq!(admit(&mut t, 1, &nth(2), 3, 0), Err(Refusal::Unproved(2)));
    let next = t.admit(1, &nth(3), ip(2), ip(0), true).unwrap();
    assert!(next.evicted == [known.path] || next.evicted == [named.path]);
}

#[test]
fn teardown_that_does_not_follow_is_bounded() {
    let mut t = table(Limits { max_unproved: 2, ..Limits::default() });
    for n in 0..4 {
        admit(&mut t, 0, &nth(n), 1, 0).unwrap();
    }
    assert_eq!(admit(&mut t, 0, &nth(4), 2, 0), Err(Refusal::Unproved(2)));
    assert_eq!(t.connections(), 4);
}

#[test]
fn half_open_sessions_give_way() {
    let mut t = table(Limits { max_sessions: 8, ..Limits::default() });
    let stays = up(&mut t, 0, 1).unwrap();
    let mine = half_open(&mut t, 5, 1, 1).unwrap();
    for n in 10..50 {
        half_open(&mut t, u64::from(n), n, 2).unwrap();
        assert!(used(&t, Resource::Sessions) <= 7, "the last is for known clients");
    }
    assert_eq!(t.paths().filter(|p| p.src == ip(2)).count(), 4, "its share");
    for src in 3..20 {
        half_open(&mut t, 100, 100 + u16::from(src), src).unwrap();
    }
    assert_eq!(t.path(stays).unwrap().state, PathState::Up);
    assert!(t.path(mine).is_none_or(|p| p.state == PathState::Connecting));
    up(&mut t, 1000, 200).unwrap();
}

#[test]
fn the_share_of_one_address_is_what_it_may_keep() {
    let mut t = table(Limits { max_sessions: 8, ..Limits::default() });
    for n in 0..4 {
        up(&mut t, n, 1).unwrap();
    }
    let limit = Limits { max_sessions: 8, ..Limits::default() }.of(Resource::Sessions);
    let refusal = Refusal::Limit(Resource::Sessions, Over::Share, limit);
    assert_eq!(up(&mut t, 4, 1), Err(refusal));
    assert_eq!(refusal.errno(), Errno::ENOMEM);
    assert_eq!(refusal.to_string(), "one address may have 4 of 8 sessions");
    up(&mut t, 4, 2).unwrap();
}

#[test]
fn the_last_places_are_for_known_clients() {
    let mut t = table(Limits { max_sessions: 8, ..Limits::default() });
    for n in 0..7 {
        up(&mut t, n, n as u8 / 4).unwrap();
    }
    let refusal = up(&mut t, 7, 9).unwrap_err();
    assert!(matches!(refusal, Refusal::Limit(Resource::Sessions, Over::Reserved, _)), "{refusal}");
    t.remember(ip(9));
    up(&mut t, 7, 9).unwrap();
    t.remember(ip(10));
    let refusal = up(&mut t, 8, 10).unwrap_err();
    assert_eq!(refusal.to_string(), "limit of 8 sessions reached");
}

#[test]
fn connections_of_proved_paths_count() {
    let limits = Limits { max_connections: 8, share_percent: 50, ..Limits::default() };
    let mut t = table(limits);
    let a = admit(&mut t, 0, &request(1, 1, 0, 6), 1, 0).unwrap();
    t.prove(a.path).unwrap();
    for cid in 1..4 {
        admit(&mut t, 0, &request(1, 1, cid, 6), 1, 0).unwrap();
    }
    let refusal = admit(&mut t, 0, &request(1, 1, 4, 6), 1, 0).unwrap_err();
    assert!(matches!(refusal, Refusal::Limit(Resource::Connections, Over::Share, _)));
    // Proved all at once.
    let b = admit(&mut t, 1, &request(2, 2, 0, 3), 2, 0).unwrap();
    admit(&mut t, 1, &request(2, 2, 1, 3), 2, 0).unwrap();
    admit(&mut t, 1, &request(2, 2, 2, 3), 2, 0).unwrap();
    assert_eq!(t.prove(b.path), Ok(vec![]));
    assert_eq!(used(&t, Resource::Connections), 7);
    let c = admit(&mut t, 2, &request(3, 3, 0, 1), 3, 0).unwrap();
    assert_eq!(t.prove(c.path), Ok(vec![a.path]), "four connections against three");
}

#[test]
fn chunks_count_when_a_path_comes_up() {
    let limits = Limits { max_memory: 1100, path_bytes: 200, connection_bytes: 1, ..Limits::default() };
    let mut t = table(limits);
    up(&mut t, 0, 1).unwrap();
    up(&mut t, 1, 1).unwrap();
    let refusal = half_open(&mut t, 0, 2, 1).unwrap_err();
    assert!(matches!(refusal, Refusal::Limit(Resource::Memory, Over::Share, _)), "{refusal}");
    let (a, b) = (half_open(&mut t, 0, 3, 2).unwrap(), half_open(&mut t, 0, 4, 3).unwrap());
    up(&mut t, 5, 4).unwrap();
    t.info_req(a, &info("a")).unwrap();
    let refused = t.info_req(b, &info("b")).unwrap_err();
    assert!(matches!(refused, CloseReason::Memory(Over::Reserved, _)), "{refused}");
    assert_eq!(used(&t, Resource::Memory), 4 * 201 + 1);
}

#[test]
fn a_small_budget_lets_one_client_in() {
    let limits = Limits { max_memory: 150, path_bytes: 66, connection_bytes: 1, ..Limits::default() };
    let mut t = table(limits);
    let a = admit(&mut t, 0, &request(1, 1, 0, 60), 1, 0).unwrap();
    t.prove(a.path).unwrap();
    for cid in 1..60 {
        admit(&mut t, 0, &request(1, 1, cid, 60), 1, 0).unwrap();
    }
    t.info_req(a.path, &info("s")).unwrap();
    assert!(half_open(&mut t, 0, 2, 2).is_err(), "there is no room for another");
}

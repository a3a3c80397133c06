use super::*;

const SEC: u64 = 1_000_000_000;

pub(super) fn table(limits: Limits) -> SessionTable {
    SessionTable::new(limits)
}

pub(super) fn ip(n: u8) -> IpAddr {
    [10, 0, 0, n].into()
}

/// A request of a client at address `src` to address `dst`.
pub(super) fn admit(
    t: &mut SessionTable,
    now: u64,
    request: &ConnectRequest,
    src: u8,
    dst: u8,
) -> Result<Admitted, Refusal> {
    t.admit(now, request, ip(src), ip(dst), false)
}

pub(super) fn request(session: u8, path: u8, cid: u16, cid_num: u16) -> ConnectRequest {
    ConnectRequest {
        cid,
        cid_num,
        recon_cnt: 1,
        path_uuid: Uuid([path; 16]),
        session_uuid: Uuid([session; 16]),
        first_conn: true,
    }
}

pub(super) fn info(name: &str) -> Vec<u8> {
    let mut bytes = vec![0; 272];
    bytes[2..2 + name.len()].copy_from_slice(name.as_bytes());
    bytes
}

/// Connects all cids of a path and brings it up.
fn bring_up(
    t: &mut SessionTable,
    session: u8,
    path: u8,
    name: &str,
) -> (PathId, Result<PathUp, CloseReason>) {
    let a = admit(t, 0, &request(session, path, 0, 2), path, 0).unwrap();
    admit(t, 0, &request(session, path, 1, 2), path, 0).unwrap();
    (a.path, t.info_req(a.path, &info(name)))
}

fn errno(r: Result<Admitted, Refusal>) -> Errno {
    r.unwrap_err().errno()
}

#[test]
fn one_path_comes_and_goes() {
    let mut t = table(Limits::default());
    let a = admit(&mut t, 0, &request(1, 1, 0, 2), 7, 8).unwrap();
    assert!(a.new_session && a.new_path);
    let b = admit(&mut t, 0, &request(1, 1, 1, 2), 7, 8).unwrap();
    assert_eq!((b.new_session, b.new_path, b.path, b.session), (false, false, a.path, a.session));
    let up = t.info_req(a.path, &info("s1")).unwrap();
    assert_eq!(up, PathUp { session: a.session, name: "s1".into(), first_of_session: true, evicted: vec![] });
    assert_eq!(t.session(a.session).unwrap().name, Some("s1"));
    assert!(t.begin_close(a.path));
    assert!(!t.begin_close(a.path), "only the first caller tears down");
    let closed = t.path_closed(a.path).unwrap();
    assert_eq!(closed, PathClosed { session: a.session, connections: 2, last_up: true, session_gone: true });
    assert_eq!((t.path_closed(a.path), t.connections(), t.sessions().count()), (None, 0, 0));
}

#[test]
fn a_later_path_needs_its_session() {
    let mut t = table(Limits::default());
    let r = ConnectRequest { first_conn: false, ..request(1, 1, 0, 1) };
    assert_eq!(errno(admit(&mut t, 0, &r, 1, 1)), Errno::ENXIO);
    bring_up(&mut t, 1, 2, "s").1.unwrap();
    assert!(!admit(&mut t, 0, &r, 1, 1).unwrap().new_session);
}

#[test]
fn a_known_path_must_be_connecting() {
    let mut t = table(Limits::default());
    let (path, up) = bring_up(&mut t, 1, 1, "s");
    up.unwrap();
    assert_eq!(errno(admit(&mut t, 0, &request(1, 1, 0, 2), 1, 0)), Errno::ECONNRESET);
    t.begin_close(path);
    let refusal = admit(&mut t, 0, &request(1, 1, 0, 2), 1, 0).unwrap_err();
    assert_eq!(refusal, Refusal::NotConnecting(path, PathState::Closing));
    t.path_closed(path);
    assert!(admit(&mut t, 0, &request(1, 1, 0, 2), 1, 0).unwrap().new_session);
}

#[test]
fn cids_of_a_path_must_agree_and_differ() {
    let mut t = table(Limits::default());
    admit(&mut t, 0, &request(1, 1, 0, 3), 1, 0).unwrap();
    assert_eq!(admit(&mut t, 0, &request(1, 1, 1, 4), 1, 0), Err(Refusal::CidNum { got: 4, had: 3 }));
    assert_eq!(admit(&mut t, 0, &request(1, 1, 0, 3), 1, 0), Err(Refusal::CidTaken(0)));
    admit(&mut t, 0, &request(1, 1, 2, 3), 1, 0).unwrap();
    assert_eq!(t.connections(), 2, "refusals count nothing");
}

#[test]
fn one_path_per_pair_of_addresses() {
    let mut t = table(Limits::default());
    let first = admit(&mut t, 0, &request(1, 1, 0, 1), 7, 8).unwrap();
    assert_eq!(admit(&mut t, 0, &request(1, 2, 0, 1), 7, 8), Err(Refusal::Addresses(first.path)));
    assert_eq!(errno(admit(&mut t, 0, &request(1, 2, 0, 1), 7, 8)), Errno::EEXIST);
    admit(&mut t, 0, &request(1, 2, 0, 1), 7, 9).unwrap();
    admit(&mut t, 0, &request(2, 1, 0, 1), 7, 8).unwrap();
}

#[test]
fn a_session_has_at_most_128_paths() {
    let mut t = table(Limits { max_paths: 1024, ..Limits::default() });
    for path in 0..128 {
        let a = admit(&mut t, 0, &request(1, path, 0, 1), path, 0).unwrap();
        t.prove(a.path).unwrap();
    }
    assert_eq!(admit(&mut t, 0, &request(1, 128, 0, 1), 128, 0), Err(Refusal::Paths));
}

#[test]
fn a_path_of_too_many_connections_is_refused() {
    let mut t = table(Limits { max_cid_num: 8, ..Limits::default() });
    let refusal = admit(&mut t, 0, &request(1, 2, 0, 9), 2, 0).unwrap_err();
    assert_eq!(refusal, Refusal::TooManyCids { got: 9, most: 8 });
    assert_eq!(refusal.errno(), Errno::ENOMEM);
}

#[test]
fn a_path_has_one_pair_of_addresses() {
    let mut t = table(Limits::default());
    admit(&mut t, 0, &request(1, 1, 0, 3), 1, 0).unwrap();
    for (src, dst) in [(2, 0), (1, 9)] {
        let refusal = admit(&mut t, 0, &request(1, 1, 1, 3), src, dst).unwrap_err();
        assert_eq!(refusal, Refusal::OtherAddresses(ip(1), ip(0)));
    }
}

#[test]
fn info_req_needs_every_connection() {
    let mut t = table(Limits::default());
    let a = admit(&mut t, 0, &request(1, 1, 0, 2), 1, 0).unwrap();
    let want = CloseReason::Incomplete { have: 1, cid_num: 2 };
    assert_eq!(t.info_req(a.path, &info("s")), Err(want));
    assert_eq!(t.path(a.path).unwrap().state, PathState::Closing);
    assert_eq!(errno(admit(&mut t, 0, &request(1, 1, 1, 2), 1, 0)), Errno::ECONNRESET);
    let closed = t.path_closed(a.path).unwrap();
    assert_eq!((closed.last_up, closed.session_gone), (false, true));
}

#[test]
fn a_second_info_req_closes_the_path() {
    let mut t = table(Limits::default());
    let (path, _) = bring_up(&mut t, 1, 1, "s");
    assert_eq!(t.info_req(path, &info("s")), Err(CloseReason::State(PathState::Up)));
    assert!(t.path_closed(path).unwrap().last_up);
    assert_eq!(t.info_req(path, &info("s")), Err(CloseReason::Gone));
}

#[test]
fn a_name_belongs_to_one_client_until_its_paths_are_closed() {
    let mut t = table(Limits::default());
    let (old, up) = bring_up(&mut t, 1, 1, "host");
    up.unwrap();
    let (new, taken) = bring_up(&mut t, 2, 2, "host");
    assert_eq!(taken, Err(CloseReason::NameTaken("host".into())));
    t.path_closed(new);
    t.begin_close(old);
    let (new, taken) = bring_up(&mut t, 2, 2, "host");
    assert_eq!(taken, Err(CloseReason::NameTaken("host".into())));
    t.path_closed(new);
    t.path_closed(old);
    bring_up(&mut t, 2, 2, "host").1.unwrap();
}

#[test]
fn malformed_info_req_closes_the_path() {
    let mut t = table(Limits::default());
    let (path, result) = bring_up(&mut t, 1, 1, "a.b");
    assert!(matches!(result, Err(CloseReason::Message(BadInfoReq::Name(_)))));
    assert_eq!(t.path(path).unwrap().state, PathState::Closing);
}

#[test]
fn the_upper_session_lives_from_first_to_last_path() {
    let mut t = table(Limits::default());
    let (a, up) = bring_up(&mut t, 1, 1, "s");
    assert!(up.unwrap().first_of_session);
    let (b, up) = bring_up(&mut t, 1, 2, "s");
    assert!(!up.unwrap().first_of_session);
    let half = admit(&mut t, 0, &request(1, 3, 0, 2), 3, 0).unwrap();
    t.begin_close(a);
    assert!(!t.path_closed(a).unwrap().last_up);
    let closed = t.path_closed(b).unwrap();
    assert_eq!((closed.last_up, closed.session_gone), (true, false), "a half-open path keeps the chunks");
    admit(&mut t, 0, &request(1, 3, 1, 2), 3, 0).unwrap();
    assert!(t.info_req(half.path, &info("s")).unwrap().first_of_session);
}

#[test]
fn half_open_paths_expire_and_others_do_not() {
    let mut t = table(Limits { half_open_ns: 30 * SEC, ..Limits::default() });
    let (up, _) = bring_up(&mut t, 1, 1, "s");
    assert_eq!(t.deadline(), None);
    let half = admit(&mut t, SEC, &request(1, 2, 0, 3), 2, 0).unwrap();
    admit(&mut t, 2 * SEC, &request(1, 2, 1, 3), 2, 0).unwrap();
    t.prove(half.path).unwrap();
    assert_eq!(t.deadline(), Some(31 * SEC), "nothing prolongs it");
    assert_eq!(t.expired(31 * SEC - 1).count(), 0);
    assert_eq!(t.expired(31 * SEC).collect::<Vec<_>>(), [half.path]);
    t.begin_close(half.path);
    assert_eq!((t.expired(u64::MAX).count(), t.deadline()), (0, None));
    assert_eq!(t.path(up).unwrap().state, PathState::Up);
}

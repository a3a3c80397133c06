//! Who is who, as far as addresses and names can tell.

use super::*;
use zerocopy::IntoBytes;

const ALICE: u8 = 2;
const ALICES_OTHER: u8 = 3;
const EVE: u8 = 66;

/// "disk" for alice's two addresses, "open" for everybody.
fn target() -> Target {
    Target::start(|network, _| {
        let ip = |last| IpAddr::from(test_support::address(network, last));
        let alice = |last| json!({"session": "alice", "addr": ip(last).to_string()});
        vec![
            malloc("Disk"),
            malloc("Open"),
            export("disk", "Disk", json!([alice(ALICE), alice(ALICES_OTHER)])),
            export("open", "Open", json!([])),
        ]
    })
}

/// Everybody's.
fn open_target(options: Value) -> Target {
    Target::start(|_, _| {
        vec![call("rnbd_set_options", options), malloc("Open"), export("open", "Open", json!([]))]
    })
}

#[test]
fn a_path_from_elsewhere_does_not_join() {
    let t = target();
    let mut alice = t.connect("alice", ALICE);
    let disk = open(&mut alice, "disk", 1).unwrap();
    // Whoever has heard the session's uuid and name, which go over the wire in clear text.
    let stolen = alice.opts.another_path(t.address(EVE));
    turned_away(t.try_connect(stolen.clone()));
    turned_away(t.try_connect(Opts { first_conn: true, ..stolen }));
    // Nor as one more connection of a path, for which its uuid would do.
    let half = Opts { cid_num: 2, ..alice.opts.another_path(t.address(ALICES_OTHER)) };
    let dst = SocketAddr::new(t.address(1), 1234);
    let mut other = Client::new(soft_roce::open().unwrap(), dst, half.clone());
    other.dial(half.conn_req(0).as_bytes()).unwrap();
    let mut eve =
        Client::new(soft_roce::open().unwrap(), dst, Opts { src: Some(t.address(EVE)), ..half.clone() });
    let refused = eve.dial(half.conn_req(1).as_bytes());
    assert!(matches!(refused, Err(ConnectError::Rejected(_))), "{refused:?}");
    // It is as if nobody had tried.
    other.dial(half.conn_req(1).as_bytes()).unwrap();
    other.send_info(half.info_req().as_bytes()).unwrap();
    other.wait_info().unwrap();
    use_disk(&mut other, disk, 3);
    use_disk(&mut alice, disk, 4);
    assert_eq!(t.session("alice")["paths"].as_array().unwrap().len(), 2);
    assert_eq!(t.session("alice")["allowed_by"], "name and address");
}

/// The entry has no address, but another export of the session's has: every path counts for each device.
#[test]
fn a_path_must_fit_what_the_session_has_open() {
    let t = Target::start(|network, _| {
        let near = |last| addr(test_support::address(network, last).into());
        vec![
            malloc("A"),
            malloc("B"),
            export("both", "A", json!([near(ALICE), near(ALICES_OTHER)])),
            export("one", "B", json!([near(ALICE)])),
        ]
    });
    let mut first = t.connect("alice", ALICE);
    open(&mut first, "one", 1).unwrap();
    turned_away(t.try_connect(first.opts.another_path(t.address(ALICES_OTHER))));
    // Without it the other address is welcome; and then the first one's disk is not for the session.
    t.rpc("rnbd_force_close", json!({"session": "alice", "device_path": "one"}));
    until("it is closed", || t.session("alice")["devices"] == json!([]));
    let _second = t.try_connect(first.opts.another_path(t.address(ALICES_OTHER))).unwrap();
    open(&mut first, "both", 1).unwrap();
    assert_eq!(open(&mut first, "one", 1), Err(Errno::EACCES));
}

#[test]
fn whom_an_entry_names_gets_the_name_from_a_squatter() {
    let t = target();
    let mut eve = t.connect("alice", EVE);
    let device = open(&mut eve, "open", 1).unwrap();
    use_disk(&mut eve, device, 1);
    assert_eq!(open(&mut eve, "disk", 0), Err(Errno::EACCES));
    assert_eq!(t.session("alice")["allowed_by"], "nothing");

    // Once, without trying again.
    let mut alice = t.connect("alice", ALICE);
    assert!(eve.wait_closed(patience()), "the squatter's session ends");
    let disk = open(&mut alice, "disk", 1).unwrap();
    use_disk(&mut alice, disk, 2);
    // What the squatter had open is free.
    open(&mut alice, "open", 1).unwrap();

    turned_away(t.try_connect(t.opts("alice", EVE)));
    turned_away(t.try_connect(eve.opts.clone()));
    use_disk(&mut alice, disk, 3);
    // Of the same right, the first one has it.
    turned_away(t.try_connect(t.opts("alice", ALICES_OTHER)));
    use_disk(&mut alice, disk, 4);
}

/// Several who are in the right come at once: one gets the name.
#[test]
fn one_of_several_claimants_gets_the_name() {
    let t = target();
    let mut eve = t.connect("alice", EVE);
    let results = std::thread::scope(|scope| {
        let claim = |last| {
            let t = &t;
            scope.spawn(move || t.try_connect(t.opts("alice", last)))
        };
        [claim(ALICE), claim(ALICES_OTHER)].map(|claim| claim.join().unwrap())
    });
    assert!(eve.wait_closed(patience()));
    let (up, away): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((up.len(), away.len()), (1, 1));
    away.into_iter().for_each(turned_away);
    let mut alice = up.into_iter().next().unwrap().unwrap();
    let disk = open(&mut alice, "disk", 1).unwrap();
    use_disk(&mut alice, disk, 2);
}

/// Somebody was first with the uuid that a client will come back with.
#[test]
fn whom_an_entry_names_gets_the_session_from_a_squatter() {
    let t = target();
    let opts = t.opts("alice", ALICE);
    let mut eve = t.try_connect(Opts { src: Some(t.address(EVE)), ..opts.clone() }).unwrap();
    open(&mut eve, "open", 1).unwrap();
    // A client tries again, as each does that has lost its session.
    let mut alice = until_some("the session is alice's", || {
        t.try_connect(Opts { path_uuid: test_client::opts::random_uuid(), ..opts.clone() }).ok()
    });
    assert!(eve.wait_closed(patience()));
    let disk = open(&mut alice, "disk", 1).unwrap();
    use_disk(&mut alice, disk, 2);
}

#[test]
fn a_path_says_the_name_of_its_session() {
    let t = open_target(json!({}));
    let mut client = t.connect("one", ALICE);
    let path = client.opts.another_path(t.address(ALICES_OTHER));
    turned_away(t.try_connect(Opts { sessname: b"two".into(), ..path.clone() }));
    // Who does, is welcome: clients with several ports have several addresses.
    let mut second = t.try_connect(path).unwrap();
    let device = open(&mut client, "open", 1).unwrap();
    use_disk(&mut second, device, 9);
    assert!(client.is_up());
}

#[test]
fn sessions_can_be_bound_to_their_address() {
    let t = open_target(json!({"bind_sessions": true}));
    assert_eq!(t.options()["bind_sessions"], true);
    let mut client = t.connect("one", ALICE);
    turned_away(t.try_connect(client.opts.another_path(t.address(EVE))));
    let device = open(&mut client, "open", 1).unwrap();
    use_disk(&mut client, device, 9);
}

/// Without entries nobody can tell who is right: the first one has the name, and keeps it.
#[test]
fn a_name_without_entries_is_the_first_ones() {
    let t = open_target(json!({}));
    let mut first = t.connect("one", ALICE);
    turned_away(t.try_connect(t.opts("one", EVE)));
    let device = open(&mut first, "open", 1).unwrap();
    use_disk(&mut first, device, 9);
}

//! Names: nothing is open that nobody opened.

use super::*;

const ALICE: u8 = 2;
const BOB: u8 = 3;

#[test]
fn what_another_front_end_exports_is_not_rnbds() {
    let t = Target::start(|_, dir| {
        vec![
            malloc("Nbd"),
            malloc("Vhost"),
            malloc("Bare"),
            call("nbd_server_create_export", json!({"name": "n", "bdev_name": "Nbd", "allow": [{"uid": 0}]})),
            call("vhost_create_blk_controller", json!({"ctrlr": dir.join("v.sock"), "dev_name": "Vhost"})),
        ]
    });
    for device in ["Nbd", "Vhost", "Bare", "/Nbd", "//Nbd"] {
        for mode in [0, 1, 2] {
            assert_eq!(t.open("eve", BOB, device, mode), Err(Errno::ENOENT), "{device} {mode}");
        }
    }
    assert_eq!(t.rpc("rnbd_get_name_space", Value::Null)["bdevs"], json!([]));
}

#[test]
fn offered_bdevs_are_those_that_nobody_uses() {
    let t = Target::start_with(|network, dir| {
        let file = |name: &str, path| {
            call(
                "bdev_aio_create",
                json!({"name": name, "filename": path, "block_size": 512, "readonly": true}),
            )
        };
        let image = dir.file("image", 1 << 20);
        std::fs::hard_link(&image, dir.join("link")).unwrap();
        vec![
            call("rnbd_set_options", json!({"offer_bdevs": true})),
            file("Image", image),
            file("Twin", dir.join("link")),
            export("image", "Image", json!([{"session": "alice"}])),
            malloc("Nbd"),
            malloc("Base"),
            malloc("Mine"),
            malloc("Free"),
            call("nbd_server_create_export", json!({"name": "n", "bdev_name": "Nbd", "read_only": true})),
            call(
                "bdev_delay_create",
                json!({"base_bdev_name": "Base", "name": "Layer", "avg_read_latency": 1,
                    "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1}),
            ),
            export("mine", "Mine", json!([{"session": "alice"}])),
            listener(network),
        ]
    });
    t.rpc("framework_wait_init", Value::Null);
    let uuid = |bdev: &str| t.rpc("bdev_get_bdevs", json!({"name": bdev}))[0]["aliases"][0].clone();
    for bdev in ["Nbd", "Base", "Mine", "Image", "Twin"] {
        for device in [bdev, uuid(bdev).as_str().unwrap()] {
            for mode in [0, 1] {
                assert_eq!(t.open("eve", BOB, device, mode), Err(Errno::EACCES), "{device} {mode}");
            }
        }
    }
    for device in ["Free", "Layer", uuid("Free").as_str().unwrap()] {
        assert_eq!(t.open("eve", BOB, device, 1), Ok(()), "{device}");
    }
    let offered = t.rpc("rnbd_get_name_space", Value::Null);
    let names: Vec<&str> =
        offered["bdevs"].as_array().unwrap().iter().map(|b| b["bdev_name"].as_str().unwrap()).collect();
    assert_eq!((names, &offered["bdevs_offered"]), (vec!["Free", "Layer"], &json!(true)));
    assert_eq!(t.options()["offer_bdevs"], true);
}

/// An export names its bdev by an alias, and so does who would go past it.
#[test]
fn an_export_holds_by_whatever_name() {
    let uuid = "7f5a2b4e-9b1c-4a5e-8f64-0a1b2c3d4e5f";
    let mut disk = malloc("Disk");
    disk["params"]["uuid"] = uuid.into();
    let t = Target::start_with(|network, _| {
        vec![
            call("rnbd_set_options", json!({"offer_bdevs": true})),
            disk,
            call("rnbd_create_export", json!({"device_path": "ro", "bdev_name": uuid, "read_only": true})),
            export("alices", uuid, json!([addr(test_support::address(network, ALICE).into())])),
            listener(network),
        ]
    });
    t.rpc("framework_wait_init", Value::Null);
    assert_eq!(t.open("alice", ALICE, "alices", 1), Ok(()));
    for device in ["Disk", uuid, "alices"] {
        assert_eq!(t.open("bob", BOB, device, 0), Err(Errno::EACCES), "{device}");
    }
    assert_eq!(t.open("bob", BOB, "ro", 0), Ok(()));
    assert_eq!(t.open("bob", BOB, "ro", 1), Err(Errno::EROFS));
}

#[test]
fn the_first_export_ends_the_offer_of_bdevs_and_closes_nothing() {
    let t = Target::start(|_, _| vec![malloc("M0"), malloc("M1")]);
    let mut early = t.connect("early", BOB);
    let device = open(&mut early, "M0", 1).unwrap();
    let row = t.session("early")["devices"][0].clone();
    assert_eq!((&row["opened_by"], &row["offered"]), (&json!("bdev_name"), &json!(true)));
    assert!(t.options()["offer_bdevs"].is_null());

    t.make(export("m1", "M1", json!([addr(t.address(ALICE))])));
    use_disk(&mut early, device, 7);
    assert_eq!(t.session("early")["devices"][0]["offered"], false);
    for device in ["M0", "M1"] {
        assert_eq!(t.open("late", BOB, device, 0), Err(Errno::ENOENT), "{device}");
    }
    let row = t.rpc("rnbd_get_exports", json!({}))[0].clone();
    assert_eq!((&row["open_to"], &row["opens"]), (&json!("addresses"), &json!([])));
    // What is withheld once is not offered because somebody deletes an export, nor by the next run.
    t.rpc("rnbd_delete_export", json!({"device_path": "m1"}));
    assert_eq!(t.open("late", BOB, "M1", 0), Err(Errno::ENOENT));
    assert_eq!(t.options()["offer_bdevs"], false);
    t.rpc("rnbd_force_close", json!({"session": "early", "device_path": "M0"}));
    until("the device is closed", || t.session("early")["devices"] == json!([]));
    assert_eq!(open(&mut early, "M0", 1), Err(Errno::ENOENT));
}

/// Of any front end, and however it comes about.
#[test]
fn every_front_end_ends_the_offer_of_bdevs() {
    let by = |calls: &dyn Fn(&Target) -> Vec<Value>| {
        let t = Target::start(|_, _| vec![malloc("M0"), malloc("M1")]);
        assert_eq!(t.open("eve", BOB, "M0", 1), Ok(()));
        calls(&t).into_iter().for_each(|call| t.make(call));
        assert_eq!(t.open("eve", BOB, "M0", 1), Err(Errno::ENOENT));
    };
    by(&|_| vec![export("m1", "M1", json!([]))]);
    by(&|_| vec![call("nbd_server_create_export", json!({"name": "n", "bdev_name": "M1"}))]);
    by(&|t| {
        let socket = t.dir.join("v.sock");
        vec![call("vhost_create_blk_controller", json!({"ctrlr": socket, "dev_name": "M1"}))]
    });
}

/// The listener is there first, then a client, then the layer whose base it asked for.
#[test]
fn nobody_opens_anything_before_the_configuration_has_been_carried_out() {
    let wait = || call("bdev_get_bdevs", json!({"name": "Late", "timeout": 600_000}));
    let t = Target::start_with(|network, _| {
        vec![
            malloc("Base"),
            listener(network),
            wait(),
            call(
                "bdev_delay_create",
                json!({"base_bdev_name": "Base", "name": "Layer", "avg_read_latency": 1,
                    "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1}),
            ),
        ]
    });
    let listens = || {
        let listeners = t.try_rpc("rnbd_get_listeners", Value::Null);
        listeners.is_ok_and(|list| !list.as_array().unwrap().is_empty())
    };
    until("it listens", listens);
    let mut client = t.connect("early", BOB);
    // The OPEN is on its way before the test goes on: it is sent by the thread that pumps.
    let opening = std::thread::spawn(move || {
        let result = open(&mut client, "Base", 1).map(drop);
        (client, result)
    });
    std::thread::sleep(a_moment());
    assert_eq!(t.session("early")["devices"], json!([]));
    t.make(call("bdev_null_create", json!({"name": "Late", "num_blocks": 8, "block_size": 512})));
    let (client, result) = opening.join().unwrap();
    assert_eq!(result, Err(Errno::EACCES), "the layer has it");
    t.rpc("framework_wait_init", Value::Null);
    drop(client);
}

/// An export of the configuration waits for a server that is away: until then nobody gets bdevs for it.
#[test]
fn an_export_that_waits_for_its_bdev_counts() {
    let port = test_support::port();
    let t = Target::start(|_, _| {
        vec![
            malloc("M0"),
            call("bdev_nbd_create", json!({"name": "Remote", "uri": format!("nbd://127.0.0.1:{port}/x")})),
            export("remote", "Remote", json!([])),
        ]
    });
    assert_eq!(t.rpc("rnbd_get_exports", json!({})), json!([]), "it waits");
    assert_eq!(t.open("eve", BOB, "M0", 0), Err(Errno::ENOENT));
}

#[test]
fn files_are_read_only_and_below_their_directory() {
    let mut set = json!({"open_files": true});
    let t = Target::start(|_, dir| {
        let disks = dir.join("disks");
        std::fs::create_dir(&disks).unwrap();
        for name in ["image", "served"] {
            std::fs::File::create_new(disks.join(name)).unwrap().set_len(1 << 20).unwrap();
        }
        std::fs::write(dir.join("secret"), [1; 4096]).unwrap();
        std::fs::hard_link(disks.join("served"), disks.join("link")).unwrap();
        std::os::unix::fs::symlink("../secret", disks.join("out")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, disks.join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        set["dev_search_path"] = disks.to_str().unwrap().into();
        vec![
            call("rnbd_set_options", set),
            call(
                "bdev_aio_create",
                json!({"name": "Served", "filename": disks.join("served"), "readonly": true}),
            ),
            export("served-disk", "Served", json!([{"session": "alice"}])),
        ]
    });
    assert_eq!(t.open("eve", BOB, "image", 0), Ok(()));
    assert_eq!(t.open("eve", BOB, "/image", 0), Ok(()));
    for (device, mode, errno) in [
        ("image", 1, Errno::EROFS),
        ("image", 2, Errno::EROFS),
        ("served", 0, Errno::EACCES),
        ("link", 0, Errno::EACCES),
        ("out", 0, Errno::EACCES),
        ("../secret", 0, Errno::EINVAL),
        ("pipe", 0, Errno::ENOTBLK),
        ("nothing", 0, Errno::ENOENT),
    ] {
        assert_eq!(t.open("eve", BOB, device, mode), Err(errno), "{device}");
    }
    assert_eq!(t.rpc("bdev_get_bdevs", json!({})).as_array().unwrap().len(), 1, "files are let go of");
    let below = format!("{}/", t.dir.join("disks").display());
    assert_eq!(
        t.rpc("rnbd_get_name_space", Value::Null)["files"],
        json!({"below": below, "read_only": true})
    );
    assert_eq!(t.options()["open_files_read_only"], true);
}

#[test]
fn files_are_written_where_the_operator_says_so() {
    let t = Target::start(|_, dir| {
        dir.file("image", 1 << 20);
        let set = json!({"open_files": true, "open_files_read_only": false, "dev_search_path": dir.path()});
        vec![call("rnbd_set_options", set)]
    });
    let mut client = t.connect("alice", ALICE);
    let device = open(&mut client, "image", 1).unwrap();
    use_disk(&mut client, device, 5);
    assert_eq!(t.session("alice")["devices"][0]["opened_by"], "file");
}

#[test]
fn the_root_directory_is_refused() {
    let refused = |set: Value| {
        let mut t = Target::start_with(|_, _| vec![call("rnbd_set_options", set.clone())]);
        let ended = t.thread.take().unwrap().join().unwrap();
        let text = ended.unwrap_err().to_string();
        assert!(text.contains("open_files needs a dev_search_path"), "{set}: {text}");
    };
    refused(json!({"open_files": true}));
    refused(json!({"open_files": true, "dev_search_path": "/"}));
    refused(json!({"open_files": true, "dev_search_path": "/%SESSNAME%"}));
}

//! Names, descriptors, claims, removal and events.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bdev::{
    Completions, Error, Event, Flags, IoRequest, Manager, Mode, Notice, Op, Segments, Status, malloc, null,
};

fn manager() -> Arc<Manager> {
    Manager::new(iobuf::Registry::new())
}

fn null(manager: &Arc<Manager>, name: Option<&str>) -> Result<String, Error> {
    let name = name.map(str::to_owned);
    null::create(
        manager,
        null::Params { name, num_blocks: 100, block_size: 512, physical_block_size: None, uuid: None },
    )
}

fn flush(cookie: u64) -> IoRequest {
    IoRequest { op: Op::Flush, flags: Flags::NONE, lba: 0, blocks: 0, segments: Segments::new(), cookie }
}

#[test]
fn names_are_unique_and_automatic_ones_fill_gaps() {
    let m = manager();
    assert_eq!(null(&m, None).unwrap(), "Null0");
    assert_eq!(null(&m, Some("Null1")).unwrap(), "Null1");
    assert_eq!(null(&m, None).unwrap(), "Null2");
    let twice = null(&m, Some("Null1")).unwrap_err();
    assert_eq!((twice.errno(), twice.to_string().contains("Null1 exists already")), (17, true), "{twice}");
    let names: Vec<_> = m.list().iter().map(|s| s.bdev.info().name.clone()).collect();
    assert_eq!(names, ["Null0", "Null1", "Null2"]);
    m.unregister("Null1", Box::new(|| ())).unwrap();
    assert_eq!(null(&m, None).unwrap(), "Null1");
}

#[test]
fn shapes_are_checked() {
    let m = manager();
    for (blocks, size) in
        [(0, 512), (1, 0), (1, 513), (1, 256), (1, 131072), (u64::MAX, 512), (1 << 60, 4096)]
    {
        let p = null::Params {
            name: None,
            num_blocks: blocks,
            block_size: size,
            physical_block_size: None,
            uuid: None,
        };
        let e = null::create(&m, p).unwrap_err();
        assert_eq!(e.errno(), 22, "{blocks} x {size}: {e}");
    }
    let p = null::Params {
        name: None,
        num_blocks: 1,
        block_size: 4096,
        physical_block_size: Some(512),
        uuid: None,
    };
    assert_eq!(null::create(&m, p).unwrap_err().errno(), 22);
    assert!(m.list().is_empty());
}

#[test]
fn removal_waits_for_the_last_user() {
    let m = manager();
    null(&m, Some("n")).unwrap();
    let events = Arc::new(AtomicU32::new(0));
    let seen = events.clone();
    let d = m
        .open(
            "n",
            Mode::ReadWrite,
            Box::new(move |e| {
                assert_eq!(e, Event::Removed);
                seen.fetch_add(1, SeqCst);
            }),
        )
        .unwrap();
    let mut channel = d.channel().unwrap();
    channel.submit(flush(1)).unwrap();
    let gone = Arc::new(AtomicU32::new(0));
    let g = gone.clone();
    m.unregister(
        "n",
        Box::new(move || {
            g.fetch_add(1, SeqCst);
        }),
    )
    .unwrap();
    assert_eq!((events.load(SeqCst), gone.load(SeqCst)), (1, 0));
    assert!(d.is_removed() && m.list().is_empty());
    assert!(matches!(m.open("n", Mode::ReadOnly, Box::new(|_| ())), Err(Error::NotFound { .. })));
    assert!(matches!(m.unregister("n", Box::new(|| ())), Err(Error::NotFound { .. })));
    assert!(matches!(null(&m, Some("n")), Err(Error::Exists { removing: true, .. })));
    // What was taken completes, what is new is refused.
    assert_eq!(channel.submit(flush(2)).unwrap_err().status, Status::Gone);
    let mut done = Completions::new();
    assert!(channel.poll(&mut done));
    assert_eq!((done.len(), done[0].cookie, done[0].status), (1, 1, Status::Ok));
    drop(d);
    assert_eq!(gone.load(SeqCst), 0, "the channel still uses it");
    drop(channel);
    assert_eq!(gone.load(SeqCst), 1);
    null(&m, Some("n")).unwrap();
}

#[test]
fn a_handler_may_drop_its_descriptor() {
    let m = manager();
    null(&m, Some("n")).unwrap();
    let cell = Arc::new(Mutex::new(None));
    let inner = cell.clone();
    let d = m.open("n", Mode::ReadWrite, Box::new(move |_| drop(inner.lock().unwrap().take()))).unwrap();
    *cell.lock().unwrap() = Some(d);
    let gone = Arc::new(AtomicU32::new(0));
    let g = gone.clone();
    m.unregister(
        "n",
        Box::new(move || {
            g.fetch_add(1, SeqCst);
        }),
    )
    .unwrap();
    assert_eq!(gone.load(SeqCst), 1);
}

#[test]
fn claims_keep_other_writers_out_and_name_the_holder() {
    let m = manager();
    null(&m, Some("n")).unwrap();
    let open = |mode| m.open("n", mode, Box::new(|_| ()));
    let other = open(Mode::ReadWrite).unwrap();
    let d = open(Mode::ReadWrite).unwrap();
    assert!(matches!(d.claim("delay bdev D"), Err(Error::Busy { .. })), "there is another writer");
    drop(other);
    d.claim("delay bdev D").unwrap();
    assert_eq!(m.status("n").unwrap().claim.unwrap().holder, "delay bdev D");
    let refused = open(Mode::ReadWrite).unwrap_err();
    assert!(refused.errno() == 16 && refused.to_string().contains("delay bdev D"), "{refused}");
    let reader = open(Mode::ReadOnly).unwrap();
    assert_eq!(reader.claim("x").unwrap_err().errno(), 22);
    drop(d);
    assert!(m.status("n").unwrap().claim.is_none());
    open(Mode::ReadWrite).unwrap().claim("y").unwrap();
}

#[test]
fn resize_reaches_users_and_channels() {
    let m = manager();
    let notices = Arc::new(Mutex::new(Vec::new()));
    let n = notices.clone();
    m.set_notify(move |notice, name| n.lock().unwrap().push((notice, name.to_owned())));
    null(&m, Some("n")).unwrap();
    let size = Arc::new(AtomicU64::new(0));
    let s = size.clone();
    let d = m
        .open(
            "n",
            Mode::ReadWrite,
            Box::new(move |e| {
                if let Event::Resized { blocks } = e {
                    s.store(blocks, SeqCst);
                }
            }),
        )
        .unwrap();
    let mut channel = d.channel().unwrap();
    let discard = IoRequest {
        op: Op::Discard,
        flags: Flags::NONE,
        lba: 100,
        blocks: 1,
        segments: Segments::new(),
        cookie: 7,
    };
    assert_eq!(channel.submit(discard.clone()).unwrap_err().status, Status::OutOfRange);
    null::resize(&m, "n", 101).unwrap();
    assert_eq!((size.load(SeqCst), d.blocks()), (101, 101));
    channel.submit(discard).unwrap();
    m.unregister("n", Box::new(|| ())).unwrap();
    let got: Vec<_> = notices.lock().unwrap().iter().map(|(n, _)| *n).collect();
    assert_eq!(got, [Notice::Registered, Notice::Resized, Notice::Unregistered]);
}

#[test]
fn methods_of_one_kind_refuse_another() {
    let m = manager();
    null(&m, Some("n")).unwrap();
    let e = m.delete::<malloc::Malloc>("n", Box::new(|| ())).unwrap_err();
    assert!(matches!(e, Error::WrongKind { product: "Null disk", .. }), "{e}");
    m.delete::<null::Null>("n", Box::new(|| ())).unwrap();
    assert!(matches!(m.get("n"), Err(Error::NotFound { .. })));
}

/// Opens, I/O and closes on some threads while another removes and makes the same names anew.
#[test]
fn opens_race_with_removals() {
    let m = manager();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let gone = Arc::new(AtomicU32::new(0));
    let mut made = 0;
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    for name in ["base", "EE_base"] {
                        let Ok(d) = m.open(name, Mode::ReadOnly, Box::new(|_| ())) else { continue };
                        let mut channel = d.channel().unwrap();
                        let mut done = Completions::new();
                        if channel.submit(flush(1)).is_ok() {
                            while !channel.poll(&mut done) {}
                        }
                        let _ = m.list();
                    }
                }
            });
        }
        let (begin, patience) = (Instant::now(), test_support::patience());
        while made < 1000 {
            assert!(begin.elapsed() < patience, "{made} rounds within {patience:?}");
            if null(&m, Some("base")).is_err() {
                continue;
            }
            made += 1;
            let layered = bdev::error::create(&m, "base", None);
            let g = gone.clone();
            let count = Box::new(move || {
                g.fetch_add(1, SeqCst);
            });
            m.unregister("base", count).unwrap();
            // The name of a layer from the round before may still be in use: then there was none this time.
            assert!(matches!(layered, Ok(_) | Err(Error::Exists { .. })), "{layered:?}");
        }
        stop.store(true, SeqCst);
    });
    assert_eq!((gone.load(SeqCst), m.list().len()), (made, 0));
}

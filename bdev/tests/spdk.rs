//! The contract of a bdev on SPDK's, and what is special about them. Run by `scripts/test-spdk.sh`, which says with what
//! memory (`SPDK_TEST_NO_HUGE`), and whether as if there were PCI devices (`SPDK_TEST_DEVICES`): the memory of the tests is none
//! that those could reach, as a guest's. SPDK can be started once in a process, so all tests share one.

mod common;
#[macro_use]
mod contract;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bdev::spdk::{self, Options, Port, Runtime};
use bdev::{Completions, Event, Manager, Mode, Op, Status};
use common::{Memory, Rig, SIZE, Setup, TempFile, pattern, request};
use iobuf::Registry;

/// A request for the app thread, and where the answer goes.
type Call = (String, Sender<String>);

static ENDING: AtomicBool = AtomicBool::new(false);
static ENDED: AtomicBool = AtomicBool::new(false);

unsafe extern "C" {
    safe fn abort() -> !;
    fn atexit(f: extern "C" fn()) -> i32;
}

/// Before the libraries' destructors: ends SPDK, or the process with an error.
extern "C" fn end() {
    ENDING.store(true, Ordering::Release);
    let start = Instant::now();
    while !ENDED.load(Ordering::Acquire) {
        if start.elapsed() > test_support::patience() {
            eprintln!("SPDK did not end: the tests have left something open");
            abort();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The thread that SPDK lives on, made at the first use.
fn app() -> Sender<Call> {
    static APP: OnceLock<Mutex<Sender<Call>>> = OnceLock::new();
    let sender = APP.get_or_init(|| {
        let (sender, calls) = channel::<Call>();
        let (started, ready) = channel();
        std::thread::Builder::new()
            .name("spdk-app".into())
            .spawn(move || {
                let no_huge = std::env::var_os("SPDK_TEST_NO_HUGE").is_some();
                let no_pci = std::env::var_os("SPDK_TEST_DEVICES").is_none();
                // No host has a device there, so none is touched.
                let pci_allowed = if no_pci { Vec::new() } else { vec!["ffff:ff:1f.7".into()] };
                let options = Options { no_huge, no_pci, pci_allowed, ..Options::default() };
                let mut runtime = Runtime::start(&options).unwrap();
                let mut port = Port::open().unwrap();
                runtime.init().unwrap();
                started.send(()).unwrap();
                while !ENDING.load(Ordering::Acquire) {
                    runtime.poll();
                    let Ok((request, answer)) = calls.recv_timeout(Duration::from_micros(50)) else {
                        continue;
                    };
                    // What was dropped before the call is closed first.
                    runtime.poll();
                    port.send(request.as_bytes());
                    let mut got = Vec::new();
                    while got.last() != Some(&b'\n') {
                        port.turn(&mut got).unwrap();
                        runtime.poll();
                    }
                    let _ = answer.send(String::from_utf8(got).unwrap());
                }
                drop(port);
                runtime.begin_finish();
                while !runtime.finished() {
                    runtime.poll();
                }
                assert!(runtime.stop(), "the tests have left something open");
                ENDED.store(true, Ordering::Release);
            })
            .unwrap();
        ready.recv().expect("SPDK starts");
        // SAFETY: registers a function that lives for ever.
        assert_eq!(unsafe { atexit(end) }, 0);
        Mutex::new(sender)
    });
    sender.lock().unwrap().clone()
}

/// The result of a method of SPDK.
fn call(method: &str, params: &str) -> String {
    let (sender, answer) = channel();
    let request = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}"#);
    app().send((request, sender)).unwrap();
    let answer = answer.recv().unwrap();
    assert!(!answer.contains("\"error\""), "{method} {params}: {answer}");
    answer
}

fn fresh(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{kind}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Calls a method when dropped, and deletes the file afterwards.
struct Undo(&'static str, String, #[expect(dead_code, reason = "dropped")] Option<TempFile>);

impl Drop for Undo {
    fn drop(&mut self) {
        call(self.0, &self.1);
    }
}

fn make_malloc(bytes: u64, block_size: u32) -> (String, Undo) {
    let name = fresh("M");
    let blocks = bytes / u64::from(block_size);
    call(
        "bdev_malloc_create",
        &format!(r#"{{"name":"{name}","num_blocks":{blocks},"block_size":{block_size}}}"#),
    );
    let undo = Undo("bdev_malloc_delete", format!(r#"{{"name":"{name}"}}"#), None);
    (name, undo)
}

fn malloc(block_size: u32) -> Setup {
    Setup::of(move |manager| {
        let (name, undo) = make_malloc(SIZE, block_size);
        (spdk::offer(manager, &name).unwrap(), Some(Box::new(undo) as _))
    })
    .bounded()
}

fn null(block_size: u32) -> Setup {
    Setup::of(move |manager| {
        let name = fresh("N");
        let blocks = SIZE / u64::from(block_size);
        call(
            "bdev_null_create",
            &format!(r#"{{"name":"{name}","num_blocks":{blocks},"block_size":{block_size}}}"#),
        );
        let undo = Undo("bdev_null_delete", format!(r#"{{"name":"{name}"}}"#), None);
        (spdk::offer(manager, &name).unwrap(), Some(Box::new(undo) as _))
    })
    .bounded()
    .without_data()
}

/// A thin volume on a store on a malloc bdev.
fn lvol() -> Setup {
    Setup::of(|manager| {
        let (base, below) = make_malloc(32 << 20, 512);
        let store = fresh("store");
        call(
            "bdev_lvol_create_lvstore",
            &format!(r#"{{"bdev_name":"{base}","lvs_name":"{store}","cluster_sz":65536}}"#),
        );
        let params =
            format!(r#"{{"lvs_name":"{store}","lvol_name":"v","size_in_mib":8,"thin_provision":true}}"#);
        call("bdev_lvol_create", &params);
        // The store first, and what it is on afterwards.
        let above = Undo("bdev_lvol_delete_lvstore", format!(r#"{{"lvs_name":"{store}"}}"#), None);
        spdk::offer(manager, &format!("{store}/v")).unwrap();
        (format!("{store}/v"), Some(Box::new((above, below)) as _))
    })
    .bounded()
}

fn aio(block_size: u32) -> Setup {
    Setup::of(move |manager| {
        let (name, file) = (fresh("A"), TempFile::new(SIZE));
        let path = file.path.display();
        call(
            "bdev_aio_create",
            &format!(r#"{{"name":"{name}","filename":"{path}","block_size":{block_size}}}"#),
        );
        let undo = Undo("bdev_aio_delete", format!(r#"{{"name":"{name}"}}"#), Some(file));
        (spdk::offer(manager, &name).unwrap(), Some(Box::new(undo) as _))
    })
    .bounded()
}

suite! {
    spdk_null => null(512);
    spdk_malloc_512 => malloc(512);
    spdk_malloc_4096 => malloc(4096);
    spdk_lvol => lvol();
    spdk_aio_512 => aio(512);
    spdk_aio_4096 => aio(4096);
    delay_over_spdk_malloc => Setup::delayed(malloc(512));
}

fn manager() -> Arc<Manager> {
    Manager::new(Registry::new())
}

fn soon(f: impl FnMut() -> bool) {
    test_support::until("something", f);
}

/// What SPDK removes leaves the manager, and SPDK waits for its users here.
#[test]
fn hot_removal() {
    let (manager, (name, undo)) = (manager(), make_malloc(SIZE, 512));
    spdk::offer(&manager, &name).unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let hear = Box::new(move |e| seen.lock().unwrap().push(e));
    let descriptor = manager.open(&name, Mode::ReadWrite, hear).unwrap();
    let mut channel = descriptor.channel().unwrap();
    let memory = Memory::scattered(&[512], 0);
    channel.submit(request(Op::Read, 0, 1).with(&memory).io(1)).unwrap();
    let removal = std::thread::spawn(move || drop(undo));
    // SPDK asks every thread that has a channel, so this one has to go on.
    soon(|| {
        spdk::poll_idle();
        !events.lock().unwrap().is_empty()
    });
    assert_eq!(events.lock().unwrap().as_slice(), [Event::Removed]);
    assert_eq!(channel.submit(request(Op::Read, 0, 1).with(&memory).io(2)).unwrap_err().status, Status::Gone);
    let mut done = Completions::new();
    while channel.inflight() > 0 {
        channel.poll(&mut done);
    }
    assert_eq!(done.len(), 1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!removal.is_finished(), "SPDK must wait for its users");
    drop((channel, descriptor));
    removal.join().unwrap();
    assert!(manager.get(&name).is_err());
}

#[test]
fn resize_is_told() {
    let (manager, name) = (manager(), fresh("R"));
    call("bdev_null_create", &format!(r#"{{"name":"{name}","num_blocks":2048,"block_size":512}}"#));
    let _undo = Undo("bdev_null_delete", format!(r#"{{"name":"{name}"}}"#), None);
    spdk::offer(&manager, &name).unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let hear = Box::new(move |e| seen.lock().unwrap().push(e));
    let descriptor = manager.open(&name, Mode::ReadOnly, hear).unwrap();
    assert_eq!(descriptor.blocks(), 2048);
    call("bdev_null_resize", &format!(r#"{{"name":"{name}","new_size":2}}"#));
    soon(|| !events.lock().unwrap().is_empty());
    assert_eq!(events.lock().unwrap().as_slice(), [Event::Resized { blocks: 4096 }]);
    assert_eq!(descriptor.blocks(), 4096);
    drop(descriptor);
    let gone = channel();
    manager.unregister(&name, Box::new(move || gone.0.send(()).unwrap())).unwrap();
    gone.1.recv().unwrap();
}

/// Claims of SPDK's modules keep us out, and our writers keep them out.
#[test]
fn claims_of_both_sides() {
    let manager = manager();
    let (base, _below) = make_malloc(32 << 20, 512);
    spdk::offer(&manager, &base).unwrap();
    let writer = manager.open(&base, Mode::ReadWrite, Box::new(|_| ())).unwrap();
    let second = manager.open(&base, Mode::ReadWrite, Box::new(|_| ())).unwrap();
    let store = fresh("store");
    let create = format!(
        r#"{{"jsonrpc":"2.0","id":1,"method":"bdev_lvol_create_lvstore","params":{{"bdev_name":"{base}","lvs_name":"{store}"}}}}"#
    );
    let try_create = || {
        let (sender, answer) = channel();
        app().send((create.clone(), sender)).unwrap();
        answer.recv().unwrap()
    };
    assert!(try_create().contains("\"error\""), "a module took a disk that is being written");
    drop((writer, second));
    assert!(!try_create().contains("\"error\""));
    let error = manager.open(&base, Mode::ReadWrite, Box::new(|_| ())).unwrap_err();
    assert_eq!(error.errno(), 16);
    assert!(error.to_string().contains("a module of SPDK has claimed it"), "{error}");
    drop(manager.open(&base, Mode::ReadOnly, Box::new(|_| ())).unwrap());
    call("bdev_lvol_delete_lvstore", &format!(r#"{{"lvs_name":"{store}"}}"#));
    let writer = manager.open(&base, Mode::ReadWrite, Box::new(|_| ()));
    assert!(writer.is_ok(), "{writer:?}");
}

#[test]
fn names_that_are_taken() {
    let manager = manager();
    let (name, _undo) = make_malloc(SIZE, 512);
    spdk::offer(&manager, &name).unwrap();
    let error = spdk::offer(&manager, &name).unwrap_err();
    assert_eq!((error.errno(), error.to_string().contains("exists already")), (17, true), "{error}");
    let error = spdk::offer(&manager, "nothing").unwrap_err();
    assert!(matches!(error, bdev::Error::NotFound { .. }), "{error}");
    // What could not be registered must not keep SPDK's bdev open: `_undo` would hang.
    assert_eq!(manager.status(&name).unwrap().opens, 0);
}

/// SPDK's pool of requests is smaller than what is asked of it: all of them complete.
#[test]
fn more_than_spdk_has_requests_for() {
    let mut rigs: Vec<Rig> = (0..2).map(|_| Rig::new(malloc(512))).collect();
    let memory = Memory::scattered(&[512], 0);
    for round in 0..50 {
        let mut done = Completions::new();
        for rig in &mut rigs {
            for cookie in 0..1024 {
                rig.channel.submit(request(Op::Write, cookie, 1).with(&memory).io(cookie)).unwrap();
            }
        }
        rigs.iter_mut().for_each(|rig| rig.drain(&mut done));
        assert_eq!(done.iter().filter(|c| c.status == Status::Ok).count(), 2048, "round {round}");
    }
}

/// Segments that no device takes as they are.
#[test]
fn odd_segments_are_bounced() {
    let mut rig = Rig::new(malloc(4096));
    let shape: Vec<usize> = std::iter::once(1)
        .chain(std::iter::repeat_n(4095 + 512, 7))
        .chain([4096 * 8 - 1 - 7 * 4607])
        .collect();
    let source = Memory::scattered(&shape, 3);
    source.fill(&pattern(8 * 4096, 9));
    rig.ok(request(Op::Write, 2, 8).with(&source));
    let back = Memory::scattered(&[512; 64], 0);
    rig.ok(request(Op::Read, 2, 8).with(&back));
    assert!(back.bytes() == source.bytes());
}

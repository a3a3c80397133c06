//! SPDK from its start to its end in one process: nothing is left over, and there is no second time.

use bdev::spdk::{self, Change, Options, Port, Runtime, StartError};
use bdev::{Completions, Manager, Mode, Op};
use iobuf::Registry;

mod common;
use common::{Memory, request};

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn start_io_and_end() {
    let no_huge = std::env::var_os("SPDK_TEST_NO_HUGE").is_some();
    let affinity = rustix::thread::sched_getaffinity(None).unwrap();
    let options = Options { no_huge, no_pci: true, ..Options::default() };

    // Methods can be listed, and start-up methods be told apart, before anything is started.
    let mut port = Port::open().unwrap();
    assert!(spdk::states_of("bdev_nvme_set_options").unwrap().startup);
    assert!(!spdk::states_of("bdev_malloc_create").unwrap().startup);
    assert_eq!(spdk::states_of("no_such_method"), None);

    let mut runtime = Runtime::start(&options).unwrap();
    assert!(rustix::thread::sched_getaffinity(None).unwrap() == affinity, "EAL pinned this thread");
    runtime.init().unwrap();
    assert!(runtime.has_subsystem("bdev") && !runtime.has_subsystem("no_such_subsystem"));
    let create = r#"{"jsonrpc":"2.0","id":1,"method":"bdev_malloc_create","params":{"name":"M","num_blocks":2048,"block_size":512}}"#;
    port.send(create.as_bytes());
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        port.turn(&mut answer).unwrap();
        runtime.poll();
    }
    assert!(String::from_utf8_lossy(&answer).contains(r#""result":"M""#));
    runtime.poll();
    assert_eq!(runtime.next_change(), Some(Change::Registered("M".into())));

    let registry = Registry::new();
    if let Some(provider) = spdk::provider() {
        registry.set_provider(provider);
    }
    assert_eq!(spdk::provider().is_some(), !no_huge);
    let manager = Manager::new(registry);
    spdk::offer(&manager, "M").unwrap();
    let descriptor = manager.open("M", Mode::ReadWrite, Box::new(|_| ())).unwrap();
    let before = threads();
    // On another thread, which leaves when it ends.
    std::thread::scope(|s| {
        let io = s.spawn(|| {
            let mut channel = descriptor.channel().unwrap();
            let memory = Memory::scattered(&[512], 0);
            channel.submit(request(Op::Write, 3, 1).with(&memory).io(7)).unwrap();
            let mut done = Completions::new();
            while !channel.poll(&mut done) {}
            assert_eq!(done[0].cookie, 7);
        });
        while !io.is_finished() {
            runtime.poll();
        }
    });
    // The system may take a moment longer than `scope`.
    test_support::until("the thread is gone", || threads() == before);
    drop(descriptor);
    runtime.begin_finish();
    test_support::until("SPDK has ended", || {
        runtime.poll();
        runtime.finished()
    });
    assert!(manager.get("M").is_err(), "SPDK's end takes its bdevs along");
    drop(port);
    drop(manager);
    assert!(runtime.stop(), "something still uses SPDK");
    assert!(!spdk::running());
    assert!(matches!(Runtime::start(&options), Err(StartError::Again)));
}

//! What front ends do besides I/O: stopping, new memory, reset, leaving; and several of them at once.

mod common;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use vhost::vhost_user::message::FrontendReq as R;
use vhost_driver::{Disk, FrontEnd, Options, Ram};
use vhost_poll::ListenError;

fn both() -> [Options; 2] {
    [false, true].map(|packed| Options { packed, inflight: true, ..Options::default() })
}

#[test]
fn a_stopped_queue_goes_on_where_it_was() {
    let backend = Backend::start("stop", MemDisk::new(1 << 20));
    for inflight in [false, true] {
        for options in both() {
            let mut disk = Disk::connect(&backend.path, Options { inflight, ..options }).unwrap();
            for round in 0..70u8 {
                disk.write(3, &[round; 512]).unwrap();
                let base = disk.stop_queue(0).unwrap();
                // A stopped queue does nothing, and says the same when asked again.
                let slot = disk.take(0).unwrap();
                assert!(disk.submit(0, slot, IN, 3, 512, false));
                disk.publish(0);
                assert_eq!(disk.stop_queue(0).unwrap(), base);
                assert_eq!(disk.poll(0), None);
                disk.start_queue(0, base).unwrap();
                assert_eq!(disk.wait(0).unwrap().1, 0);
                assert_eq!(disk.ram.read(disk.request(0, slot).data, 512), [round; 512]);
            }
        }
    }
}

#[test]
fn stopping_waits_for_requests_in_flight() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("drain", mem.clone());
    for options in both() {
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        mem.log.lock().unwrap().clear();
        mem.hold.store(true, Ordering::Release);
        for _ in 0..5 {
            let slot = disk.take(0).unwrap();
            assert!(disk.submit(0, slot, OUT, 0, 512, true));
        }
        disk.publish(0);
        eventually("all are taken", || mem.log.lock().unwrap().len() == 5);
        let release = mem.clone();
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            release.hold.store(false, Ordering::Release);
        });
        disk.stop_queue(0).unwrap();
        for n in 0..5 {
            assert!(disk.poll(0).is_some(), "request {n} is completed before the answer");
        }
        later.join().unwrap();
    }
}

/// Of a disk whose server is away: the front end is not kept waiting, and with memory for requests in flight nothing is lost.
#[test]
fn stopping_gives_up_what_does_not_end() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("give-up", mem.clone());
    for inflight in [false, true] {
        for options in both() {
            let mut disk = Disk::connect(&backend.path, Options { inflight, ..options }).unwrap();
            mem.log.lock().unwrap().clear();
            mem.hold.store(true, Ordering::Release);
            mem.aborts.store(true, Ordering::Release);
            for n in 0..5u8 {
                let slot = disk.take(0).unwrap();
                disk.ram.write(disk.request(0, slot).data, &[n + 1; 512]);
                assert!(disk.submit(0, slot, OUT, n.into(), 512, true));
            }
            disk.publish(0);
            eventually("all are taken", || mem.log.lock().unwrap().len() == 5);
            let base = disk.stop_queue(0).unwrap();
            mem.hold.store(false, Ordering::Release);
            if !inflight {
                let ended: Vec<u8> = (0..5).map(|_| disk.poll(0).unwrap().1).collect();
                assert_eq!(ended, [1; 5], "errors");
                continue;
            }
            assert_eq!(disk.poll(0), None, "nobody has answered");
            disk.start_queue(0, base).unwrap();
            for _ in 0..5 {
                assert_eq!(disk.wait(0).unwrap().1, 0, "repeated");
            }
            for n in 0..5u8 {
                assert_eq!(disk.read(n.into(), 512).unwrap(), [n + 1; 512]);
            }
        }
    }
}

#[test]
fn a_disabled_queue_waits() {
    let backend = Backend::start("enable", MemDisk::new(1 << 20));
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    let enable = |disk: &Disk, on: u32| {
        let state = [0u32.to_ne_bytes(), on.to_ne_bytes()].concat();
        assert!(disk.front.send_acked(R::SET_VRING_ENABLE, &state, &[]).unwrap());
    };
    enable(&disk, 0);
    backend.with(|_, _| ());
    let slot = disk.take(0).unwrap();
    assert!(disk.submit(0, slot, IN, 0, 512, false));
    disk.publish(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(disk.poll(0), None);
    enable(&disk, 1);
    assert_eq!(disk.wait(0).unwrap().1, 0);
}

#[test]
fn memory_comes_and_goes_while_queues_run() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start_on("memory", mem.clone(), 2);
    for packed in [false, true] {
        let options = Options { packed, queues: 2, ..Options::default() };
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        mem.slow.store(2, Ordering::Relaxed);
        let extra = Ram::new(1 << 20);
        let region = |ram: &Ram| {
            // Elsewhere than the first: both say the same addresses.
            let mut spec = Vec::from(0u64.to_ne_bytes());
            for field in [0x1_0000_0000u64, ram.len() as u64, 0x5000_0000_0000, 0] {
                spec.extend(field.to_ne_bytes());
            }
            spec
        };
        for round in 0..10u8 {
            for queue in 0..2 {
                let slot = disk.take(queue).unwrap();
                disk.ram.write(disk.request(queue, slot).data, &[round; 512]);
                assert!(disk.submit(queue, slot, OUT, u64::from(round), 512, true));
                disk.publish(queue);
            }
            match round % 3 {
                0 => assert!(disk.front.send_acked(R::ADD_MEM_REG, &region(&extra), &[extra.fd()]).unwrap()),
                1 => assert!(disk.front.send_acked(R::REM_MEM_REG, &region(&extra), &[]).unwrap()),
                _ => {
                    let table = disk.ram.table();
                    assert!(disk.front.send_acked(R::SET_MEM_TABLE, &table, &[disk.ram.fd()]).unwrap());
                }
            }
            for queue in 0..2 {
                assert_eq!(disk.wait(queue).unwrap().1, 0);
            }
            assert_eq!(disk.read(u64::from(round), 512).unwrap(), [round; 512]);
        }
        mem.slow.store(0, Ordering::Relaxed);
        // Without the memory of its rings a queue waits until it is there again. QEMU does that when its main region
        // changes.
        let nothing = Vec::from(0u64.to_ne_bytes());
        let (table, spec) = (disk.ram.table(), disk.ram.table());
        // Of ADD_MEM_REG and REM_MEM_REG: padding in place of the number of regions.
        let one = [&[0; 8], &spec[8..]].concat();
        for round in 0..2u8 {
            let slot = disk.take(0).unwrap();
            disk.ram.write(disk.request(0, slot).data, &[90 + round; 512]);
            let away = match round {
                0 => disk.front.send_acked(R::SET_MEM_TABLE, &nothing, &[]),
                _ => disk.front.send_acked(R::REM_MEM_REG, &one, &[]),
            };
            assert!(away.unwrap());
            assert!(disk.submit(0, slot, OUT, 60, 512, true));
            disk.publish(0);
            // It was looked at by now.
            assert!(disk.front.number(R::GET_FEATURES).unwrap() > 0);
            assert_eq!(disk.poll(0), None);
            let back = match round {
                0 => disk.front.send_acked(R::SET_MEM_TABLE, &table, &[disk.ram.fd()]),
                _ => disk.front.send_acked(R::ADD_MEM_REG, &one, &[disk.ram.fd()]),
            };
            assert!(back.unwrap());
            assert_eq!(disk.wait(0).unwrap().1, 0, "packed {packed}, round {round}");
            assert_eq!(disk.read(60, 512).unwrap(), [90 + round; 512]);
        }
        assert!(disk.front.send_acked(R::SET_MEM_TABLE, &nothing, &[]).unwrap());
        let mut other = Disk::connect(&backend.path, Options::default()).unwrap();
        other.write(0, &[9; 512]).unwrap();
    }
}

#[test]
fn a_front_end_leaves_with_requests_in_flight() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("leave", mem.clone());
    for options in both() {
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        mem.log.lock().unwrap().clear();
        mem.hold.store(true, Ordering::Release);
        for _ in 0..8 {
            let slot = disk.take(0).unwrap();
            assert!(disk.submit(0, slot, OUT, 0, 4096, true));
        }
        disk.publish(0);
        eventually("all are taken", || mem.log.lock().unwrap().len() == 8);
        drop(disk);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(backend.with(|c, _| c.sessions().len()), 1, "its memory is still in use");
        mem.hold.store(false, Ordering::Release);
        eventually("the session ends", || backend.with(|c, _| c.sessions().is_empty()));
    }
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    disk.write(0, &[1; 512]).unwrap();
}

#[test]
fn several_front_ends_share_a_disk() {
    let backend = Backend::start_on("several", MemDisk::new(1 << 20), 2);
    let mut disks: Vec<Disk> =
        (0..4).map(|_| Disk::connect(&backend.path, Options::default()).unwrap()).collect();
    for (i, disk) in disks.iter_mut().enumerate() {
        disk.write(i as u64, &[i as u8; 512]).unwrap();
    }
    for disk in &mut disks {
        for i in 0..4u8 {
            assert_eq!(disk.read(u64::from(i), 512).unwrap(), [i; 512]);
        }
    }
    let sessions = backend.with(|c, _| c.sessions());
    assert_eq!(sessions.len(), 4);
    assert!(sessions.iter().all(|s| s.started && s.max_queues == 1 && s.inflight == 0), "{sessions:?}");
}

#[test]
fn reset_stops_everything() {
    let backend = Backend::start("reset", MemDisk::new(1 << 20));
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    assert!(disk.front.send_acked(R::RESET_DEVICE, &[], &[]).unwrap());
    assert!(!backend.with(|c, _| c.sessions()[0].started));
    // Status 0 is a reset, too.
    disk.front.send(R::SET_STATUS, &15u64.to_ne_bytes(), &[]).unwrap();
    assert_eq!(disk.front.number(R::GET_STATUS).unwrap(), 15);
    disk.front.send(R::SET_STATUS, &0u64.to_ne_bytes(), &[]).unwrap();
    assert_eq!(disk.front.number(R::GET_STATUS).unwrap(), 0);
}

#[test]
fn closing_a_controller_finishes_requests_and_hangs_up() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start_on("close", mem.clone(), 2);
    let mut disk = Disk::connect(&backend.path, Options { queues: 2, ..Options::default() }).unwrap();
    mem.slow.store(100, Ordering::Relaxed);
    for queue in 0..2 {
        for _ in 0..20 {
            let slot = disk.take(queue).unwrap();
            assert!(disk.submit(queue, slot, OUT, 0, 512, true));
        }
        disk.publish(queue);
    }
    eventually("some are taken", || !mem.log.lock().unwrap().is_empty());
    backend.close();
    assert!(disk.front.is_closed());
    assert!(!backend.path.exists());
    let done: usize = (0..2).map(|q| std::iter::from_fn(|| disk.poll(q)).count()).sum();
    assert_eq!(done, mem.log.lock().unwrap().len(), "what was taken was completed");
}

#[test]
fn sockets_of_the_dead_are_taken_over_and_those_of_the_living_not() {
    let path = socket_path("stale");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let backend = Backend::serve(&path, MemDisk::new(1 << 20), 0, true);
    let again = path.clone();
    let refused = backend.with(move |_, cx| start_error(cx, &again));
    assert!(matches!(refused, Some(ListenError::InUse(_))), "{refused:?}");
    let file = socket_path("file");
    std::fs::write(&file, b"mine").unwrap();
    let taken = file.clone();
    let refused = backend.with(move |_, cx| start_error(cx, &taken));
    assert!(matches!(refused, Some(ListenError::NotASocket(_))), "{refused:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    std::fs::remove_file(&file).unwrap();
}

fn start_error(cx: &mut reactor::Turn<'_>, path: &std::path::Path) -> Option<ListenError> {
    let options = options(path, vec![cx.handle().clone()]);
    let disk = std::sync::Arc::new(Shared(MemDisk::new(4096)));
    vhost_poll::Controller::start(cx, disk, options).err()
}

#[test]
fn packed_rings_are_offered_only_where_asked_for() {
    let path = socket_path("split-only");
    let backend = Backend::serve(&path, MemDisk::new(1 << 20), 0, false);
    assert!(Disk::connect(&path, Options { packed: true, ..Options::default() }).is_err());
    let mut disk = Disk::connect(&path, Options::default()).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    drop(backend);
}

/// The front end of another implementation.
#[test]
fn rust_vmms_front_end_gets_through() {
    use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
    let backend = Backend::start("rust-vmm", MemDisk::new(1 << 20));
    let mut front = Frontend::connect(&backend.path, 2).unwrap();
    let features = front.get_features().unwrap();
    front.set_owner().unwrap();
    front.set_features(features & !(1 << 34)).unwrap();
    let offered = front.get_protocol_features().unwrap();
    front.set_protocol_features(offered & VhostUserProtocolFeatures::all()).unwrap();
    front.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front.get_queue_num().unwrap(), 16);
    assert!(front.get_max_mem_slots().unwrap() >= 8);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    let (_, config) = front.get_config(0, 60, flags, &[0; 60]).unwrap();
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    let mut ram = Ram::new(1 << 20);
    let ring = vhost_driver::DriverRing::new(&mut ram, 16, false, true);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: ram.guest_base(),
        memory_size: ram.len() as u64,
        userspace_addr: ram.user(ram.guest_base()),
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&ram.fd()),
    };
    front.set_mem_table(&[region]).unwrap();
    front.set_vring_num(0, 16).unwrap();
    front.set_vring_base(0, 0).unwrap();
    let addr = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: ram.user(ring.addrs.desc),
        used_ring_addr: ram.user(ring.addrs.used),
        avail_ring_addr: ram.user(ring.addrs.avail),
        log_addr: None,
    };
    front.set_vring_addr(0, &addr).unwrap();
    let event = vmm_event();
    front.set_vring_call(0, &event).unwrap();
    front.set_vring_kick(0, &event).unwrap();
    front.set_vring_enable(0, true).unwrap();
    eventually("it runs", || backend.with(|c, _| c.sessions()[0].started));
    assert_eq!(front.get_vring_base(0).unwrap(), 0);
}

/// A front end whose back end was restarted does not ask for the disk's size again, unless it is told to.
#[test]
fn a_new_session_is_told_to_read_its_configuration() {
    use std::io::Read;
    let backend = Backend::start("new-size", MemDisk::new(1 << 20));
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(test_support::patience())).unwrap();
    disk.backend_req = Some(theirs.into());
    backend.disk.info.lock().unwrap().size = 2 << 20;
    disk.reconnect(&backend.path).unwrap();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message[0], 2, "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
    assert_eq!(disk.sectors().unwrap(), 4096);
}

/// libblkio's front end shares a file of exactly as many bytes as its rings have, which is no whole number of pages. (Its
/// packed rings work with nobody: it says that they begin with the wrap counters 0.)
#[test]
fn libblkios_front_end_gets_through() {
    use virtio_driver::{
        VhostUser, VirtioBlkFeatureFlags as Blk, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
    };
    let backend = Backend::start("libblkio", MemDisk::new(1 << 20));
    let features = VirtioFeatureFlags::VERSION_1.bits() | (Blk::all() - Blk::CONFIG_WCE).bits();
    let front = VhostUser::new(backend.path.to_str().unwrap(), features).unwrap();
    let mut front = Box::new(front) as Box<VirtioBlkTransport>;
    let mut queues = VirtioBlkQueue::<u8>::setup_queues(&mut *front, 2, 64).unwrap();
    let ram = Ram::new(1 << 20);
    let data = ram.ptr(ram.guest_base(), 8192);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&ram.fd());
    front.map_mem_region(data as usize, ram.len(), fd, 0).unwrap();
    for (n, queue) in queues.iter_mut().enumerate() {
        let byte = n as u8 + 1;
        ram.write(ram.guest_base(), &[byte; 4096]);
        let mut run = |ask: &mut dyn FnMut(&mut VirtioBlkQueue<'_, u8>)| {
            ask(queue);
            front.get_submission_notifier(n).notify().unwrap();
            let mut done = Vec::new();
            eventually("it is done", || {
                done.extend(queue.completions().map(|c| (c.context, c.ret)));
                !done.is_empty()
            });
            assert_eq!(done, [(7, 0)]);
        };
        // SAFETY: the memory of `ram`, which outlives the requests; nobody refers to it.
        run(&mut |q| unsafe { q.write_raw(8192, data, 4096, 7).unwrap() });
        run(&mut |q| q.flush(7).unwrap());
        // SAFETY: as above.
        run(&mut |q| unsafe { q.read_raw(8192, data.add(4096), 4096, 7).unwrap() });
        assert!(ram.read(ram.guest_base() + 4096, 4096) == [byte; 4096]);
    }
}

fn vmm_event() -> vmm_sys_util::eventfd::EventFd {
    vmm_sys_util::eventfd::EventFd::new(0).unwrap()
}

/// Every message that makes no sense ends its connection, and nothing else.
#[test]
fn senseless_messages_end_the_connection() {
    let backend = Backend::start("senseless", MemDisk::new(1 << 20));
    let mut well_behaved = Disk::connect(&backend.path, Options::default()).unwrap();
    let ram = Ram::new(1 << 20);
    let pipe = std::os::unix::net::UnixStream::pair().unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let table = |fields: [u64; 4]| {
        let mut t = Vec::from(1u64.to_ne_bytes());
        fields.iter().for_each(|f| t.extend(f.to_ne_bytes()));
        t
    };
    let two = |a: [u64; 4], b: [u64; 4]| {
        let mut t = Vec::from(2u64.to_ne_bytes());
        a.iter().chain(&b).for_each(|f| t.extend(f.to_ne_bytes()));
        t
    };
    let state = |i: u32, n: u32| [i.to_ne_bytes(), n.to_ne_bytes()].concat();
    let base = [0x1000, 0x1000, 0x1000, 0];
    type Case<'a> = (&'a str, u32, u32, Vec<u8>, Vec<BorrowedFd<'a>>);
    let cases: Vec<Case<'_>> = vec![
        ("version 0", R::GET_FEATURES.into(), 0, vec![], vec![]),
        ("a reply", R::GET_FEATURES.into(), 5, vec![], vec![]),
        ("unknown", 999, 1, vec![], vec![]),
        ("net", R::NET_SET_MTU.into(), 1, vec![0; 8], vec![]),
        ("feature not offered", R::SET_FEATURES.into(), 1, u64::MAX.to_ne_bytes().into(), vec![]),
        (
            "protocol feature not offered",
            R::SET_PROTOCOL_FEATURES.into(),
            1,
            u64::MAX.to_ne_bytes().into(),
            vec![],
        ),
        ("short", R::SET_FEATURES.into(), 1, vec![0; 4], vec![]),
        ("queue 16", R::SET_VRING_NUM.into(), 1, state(16, 128), vec![]),
        ("queue 2^32-1", R::GET_VRING_BASE.into(), 1, state(u32::MAX, 0), vec![]),
        ("kick is a socket", R::SET_VRING_KICK.into(), 1, vec![0; 8], vec![pipe.0.as_fd()]),
        ("call is a file", R::SET_VRING_CALL.into(), 1, vec![0; 8], vec![file.as_fd()]),
        ("kick without descriptor", R::SET_VRING_KICK.into(), 1, vec![0; 8], vec![]),
        ("two kicks", R::SET_VRING_KICK.into(), 1, vec![0; 8], vec![eventfd.as_fd(), eventfd.as_fd()]),
        ("memory is a socket", R::SET_MEM_TABLE.into(), 1, table(base), vec![pipe.0.as_fd()]),
        ("memory past its file", R::SET_MEM_TABLE.into(), 1, table([0, 2 << 20, 0, 0]), vec![ram.fd()]),
        (
            "memory far past its file",
            R::SET_MEM_TABLE.into(),
            1,
            table([0, 4096, 0, 1 << 50]),
            vec![ram.fd()],
        ),
        ("empty memory", R::SET_MEM_TABLE.into(), 1, table([0, 0, 0, 0]), vec![ram.fd()]),
        ("memory wraps", R::SET_MEM_TABLE.into(), 1, table([u64::MAX - 4095, 8192, 0, 0]), vec![ram.fd()]),
        ("offset wraps", R::SET_MEM_TABLE.into(), 1, table([0, 8192, 0, u64::MAX - 4095]), vec![ram.fd()]),
        (
            "guest overlap",
            R::SET_MEM_TABLE.into(),
            1,
            two(base, [0x1800, 0x1000, 0x9000, 0]),
            vec![ram.fd(), ram.fd()],
        ),
        (
            "user overlap",
            R::SET_MEM_TABLE.into(),
            1,
            two(base, [0x9000, 0x1000, 0x1fff, 0]),
            vec![ram.fd(), ram.fd()],
        ),
        ("remove what is not there", R::REM_MEM_REG.into(), 1, vec![0; 40], vec![]),
        ("in-flight memory too small", R::SET_INFLIGHT_FD.into(), 1, vec![1; 24], vec![ram.fd()]),
        ("in-flight memory of nothing", R::GET_INFLIGHT_FD.into(), 1, vec![0; 24], vec![]),
        ("enable twice as much", R::SET_VRING_ENABLE.into(), 1, state(0, 2), vec![]),
    ];
    for (what, request, flags, payload, fds) in cases {
        let front = FrontEnd::connect(&backend.path).unwrap();
        front.send_raw(request, flags, &payload, &fds).unwrap();
        assert!(front.reply().is_err(), "{what}: is not answered");
        assert!(front.is_closed(), "{what}: ends the connection");
        well_behaved.write(0, &[1; 512]).unwrap_or_else(|e| panic!("after {what}: {e}"));
    }
    // A message in pieces is as good as a whole one.
    let front = FrontEnd::connect(&backend.path).unwrap();
    for byte in [1u32, 1, 0].iter().flat_map(|w| w.to_ne_bytes()) {
        use std::io::Write;
        (&front.stream).write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_micros(300));
    }
    assert_eq!(front.reply().unwrap().0.len(), 8);
    // Half a message and silence keep nobody else waiting.
    front.send_raw(1, 1, &[], &[]).unwrap();
    let silent = FrontEnd::connect(&backend.path).unwrap();
    std::io::Write::write_all(&mut (&silent.stream), &[5, 0, 0]).unwrap();
    well_behaved.write(0, &[2; 512]).unwrap();
}

//! A guest's disk in all shapes: every operation, every kind of ring.

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use vhost::vhost_user::message::FrontendReq as R;
use vhost_driver::{Buf, Disk, Options};
use vhost_poll::{Coalescing, Op};

/// All kinds of ring, by name.
fn kinds() -> Vec<(String, Options)> {
    let mut kinds = Vec::new();
    for packed in [false, true] {
        for event_idx in [false, true] {
            for indirect in [false, true] {
                let name = format!("packed={packed} event_idx={event_idx} indirect={indirect}");
                kinds.push((name, Options { packed, event_idx, indirect, ..Options::default() }));
            }
        }
    }
    kinds
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) as u8).collect()
}

#[test]
fn data_goes_both_ways_over_every_kind_of_ring() {
    let backend = Backend::start("kinds", MemDisk::new(16 << 20));
    for (n, (kind, options)) in kinds().into_iter().enumerate() {
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        for (sector, len) in [(0, 512), (7, 4096), (100, 65536), (32760, 4096)] {
            let data = pattern(n as u64 + sector, len);
            disk.write(sector, &data).unwrap();
            assert_eq!(disk.read(sector, len as u32).unwrap(), data, "{kind}, sector {sector}");
        }
        disk.flush().unwrap();
        // Three descriptors do not divide 128: the ring wraps in every way.
        for i in 0..300u64 {
            disk.write(i % 64, &pattern(i, 512)).unwrap();
            assert_eq!(disk.read(i % 64, 512).unwrap(), pattern(i, 512), "{kind}, round {i}");
        }
    }
}

#[test]
fn full_queues_complete_everything_once() {
    let disk = MemDisk::new(16 << 20);
    disk.slow.store(3, Ordering::Relaxed);
    let backend = Backend::start_on("full", disk, 2);
    for (kind, options) in kinds() {
        let mut disk =
            Disk::connect(&backend.path, Options { queues: 2, queue_size: 64, ..options }).unwrap();
        let mut sent = [0u64; 2];
        let mut done = [0u64; 2];
        while done.iter().sum::<u64>() < 2000 {
            for queue in 0..2 {
                while sent[queue] < 1000 {
                    let Some(slot) = disk.take(queue) else { break };
                    let sector = (queue as u64 * 8192) + u64::from(slot) * 8;
                    disk.ram.write(disk.request(queue, slot).data, &pattern(sector, 4096));
                    if !disk.submit(queue, slot, OUT, sector, 4096, true) {
                        break;
                    }
                    sent[queue] += 1;
                }
                disk.publish(queue);
                while let Some((_, status)) = disk.poll(queue) {
                    assert_eq!(status, 0, "{kind}");
                    done[queue] += 1;
                }
            }
        }
        assert_eq!(done, [1000, 1000], "{kind}");
        let base = disk.stop_queue(1).unwrap();
        assert_eq!(disk.poll(1), None, "{kind}");
        if !disk.options.packed {
            assert_eq!(base, 1000, "{kind}");
        }
    }
}

#[test]
fn scattered_buffers_and_odd_layouts() {
    let backend = Backend::start("scatter", MemDisk::new(16 << 20));
    for (kind, options) in kinds() {
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        // 9 buffers of odd lengths, 4096 bytes in all, apart from each other.
        let slot = disk.take(0).unwrap();
        let data = disk.request(0, slot).data;
        let lens = [1u32, 510, 513, 1000, 24, 700, 300, 1047, 1];
        let mut at = data;
        let mut bufs = Vec::new();
        let content = pattern(3, 4096);
        let mut from = 0;
        for len in lens {
            bufs.push(Buf { addr: at, len, write: false });
            disk.ram.write(at, &content[from..from + len as usize]);
            from += len as usize;
            at += u64::from(len) + 13;
        }
        assert!(disk.submit_bufs(0, slot, OUT, 40, &bufs), "{kind}");
        disk.publish(0);
        assert_eq!(disk.wait(0).unwrap().1, 0, "{kind}");
        assert_eq!(disk.read(40, 4096).unwrap(), content, "{kind}");
        // Data in the descriptor of the header, and status in the descriptor of the data, as virtio 1 allows.
        let slot = disk.take(0).unwrap();
        let r = disk.request(0, slot);
        disk.ram.write(r.data, &[0, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 0, 0, 0, 0]);
        let list = [
            Buf { addr: r.data, len: 5, write: false },
            Buf { addr: r.data + 5, len: 11, write: false },
            Buf { addr: r.data + 100, len: 513, write: true },
        ];
        let ring = disk.ring(0);
        let id = ring.add(&list, false).unwrap();
        disk.publish(0);
        let mut used = None;
        eventually("a used entry", || {
            used = disk.ring(0).pop();
            used.is_some()
        });
        assert_eq!(used, Some((id, 513)), "{kind}");
        assert_eq!(disk.ram.read(r.data + 100, 512), content[..512], "{kind}");
        assert_eq!(disk.ram.read(r.data + 612, 1), [0], "{kind}");
    }
}

#[test]
fn identity_and_configuration() {
    let backend = Backend::start("config", MemDisk::new(16 << 20));
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    assert_eq!(disk.sectors().unwrap(), 32768);
    let (slot, status) = disk.run(GET_ID, 0, 20, false).unwrap();
    assert_eq!(status, 0);
    assert_eq!(&disk.ram.read(disk.request(0, slot).data, 20), b"memory-disk\0\0\0\0\0\0\0\0\0");
    // Unknown operations are answered so.
    assert_eq!(disk.run(99, 0, 512, false).unwrap().1, 2);
    // Beyond the end, and not whole sectors.
    assert_eq!(disk.run(IN, 32768, 512, false).unwrap().1, 1);
    assert_eq!(disk.run(IN, u64::MAX, 512, false).unwrap().1, 1);
    assert_eq!(disk.run(OUT, 0, 511, true).unwrap().1, 1);
}

fn ranges(list: &[(u64, u32, u32)]) -> Vec<u8> {
    list.iter()
        .flat_map(|(sector, count, flags)| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        })
        .collect()
}

fn run_ranges(disk: &mut Disk, kind: u32, list: &[(u64, u32, u32)]) -> u8 {
    let data = ranges(list);
    let slot = disk.take(0).unwrap();
    disk.ram.write(disk.request(0, slot).data, &data);
    assert!(disk.submit(0, slot, kind, 0, data.len() as u32, true));
    disk.publish(0);
    disk.wait(0).unwrap().1
}

#[test]
fn discard_and_write_zeroes_with_several_ranges() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("ranges", mem.clone());
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    for sector in 0..16 {
        disk.write(sector, &[9; 512]).unwrap();
    }
    mem.log.lock().unwrap().clear();
    assert_eq!(run_ranges(&mut disk, WRITE_ZEROES, &[(1, 2, 0), (5, 1, 1)]), 0);
    let got: Vec<u8> = (0..8).map(|s| disk.read(s, 512).unwrap()[511]).collect();
    assert_eq!(got, [9, 0, 0, 9, 9, 0, 9, 9]);
    assert_eq!(
        mem.log.lock().unwrap()[..2],
        [
            (Op::WriteZeroes { unmap: false, fua: false }, 1, 1024),
            (Op::WriteZeroes { unmap: true, fua: false }, 5, 512)
        ]
    );
    assert_eq!(run_ranges(&mut disk, DISCARD, &[(8, 8, 0)]), 0);
    // One bad range spoils the answer; flags that mean nothing; no range; too many.
    assert_eq!(run_ranges(&mut disk, DISCARD, &[(0, 1, 0), (4096, 1, 0)]), 1);
    assert_eq!(run_ranges(&mut disk, DISCARD, &[(0, 1, 1)]), 2);
    assert_eq!(run_ranges(&mut disk, WRITE_ZEROES, &[(0, 1, 2)]), 2);
    assert_eq!(run_ranges(&mut disk, DISCARD, &[(0, 0, 0)]), 1);
    assert_eq!(run_ranges(&mut disk, DISCARD, &[(0, 1, 0); 17]), 1);
    assert_eq!(run_ranges(&mut disk, DISCARD, &[(0, 1, 0); 16]), 0);
}

#[test]
fn write_cache_follows_the_driver() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("wce", mem.clone());
    let fua = |disk: &mut Disk| {
        disk.write(0, &[1; 512]).unwrap();
        matches!(mem.log.lock().unwrap().last(), Some((Op::Write { fua: true }, ..)))
    };
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    assert!(!fua(&mut disk));
    disk.set_write_back(false).unwrap();
    assert_eq!(disk.config().unwrap()[32], 0);
    assert!(fua(&mut disk));
    assert_eq!(run_ranges(&mut disk, WRITE_ZEROES, &[(0, 1, 1)]), 0);
    let zeroes = Op::WriteZeroes { unmap: true, fua: true };
    assert_eq!(mem.log.lock().unwrap().last(), Some(&(zeroes, 0, 512)));
    // QEMU sends its features again at every start (a reboot, stop and cont), and the guest still reads 0.
    disk.front.send(R::SET_FEATURES, &disk.features.to_ne_bytes(), &[]).unwrap();
    assert_eq!(disk.config().unwrap()[32], 0);
    assert!(fua(&mut disk));
    assert!(disk.front.send_acked(R::RESET_DEVICE, &[], &[]).unwrap());
    disk.resume().unwrap();
    assert!(fua(&mut disk));
    disk.set_write_back(true).unwrap();
    assert_eq!(disk.config().unwrap()[32], 1);
    assert!(!fua(&mut disk));
    // A driver without FLUSH cannot make anything stable, so everything is.
    let without = 1 << 9 | 1 << 11;
    let mut disk = Disk::connect(&backend.path, Options { without, ..Options::default() }).unwrap();
    assert!(fua(&mut disk));
}

/// A back end that was restarted has not heard what the driver chose, while the front end goes on showing it. To a session
/// another one is like another process.
#[test]
fn write_cache_outlives_a_restart() {
    for inflight in [false, true] {
        let options = Options { inflight, ..Options::default() };
        let mem = MemDisk::new(1 << 20);
        let backend = Backend::start("wce-again", mem.clone());
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        for write_back in [true, false, true] {
            disk.set_write_back(write_back).unwrap();
            disk.write(0, &[1; 512]).unwrap();
            disk.reconnect(&backend.path).unwrap();
            disk.write(0, &[1; 512]).unwrap();
            // The memory for requests in flight brings it along. Without, every write is made stable.
            let expected = Op::Write { fua: !(write_back && inflight) };
            assert_eq!(mem.log.lock().unwrap().last().unwrap().0, expected, "{write_back}, {inflight}");
        }
    }
}

#[test]
fn read_only_disks_say_so() {
    let mem = MemDisk::new(1 << 20);
    mem.info.lock().unwrap().read_only = true;
    let backend = Backend::start("ro", mem);
    let mut disk = Disk::connect(&backend.path, Options::default()).unwrap();
    assert_eq!(disk.features & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(disk.run(OUT, 0, 512, true).unwrap().1, 1);
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn an_idle_device_sleeps_and_a_kick_wakes_it() {
    let backend = Backend::start_on("idle", MemDisk::new(1 << 20), 1);
    for (kind, options) in kinds() {
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        disk.write(0, &[1; 512]).unwrap();
        eventually("sleep", || backend.lane_stats().asleep);
        let before = backend.lane_stats();
        // Nothing wakes it, so there is nothing to wait for.
        std::thread::sleep(Duration::from_millis(100));
        let turns = backend.lane_stats().turns - before.turns;
        assert!(turns < 1000, "{kind}: {turns} turns in 100 ms, so it does not sleep");
        eventually("sleep", || backend.lane_stats().asleep);
        let kicks = disk.kicks;
        disk.write(0, &[2; 512]).unwrap();
        assert_eq!(disk.kicks, kicks + 1, "{kind}: it wants a kick after sleep");
        assert_eq!(disk.read(0, 512).unwrap(), [2; 512], "{kind}");
    }
}

#[test]
fn interrupts_come_only_when_wanted_and_once_per_batch() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("calls", mem.clone());
    for (kind, options) in kinds() {
        let mut disk = Disk::connect(&backend.path, options).unwrap();
        disk.write(0, &[1; 512]).unwrap();
        disk.calls(0);
        disk.ring(0).disable_calls();
        for _ in 0..10 {
            disk.write(0, &[1; 512]).unwrap();
        }
        assert_eq!(disk.calls(0), 0, "{kind}: disabled");
        disk.ring(0).enable_calls();
        mem.log.lock().unwrap().clear();
        mem.hold.store(true, Ordering::Release);
        for _ in 0..16 {
            let slot = disk.take(0).unwrap();
            assert!(disk.submit(0, slot, IN, 0, 512, false));
        }
        disk.publish(0);
        eventually("all are taken", || mem.log.lock().unwrap().len() == 16);
        mem.hold.store(false, Ordering::Release);
        for _ in 0..16 {
            assert_eq!(disk.wait(0).unwrap().1, 0, "{kind}");
        }
        assert_eq!(disk.calls(0), 1, "{kind}: one for the batch");
    }
}

#[test]
fn coalescing_spaces_interrupts_and_loses_none() {
    let backend = Backend::start("coalescing", MemDisk::new(1 << 20));
    backend.with(|c, _| c.set_coalescing(Coalescing { delay_base_us: 2000, iops_threshold: 100 }));
    let mut disk = Disk::connect(&backend.path, Options { event_idx: false, ..Options::default() }).unwrap();
    let mut calls = 0;
    // While so few requests are made that none is put off, as on a machine with other work, it is tried again.
    let mut spaced = |requests: u64| {
        let before = calls;
        for _ in 0..requests {
            disk.write(0, &[1; 512]).unwrap();
            calls += disk.calls(0);
        }
        calls - before < requests / 2
    };
    eventually("fewer interrupts than requests", || spaced(500));
    // The last one comes, late.
    eventually("the interrupt that was put off", || {
        calls += disk.calls(0);
        backend.with(|c, _| c.sessions()[0].inflight) == 0
    });
    disk.calls(0);
    disk.write(0, &[1; 512]).unwrap();
    eventually("an interrupt", || disk.calls(0) > 0);
}

#[test]
fn resize_reaches_the_guest() {
    use std::io::Read;
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("resize", mem.clone());
    let disk = Disk::connect(&backend.path, Options::default()).unwrap();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(test_support::patience())).unwrap();
    let request = vhost::vhost_user::message::FrontendReq::SET_BACKEND_REQ_FD;
    assert!(disk.front.send_acked(request, &[], &[std::os::fd::AsFd::as_fd(&theirs)]).unwrap());
    mem.info.lock().unwrap().size = 2 << 20;
    backend.with(|c, _| c.config_changed());
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(disk.sectors().unwrap(), 4096);
}

#[test]
fn the_disk_goes_away_under_a_guest() {
    let backend = Backend::start_on("detach", MemDisk::new(1 << 20), 2);
    let mut disk = Disk::connect(&backend.path, Options { queues: 2, ..Options::default() }).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    let (tx, rx) = std::sync::mpsc::channel();
    backend.with(move |c, cx| c.detach(cx, move |_| tx.send(()).unwrap()));
    test_support::recv(&rx);
    assert_eq!(disk.run(IN, 0, 512, false).unwrap().1, 1);
    assert_eq!(disk.run(FLUSH, 0, 0, true).unwrap().1, 1);
    assert_eq!(disk.run(GET_ID, 0, 20, false).unwrap().1, 0);
    // A new front end sees the same, now without a disk from the beginning.
    let mut other = Disk::connect(&backend.path, Options::default()).unwrap();
    assert_eq!(other.run(OUT, 0, 512, true).unwrap().1, 1);
}

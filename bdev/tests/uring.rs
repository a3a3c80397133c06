//! Files and block devices: what is particular to them.

mod common;

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bdev::uring::{self, Kind, Params, Uring};
use bdev::{Completions, Error, Event, Flags, IoChannel, Manager, Mode, Op, Status};
use common::{Memory, TempFile, pattern, request};

fn manager() -> Arc<Manager> {
    Manager::new(iobuf::Registry::new())
}

fn params(name: &str, path: &Path) -> Params {
    Params::new(name, path.to_str().unwrap())
}

fn open(m: &Arc<Manager>, name: &str) -> IoChannel {
    m.open(name, Mode::ReadWrite, Box::new(|_| ())).unwrap().channel().unwrap()
}

/// Allocated bytes.
fn allocated(file: &TempFile) -> u64 {
    std::fs::metadata(&file.path).unwrap().blocks() * 512
}

#[test]
fn creation_refuses_in_words() {
    let m = manager();
    let file = TempFile::new(1 << 20);
    let tiny = TempFile::new(100);
    let create = |p: Params| uring::create(&m, p).unwrap_err();
    let e = create(params("a", Path::new("/nonexistent/x")));
    assert!(e.errno() == 2 && e.to_string().contains("cannot open /nonexistent/x"), "{e}");
    let e = create(params("a", Path::new("/tmp")));
    assert!(e.errno() == 22 && e.to_string().contains("regular file or a block device"), "{e}");
    let e = create(params("a", Path::new("/dev/null")));
    assert!(e.errno() == 22, "{e}");
    let e = create(params("a", &tiny.path));
    assert!(e.errno() == 22 && e.to_string().contains("less than one block"), "{e}");
    let e = create(Params { block_size: Some(1000), ..params("a", &file.path) });
    assert!(e.errno() == 22 && e.to_string().contains("power of two"), "{e}");
    assert!(m.list().is_empty());

    uring::create(&m, params("a", &file.path)).unwrap();
    let e = create(params("b", &file.path));
    assert!(e.errno() == 16 && e.to_string().contains("locked"), "{e}");
    // A name that is taken releases the file again.
    let other = TempFile::new(1 << 20);
    assert!(matches!(create(params("a", &other.path)), Error::Exists { .. }));
    uring::create(&m, params("c", &other.path)).unwrap();
    // And so does deletion, before it says so.
    assert!(matches!(uring::delete(&m, "a", Kind::Aio, Box::new(|| ())), Err(Error::WrongKind { .. })));
    let (sender, gone) = std::sync::mpsc::channel();
    uring::delete(&m, "a", Kind::Uring, Box::new(move || sender.send(()).unwrap())).unwrap();
    gone.try_recv().unwrap();
    uring::create(&m, params("b", &file.path)).unwrap();
}

/// The kernel closes rings in the background; the file must be free when the bdev is gone.
#[test]
fn the_file_is_free_when_the_bdev_is_gone() {
    let m = manager();
    let file = TempFile::new(1 << 20);
    let memory = Memory::scattered(&[4096], 0);
    for round in 0..50 {
        let created = uring::create(&m, params("a", &file.path));
        assert!(created.is_ok(), "round {round}: {created:?}");
        let mut channels = [open(&m, "a"), open(&m, "a")];
        for channel in &mut channels {
            assert_eq!(common::run(channel, request(Op::Write, 0, 1).with(&memory)), Status::Ok);
        }
        let (sender, gone) = std::sync::mpsc::channel();
        m.unregister("a", Box::new(move || sender.send(()).unwrap())).unwrap();
        assert!(gone.try_recv().is_err());
        drop(channels);
        gone.try_recv().unwrap();
    }
}

#[test]
fn block_size_follows_the_file() {
    let m = manager();
    let (whole, odd) = (TempFile::new(1 << 20), TempFile::new((1 << 20) + 512 + 100));
    uring::create(&m, params("whole", &whole.path)).unwrap();
    uring::create(&m, params("odd", &odd.path)).unwrap();
    let shape = |name| m.status(name).map(|s| (s.bdev.info().block_size, s.blocks)).unwrap();
    assert_eq!(shape("whole"), (4096, 256));
    assert_eq!(shape("odd"), (512, 2049), "the rest of 100 bytes is not used");
}

#[test]
fn read_only_by_wish_or_by_need() {
    let m = manager();
    let file = TempFile::new(1 << 20);
    uring::create(&m, Params { read_only: true, ..params("a", &file.path) }).unwrap();
    uring::create(&m, Params { read_only: true, ..params("b", &file.path) }).expect("readers share");
    let refused = m.open("a", Mode::ReadWrite, Box::new(|_| ())).unwrap_err();
    assert_eq!(refused.errno(), 30, "{refused}");
    let mut channel = m.open("a", Mode::ReadOnly, Box::new(|_| ())).unwrap().channel().unwrap();
    let memory = Memory::scattered(&[4096], 0);
    assert_eq!(common::run(&mut channel, request(Op::Read, 0, 1).with(&memory)), Status::Ok);
    assert_eq!(common::run(&mut channel, request(Op::Flush, 0, 0)), Status::Ok);
    assert_eq!(common::run(&mut channel, request(Op::Write, 0, 1).with(&memory)), Status::ReadOnly);

    let locked = TempFile::new(1 << 20);
    std::fs::set_permissions(&locked.path, std::fs::Permissions::from_mode(0o444)).unwrap();
    if std::fs::OpenOptions::new().write(true).open(&locked.path).is_ok() {
        println!("SKIPPED in part: this user (root) may write files of mode 0444");
        return;
    }
    uring::create(&m, params("c", &locked.path)).unwrap();
    assert!(m.get("c").unwrap().info().read_only);
}

#[test]
fn data_is_in_the_file() {
    let m = manager();
    let file = TempFile::new(1 << 20);
    let out = pattern(8192, 9);
    std::fs::write(&file.path, [&out[..], &vec![0; (1 << 20) - 8192]].concat()).unwrap();
    uring::create(&m, params("a", &file.path)).unwrap();
    let mut channel = open(&m, "a");
    let memory = Memory::scattered(&[8192], 0);
    assert_eq!(common::run(&mut channel, request(Op::Read, 0, 2).with(&memory)), Status::Ok);
    assert_eq!(memory.bytes(), out);
    assert_eq!(
        common::run(&mut channel, request(Op::Write, 10, 2).with(&memory).flags(Flags::FUA)),
        Status::Ok
    );
    let mut stored = vec![0; 8192];
    std::fs::File::open(&file.path).unwrap().read_exact_at(&mut stored, 40960).unwrap();
    assert_eq!(stored, out);
}

#[test]
fn discard_frees_space_and_no_unmap_keeps_it() {
    let m = manager();
    let file = TempFile::new(4 << 20);
    uring::create(&m, params("a", &file.path)).unwrap();
    if !m.get("a").unwrap().info().native.has(Op::Discard) {
        println!("SKIPPED: the file system of {} punches no holes", file.path.display());
        return;
    }
    let mut channel = open(&m, "a");
    let memory = Memory::scattered(&[4 << 20], 0);
    let full = |channel: &mut IoChannel| {
        memory.fill(&pattern(4 << 20, 1));
        assert_eq!(
            common::run(channel, request(Op::Write, 0, 1024).with(&memory).flags(Flags::FUA)),
            Status::Ok
        );
        assert!(allocated(&file) >= 4 << 20);
    };
    full(&mut channel);
    assert_eq!(
        common::run(&mut channel, request(Op::WriteZeroes, 0, 512).flags(Flags::NO_UNMAP)),
        Status::Ok
    );
    assert!(allocated(&file) >= 4 << 20, "NO_UNMAP keeps the space");
    assert_eq!(common::run(&mut channel, request(Op::WriteZeroes, 0, 512)), Status::Ok);
    assert!(allocated(&file) <= 2 << 20, "zeroes may be a hole");
    full(&mut channel);
    assert_eq!(common::run(&mut channel, request(Op::Discard, 256, 768)), Status::Ok);
    assert!(allocated(&file) <= 1 << 20);
    assert_eq!(common::run(&mut channel, request(Op::Read, 0, 1024).with(&memory)), Status::Ok);
    let mut expected = pattern(4 << 20, 1);
    expected[1 << 20..].fill(0);
    assert!(memory.bytes() == expected);
}

#[test]
fn holes_of_files_are_known() {
    let m = manager();
    let file = TempFile::new(1 << 20);
    let write = |at: u64, len: usize| {
        std::fs::File::options()
            .write(true)
            .open(&file.path)
            .unwrap()
            .write_all_at(&vec![1; len], at)
            .unwrap();
    };
    write(64 << 10, 64 << 10);
    uring::create(&m, params("a", &file.path)).unwrap();
    let bdev = m.get("a").unwrap();
    assert!(bdev.has_extents());
    let extents = |lba, blocks, max| -> Vec<(u64, bool)> {
        bdev.extents(lba, blocks, max).unwrap().iter().map(|e| (e.blocks, e.hole)).collect()
    };
    assert_eq!(extents(0, 256, 9), [(16, true), (16, false), (224, true)]);
    assert_eq!(extents(0, 256, 2), [(16, true), (16, false)]);
    assert_eq!(extents(20, 4, 9), [(4, false)]);
    assert_eq!(extents(31, 2, 9), [(1, false), (1, true)]);
    // A layer has the holes of its base.
    let latencies = bdev::delay::Latencies { avg_read: 0, p99_read: 0, avg_write: 0, p99_write: 0 };
    let layer = bdev::delay::Params { name: "d".into(), base_bdev_name: "a".into(), uuid: None, latencies };
    bdev::delay::create(&m, layer).unwrap();
    let layer = m.get("d").unwrap();
    assert!(layer.has_extents());
    assert_eq!(layer.extents(0, 256, 1), bdev.extents(0, 256, 1));
}

#[test]
fn a_shrunken_file_fails_and_a_grown_one_is_found() {
    let m = manager();
    let file = TempFile::new(1 << 20);
    uring::create(&m, params("a", &file.path)).unwrap();
    let sizes = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = sizes.clone();
    let d = m.open("a", Mode::ReadWrite, Box::new(move |e| heard.lock().unwrap().push(e))).unwrap();
    let mut channel = d.channel().unwrap();
    let handle = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
    let memory = Memory::scattered(&[8192], 0);
    handle.set_len(128 * 4096).unwrap();
    assert_eq!(common::run(&mut channel, request(Op::Read, 200, 2).with(&memory)), Status::IoError);
    assert_eq!(
        common::run(&mut channel, request(Op::Read, 127, 2).with(&memory)),
        Status::IoError,
        "half behind"
    );
    assert_eq!(common::run(&mut channel, request(Op::Read, 126, 2).with(&memory)), Status::Ok);
    handle.set_len(2 << 20).unwrap();
    uring::rescan(&m, "a").unwrap();
    uring::rescan(&m, "a").unwrap();
    assert_eq!(*sizes.lock().unwrap(), [Event::Resized { blocks: 512 }], "only changes are announced");
    assert_eq!(common::run(&mut channel, request(Op::Write, 510, 2).with(&memory)), Status::Ok);
}

/// tmpfs punches holes but has no zero range: this shows at run time only.
#[test]
fn missing_zero_range_is_made_up_for() {
    let dir = Path::new("/dev/shm");
    if !dir.is_dir() {
        println!("SKIPPED: no /dev/shm");
        return;
    }
    let path: PathBuf = dir.join(format!("bdev-test-{}.img", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let file = TempFile { path };
    let m = manager();
    uring::create(&m, params("a", &file.path)).unwrap();
    let mut channel = open(&m, "a");
    let memory = Memory::scattered(&[1 << 20], 0);
    for flags in [Flags::NO_UNMAP, Flags::NO_UNMAP | Flags::FUA, Flags::NONE] {
        memory.fill(&pattern(1 << 20, 4));
        assert_eq!(common::run(&mut channel, request(Op::Write, 0, 256).with(&memory)), Status::Ok);
        assert_eq!(common::run(&mut channel, request(Op::WriteZeroes, 1, 254).flags(flags)), Status::Ok);
        assert_eq!(common::run(&mut channel, request(Op::Read, 0, 256).with(&memory)), Status::Ok);
        let mut expected = pattern(1 << 20, 4);
        expected[4096..255 * 4096].fill(0);
        assert!(memory.bytes() == expected, "{flags:?}");
    }
}

#[test]
fn the_wait_descriptor_wakes_exactly_when_there_is_something() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let m = manager();
    let file = TempFile::new(1 << 20);
    uring::create(&m, params("a", &file.path)).unwrap();
    let mut channel = open(&m, "a");
    let memory = Memory::scattered(&[4096], 0);
    let readable = |channel: &IoChannel, within: Duration| {
        // SAFETY: the channel is borrowed, so its descriptor stays open.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(channel.wait_fd().unwrap()) };
        let timeout = Timespec::try_from(within).unwrap();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
    };
    let mut done = Completions::new();
    for round in 0..20 {
        assert!(!readable(&channel, Duration::from_millis(2)), "round {round}: idle");
        channel.submit(request(Op::Read, round, 1).with(&memory).io(round)).unwrap();
        channel.submit(request(Op::Flush, 0, 0).io(round)).unwrap();
        channel.kick();
        while channel.inflight() > 0 {
            assert!(
                channel.ready() || readable(&channel, test_support::patience()),
                "round {round}: no event"
            );
            channel.poll(&mut done);
        }
    }
    assert_eq!(done.len(), 40);
}

/// A loop device, detached on drop. `None`, with the reason printed, where this machine or user cannot have one.
struct Loop {
    device: PathBuf,
    _file: TempFile,
}

impl Loop {
    fn new(block_size: u32) -> Option<Self> {
        let file = TempFile::new(16 << 20);
        let block = block_size.to_string();
        let output = Command::new("losetup").args(["-f", "--show", "-b", &block]).arg(&file.path).output();
        match output {
            Ok(o) if o.status.success() => {
                let device = PathBuf::from(String::from_utf8(o.stdout).unwrap().trim());
                Some(Self { device, _file: file })
            }
            Ok(o) => {
                println!("SKIPPED: losetup: {}", String::from_utf8_lossy(&o.stderr).trim());
                None
            }
            Err(e) => {
                println!("SKIPPED: losetup: {e}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn block_device() {
    for block_size in [512u32, 4096] {
        let Some(device) = Loop::new(block_size) else { return };
        let m = manager();
        if block_size == 4096 {
            let e = uring::create(&m, Params { block_size: Some(512), ..params("x", &device.device) })
                .unwrap_err();
            assert!(e.to_string().contains("less than the 4096"), "{e}");
        }
        uring::create(&m, params("a", &device.device)).unwrap();
        let bdev = m.get_as::<Uring>("a").unwrap();
        assert!(bdev.direct(), "block devices always have direct I/O");
        let status = m.status("a").unwrap();
        assert_eq!(
            (status.bdev.info().block_size, status.blocks),
            (block_size, (16 << 20) / u64::from(block_size))
        );
        let busy = uring::create(&m, params("b", &device.device)).unwrap_err();
        assert!(busy.errno() == 16 && busy.to_string().contains("in use"), "{busy}");

        let mut channel = open(&m, "a");
        let all = 16 << 20 >> block_size.trailing_zeros();
        let memory = Memory::scattered(&[16 << 20], 0);
        let data = pattern(16 << 20, 8);
        memory.fill(&data);
        assert_eq!(
            common::run(&mut channel, request(Op::Write, 0, all).with(&memory).flags(Flags::FUA)),
            Status::Ok
        );
        let mut expected = data;
        for (i, op) in [Op::WriteZeroes, Op::WriteZeroes, Op::Discard].into_iter().enumerate() {
            let flags = if i == 0 { Flags::NO_UNMAP } else { Flags::NONE };
            let (lba, blocks) = (i as u64 * all / 4 + 8, all / 8);
            let status = common::run(&mut channel, request(op, lba, blocks).flags(flags));
            assert_eq!(status, Status::Ok, "{op:?} {flags:?}");
            expected[(lba as usize * block_size as usize)..][..blocks as usize * block_size as usize].fill(0);
        }
        assert_eq!(common::run(&mut channel, request(Op::Flush, 0, 0)), Status::Ok);
        assert_eq!(common::run(&mut channel, request(Op::Read, 0, all).with(&memory)), Status::Ok);
        // A loop device over a file reads zeroes where it discarded.
        assert!(memory.bytes() == expected);
        // Unaligned memory is bounced.
        let odd = Memory::scattered(&[block_size as usize * 3], 1);
        assert_eq!(common::run(&mut channel, request(Op::Read, 5, 3).with(&odd)), Status::Ok);
        let from = 5 * block_size as usize;
        assert_eq!(odd.bytes(), &expected[from..from + odd.bytes().len()]);
        drop((channel, bdev, status));
        m.unregister("a", Box::new(|| ())).unwrap();
        // The claim is gone with the bdev.
        uring::create(&m, params("again", &device.device)).unwrap();
        m.unregister("again", Box::new(|| ())).unwrap();
    }
}

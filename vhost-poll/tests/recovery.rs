//! A back end process is killed and started again under load: what was in flight is done, in order, and nothing is lost.

mod common;

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use common::*;
use vhost_driver::{Buf, Disk, NO_STATUS, Options};

const DISK_LEN: usize = 8 << 20;
const ORDER_LEN: usize = 4 << 20;

/// Not a test of its own: the back end process, when started by a test below.
#[test]
fn back_end_process() {
    let Ok(path) = std::env::var("VHOST_TEST_SOCKET") else { return };
    let path = PathBuf::from(path);
    let disk = shared_file(&path.with_extension("disk"), DISK_LEN);
    let order = shared_file(&path.with_extension("order"), ORDER_LEN);
    let disk = MemDisk::on(disk, Some(order));
    disk.slow.store(std::env::var("VHOST_TEST_SLOW").unwrap().parse().unwrap(), Ordering::Relaxed);
    disk.hold.store(std::env::var_os("VHOST_TEST_HOLD").is_some(), Ordering::Release);
    let _backend = Backend::serve(&path, disk, 1, true);
    // Until it is killed, or the test has ended and left it alone.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

struct Process {
    child: Child,
    path: PathBuf,
}

impl Process {
    fn start(path: &Path, slow: u64, hold: bool) -> Self {
        Self { child: Self::spawn(path, slow, hold), path: path.to_owned() }
    }

    fn restart(&mut self, slow: u64) {
        self.child = Self::spawn(&self.path, slow, false);
    }

    fn spawn(path: &Path, slow: u64, hold: bool) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "back_end_process", "--nocapture"]);
        command.env("VHOST_TEST_SOCKET", path).env("VHOST_TEST_SLOW", slow.to_string());
        if hold {
            command.env("VHOST_TEST_HOLD", "yes");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    /// SIGKILL.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn connect(&self, options: &Options) -> Disk {
        let mut disk = None;
        eventually("the back end listens", || {
            disk = Disk::connect(&self.path, options.clone()).ok();
            disk.is_some()
        });
        disk.unwrap()
    }

    fn reconnect(&self, disk: &mut Disk) {
        eventually("the back end listens again", || disk.reconnect(&self.path).is_ok());
    }

    /// The sectors asked for so far.
    fn order(&self) -> Vec<u64> {
        let order = shared_file(&self.path.with_extension("order"), ORDER_LEN);
        let word = |i: usize| {
            let mut bytes = [0; 8];
            assert!(order.copy_out(8 * i, &mut bytes));
            u64::from_ne_bytes(bytes)
        };
        (0..word(0) as usize).map(|i| word(i + 1)).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for extension in ["sock", "disk", "order"] {
            let _ = std::fs::remove_file(self.path.with_extension(extension));
        }
    }
}

fn kinds() -> [Options; 3] {
    let base = Options { inflight: true, queue_size: 64, max_io: 4096, ..Options::default() };
    [
        base.clone(),
        Options { packed: true, ..base.clone() },
        // A size that is no power of two, so that chains wrap.
        Options { packed: true, queue_size: 61, ..base },
    ]
}

/// Nothing is completed before the kill: all of it is repeated, in the order in which it was asked for.
#[test]
fn requests_in_flight_are_repeated_in_order() {
    for (n, options) in kinds().into_iter().enumerate() {
        let path = socket_path(&format!("order{n}"));
        let mut process = Process::start(&path, 0, true);
        let mut disk = process.connect(&options);
        let sectors: Vec<u64> = (0..12).map(|i| (i * 7 + 5) % 13 * 8).collect();
        for (i, sector) in sectors.iter().enumerate() {
            let slot = disk.take(0).unwrap();
            disk.ram.write(disk.request(0, slot).data, &[i as u8 + 1; 1024]);
            // Two data buffers make chains of four descriptors.
            let data = disk.request(0, slot).data;
            let buf = |addr| Buf { addr, len: 512, write: false };
            assert!(disk.submit_bufs(0, slot, OUT, *sector, &[buf(data + 512), buf(data)]));
        }
        disk.publish(0);
        eventually("all are taken", || process.order() == sectors);
        process.kill();
        std::fs::remove_file(path.with_extension("order")).unwrap();
        // Descriptors of a split ring belong to the device until they are used; a packed ring's may be overwritten by it.
        process.restart(0);
        process.reconnect(&mut disk);
        for _ in 0..12 {
            assert_eq!(disk.wait(0).unwrap().1, 0);
        }
        assert_eq!(process.order(), sectors, "{options:?}");
        for (i, sector) in sectors.iter().enumerate() {
            assert_eq!(disk.read(*sector, 1024).unwrap(), [i as u8 + 1; 1024]);
        }
    }
}

/// Random kills under load: every request completes exactly once, and reads find what was written.
#[test]
fn kills_under_load_lose_and_repeat_nothing_visible() {
    for (n, options) in kinds().into_iter().enumerate() {
        let path = socket_path(&format!("load{n}"));
        let mut process = Process::start(&path, 2, false);
        let mut disk = process.connect(&options);
        // Sector by slot in flight, and the last value written to each sector.
        let mut flying: HashMap<u16, (u64, u8, bool)> = HashMap::new();
        let mut values: HashMap<u64, u8> = HashMap::new();
        let mut seed = 12345 + n as u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut done = 0u64;
        for round in 0..6 {
            let until = done + 20 + random(2000);
            eventually("so many requests", || {
                // No pauses between them.
                for _ in 0..1000 {
                    submit_some(&mut disk, &mut flying, &values, &mut random);
                    done += collect(&mut disk, &mut flying, &mut values);
                    if done >= until {
                        return true;
                    }
                }
                false
            });
            process.kill();
            // What the dead process has completed is taken before or after the new one comes.
            if round % 2 == 0 {
                done += collect(&mut disk, &mut flying, &mut values);
            }
            process.restart(2);
            process.reconnect(&mut disk);
        }
        eventually(format_args!("{options:?}: the end of all requests"), || {
            done += collect(&mut disk, &mut flying, &mut values);
            flying.is_empty()
        });
        assert!(done >= 6 * 20, "{options:?}: only {done} requests");
        for (sector, value) in values {
            assert_eq!(disk.read(sector, 512).unwrap(), [value; 512], "{options:?}, sector {sector}");
        }
    }
}

fn submit_some(
    disk: &mut Disk,
    flying: &mut HashMap<u16, (u64, u8, bool)>,
    values: &HashMap<u64, u8>,
    random: &mut impl FnMut(u64) -> u64,
) {
    let mut any = false;
    while flying.len() < 14 {
        let sector = random(200);
        if flying.values().any(|(s, ..)| *s == sector) {
            continue;
        }
        let Some(slot) = disk.take(0) else { break };
        let write = random(3) > 0;
        let value = if write { random(255) as u8 + 1 } else { values.get(&sector).copied().unwrap_or(0) };
        disk.ram.write(disk.request(0, slot).data, &[if write { value } else { 0xaa }; 512]);
        if !disk.submit(0, slot, if write { OUT } else { IN }, sector, 512, write) {
            break;
        }
        flying.insert(slot, (sector, value, write));
        any = true;
    }
    if any {
        disk.publish(0);
    }
}

fn collect(
    disk: &mut Disk,
    flying: &mut HashMap<u16, (u64, u8, bool)>,
    values: &mut HashMap<u64, u8>,
) -> u64 {
    let mut count = 0;
    while let Some((slot, status)) = disk.poll(0) {
        assert_eq!(status, 0, "slot {slot} (no status is {NO_STATUS})");
        let (sector, value, write) = flying.remove(&slot).expect("a request completes once");
        if write {
            values.insert(sector, value);
        } else {
            let got = disk.ram.read(disk.request(0, slot).data, 512);
            assert_eq!(got, [value; 512], "sector {sector}");
        }
        count += 1;
    }
    count
}

//! A device number that the kernel knows already: whose is it, and may it be taken over?

use bdev::Info;
use rustix::process::Pid;
use ublk_poll::{DevInfo, DevState, DeviceFlags};

use super::bridge;

/// What to do about a device that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Take it over.
    Recover,
    /// Its server is dying; ask again soon.
    Wait,
    /// Leave it alone: why, in words.
    Refuse(String),
}

/// Who wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// `ublk_start_disk`: only what this program made of the same bdev, and whose contents outlived the crash.
    Start,
    /// `ublk_recover_disk`: what the operator says.
    Recover,
}

/// Judges device `info` for the bdev `bdev`. `alive`: whether a process is.
pub(super) fn judge(wish: Wish, device: &DevInfo, bdev: &Info, alive: impl Fn(i32) -> bool) -> Verdict {
    let (id, name) = (device.dev_id, &bdev.name);
    let ours = bridge::is_marked(device.ublksrv_flags);
    let refuse = |text: String| Verdict::Refuse(format!("ublk device {id} {text}"));
    match device.dev_state() {
        DevState::Live if alive(device.ublksrv_pid) => {
            return refuse(format!("is served by process {}; choose another ublk_id", device.ublksrv_pid));
        }
        // The kernel has not noticed yet that its server is gone.
        DevState::Live => {}
        DevState::Quiesced => {}
        DevState::Dead => {
            let remedy = if ours { "ublk_stop_disk removes it" } else { "its owner must delete it" };
            return refuse(format!("was added but is not started; {remedy}"));
        }
        other => return refuse(format!("is in a state that cannot be recovered ({other:?})")),
    }
    if wish == Wish::Start {
        if !ours {
            return refuse(
                "waits for its former server, which was another program; choose another ublk_id".into(),
            );
        }
        if device.ublksrv_flags != bridge::mark(name) {
            let text = format!(
                "is left over from a crash and was not bdev {name}; ublk_stop_disk removes it, ublk_recover_disk \
                 takes it over if the bdev was only renamed"
            );
            return refuse(text);
        }
        if bdev.volatile {
            let text = format!(
                "is left over from a crash, and bdev {name} ({}) lost its contents in it; ublk_stop_disk removes the \
                 device, with errors for its users",
                bdev.product_name
            );
            return refuse(text);
        }
    }
    match DeviceFlags::of_device(device.flags) {
        Err(why) => refuse(format!("cannot be taken over: {why}")),
        Ok(flags) if !flags.recovery => refuse("was made without user recovery; delete it".into()),
        Ok(_) if device.dev_state() == DevState::Live => Verdict::Wait,
        Ok(_) => Verdict::Recover,
    }
}

/// Whether there is another process of this number. It is never this one: a container gives each life of the program the
/// same number.
pub(super) fn is_alive(pid: i32) -> bool {
    if pid <= 0 || pid.cast_unsigned() == std::process::id() {
        return false;
    }
    let Some(pid) = Pid::from_raw(pid) else { return false };
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

#[cfg(test)]
mod tests {
    use bdev::{Op, OpSet};

    use super::*;

    fn bdev(name: &str, volatile: bool) -> Info {
        Info {
            name: name.into(),
            aliases: Vec::new(),
            product_name: "Test disk",
            uuid: uuid::Uuid::nil(),
            block_size: 512,
            physical_block_size: 512,
            native: OpSet::of(&[Op::Read, Op::Write]),
            native_fua: false,
            write_cache: false,
            read_only: false,
            volatile,
            discard_granularity: 0,
            rotational: false,
            max_unmap_blocks: 1,
            buffer_align: 1,
        }
    }

    fn device(state: u16, mark: u64) -> DevInfo {
        let flags =
            DeviceFlags { user_copy: true, recovery: true, unprivileged: false, update_size: false }.bits();
        DevInfo { dev_id: 3, state, flags, ublksrv_flags: mark, ublksrv_pid: 77, ..DevInfo::default() }
    }

    const LIVE: u16 = 1;
    const QUIESCED: u16 = 2;

    fn refused(verdict: Verdict, word: &str) {
        match verdict {
            Verdict::Refuse(text) => assert!(text.contains(word), "{text}"),
            other => panic!("{other:?} instead of a refusal with \"{word}\""),
        }
    }

    #[test]
    fn our_own_quiesced_device_is_taken_over() {
        let disk = bdev("A", false);
        let ours = device(QUIESCED, bridge::mark("A"));
        assert_eq!(judge(Wish::Start, &ours, &disk, |_| false), Verdict::Recover);
        let dying = device(LIVE, bridge::mark("A"));
        assert_eq!(judge(Wish::Start, &dying, &disk, |_| false), Verdict::Wait);
    }

    #[test]
    fn a_start_takes_nothing_else() {
        let disk = bdev("A", false);
        let start = |device: DevInfo, disk: &Info| judge(Wish::Start, &device, disk, |pid| pid == 77);
        refused(start(device(LIVE, bridge::mark("A")), &disk), "process 77");
        refused(start(device(QUIESCED, 0), &disk), "another program");
        refused(start(device(QUIESCED, bridge::mark("B")), &disk), "renamed");
        refused(start(device(QUIESCED, bridge::mark("A")), &bdev("A", true)), "lost its contents");
        refused(start(device(0, bridge::mark("A")), &disk), "ublk_stop_disk");
        refused(start(device(9, bridge::mark("A")), &disk), "Unknown(9)");
    }

    #[test]
    fn an_operator_may_recover_what_was_another_programs() {
        let disk = bdev("A", true);
        assert_eq!(judge(Wish::Recover, &device(QUIESCED, 0), &disk, |_| true), Verdict::Recover);
        let fixed = DevInfo { flags: 0, ..device(QUIESCED, 0) };
        refused(judge(Wish::Recover, &fixed, &disk, |_| true), "without user recovery");
        refused(judge(Wish::Recover, &device(LIVE, 0), &disk, |_| true), "process 77");
    }

    #[test]
    fn processes_are_found() {
        let parent = std::os::unix::process::parent_id();
        assert!(is_alive(parent as i32));
        assert!(!is_alive(std::process::id() as i32));
        assert!(!is_alive(-1) && !is_alive(0) && !is_alive(i32::MAX));
    }
}

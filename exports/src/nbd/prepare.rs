//! Before a disk is made: which device, by which interface, and is it free? Blocks.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nbd_poll::kernel::netlink::Netlink;
use nbd_poll::kernel::{self, sysfs};

use super::bridge;
use super::claim::{Claim, ClaimError, claim, judge};
use super::disk::{Interface, device_name, disk_name};
use super::methods::Control;
use crate::host;

/// How long a device that was disconnected may take until it is free.
pub(super) const GONE_TIME: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub program: &'static str,
    pub bdev_name: String,
    pub block_size: u32,
    pub read_only: bool,
    /// The bdev began empty when the program started.
    pub loses_contents: bool,
    /// `None`: any.
    pub index: Option<u32>,
    pub control: Control,
    pub run_dir: PathBuf,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Prepared {
    pub interface: Interface,
    /// `None`: the kernel shall choose.
    pub index: Option<u32>,
    pub claim: Option<Claim>,
    pub plan: Plan,
}

/// How to get the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Make it.
    Make,
    /// It is there, left over from an earlier run: give it so many sockets.
    Recover {
        /// At least.
        sockets: usize,
    },
}

/// Why not.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// EBUSY.
    #[error("{device} is in use: {who}")]
    Busy { device: String, who: String },
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}

impl Refused {
    pub(super) fn busy(index: u32, who: impl Into<String>) -> Self {
        Self::Busy { device: device_name(index), who: who.into() }
    }

    /// EBUSY, with everybody who uses the device.
    pub(super) fn busy_with_users(index: u32) -> Self {
        let users = users(index).join("; ");
        Self::busy(index, if users.is_empty() { "by whom is not to be seen from here".into() } else { users })
    }

    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::Busy { .. } => rustix::io::Errno::BUSY.raw_os_error(),
            Self::Kernel(e) => e.errno(),
        }
    }
}

/// Looks for the device and whether it may be taken.
pub(super) fn prepare(wish: &Wish) -> Result<Prepared, Refused> {
    let interface = interface(wish.control)?;
    let index = wish.index.or_else(|| leftover(wish)).or_else(|| match interface {
        Interface::Netlink => None,
        Interface::Ioctl => sysfs::devices().into_iter().find(|i| is_free(*i)),
    });
    let Some(index) = index else {
        return match interface {
            Interface::Netlink => Ok(Prepared { interface, index: None, claim: None, plan: Plan::Make }),
            Interface::Ioctl => {
                let who = "every device; load the driver with more: modprobe nbd nbds_max=64".to_owned();
                Err(Refused::Busy { device: "/dev/nbd*".to_owned(), who })
            }
        };
    };
    let claim = match claim(&wish.run_dir, index) {
        Ok(claim) => Some(claim),
        Err(held @ ClaimError::Held(_)) => return Err(Refused::busy(index, held.to_string())),
        Err(error @ ClaimError::System { .. }) => {
            tracing::warn!(%error, "an NBD device will not outlive a crash of this program");
            None
        }
    };
    match plan(wish, index, interface, claim.as_ref()) {
        Ok(plan) => Ok(Prepared { interface, index: Some(index), claim, plan }),
        Err(refused) => {
            // A former record stays; a claim that only this call made goes.
            claim.into_iter().filter(|c| c.former.is_none()).for_each(Claim::give_up);
            Err(refused)
        }
    }
}

fn interface(control: Control) -> Result<Interface, kernel::Error> {
    if control == Control::Ioctl {
        return if sysfs::devices().is_empty() { Err(kernel::Error::NoDriver) } else { Ok(Interface::Ioctl) };
    }
    match Netlink::open() {
        Ok(_) => Ok(Interface::Netlink),
        // Before Linux 4.12, or where netlink is not to be had.
        Err(kernel::Error::NoDriver) if control == Control::Auto && !sysfs::devices().is_empty() => {
            Ok(Interface::Ioctl)
        }
        Err(e) => Err(e),
    }
}

/// A device that an earlier run made of the same bdev, and nobody serves.
fn leftover(wish: &Wish) -> Option<u32> {
    let backend = bridge::backend(wish.program, &wish.bdev_name);
    sysfs::devices().into_iter().find(|index| {
        sysfs::state(*index).is_some_and(|s| s.backend.as_ref() == Some(&backend))
            && claim(&wish.run_dir, *index).is_ok()
    })
}

fn is_free(index: u32) -> bool {
    sysfs::state(index).is_some_and(|s| !s.is_made()) && users(index).is_empty()
}

/// What is to be done with device `index`.
fn plan(wish: &Wish, index: u32, interface: Interface, claim: Option<&Claim>) -> Result<Plan, Refused> {
    let Some(device) = sysfs::state(index).filter(sysfs::State::is_made) else {
        return match interface {
            // CONNECT itself refuses a device that is open.
            Interface::Netlink => Ok(Plan::Make),
            Interface::Ioctl if is_free(index) => Ok(Plan::Make),
            Interface::Ioctl if sysfs::state(index).is_none() => {
                let what = format!("cannot open {}", device_name(index));
                Err(kernel::Error::new(what, rustix::io::Errno::NODEV.into()).into())
            }
            Interface::Ioctl => Err(Refused::busy_with_users(index)),
        };
    };
    let former = claim.and_then(|c| c.former.as_ref());
    if let Err(why) = judge(&device, former, wish.program, &wish.bdev_name) {
        let maker = sysfs::maker(index).map_or(String::new(), |m| format!("; {m}"));
        return Err(Refused::busy(index, format!("it {why}{maker}")));
    }
    if claim.is_none() {
        return Err(Refused::busy(index, "without a claim nobody can say whether its maker is alive"));
    }
    let unfit = if interface == Interface::Ioctl {
        Some("only netlink can give it new sockets".to_owned())
    } else if wish.loses_contents {
        Some(format!("bdev {} lost its contents with the earlier run", wish.bdev_name))
    } else if device.block_size != wish.block_size {
        Some(format!("it has blocks of {} bytes, the bdev of {}", device.block_size, wish.block_size))
    } else if device.read_only != wish.read_only {
        Some("it is read-only and the new one would not be, or the other way round".to_owned())
    } else {
        None
    };
    match unfit {
        None => {
            let recorded = former.map_or(0, |r| r.connections);
            Ok(Plan::Recover { sockets: recorded.max(device.sockets).max(1) })
        }
        Some(why) => replace(index, &why),
    }
}

/// A device that is ours but cannot be recovered is made anew, if nobody would notice.
fn replace(index: u32, why: &str) -> Result<Plan, Refused> {
    let users = uses(index).join("; ");
    if !users.is_empty() {
        return Err(Refused::busy(
            index,
            format!("left over from an earlier run, {why}, and still used: {users}"),
        ));
    }
    tracing::info!(device = device_name(index), why, "a device left over from an earlier run is made anew");
    Netlink::open()?.disconnect(index)?;
    if wait_gone(index) { Ok(Plan::Make) } else { Err(Refused::busy_with_users(index)) }
}

/// Who uses the device, in words.
fn uses(index: u32) -> Vec<String> {
    [host::users(&disk_name(index)), sysfs::openers(index)].concat()
}

/// Who made the device, and who uses it.
fn users(index: u32) -> Vec<String> {
    sysfs::maker(index).into_iter().chain(uses(index)).collect()
}

/// Waits until the kernel has let go of a device that was disconnected. False: somebody keeps it open.
pub(super) fn wait_gone(index: u32) -> bool {
    let until = Instant::now() + GONE_TIME;
    while sysfs::state(index).is_some_and(|s| s.is_made()) {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

//! The environment: memory, PCI devices, cores. `spdk_env_init` and what has to be right before it.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::thread::CpuSet;
use spdk_sys as sys;

use super::{ffi, log, memory};

/// What SPDK is started with, as `spdk_env_opts` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Ordinary memory in place of hugepages. Needs no privilege, and allows no PCI devices.
    pub no_huge: bool,
    /// MiB that are taken at once. Absent: with hugepages as it is needed, else [`Options::NO_HUGE_MEM`].
    pub mem_size: Option<u32>,
    /// Mount point of hugetlbfs.
    pub hugedir: Option<String>,
    /// Leaves all PCI devices alone.
    pub no_pci: bool,
    /// PCI addresses of the only devices to be used.
    pub pci_allowed: Vec<String>,
    /// PCI addresses of devices not to be used.
    pub pci_blocked: Vec<String>,
    /// "pa" or "va"; absent: DPDK's choice.
    pub iova_mode: Option<String>,
    /// EAL's `--lcores`. Absent: one lcore, that may run on any core of this process. It says nothing about the reactors.
    pub lcore_map: Option<String>,
    /// One file for each memory segment.
    pub single_file_segments: bool,
    /// VF token of vfio, a UUID.
    pub vf_token: Option<String>,
    /// More arguments for EAL.
    pub env_context: Option<String>,
}

impl Options {
    /// MiB without hugepages, where memory cannot grow: SPDK's pools take 200.
    pub const NO_HUGE_MEM: u32 = 512;
}

/// SPDK did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It ran before.
    #[error(
        "SPDK was started in this process before; it can only be started once, so start the program again"
    )]
    Again,
    /// No hugepages.
    #[error(
        "no hugepages are free, which SPDK takes its memory from: sysctl vm.nr_hugepages=1024, or use \"no_huge\": true \
         where no PCI device is needed"
    )]
    NoHugepages,
    /// Hugepages, but no file system of them.
    #[error(
        "{place}: no hugetlbfs that this user can write is mounted there, which SPDK takes hugepages from: mount -t \
         hugetlbfs -o uid=USER nodev /dev/hugepages (as root), or use \"no_huge\": true where no PCI device is needed"
    )]
    NoMount {
        /// `hugedir`, or where it was looked for.
        place: String,
    },
    /// An option.
    #[error("{option} \"{value}\": {right}")]
    Option {
        /// Its name.
        option: &'static str,
        /// As given.
        value: String,
        /// What would be right.
        right: &'static str,
    },
    /// A step of SPDK's start failed.
    #[error("{step} failed ({}){}{}", ffi::errno(*.rc), if .log.is_empty() { "" } else { ": " }, .log)]
    Step {
        /// The function.
        step: &'static str,
        /// Negative errno.
        rc: i32,
        /// What SPDK said.
        log: String,
    },
    /// Linked without its modules.
    #[error(
        "SPDK's bdev subsystem is not linked: the libraries' constructors were dropped; build again with SPDK's static \
         libraries"
    )]
    NotLinked,
}

impl StartError {
    pub(super) fn step(step: &'static str, rc: i32) -> Self {
        Self::Step { step, rc, log: log::recent_errors() }
    }
}

static STARTED: AtomicBool = AtomicBool::new(false);

/// Starts the environment. The calling thread keeps the cores that it had: EAL would pin it, and every thread that it
/// starts later.
pub(super) fn init(options: &Options) -> Result<(), StartError> {
    let hugepages = !options.no_huge;
    if hugepages && !free_hugepages() {
        return Err(StartError::NoHugepages);
    }
    if hugepages {
        writable_hugetlbfs(options.hugedir.as_deref())?;
    }
    let mut allowed = addresses("pci_allowed", &options.pci_allowed)?;
    let mut blocked = addresses("pci_blocked", &options.pci_blocked)?;
    if STARTED.swap(true, Ordering::AcqRel) {
        return Err(StartError::Again);
    }
    log::take_over();
    let cores = rustix::thread::sched_getaffinity(None).ok();
    let text = |option: &Option<String>| option.as_deref().map(ffi::c_string);
    let pointer = |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
    let name = ffi::c_string("rnbd");
    let lcores = ffi::c_string(&options.lcore_map.clone().unwrap_or_else(|| lcore_map(cores.as_ref())));
    let (hugedir, iova, token) = (text(&options.hugedir), text(&options.iova_mode), text(&options.vf_token));
    let context = text(&options.env_context);
    let memory = options.mem_size.or(options.no_huge.then_some(Options::NO_HUGE_MEM));
    // SAFETY: plain C data, for which zeroes are valid; `spdk_env_opts_init` wants its size first. Every string and list
    // lives until `spdk_env_init` has returned, which keeps none of them.
    let rc = unsafe {
        let mut opts: sys::spdk_env_opts = std::mem::zeroed();
        opts.opts_size = size_of::<sys::spdk_env_opts>() as _;
        sys::spdk_env_opts_init(&mut opts);
        opts.name = name.as_ptr();
        opts.core_mask = std::ptr::null();
        opts.lcore_map = lcores.as_ptr();
        opts.shm_id = -1;
        opts.mem_size = memory.map_or(-1, |m| m.min(i32::MAX as u32) as i32);
        opts.no_huge = options.no_huge;
        // Devices reach no memory but hugepages.
        opts.no_pci = options.no_pci || options.no_huge;
        opts.hugepage_single_segments = options.single_file_segments;
        opts.hugedir = pointer(&hugedir);
        opts.iova_mode = pointer(&iova);
        opts.vf_token = pointer(&token);
        opts.env_context = context.as_ref().map_or(std::ptr::null_mut(), |c| c.as_ptr().cast_mut().cast());
        if !allowed.is_empty() {
            opts.num_pci_addr = allowed.len() as _;
            opts.pci_allowed = allowed.as_mut_ptr();
        } else if !blocked.is_empty() {
            opts.num_pci_addr = blocked.len() as _;
            opts.pci_blocked = blocked.as_mut_ptr();
        }
        sys::spdk_env_init(&opts)
    };
    if let Some(cores) = cores {
        // What the thread was allowed before, so the kernel has no reason to refuse.
        let _ = rustix::thread::sched_setaffinity(None, &cores);
    }
    if rc != 0 {
        return Err(StartError::step("spdk_env_init", rc));
    }
    memory::set(hugepages, hugepages && !options.no_pci);
    Ok(())
}

/// Ends the environment, and takes the folder away that EAL made for it and leaves behind.
///
/// # Safety
/// Nothing of it is in use any more.
pub(super) unsafe fn finish() {
    // SAFETY: by the caller's promise.
    unsafe { sys::spdk_env_fini() };
    let name = format!("dpdk/spdk_pid{}", std::process::id());
    // EAL's rule: `eal_create_runtime_dir` in DPDK's lib/eal/unix/eal_filesystem.c.
    let place = if rustix::process::getuid().is_root() {
        "/var/run".into()
    } else {
        std::env::var("XDG_RUNTIME_DIR").unwrap_or_else(|_| "/tmp".into())
    };
    // Not there, or not empty: then it is somebody's.
    let _ = std::fs::remove_dir(std::path::Path::new(&place).join(name));
}

fn addresses(option: &'static str, list: &[String]) -> Result<Vec<sys::spdk_pci_addr>, StartError> {
    list.iter()
        .map(|value| {
            // SAFETY: plain C data; SPDK reads a C string and writes the address.
            let (rc, address) = unsafe {
                let mut address: sys::spdk_pci_addr = std::mem::zeroed();
                (sys::spdk_pci_addr_parse(&mut address, ffi::c_string(value).as_ptr()), address)
            };
            let right = "a PCI address looks like 0000:65:00.0";
            if rc == 0 {
                Ok(address)
            } else {
                Err(StartError::Option { option, value: value.clone(), right })
            }
        })
        .collect()
}

/// One lcore on all the cores that this thread may use.
fn lcore_map(cores: Option<&CpuSet>) -> String {
    let list: Vec<String> = match cores {
        Some(set) => (0..CpuSet::MAX_CPU).filter(|c| set.is_set(*c)).map(|c| c.to_string()).collect(),
        None => Vec::new(),
    };
    if list.is_empty() { "0@0".into() } else { format!("0@({})", list.join(",")) }
}

/// Whether a hugepage of any size is free, or may be had on demand.
fn free_hugepages() -> bool {
    let number = |path: std::path::PathBuf| {
        std::fs::read_to_string(path).ok().and_then(|t| t.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let Ok(sizes) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return false };
    sizes.flatten().any(|size| {
        number(size.path().join("free_hugepages")) + number(size.path().join("nr_overcommit_hugepages")) > 0
    })
}

/// Whether DPDK will find a hugetlbfs that it can make files in.
fn writable_hugetlbfs(hugedir: Option<&str>) -> Result<(), StartError> {
    use rustix::fs::{Access, access};
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        words.next().zip(words.next()).filter(|(_, kind)| *kind == "hugetlbfs").map(|(place, _)| place)
    });
    let wanted = |place: &&str| hugedir.is_none_or(|dir| dir.trim_end_matches('/').starts_with(place));
    if places.into_iter().filter(wanted).any(|place| access(place, Access::WRITE_OK).is_ok()) {
        return Ok(());
    }
    Err(StartError::NoMount { place: hugedir.unwrap_or("/proc/mounts").to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lcores_are_the_cores_of_this_process() {
        let mut set = CpuSet::new();
        assert_eq!(lcore_map(Some(&set)), "0@0");
        set.set(1);
        set.set(5);
        assert_eq!(lcore_map(Some(&set)), "0@(1,5)");
    }

    #[test]
    fn wrong_addresses_are_named() {
        let Err(error) = addresses("pci_allowed", &["0000:65:00.0".into(), "nonsense".into()]) else {
            panic!("it is no address");
        };
        assert_eq!(error.to_string(), "pci_allowed \"nonsense\": a PCI address looks like 0000:65:00.0");
    }
}

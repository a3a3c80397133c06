//! User, groups and capabilities.

use nix::unistd::{Gid, Group, Uid, User, initgroups, setgroups, setresgid, setresuid};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities,
};

/// Whom to become.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    uid: Uid,
    gid: Gid,
    /// Its name, by which it has further groups.
    name: Option<std::ffi::CString>,
}

/// Capabilities that stay.
#[derive(Clone, Debug)]
pub(super) struct Kept(CapabilitySet);

impl Default for Kept {
    fn default() -> Self {
        Self(CapabilitySet::empty())
    }
}

/// Those that anything here has a use for, and which.
const NAMES: [(&str, CapabilitySet); 7] = [
    // Kernel NBD and ublk devices.
    ("sys_admin", CapabilitySet::SYS_ADMIN),
    // Threads that write a device's data back do not wait for that very device (PR_SET_IO_FLUSHER).
    ("sys_resource", CapabilitySet::SYS_RESOURCE),
    // Receive buffers beyond net.core.rmem_max.
    ("net_admin", CapabilitySet::NET_ADMIN),
    // Ports below 1024.
    ("net_bind_service", CapabilitySet::NET_BIND_SERVICE),
    // Data memory beyond RLIMIT_MEMLOCK.
    ("ipc_lock", CapabilitySet::IPC_LOCK),
    // Raw queue pairs of some RDMA devices.
    ("net_raw", CapabilitySet::NET_RAW),
    // Disks and files that the user may not open.
    ("dac_override", CapabilitySet::DAC_OVERRIDE),
];

impl Kept {
    /// `names`: of capabilities, comma-separated, in any case, with or without CAP_.
    pub(super) fn parse(names: &str) -> Result<Self, String> {
        let mut kept = CapabilitySet::empty();
        for word in names.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let lower = word.to_ascii_lowercase();
            let name = lower.strip_prefix("cap_").unwrap_or(&lower);
            let Some((_, flag)) = NAMES.iter().find(|(known, _)| *known == name) else {
                let known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
                return Err(format!("--capabilities '{word}': use some of {}", known.join(", ")));
            };
            kept |= *flag;
        }
        Ok(Self(kept))
    }
}

impl Identity {
    /// By name or number, which is looked up.
    pub(super) fn find(user: Option<&str>, group: Option<&str>) -> Result<Option<Self>, String> {
        let Some(user) = user else {
            return match group {
                None => Ok(None),
                Some(_) => Err("--group goes with --user".into()),
            };
        };
        let group = group.map(find_group).transpose()?;
        let failed = |e| format!("--user {user}: cannot look it up: {e}");
        let by_name = User::from_name(user).map_err(failed)?;
        let number = user.parse().ok().map(Uid::from_raw);
        let found = match (by_name, number) {
            (Some(found), _) => Some(found),
            (None, Some(uid)) => User::from_uid(uid).map_err(failed)?,
            (None, None) => return Err(format!("--user {user}: there is no such user")),
        };
        match (found, number) {
            (Some(found), _) => {
                let name = std::ffi::CString::new(found.name).ok();
                Ok(Some(Self { uid: found.uid, gid: group.unwrap_or(found.gid), name }))
            }
            (None, Some(uid)) => {
                let gid = group.ok_or(format!("--user {user} has no name and so no group: give --group"))?;
                Ok(Some(Self { uid, gid, name: None }))
            }
            (None, None) => Err(format!("--user {user}: there is no such user")),
        }
    }
}

fn find_group(group: &str) -> Result<Gid, String> {
    let found = Group::from_name(group).map_err(|e| format!("--group {group}: cannot look it up: {e}"))?;
    let number = || group.parse().ok().map(Gid::from_raw);
    found.map(|g| g.gid).or_else(number).ok_or(format!("--group {group}: there is no such group"))
}

/// Becomes `identity`, with the capabilities `kept` and no way to any other.
pub(super) fn take(identity: Option<&Identity>, kept: &Kept) -> Result<(), String> {
    let now = capabilities(None).map_err(|e| format!("cannot read capabilities: {e}"))?;
    let missing = kept.0 - now.permitted;
    if !missing.is_empty() {
        let names = NAMES.iter().filter(|(_, flag)| missing.contains(*flag)).map(|(name, _)| *name);
        let names: Vec<&str> = names.collect();
        return Err(format!(
            "--capabilities {}: the program has not got that; start it as root",
            names.join(",")
        ));
    }
    if let Some(identity) = identity {
        if now.effective.contains(CapabilitySet::SYS_RESOURCE) {
            // What only root may raise. A refusal leaves the limit, and running into it is reported where it happens.
            let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
        }
        make_meeting_place(identity)?;
    }
    if now.effective.contains(CapabilitySet::SETPCAP) {
        bound(kept.0)?;
    }
    if let Some(identity) = identity {
        become_user(identity)?;
    }
    let sets = CapabilitySets { effective: kept.0, permitted: kept.0, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(|e| format!("cannot give up capabilities: {e}"))
}

/// Empties the bounding set of all that is not kept.
fn bound(kept: CapabilitySet) -> Result<(), String> {
    for bit in 0..u64::BITS {
        let flag = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(flag) {
            continue;
        }
        match remove_capability_from_bounding_set(flag) {
            Ok(()) => {}
            // Behind the last that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(format!("cannot give up capability {bit}: {e}")),
        }
    }
    Ok(())
}

fn become_user(identity: &Identity) -> Result<(), String> {
    let Identity { uid, gid, name } = identity;
    let failed = |what: &'static str| {
        move |e: nix::Error| format!("--user: cannot change the {what}: {e}; start the program as root")
    };
    if Uid::effective() == *uid && Uid::current() == *uid && Gid::effective() == *gid {
        return Ok(());
    }
    match name {
        Some(name) => initgroups(name, *gid).map_err(failed("groups"))?,
        None => setgroups(&[]).map_err(failed("groups"))?,
    }
    setresgid(*gid, *gid, *gid).map_err(failed("group"))?;
    set_keep_capabilities(true).map_err(|e| format!("cannot keep capabilities: {e}"))?;
    setresuid(*uid, *uid, *uid).map_err(failed("user"))?;
    set_keep_capabilities(false).map_err(|e| format!("cannot give up keeping capabilities: {e}"))
}

/// The directory where software RoCE of that user meets its like, where nobody else can take it first (see `places.rs` of
/// soft-roce).
fn make_meeting_place(identity: &Identity) -> Result<(), String> {
    let (uid, gid) = (identity.uid.as_raw(), identity.gid.as_raw());
    if uid == 0 || !Uid::effective().is_root() {
        return Ok(());
    }
    let path = format!("/run/rnbd-{uid}");
    let made = rustix::fs::mkdir(&path, rustix::fs::Mode::RWXU);
    let owned = made
        .map_err(std::io::Error::from)
        .and_then(|()| std::os::unix::fs::lchown(&path, Some(uid), Some(gid)));
    match owned {
        // It is looked at when it is used.
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            tracing::warn!(path, error = %e, "cannot make the directory in which programs of one user find each other");
            Ok(())
        }
        _ => Ok(()),
    }
}

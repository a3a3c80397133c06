//! Files: what no option names cannot be opened, made or removed. Source: `landlock(7)`.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetStatus,
};

/// Rights that are known; a kernel that knows fewer handles those.
const KNOWN: ABI = ABI::V5;

/// Read by the C library, the RDMA libraries and this program.
const READ: [&str; 6] = ["/usr", "/lib", "/lib64", "/etc", "/sys", "/proc"];
/// Devices, and directories of the program's own.
const WRITE: [&str; 5] = ["/dev/infiniband", "/dev/null", "/dev/zero", "/dev/urandom", "/run/rnbd"];

/// Leaves the process `paths`, what every program needs, and the removal of `rpc_socket`.
pub(super) fn restrict(paths: &[PathBuf], rpc_socket: &Path) -> Result<(), String> {
    let (read, all) = (AccessFs::from_read(KNOWN), AccessFs::from_all(KNOWN));
    let failed = |e: landlock::RulesetError| format!("--allow-path: {e}");
    let mut rules = Ruleset::default().handle_access(all).and_then(Ruleset::create).map_err(failed)?;
    let uid = rustix::process::geteuid().as_raw();
    let own = [format!("/run/rnbd-{uid}"), format!("/run/user/{uid}/rnbd"), format!("/tmp/rnbd-{uid}")];
    make_one(uid, &own);
    let read = READ.iter().map(|path| (Path::new(*path), read));
    let write =
        WRITE.iter().copied().chain(own.iter().map(String::as_str)).map(|path| (Path::new(path), all));
    for (path, access) in read.chain(write) {
        // What is not there cannot be opened anyway.
        if let Ok(fd) = PathFd::new(path) {
            rules = allow(rules, path, fd, access)?;
        }
    }
    let parent = rpc_socket.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = paths.iter().map(|path| (path.as_path(), all));
    for (path, access) in named.chain([(parent, AccessFs::RemoveFile.into())]) {
        let fd = PathFd::new(path).map_err(|e| format!("--allow-path {}: {e}", path.display()))?;
        rules = allow(rules, path, fd, access)?;
    }
    match rules.restrict_self().map_err(failed)?.ruleset {
        RulesetStatus::NotEnforced => {
            Err("--allow-path: this kernel has no Landlock (Linux 5.13, and in /sys/kernel/security/lsm)"
                .into())
        }
        _ => Ok(()),
    }
}

/// Makes a directory for soft-roce if there is none (its `places.rs`): it could not do so later, nor could a rule name it. A
/// refusal is met again where it is used.
fn make_one(uid: u32, own: &[String]) {
    let path = match own.last() {
        _ if uid == 0 => "/run/rnbd",
        Some(last) if own.iter().all(|path| !Path::new(path).exists()) => last,
        _ => return,
    };
    let _ = rustix::fs::mkdir(path, rustix::fs::Mode::RWXU);
}

/// Allows `access` to `path`, or below it.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    fd: PathFd,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, String> {
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
    let rule = PathBeneath::new(fd, access);
    rules.add_rule(rule).map_err(|e| format!("--allow-path {}: {e}", path.display()))
}

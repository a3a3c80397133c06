//! What a program gives up once its RPC socket is open and before it has a second thread: other users' rights, capabilities,
//! system calls, files. What it has given up it cannot get back.
//!
//! | step | option | what it is for |
//! |---|---|---|
//! | no_new_privs | always | no program that it may start has more rights than it |
//! | user, group, capabilities | `--user`, `--group`, `--capabilities` | `identity.rs` |
//! | files | `--allow-path` | Landlock, `files.rs` |
//! | system calls | `--sandbox` | seccomp, `calls.rs` |

mod calls;
mod files;
mod identity;

use std::path::{Path, PathBuf};

use identity::{Identity, Kept};

/// How strict the filter of system calls is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sandbox {
    /// There is none.
    #[default]
    Off,
    /// The kernel logs what would be refused, and does it.
    Log,
    /// What is refused ends the program (SIGSYS).
    Kill,
}

/// Options of the command line, as they are given.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// `--user`: name or number.
    pub user: Option<String>,
    /// `--group`: name or number.
    pub group: Option<String>,
    /// `--capabilities`: names, comma-separated.
    pub capabilities: Option<String>,
    /// `--sandbox`: off, log or kill. Without, as the environment variable `RNBD_SANDBOX` says; else off.
    pub sandbox: Option<String>,
    /// `--allow-path`, each.
    pub allow_path: Vec<PathBuf>,
}

/// What is to be given up.
#[derive(Clone, Debug, Default)]
pub struct Isolation {
    /// This is a program of its own, and not a thread of another.
    program: bool,
    identity: Option<Identity>,
    kept: Option<Kept>,
    sandbox: Sandbox,
    paths: Vec<PathBuf>,
}

impl Confinement {
    /// Checks the options, and looks users and groups up.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn check(self) -> Result<Isolation, String> {
        let environment = std::env::var("RNBD_SANDBOX").ok().filter(|value| !value.is_empty());
        let sandbox = match self.sandbox.or(environment).as_deref() {
            None | Some("off") => Sandbox::Off,
            Some("log") => Sandbox::Log,
            Some("kill") => Sandbox::Kill,
            Some(other) => return Err(format!("--sandbox '{other}': use off, log or kill")),
        };
        if cfg!(feature = "spdk") && (sandbox != Sandbox::Off || !self.allow_path.is_empty()) {
            return Err("--sandbox and --allow-path go without SPDK: it needs more than they leave".into());
        }
        let identity = Identity::find(self.user.as_deref(), self.group.as_deref())?;
        let kept = match self.capabilities.as_deref() {
            Some(names) => Some(Kept::parse(names)?),
            // Whoever is to be another user is to have its rights.
            None => identity.as_ref().map(|_| Kept::default()),
        };
        Ok(Isolation { program: true, identity, kept, sandbox, paths: self.allow_path })
    }
}

impl Isolation {
    /// Gives nothing up: for tests, and for programs that run for a moment.
    pub fn none() -> Self {
        Self::default()
    }

    /// Gives up what is to be given up. To be called while the process has one thread; the others inherit it.
    /// `rpc_socket`: removed at the end.
    ///
    /// # Errors
    /// In words for the operator: nothing is to be served with more rights than was asked for.
    pub fn enter(&self, rpc_socket: &Path) -> Result<(), String> {
        if !self.program {
            return Ok(());
        }
        let threads = std::fs::read_dir("/proc/self/task").map_or(1, |tasks| tasks.count());
        if threads != 1 {
            return Err(format!(
                "the program has {threads} threads already, which would keep what one gives up"
            ));
        }
        rustix::thread::set_no_new_privs(true).map_err(|e| format!("cannot set no_new_privs: {e}"))?;
        if let Some(kept) = &self.kept {
            identity::take(self.identity.as_ref(), kept)?;
        }
        if !self.paths.is_empty() {
            files::restrict(&self.paths, rpc_socket)?;
        }
        calls::restrict(self.sandbox)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(confinement: Confinement) -> String {
        confinement.check().expect_err("it is wrong")
    }

    #[test]
    fn mistakes_name_what_is_right() {
        let with = |sandbox: &str| Confinement { sandbox: Some(sandbox.into()), ..Confinement::default() };
        assert!(wrong(with("on")).contains("off, log or kill"));
        assert_eq!(with("kill").check().unwrap().sandbox, Sandbox::Kill);
        let nobody = Confinement { user: Some("no-such-user".into()), ..Confinement::default() };
        assert!(wrong(nobody).contains("no-such-user"));
        let caps = |names: &str| Confinement { capabilities: Some(names.into()), ..Confinement::default() };
        let text = wrong(caps("net_bind_service,everything"));
        assert!(text.contains("everything") && text.contains("sys_admin"), "{text}");
        let group = Confinement { group: Some("root".into()), ..Confinement::default() };
        assert!(wrong(group).contains("--user"));
    }
}

//! Tells the programs which sources they are of, for what they report.

use std::path::Path;
use std::process::Command;

fn git(args: &[&str]) -> Option<String> {
    let out = Command::new("git").args(args).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn main() {
    // Shared libraries of SPDK have modules that nothing refers to: the linker must keep them (feature `spdk-shared`).
    let args = std::env::var("DEP_SPDK_LINK_ARGS").unwrap_or_default();
    args.split_whitespace().for_each(|arg| println!("cargo::rustc-link-arg={arg}"));
    let revision = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let dirty = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    println!("cargo::rustc-env=RNBD_GIT_REVISION={revision}");
    println!("cargo::rustc-env=RNBD_GIT_DIRTY={}", u8::from(dirty));
    println!("cargo::rerun-if-changed=build.rs");
    // Commits, and changes of sources, make another answer.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|p| Path::new(p).exists()) {
        println!("cargo::rerun-if-changed={log}");
    }
    let crates = std::fs::read_dir("..").into_iter().flatten().flatten().map(|e| e.path().join("src"));
    for sources in crates.filter(|p| p.is_dir()) {
        println!("cargo::rerun-if-changed={}", sources.display());
    }
}

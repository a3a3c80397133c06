//! Counting instructions with valgrind's callgrind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hot_paths::HotPath;

/// memcpy and its kin are chosen by what the CPU can do. Valgrind's CPU has what the host has of SSE, AVX and AVX2, so the
/// choice is narrowed to what every x86-64 has: with the string instructions a copy of 4 KiB would count as 4096.
const TUNABLES: &str =
    "glibc.cpu.hwcaps=-AVX2,-AVX,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM,-AVX512F,-AVX512VL,-Prefer_FSRM";

/// What a path costs.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Instructions in user space, of the part of the run that took fewer: whatever disturbs adds some.
    pub per_request: f64,
    /// By how much the two parts of the run differ.
    pub spread_percent: f64,
}

/// # Errors
/// This program is not the one that is shipped. Ends the process with status 77 where there is no valgrind.
pub fn ready_or_exit() -> Result<(), String> {
    if cfg!(debug_assertions) {
        return Err("this is a debug build; use `cargo run --release -p hot-paths -- check`".into());
    }
    if version().is_none() {
        println!("valgrind is not installed: scripts/packages.sh valgrind installs it");
        std::process::exit(77);
    }
    Ok(())
}

/// `valgrind-3.19.0`.
pub fn version() -> Option<String> {
    let out = Command::new("valgrind").arg("--version").output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// Runs `path` and counts.
///
/// # Errors
/// In words.
pub fn measure(path: &HotPath, rounds: u32) -> Result<Measured, String> {
    let dir = Dir::new()?;
    count(path, rounds, &dir.0)
}

/// As [`measure`], and keeps the profile of the second part in `out`.
///
/// # Errors
/// In words.
pub fn profile(path: &HotPath, rounds: u32, out: &Path) -> Result<Measured, String> {
    let dir = Dir::new()?;
    let measured = count(path, rounds, &dir.0)?;
    fs::copy(part(&dir.0, 3), out).map_err(|e| format!("cannot write {}: {e}", out.display()))?;
    Ok(measured)
}

/// A directory that goes away.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("instruction-budget-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|e| format!("cannot create {}: {e}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The counts between two calls of [`hot_paths::mark`], from 1 on: warm-up, first part, second part.
fn part(dir: &Path, n: u32) -> PathBuf {
    dir.join(format!("out.{n}"))
}

fn count(path: &HotPath, rounds: u32, dir: &Path) -> Result<Measured, String> {
    let this = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let output = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--collect-atstart=no",
            "--dump-before=hot_paths::mark",
            "--compress-strings=no",
            "--compress-pos=no",
        ])
        .arg(format!("--toggle-collect={}", path.function))
        .arg(format!("--callgrind-out-file={}", dir.join("out").display()))
        .arg(this)
        .args(["run", path.name, "--rounds", &rounds.to_string()])
        .env("GLIBC_TUNABLES", TUNABLES)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run valgrind: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = said.lines().rev().take(20).collect();
        let last = last.into_iter().rev().collect::<Vec<_>>().join("\n");
        return Err(format!("{} did not run under valgrind ({}):\n{last}", path.name, output.status));
    }
    let (first, second) = (total(&part(dir, 2))?, total(&part(dir, 3))?);
    if first == 0 || second == 0 {
        return Err(format!(
            "{}: '{}' is never called; was it renamed, or is it inlined now? See src/lib.rs of hot-paths",
            path.name, path.function
        ));
    }
    let requests = f64::from(rounds) * path.depth as f64;
    let (first, second) = (first as f64 / requests, second as f64 / requests);
    let least = first.min(second);
    Ok(Measured { per_request: least, spread_percent: 100.0 * (first - second).abs() / least })
}

/// The sum at the end of a profile.
fn total(file: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(file).map_err(|e| format!("no counts in {}: {e}", file.display()))?;
    let sum = text.lines().rev().find_map(|l| l.strip_prefix("totals: "));
    sum.and_then(|s| s.trim().parse().ok()).ok_or_else(|| format!("no totals in {}", file.display()))
}

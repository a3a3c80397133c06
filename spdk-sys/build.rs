//! Finds SPDK, makes the bindings, and says what to link.

use std::collections::HashSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What every program needs.
const PACKAGES: &[&str] = &[
    "spdk_bdev",
    "spdk_thread",
    "spdk_env_dpdk",
    "spdk_init",
    "spdk_rpc",
    "spdk_jsonrpc",
    "spdk_json",
    "spdk_log",
    "spdk_notify",
    "spdk_util",
    "spdk_event_bdev",
];

/// Sets of modules, of which an SPDK has what it was built with; some have other names in other versions.
const OPTIONAL: &[&str] = &[
    "spdk_bdev_modules",
    "spdk_accel_modules",
    "spdk_sock_modules",
    "spdk_keyring_modules",
    "spdk_event_accel",
    "spdk_event_iobuf",
    "spdk_event_keyring",
    "spdk_event_sock",
    "spdk_event_vmd",
    "spdk_env_dpdk_rpc",
];

/// The oldest version that is supported.
const OLDEST: (u32, u32) = (24, 9);

const REMEDY: &str = "\
    build and install SPDK (v24.09 or later) with ./configure --prefix=PREFIX && make && make install, and set \
    SPDK_DIR=PREFIX; or add its lib/pkgconfig to PKG_CONFIG_PATH (and that of the DPDK it was built with). \
    Without SPDK, build without the feature \"spdk\".";

fn main() {
    for variable in ["SPDK_DIR", "PKG_CONFIG_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=wrapper.h");
    println!("cargo:rerun-if-changed=build.rs");
    if let Err(problem) = run() {
        eprintln!("spdk-sys: {problem}\nspdk-sys: {REMEDY}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let packages = Packages::find()?;
    let include = packages.include_dir()?;
    let version = version(&include)?;
    if version < OLDEST {
        let (year, month) = version;
        return Err(format!("SPDK v{year}.{month:02} in {} is too old", include.display()));
    }
    bindings(&include)?;
    println!("cargo:include={}", include.display());
    println!("cargo:version={}.{:02}", version.0, version.1);
    link(&packages)
}

/// How pkg-config is asked.
struct Packages {
    /// `PKG_CONFIG_PATH` with the folders of `SPDK_DIR` before it.
    path: String,
    /// For messages.
    place: String,
}

impl Packages {
    fn find() -> Result<Self, String> {
        let inherited = env::var("PKG_CONFIG_PATH").unwrap_or_default();
        let packages = match env::var("SPDK_DIR").ok().filter(|dir| !dir.is_empty()) {
            Some(dir) => {
                // A DPDK that was installed below the same prefix, as well as SPDK's own copy.
                let folders = ["", "dpdk/", "dpdk/build/", "dpdk-"].iter().flat_map(|dpdk| {
                    ["lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"]
                        .map(|lib| Path::new(&dir).join(format!("{dpdk}{lib}/pkgconfig")))
                });
                let mut path: Vec<String> =
                    folders.filter(|f| f.is_dir()).map(|f| f.display().to_string()).collect();
                if path.is_empty() {
                    return Err(format!(
                        "SPDK_DIR={dir} has no lib/pkgconfig: it is no prefix of an installed SPDK"
                    ));
                }
                path.push(inherited);
                Self { path: path.join(":"), place: format!("SPDK_DIR={dir}") }
            }
            None => Self { path: inherited, place: "pkg-config".into() },
        };
        packages.ask(&["--exists", "spdk_bdev"]).map_err(|_| {
            format!("no SPDK is to be found by {}: it does not know the package spdk_bdev", packages.place)
        })?;
        Ok(packages)
    }

    fn ask(&self, args: &[&str]) -> Result<String, String> {
        let pkg_config = env::var("PKG_CONFIG").unwrap_or_else(|_| "pkg-config".into());
        let output = Command::new(&pkg_config)
            .args(args)
            .env("PKG_CONFIG_PATH", &self.path)
            // The folders of system libraries are the linker's business.
            .env_remove("PKG_CONFIG_ALLOW_SYSTEM_LIBS")
            .output()
            .map_err(|e| format!("cannot run {pkg_config}: {e}; install pkg-config"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        Err(format!("{pkg_config} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
    }

    fn has(&self, package: &str) -> bool {
        self.ask(&["--exists", package]).is_ok()
    }

    fn include_dir(&self) -> Result<PathBuf, String> {
        let flags = self.ask(&["--cflags-only-I", "spdk_bdev"])?;
        let mut folders: Vec<PathBuf> =
            flags.split_whitespace().filter_map(|f| f.strip_prefix("-I")).map(PathBuf::from).collect();
        folders.push("/usr/include".into());
        let found = folders.into_iter().find(|f| f.join("spdk/version.h").is_file());
        found.ok_or_else(|| format!("{} knows SPDK's libraries, but spdk/version.h is not there", self.place))
    }

    /// Flags of `packages`, in order.
    fn libs(&self, packages: &[&str]) -> Result<Vec<String>, String> {
        let mut args = vec!["--libs", "--static"];
        args.extend(packages);
        Ok(self.ask(&args)?.split_whitespace().map(str::to_owned).collect())
    }
}

/// Year and month. The .pc files have the versions of the libraries, not SPDK's.
fn version(include: &Path) -> Result<(u32, u32), String> {
    let file = include.join("spdk/version.h");
    let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let number = |name: &str| {
        let line =
            text.lines().find(|l| l.starts_with("#define") && l.split_whitespace().nth(1) == Some(name));
        line.and_then(|l| l.split_whitespace().nth(2)).and_then(|n| n.parse().ok())
    };
    match (number("SPDK_VERSION_MAJOR"), number("SPDK_VERSION_MINOR")) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(format!("{} does not tell SPDK's version", file.display())),
    }
}

fn bindings(include: &Path) -> Result<(), String> {
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?).join("bindings.rs");
    let functions = "spdk_(env_(opts_init|init|fini)|(z?malloc|free|realloc)|dma_z?(malloc|free)|mem_(register|unregister)\
        |vtophys|iommu_is_enabled|get_ticks|get_ticks_hz|(get|set)_thread|thread_.*|poller_.*|put_io_channel\
        |subsystem_(init|fini|exists)|rpc_.*|json_write_(begin|end|object_.*)|bdev_.*|notify_foreach_event|log_set_(print_)?level|log_(open|close)\
        |pci_addr_parse)|vsnprintf";
    bindgen::Builder::default()
        .header("wrapper.h")
        .clang_arg(format!("-I{}", include.display()))
        .allowlist_function(functions)
        .allowlist_var("SPDK_(RPC_(STARTUP|RUNTIME)|VERSION_.*)")
        .allowlist_type("spdk_(env_opts|notify_event|bdev_(alias|module|claim_.*|io_status|event_type|io_type|qos_rate_limit_type)|log_level)")
        // Packed structures with aligned fields, which Rust does not have.
        .opaque_type("spdk_nvme_.*|spdk_nvmf_.*|spdk_bdev_ext_io_opts|spdk_bdev_nvme_cdw.*")
        .default_enum_style(bindgen::EnumVariation::ModuleConsts)
        .prepend_enum_name(false)
        .derive_debug(false)
        .generate_comments(false)
        .wrap_unsafe_ops(true)
        .layout_tests(true)
        .rust_target(bindgen::RustTarget::stable(85, 0).map_err(|e| e.to_string())?)
        .generate()
        .map_err(|e| format!("SPDK's headers in {} give no bindings: {e}", include.display()))?
        .write_to_file(&out)
        .map_err(|e| format!("{}: {e}", out.display()))
}

/// Says what to link: SPDK and DPDK whole, because their modules register themselves in constructors that nothing
/// refers to; the rest as the system has it.
fn link(packages: &Packages) -> Result<(), String> {
    let mut wanted: Vec<&str> = PACKAGES.to_vec();
    wanted.extend(OPTIONAL.iter().filter(|p| packages.has(p)));
    let mut flags = packages.libs(&wanted)?;
    flags.extend(packages.libs(&["spdk_dpdklibs"])?);
    flags.extend(packages.libs(&["spdk_syslibs"])?);
    // DPDK of its own prefix: SPDK's packages name its libraries, but not their folder.
    if let Ok(dir) = packages.ask(&["--variable=libdir", "libdpdk"]) {
        flags.insert(0, format!("-L{dir}"));
    }
    let shared = env::var_os("CARGO_FEATURE_SHARED").is_some();
    let mut folders: Vec<PathBuf> = Vec::new();
    for dir in flags.iter().filter_map(|f| f.strip_prefix("-L")).map(PathBuf::from) {
        if !folders.contains(&dir) {
            println!("cargo:rustc-link-search=native={}", dir.display());
            folders.push(dir);
        }
    }
    let mut seen = HashSet::new();
    let mut kept = Vec::new();
    for flag in &flags {
        if let Some(name) = library(flag)
            && seen.insert(name.to_owned())
        {
            if shared && own(name) {
                kept.extend(find_shared(name, &folders)?);
            } else {
                link_one(name, flag, &folders)?;
                // SPDK's shared libraries do not say which of the system's they need.
                kept.push(name.to_owned());
            }
        }
    }
    if shared {
        // The linker drops libraries that nothing refers to, and with them the constructors of SPDK's modules. Only a
        // program's own build script can tell it not to: those of this workspace pass this on (`DEP_SPDK_LINK_ARGS`).
        let all: Vec<String> = kept.iter().map(|name| format!("-l{name}")).collect();
        println!("cargo:link_args=-Wl,--push-state,--no-as-needed {} -Wl,--pop-state", all.join(" "));
    }
    Ok(())
}

/// SPDK's, DPDK's or part of them.
fn own(name: &str) -> bool {
    name.starts_with("spdk") || name.starts_with("rte_") || name.starts_with("isal")
}

/// Links a shared library; returns its name if it is there.
fn find_shared(name: &str, folders: &[PathBuf]) -> Result<Option<String>, String> {
    let file = format!("lib{name}.so");
    if folders.iter().any(|dir| dir.join(&file).is_file()) {
        println!("cargo:rustc-link-lib=dylib={name}");
        return Ok(Some(name.to_owned()));
    }
    // SPDK's shared libraries have these in them.
    if name.starts_with("isal") {
        return Ok(None);
    }
    Err(format!("{file} is in none of {folders:?}: this SPDK or DPDK has no shared libraries"))
}

/// The library that a flag names: -lNAME, -l:libNAME.a (as meson writes it) or /a/path/libNAME.a.
fn library(flag: &str) -> Option<&str> {
    let archive = flag.strip_prefix("-l:lib").or_else(|| flag.rsplit_once("/lib").map(|(_, name)| name));
    archive.and_then(|name| name.strip_suffix(".a")).or_else(|| flag.strip_prefix("-l"))
}

fn link_one(name: &str, flag: &str, folders: &[PathBuf]) -> Result<(), String> {
    if !own(name) {
        println!("cargo:rustc-link-lib=dylib={name}");
        return Ok(());
    }
    if !folders.iter().any(|dir| dir.join(format!("lib{name}.a")).is_file()) {
        match Path::new(flag).parent().filter(|dir| dir.is_absolute()) {
            Some(dir) => println!("cargo:rustc-link-search=native={}", dir.display()),
            None => {
                return Err(format!(
                    "lib{name}.a is in none of {folders:?}: this SPDK or DPDK has no static libraries; use the feature \
                     \"shared\""
                ));
            }
        }
    }
    println!("cargo:rustc-link-lib=static:+whole-archive,-bundle={name}");
    Ok(())
}

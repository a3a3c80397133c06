//! Shared libraries of SPDK have modules that nothing refers to: this program's linker must keep them (feature `spdk-shared`).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let args = std::env::var("DEP_SPDK_LINK_ARGS").unwrap_or_default();
    args.split_whitespace().for_each(|arg| println!("cargo:rustc-link-arg={arg}"));
}

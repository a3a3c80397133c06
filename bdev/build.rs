//! What the feature `spdk` has to know of the SPDK that is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(spdk_unmap_granularity)");
    // Year and month: "24.09".
    let version = std::env::var("DEP_SPDK_VERSION").unwrap_or_default();
    let version = version.split_once('.').and_then(|(y, m)| Some((y.parse().ok()?, m.parse().ok()?)));
    if version.is_some_and(|v: (u32, u32)| v >= UNMAP_GRANULARITY) {
        println!("cargo:rustc-cfg=spdk_unmap_granularity");
    }
    // Shared libraries have modules that nothing refers to: the linker must keep them (feature `spdk-shared`).
    let args = std::env::var("DEP_SPDK_LINK_ARGS").unwrap_or_default();
    args.split_whitespace().for_each(|arg| println!("cargo:rustc-link-arg={arg}"));
}

/// First version with `spdk_bdev_get_preferred_unmap_granularity`.
const UNMAP_GRANULARITY: (u32, u32) = (25, 9);

//! The documentation of the methods is current.

#[test]
#[cfg_attr(feature = "spdk", ignore = "docs/rpc.md is of a program without SPDK; docs/spdk.md has the rest")]
fn rpc_md_is_current() {
    let made = engine::methods::doc::markdown(rnbd_target::subsystems(Vec::new()));
    let there = include_str!("../../docs/rpc.md");
    assert!(made == there, "run: cargo run -p rnbd-target --example rpc_doc > docs/rpc.md");
}

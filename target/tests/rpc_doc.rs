//! The documentation of the methods is current.

#[test]
fn rpc_md_is_current() {
    let made = engine::methods::doc::markdown(rnbd_target::subsystems(Vec::new()));
    let there = include_str!("../../docs/rpc.md");
    assert!(made == there, "run: cargo run -p rnbd-target --example rpc_doc > docs/rpc.md");
}

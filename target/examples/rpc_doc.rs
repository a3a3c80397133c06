//! Prints `docs/rpc.md`.

fn main() {
    print!("{}", engine::methods::doc::markdown(rnbd_target::subsystems(Vec::new())));
}

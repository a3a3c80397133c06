//! `rnbd-target`: arguments, and the exit status.

mod args;

fn main() -> std::process::ExitCode {
    engine::args::main_isolated(rnbd_target::PROGRAM, args::options(), || ())
}

//! `rnbd-initiator`: arguments, the direct form, and the exit status.

mod args;
mod direct;
mod program;

fn main() -> std::process::ExitCode {
    let mut direct = None;
    let options = args::options().map(|(options, isolation, mapping)| {
        direct = mapping;
        (options, isolation)
    });
    let code = engine::args::main_isolated(program::PROGRAM, options, || {
        if let Some(direct) = direct {
            direct.ended();
        }
    });
    direct::all_said();
    code
}

//! How many request/reply exchanges this machine's UDP sockets carry at most, with segmentation offload both ways.
//!
//! A protocol over UDP (RoCEv2 here) cannot be faster than its sockets. This program measures the sockets alone: two
//! threads of one process, each pinned to a core and polling its non-blocking socket, one asking, one answering. Each
//! turn is one `recvmmsg`, then one `sendmmsg` of everything that the received packets call for, packets of one
//! destination and size joined into runs (`UDP_SEGMENT`, up to 64 packets below 64 KiB) that arrive whole (`UDP_GRO`).
//! There are no headers, no checksums and no copies except those of the system calls: payloads are constant but for
//! the first 8 bytes of each packet, which say to which exchange it belongs.

mod address;
mod args;
mod client;
mod receiver;
mod report;
mod run;
mod sender;
mod server;
mod socket;

use std::process::ExitCode;

use report::Report;

fn main() -> ExitCode {
    match measure() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("udp-limit: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<(), String> {
    let (options, json) = args::options()?;
    let mut report = Report::new(options);
    for number in 1..=report.options.rounds {
        let round = run::round(&report.options)?;
        if json.is_none() {
            if number == 1 {
                println!("{}\n{}", report.heading(), report::COLUMNS);
            }
            println!("{}", round.line(&number.to_string()));
        }
        report.add(round);
    }
    match json {
        Some(path) => report.write_json(&path),
        None => {
            report.summary().for_each(|line| println!("{line}"));
            Ok(())
        }
    }
}

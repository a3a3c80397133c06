//! The figures: a table for people, JSON for scripts.

use std::io::Write as _;
use std::path::Path;
use std::{fs, io};

use serde::Serialize;

use crate::args::Options;
use crate::client::Asked;
use crate::run::Usage;
use crate::server::Served;

/// Titles over [`Round::line`].
pub const COLUMNS: &str = concat!(
    " round   exchanges/s      MiB/s     p50 µs     p99 µs   lost  ",
    "server s (in kernel)  client s (in kernel)  per turn"
);

/// Options and rounds.
pub struct Report {
    /// What is measured.
    pub options: Options,
    packets_per_reply: usize,
    rounds_measured: Vec<Round>,
}

/// Figures of one round, or the medians of several.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    exchanges_per_second: f64,
    /// Replies only.
    mib_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    exchanges: u64,
    lost: u64,
    ignored_packets: u64,
    seconds: f64,
    /// Mean of the turns that found something.
    requests_per_server_turn: f64,
    exchanges_per_client_turn: f64,
    server: Cpu,
    client: Cpu,
    /// Bytes granted for the client's socket.
    client_receive_buffer: usize,
}

/// CPU seconds of a thread.
#[derive(Clone, Debug, Serialize)]
struct Cpu {
    cpu_seconds: f64,
    kernel_seconds: f64,
    preempted: u64,
}

impl Round {
    /// Figures of what the threads did.
    pub fn new(asked: &Asked, served: &Served, receive_buffer: usize) -> Self {
        let seconds = asked.elapsed.as_secs_f64();
        let microseconds = |quantile| asked.latency.value_at_quantile(quantile) as f64 / 1000.0;
        let per = |count: u64, turns: u64| if turns == 0 { 0.0 } else { count as f64 / turns as f64 };
        Self {
            exchanges_per_second: asked.exchanges as f64 / seconds,
            mib_per_second: asked.bytes as f64 / seconds / f64::from(1 << 20),
            p50_us: microseconds(0.5),
            p99_us: microseconds(0.99),
            exchanges: asked.exchanges,
            lost: asked.lost,
            ignored_packets: asked.ignored,
            seconds,
            requests_per_server_turn: per(served.requests, served.turns),
            exchanges_per_client_turn: per(asked.exchanges, asked.turns),
            server: Cpu::new(served.usage),
            client: Cpu::new(asked.usage),
            client_receive_buffer: receive_buffer,
        }
    }

    /// One line of the table.
    pub fn line(&self, label: &str) -> String {
        let cpu = |cpu: &Cpu| format!("{:.2} ({:.2})", cpu.cpu_seconds, cpu.kernel_seconds);
        format!(
            "{label:>6}  {:>12.0} {:>10.1} {:>10.2} {:>10.2} {:>6}  {:>20}  {:>20}  {:>8.1}",
            self.exchanges_per_second,
            self.mib_per_second,
            self.p50_us,
            self.p99_us,
            self.lost,
            cpu(&self.server),
            cpu(&self.client),
            self.requests_per_server_turn,
        )
    }
}

impl Cpu {
    fn new(usage: Usage) -> Self {
        Self {
            cpu_seconds: (usage.user + usage.system).as_secs_f64(),
            kernel_seconds: usage.system.as_secs_f64(),
            preempted: usage.preempted,
        }
    }
}

impl Report {
    /// A report of no round yet.
    pub fn new(options: Options) -> Self {
        Self { packets_per_reply: options.packets(), options, rounds_measured: Vec::new() }
    }

    /// What is measured, in one line.
    pub fn heading(&self) -> String {
        let o = &self.options;
        let packets = self.packets_per_reply;
        let offload = if o.gso { "UDP_SEGMENT and UDP_GRO" } else { "no segmentation offload" };
        let core = |core: Option<usize>| core.map_or_else(|| "any".to_owned(), |c| c.to_string());
        format!(
            "{}: depth {}, requests of {} bytes, replies of {} bytes in {packets} {}, {offload}, \
             server on core {}, client on core {}",
            o.address,
            o.depth,
            o.request,
            o.reply,
            if packets == 1 { "packet" } else { "packets" },
            core(o.server_core),
            core(o.client_core)
        )
    }

    /// Adds a round.
    pub fn add(&mut self, round: Round) {
        self.rounds_measured.push(round);
    }

    /// What is to be said after the rounds: medians of several, and what to do about lost exchanges.
    pub fn summary(&self) -> impl Iterator<Item = String> {
        let median = self.rounds_measured.get(1).map(|_| self.median().line("median"));
        let lost = self.rounds_measured.iter().find(|round| round.lost > 0).map(|round| {
            let buffer = round.client_receive_buffer;
            format!("exchanges were lost: the client's receive buffer has {buffer} bytes (net.core.rmem_max)")
        });
        median.into_iter().chain(lost)
    }

    /// The median of each figure on its own. At least one round must have been added.
    pub fn median(&self) -> Round {
        let rounds = &self.rounds_measured;
        let f = |of: fn(&Round) -> f64| middle(rounds.iter().map(of).collect(), f64::total_cmp);
        let n = |of: fn(&Round) -> u64| middle(rounds.iter().map(of).collect(), u64::cmp);
        let cpu = |of: fn(&Round) -> &Cpu| Cpu {
            cpu_seconds: middle(rounds.iter().map(|r| of(r).cpu_seconds).collect(), f64::total_cmp),
            kernel_seconds: middle(rounds.iter().map(|r| of(r).kernel_seconds).collect(), f64::total_cmp),
            preempted: middle(rounds.iter().map(|r| of(r).preempted).collect(), u64::cmp),
        };
        Round {
            exchanges_per_second: f(|r| r.exchanges_per_second),
            mib_per_second: f(|r| r.mib_per_second),
            p50_us: f(|r| r.p50_us),
            p99_us: f(|r| r.p99_us),
            exchanges: n(|r| r.exchanges),
            lost: n(|r| r.lost),
            ignored_packets: n(|r| r.ignored_packets),
            seconds: f(|r| r.seconds),
            requests_per_server_turn: f(|r| r.requests_per_server_turn),
            exchanges_per_client_turn: f(|r| r.exchanges_per_client_turn),
            server: cpu(|r| &r.server),
            client: cpu(|r| &r.client),
            client_receive_buffer: n(|r| r.client_receive_buffer as u64) as usize,
        }
    }

    /// Writes options, medians and rounds to the file `path`, to standard output if it is `-`.
    pub fn write_json(&self, path: &Path) -> Result<(), String> {
        let text = self.json().map_err(|e| e.to_string())?;
        let written = if path == Path::new("-") {
            io::stdout().lock().write_all(text.as_bytes())
        } else {
            fs::write(path, text)
        };
        written.map_err(|e| format!("--json {}: {e}", path.display()))
    }

    fn json(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Whole<'a> {
            program: &'static str,
            options: &'a Options,
            packets_per_reply: usize,
            #[serde(flatten)]
            median: Round,
            rounds: &'a [Round],
        }
        let whole = Whole {
            program: "udp-limit",
            options: &self.options,
            packets_per_reply: self.packets_per_reply,
            median: self.median(),
            rounds: &self.rounds_measured,
        };
        Ok(serde_json::to_string_pretty(&whole)? + "\n")
    }
}

/// The median; of an even number of values the lower middle one, so that it is a value that was measured.
fn middle<T: Copy>(mut values: Vec<T>, order: fn(&T, &T) -> std::cmp::Ordering) -> T {
    values.sort_unstable_by(order);
    values[(values.len() - 1) / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::tests::short;
    use crate::run;

    #[test]
    fn json_has_the_medians_at_its_top_and_every_round() {
        let mut report = Report::new(short(1, 4140, true));
        let round = run::round(&report.options).expect("a run");
        for rate in [3.0, 1.0, 2.0] {
            report.add(Round { exchanges_per_second: rate, ..round.clone() });
        }
        let json: serde_json::Value = serde_json::from_str(&report.json().expect("JSON")).expect("JSON");
        assert_eq!(json["exchanges_per_second"], 2.0);
        assert_eq!(json["rounds"].as_array().map(Vec::len), Some(3));
        assert_eq!(json["rounds"][0]["exchanges_per_second"], 3.0);
        assert_eq!(json["options"]["depth"], 1);
        assert!(json["p50_us"].as_f64().is_some_and(|p50| p50 > 0.0));
    }

    #[test]
    fn lines_match_their_titles() {
        let mut report = Report::new(short(1, 4140, true));
        report.add(run::round(&report.options).expect("a run"));
        let line = report.median().line("median");
        assert_eq!(line.chars().count(), COLUMNS.chars().count(), "\n{COLUMNS}\n{line}");
    }
}

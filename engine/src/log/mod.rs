//! Structured logs on standard error, with levels that change at run time.
//!
//! | level | meaning |
//! |---|---|
//! | ERROR | something is broken or lost, and somebody must act |
//! | WARN | a peer or caller was refused, or service is reduced |
//! | INFO | life of paths, sessions, devices, bdevs: what an operator wants to find later (SPDK's NOTICE and INFO) |
//! | DEBUG | single requests that failed, and details of set-up |
//!
//! **Logging never blocks.** A message is formatted where it is logged, and written by a thread of its own. While nobody reads
//! standard error messages are lost; how many is logged once there is room again ([`LineQueue`]).
//!
//! **What others chose is escaped**, whatever logs it: a message is one line, and moves no cursor ([`escaped`]). **What a peer
//! causes is limited**: such a message has a field `peer`, and there are only so many of a kind in a minute (`limit.rs`).

mod escape;
mod limit;
mod queue;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{self, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Registry, reload};

pub use escape::{Escaping, escaped};
pub use queue::LineQueue;

use limit::Limiter;
use queue::Chores;

/// How long the end of the program waits for a slow reader of standard error or output.
pub const LAST_WORDS: Duration = Duration::from_secs(2);

/// SPDK's level names, from quiet to loud.
pub const LEVELS: [&str; 6] = ["DISABLED", "ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"];

/// Flags of `log_set_flag` in every program, each with the crate whose events it lets through at level DEBUG,
/// whatever the level. Subsystems add theirs.
const FLAGS: [(&str, &str); 5] =
    [("bdev", "bdev"), ("engine", "engine"), ("iobuf", "iobuf"), ("reactor", "reactor"), ("rpc", "rpc")];

/// Level, flags and time stamps, shared and changeable.
#[derive(Clone)]
pub struct LogControl {
    state: Arc<Mutex<State>>,
    timestamps: Arc<AtomicBool>,
    handle: Option<reload::Handle<Targets, Registry>>,
    /// Of standard error.
    queue: Option<LineQueue>,
    writer: Arc<Mutex<Option<Start>>>,
}

/// Starts the thread that writes.
type Start = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// What the filter is made from.
struct State {
    /// One of [`LEVELS`].
    level: String,
    /// By name.
    flags: BTreeMap<&'static str, Flag>,
}

#[derive(Default)]
struct Flag {
    /// Crates or modules.
    targets: Vec<&'static str>,
    on: bool,
}

/// The time, or nothing.
struct Clock(Arc<AtomicBool>);

impl FormatTime for Clock {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        if self.0.load(Ordering::Relaxed) { SystemTime.format_time(w) } else { Ok(()) }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One readable line each.
    #[default]
    Text,
    /// One JSON object each.
    Json,
}

fn filter(level: &str) -> Option<LevelFilter> {
    Some(match level {
        "DISABLED" => LevelFilter::OFF,
        "ERROR" => LevelFilter::ERROR,
        "WARNING" => LevelFilter::WARN,
        "NOTICE" | "INFO" => LevelFilter::INFO,
        "DEBUG" => LevelFilter::DEBUG,
        _ => return None,
    })
}

impl State {
    fn targets(&self) -> Targets {
        let level = filter(&self.level).unwrap_or(LevelFilter::INFO);
        let on = self.flags.values().filter(|flag| flag.on).flat_map(|flag| &flag.targets);
        Targets::new().with_default(level).with_targets(on.map(|target| (*target, LevelFilter::DEBUG)))
    }
}

impl LogControl {
    /// A control that changes nothing: for programs with their own subscriber, such as tests.
    pub fn detached() -> Self {
        Self::new("INFO".into())
    }

    fn new(level: String) -> Self {
        let state = Arc::new(Mutex::new(State { level, flags: BTreeMap::new() }));
        let timestamps = Arc::new(AtomicBool::new(true));
        let control = Self { state, timestamps, handle: None, queue: None, writer: Arc::default() };
        control.add_flags(&FLAGS);
        control
    }

    /// Installs the program's subscriber. `level`: one of [`LEVELS`], any case. Messages wait until
    /// [`LogControl::start_writing`].
    ///
    /// # Errors
    /// An unknown level.
    pub fn install(level: &str, format: Format) -> Result<Self, String> {
        let level = level.to_ascii_uppercase();
        filter(&level).ok_or_else(|| unknown(&level))?;
        let (queue, writer) = LineQueue::new(std::io::stderr());
        let limiter = Limiter::new(queue.clone());
        let mut control = Self::new(level);
        let tell = Tell(limiter.clone());
        control.writer = Arc::new(Mutex::new(Some(Box::new(move || writer.start("log", tell)))));
        control.queue = Some(queue.clone());
        let (filter, handle) = reload::Layer::new(control.state().targets());
        control.handle = Some(handle);
        let registry = tracing_subscriber::registry().with(filter).with(limiter);
        let clock = Clock(control.timestamps.clone());
        let json = format == Format::Json;
        let layer = tracing_subscriber::fmt::layer().with_timer(clock);
        let layer = layer.with_writer(move || Line { queue: queue.clone(), json });
        let layer = layer.with_ansi(std::io::stderr().is_terminal());
        match format {
            Format::Text => registry.with(layer.with_target(false).fmt_fields(text_fields())).init(),
            Format::Json => registry.with(layer.json()).init(),
        }
        control.flush_in_panics();
        Ok(control)
    }

    /// A panic may end the program: what was logged before comes out first, unless nobody reads it.
    fn flush_in_panics(&self) {
        let (log, print) = (self.clone(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |info| {
            if log.flush() {
                print(info);
            }
        }));
    }

    /// Starts the thread that writes, if there is none yet. It has the rights and the cores that the caller has now.
    pub fn start_writing(&self) {
        let start = self.writer.lock().unwrap_or_else(|e| e.into_inner()).take();
        // Without it nothing is written, and nobody waits for that.
        if let Some(Err(e)) = start.map(|start| start()) {
            eprintln!("cannot start a thread for the log, which stays empty: {e}");
        }
    }

    /// Waits until everything is written that was logged before, for 2 s at most. False: it is not.
    pub fn flush(&self) -> bool {
        self.start_writing();
        self.queue.as_ref().is_none_or(|queue| queue.flush(LAST_WORDS))
    }

    /// The last words of a program on standard error, behind its log.
    pub fn last_words(&self, text: &str) {
        match &self.queue {
            Some(queue) => queue.push(format!("{}\n", escaped(text)).as_bytes()),
            None => eprintln!("{}", escaped(text)),
        }
        self.flush();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// One of [`LEVELS`].
    pub fn level(&self) -> String {
        self.state().level.clone()
    }

    /// Changes the level. `level`: one of [`LEVELS`], any case.
    ///
    /// # Errors
    /// An unknown level.
    pub fn set_level(&self, level: &str) -> Result<(), String> {
        let level = level.to_ascii_uppercase();
        filter(&level).ok_or_else(|| unknown(&level))?;
        self.change(|state| state.level = level)
    }

    /// Adds flags, each with a crate or module that it lets through; one flag may have several of them.
    pub fn add_flags(&self, flags: &[(&'static str, &'static str)]) {
        let mut state = self.state();
        for (name, target) in flags {
            let targets = &mut state.flags.entry(name).or_default().targets;
            if !targets.contains(target) {
                targets.push(target);
            }
        }
    }

    /// Every flag and whether it is set.
    pub fn flags(&self) -> BTreeMap<&'static str, bool> {
        self.state().flags.iter().map(|(name, flag)| (*name, flag.on)).collect()
    }

    /// Sets or clears a flag, or "all".
    ///
    /// # Errors
    /// An unknown flag.
    pub fn set_flag(&self, flag: &str, on: bool) -> Result<(), String> {
        if flag != "all" && !self.state().flags.contains_key(flag) {
            let names: Vec<&str> = self.flags().into_keys().collect();
            return Err(format!("unknown log flag '{flag}': use all or one of {}", names.join(", ")));
        }
        self.change(|state| {
            for (name, state) in &mut state.flags {
                if flag == "all" || *name == flag {
                    state.on = on;
                }
            }
        })
    }

    /// Whether lines begin with the time; they do at first.
    pub fn enable_timestamps(&self, enabled: bool) {
        self.timestamps.store(enabled, Ordering::Relaxed);
    }

    fn change(&self, f: impl FnOnce(&mut State)) -> Result<(), String> {
        let mut state = self.state();
        f(&mut state);
        match &self.handle {
            Some(handle) => handle.reload(state.targets()).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }
}

/// What the log's thread does besides writing.
struct Tell(Limiter);

impl Chores for Tell {
    fn run(&mut self, now: Instant, lost: u64, last: bool) -> Option<Instant> {
        if lost > 0 {
            tracing::error!("{lost} messages were dropped: standard error was read too slowly");
        }
        self.0.tell(now, last)
    }
}

/// One event for the queue: the formatter writes it at once.
struct Line {
    queue: LineQueue,
    json: bool,
}

impl std::io::Write for Line {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        // In text, fields and message are escaped one by one, since colours are not to be.
        match std::str::from_utf8(line).map(|text| text.strip_suffix('\n')) {
            Ok(Some(json)) if self.json => {
                self.queue.push(format!("{}\n", escape::escaped_json(json)).as_bytes());
            }
            _ => self.queue.push(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Message and fields as tracing writes them, every value escaped.
fn text_fields() -> impl for<'w> FormatFields<'w> + Send + Sync + 'static {
    let one = |writer: &mut Writer<'_>, field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
        let ansi = writer.has_ansi_escapes();
        match (field.name(), ansi) {
            ("message", _) => {}
            (name, true) => write!(writer, "\x1b[3m{name}\x1b[0m\x1b[2m=\x1b[0m")?,
            (name, false) => write!(writer, "{name}=")?,
        }
        write!(Escaping(writer), "{value:?}")
    };
    format::debug_fn(one).delimited(" ")
}

fn unknown(level: &str) -> String {
    format!("unknown log level '{level}': use one of {}", LEVELS.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn flags_let_a_crate_speak() {
        let log = LogControl::detached();
        log.set_level("error").unwrap();
        assert!(!log.state().targets().would_enable("bdev::uring", &Level::DEBUG));
        log.set_flag("bdev", true).unwrap();
        let targets = log.state().targets();
        assert!(targets.would_enable("bdev::uring", &Level::DEBUG));
        assert!(!targets.would_enable("rtrs_poll", &Level::WARN));
        assert!(targets.would_enable("rtrs_poll", &Level::ERROR));
        log.set_flag("all", false).unwrap();
        assert!(log.flags().values().all(|on| !on));
    }

    #[test]
    fn a_flag_may_have_several_crates() {
        let log = LogControl::detached();
        log.add_flags(&[("nbd", "nbd_poll"), ("nbd", "exports::nbd"), ("nbd", "nbd_poll")]);
        log.set_flag("nbd", true).unwrap();
        assert!(log.flags()["nbd"]);
        let targets = log.state().targets();
        assert!(targets.would_enable("nbd_poll::stream", &Level::DEBUG));
        assert!(targets.would_enable("exports::nbd", &Level::DEBUG));
        assert!(!targets.would_enable("exports::ublk", &Level::DEBUG));
    }

    #[test]
    fn refusals_name_what_is_right() {
        let log = LogControl::detached();
        assert!(log.set_level("loud").unwrap_err().contains("NOTICE"));
        assert!(log.set_flag("nvme", true).unwrap_err().contains("reactor"));
        assert_eq!(log.level(), "INFO");
    }
}

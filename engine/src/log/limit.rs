//! Keeps peers from filling the log: of each kind of message that names a peer, only so many in a minute.
//!
//! A message that a peer can cause has a field `peer`, or `controller` if that is a front end of vhost-user, or `path` if that is
//! a server or a disk. Its kind is the place in the source that logs it. What is left out is
//! counted, and told when the minute is over. Messages at DEBUG are not limited: who asks for them wants them all.

use std::collections::HashMap;
use std::fmt::{self, Debug, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use quota::Source;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber, callsite};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::queue::LineQueue;

/// What limits are for.
const WINDOW: Duration = Duration::from_secs(60);
/// Messages of one kind about one peer in a window: a host that opens all its disks at once shows.
const OF_PEER: Limits = Limits { first: 100, more: 10 };
/// Messages of one kind about all peers in a window: a stranger may have many addresses.
const OF_KIND: Limits = Limits { first: 1000, more: 100 };
/// Pairs of kind and peer that are counted apart. Those beyond have the limit of their kind alone.
const MAX_PEERS: usize = 1024;
/// Bytes of a message or peer that are kept.
const MAX_TEXT: usize = 120;

/// Messages in a window, and in one that follows a window whose limit was reached.
#[derive(Clone, Copy)]
struct Limits {
    first: u32,
    more: u32,
}

/// The limits, shared by the layer and the thread that tells what was left out.
#[derive(Clone)]
pub struct Limiter {
    counts: Arc<Mutex<Counts>>,
    queue: LineQueue,
}

#[derive(Default)]
struct Counts {
    peers: HashMap<(callsite::Identifier, Who), Window>,
    kinds: HashMap<callsite::Identifier, Window>,
    /// Windows that are over are looked for again from here on.
    swept: Option<Instant>,
}

/// Whom a message is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    /// A host.
    Host(Source),
    /// A user of this host, or something else.
    Name(String),
}

struct Window {
    began: Instant,
    allowed: u32,
    passed: u32,
    held: u32,
    /// Of the last that was left out: its level, text and peer.
    like: Option<Like>,
}

struct Like {
    level: Level,
    text: String,
    peer: String,
}

/// That messages were left out.
struct Note {
    held: u32,
    seconds: u64,
    like: Like,
    others: bool,
}

impl Window {
    fn new(now: Instant, limits: Limits) -> Self {
        Self { began: now, allowed: limits.first, passed: 0, held: 0, like: None }
    }

    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.began) >= WINDOW
    }

    /// Counts a message; true: it may be logged. A window that has left something out goes on until that is told.
    fn take(&mut self, now: Instant, limits: Limits) -> bool {
        if self.held == 0 && self.is_over(now) {
            *self = Self::new(now, limits);
        }
        let passes = self.passed < self.allowed;
        if passes {
            self.passed += 1;
        } else {
            self.held = self.held.saturating_add(1);
        }
        passes
    }

    /// What was left out, if the window is over (`all`: or not); then another begins.
    fn note(&mut self, now: Instant, limits: Limits, others: bool, all: bool) -> Option<Note> {
        let due = self.held > 0 && (all || self.is_over(now));
        let like = self.like.take_if(|_| due)?;
        let seconds = now.saturating_duration_since(self.began).as_secs();
        let note = Note { held: self.held, seconds, like, others };
        *self = Self { allowed: limits.more, ..Self::new(now, limits) };
        Some(note)
    }
}

impl Counts {
    /// Whether the event may be logged.
    fn take(&mut self, now: Instant, event: &Event<'_>, seen: Seen) -> Verdict {
        let meta = event.metadata();
        let kind = meta.callsite();
        let key = (kind.clone(), Who::of(&seen.peer));
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&key) {
            self.forget(now);
        }
        let like = |window: &mut Window| {
            let first = window.held == 1;
            let Seen { text, peer, .. } = &seen;
            window.like = Some(Like { level: *meta.level(), text: text.0.clone(), peer: peer.0.clone() });
            if first { Verdict::FirstHeld } else { Verdict::Held }
        };
        let counted = self.peers.len() < MAX_PEERS || self.peers.contains_key(&key);
        if counted {
            let window = self.peers.entry(key).or_insert_with(|| Window::new(now, OF_PEER));
            if !window.take(now, OF_PEER) {
                return like(window);
            }
        }
        let window = self.kinds.entry(kind).or_insert_with(|| Window::new(now, OF_KIND));
        if window.take(now, OF_KIND) { Verdict::Passes } else { like(window) }
    }

    /// Makes room, at most once in a second.
    fn forget(&mut self, now: Instant) {
        let recently = |swept: Instant| now.saturating_duration_since(swept) < Duration::from_secs(1);
        if !self.swept.is_some_and(recently) {
            self.peers.retain(|_, window| window.held > 0 || !window.is_over(now));
            self.swept = Some(now);
        }
    }

    /// What is to be told now (`all`: what is to be told later, too), and when there is more.
    fn notes(&mut self, now: Instant, all: bool) -> (Vec<Note>, Option<Instant>) {
        let mut notes = Vec::new();
        notes.extend(self.peers.values_mut().filter_map(|w| w.note(now, OF_PEER, false, all)));
        notes.extend(self.kinds.values_mut().filter_map(|w| w.note(now, OF_KIND, true, all)));
        let waiting = self.peers.values().chain(self.kinds.values()).filter(|w| w.held > 0);
        (notes, waiting.map(|w| w.began + WINDOW).min())
    }
}

#[derive(PartialEq, Eq)]
enum Verdict {
    Passes,
    Held,
    /// The thread has to know when to tell.
    FirstHeld,
}

impl Limiter {
    /// `queue`: of the thread that calls [`Limiter::tell`].
    pub fn new(queue: LineQueue) -> Self {
        Self { counts: Arc::default(), queue }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Logs what was left out in windows that are over (`all`: in all). Returns when to be called again at the latest.
    pub fn tell(&self, now: Instant, all: bool) -> Option<Instant> {
        // Logged without the lock: the events come by here again.
        let (notes, due) = self.counts().notes(now, all);
        notes.iter().for_each(Note::log);
        due
    }
}

impl<S: Subscriber> Layer<S> for Limiter {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let mut seen = Seen::default();
        event.record(&mut seen);
        if !seen.has_peer {
            return true;
        }
        let verdict = self.counts().take(Instant::now(), event, seen);
        if verdict == Verdict::FirstHeld {
            self.queue.wake();
        }
        verdict == Verdict::Passes
    }
}

impl Note {
    fn log(&self) {
        let (held, seconds, like) = (self.held, self.seconds, &self.like.text);
        let from = if self.others { "several peers" } else { &self.like.peer };
        macro_rules! at {
            ($level:expr) => {
                tracing::event!($level, like, from, "{held} more like this were left out in {seconds} s")
            };
        }
        match self.like.level {
            Level::ERROR => at!(Level::ERROR),
            Level::WARN => at!(Level::WARN),
            _ => at!(Level::INFO),
        }
    }
}

/// What an event says of itself.
#[derive(Default)]
struct Seen {
    has_peer: bool,
    peer: Text,
    text: Text,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Too long is cut.
        match field.name() {
            // A front end is known by the controller whose socket it could open, a server by the path to it, a disk by its file.
            "peer" | "controller" | "path" => {
                self.has_peer = true;
                let _ = write!(self.peer, "{value:?}");
            }
            "message" => drop(write!(self.text, "{value:?}")),
            _ => {}
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// The beginning of what is written to it.
#[derive(Default)]
struct Text(String);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let left = MAX_TEXT.saturating_sub(self.0.len());
        self.0.push_str(&text[..text.floor_char_boundary(left)]);
        if text.len() > left { Err(fmt::Error) } else { Ok(()) }
    }
}

impl Who {
    /// By what a field `peer` says: an address with or without port, "process PID (user UID)", or anything else.
    fn of(peer: &Text) -> Self {
        let text = &peer.0;
        let first = text.split_whitespace().next().unwrap_or_default();
        let address = first.parse::<SocketAddr>().map(|a| a.ip()).or_else(|_| first.parse::<IpAddr>());
        match address {
            Ok(ip) => Self::Host(Source::of(ip)),
            Err(_) => Self::Name(text.find("(user ").map_or(text.as_str(), |at| &text[at..]).to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    fn who(text: &str) -> Who {
        Who::of(&Text(text.into()))
    }

    #[test]
    fn peers_are_told_apart_by_what_they_cannot_choose() {
        assert_eq!(who("192.0.2.1:5"), who("192.0.2.1:6 \"name\""));
        assert_eq!(who("192.0.2.1:5"), who("[::ffff:192.0.2.1]:7"));
        assert_ne!(who("192.0.2.1:5"), who("192.0.2.2:5"));
        assert_eq!(who("[2001:db8::1]:5"), who("[2001:db8::ffff:2]:9"));
        assert_ne!(who("[2001:db8::1]:5"), who("[2001:db8:0:1::1]:5"));
        assert_eq!(who("process 5 (user 1000)"), who("process 6 (user 1000)"));
        assert_ne!(who("process 5 (user 1000)"), who("process 5 (user 1001)"));
    }

    #[test]
    fn a_window_that_overflowed_is_followed_by_smaller_ones_until_it_is_quiet() {
        let (t, minute) = (Instant::now(), WINDOW);
        let limits = Limits { first: 3, more: 1 };
        let mut w = Window::new(t, limits);
        let passed = |w: &mut Window, now, n| {
            let passed = (0..n).filter(|_| w.take(now, limits)).count();
            w.like = Some(Like { level: Level::INFO, text: "x".into(), peer: "y".into() });
            passed
        };
        assert_eq!(passed(&mut w, t, 10), 3);
        assert!(w.note(t, limits, false, false).is_none(), "not yet");
        assert_eq!(passed(&mut w, t + minute, 5), 0, "not before it is told");
        assert_eq!(w.note(t + minute, limits, false, false).unwrap().held, 12);
        assert_eq!(passed(&mut w, t + minute, 5), 1);
        assert_eq!(w.note(t + minute, limits, false, true).unwrap().held, 4, "the last words");
        assert_eq!(passed(&mut w, t + 2 * minute, 1), 1);
        assert_eq!(passed(&mut w, t + 3 * minute, 10), 3);
    }

    /// Counts what comes through.
    #[derive(Clone, Default)]
    struct Through(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Through {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut seen = Seen::default();
            event.record(&mut seen);
            self.0.lock().unwrap().push(seen.text.0);
        }
    }

    #[test]
    fn a_peer_that_floods_is_cut_and_others_are_not() {
        let (queue, _writer) = LineQueue::new(std::io::stderr());
        let (limiter, through) = (Limiter::new(queue), Through::default());
        let subscriber = tracing_subscriber::registry().with(limiter.clone()).with(through.clone());
        let count = |what: &str| through.0.lock().unwrap().iter().filter(|t| *t == what).count();
        tracing::subscriber::with_default(subscriber, || {
            let say = |peer: &str| tracing::info!(peer, "opened");
            (0..5000).for_each(|_| say("192.0.2.1:9"));
            assert_eq!(count("opened"), OF_PEER.first as usize);
            say("192.0.2.2:9");
            assert_eq!(count("opened"), OF_PEER.first as usize + 1);
            // Another kind, and one that no peer causes.
            (0..50).for_each(|_| tracing::warn!(peer = "192.0.2.1:9", "closed"));
            (0..5000).for_each(|_| tracing::info!("ours"));
            assert_eq!((count("closed"), count("ours")), (50, 5000));
            // Many addresses do not help.
            (0..5000).for_each(|n| say(&format!("[2001:db8:0:{n:x}::1]:9")));
            assert_eq!(count("opened"), OF_KIND.first as usize);
            assert!(limiter.counts().peers.len() <= MAX_PEERS);
            assert!(limiter.tell(Instant::now(), false).is_some());
            assert!(limiter.tell(Instant::now(), true).is_none());
            let told = |held: &str| through.0.lock().unwrap().iter().filter(|t| t.starts_with(held)).count();
            assert_eq!(told("4900 more like this were left out"), 1);
            assert_eq!(told("4101 more like this were left out"), 1);
        });
    }
}

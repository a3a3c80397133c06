//! Lines for a file that may be slow, or that nobody reads: a bounded queue, and a thread of its own that writes.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Lines that wait at most.
const MAX_LINES: usize = 4096;
/// Bytes of them at most.
const MAX_BYTES: usize = 4 << 20;

/// The way to the thread. Clones are the same queue; the thread ends with the last.
#[derive(Clone)]
pub struct LineQueue {
    sender: Sender<Item>,
    level: Arc<Level>,
}

/// How full the queue is.
#[derive(Default)]
struct Level {
    bytes: AtomicUsize,
    lost: AtomicU64,
}

enum Item {
    Line(Box<[u8]>),
    /// Look at [`Chores`].
    Wake,
    /// Write what is there, then say so.
    Flush(Sender<()>),
}

/// What the thread does besides writing.
pub(super) trait Chores: Send + 'static {
    /// `lost` lines (0: none) found the queue full since the last call, and there is room again. `last`: the queue is being
    /// flushed. Returns when to be called again at the latest; `None`: after the next line.
    fn run(&mut self, now: Instant, lost: u64, last: bool) -> Option<Instant>;
}

/// The only thing that a queue for people adds.
struct LeftOut(LineQueue);

impl Chores for LeftOut {
    fn run(&mut self, _: Instant, lost: u64, _: bool) -> Option<Instant> {
        if lost > 0 {
            self.0.push(format!("({lost} lines were left out: they were read too slowly)\n").as_bytes());
        }
        None
    }
}

impl LineQueue {
    /// A queue for `file`, which people read, and its thread `name`, which never ends.
    ///
    /// # Errors
    /// As `pthread_create(3)`.
    pub fn start<F: AsFd + Send + 'static>(file: F, name: &str) -> io::Result<Self> {
        let (queue, writer) = Self::new(file);
        writer.start(name, LeftOut(queue.clone()))?;
        Ok(queue)
    }

    /// A queue for `file`, and what makes its thread ([`Writer::start`]).
    pub(super) fn new<F: AsFd + Send + 'static>(file: F) -> (Self, Writer<F>) {
        let (sender, receiver) = bounded(MAX_LINES);
        let level = Arc::<Level>::default();
        (Self { sender, level: level.clone() }, Writer { file, receiver, level })
    }

    /// Hands over a line, with its end. Never blocks: a line that finds no room is counted and lost.
    pub fn push(&self, line: &[u8]) {
        let held = self.level.bytes.fetch_add(line.len(), Ordering::Relaxed);
        let room = held + line.len() <= MAX_BYTES;
        if !room || self.sender.try_send(Item::Line(line.into())).is_err() {
            self.level.bytes.fetch_sub(line.len(), Ordering::Relaxed);
            self.level.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has the thread look at its [`Chores`]. A full queue keeps it awake anyway.
    pub(super) fn wake(&self) {
        let _ = self.sender.try_send(Item::Wake);
    }

    /// Waits until everything is written that was handed over before, `limit` at most. False: it is not.
    pub fn flush(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let (done, written) = bounded(1);
        self.sender.send_deadline(Item::Flush(done), until).is_ok() && written.recv_deadline(until).is_ok()
    }
}

/// The other end of a [`LineQueue`].
pub(super) struct Writer<F> {
    file: F,
    receiver: Receiver<Item>,
    level: Arc<Level>,
}

impl<F: AsFd + Send + 'static> Writer<F> {
    /// Starts the thread `name`. It inherits the cores of the caller, who must not be pinned yet.
    ///
    /// # Errors
    /// As `pthread_create(3)`.
    pub(super) fn start(self, name: &str, chores: impl Chores) -> io::Result<()> {
        std::thread::Builder::new().name(name.into()).spawn(move || self.run(chores)).map(drop)
    }

    fn run(self, mut chores: impl Chores) {
        let mut due = None;
        loop {
            let item = match due {
                Some(due) => self.receiver.recv_deadline(due),
                None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match item {
                Ok(Item::Flush(done)) => {
                    self.finish(&mut chores);
                    // Who asked may have given up.
                    let _ = done.try_send(());
                }
                Ok(item) => self.write(&item),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            due = self.chores(&mut chores, false);
        }
    }

    /// Writes all there is, and what the chores have to add.
    fn finish(&self, chores: &mut impl Chores) {
        self.drain();
        self.chores(chores, true);
        self.drain();
    }

    fn drain(&self) {
        // No more than there can be: others may go on writing.
        for _ in 0..MAX_LINES {
            match self.receiver.try_recv() {
                Ok(Item::Flush(done)) => drop(done.try_send(())),
                Ok(item) => self.write(&item),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn chores(&self, chores: &mut impl Chores, last: bool) -> Option<Instant> {
        let roomy = last || self.receiver.len() <= MAX_LINES / 2;
        let lost = if roomy { self.level.lost.swap(0, Ordering::Relaxed) } else { 0 };
        chores.run(Instant::now(), lost, last)
    }

    fn write(&self, item: &Item) {
        let Item::Line(line) = item else { return };
        write_all(&self.file, line);
        self.level.bytes.fetch_sub(line.len(), Ordering::Relaxed);
    }
}

/// Writes `bytes` however long it takes. What the file refuses is lost: there is nobody to tell.
fn write_all(file: &impl AsFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(0) => return,
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR) => {}
            // A pipe that somebody else has made non-blocking.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(file, PollFlags::OUT)], None);
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, PipeReader};

    use super::*;

    /// Says in the queue itself what was lost, as the log does.
    struct Tell(LineQueue);

    impl Chores for Tell {
        fn run(&mut self, _: Instant, lost: u64, last: bool) -> Option<Instant> {
            if lost > 0 {
                self.0.push(format!("lost {lost}\n").as_bytes());
            }
            if last {
                self.0.push(b"last\n");
            }
            None
        }
    }

    fn start() -> (LineQueue, BufReader<PipeReader>) {
        let (reader, writer) = io::pipe().unwrap();
        let (queue, thread) = LineQueue::new(writer);
        thread.start("test", Tell(queue.clone())).unwrap();
        (queue, BufReader::new(reader))
    }

    #[test]
    fn flushed_lines_are_written_in_order() {
        let (queue, reader) = start();
        queue.push(b"a\n");
        queue.push(b"b\n");
        assert!(queue.flush(test_support::limit(60)));
        let lines: Vec<String> = reader.lines().take(3).map(Result::unwrap).collect();
        assert_eq!(lines, ["a", "b", "last"]);
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_and_no_time() {
        let (queue, mut reader) = start();
        // More than queue and pipe take.
        let all = 3 * MAX_LINES;
        for n in 0..all {
            queue.push(format!("{n} {}\n", "x".repeat(100)).as_bytes());
        }
        assert!(!queue.flush(Duration::from_millis(10)), "nobody reads");
        // Now somebody does: lines in order, then how many are missing.
        let (mut next, mut read, mut lost, mut line) = (0, 0, 0, String::new());
        while read + lost < all {
            line.clear();
            reader.read_line(&mut line).unwrap();
            let mut words = line.split_whitespace();
            match words.next().unwrap() {
                "lost" => lost += words.next().unwrap().parse::<usize>().unwrap(),
                "last" => {}
                n => {
                    let n: usize = n.parse().unwrap();
                    assert!(n >= next, "{n} after {next}");
                    (next, read) = (n + 1, read + 1);
                }
            }
        }
        assert!(lost > 0 && read + lost == all, "{read} lines and {lost} lost");
        queue.push(b"again\n");
        let again = |l: &io::Result<String>| l.as_ref().unwrap() == "again";
        assert!(reader.lines().find(again).is_some());
    }

    #[test]
    fn bytes_are_bounded_too() {
        let (queue, _reader) = start();
        let line = vec![b'x'; 1 << 20];
        (0..64).for_each(|_| queue.push(&line));
        let level = &queue.level;
        assert!(level.bytes.load(Ordering::Relaxed) <= MAX_BYTES);
        assert!(level.lost.load(Ordering::Relaxed) >= 59);
    }
}

//! How paths and sessions end.

use std::time::Duration;

use reactor::Turn;
use rtrs_proto::errno::Errno;
use rtrs_proto::handshake;
use zerocopy::IntoBytes;

use super::{PathEntry, Server, ServerCell};
use crate::lane::Lane;
use crate::upper::Upper;

/// Bytes of queues that are freed before the system gets them back.
const WORTH_TRIMMING: u64 = 16 << 20;
/// How long to wait for more of them.
const TRIM_DELAY: Duration = Duration::from_secs(2);

impl<U: Upper> Server<U> {
    /// Closes a path: disconnects all its connections at once (a client waits for that), then lets the lanes finish.
    pub(super) fn close_path(&mut self, cx: &mut Turn<'_>, tag: u32, why: &str) {
        let Some(entry) = self.paths.get_mut(&tag) else { return };
        if std::mem::replace(&mut entry.closing, true) {
            return;
        }
        tracing::info!(session = entry.path.session.name(), peer = %entry.path.peer, why, "closing path");
        self.table.begin_close(entry.id);
        entry.path.set_closing();
        for con in entry.cons.iter().flatten() {
            if let Err(error) = self.cms[con.cm].disconnect(con.id) {
                tracing::debug!(%error, "disconnect");
            }
        }
        let cids: Vec<u16> = (0..entry.cons.len() as u16).collect();
        for cid in cids {
            self.close_con(tag, cid);
        }
        self.finish_path(cx, tag);
    }

    /// Asks the lane to let go of a connection; the answer is [`Server::con_closed`].
    pub(super) fn close_con(&mut self, tag: u32, cid: u16) {
        let Some(con) = self.paths.get_mut(&tag).and_then(|p| p.cons.get_mut(cid as usize)?.as_mut()) else {
            return;
        };
        con.closing = true;
        // Without a key the lane has not taken it yet; `con_ready` comes back here.
        if let (Some(key), false) = (con.key, con.closed) {
            Lane::<U>::send(&self.lanes[con.lane].handle, move |_, lane| lane.close_con(key));
        }
    }

    /// The queue pair of a connection is gone.
    pub(super) fn con_closed(&mut self, cx: &mut Turn<'_>, tag: u32, cid: u16) {
        let Some(con) = self.paths.get_mut(&tag).and_then(|p| p.cons.get_mut(cid as usize)?.as_mut()) else {
            return;
        };
        con.closed = true;
        self.finish_path(cx, tag);
    }

    /// Frees a path once all its connections are closed.
    pub(super) fn finish_path(&mut self, cx: &mut Turn<'_>, tag: u32) {
        let Some(entry) = self.paths.get(&tag) else { return };
        if !entry.closing || entry.cons.iter().flatten().any(|c| !c.closed) {
            return;
        }
        let Some(entry) = self.paths.remove(&tag) else { return };
        self.tags.remove(&entry.id);
        self.release_cons(&entry);
        self.trim_later(cx, &entry);
        if entry.path.session.has_opened() {
            self.table.remember(entry.path.peer.ip());
        }
        entry.path.session.left(tag);
        if let Some(closed) = self.table.path_closed(entry.id) {
            if closed.last_up {
                let events = self.events.clone();
                events.borrow_mut().session_down(cx, &entry.path.session);
            }
            if closed.session_gone {
                self.sessions.remove(&entry.session_id);
            }
        }
        tracing::debug!(session = entry.path.session.name(), peer = %entry.path.peer, "path closed");
        self.names_freed(cx);
        if self.paths.is_empty()
            && let Some(done) = self.drained.take()
        {
            // Later, because it may want this server, which is borrowed now.
            cx.after(Duration::ZERO, done);
        }
    }

    /// After many connections have gone, gives their memory back to the system: a burst shall leave nothing.
    fn trim_later(&mut self, cx: &mut Turn<'_>, entry: &PathEntry) {
        let connections = entry.cons.iter().flatten().count() as u64;
        let before = self.freed;
        self.freed += connections * self.options.queue_bytes();
        if before < WORTH_TRIMMING && self.freed >= WORTH_TRIMMING {
            cx.after(TRIM_DELAY, |cx| {
                if let Some(cell) = cx.local::<ServerCell<U>>() {
                    cell.0.borrow_mut().freed = 0;
                    iobuf::trim_heap();
                }
            });
        }
    }

    fn release_cons(&mut self, entry: &PathEntry) {
        for con in entry.cons.iter().flatten() {
            self.conns.remove(&con.id);
            if !con.accepted {
                // Destroying alone would say no without an errno, which a kernel client takes 30 s to believe.
                let no = handshake::reject(Errno::ECONNRESET);
                if let Err(error) = self.cms[con.cm].reject(con.id, no.as_bytes()) {
                    tracing::debug!(%error, "the reject could not be sent");
                }
            }
            self.cms[con.cm].destroy(con.id);
            self.lanes[con.lane].connections -= 1;
            self.release_cq(con.lane, con.cq);
        }
    }

    /// Closes one path (`client@server`) or all of a session by request of the operator; the client may come back. Returns how many.
    pub fn disconnect_path(&mut self, cx: &mut Turn<'_>, session: &str, path: Option<&str>) -> usize {
        let wanted = |e: &&PathEntry| {
            e.path.session.name() == session && path.is_none_or(|p| p == super::info::path_name(&e.path))
        };
        let tags: Vec<u32> = self.paths.values().filter(wanted).map(|e| e.path.tag).collect();
        for &tag in &tags {
            self.close_path(cx, tag, "disconnected by the operator");
        }
        tags.len()
    }

    /// Orderly stop: no new connections, requests in flight finish and are answered, then every path is
    /// disconnected, then `done` runs.
    pub fn shutdown(&mut self, cx: &mut Turn<'_>, done: impl FnOnce(&mut Turn<'_>) + 'static) {
        self.stopping = true;
        for (id, (cm, _)) in std::mem::take(&mut self.listeners) {
            self.cms[cm].destroy(id);
        }
        if self.paths.is_empty() {
            cx.after(Duration::ZERO, done);
            return;
        }
        self.drained = Some(Box::new(done));
        let tags: Vec<u32> = self.paths.keys().copied().collect();
        for tag in tags {
            self.drain_path(cx, tag);
        }
    }

    /// Closes everything now, answered or not: for a shutdown that takes too long.
    pub fn abort(&mut self, cx: &mut Turn<'_>) {
        let tags: Vec<u32> = self.paths.keys().copied().collect();
        for tag in tags {
            self.close_path(cx, tag, "shutdown took too long");
        }
    }

    fn drain_path(&mut self, cx: &mut Turn<'_>, tag: u32) {
        let Some(entry) = self.paths.get(&tag) else { return };
        let half_made = entry.cons.iter().flatten().any(|c| c.key.is_none());
        if !entry.path.is_up() || half_made {
            return self.close_path(cx, tag, "the server is shutting down");
        }
        entry.path.set_draining();
        for con in entry.cons.iter().flatten() {
            if let Some(key) = con.key {
                Lane::<U>::send(&self.lanes[con.lane].handle, move |_, lane| lane.drain_con(key));
            }
        }
    }

    pub(super) fn con_drained(&mut self, cx: &mut Turn<'_>, tag: u32, cid: u16) {
        let Some(entry) = self.paths.get_mut(&tag) else { return };
        if let Some(con) = entry.cons.get_mut(cid as usize).and_then(Option::as_mut) {
            con.drained = true;
        }
        if entry.cons.iter().flatten().all(|c| c.drained) {
            self.close_path(cx, tag, "the server is shutting down");
        }
    }
}

//! What time brings: heartbeats, and requests that wait for too long.

use std::time::{Duration, Instant};

use rtrs_proto::heartbeat::Hb;
use rtrs_proto::imm;

use super::io::Io;
use super::slab::Key;

/// So many looks at old requests per [`crate::client::SessionOptions::io_timeout`].
const LOOKS: u32 = 4;

impl Io {
    /// HB_ACK came in on `con`.
    pub(super) fn hb_acked(&mut self, con: Key) {
        let now_ns = self.now_ns;
        let Some(link) = self.cons.get(con).and_then(|c| self.links.get(c.link)) else { return };
        let Some(hb) = &mut link.heartbeat else { return };
        hb.on_ack(now_ns);
        if let Some(latency) = hb.latency_ns() {
            link.path.set_latency(latency);
        }
    }

    /// Does what is due.
    pub(super) fn beat(&mut self, now: Instant) {
        if self.next_beat.is_none_or(|due| due > now) {
            return;
        }
        for key in self.links.keys() {
            self.beat_link(key);
        }
        for key in self.sessions.keys() {
            self.look_for_old_requests(key);
        }
        self.find_next_beat();
    }

    fn beat_link(&mut self, key: Key) {
        let now_ns = self.now_ns;
        let Some(link) = self.links.get(key) else { return };
        let (Some(hb), Some(service)) = (&mut link.heartbeat, link.service) else { return };
        if link.path.take_traffic() {
            hb.on_traffic();
        }
        match hb.poll(now_ns) {
            Hb::Nothing => {}
            Hb::SendMsg => {
                if let Some(con) = self.cons.get(service).filter(|c| c.can_beat()) {
                    con.push_imm(imm::HB_MSG);
                    self.mark(service);
                }
            }
            Hb::Dead => self.link_broken(key, "no heartbeat from the server".into()),
        }
    }

    /// Resets the paths that have requests of a session for too long.
    fn look_for_old_requests(&mut self, key: Key) {
        let now_ns = self.now_ns;
        let Some(session) = self.sessions.get(key) else { return };
        let Some(timeout) = session.io_timeout else { return };
        let old = |since_ns: u64| now_ns.saturating_sub(since_ns) >= timeout.as_nanos() as u64;
        let found: Vec<(Key, u16, &str)> = (session.permits.iter())
            .filter(|(_, p)| old(p.since_ns))
            .filter_map(|(id, p)| Some((p.con?, id, p.via.name())))
            .collect();
        for (con, id, what) in found {
            self.broken(con, &format!("no answer to the {what} request in buffer {id} within {timeout:?}"));
        }
    }

    pub(super) fn find_next_beat(&mut self) {
        let beats = self.links.iter().filter_map(|(_, l)| l.heartbeat.as_ref()?.deadline());
        let look = |t: Duration| self.now_ns.saturating_add((t / LOOKS).as_nanos() as u64);
        let looks = self.sessions.iter().filter(|(_, s)| s.up).filter_map(|(_, s)| s.io_timeout.map(look));
        let next = beats.chain(looks).min();
        self.next_beat = next.map(|ns| self.instant(ns));
    }
}

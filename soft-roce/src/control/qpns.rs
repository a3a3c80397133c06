//! Queue pair numbers in use: until the user has dropped the queue pair and no packet for it can be on its way.

use std::collections::HashMap;
use std::sync::Arc;

use roce_proto::cm::ConnId;

use crate::clock::Random;
use crate::engine::EngineMailbox;

/// One number.
struct Use {
    conn: ConnId,
    engine: Arc<EngineMailbox>,
    /// The user still has the queue pair.
    held: bool,
    /// The agent has not freed it yet.
    in_agent: bool,
}

/// All numbers in use, of all engines.
#[derive(Default)]
pub struct Qpns {
    by_qpn: HashMap<u32, Use>,
    by_conn: HashMap<ConnId, u32>,
}

impl Qpns {
    /// A number that nobody can guess, for a queue pair on the engine with `slot`.
    pub fn allocate(
        &mut self,
        slot: u8,
        conn: ConnId,
        engine: Arc<EngineMailbox>,
        random: &mut Random,
    ) -> u32 {
        loop {
            let qpn = (random.u32() & 0x1_ffff) << 7 | u32::from(slot);
            // 17 bits against few in use: this ends. 0 and 1 are special, 0xffffff is multicast.
            if qpn >> 7 == 0 || qpn == 0xff_ffff || self.by_qpn.contains_key(&qpn) {
                continue;
            }
            self.by_qpn.insert(qpn, Use { conn, engine, held: true, in_agent: false });
            self.by_conn.insert(conn, qpn);
            return qpn;
        }
    }

    /// The queue pair of a connection, and how to reach it.
    pub fn of(&self, conn: ConnId) -> Option<(u32, &Arc<EngineMailbox>)> {
        let qpn = *self.by_conn.get(&conn)?;
        self.by_qpn.get(&qpn).map(|used| (qpn, &used.engine))
    }

    /// The agent knows the number now.
    pub fn in_agent(&mut self, qpn: u32) {
        if let Some(used) = self.by_qpn.get_mut(&qpn) {
            used.in_agent = true;
        }
    }

    /// The agent is done with the number.
    pub fn agent_done(&mut self, qpn: u32) {
        self.release(qpn, |used| used.in_agent = false);
    }

    /// The user has dropped the queue pair.
    pub fn dropped(&mut self, qpn: u32) {
        self.release(qpn, |used| used.held = false);
    }

    fn release(&mut self, qpn: u32, change: impl FnOnce(&mut Use)) {
        let Some(used) = self.by_qpn.get_mut(&qpn) else { return };
        change(used);
        if !used.held && !used.in_agent {
            self.by_conn.remove(&used.conn);
            self.by_qpn.remove(&qpn);
        }
    }
}

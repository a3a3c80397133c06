//! Lists of operations on the server's session table, five bytes each, with a driver's view kept beside it.
#![no_main]

use std::collections::HashMap;
use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use rtrs_proto::admission::{Limits, PathId, PathState, SessionTable};
use rtrs_proto::handshake::ConnectRequest;
use rtrs_proto::wire::Uuid;

const LIMITS: Limits = Limits {
    max_sessions: 3,
    max_paths: 5,
    max_connections: 9,
    max_memory: 500,
    path_bytes: 100,
    connection_bytes: 10,
    share_percent: 70,
    max_unproved: 4,
    max_cid_num: 70,
    half_open_ns: 50,
};

/// The table, the number of connections it gave us per path, and the time.
struct Driver {
    table: SessionTable,
    given: HashMap<PathId, u16>,
    now: u64,
}

fuzz_target!(|input: &[u8]| {
    let mut driver = Driver { table: SessionTable::new(LIMITS), given: HashMap::new(), now: 0 };
    for op in input.as_chunks::<5>().0.iter().take(200) {
        driver.step(*op);
        driver.check();
    }
    driver.close_all();
});

/// The client at address `n`.
fn ip(n: u8) -> IpAddr {
    [10, 0, 0, n].into()
}

impl Driver {
    fn step(&mut self, [op, a, b, c, d]: [u8; 5]) {
        let nth = self.table.paths().nth(usize::from(a % 10)).map(|p| (p.id, p.state));
        match (op % 10, nth) {
            (0..4, _) => self.admit(op, a, b, c, d),
            (4, Some((id, _))) => self.info(id, b, c),
            (5, Some((id, state))) => assert_eq!(self.table.begin_close(id), state != PathState::Closing),
            (6, Some((id, PathState::Closing))) => self.closed(id),
            (7, _) => self.wait(a),
            (8, Some((id, _))) => self.prove(id),
            (9, _) => self.table.remember(ip(a >> 4)),
            _ => {}
        }
    }

    fn admit(&mut self, op: u8, a: u8, b: u8, c: u8, d: u8) {
        let request = ConnectRequest {
            cid: u16::from(c),
            cid_num: u16::from(d),
            recon_cnt: 0,
            path_uuid: Uuid([a & 7; 16]),
            session_uuid: Uuid([b & 3; 16]),
            first_conn: op & 1 == 0,
        };
        if let Ok(admitted) = self.table.admit(self.now, &request, ip(a >> 4), ip(0), false) {
            self.evicted(&admitted.evicted);
            assert_eq!(admitted.new_path, !self.given.contains_key(&admitted.path));
            *self.given.entry(admitted.path).or_insert(0) += 1;
        }
    }

    fn prove(&mut self, id: PathId) {
        if let Ok(evicted) = self.table.prove(id) {
            self.evicted(&evicted);
        }
    }

    fn evicted(&self, paths: &[PathId]) {
        assert!(paths.iter().all(|id| self.table.path(*id).map(|p| p.state) == Some(PathState::Closing)));
    }

    fn info(&mut self, id: PathId, name: u8, msg_type: u8) {
        let mut bytes = [0; 272];
        bytes[0] = msg_type & 1;
        bytes[2] = name;
        let up = self.table.info_req(id, &bytes);
        let state = if up.is_ok() { PathState::Up } else { PathState::Closing };
        self.evicted(&up.map_or(vec![], |up| up.evicted));
        assert_eq!(self.table.path(id).map(|p| p.state), Some(state));
    }

    fn closed(&mut self, id: PathId) {
        let closed = self.table.path_closed(id).expect("it was in the list");
        assert_eq!(Some(closed.connections), self.given.remove(&id));
        assert_eq!(closed.session_gone, self.table.session(closed.session).is_none());
    }

    fn wait(&mut self, ns: u8) {
        self.now += u64::from(ns);
        let expired: Vec<_> = self.table.expired(self.now).collect();
        for id in expired {
            assert!(self.table.begin_close(id));
        }
        assert!(self.table.deadline().is_none_or(|d| d > self.now));
    }

    fn check(&self) {
        let t = &self.table;
        assert!(t.in_use().all(|(_, used, limit)| used <= limit.total()));
        assert_eq!(t.connections(), self.given.values().map(|&n| usize::from(n)).sum());
        for p in t.paths() {
            assert!(t.session(p.session).is_some() && (1..=p.cid_num).contains(&p.connections));
            assert!(p.state != PathState::Up || p.connections == p.cid_num);
            for q in t.paths().filter(|q| q.id != p.id) {
                let same_session = p.session == q.session;
                assert!(!same_session || (p.uuid != q.uuid && p.src != q.src));
                assert!(same_session || p.name.is_none() || p.name != q.name);
            }
        }
    }

    fn close_all(mut self) {
        let left: Vec<_> = self.table.paths().map(|p| p.id).collect();
        for id in left {
            self.table.begin_close(id);
            self.closed(id);
        }
        assert_eq!((self.table.connections(), self.table.sessions().count()), (0, 0));
    }
}

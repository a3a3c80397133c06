//! Properties over random input: nothing panics, encoding and decoding are inverse, the tables stay bounded.

use std::collections::HashMap;
use std::net::IpAddr;

use proptest::prelude::*;
use rtrs_proto::admission::{Limits, PathId, PathState, PathView, SessionTable};
use rtrs_proto::client::{self, ClientImm, Rbufs, ServerParams};
use rtrs_proto::handshake::{self, ConnectRequest};
use rtrs_proto::imm::{ServerImm, decode_at_server, io_rsp};
use rtrs_proto::request::{Action, Direction, HDR_COPY_LEN, Request};
use rtrs_proto::response::{self, Keys, Last, Policy, ReadStyle};
use rtrs_proto::wire::{SgDesc, Uuid};
use rtrs_proto::{Errno, Geometry};
use zerocopy::IntoBytes;

fn geometry() -> impl Strategy<Value = Geometry> {
    (2..=4096u16, 512..=600_000u32, 288..=8192u32)
        .prop_filter_map("28 bits", |(qd, io, hdr)| Geometry::new(qd, io, hdr).ok())
}

fn errno() -> impl Strategy<Value = Option<Errno>> {
    (0..=511i32).prop_map(Errno::from_raw)
}

fn connect_request() -> impl Strategy<Value = ConnectRequest> {
    (any::<(u16, [u8; 16], [u8; 16], bool)>(), 1..=4096u16, any::<prop::sample::Index>()).prop_map(
        |((recon_cnt, path, session, first_conn), cid_num, cid)| ConnectRequest {
            cid: cid.index(cid_num.into()) as u16,
            cid_num,
            recon_cnt,
            path_uuid: Uuid(path),
            session_uuid: Uuid(session),
            first_conn,
        },
    )
}

proptest! {
    #[test]
    fn connect_requests_round_trip(request in connect_request()) {
        prop_assert_eq!(ConnectRequest::parse(request.to_wire().as_bytes()), Ok(request));
    }

    #[test]
    fn accepts_round_trip(geometry in geometry(), rotating_keys: bool) {
        let rsp = handshake::accept(&geometry, rotating_keys);
        prop_assert_eq!(ServerParams::parse(rsp.as_bytes()), Ok(ServerParams { geometry, rotating_keys }));
    }

    #[test]
    fn rejects_round_trip(errno in errno()) {
        if let Some(errno) = errno {
            prop_assert_eq!(client::parse_reject(handshake::reject(errno).as_bytes()), errno);
        }
    }

    #[test]
    fn session_names_round_trip(name in "[^/.\0]{1,63}") {
        let msg = client::info_req(&name).unwrap();
        prop_assert_eq!(handshake::parse_info_req(msg.as_bytes()), Ok(&name[..]));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), geometry in geometry()) {
        let _ = ConnectRequest::parse(&bytes).map(|r| r.to_string());
        let _ = ServerParams::parse(&bytes);
        let _ = client::parse_reject(&bytes);
        let _ = handshake::parse_info_req(&bytes).map(str::len);
        let _ = Rbufs::parse(&geometry, &bytes);
        let _ = client::parse_rkey_rsp(&bytes, 0);
    }

    #[test]
    fn request_immediates_round_trip(geometry in geometry(), id: u16, off: u32) {
        let id = id % geometry.queue_depth();
        let off = off % (geometry.chunk_size() - 3);
        let imm = geometry.imm_layout().io_req(id, off);
        prop_assert_eq!(decode_at_server(&geometry, imm), Ok(ServerImm::Request { id, off }));
    }

    #[test]
    fn response_immediates_round_trip(geometry in geometry(), id: u16, errno in errno(), inval: bool) {
        let id = id % geometry.queue_depth();
        let result = errno.map_or(Ok(()), Err);
        let imm = io_rsp(id.into(), errno, inval);
        prop_assert_eq!(client::decode(&geometry, imm), ClientImm::Response { id, result, inval });
    }

    /// What a server is told to touch lies within the chunk, whatever the immediate and the header say.
    #[test]
    fn decoded_requests_stay_within_the_chunk(
        geometry in geometry(), imm: u32, mut copy: [u8; HDR_COPY_LEN], kind in 0..4u8,
        usr_len in 0..5000u16, len: u32, near: Option<bool>,
    ) {
        // Often a user message that just fits before its header, or just does not.
        let imm = near.map_or(imm, |fits| geometry.imm_layout().io_req(0, u32::from(usr_len.max(1)) - u32::from(!fits)));
        if kind != 3 {
            // Mostly valid headers get further.
            copy[..8].copy_from_slice(&[2 + kind % 2, 0, usr_len as u8, (usr_len >> 8) as u8, kind & 1, 0, kind, 0]);
            copy[20..].copy_from_slice(&(len % 8192).to_le_bytes());
        }
        if let Ok(ServerImm::Request { id, off }) = decode_at_server(&geometry, imm & 0x0fff_ffff) {
            prop_assert!(id < geometry.queue_depth());
            let avail = Request::hdr_copy_len(&geometry, off);
            prop_assert!((4..=HDR_COPY_LEN).contains(&avail) && off as usize + avail <= geometry.chunk_size() as usize);
            if let Ok(r) = Request::decode(&geometry, id, off, &copy) {
                prop_assert_eq!(r.usr_off() + u32::from(r.usr_len), off);
                if let Direction::Read { desc: Some(desc), .. } = r.direction {
                    prop_assert!((1..=r.data_len).contains(&desc.len.get()));
                }
            }
        }
    }

    /// Every client request is understood by the server as it was meant.
    #[test]
    fn requests_round_trip(
        geometry in geometry(), id: u16, usr in prop::collection::vec(any::<u8>(), 0..264),
        data_len in 0..8192u32, desc: Option<(u64, u32)>, need_inval: bool, write: bool,
    ) {
        let id = id % geometry.queue_depth();
        let desc = desc.filter(|_| data_len > 0).map(|(addr, key)| SgDesc::new(addr, key, data_len));
        let mut out = [0; 512];
        let post = if write {
            client::encode_write(&geometry, id, &usr, data_len, &mut out)
        } else {
            client::encode_read(&geometry, id, &usr, data_len, desc, need_inval, &mut out)
        };
        let fits = data_len as usize + usr.len() + 24 <= geometry.chunk_size() as usize
            && usr.len() + 24 <= geometry.max_hdr_size() as usize;
        prop_assert!(post.is_ok() || !fits);
        if let Ok(post) = post {
            let Ok(ServerImm::Request { id: got, off }) = decode_at_server(&geometry, post.imm) else {
                return Err(TestCaseError::fail("no request"));
            };
            let mut copy = [0; HDR_COPY_LEN];
            let hdr = &out[usr.len()..post.hdr_len];
            copy[..hdr.len()].copy_from_slice(hdr);
            let r = Request::decode(&geometry, got, off, &copy).unwrap();
            prop_assert_eq!((r.id, r.data_len, usize::from(r.usr_len)), (id, data_len, usr.len()));
            let need_inval = need_inval && desc.is_some();
            let want = if write { Direction::Write } else { Direction::Read { desc, need_inval } };
            prop_assert_eq!(r.direction, want);
            prop_assert_eq!(&out[..usr.len()], &usr[..]);
        }
    }

    /// The rules that are fatal to a kernel client if broken, for accepted and refused requests alike.
    #[test]
    fn replies_keep_the_rules(
        copy: [u8; HDR_COPY_LEN], sg_cnt in 0..3u8, flags in 0..2u8, len in 0..5000u32, errno in errno(),
        rotating: bool, one_message: bool, write: bool,
    ) {
        let mut copy = copy;
        copy[..8].copy_from_slice(&[if write { 2 } else { 3 }, 0, 32, 0, flags, 0, sg_cnt, 0]);
        copy[20..].copy_from_slice(&len.to_le_bytes());
        let keys = if rotating { Keys::Rotating } else { Keys::Static };
        let reads = if one_message { ReadStyle::OneMessage } else { ReadStyle::Invalidate };
        let policy = Policy { keys, reads };
        let decoded = Request::decode(&Geometry::default(), 9, 4096 + 32, &copy);
        let (reply, failed) = match decoded {
            Ok(r) => (response::plan(policy, &r, errno.map_or(Ok(()), Err)), errno.is_some()),
            Err(refused) => {
                let Action::Answer(errno) = refused.action() else { return Ok(()) };
                (response::plan_refusal(policy, 9, &refused, errno), true)
            }
        };
        let ClientImm::Response { id, result, inval } = client::decode(&Geometry::default(), reply.imm) else {
            return Err(TestCaseError::fail("no response"));
        };
        prop_assert_eq!((id, result.is_err()), (9, failed));
        prop_assert_eq!(inval, reply.inval.is_some(), "type 2 iff SEND_WITH_INV");
        prop_assert!(!inval || flags == 1 && sg_cnt == 1 && !write, "only keys that the client offered");
        prop_assert!(!failed || reply.data.is_none());
        prop_assert_eq!(rotating, reply.last == Last::SendRkeyImm);
        prop_assert!(reply.last != Last::WriteDataImm || reply.data.is_some());
    }
}

#[derive(Clone, Debug)]
enum Op {
    Admit { session: u8, path: u8, cid: u16, cid_num: u16, first: bool, src: u8 },
    Prove { path: usize },
    Remember { src: u8 },
    Info { path: usize, name: u8 },
    Close { path: usize },
    Closed { path: usize },
    Wait { ns: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..4u8, 0..4u8, 0..4u16, 1..4u16, any::<bool>(), 0..3u8).prop_map(
            |(session, path, cid, cid_num, first, src)| Op::Admit { session, path, cid, cid_num, first, src }
        ),
        4 => (0..12usize).prop_map(|path| Op::Prove { path }),
        1 => (0..3u8).prop_map(|src| Op::Remember { src }),
        3 => (0..12usize, 0..3u8).prop_map(|(path, name)| Op::Info { path, name }),
        1 => (0..12usize).prop_map(|path| Op::Close { path }),
        2 => (0..12usize).prop_map(|path| Op::Closed { path }),
        1 => (0..20u64).prop_map(|ns| Op::Wait { ns }),
    ]
}

const LIMITS: Limits = Limits {
    max_sessions: 3,
    max_paths: 5,
    max_connections: 7,
    max_memory: 500,
    path_bytes: 100,
    connection_bytes: 10,
    share_percent: 70,
    max_unproved: 4,
    max_cid_num: 3,
    half_open_ns: 50,
};

/// The table's client at address `n`.
fn ip(n: u8) -> IpAddr {
    [10, 0, 0, n].into()
}

/// What a driver would keep: how many connections it was given per path.
type Model = HashMap<PathId, u16>;

fn step(t: &mut SessionTable, model: &mut Model, now: &mut u64, op: &Op) -> Result<(), TestCaseError> {
    let nth = |t: &SessionTable, n: usize| t.paths().nth(n).map(|p| p.id);
    match *op {
        Op::Admit { session, path, cid, cid_num, first, src } => {
            let request = ConnectRequest {
                cid,
                cid_num,
                recon_cnt: 0,
                path_uuid: Uuid([path; 16]),
                session_uuid: Uuid([session; 16]),
                first_conn: first,
            };
            if let Ok(admitted) = t.admit(*now, &request, ip(src), ip(0), false) {
                prop_assert_eq!(admitted.new_path, !model.contains_key(&admitted.path));
                prop_assert!(!admitted.evicted.contains(&admitted.path));
                *model.entry(admitted.path).or_insert(0) += 1;
                all_closing(t, &admitted.evicted)?;
            }
        }
        Op::Prove { path } => {
            let Some(id) = nth(t, path) else { return Ok(()) };
            let was = t.path(id).unwrap().state;
            if let Ok(evicted) = t.prove(id) {
                all_closing(t, &evicted)?;
            }
            prop_assert_eq!(t.path(id).unwrap().state, was, "the driver closes it");
        }
        Op::Remember { src } => t.remember(ip(src)),
        Op::Info { path, name } => {
            let Some(id) = nth(t, path) else { return Ok(()) };
            let mut bytes = [0; 272];
            bytes[2] = b'a' + name;
            let up = t.info_req(id, &bytes);
            let want = if up.is_ok() { PathState::Up } else { PathState::Closing };
            all_closing(t, &up.map_or(vec![], |up| up.evicted))?;
            prop_assert_eq!(t.path(id).unwrap().state, want);
        }
        Op::Close { path } => {
            let Some(id) = nth(t, path) else { return Ok(()) };
            let was = t.path(id).unwrap().state;
            prop_assert_eq!(t.begin_close(id), was != PathState::Closing);
        }
        Op::Closed { path } => {
            let closing = nth(t, path).filter(|id| t.path(*id).unwrap().state == PathState::Closing);
            let Some(id) = closing else { return Ok(()) };
            let closed = t.path_closed(id).unwrap();
            prop_assert_eq!(Some(closed.connections), model.remove(&id), "every admitted con is released");
            prop_assert_eq!(closed.session_gone, t.session(closed.session).is_none());
        }
        Op::Wait { ns } => {
            *now += ns;
            let expired: Vec<_> = t.expired(*now).collect();
            for id in expired {
                prop_assert!(t.begin_close(id));
            }
            prop_assert!(t.deadline().is_none_or(|d| d > *now));
        }
    }
    Ok(())
}

/// Paths that had to make room are left to the driver.
fn all_closing(t: &SessionTable, evicted: &[PathId]) -> Result<(), TestCaseError> {
    for id in evicted {
        prop_assert_eq!(t.path(*id).unwrap().state, PathState::Closing);
    }
    Ok(())
}

fn invariants(t: &SessionTable, model: &Model) -> Result<(), TestCaseError> {
    for (what, used, limit) in t.in_use() {
        prop_assert!(used <= limit.total(), "{} {} of {}", used, what, limit.total());
    }
    let up = |p: &PathView<'_>| p.state == PathState::Up;
    prop_assert!(t.paths().filter(up).count() <= LIMITS.max_paths);
    prop_assert_eq!(t.connections(), model.values().map(|&n| usize::from(n)).sum::<usize>());
    prop_assert_eq!(t.paths().count(), model.len());
    for s in t.sessions() {
        prop_assert!(s.paths > 0 && s.paths_up <= s.paths);
    }
    for p in t.paths() {
        prop_assert!(t.session(p.session).is_some());
        prop_assert!(p.connections >= 1 && p.connections <= p.cid_num);
        prop_assert!(p.state != PathState::Up || p.connections == p.cid_num);
        for q in t.paths().filter(|q| q.id != p.id) {
            let same_session = p.session == q.session;
            prop_assert!(!same_session || p.uuid != q.uuid);
            prop_assert!(!same_session || (p.src, p.dst) != (q.src, q.dst));
            prop_assert!(same_session || p.name.is_none() || p.name != q.name, "one client per name");
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn admission_stays_bounded_and_leaks_nothing(ops in prop::collection::vec(op(), 0..120)) {
        let (mut t, mut model, mut now) = (SessionTable::new(LIMITS), Model::new(), 0);
        for op in &ops {
            step(&mut t, &mut model, &mut now, op)?;
            invariants(&t, &model)?;
        }
        let left: Vec<_> = t.paths().map(|p| p.id).collect();
        for id in left {
            t.begin_close(id);
            t.path_closed(id).unwrap();
        }
        prop_assert_eq!((t.connections(), t.sessions().count(), t.paths().count()), (0, 0, 0));
    }
}

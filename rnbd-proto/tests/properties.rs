//! Properties over random input: nothing panics, encoding and decoding are inverse, checked requests are in range.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rnbd_proto::device::DevGeometry;
use rnbd_proto::io::{BadIo, Data, IoOp, IoReq};
use rnbd_proto::open::{AccessMode, AccessTable, SearchPath};
use rnbd_proto::session::{Device, DeviceId, Open, Session};
use rnbd_proto::wire::{Flags, MsgClose, MsgIo, MsgOpen, MsgOpenRsp, MsgSessInfo, Op, Request};
use zerocopy::{FromBytes, IntoBytes};

fn data() -> impl Strategy<Value = Data> {
    prop_oneof![Just(Data::None), any::<u32>().prop_map(Data::In), any::<u32>().prop_map(Data::Out)]
}

fn device() -> impl Strategy<Value = DevGeometry> {
    (0..(1u64 << 55), 9..16u32, any::<(bool, bool, bool)>()).prop_map(
        |(sectors, shift, (ro, discard, erase))| {
            let mut device = DevGeometry::new(sectors, 1 << shift).unwrap();
            device.read_only = ro;
            device.max_discard_sectors = discard.into();
            device.max_write_zeroes_sectors = discard.into();
            device.secure_erase = erase;
            device
        },
    )
}

/// Mostly near one of the edges of the device.
fn io_near_edges() -> impl Strategy<Value = (DevGeometry, MsgIo, Data)> {
    (device(), 0..7u8, any::<u32>(), 0..40u64, 0..20u32, any::<bool>(), data()).prop_map(
        |(device, op, flags, back, blocks, aligned, data)| {
            let block_sectors = u64::from(device.logical_block_size() / 512);
            let shift = if aligned { block_sectors } else { 1 };
            let edge = if flags & 1 == 0 { device.capacity_sectors() } else { 0 };
            let sector = edge.wrapping_sub(back * shift);
            let len = blocks * if aligned || flags & 4 != 0 { device.logical_block_size() } else { 511 };
            let mut msg = MsgIo::request(0, Op::from_wire(op), Flags::empty(), sector, len, 0);
            msg.rw = (flags << 8 | u32::from(op)).into();
            let data = match (op, data) {
                _ if flags & 2 != 0 => data,
                (0, Data::Out(_)) => Data::Out(len),
                (_, Data::In(_)) => Data::In(len),
                (_, other) => other,
            };
            (device, msg, data)
        },
    )
}

proptest! {
    // They are quick, and only one in a hundred random requests passes every check.
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0..8u8) {
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        if bytes.len() > 1 {
            bytes[1] = 0;
        }
        if let Ok(request) = Request::parse(&bytes) {
            prop_assert!(!request.to_string().contains('\n'));
        }
    }

    #[test]
    fn messages_round_trip(
        device_id: u32, rw: u32, sector: u64, len: u32, prio: u16, ver: u8, mode: u8, name in "[^\0]{0,60}",
    ) {
        let io = MsgIo { rw: rw.into(), ..MsgIo::request(device_id, Op::Read, Flags::empty(), sector, len, prio) };
        prop_assert_eq!(Request::parse(io.as_bytes()), Ok(Request::Io(io)));
        prop_assert_eq!(u32::from(io.op().to_wire()) | io.flags().bits(), rw);
        let close = MsgClose::request(device_id);
        prop_assert_eq!(Request::parse(close.as_bytes()), Ok(Request::Close(&close)));
        let info = MsgSessInfo { ver, ..MsgSessInfo::request() };
        prop_assert_eq!(Request::parse(info.as_bytes()), Ok(Request::SessInfo(&info)));
        let open = MsgOpen::request(mode, name.as_bytes()).unwrap();
        prop_assert_eq!(Request::parse(open.as_bytes()), Ok(Request::Open(&open)));
        prop_assert_eq!(open.name(), Some(name.as_bytes()));
    }

    #[test]
    fn any_open_rsp_is_read_without_panic(bytes: [u8; 32], tail: [u8; 24]) {
        let all: Vec<u8> = bytes.into_iter().chain(tail).collect();
        let rsp = MsgOpenRsp::read_from_bytes(&all).unwrap();
        if let Ok(geometry) = DevGeometry::from_open_rsp(&rsp) {
            let again = geometry.open_rsp(rsp.device_id.get());
            prop_assert_eq!(again.nsectors.get(), geometry.capacity_sectors());
        }
    }

    /// Whatever passes may go to the device as it is.
    #[test]
    fn checked_requests_are_in_range((device, msg, data) in io_near_edges()) {
        match IoReq::check(&msg, &device, data) {
            Ok(r) if r.op() == IoOp::Flush => prop_assert_eq!((r.len(), r.offset(), r.fua()), (0, 0, false)),
            Ok(r) => {
                let block = u64::from(device.logical_block_size());
                prop_assert!(!r.is_empty() && u64::from(r.len()) % block == 0 && r.offset() % block == 0);
                let end = r.offset().checked_add(r.len().into()).unwrap();
                prop_assert!(end <= device.capacity_sectors() * 512);
                prop_assert!(!device.read_only || r.op() == IoOp::Read);
                prop_assert!(r.op() != IoOp::Read || data == Data::Out(r.len()));
                prop_assert!(r.op() != IoOp::Write || data == Data::In(r.len()));
            }
            Err(bad) => {
                // The checks refuse nothing without a reason.
                if let BadIo::Range { sector, bi_size, capacity_sectors } = bad {
                    let end = u128::from(sector) + u128::from(bi_size / 512);
                    prop_assert!(end > u128::from(capacity_sectors));
                }
                prop_assert!(!bad.to_string().is_empty());
            }
        }
    }

    #[test]
    fn full_paths_stay_below_the_prefix(search in "(/|[a-z]|\\.|%SESSNAME%){0,12}", name in "(/|[a-z]|\\.){0,12}") {
        let search = SearchPath::new(&search).unwrap();
        if let Ok(path) = search.full_path("s1", &name) {
            let prefix = search.prefix("s1");
            prop_assert!(path.starts_with(&prefix), "{path} {prefix}");
            prop_assert!(!path.contains("//") && !path[prefix.len()..].contains(".."));
        }
    }

    /// Writers over any sequence of opens and closes follow the rule for each mode, and none is forgotten.
    #[test]
    fn writers_follow_the_rules(ops in prop::collection::vec((0..3u8, 0..2u8, any::<bool>()), 0..60)) {
        let mut table = AccessTable::new();
        let mut open: Vec<(u8, AccessMode)> = Vec::new();
        for (mode, device, close) in ops {
            if close {
                if let Some((device, mode)) = open.pop() {
                    table.release(&device, mode);
                }
                continue;
            }
            let mode = AccessMode::from_wire(mode).unwrap();
            if table.acquire(&device, mode).is_ok() {
                open.push((device, mode));
            }
            let writers = |d| open.iter().filter(|(e, m)| *e == d && m.writes()).count();
            prop_assert!(writers(0) <= 2 && writers(1) <= 2);
            prop_assert_eq!(table.writers(&device) as usize, writers(device));
        }
    }

    /// A session against a plain map: same devices, every id unique for as long as it matters.
    #[test]
    fn sessions_behave_like_a_map(ops in prop::collection::vec((any::<bool>(), 0..6u8), 0..200)) {
        let mut session: Session<u8> = Session::new(4);
        let mut model: BTreeMap<u8, DeviceId> = BTreeMap::new();
        let mut gone: Vec<DeviceId> = Vec::new();
        for (open, n) in ops {
            let name = n.to_string();
            let msg = MsgOpen::request(1, name.as_bytes()).unwrap();
            match (open, session.open(&msg)) {
                (true, Ok(Open::Again(id))) => prop_assert_eq!(model.get(&n), Some(&id)),
                (true, Ok(Open::New { name, mode })) => {
                    let id = session.insert(Device { name: name.into(), mode, data: n }).unwrap();
                    prop_assert!(!gone.contains(&id));
                    prop_assert_eq!(model.insert(n, id), None);
                }
                (true, Err(_)) => prop_assert_eq!(model.len(), 4),
                (false, _) => {
                    if let Some(id) = model.remove(&n) {
                        prop_assert_eq!(session.remove(id).map(|d| d.data), Some(n));
                        gone.push(id);
                    }
                }
            }
            prop_assert_eq!(session.count(), model.len());
            prop_assert!(gone.iter().all(|id| session.device(*id).is_none()));
            prop_assert!(model.iter().all(|(n, id)| session.device(*id).is_some_and(|d| d.data == *n)));
        }
    }
}

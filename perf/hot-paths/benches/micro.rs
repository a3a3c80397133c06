//! Wall clock of the parts of which the hot paths consist, 4 KiB requests throughout:
//! `cargo bench -p hot-paths`, less than a minute; `-- icrc` for some of it.
//!
//! Times depend on the machine and on what else it does; `instruction-budget` has the figures that do not.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::mpsc;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use hot_paths::{BATCH, LEN};
use iobuf::Registry;
use nbd_proto::framing::Framing;
use nbd_proto::reply::{ReplyHead, To};
use nbd_proto::request::Export;
use nbd_proto::transmission::Transmission;
use nbd_proto::wire::{REQUEST_MAGIC, RequestHeader, TransmissionFlags, cmd};
use reactor::{IdlePolicy, Reactor};
use rnbd_proto::io::{Data, IoReq};
use rnbd_proto::wire::{Flags, MsgIo, Op};
use roce_proto::icrc::{Flow, FlowCrc, PeerIds};
use roce_proto::{Headers, Opcode, Psn, Reth, packet};
use rtrs_proto::imm::decode_at_server;
use rtrs_proto::request::Request;
use rtrs_proto::wire::{MSG_NEED_INVAL_F, MsgRdmaRead, SgDesc, msg_type};
use rtrs_proto::{Geometry, Imm, ImmLayout};
use vhost_driver::{Buf, DriverRing, Ram};
use vhost_poll::memory::{GuestMemory, RegionSpec};
use vhost_poll::ring::packed::PackedRing;
use vhost_poll::ring::split::SplitRing;
use vhost_poll::ring::{Chain, RingConfig};
use zerocopy::IntoBytes;

fn main() {
    divan::main();
}

mod rtrs {
    use super::*;

    #[divan::bench]
    fn imm_encode(bencher: Bencher<'_, '_>) {
        let layout = ImmLayout::new(512);
        bencher.bench_local(|| black_box(layout).encode(black_box(Imm::IoReq { id: 5, off: 4128 })));
    }

    #[divan::bench]
    fn imm_decode(bencher: Bencher<'_, '_>) {
        let geometry = Geometry::default();
        let imm = geometry.imm_layout().io_req(5, 4128);
        bencher.bench_local(|| decode_at_server(black_box(&geometry), black_box(imm)));
    }

    #[divan::bench]
    fn request_decode(bencher: Bencher<'_, '_>) {
        let head = MsgRdmaRead {
            msg_type: msg_type::READ.into(),
            usr_len: 32.into(),
            flags: MSG_NEED_INVAL_F.into(),
            sg_cnt: 1.into(),
        };
        let mut copy = [0; 24];
        copy[..8].copy_from_slice(head.as_bytes());
        copy[8..].copy_from_slice(SgDesc::new(0x1000, 0x77, LEN as u32).as_bytes());
        let geometry = Geometry::default();
        let decode = || Request::decode(black_box(&geometry), 5, 0x1020, black_box(&copy));
        assert!(decode().is_ok());
        bencher.bench_local(decode);
    }
}

mod rnbd {
    use super::*;

    #[divan::bench]
    fn io_check(bencher: Bencher<'_, '_>) {
        let device = rnbd_proto::device::DevGeometry::new(1 << 20, 512).expect("valid");
        let msg = MsgIo::request(1, Op::Read, Flags::SYNC, 8, LEN as u32, 0);
        let check = || IoReq::check(black_box(&msg), black_box(&device), Data::Out(LEN as u32));
        assert!(check().is_ok());
        bencher.bench_local(check);
    }
}

mod nbd {
    use super::*;

    const EXPORT: Export = Export {
        size: 1 << 30,
        block_size: 512,
        any_range: false,
        max_payload: 1 << 25,
        flags: TransmissionFlags(1),
    };

    #[divan::bench]
    fn request_header(bencher: Bencher<'_, '_>) {
        let head = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: 0.into(),
            command: cmd::READ.into(),
            cookie: 7.into(),
            offset: 8192.into(),
            length: (LEN as u32).into(),
        };
        let mut machine = Transmission::new(EXPORT);
        let mut take = || machine.header(black_box(head.as_bytes()));
        assert!(matches!(take(), Ok(Some(_))));
        bencher.bench_local(take);
    }

    #[divan::bench(args = ["simple", "structured", "extended"])]
    fn reply_head(bencher: Bencher<'_, '_>, framing: &str) {
        let framing = match framing {
            "simple" => Framing::Simple,
            "structured" => Framing::Structured,
            _ => Framing::Extended,
        };
        let to = To { cookie: 7, offset: 8192 };
        bencher.bench_local(|| ReplyHead::data(black_box(framing), black_box(to), LEN as u32));
    }
}

mod roce {
    use super::*;

    fn flow() -> FlowCrc {
        FlowCrc::new(Flow { src: [192, 0, 2, 1].into(), src_port: 50_000, dst: [192, 0, 2, 2].into() })
    }

    fn headers() -> Headers {
        Headers {
            opcode: Opcode::WriteOnlyImm,
            solicited: false,
            ack_req: true,
            dest_qpn: 0x123,
            psn: Psn::new(77),
            reth: Reth { va: 0x7000_0000_1000, rkey: 0x1234_5678, len: LEN as u32 },
            aeth: Default::default(),
            imm: 42,
            inv_rkey: 0,
        }
    }

    /// A whole packet, as its IPv4 identification were `id`.
    fn built(id: u16) -> Vec<u8> {
        let mut head = [0; Headers::MAX_LEN];
        let head_len = headers().encode(0, &mut head);
        let mut udp = head[..head_len].to_vec();
        udp.resize(head_len + LEN, 0x5a);
        let mut digest = flow().begin(udp.len() + 4, id, &udp[..head_len]);
        digest.update(&udp[head_len..]);
        udp.extend(digest.finish());
        udp
    }

    #[divan::bench]
    fn headers_encode(bencher: Bencher<'_, '_>) {
        let headers = headers();
        let mut out = [0; Headers::MAX_LEN];
        bencher.bench_local(|| black_box(&headers).encode(0, black_box(&mut out)));
    }

    #[divan::bench]
    fn packet_parse(bencher: Bencher<'_, '_>) {
        let packet = built(0);
        assert!(packet::parse(&packet).is_ok());
        bencher.bench_local(|| packet::parse(black_box(&packet)).is_ok());
    }

    #[divan::bench]
    fn icrc_of_a_packet(bencher: Bencher<'_, '_>) {
        let (flow, packet) = (flow(), built(0));
        bencher.counter(BytesCount::new(LEN)).bench_local(|| {
            let mut digest = black_box(&flow).begin(packet.len(), 3, &packet[..32]);
            digest.update(black_box(&packet[32..]));
            digest.finish()
        });
    }

    /// Of our own kind of peer, and of one whose identification has to be found.
    #[divan::bench(args = ["own", "foreign"])]
    fn icrc_verify(bencher: Bencher<'_, '_>, peer: &str) {
        let (flow, packet) = (flow(), built(if peer == "own" { 3 } else { 0xabcd }));
        let ids = if peer == "own" { PeerIds::Own { index_in_run: 3 } } else { PeerIds::Foreign };
        assert!(flow.verify(&packet, ids));
        bencher
            .counter(BytesCount::new(LEN))
            .bench_local(|| black_box(&flow).verify(black_box(&packet), ids));
    }
}

mod mailbox {
    use super::*;

    /// Messages to a reactor that polls, until the last of [`BATCH`] has run.
    #[divan::bench]
    fn batch(bencher: Bencher<'_, '_>) {
        let (tx, rx) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let reactor = Reactor::new("bench", None, IdlePolicy::Poll).expect("descriptors");
            tx.send(reactor.handle()).expect("somebody waits");
            reactor.run();
        });
        let handle = rx.recv().expect("it starts");
        let (tx, rx) = mpsc::channel();
        bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
            (1..BATCH).for_each(|n| {
                handle.send(move |_| {
                    black_box(n);
                })
            });
            let tx = tx.clone();
            handle.send(move |_| tx.send(()).expect("somebody waits"));
            rx.recv().expect("it runs");
        });
        handle.stop();
        thread.join().expect("no panic");
    }
}

mod bdev {
    use super::*;

    #[divan::bench(args = ["bdev-null-read", "bdev-null-write", "bdev-malloc-read", "bdev-malloc-write"])]
    fn batch(bencher: Bencher<'_, '_>, name: &str) {
        let path = hot_paths::all().into_iter().find(|p| p.name == name).expect("a hot path");
        bencher.counter(ItemsCount::new(BATCH)).bench_local(path.set_up());
    }
}

mod vhost {
    use super::*;

    const SIZE: u16 = 128;

    /// A driver's ring of three buffers per request, and where a device finds it.
    fn guest(packed: bool) -> (DriverRing, RingConfig, Arc<GuestMemory>, [Buf; 3]) {
        let mut ram = Ram::new(1 << 20);
        let ring = DriverRing::new(&mut ram, SIZE, packed, true);
        let spec = RegionSpec {
            guest_addr: ram.guest_base(),
            size: ram.len() as u64,
            user_addr: ram.user(ram.guest_base()),
            mmap_offset: 0,
        };
        let table = [(spec, ram.fd())];
        let memory = GuestMemory::map(&Registry::new(), &GuestMemory::default(), &table).expect("memory");
        let config = RingConfig {
            size: SIZE.into(),
            desc: ram.user(ring.addrs.desc),
            avail: ram.user(ring.addrs.avail),
            used: ram.user(ring.addrs.used),
            packed,
            event_idx: true,
            indirect: false,
        };
        let bufs = [(16, false), (LEN as u32, true), (1, true)].map(|(len, write)| Buf {
            addr: ram.alloc(len as usize, 64),
            len,
            write,
        });
        // The driver's pointers are into its own mapping.
        std::mem::forget(ram);
        (ring, config, Arc::new(memory), bufs)
    }

    #[divan::bench]
    fn split_batch(bencher: Bencher<'_, '_>) {
        let (mut driver, config, memory, bufs) = guest(false);
        let (mut ring, mut chain) = (SplitRing::new(config, memory, 0).expect("a ring"), Chain::new());
        bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
            (0..BATCH).for_each(|_| assert!(driver.add(&bufs, false).is_some()));
            driver.publish();
            while let Some(head) = ring.take().expect("a good ring") {
                ring.read(head, &mut chain).expect("a good chain");
                ring.push_used(head, 1);
            }
            ring.publish();
            while driver.pop().is_some() {}
        });
    }

    #[divan::bench]
    fn packed_batch(bencher: Bencher<'_, '_>) {
        let (mut driver, config, memory, bufs) = guest(true);
        let mut ring = PackedRing::new(config, memory, 0x8000_8000).expect("a ring");
        let mut chain = Chain::new();
        bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
            (0..BATCH).for_each(|_| assert!(driver.add(&bufs, false).is_some()));
            driver.publish();
            while let Some(taken) = ring.take(&mut chain).expect("a good ring") {
                ring.push_used(taken, 1);
            }
            ring.publish();
            while driver.pop().is_some() {}
        });
    }
}

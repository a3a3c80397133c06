//! Packets that no honest peer sends: each is counted under its reason, nothing comes of it, and what must not be
//! answered is not.

#[path = "../../verbs/tests/common/mod.rs"]
mod common;
mod raw;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use common::{Setup, until};
use iobuf::Region;
use raw::RawPeer;
use roce_proto::{Aeth, Headers, Opcode};
use soft_roce::{Options, SoftRoce};
use test_support::patience;
use verbs::*;

/// Longer than an answer takes, which would come at the end of a turn.
const SILENCE: Duration = Duration::from_millis(30);

/// The honest side.
struct Victim {
    peer: RawPeer,
    cq: Box<dyn Cq>,
    mr: Mr,
    device: std::sync::Arc<dyn Device>,
    stranger: IpAddr,
    // After what belongs to it.
    _qp: Box<dyn Qp>,
    _cm: Box<dyn Cm>,
}

impl Victim {
    /// With a peer on an address beside it.
    fn new() -> Self {
        let network = test_support::network();
        let ip = |last: u8| IpAddr::from(test_support::address(network, last));
        let addr = SocketAddr::new(ip(1), 7000);
        let options = Options { progress_thread: true, ..Options::default() };
        let mut cm = SoftRoce::new(options).unwrap().cm().unwrap();
        cm.listen(addr, 8).unwrap();
        let mut parts = None;
        let peer = RawPeer::connect(ip(2), addr, || {
            if let Some(CmEvent::ConnectRequest { id, .. }) = cm.poll().unwrap() {
                let setup = Setup::new(7000);
                let device = cm.device(id).unwrap();
                let mr = device.clone().register(Region::new(65536).unwrap(), common::ALL).unwrap();
                let cq = device.clone().create_cq(64).unwrap();
                let mut qp = cm.create_qp(id, &setup.caps, &cq.handle()).unwrap();
                for wr_id in 0..4 {
                    let sges = SgeList::one(mr.sge(wr_id as usize * 4096, 4096).unwrap());
                    qp.post_recv(&[RecvWr { wr_id, sges }]).unwrap();
                }
                cm.accept(id, setup.params, b"").unwrap();
                parts = Some((qp, cq, mr, device));
            }
        });
        let (qp, cq, mr, device) = parts.unwrap();
        Self { peer, cq, mr, device, stranger: ip(9), _qp: qp, _cm: cm }
    }

    fn count(&self, name: &str) -> u64 {
        let mut found = None;
        self.device.counters(&mut |n, value| {
            if n == name {
                found = Some(value);
            }
        });
        found.expect("a counter of that name")
    }

    fn wait_for(&self, counter: &str, value: u64) {
        until(counter, || (self.count(counter) >= value).then_some(()));
        assert_eq!(self.count(counter), value, "{counter}");
    }

    /// `send` must be counted under `counter`, without answer and without completion.
    fn dropped(&mut self, counter: &str, send: impl FnOnce(&RawPeer)) {
        let before = self.count(counter);
        send(&self.peer);
        self.wait_for(counter, before + 1);
        assert_eq!(self.peer.answer(SILENCE), None, "{counter}");
        assert_eq!(self.cq.poll(&mut [Wc::default()]).unwrap(), 0, "{counter}");
    }

    /// The connection is as it was: the next SEND arrives.
    fn works(&mut self) {
        let headers = self.peer.send_only(0);
        self.peer.transmit(&self.peer.sealed(self.peer.packet(&headers, b"still here")));
        let wc = until("the receive", || {
            let mut out = [Wc::default()];
            (self.cq.poll(&mut out).unwrap() == 1).then_some(out[0])
        });
        assert_eq!((wc.status, wc.byte_len), (WcStatus::Success, 10));
        let ack = self.peer.answer(patience()).expect("an acknowledgement");
        assert_eq!((ack.opcode, ack.psn, ack.aeth.syndrome), (Opcode::Acknowledge, headers.psn, 0x1f));
    }

    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.mr.region().len()];
        assert!(self.mr.region().copy_out(0, &mut bytes));
        bytes
    }
}

#[test]
fn what_fails_a_check_is_counted_and_not_answered() {
    let mut v = Victim::new();
    let send = |p: &RawPeer| p.packet(&p.send_only(0), b"forged");
    v.dropped("rx_drop_short", |p| p.transmit(&p.sealed(send(p))[..11]));
    v.dropped("rx_drop_short", |p| p.transmit(&[4]));
    v.dropped("rx_drop_icrc", |p| {
        let mut packet = p.sealed(send(p));
        packet[13] ^= 1;
        p.transmit(&packet);
    });
    v.dropped("rx_drop_version", |p| {
        let mut packet = send(p);
        packet[1] |= 1;
        p.transmit(&p.sealed(packet));
    });
    v.dropped("rx_drop_pkey", |p| {
        let mut packet = send(p);
        packet[3] = 0x34;
        p.transmit(&p.sealed(packet));
    });
    v.dropped("rx_drop_opcode", |p| {
        let mut packet = send(p);
        packet[0] = 0x81;
        p.transmit(&p.sealed(packet));
    });
    v.dropped("rx_drop_qpn", |p| {
        let headers = Headers { dest_qpn: p.attrs.dest_qpn ^ 0x10_0000, ..p.send_only(0) };
        p.transmit(&p.sealed(p.packet(&headers, b"forged")));
    });
    // A slot without engine.
    v.dropped("rx_drop_qpn", |p| {
        let headers = Headers { dest_qpn: p.attrs.dest_qpn ^ 0x40, ..p.send_only(0) };
        p.transmit(&p.sealed(p.packet(&headers, b"forged")));
    });
    v.works();
}

#[test]
fn packets_of_strangers_are_not_the_peers() {
    let mut v = Victim::new();
    let stranger = raw::socket(v.stranger);
    let ip = v.stranger;
    v.dropped("rx_drop_source", |p| {
        let packet = raw::sealed(ip, p.attrs.peer, p.packet(&p.send_only(0), b"forged"));
        stranger.send_to(&packet, (p.attrs.peer, 4791)).unwrap();
    });
    let mut buffer = [0; 64];
    assert!(stranger.recv_from(&mut buffer).is_err(), "no reflection");
    v.works();
}

#[test]
fn responses_to_nothing_are_dropped() {
    let mut v = Victim::new();
    for (syndrome, psn) in [(0x1f, 0), (0x60, 5), (0x62, -1)] {
        v.dropped("rx_drop_stale_response", |p| {
            let aeth = Aeth { syndrome, msn: 1 };
            let headers = Headers { opcode: Opcode::Acknowledge, ack_req: false, aeth, ..p.send_only(psn) };
            p.transmit(&p.sealed(p.packet(&headers, b"")));
        });
    }
    v.works();
}

#[test]
fn sequence_numbers_out_of_order_execute_nothing() {
    let mut v = Victim::new();
    // Ahead: one complaint for all of them.
    for ahead in [3, 4, 5] {
        v.peer.transmit(&v.peer.sealed(v.peer.packet(&v.peer.send_only(ahead), b"new")));
    }
    let nak = v.peer.answer(patience()).unwrap();
    assert_eq!((nak.aeth.syndrome, nak.psn), (0x60, v.peer.attrs.send_psn));
    v.wait_for("rx_out_of_order", 3);
    assert_eq!(v.peer.answer(SILENCE), None);
    v.works();
    // Long past: acknowledged once more.
    v.peer.transmit(&v.peer.sealed(v.peer.packet(&v.peer.send_only(0), b"old")));
    v.wait_for("rx_duplicate", 1);
    assert_eq!(v.peer.answer(patience()).unwrap().aeth.syndrome, 0x1f);
    assert_eq!(v.cq.poll(&mut [Wc::default()]).unwrap(), 0);
}

#[test]
fn garbage_on_queue_pair_1_is_counted() {
    let mut v = Victim::new();
    let mad = |bytes: [u8; 256]| {
        let mut packet = [0; 276];
        roce_proto::packet::encode_mad(1, &bytes, &mut packet);
        packet.to_vec()
    };
    v.dropped("cm_drop_malformed", |p| p.transmit(&p.sealed(mad([0x5a; 256]))));
    v.dropped("rx_drop_icrc", |p| {
        let mut packet = p.sealed(mad([0; 256]));
        packet[100] ^= 4;
        p.transmit(&packet);
    });
    v.dropped("cm_drop_malformed", |p| {
        let mut packet = mad([1; 256]);
        packet[15] ^= 1;
        p.transmit(&p.sealed(packet));
    });
    v.works();
}

/// A WRITE that must be refused with a remote access error, touch nothing, and break the connection.
fn refused(forge: impl FnOnce(&RawPeer, &Mr) -> Headers) {
    let mut v = Victim::new();
    let headers = forge(&v.peer, &v.mr);
    v.peer.transmit(&v.peer.sealed(v.peer.packet(&headers, &[0xee; 64])));
    let nak = v.peer.answer(patience()).expect("a NAK");
    assert_eq!((nak.opcode, nak.aeth.syndrome, nak.psn), (Opcode::Acknowledge, 0x62, headers.psn));
    v.wait_for("rx_nak_access", 1);
    assert!(v.memory().iter().all(|b| *b == 0));
    for _ in 0..4 {
        let wc = until("a flushed receive", || {
            let mut out = [Wc::default()];
            (v.cq.poll(&mut out).unwrap() == 1).then_some(out[0])
        });
        assert_eq!(wc.status, WcStatus::Flushed);
    }
    v.dropped("rx_drop_state", |p| p.transmit(&p.sealed(p.packet(&p.send_only(1), b"after"))));
}

#[test]
fn a_wrong_key_opens_nothing() {
    refused(|p, mr| p.write_only(mr.region().as_ptr() as u64, mr.rkey() ^ 1, 64));
    refused(|p, mr| p.write_only(mr.region().as_ptr() as u64, 0, 64));
}

#[test]
fn bounds_hold_even_where_sums_wrap() {
    refused(|p, mr| p.write_only(mr.region().as_ptr() as u64 + 65536 - 63, mr.rkey(), 64));
    refused(|p, mr| p.write_only(u64::MAX - 10, mr.rkey(), 64));
}

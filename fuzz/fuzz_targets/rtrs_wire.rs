//! Every RTRS parser of both sides over the same bytes. The first eight choose the geometry and the immediate.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rtrs_proto::client::{self, ClientImm, Rbufs, ServerParams};
use rtrs_proto::handshake::{self, ConnectRequest};
use rtrs_proto::imm::{ServerImm, decode_at_server};
use rtrs_proto::request::{Action, Direction, HDR_COPY_LEN, Request};
use rtrs_proto::response::{self, Keys, Last, Policy, ReadStyle};
use rtrs_proto::wire::{
    ConnReq, ConnRsp, InfoReq, InfoRspHdr, MsgRdmaRead, MsgRdmaWrite, MsgRkeyRsp, SgDesc,
};
use rtrs_proto::{Errno, Geometry};
use zerocopy::{FromBytes, IntoBytes};

fuzz_target!(|input: &[u8]| {
    let Some((head, bytes)) = input.split_first_chunk::<8>() else { return };
    let imm = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    handshake_messages(bytes);
    show::<ConnReq>(bytes);
    show::<ConnRsp>(bytes);
    show::<InfoReq>(bytes);
    show::<InfoRspHdr>(bytes);
    show::<SgDesc>(bytes);
    show::<MsgRdmaRead>(bytes);
    show::<MsgRdmaWrite>(bytes);
    show::<MsgRkeyRsp>(bytes);
    let sizes =
        (u16::from_le_bytes([head[0], head[1]]), u32::from(head[2]) << 12, 288 + (u32::from(head[3]) << 6));
    if let Ok(geometry) = Geometry::new(sizes.0, sizes.1, sizes.2) {
        info_rsp(&geometry, bytes);
        request(&geometry, imm, bytes);
        at_client(&geometry, imm, bytes);
    }
});

/// One line, whatever is in it.
fn show<T: FromBytes + std::fmt::Display>(bytes: &[u8]) {
    if let Ok((msg, _)) = T::read_from_prefix(bytes) {
        assert!(!msg.to_string().contains('\n'));
    }
}

fn handshake_messages(bytes: &[u8]) {
    if let Ok(request) = ConnectRequest::parse(bytes) {
        assert!(request.cid < request.cid_num);
        assert_eq!(ConnectRequest::parse(request.to_wire().as_bytes()), Ok(request));
    }
    if let Ok(params) = ServerParams::parse(bytes) {
        let again = handshake::accept(&params.geometry, params.rotating_keys);
        assert_eq!(ServerParams::parse(again.as_bytes()), Ok(params));
    }
    client::parse_reject(bytes);
    if let Ok(name) = handshake::parse_info_req(bytes) {
        let again = client::info_req(name).expect("both sides have the same rules");
        assert_eq!(handshake::parse_info_req(again.as_bytes()), Ok(name));
    }
}

fn info_rsp(geometry: &Geometry, bytes: &[u8]) {
    if let Ok(rbufs) = Rbufs::parse(geometry, bytes) {
        assert_eq!(rbufs.count(), usize::from(geometry.queue_depth()));
    }
}

fn request(geometry: &Geometry, imm: u32, bytes: &[u8]) {
    let Ok(ServerImm::Request { id, off }) = decode_at_server(geometry, imm) else { return };
    let avail = Request::hdr_copy_len(geometry, off);
    assert!(id < geometry.queue_depth() && off as usize + avail <= geometry.chunk_size() as usize);
    let mut copy = [0; HDR_COPY_LEN];
    let n = avail.min(bytes.len());
    copy[..n].copy_from_slice(&bytes[..n]);
    let decoded = Request::decode(geometry, id, off, &copy);
    if let Ok(r) = decoded {
        assert_eq!(r.usr_off() + u32::from(r.usr_len), off);
        if let Direction::Read { desc: Some(desc), .. } = r.direction {
            assert!((1..=r.data_len).contains(&desc.len.get()));
        }
        assert!(!r.to_string().contains('\n'));
    }
    for keys in [Keys::Static, Keys::Rotating] {
        for reads in [ReadStyle::OneMessage, ReadStyle::Invalidate] {
            let policy = Policy { keys, reads };
            let reply = match &decoded {
                Ok(r) => response::plan(policy, r, if imm & 1 == 0 { Ok(()) } else { Err(Errno::EIO) }),
                Err(refused) => match refused.action() {
                    Action::Answer(errno) => response::plan_refusal(policy, id, refused, errno),
                    Action::ClosePath => return,
                },
            };
            let ClientImm::Response { id: got, inval, .. } = client::decode(geometry, reply.imm) else {
                panic!("no response: {reply:?}")
            };
            assert_eq!((got, inval), (id, reply.inval.is_some()));
            assert_eq!(keys == Keys::Rotating, reply.last == Last::SendRkeyImm);
        }
    }
}

fn at_client(geometry: &Geometry, imm: u32, bytes: &[u8]) {
    if let ClientImm::Response { id, .. } = client::decode(geometry, imm) {
        assert!(id < geometry.queue_depth());
        let _ = client::parse_rkey_rsp(bytes, id);
    }
}

use super::*;
use crate::handshake;
use crate::request::{Direction, HDR_COPY_LEN, Request};
use crate::response::Reply;

fn geometry() -> Geometry {
    Geometry::default()
}

#[test]
fn accept_round_trips() {
    for rotating_keys in [false, true] {
        let rsp = handshake::accept(&geometry(), rotating_keys);
        let mut padded = rsp.as_bytes().to_vec();
        padded.resize(196, 0xee);
        assert_eq!(ServerParams::parse(&padded), Ok(ServerParams { geometry: geometry(), rotating_keys }));
    }
}

#[test]
fn bad_accepts() {
    let rsp = handshake::accept(&geometry(), false);
    assert_eq!(check_accept(&rsp.as_bytes()[..55]), Err(BadAccept::Short(55)));
    let bad = ConnRsp { magic: 1.into(), ..rsp };
    assert_eq!(check_accept(bad.as_bytes()), Err(BadAccept::Magic(1)));
    let bad = ConnRsp { version: 0x100.into(), ..rsp };
    assert_eq!(check_accept(bad.as_bytes()), Err(BadAccept::Version(0x100)));
    let bad = ConnRsp { errno: (-5).into(), ..rsp };
    assert_eq!(check_accept(bad.as_bytes()), Err(BadAccept::Errno(-5)));
    let bad = ConnRsp { queue_depth: 0.into(), ..rsp };
    assert!(matches!(ServerParams::parse(bad.as_bytes()), Err(BadAccept::Geometry(_))));
    assert!(check_accept(bad.as_bytes()).is_ok(), "sizes are read from cid 0 only");
}

#[test]
fn rejects() {
    let rsp = handshake::reject(Errno::EEXIST);
    assert_eq!(parse_reject(rsp.as_bytes()), Errno::EEXIST);
    let with = |errno: i16| parse_reject(ConnRsp { errno: errno.into(), ..rsp }.as_bytes());
    assert_eq!((with(17), with(0)), (Errno::ECONNABORTED, Errno::ECONNRESET));
    assert_eq!(parse_reject(&[0; 55]), Errno::ECONNRESET);
}

#[test]
fn info_req_is_what_the_server_reads() {
    let msg = info_req("s1").unwrap();
    assert_eq!(handshake::parse_info_req(msg.as_bytes()), Ok("s1"));
    for bad in ["", "a/b", "a.b", "a\0b", &"x".repeat(255)] {
        assert_eq!(info_req(bad), None, "{bad}");
    }
}

fn info_rsp(descs: &[SgDesc]) -> Vec<u8> {
    handshake::info_rsp(descs).unwrap()
}

#[test]
fn one_region_is_cut_into_chunks() {
    let rbufs = Rbufs::parse(&geometry(), &info_rsp(&[SgDesc::new(0x1000, 9, 64 << 20)])).unwrap();
    assert_eq!(rbufs.count(), 512);
    assert_eq!(rbufs.rbuf(0), Some(Rbuf { addr: 0x1000, rkey: 9 }));
    assert_eq!(rbufs.rbuf(511), Some(Rbuf { addr: 0x1000 + 511 * 131_072, rkey: 9 }));
    assert_eq!(rbufs.rbuf(512), None);
}

#[test]
fn one_region_per_chunk_and_new_keys() {
    let descs: Vec<_> = (0..512).map(|i| SgDesc::new(u64::from(i) << 20, i, 131_072)).collect();
    let mut rbufs = Rbufs::parse(&geometry(), &info_rsp(&descs)).unwrap();
    rbufs.set_rkey(3, 0x103);
    rbufs.set_rkey(512, 1);
    assert_eq!(rbufs.rbuf(3), Some(Rbuf { addr: 3 << 20, rkey: 0x103 }));
    assert_eq!(rbufs.rbuf(4), Some(Rbuf { addr: 4 << 20, rkey: 4 }));
}

#[test]
fn bad_info_rsps() {
    let g = geometry();
    let all = SgDesc::new(0, 1, 64 << 20);
    let parse = |descs: &[SgDesc]| Rbufs::parse(&g, &info_rsp(descs)).unwrap_err();
    assert_eq!(parse(&[all; 3]), BadInfoRsp::SgCnt { sg_cnt: 3, queue_depth: 512 });
    assert_eq!(parse(&[all, all]), BadInfoRsp::Chunks { got: 1024, queue_depth: 512 });
    let short = SgDesc::new(0, 1, (64 << 20) - 1);
    assert!(matches!(parse(&[short]), BadInfoRsp::DescLen { index: 0, .. }));
    assert!(matches!(parse(&[SgDesc::new(0, 1, 0)]), BadInfoRsp::DescLen { len: 0, .. }));
    assert_eq!(parse(&[SgDesc::new(u64::MAX, 1, 64 << 20)]), BadInfoRsp::Wraps { index: 0 });
    let bytes = info_rsp(&[all]);
    assert_eq!(Rbufs::parse(&g, &bytes[..23]), Err(BadInfoRsp::Short { got: 23, least: 24 }));
    assert_eq!(Rbufs::parse(&g, &bytes[..7]), Err(BadInfoRsp::Short { got: 7, least: 8 }));
    assert_eq!(Rbufs::parse(&g, &[0; 24]), Err(BadInfoRsp::Type(0)));
}

/// Reads the request back as a server would, from a chunk that holds it.
fn at_server(g: &Geometry, id: u16, post: Post, data_len: u32, out: &[u8]) -> (Request, Vec<u8>) {
    let mut chunk = vec![0xee; g.chunk_size() as usize];
    let start = data_len as usize;
    chunk[start..start + post.hdr_len].copy_from_slice(&out[..post.hdr_len]);
    let Ok(crate::imm::ServerImm::Request { id: got, off }) = crate::imm::decode_at_server(g, post.imm)
    else {
        panic!("no request: {:#x}", post.imm)
    };
    assert_eq!(got, id);
    let n = Request::hdr_copy_len(g, off);
    let mut copy = [0; HDR_COPY_LEN];
    copy[..n].copy_from_slice(&chunk[off as usize..off as usize + n]);
    let request = Request::decode(g, id, off, &copy).unwrap();
    let usr = &chunk[request.usr_off() as usize..][..request.usr_len.into()];
    (request, usr.to_vec())
}

#[test]
fn a_read_reaches_the_server() {
    let (g, mut out) = (geometry(), [0; 64]);
    let desc = SgDesc::new(0x7000, 5, 4096);
    let post = encode_read(&g, 1, &[7; 32], 4096, Some(desc), true, &mut out).unwrap();
    assert_eq!(post, Post { chunk_off: 4096, hdr_len: 56, imm: 0x0008_1020 });
    let (request, usr) = at_server(&g, 1, post, 4096, &out);
    assert_eq!(request.direction, Direction::Read { desc: Some(desc), need_inval: true });
    assert_eq!((request.data_len, &usr[..]), (4096, &[7; 32][..]));
}

#[test]
fn a_flush_reaches_the_server() {
    let (g, mut out) = (geometry(), [0; 40]);
    let post = encode_read(&g, 0, &[7; 32], 0, None, true, &mut out).unwrap();
    assert_eq!(post, Post { chunk_off: 0, hdr_len: 40, imm: 0x20 });
    let (request, _) = at_server(&g, 0, post, 0, &out);
    assert_eq!(request.direction, Direction::Read { desc: None, need_inval: false });
}

#[test]
fn a_write_reaches_the_server() {
    let (g, mut out) = (geometry(), [0; 36]);
    let post = encode_write(&g, 511, &[7; 32], 126_976, &mut out).unwrap();
    assert_eq!((post.chunk_off, post.hdr_len), (0, 36));
    let (request, usr) = at_server(&g, 511, post, 126_976, &out);
    assert_eq!((request.direction, request.data_len, usr), (Direction::Write, 126_976, vec![7; 32]));
}

#[test]
fn requests_that_do_not_fit() {
    let (g, mut out) = (geometry(), [0; 8192]);
    assert!(encode_write(&g, 0, &[0; 4092], 126_976, &mut out).is_ok());
    let header = TooLong::Header { got: 4097, most: 4096 };
    assert_eq!(encode_write(&g, 0, &[0; 4093], 0, &mut out), Err(header));
    let chunk = TooLong::Chunk { got: 131_073, chunk_size: 131_072 };
    assert_eq!(encode_write(&g, 0, &[0; 4092], 126_977, &mut out), Err(chunk));
    assert!(encode_write(&g, 0, &[0; 32], u32::MAX, &mut out).is_err());
    assert_eq!(encode_write(&g, 0, &[0; 32], 0, &mut [0; 35]), Err(TooLong::Header { got: 36, most: 35 }));
    assert_eq!(encode_write(&g, 512, &[], 0, &mut out), Err(TooLong::Id { id: 512, queue_depth: 512 }));
}

#[test]
fn responses() {
    let g = geometry();
    let ok = ClientImm::Response { id: 1, result: Ok(()), inval: true };
    assert_eq!(decode(&g, 0x2000_0001), ok);
    let eperm = ClientImm::Response { id: 0, result: Err(Errno::EPERM), inval: false };
    assert_eq!(decode(&g, 0x1008_0000), eperm);
    assert!(matches!(decode(&g, 0x1000_0200), ClientImm::Ignore(Imm::IoRsp { id: 512, .. })));
    assert!(matches!(decode(&g, 0x0000_0020), ClientImm::Ignore(Imm::IoReq { .. })));
    assert_eq!(decode(&g, 0x8000_0000), ClientImm::HbMsg);
    assert_eq!(decode(&g, 0x9000_0000), ClientImm::HbAck);
}

#[test]
fn rkey_messages() {
    let msg = Reply::rkey_rsp(5, 0x4ca);
    assert_eq!(parse_rkey_rsp(msg.as_bytes(), 5), Ok(0x4ca));
    assert_eq!(parse_rkey_rsp(msg.as_bytes(), 6), Err(BadRkeyRsp::Id { got: 5, want: 6 }));
    assert_eq!(parse_rkey_rsp(&msg.as_bytes()[..7], 5), Err(BadRkeyRsp::Short(7)));
    assert_eq!(parse_rkey_rsp(&[0; 8], 0), Err(BadRkeyRsp::Type(0)));
}

//! RNBD messages as a server takes them: the first 16 bytes make the device and the data, the rest is the message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rnbd_proto::device::DevGeometry;
use rnbd_proto::io::{Data, IoOp, IoReq};
use rnbd_proto::open::SearchPath;
use rnbd_proto::session::{Device, DeviceId, Open, Session};
use rnbd_proto::wire::{MsgIo, MsgOpen, MsgOpenRsp, Request};
use zerocopy::FromBytes;

fuzz_target!(|input: &[u8]| {
    let Some((head, bytes)) = input.split_first_chunk::<16>() else { return };
    if let Ok((rsp, _)) = MsgOpenRsp::read_from_prefix(bytes) {
        let _ = DevGeometry::from_open_rsp(&rsp);
        assert!(!rsp.to_string().contains('\n'));
    }
    let Ok(request) = Request::parse(bytes) else { return };
    assert!(!request.to_string().contains('\n'));
    match request {
        Request::SessInfo(msg) => assert!(Session::<()>::new(1).sess_info(msg).ver <= 2),
        Request::Open(msg) => open(head[0], msg),
        Request::Io(msg) => io(head, &msg),
        Request::Close(msg) => {
            assert!(Session::<()>::new(1).remove(DeviceId::from_wire(msg.device_id.get())).is_none());
        }
    }
});

fn open(search: u8, msg: &MsgOpen) {
    let mut session: Session<()> = Session::new(1);
    let Ok(Open::New { name, mode }) = session.open(msg) else { return };
    let search = ["/", "", "/srv/%SESSNAME%/x", "//srv//"][usize::from(search & 3)];
    let search = SearchPath::new(search).expect("short");
    if let Ok(path) = search.full_path("s1", name) {
        let prefix = search.prefix("s1");
        assert!(
            path.starts_with(&prefix) && !path.contains("//") && !path.contains("..") && path.len() < 4096
        );
    }
    let id = session.insert(Device { name: name.into(), mode, data: () }).expect("empty");
    assert_eq!(session.open(msg), Ok(Open::Again(id)));
}

fn io(head: &[u8; 16], msg: &MsgIo) {
    let [flags, shift, kind, _, len @ .., c0, c1, c2, c3, c4, c5, c6, c7] = *head;
    let capacity = u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
    let Ok(mut device) = DevGeometry::new(capacity, 512 << (shift & 7)) else { return };
    device.read_only = flags & 1 != 0;
    device.max_discard_sectors = u32::from(flags & 2);
    device.max_write_zeroes_sectors = u32::from(flags & 4);
    device.secure_erase = flags & 8 != 0;
    let len = u32::from_le_bytes(len);
    let data = match kind & 3 {
        0 => Data::None,
        1 => Data::In(len),
        2 => Data::Out(len),
        _ => Data::Out(msg.bi_size.get()),
    };
    match IoReq::check(msg, &device, data) {
        Ok(r) if r.op() == IoOp::Flush => assert!(r.is_empty() && r.offset() == 0),
        Ok(r) => {
            let block = u64::from(device.logical_block_size());
            assert!(
                !r.is_empty() && u64::from(r.len()).is_multiple_of(block) && r.offset().is_multiple_of(block)
            );
            assert!(r.offset() + u64::from(r.len()) <= capacity * 512);
            assert!(!device.read_only || r.op() == IoOp::Read);
            assert!(r.op() != IoOp::Read || data == Data::Out(r.len()));
            assert!(r.op() != IoOp::Write || data == Data::In(r.len()));
        }
        Err(bad) => assert!(!bad.to_string().is_empty() && bad.errno().get() != 0),
    }
}

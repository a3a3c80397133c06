//! A provider without a network: whatever is posted is answered at once with success. It measures what the layers
//! above cost by themselves.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iobuf::Region;
use rtrs_proto::imm::{HB_ACK, io_rsp};
use rtrs_proto::limits::Geometry;
use rtrs_proto::wire::SgDesc;
use rtrs_proto::{Imm, handshake};
use verbs::{
    Access, Cm, CmEvent, CmId, ConnParams, Cq, CqHandle, Device, DeviceInfo, Error, Mr, PostError, Qp,
    QpCaps, RecvWr, SendOp, SendWr, Wc, WcOp, Window, WindowKind,
};
use zerocopy::IntoBytes;

type Ring = Mutex<VecDeque<Wc>>;

fn refuse(what: &str) -> Error {
    Error { what: what.into(), source: std::io::ErrorKind::Unsupported.into(), hint: String::new() }
}

pub struct MirrorCm {
    events: VecDeque<CmEvent>,
    device: Arc<dyn Device>,
    geometry: Geometry,
    /// Never readable: whoever uses this provider polls.
    fds: (UnixStream, UnixStream),
}

impl MirrorCm {
    pub fn boxed(geometry: Geometry) -> Box<dyn Cm> {
        let info = DeviceInfo {
            name: "mirror0".into(),
            provider: "mirror",
            max_qp_wr: 4096,
            max_cqe: 1 << 16,
            cq_grows: false,
            max_sge: 4,
            max_mr_bytes: 1 << 40,
            windows: WindowKind::Unsupported,
            pins: false,
        };
        let fds = UnixStream::pair().expect("descriptors");
        Box::new(Self { events: VecDeque::new(), device: Arc::new(MirrorDevice(info)), geometry, fds })
    }
}

impl Cm for MirrorCm {
    fn provider(&self) -> &'static str {
        "mirror"
    }
    fn wait_fd(&self) -> RawFd {
        self.fds.0.as_raw_fd()
    }
    fn poll(&mut self) -> Result<Option<CmEvent>, Error> {
        Ok(self.events.pop_front())
    }
    fn listen(&mut self, _: SocketAddr, _: u32) -> Result<CmId, Error> {
        Err(refuse("listen"))
    }
    fn local_addr(&self, _: CmId) -> Option<SocketAddr> {
        None
    }
    fn resolve(&mut self, _: Option<IpAddr>, _: SocketAddr, _: Duration) -> Result<CmId, Error> {
        let id = CmId::next();
        self.events.push_back(CmEvent::Resolved(id));
        Ok(id)
    }
    fn device(&self, _: CmId) -> Option<Arc<dyn Device>> {
        Some(self.device.clone())
    }
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        vec![self.device.clone()]
    }
    fn create_qp(&mut self, _: CmId, caps: &QpCaps, cq: &CqHandle) -> Result<Box<dyn Qp>, Error> {
        let cq = cq.clone().downcast::<Ring>().map_err(|_| refuse("a queue of another provider"))?;
        let recvs = VecDeque::with_capacity(caps.max_recv_wr as usize);
        Ok(Box::new(MirrorQp { geometry: self.geometry, cq, recvs }))
    }
    fn connect(&mut self, id: CmId, _: ConnParams, _: &[u8]) -> Result<(), Error> {
        let private = handshake::accept(&self.geometry, false).as_bytes().to_vec();
        self.events.push_back(CmEvent::Established { id, private });
        Ok(())
    }
    fn accept(&mut self, _: CmId, _: ConnParams, _: &[u8]) -> Result<(), Error> {
        Err(refuse("accept"))
    }
    fn reject(&mut self, _: CmId, _: &[u8]) -> Result<(), Error> {
        Err(refuse("reject"))
    }
    fn disconnect(&mut self, id: CmId) -> Result<(), Error> {
        self.events.push_back(CmEvent::Disconnected(id));
        Ok(())
    }
    fn destroy(&mut self, _: CmId) {}
}

struct MirrorDevice(DeviceInfo);

impl Device for MirrorDevice {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }
    fn register(self: Arc<Self>, region: Arc<Region>, _: Access) -> Result<Mr, Error> {
        Ok(Mr::new(region, 1, 2, Box::new(())))
    }
    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Box<dyn Cq>, Error> {
        let ring = Arc::new(Ring::new(VecDeque::with_capacity(entries as usize)));
        Ok(Box::new(MirrorCq { ring, entries, fds: UnixStream::pair().expect("descriptors") }))
    }
    fn alloc_window(self: Arc<Self>) -> Result<Window, Error> {
        Err(refuse("windows"))
    }
}

struct MirrorCq {
    ring: Arc<Ring>,
    entries: u32,
    fds: (UnixStream, UnixStream),
}

impl Cq for MirrorCq {
    fn handle(&self) -> CqHandle {
        self.ring.clone()
    }
    fn entries(&self) -> u32 {
        self.entries
    }
    fn poll(&mut self, out: &mut [Wc]) -> Result<usize, Error> {
        let mut ring = self.ring.lock().expect("one thread");
        let n = ring.len().min(out.len());
        out.iter_mut().zip(ring.drain(..n)).for_each(|(o, wc)| *o = wc);
        Ok(n)
    }
    fn wait_fd(&self) -> RawFd {
        self.fds.0.as_raw_fd()
    }
    fn arm(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

struct MirrorQp {
    geometry: Geometry,
    cq: Arc<Ring>,
    recvs: VecDeque<RecvWr>,
}

impl MirrorQp {
    /// What the server of this world says to `wr`.
    fn answer(&mut self, wr: &SendWr) -> Option<Wc> {
        let wc = Wc { op: WcOp::RecvWriteImm, ..Wc::default() };
        match wr.op {
            SendOp::WriteImm { imm, .. } => match self.geometry.imm_layout().decode(imm) {
                Imm::IoReq { id, .. } => Some(Wc { imm: Some(io_rsp(id, None, false)), ..wc }),
                Imm::HbMsg => Some(Wc { imm: Some(HB_ACK), ..wc }),
                _ => None,
            },
            SendOp::Send => Some(Wc { op: WcOp::Recv, byte_len: self.info_rsp(), ..wc }),
            _ => None,
        }
    }

    /// Puts INFO_RSP into the receive in front.
    fn info_rsp(&self) -> u32 {
        let chunks = SgDesc::new(0x10_0000, 7, self.geometry.total_bytes());
        let message = handshake::info_rsp(&[chunks]).expect("one descriptor");
        let sge = self.recvs.front().expect("posted before").sges.as_slice()[0];
        assert!(message.len() <= sge.len as usize);
        // SAFETY: the poster registered this memory for receives, keeps it until the queue pair is gone, and makes no
        // Rust reference into it (`iobuf::Region`); its length was compared above.
        unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), sge.addr as *mut u8, message.len()) };
        message.len() as u32
    }
}

impl Qp for MirrorQp {
    fn num(&self) -> u32 {
        1
    }
    fn post_send(&mut self, wrs: &[SendWr]) -> Result<(), PostError> {
        for wr in wrs {
            let answer = self.answer(wr);
            let mut ring = self.cq.lock().expect("one thread");
            if wr.signaled {
                ring.push_back(Wc { wr_id: wr.wr_id, ..Wc::default() });
            }
            if let Some(wc) = answer {
                let recv = self.recvs.pop_front().expect("a receive for every answer");
                ring.push_back(Wc { wr_id: recv.wr_id, ..wc });
            }
        }
        Ok(())
    }
    fn post_recv(&mut self, wrs: &[RecvWr]) -> Result<(), PostError> {
        assert!(
            self.recvs.len() + wrs.len() <= self.recvs.capacity(),
            "more receives than the queue pair has"
        );
        self.recvs.extend(wrs);
        Ok(())
    }
    fn bind_window(&mut self, _: &mut Window, _: &Mr, _: usize, _: u32) -> Result<u32, PostError> {
        Err(PostError { accepted: 0, source: std::io::ErrorKind::Unsupported.into() })
    }
    fn set_min_rnr_timer(&mut self, _: u8) -> Result<(), Error> {
        Ok(())
    }
}

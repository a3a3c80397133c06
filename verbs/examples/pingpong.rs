//! A client and a server that use every verb once, over a provider of choice:
//!
//! ```text
//! pingpong loopback                         both sides in this process
//! pingpong server 10.9.1.1:7471             the system's RDMA device behind an address …
//! pingpong client 10.9.1.1:7471 [SOURCE]    … and somebody who connects to it
//! ```
//!
//! The client opens a window of its memory, asks the server (SEND) to fill it, and checks what came (RDMA WRITE with
//! immediate); after some rounds it disconnects. A connection with other private data is refused before.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use iobuf::Region;
use verbs::loopback::Fabric;
use verbs::{
    Access, Cm, CmEvent, CmId, ConnParams, Cq, Device, Mr, Qp, QpCaps, RecvWr, SendOp, SendWr, SgeList, Wc,
    WcStatus, Window, WindowKind, rdma_core,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const GREETING: &[u8] = b"pingpong";
const ROUNDS: u32 = 100;
/// Bytes of data per round, at the start of each side's region.
const BLOCK: u32 = 64 << 10;
/// What the client asks for: address, key and a seed for the data.
const REQUEST: u32 = 16;
/// Where requests are sent from and received.
const REQUEST_AT: u32 = BLOCK;
const PARAMS: ConnParams = ConnParams::FOREVER;
const CAPS: QpCaps = QpCaps {
    max_send_wr: 16,
    max_recv_wr: 16,
    max_send_sge: 1,
    max_recv_sge: 1,
    domain: verbs::Domain::COMMON,
};
const RECV: u64 = 0;
const SEND: u64 = 1;

fn main() {
    if let Err(error) = run() {
        eprintln!("pingpong: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["loopback"] => both(),
        ["server", addr] => Server::listen(rdma_core::open()?, addr.parse()?)?.serve(),
        ["client", addr] => client(&mut *rdma_core::open()?, addr.parse()?, None),
        ["client", addr, src] => client(&mut *rdma_core::open()?, addr.parse()?, Some(src.parse()?)),
        _ => Err("usage: pingpong loopback | server ADDR:PORT | client ADDR:PORT [SOURCE]".into()),
    }
}

fn both() -> Result<()> {
    let fabric = Fabric::new();
    let addr = "10.0.0.1:7471".parse()?;
    let server = Server::listen(fabric.cm(), addr)?;
    let thread = std::thread::spawn(move || server.serve().map_err(|e| e.to_string()));
    client(&mut *fabric.cm(), addr, None)?;
    Ok(thread.join().map_err(|_| "the server panicked")??)
}

fn until<T>(what: &str, mut f: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let (start, patience) = (Instant::now(), test_support::patience());
    while start.elapsed() < patience {
        if let Some(t) = f()? {
            return Ok(t);
        }
        std::thread::yield_now();
    }
    Err(format!("no {what} within {patience:?}").into())
}

fn event(cm: &mut dyn Cm, what: &str) -> Result<CmEvent> {
    until(what, || Ok(cm.poll()?))
}

/// A connection's equipment.
struct Peer {
    qp: Box<dyn Qp>,
    cq: Box<dyn Cq>,
    mr: Mr,
    device: Arc<dyn Device>,
}

impl Peer {
    fn new(cm: &mut dyn Cm, id: CmId) -> Result<Self> {
        let device = cm.device(id).ok_or("a connection without a device")?;
        let windows = device.info().windows != WindowKind::Unsupported;
        let access = Access {
            domain: verbs::Domain::COMMON,
            local_write: true,
            remote_write: !windows,
            remote_read: false,
            window_bind: windows,
        };
        let mr = device.clone().register(Region::new(2 * BLOCK as usize)?, access)?;
        let cq = device.clone().create_cq(64)?;
        let qp = cm.create_qp(id, &CAPS, &cq.handle())?;
        Ok(Self { qp, cq, mr, device })
    }

    fn sges(&self, offset: u32, len: u32) -> Result<SgeList> {
        Ok(SgeList::one(self.mr.sge(offset as usize, len).ok_or("outside the region")?))
    }

    fn recv(&mut self, len: u32) -> Result<()> {
        let sges = if len == 0 { SgeList::EMPTY } else { self.sges(REQUEST_AT, len)? };
        Ok(self.qp.post_recv(&[RecvWr { wr_id: RECV, sges }])?)
    }

    fn send(&mut self, op: SendOp, offset: u32, len: u32) -> Result<()> {
        let wr = SendWr { wr_id: SEND, op, sges: self.sges(offset, len)?, signaled: true };
        Ok(self.qp.post_send(&[wr])?)
    }

    fn wc(&mut self) -> Result<Wc> {
        let mut out = [Wc::default()];
        until("completion", || Ok((self.cq.poll(&mut out)? == 1).then_some(())))?;
        Ok(out[0])
    }

    /// The next completions: `sends` of the send queue and `recvs` receives, in any order. Returns the last receive.
    fn completed(&mut self, mut sends: u32, mut recvs: u32) -> Result<Wc> {
        let mut last = Wc::default();
        while sends + recvs > 0 {
            let wc = self.wc()?;
            match (wc.status, wc.wr_id) {
                (WcStatus::Success, SEND) if sends > 0 => sends -= 1,
                (WcStatus::Success, RECV) if recvs > 0 => {
                    recvs -= 1;
                    last = wc;
                }
                _ => return Err(format!("unexpected {wc:?}").into()),
            }
        }
        Ok(last)
    }
}

struct Server {
    cm: Box<dyn Cm>,
}

impl Server {
    fn listen(mut cm: Box<dyn Cm>, addr: SocketAddr) -> Result<Self> {
        cm.listen(addr, 8)?;
        Ok(Self { cm })
    }

    /// Serves one good client and refuses one bad.
    fn serve(mut self) -> Result<()> {
        let (mut served, mut refused) = (false, false);
        while !(served && refused) {
            let CmEvent::ConnectRequest { id, private, peer, .. } = event(&mut *self.cm, "client")? else {
                continue;
            };
            if private.starts_with(GREETING) {
                self.pong(id)?;
                println!("server: served {peer}");
                served = true;
            } else {
                self.cm.reject(id, b"say pingpong")?;
                refused = true;
            }
            self.cm.destroy(id);
        }
        Ok(())
    }

    fn pong(&mut self, id: CmId) -> Result<()> {
        let mut p = Peer::new(&mut *self.cm, id)?;
        p.recv(REQUEST)?;
        self.cm.accept(id, PARAMS, b"")?;
        // The next request may come before the completion of the last answer, so all of these together.
        let (mut requests, mut answers) = (0, 0);
        while answers < ROUNDS {
            let wc = p.wc()?;
            match (wc.status, wc.wr_id) {
                (WcStatus::Success, SEND) => answers += 1,
                (WcStatus::Success, RECV) if requests < ROUNDS => {
                    requests += 1;
                    answer(&mut p)?;
                }
                _ => return Err(format!("unexpected {wc:?}").into()),
            }
        }
        until("disconnect", || {
            let event = self.cm.poll()?;
            Ok(matches!(event, Some(CmEvent::Disconnected(got)) if got == id).then_some(()))
        })?;
        self.cm.disconnect(id)?;
        // The receive that was left over.
        match p.wc()?.status {
            WcStatus::Flushed => Ok(()),
            other => Err(format!("{other:?} after disconnecting").into()),
        }
    }
}

/// Reads the request that came and writes what it asks for.
fn answer(p: &mut Peer) -> Result<()> {
    let mut request = [0u8; REQUEST as usize];
    let inside = p.mr.region().copy_out(REQUEST_AT as usize, &mut request);
    assert!(inside, "requests have a place in the region");
    let addr = u64::from_le_bytes(request[..8].try_into()?);
    let rkey = u32::from_le_bytes(request[8..12].try_into()?);
    let seed = u32::from_le_bytes(request[12..].try_into()?);
    let inside = p.mr.region().copy_in(0, &pattern(seed));
    assert!(inside, "a block fits the region");
    p.recv(REQUEST)?;
    p.send(SendOp::WriteImm { addr, rkey, imm: seed }, 0, BLOCK)?;
    Ok(())
}

fn pattern(seed: u32) -> Vec<u8> {
    (0..BLOCK).map(|i| (i.wrapping_mul(31).wrapping_add(seed) >> 3) as u8).collect()
}

fn client(cm: &mut dyn Cm, addr: SocketAddr, src: Option<IpAddr>) -> Result<()> {
    refused(cm, addr, src)?;
    let id = resolve(cm, addr, src)?;
    let mut p = Peer::new(cm, id)?;
    cm.connect(id, PARAMS, GREETING)?;
    match event(cm, "answer")? {
        CmEvent::Established { .. } => {}
        other => return Err(format!("{other:?}").into()),
    }
    let info = p.device.info().clone();
    let mut window = match info.windows {
        WindowKind::Unsupported => None,
        _ => Some(p.device.clone().alloc_window()?),
    };
    let start = Instant::now();
    for seed in 0..ROUNDS {
        ping(&mut p, window.as_mut(), seed)?;
    }
    let mib = f64::from(ROUNDS) * f64::from(BLOCK) / f64::from(1 << 20);
    let rate = mib / start.elapsed().as_secs_f64();
    println!(
        "client: {ROUNDS} blocks over {} ({}, {:?}), {rate:.0} MiB/s",
        info.name, info.provider, info.windows
    );
    cm.disconnect(id)?;
    match event(cm, "end of the connection")? {
        CmEvent::Disconnected(_) => {}
        other => return Err(format!("{other:?}").into()),
    }
    drop(p);
    cm.destroy(id);
    Ok(())
}

/// One block: a fresh key, the request, the data.
fn ping(p: &mut Peer, window: Option<&mut Window>, seed: u32) -> Result<()> {
    let rkey = match window {
        Some(window) => p.qp.bind_window(window, &p.mr, 0, BLOCK)?,
        None => p.mr.rkey(),
    };
    let mut request = (p.mr.region().as_ptr() as u64).to_le_bytes().to_vec();
    request.extend(rkey.to_le_bytes());
    request.extend(seed.to_le_bytes());
    let inside = p.mr.region().copy_in(REQUEST_AT as usize, &request);
    assert!(inside, "requests have a place in the region");
    p.recv(0)?;
    p.send(SendOp::Send, REQUEST_AT, REQUEST)?;
    let wc = p.completed(1, 1)?;
    let mut got = vec![0; BLOCK as usize];
    let inside = p.mr.region().copy_out(0, &mut got);
    assert!(inside, "a block fits the region");
    if (wc.imm, wc.byte_len) != (Some(seed), BLOCK) || got != pattern(seed) {
        return Err(format!("round {seed}: wrong data, {wc:?}").into());
    }
    Ok(())
}

fn resolve(cm: &mut dyn Cm, addr: SocketAddr, src: Option<IpAddr>) -> Result<CmId> {
    let id = cm.resolve(src, addr, test_support::limit(30))?;
    match event(cm, "route")? {
        CmEvent::Resolved(_) => Ok(id),
        other => Err(format!("{other:?}").into()),
    }
}

fn refused(cm: &mut dyn Cm, addr: SocketAddr, src: Option<IpAddr>) -> Result<()> {
    let id = resolve(cm, addr, src)?;
    let _peer = Peer::new(cm, id)?;
    cm.connect(id, PARAMS, b"hello")?;
    match event(cm, "refusal")? {
        CmEvent::Rejected { private, reason, .. } if private.starts_with(b"say pingpong") => {
            println!("client: refused with reason {reason}, as it should be");
        }
        other => return Err(format!("{other:?}").into()),
    }
    cm.destroy(id);
    Ok(())
}

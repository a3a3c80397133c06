//! Who a client says it is.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rtrs_proto::handshake::ConnectRequest;
use rtrs_proto::wire::{ConnReq, InfoReq, NAME_MAX, Uuid, msg_type};
use zerocopy::FromZeros;

/// A random uuid.
pub fn random_uuid() -> Uuid {
    Uuid(uuid::Uuid::new_v4().into_bytes())
}

/// How to connect one path.
#[derive(Clone, Debug)]
pub struct Opts {
    /// In INFO_REQ; not checked, longer ones are cut.
    pub sessname: Vec<u8>,
    /// Connections of the path.
    pub cid_num: u16,
    /// `paths_uuid` on the wire.
    pub session_uuid: Uuid,
    /// `sess_uuid` on the wire.
    pub path_uuid: Uuid,
    /// Local address; `None` lets the system choose.
    pub src: Option<IpAddr>,
    /// The flag in the requests of all cids.
    pub first_conn: bool,
    /// Attempt number.
    pub recon_cnt: u16,
    /// How long any one thing may take.
    pub timeout: Duration,
    /// Answer HB_MSG.
    pub answer_heartbeats: bool,
    /// Post receives beyond the one for INFO_RSP.
    pub post_receives: bool,
    /// Ask for the invalidation of read keys: reads go through memory windows.
    pub need_inval: bool,
    /// Work requests per send queue.
    pub send_depth: u32,
    /// Work requests per receive queue.
    pub recv_depth: u32,
    /// Where the client notes what the server did that no RTRS server may do.
    pub violations: Arc<Mutex<Vec<String>>>,
}

impl Opts {
    /// The first path of a new session with two connections.
    pub fn new(sessname: &str) -> Self {
        Self {
            sessname: sessname.into(),
            cid_num: 2,
            session_uuid: random_uuid(),
            path_uuid: random_uuid(),
            src: None,
            first_conn: true,
            recon_cnt: 1,
            timeout: Duration::from_secs(10),
            answer_heartbeats: true,
            post_receives: true,
            need_inval: false,
            send_depth: 256,
            recv_depth: 512,
            violations: Arc::default(),
        }
    }

    /// Another path of the same session, from another address.
    #[must_use]
    pub fn another_path(&self, src: IpAddr) -> Self {
        Self { path_uuid: random_uuid(), src: Some(src), first_conn: false, ..self.clone() }
    }

    /// The well-formed private data of connection `cid`.
    pub fn conn_req(&self, cid: u16) -> ConnReq {
        let request = ConnectRequest {
            cid,
            cid_num: self.cid_num,
            recon_cnt: self.recon_cnt,
            path_uuid: self.path_uuid,
            session_uuid: self.session_uuid,
            // Kernel clients latch the flag when cid 0 is established (rtrs-clt.c, rtrs_rdma_conn_established).
            first_conn: self.first_conn || cid > 0,
        };
        request.to_wire()
    }

    /// INFO_REQ with the session name, whatever it is.
    pub fn info_req(&self) -> InfoReq {
        let mut msg = InfoReq { msg_type: msg_type::INFO_REQ.into(), ..InfoReq::new_zeroed() };
        let n = self.sessname.len().min(NAME_MAX);
        msg.pathname[..n].copy_from_slice(&self.sessname[..n]);
        msg
    }
}

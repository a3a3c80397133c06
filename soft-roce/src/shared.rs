//! What all ports, engines and connection managers of a [`crate::SoftRoce`] share.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, RwLock};

use roce_proto::cm;

use crate::engine::{EngineMailbox, Source};
use crate::faults::Faults;
use crate::mailbox::Mailbox;
use crate::neighbours::Neighbours;

/// How the provider behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Hand runs of packets to the kernel at once (UDP_SEGMENT). Falls back by itself where the kernel cannot.
    pub segmentation: bool,
    /// Bytes of receive buffer to ask the kernel for, per completion queue; 0 takes the system's default.
    pub receive_buffer: usize,
    /// Unacknowledged bytes per queue pair at most.
    pub max_inflight: u32,
    /// A thread makes progress for those who poll rarely: examples, tests, synchronous programs. Reactors poll
    /// themselves, and are faster without.
    pub progress_thread: bool,
    /// A bad network, for tests.
    pub faults: Option<Faults>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segmentation: true,
            receive_buffer: 8 << 20,
            max_inflight: 512 << 10,
            progress_thread: false,
            faults: None,
        }
    }
}

/// What engines tell the control thread.
pub enum Notice {
    /// A connection's queue pair got its first valid packet: the peer is ready.
    Heard(cm::ConnId),
    /// A user dropped a queue pair.
    Dropped {
        /// Its number.
        qpn: u32,
    },
    /// A packet of connection management that came in on an engine's socket.
    Mad { from: Source, udp: Box<[u8]> },
    /// A packet for no queue pair of this process that came in on an engine's socket of `port`.
    Foreign { port: IpAddr, from: Source, udp: Box<[u8]> },
}

/// Notices waiting at most that peers can cause.
pub const MAX_NOTICES: usize = 1024;

/// See the module.
pub struct Shared {
    pub options: Options,
    pub notices: Mailbox<Notice>,
    pub neighbours: Neighbours,
    /// Every queue pair and the engine it is on: for packets that came in elsewhere, and for numbers in use.
    pub directory: RwLock<HashMap<u32, Arc<EngineMailbox>>>,
}

impl Shared {
    pub fn new(options: Options) -> io::Result<Self> {
        Ok(Self {
            options,
            notices: Mailbox::new()?,
            neighbours: Neighbours::new()?,
            directory: RwLock::default(),
        })
    }

    /// The engine that has queue pair `qpn`.
    pub fn engine_of(&self, qpn: u32) -> Option<Arc<EngineMailbox>> {
        self.directory.read().unwrap_or_else(|e| e.into_inner()).get(&qpn).cloned()
    }
}

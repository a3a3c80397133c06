//! What happened to packets, by reason. Every packet that is not acted on is counted under exactly one reason.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// What is counted; the names are those of statistics in RPC.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Counter { $($(#[$doc])* $name,)* }

        impl Counter {
            /// All, in order of declaration.
            pub const ALL: &'static [Counter] = &[$(Counter::$name,)*];

            /// In snake case.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$name => $text,)* }
            }
        }
    };
}

counters! {
    /// Packets received, good or bad.
    RxPackets => "rx_packets",
    /// Bytes of UDP payload received.
    RxBytes => "rx_bytes",
    /// Packets sent, repeats included.
    TxPackets => "tx_packets",
    /// Bytes of UDP payload sent.
    TxBytes => "tx_bytes",
    /// Dropped: shorter than its headers, pad and ICRC.
    Short => "rx_drop_short",
    /// Dropped: an operation that is not spoken here, or a CNP.
    UnknownOpcode => "rx_drop_opcode",
    /// Dropped: transport header version is not 0.
    Version => "rx_drop_version",
    /// Dropped: not the default partition.
    PKey => "rx_drop_pkey",
    /// Dropped: wrong invariant CRC.
    Icrc => "rx_drop_icrc",
    /// Dropped: no queue pair has that number.
    UnknownQpn => "rx_drop_qpn",
    /// Dropped: not from the queue pair's peer, or not to its address.
    WrongSource => "rx_drop_source",
    /// Dropped: the queue pair is not connected yet or is broken.
    WrongState => "rx_drop_state",
    /// Dropped: a response to nothing that is outstanding.
    StaleResponse => "rx_drop_stale_response",
    /// Dropped after a sequence NAK: requests from ahead of the expected one.
    OutOfOrder => "rx_out_of_order",
    /// Acknowledged again, not executed again.
    Duplicate => "rx_duplicate",
    /// Refused with RNR NAK: no receive was posted.
    NotReady => "rx_not_ready",
    /// Refused with NAK "invalid request": wrong sequence of operations, wrong length, not allowed.
    InvalidRequest => "rx_nak_invalid",
    /// Refused with NAK "remote access error": key, bounds or permission.
    AccessError => "rx_nak_access",
    /// Queue pair 1: dropped, not a CM message or not a valid one.
    CmMalformed => "cm_drop_malformed",
    /// Queue pair 1: dropped, addresses of packet and message do not agree or the connection is another peer's.
    CmWrongSource => "cm_drop_source",
    /// Queue pair 1: dropped, names a connection that does not exist or not in that state.
    CmStale => "cm_drop_stale",
    /// Queue pair 1: dropped, over the limit of unanswered requests or of answers to strangers.
    CmLimited => "cm_drop_limit",
    /// Connection requests refused.
    CmRejected => "cm_rejected",
    /// CM messages sent again.
    CmRetries => "cm_retries",
    /// Sequence NAKs received: packets we sent were lost.
    SeqNakReceived => "rx_seq_nak",
    /// RNR NAKs received: the peer had no receive posted.
    RnrNakReceived => "rx_rnr_nak",
    /// Timeouts without an acknowledgement.
    Timeouts => "ack_timeouts",
    /// Packets sent again.
    Retransmits => "tx_retransmits",
    /// Queue pairs broken because retries ran out.
    RetriesExceeded => "retries_exceeded",
    /// Packets that the system's socket buffer could not take and that were sent later.
    TxBusy => "tx_busy",
    /// Packets the system dropped because our receive buffer was full.
    RxOverflow => "rx_overflow",
    /// Packets that came in on another queue's socket and were passed on.
    Forwarded => "rx_forwarded",
}

/// Counts of one thread, readable by others. Only one thread may add, so that adding needs no locked instruction.
#[derive(Debug)]
pub struct Counters([AtomicU64; Counter::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; Counter::ALL.len()])
    }
}

impl Counters {
    /// Adds `n`.
    pub fn add(&self, counter: Counter, n: u64) {
        let cell = &self.0[counter as usize];
        cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// The present value.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].load(Ordering::Relaxed)
    }
}

//! Numbers in [`crate::WcStatus::Error`]. All providers use those of `enum ibv_wc_status` (libibverbs `verbs.h`).

/// A receive was too small for the SEND, or a message larger than the port allows.
pub const LOC_LEN_ERR: u32 = 1;
/// The queue pair could not do the operation (for example an invalidate of a key that is none).
pub const LOC_QP_OP_ERR: u32 = 2;
/// A scatter entry is not inside a region that allows it.
pub const LOC_PROT_ERR: u32 = 4;
/// Flushed; reported as [`crate::WcStatus::Flushed`].
pub const WR_FLUSH_ERR: u32 = 5;
/// The memory region does not allow windows, or the range is not inside.
pub const MW_BIND_ERR: u32 = 6;
/// The peer could not take the request, normally because its receive was too small.
pub const REM_INV_REQ_ERR: u32 = 9;
/// The peer's key, address or access right did not fit.
pub const REM_ACCESS_ERR: u32 = 10;
/// The peer failed on its own side.
pub const REM_OP_ERR: u32 = 11;
/// The peer did not answer.
pub const RETRY_EXC_ERR: u32 = 12;
/// The peer posted no receive in time.
pub const RNR_RETRY_EXC_ERR: u32 = 13;

/// The number in words, for logs.
pub fn name(status: u32) -> &'static str {
    const NAMES: [&str; 23] = [
        "success",
        "local length error",
        "local queue pair operation error",
        "local EE context operation error",
        "local protection error",
        "flushed",
        "memory window bind error",
        "bad response",
        "local access error",
        "remote invalid request",
        "remote access error",
        "remote operation error",
        "transport retries exceeded: the peer does not answer",
        "receiver-not-ready retries exceeded: the peer posts no receives",
        "local RDD violation",
        "remote invalid RD request",
        "remote aborted",
        "invalid EE context number",
        "invalid EE context state",
        "fatal device error",
        "response timeout",
        "general error",
        "tag matching error",
    ];
    NAMES.get(status as usize).copied().unwrap_or("unknown status")
}

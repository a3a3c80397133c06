//! What the methods do, for `docs/rpc.md`.

use engine::MethodText;

pub(in crate::bdev) const TEXTS: &[MethodText] = &[
    (
        "bdev_rnbd_add_path",
        "true",
        "Adds a path to a session and waits until it is connected; one that cannot be is not kept. A path is `ip:SERVER`, `ip:OURS@ip:SERVER` or {src?, dst, trsvcid?}; the port is the session's unless the path has one.",
    ),
    (
        "bdev_rnbd_disconnect_path",
        "true",
        "Disconnects a path, which then stays so; first it gets no new requests, and those it has are answered. What is not within 2 s takes another path, or waits.",
    ),
    (
        "bdev_rnbd_get_devices",
        "[device]",
        "Mapped devices: `state` is init (never opened), open, closed (session lost, or closed by the server) or unmapped.",
    ),
    (
        "bdev_rnbd_get_path_stats",
        "[{session, path, rd_cnt, rd_bytes, wr_cnt, wr_bytes, inflight, failovers, reconnects_ok, reconnects_failed}]",
        "Counters of paths.",
    ),
    ("bdev_rnbd_get_sessions", "[session]", "Sessions to servers with their paths."),
    (
        "bdev_rnbd_map",
        "name",
        "Makes a device of an RNBD server a bdev. The session `sessname` (a name of this host at the server) is made over `paths` if it does not exist; else `paths` and what concerns the session count for nothing. Waits for the device; what prevents it is the error, and nothing stays, unless `keep_trying` is set: then the mapping stays in state init and goes on trying. In a configuration file that is the default, so that a server that is away does not prevent the start; what the file makes of the bdev waits for it. While no path is up I/O waits: for ever with `fast_io_fail_timeout_sec` 0 (default), else it fails after that time with ETIMEDOUT. After `ctrlr_loss_timeout_sec` without a path (-1, default: never) the session is given up and I/O fails with ENODEV until bdev_rnbd_remap. `provider`: auto (default), rdma-core or soft-roce. `connections` of each path: one for each reactor and one for administration by default. While a path is lost, others carry its requests, and what overwrites a request of it in flight waits until it is connected again, or `stale_io_timeout_sec` (10) after the request was repeated: so long a server may still execute it; 0: it does not wait, as in the kernel's client. A path is lost when the server misses heartbeats (`heartbeat_missed_max` + 1 of them, one each `heartbeat_interval_ms`), or, with soft-roce, when it acknowledges nothing for `ack_timeout_ms` (5000); RDMA devices have their own timers. After 2 s without an answer the log says so. `resize_check_sec` (10): how often the server is asked for the size, 0: never.",
    ),
    (
        "bdev_rnbd_reconnect_path",
        "true",
        "Connects a path now, first disconnecting it if need be; waits for the result. A server that has not finished with its former connections is asked again for `connect_timeout_sec`.",
    ),
    (
        "bdev_rnbd_remap",
        "name",
        "Opens a closed device now, making its session anew if that was given up. -114 (EALREADY) if it is open, -16 (EBUSY) while it is being mapped.",
    ),
    ("bdev_rnbd_remove_path", "true", "Disconnects and forgets a path."),
    ("bdev_rnbd_reset_path_stats", "true", "Sets the counters of paths to 0."),
    (
        "bdev_rnbd_resize",
        "blocks",
        "Asks the server for the size and makes the bdev so large, or `num_blocks` if that is less.",
    ),
    (
        "bdev_rnbd_set_options",
        "true",
        "Changes a session: `mpath_policy` round_robin, min_inflight (default) or min_latency, when and how often lost paths are tried again, and when it is given up; what is absent stays.",
    ),
    (
        "bdev_rnbd_unmap",
        "true",
        "Ends a mapping and closes the device; with the last one, its session. -16 (EBUSY) if the bdev is in use; with `force` its users lose it.",
    ),
];

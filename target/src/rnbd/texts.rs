//! What the methods do, for `docs/rpc.md`.

use engine::MethodText;

pub(super) const TEXTS: &[MethodText] = &[
    (
        "rnbd_create_export",
        "true",
        "Offers a bdev to clients under `device_path`; to all of them without `allow`. The parts of one `allow` must match together, and every path of a session must fit an entry, those that join later, too. Whom an entry with `addr` fits gets its session name also from a session at an address that no entry has, which is ended. An export stays when its bdev is deleted, in case that comes back; it is not saved meanwhile. With the first export, of whatever front end, bdevs are not offered by their own names any more (see rnbd_set_options).",
    ),
    (
        "rnbd_create_listener",
        "true",
        "Accepts clients on an address. `trsvcid` 1234 if absent; `provider` rdma-core, soft-roce, or auto (default): rdma-core if a device owns the address, else soft-roce. `ack_delay`: clients' network stacks wait at least 4.096 µs times 2 to this power (0 to 31) for an acknowledgement before they repeat; of soft-roce only, where 21 (8.6 s) is the default, since Linux' rxe loses its connection by a repetition: a target that does not run for a moment then loses no client. Clients with RDMA hardware recover from loss faster with 15.",
    ),
    (
        "rnbd_delete_export",
        "true",
        "Ends an export for new opens; devices that are open stay so, see rnbd_force_close.",
    ),
    ("rnbd_delete_listener", "true", "Stops accepting on an address; connected clients stay."),
    ("rnbd_disconnect_path", "true", "Closes one path; the client reconnects."),
    ("rnbd_disconnect_session", "true", "Closes all paths of a session."),
    ("rnbd_force_close", "true", "Closes a device of a session from the server's side."),
    (
        "rnbd_get_devices",
        "[{device, provider, counters}]",
        "RDMA devices in use. `counters` has what a provider counts itself: with soft-roce packets by what became of them.",
    ),
    (
        "rnbd_get_exports",
        "[export]",
        "Exports, with those who have them open. `open_to`: everybody, names (of sessions: an entry has no `addr`), addresses.",
    ),
    (
        "rnbd_get_limits",
        "[{resource, used, limit, per_address, for_known_clients}]",
        "What clients have of sessions, paths, connections and memory (bytes of chunks and queues), the limit, how much of it \
         one address may have (of IPv6: one /64), and how much is kept for clients that had a device open before or that an \
         allow list names.",
    ),
    ("rnbd_get_listeners", "[listener]", "Addresses that accept."),
    (
        "rnbd_get_name_space",
        "{dev_search_path, exports, bdevs_offered, bdevs, files}",
        "What a client may ask for: exports, bdevs that it gets by their own names, and below which directory files.",
    ),
    ("rnbd_get_path_stats", "[{session, path, rd_cnt, rd_bytes, wr_cnt, wr_bytes}]", "Counters of paths."),
    (
        "rnbd_get_sessions",
        "[session]",
        "Clients, their paths and open devices. `opened_by`: export, bdev_name or file. `offered` false: it is open, but would not be opened again, because it was opened by the bdev's own name before the first export, or its export is gone; rnbd_force_close ends that. `allowed_by`: what `allow` entries have of the session: nothing, name, address, or name and address.",
    ),
    ("rnbd_reset_path_stats", "true", "Sets the counters of paths to 0."),
    (
        "rnbd_set_options",
        "true",
        "Queue depth, sizes, limits and times of the RNBD server; what is absent stays. `max_memory`: bytes of chunks and queues of all clients, by default half of the memory that the program may use. `max_share_percent`: what one address may have of each limit, by default 25; see rnbd_get_limits. `offer_bdevs`: clients get bdevs that no export, layer or module uses by their own names; false: never; absent: until anything is exported by any front end. `open_files`: files and block devices below `dev_search_path`, which must then begin with a directory other than /; for reading only, unless `open_files_read_only` is false. `bind_sessions`: later paths of a session come from the address of an earlier one, unless `allow` entries have theirs; off by default, since clients with several ports have several addresses.",
    ),
];

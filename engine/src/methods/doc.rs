//! `docs/rpc.md`: one line per method, made from the method table and the texts here.

use std::fmt::Write;
use std::rc::Rc;

use rpc::{MethodInfo, States};

use crate::subsystem::{MethodText, Subsystem};

/// Method, result, what it does. A test holds them against the table.
const TEXTS: &[MethodText] = &[
    (
        "bdev_aio_create",
        "name",
        "A bdev on a file or block device, shown as \"AIO disk\". `fallocate` offers discard, and lets write-zeroes give space back; without it write-zeroes keeps the space. Where the file system can do neither, zeroes are written. `nowait` changes nothing, because io_uring never makes a core wait.",
    ),
    ("bdev_aio_delete", "true", "Removes it; answers when its file is closed."),
    ("bdev_aio_rescan", "true", "Asks the file or device for its size and tells those who use the bdev."),
    (
        "bdev_delay_create",
        "name",
        "A layer that makes a bdev slow. Latencies in microseconds; one request in a hundred gets the p99 one.",
    ),
    ("bdev_delay_delete", "true", "Removes the layer."),
    ("bdev_delay_update_latency", "true", "Changes one latency while I/O runs."),
    (
        "bdev_enable_histogram",
        "true",
        "Switches the latency histogram of a bdev on (empty) or off. Without `opc` it counts all operations.",
    ),
    ("bdev_error_create", "true", "A layer named EE_ and the base's name that spoils requests on demand."),
    ("bdev_error_delete", "true", "Removes the layer."),
    (
        "bdev_error_inject_error",
        "true",
        "Spoils the next `num` requests of a kind; `io_type` clear ends all injections.",
    ),
    ("bdev_error_resume_pending", "true", "Lets the requests go on that an injection of `pending` holds."),
    (
        "bdev_examine",
        "true",
        "Accepted for SPDK's scripts; there is nothing to find on a bdev here. On one of SPDK (docs/spdk.md), its modules look.",
    ),
    (
        "bdev_get_bdevs",
        "[bdev]",
        "All bdevs, or `name`; waits up to `timeout` milliseconds for it to appear.",
    ),
    (
        "bdev_get_histogram",
        "{histogram, granularity, min_range, max_range, tsc_rate}",
        "Latencies as base64 of little-endian 64-bit counts; SPDK's scripts/histogram.py decodes them.",
    ),
    (
        "bdev_get_histogram_borders",
        "{borders_count}",
        "How many requests were as fast as each border (microseconds, ascending), and how many there were.",
    ),
    (
        "bdev_get_iostat",
        "{tick_rate, ticks, bdevs}",
        "Counters of bdevs; `per_channel` shows one bdev by thread. A tick is a nanosecond.",
    ),
    (
        "bdev_malloc_create",
        "name",
        "A bdev in memory; pages are taken as they are written. MallocN without a name.",
    ),
    ("bdev_malloc_delete", "true", "Removes it; answers when its memory is free."),
    ("bdev_null_create", "name", "A bdev that keeps nothing."),
    ("bdev_null_delete", "true", "Removes it."),
    ("bdev_null_resize", "true", "Gives it `new_size` MiB."),
    ("bdev_reset_iostat", "true", "Resets the counters of a bdev, or of all."),
    ("bdev_set_options", "true", "Accepted for SPDK's configurations; without effect."),
    ("bdev_set_qd_sampling_period", "true", "Only 0 (off): queue depths are not sampled."),
    (
        "bdev_set_qos_limit",
        "true",
        "Only 0 (unlimited): rate limits are not implemented, but for bdevs of SPDK (docs/spdk.md).",
    ),
    ("bdev_uring_create", "name", "A bdev on a file or block device through io_uring."),
    ("bdev_uring_delete", "true", "Removes it; answers when its file is closed."),
    ("bdev_uring_rescan", "true", "Asks the file or device for its size and tells those who use the bdev."),
    (
        "bdev_wait_for_examine",
        "true",
        "Ends the bdev part of a configuration. With SPDK, answers when its modules have looked at all of its bdevs.",
    ),
    (
        "framework_get_config",
        "[{method, params}]",
        "The calls that make the present state of a subsystem; `save_config` asks for it.",
    ),
    ("framework_get_idle_policy", "[{reactor, policy, spin_us}]", "What reactors do when there is no work."),
    (
        "framework_get_reactors",
        "{tick_rate, pid, reactors}",
        "Busy and idle time of every reactor; `in_interrupt`: asleep now.",
    ),
    ("framework_get_scheduler", "{scheduler_name, …}", "Always `static`: a path stays on its reactor."),
    (
        "framework_get_subsystems",
        "[{subsystem, depends_on}]",
        "Parts of the configuration in the order in which they are loaded.",
    ),
    (
        "framework_set_idle_policy",
        "true",
        "`poll`: never sleep. `adaptive`: poll for `spin_us` after the last work, then sleep; on a core that others use, too, sleep at once. All reactors, or the one on core `reactor`.",
    ),
    ("framework_set_scheduler", "true", "Only `static`."),
    ("framework_start_init", "true", "Ends --wait-for-rpc; answers when the configuration has run."),
    ("framework_wait_init", "true", "Answers when the target is ready."),
    ("log_clear_flag", "true", "Clears a flag of log_set_flag."),
    ("log_enable_timestamps", "true", "Whether log lines begin with the time."),
    ("log_get_flags", "{flag: bool}", "Flags of log_set_flag."),
    ("log_get_level", "level", "The log level."),
    ("log_get_print_level", "level", "The same."),
    (
        "log_set_flag",
        "true",
        "Lets one part of the program log at DEBUG whatever the level; `all`: every part.",
    ),
    ("log_set_level", "true", "DISABLED, ERROR, WARNING, NOTICE (as INFO), INFO or DEBUG."),
    ("log_set_print_level", "true", "The same: there is one log, on standard error."),
    (
        "notify_get_notifications",
        "[{type, ctx, id}]",
        "Events from number `id` on, at most `max`; the newest 1024 are kept.",
    ),
    ("notify_get_types", "[type]", "Types of events."),
    ("rpc_get_methods", "[name]", "Methods there are; with `current`, those that may be called now."),
    ("spdk_get_version", "{version, fields}", "Version of this program."),
    (
        "spdk_kill_instance",
        "true",
        "Sends a signal to this program. SIGINT, SIGTERM and SIGHUP end it in order, unless a device is in use that would go with it; SIGINT or SIGTERM once more ends it all the same.",
    ),
    ("thread_get_io_channels", "{tick_rate, threads}", "Open channels of bdevs by thread."),
    ("thread_get_pollers", "{tick_rate, threads}", "Pollers of every thread with their counts."),
    (
        "thread_get_stats",
        "{tick_rate, threads}",
        "Busy and idle time of every thread: the reactors, and last the control thread.",
    ),
];

/// `docs/rpc.md` with the methods of `subsystems` and those of every program.
///
/// # Panics
/// If a method has no text or a text no method: a mistake in the program, found by its tests.
pub fn markdown(subsystems: Vec<Box<dyn Subsystem>>) -> String {
    let subsystems: Vec<Rc<dyn Subsystem>> = subsystems.into_iter().map(Rc::from).collect();
    let table = super::table(&subsystems);
    let methods: Vec<MethodInfo<'_>> = table.methods().filter(|m| !m.foreign).collect();
    let texts: Vec<&MethodText> = TEXTS.iter().chain(subsystems.iter().flat_map(|s| s.texts())).collect();
    for (name, ..) in &texts {
        assert!(methods.iter().any(|m| m.name == *name), "a text for {name}, which is no method");
    }
    let mut out = String::from(HEAD);
    let mut group = "";
    for m in &methods {
        let prefix = m.name.split('_').next().unwrap_or_default();
        if prefix != group {
            group = prefix;
            let _ = write!(
                out,
                "\n## {group}\n\n| Method | Parameters | Result | When | |\n|---|---|---|---|---|\n"
            );
        }
        let (_, result, text) = texts
            .iter()
            .find(|(name, ..)| *name == m.name)
            .unwrap_or_else(|| panic!("no text for {}", m.name));
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} | {text} |",
            m.name,
            params(m),
            escape(result),
            when(m.states)
        );
    }
    out
}

const HEAD: &str = "\
# JSON-RPC methods

Made by `cargo run -p rnbd-target --example rpc_doc > docs/rpc.md`; a test compares.

Names, parameters and results are SPDK's where SPDK has the method, so its `spdk-rpc` and `rpc.py` work with
`-s /var/tmp/rnbd-target.sock`. Parameters are strict: unknown ones are refused. `*`: obligatory. When: in which state
a method may be called; *startup* is before `framework_start_init` (`--wait-for-rpc`), *runtime* after.

Errors carry SPDK's codes (`-errno`, -32602 for wrong parameters, -32601 for unknown methods, -1 for the wrong state),
a message that says what would be right, and `data` with `method`, `param`, `object`, `errno_name`, `hint`.
";

fn params(m: &MethodInfo<'_>) -> String {
    let param = |p: &rpc::Param| {
        let star = if p.required { "*" } else { "" };
        format!("`{}`{star}: {}", p.name, escape(&p.kind.to_string()))
    };
    m.params.iter().map(param).collect::<Vec<_>>().join(", ")
}

/// A bar would end the cell.
fn escape(text: &str) -> String {
    text.replace('|', "\\|")
}

fn when(states: States) -> &'static str {
    match states {
        States::STARTUP => "startup",
        States::RUNTIME => "runtime",
        _ => "always",
    }
}

//! The RPC methods: names, parameters and results as SPDK's `ublk_*`.

use engine::{App, MethodText};
use reactor::CpuMask;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::Value;

use super::disk::DiskSpec;
use super::leftover::Wish;
use super::start::MAX_ID;
use super::subsystem::target;
use super::target::Target;

/// SPDK's defaults.
const QUEUE_DEPTH: u32 = 128;
const NUM_QUEUES: u32 = 1;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method::<CreateTarget>("ublk_create_target", States::RUNTIME, create_target);
    t.method_without_params("ublk_destroy_target", States::RUNTIME, |app, r| {
        Target::send(&app.control, |target, cx| target.destroy(cx, r));
    });
    t.method::<StartDisk>("ublk_start_disk", States::RUNTIME, start_disk);
    t.method::<RecoverDisk>("ublk_recover_disk", States::RUNTIME, recover_disk);
    t.method::<StopDisk>("ublk_stop_disk", States::RUNTIME, stop_disk);
    t.method_sync::<GetDisks, _>("ublk_get_disks", States::RUNTIME, get_disks);
}

pub(super) const TEXTS: &[MethodText] = &[
    (
        "ublk_create_target",
        "true",
        "Opens the kernel's ublk driver (module ublk_drv, Linux 6.4 or later). `cpumask`: cores of the reactors that \
         serve disks, all if absent. `disable_user_copy`: let the kernel copy data into a buffer per tag instead of \
         copying it into pooled buffers. -EBUSY if there is a target.",
    ),
    ("ublk_destroy_target", "true", "Stops every ublk disk and closes the driver."),
    (
        "ublk_start_disk",
        "the number of the disk",
        "Makes a bdev /dev/ublkbN, N = `ublk_id`; without it, the disk that a crash of the program left of the same bdev, or \
         else the first number that is free. `queue_depth` is of each queue, 1 to 4096; queues are spread over the \
         reactors, and the kernel makes no more of them than there are CPUs. `read_only`: the disk refuses writes. A \
         disk of the same number and bdev that a crash of the program left is taken over, with the requests that wait \
         in the kernel.",
    ),
    (
        "ublk_recover_disk",
        "the number of the disk",
        "Takes over a ublk device whose server crashed, of this or another program, if it was made with user recovery; \
         the bdev must have its size and block size, and should have its contents.",
    ),
    (
        "ublk_stop_disk",
        "true",
        "Writes back what the host caches for the disk, lets its requests in flight end, and answers once the kernel has \
         deleted it. Requests that have not ended after 5 seconds, because a server is away or a disk does not answer, \
         fail. Refused (-EBUSY) while the disk is mounted, swap space, or part of another device. `force`: stops it all the \
         same, and at once; its users get I/O errors. Also removes a disk that a crash of the program left.",
    ),
    (
        "ublk_get_disks",
        "a list of disks",
        "Lists ublk disks: SPDK's fields, then `state` (starting, live, stopping), `read_only`, `user_copy`, `recovery` \
         (whether it outlives a crash of the program), and the `reactors` of its queues.",
    ),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateTarget {
    cpumask: Option<String>,
    #[serde(default)]
    disable_user_copy: bool,
}

fn create_target(app: &mut App, p: CreateTarget, r: Responder) {
    let mask = p.cpumask.map(|m| m.parse::<CpuMask>()).transpose();
    match mask {
        Err(e) => r.err(invalid("ublk_create_target", "cpumask", e.to_string())),
        Ok(mask) => Target::send(&app.control, move |target, cx| {
            target.create(cx, mask, !p.disable_user_copy, r);
        }),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StartDisk {
    bdev_name: String,
    ublk_id: Option<u32>,
    #[serde(default = "queue_depth")]
    queue_depth: u32,
    #[serde(default = "num_queues")]
    num_queues: u32,
    #[serde(default)]
    read_only: bool,
}

fn queue_depth() -> u32 {
    QUEUE_DEPTH
}

fn num_queues() -> u32 {
    NUM_QUEUES
}

fn start_disk(app: &mut App, p: StartDisk, r: Responder) {
    let chosen = p.ublk_id.is_some();
    match spec("ublk_start_disk", p) {
        Err(e) => r.err(e),
        Ok(spec) => Target::send(&app.control, move |target, cx| match chosen {
            true => target.start(cx, spec, Wish::Start, r),
            false => target.start_any(cx, spec, r),
        }),
    }
}

fn spec(method: &str, p: StartDisk) -> Result<DiskSpec, RpcError> {
    let range = |param, value: u32, most: u16| match u16::try_from(value) {
        Ok(n) if (1..=most).contains(&n) => Ok(n),
        _ => Err(invalid(method, param, format!("{param} {value}: 1 to {most} is right"))),
    };
    let id = p.ublk_id.unwrap_or_default();
    if id > MAX_ID {
        let text = format!("ublk_id {id}: 0 to {MAX_ID} is right");
        return Err(invalid(method, "ublk_id", text));
    }
    Ok(DiskSpec {
        queue_depth: range("queue_depth", p.queue_depth, ublk_poll::MAX_QUEUE_DEPTH)?,
        num_queues: range("num_queues", p.num_queues, ublk_poll::MAX_QUEUES)?,
        id,
        bdev_name: p.bdev_name,
        read_only: p.read_only,
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecoverDisk {
    bdev_name: String,
    ublk_id: u32,
}

fn recover_disk(app: &mut App, p: RecoverDisk, r: Responder) {
    let start = StartDisk {
        bdev_name: p.bdev_name,
        ublk_id: Some(p.ublk_id),
        queue_depth: QUEUE_DEPTH,
        num_queues: NUM_QUEUES,
        read_only: false,
    };
    match spec("ublk_recover_disk", start) {
        Err(e) => r.err(e),
        Ok(spec) => Target::send(&app.control, move |target, cx| target.start(cx, spec, Wish::Recover, r)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StopDisk {
    ublk_id: u32,
    #[serde(default)]
    force: bool,
}

fn stop_disk(app: &mut App, p: StopDisk, r: Responder) {
    Target::send(&app.control, move |target, cx| target.stop_disk(cx, p.ublk_id, p.force, r));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetDisks {
    ublk_id: Option<u32>,
}

fn get_disks(app: &mut App, p: GetDisks) -> Result<Vec<Value>, RpcError> {
    target(app)?.borrow().rows(p.ublk_id)
}

fn invalid(method: &str, param: &str, text: String) -> RpcError {
    RpcError::invalid_params(format!("{method}: {text}")).param(param)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(params: Value) -> Result<DiskSpec, RpcError> {
        spec("m", serde_json::from_value(params).unwrap())
    }

    #[test]
    fn spdks_defaults_and_limits() {
        let s = parse(json!({"bdev_name": "A", "ublk_id": 1})).unwrap();
        assert_eq!((s.id, s.queue_depth, s.num_queues, s.read_only), (1, 128, 1, false));
        for (param, value) in
            [("queue_depth", 0), ("queue_depth", 4097), ("num_queues", 0), ("num_queues", 70000)]
        {
            let mut params = json!({"bdev_name": "A", "ublk_id": 1});
            params[param] = value.into();
            let e = parse(params).unwrap_err();
            assert_eq!(e.code, -32602);
            assert!(e.message.contains(param), "{}", e.message);
        }
        // The kernel would take this as "choose one".
        assert!(parse(json!({"bdev_name": "A", "ublk_id": u32::MAX})).is_err());
    }

    #[test]
    fn every_method_has_its_text() {
        let mut table = MethodTable::<App>::new();
        register(&mut table);
        let names = table.methods().map(|m| m.name.to_string());
        let mut methods: Vec<String> = names.filter(|name| name.starts_with("ublk_")).collect();
        let mut texts: Vec<String> = TEXTS.iter().map(|(name, ..)| (*name).to_owned()).collect();
        methods.sort();
        texts.sort();
        assert_eq!(methods, texts);
    }
}

//! `framework_get_reactors`, `thread_*`, the idle policy and the scheduler: what spdk_top shows.
//!
//! A tick is a nanosecond. Each reactor counts as one thread of SPDK, pinned to its core; the control thread, which
//! belongs to no core, is the last one.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reactor::{CpuMask, Handle, IdlePolicy, PollerStats, Turn};
use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::{Value, json};

use super::unsupported;
use crate::app::App;

/// Ticks per second.
pub(super) const TICK_RATE: u64 = 1_000_000_000;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_without_params("framework_get_reactors", States::RUNTIME, |app, r| r.ok(reactors(app)));
    t.method_without_params("framework_get_scheduler", States::RUNTIME, |app, r| r.ok(scheduler(app)));
    t.method_sync::<SetScheduler, _>("framework_set_scheduler", States::ANY, |_, p| set_scheduler(&p));
    t.method_without_params("thread_get_stats", States::RUNTIME, |app, r| {
        ask_threads(app, r, thread_stats);
    });
    t.method_without_params("thread_get_pollers", States::RUNTIME, |app, r| {
        ask_threads(app, r, thread_pollers);
    });
    t.method_without_params("thread_get_io_channels", States::RUNTIME, |app, r| r.ok(io_channels(app)));
    t.method_sync::<GetIdlePolicy, _>("framework_get_idle_policy", States::ANY, get_idle_policy);
    t.method_sync::<SetIdlePolicy, _>("framework_set_idle_policy", States::ANY, set_idle_policy);
}

/// Every thread with its id.
fn threads(app: &App) -> Vec<(u64, Handle)> {
    (1..).zip(app.reactors.iter().chain([&app.control]).cloned()).collect()
}

/// Id of the thread `name`, 0 if it is none of ours.
pub(super) fn thread_id(app: &App, name: &str) -> u64 {
    threads(app).iter().find(|(_, h)| h.name() == name).map_or(0, |(id, _)| *id)
}

/// Cores a thread may run on, as `0x…`.
fn cpumask(handle: &Handle) -> String {
    let cores = match handle.core() {
        Some(core) => vec![core],
        // The control thread asks for itself: handlers run on it.
        None => {
            let set = rustix::thread::sched_getaffinity(None).unwrap_or_default();
            (0..rustix::thread::CpuSet::MAX_CPU).filter(|c| set.is_set(*c)).collect()
        }
    };
    let list: Vec<String> = cores.iter().map(usize::to_string).collect();
    format!("[{}]", list.join(",")).parse::<CpuMask>().map(|m| m.to_hex()).unwrap_or_default()
}

/// Makes a thread's row from its id, itself and its pollers.
type Row = fn(u64, &Handle, &[PollerStats]) -> Value;

/// Rows of all threads. Dropped by the last thread that was asked, it answers, so that a thread that stopped instead
/// of adding its row does not hold the others up.
struct Gather {
    rows: Mutex<Vec<(u64, Value)>>,
    control: Handle,
    responder: Mutex<Option<Responder>>,
}

impl Drop for Gather {
    fn drop(&mut self) {
        let mut rows = std::mem::take(self.rows.get_mut().unwrap_or_else(PoisonError::into_inner));
        rows.sort_by_key(|(id, _)| *id);
        let rows: Vec<Value> = rows.into_iter().map(|(_, row)| row).collect();
        if let Some(r) = self.responder.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            let answer = json!({"tick_rate": TICK_RATE, "threads": rows});
            App::send(&self.control, move |_, _| r.ok(answer));
        }
    }
}

/// Asks every thread for its pollers, and answers with one row per thread made from them.
fn ask_threads(app: &mut App, r: Responder, row: Row) {
    let gather = Arc::new(Gather {
        rows: Mutex::default(),
        control: app.control.clone(),
        responder: Mutex::new(Some(r)),
    });
    for (id, handle) in threads(app) {
        let gather = gather.clone();
        handle.send(move |cx: &mut Turn<'_>| {
            let row = row(id, cx.handle(), cx.poller_stats());
            gather.rows.lock().unwrap_or_else(PoisonError::into_inner).push((id, row));
        });
    }
}

fn thread_stats(id: u64, handle: &Handle, pollers: &[PollerStats]) -> Value {
    let stats = handle.stats();
    let timed = pollers.iter().filter(|p| p.period_ns.is_some()).count();
    json!({
        "name": handle.name(), "id": id, "cpumask": cpumask(handle), "busy": stats.busy_ns, "idle": stats.idle_ns,
        "active_pollers_count": pollers.len() - timed, "timed_pollers_count": timed, "paused_pollers_count": 0,
    })
}

fn thread_pollers(id: u64, handle: &Handle, pollers: &[PollerStats]) -> Value {
    let row = |p: &PollerStats| {
        let mut row = json!({
            "name": p.name, "id": p.id, "state": "waiting", "run_count": p.run_count, "busy_count": p.busy_count,
        });
        if let Some(ns) = p.period_ns {
            row["period_ticks"] = ns.into();
        }
        row
    };
    let rows = |timed: bool| pollers.iter().filter(move |p| p.period_ns.is_some() == timed).map(row);
    json!({
        "name": handle.name(), "id": id, "active_pollers": rows(false).collect::<Vec<_>>(),
        "timed_pollers": rows(true).collect::<Vec<_>>(), "paused_pollers": [],
    })
}

/// Open bdev channels by thread; `ref` counts those of one bdev on one thread.
fn io_channels(app: &App) -> Value {
    let mut rows: Vec<(String, Vec<Value>)> =
        threads(app).iter().map(|(_, h)| (h.name().to_owned(), Vec::new())).collect();
    for status in app.manager.list() {
        let bdev = &status.bdev.info().name;
        // Gone since the list was made: then it has no channels either.
        let Ok(channels) = app.manager.channel_stats(bdev) else { continue };
        for (thread, open) in &mut rows {
            match channels.iter().filter(|(name, _)| name == thread).count() {
                0 => {}
                count => open.push(json!({"name": bdev, "ref": count})),
            }
        }
    }
    let threads: Vec<Value> =
        rows.into_iter().map(|(name, open)| json!({"name": name, "io_channels": open})).collect();
    json!({"tick_rate": TICK_RATE, "threads": threads})
}

fn reactors(app: &App) -> Value {
    let proc_stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let elapsed = app.started.elapsed().as_nanos() as u64;
    let row = |(id, handle): (u64, Handle)| {
        let core = handle.core()?;
        let stats = handle.stats();
        let [usr, sys, irq] = core_times(&proc_stat, core);
        Some(json!({
            "lcore": core, "numa_id": numa_node(core), "tid": stats.tid, "busy": stats.busy_ns, "idle": stats.idle_ns,
            "in_interrupt": stats.asleep, "irq": irq, "sys": sys, "usr": usr,
            "lw_threads": [{
                "name": handle.name(), "id": id, "cpumask": cpumask(&handle), "elapsed": elapsed,
            }],
        }))
    };
    let rows: Vec<Value> = threads(app).into_iter().filter_map(row).collect();
    json!({"tick_rate": TICK_RATE, "pid": std::process::id(), "reactors": rows})
}

/// User, system and interrupt time of a core from `/proc/stat` (proc(5)), in clock ticks of the kernel.
fn core_times(proc_stat: &str, core: usize) -> [u64; 3] {
    let name = format!("cpu{core}");
    let line = proc_stat.lines().map(|l| l.split_ascii_whitespace()).find_map(|mut words| {
        (words.next() == Some(name.as_str()))
            .then(|| words.map(|w| w.parse().unwrap_or(0)).collect::<Vec<u64>>())
    });
    // user nice system idle iowait irq …
    let at = |i: usize| line.as_ref().and_then(|l| l.get(i)).copied().unwrap_or(0);
    [at(0), at(2), at(5)]
}

/// NUMA node of a core (Documentation/ABI/stable/sysfs-devices-node); 0 where the kernel has no nodes.
fn numa_node(core: usize) -> u32 {
    let Ok(dir) = std::fs::read_dir(format!("/sys/devices/system/cpu/cpu{core}")) else { return 0 };
    let node = |e: std::fs::DirEntry| e.file_name().to_str()?.strip_prefix("node")?.parse().ok();
    dir.flatten().find_map(node).unwrap_or(0)
}

/// Paths stay on the reactor that they were placed on.
fn scheduler(app: &App) -> Value {
    let first = app.cpumask.cores().first().copied().unwrap_or(0);
    json!({
        "scheduler_name": "static", "scheduler_period": 0, "isolated_core_mask": "0x0", "scheduling_core": first,
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetScheduler {
    name: String,
    #[serde(rename = "period")]
    _period: Option<u64>,
    load_limit: Option<u8>,
    core_limit: Option<u8>,
    core_busy: Option<u8>,
    mappings: Option<String>,
}

fn set_scheduler(p: &SetScheduler) -> Result<bool, RpcError> {
    const METHOD: &str = "framework_set_scheduler";
    if p.name != "static" {
        let text = format!("{METHOD}: name: no scheduler '{}'; the only one is static", p.name);
        let error = RpcError::errno(22, text).method(METHOD).param("name").object("scheduler", &p.name);
        return Err(error.hint("paths are spread over the reactors when they connect; -m chooses the cores"));
    }
    let dynamic = [
        ("load_limit", p.load_limit.is_some()),
        ("core_limit", p.core_limit.is_some()),
        ("core_busy", p.core_busy.is_some()),
        ("mappings", p.mappings.is_some()),
    ];
    match dynamic.iter().find(|(_, given)| *given) {
        Some((param, _)) => {
            Err(unsupported(METHOD, param, "threads do not move between cores; leave it out"))
        }
        None => Ok(true),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetIdlePolicy {
    reactor: Option<usize>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Policy {
    Poll,
    Adaptive,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetIdlePolicy {
    policy: Policy,
    spin_us: Option<u64>,
    reactor: Option<usize>,
}

/// Spin time where the former policy had none.
const DEFAULT_SPIN: Duration = Duration::from_micros(100);

/// The reactors of `core`, or all of them.
fn chosen<'a>(app: &'a App, method: &str, core: Option<usize>) -> Result<Vec<&'a Handle>, RpcError> {
    let found: Vec<&Handle> = app.reactors.iter().filter(|h| core.is_none() || h.core() == core).collect();
    match core {
        Some(core) if found.is_empty() => {
            let text = format!("{method}: no reactor on core {core}; the cores are {}", app.cpumask.to_hex());
            let error = RpcError::errno(19, text).method(method).param("reactor");
            Err(error.object("reactor", core.to_string()).hint("framework_get_reactors lists them"))
        }
        _ => Ok(found),
    }
}

fn policy_row(handle: &Handle) -> Value {
    match handle.policy() {
        IdlePolicy::Poll => json!({"policy": "poll"}),
        IdlePolicy::Adaptive { spin } => json!({"policy": "adaptive", "spin_us": spin.as_micros() as u64}),
    }
}

fn with_reactor(mut row: Value, handle: &Handle) -> Value {
    row["reactor"] = handle.core().into();
    row
}

fn get_idle_policy(app: &mut App, p: GetIdlePolicy) -> Result<Vec<Value>, RpcError> {
    let reactors = chosen(app, "framework_get_idle_policy", p.reactor)?;
    Ok(reactors.into_iter().map(|h| with_reactor(policy_row(h), h)).collect())
}

fn set_idle_policy(app: &mut App, p: SetIdlePolicy) -> Result<bool, RpcError> {
    const METHOD: &str = "framework_set_idle_policy";
    if let (Policy::Poll, Some(_)) = (p.policy, p.spin_us) {
        let text = format!("{METHOD}: spin_us goes with policy adaptive only; leave it out");
        return Err(RpcError::errno(22, text).method(METHOD).param("spin_us"));
    }
    for handle in chosen(app, METHOD, p.reactor)? {
        let policy = match (p.policy, p.spin_us.map(Duration::from_micros), handle.policy()) {
            (Policy::Poll, ..) => IdlePolicy::Poll,
            (Policy::Adaptive, Some(spin), _) => IdlePolicy::Adaptive { spin },
            (Policy::Adaptive, None, IdlePolicy::Adaptive { spin }) => IdlePolicy::Adaptive { spin },
            (Policy::Adaptive, None, IdlePolicy::Poll) => IdlePolicy::Adaptive { spin: DEFAULT_SPIN },
        };
        handle.set_policy(policy);
    }
    Ok(true)
}

/// One call if all reactors agree, so that the file suits any cpumask; else one per reactor.
pub(super) fn config(app: &App) -> Vec<Value> {
    let call = |params: Value| json!({"method": "framework_set_idle_policy", "params": params});
    let rows: Vec<Value> = app.reactors.iter().map(policy_row).collect();
    match rows.first() {
        Some(first) if rows.iter().all(|r| r == first) => vec![call(first.clone())],
        _ => rows.into_iter().zip(&app.reactors).map(|(row, h)| call(with_reactor(row, h))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_times_are_of_the_core() {
        let stat =
            "cpu  9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7\ncpu1 11 12 13 14 15 16 17\ncpu11 0 0 0 0 0 0\nintr 1\n";
        assert_eq!(core_times(stat, 1), [11, 13, 16]);
        assert_eq!(core_times(stat, 0), [1, 3, 6]);
        assert_eq!(core_times(stat, 7), [0, 0, 0]);
    }
}

//! The control thread's part of a run. `assignment.rs` is what it sends to the reactors.

mod assignment;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bdev::{Descriptor, Mode};
use engine::app::OnReady;
use engine::{App, Error, MethodText, ShutdownDone, Subsystem};
use reactor::{Handle, Turn};
use rpc::MethodTable;
use serde_json::Value;

use super::collect::Collector;
use super::options::{Job, RunOptions, Workload};
use super::target::Target;
use super::worker::{Said, Shared, Spares};
use crate::result::RunResult;

use assignment::{Assignment, places};

/// Gets the result of a run; an error ends the program with it.
pub type Report = Box<dyn FnOnce(&RunResult) -> Result<(), String>>;

/// Workers begin this long after the last of them is ready, so that all have heard of it.
const HEAD_START: Duration = Duration::from_millis(5);
/// A remote bdev is asked for again after this.
const LOOK: Duration = Duration::from_millis(50);
/// What is in flight when the time is over must have been answered this long afterwards.
const ANSWER: Duration = Duration::from_secs(30);

/// Subsystem "perf": runs the jobs once the program is ready, and ends it. It is registered last, so that its channels are
/// gone before the bdevs are.
pub struct Perf(Rc<RefCell<Run>>);

/// A run, between its beginning and its report.
struct Run {
    options: RunOptions,
    shared: Arc<Shared>,
    report: Option<Report>,
    collector: Option<Collector>,
    /// By worker: its reactor.
    reactors: Vec<Handle>,
    /// Workers that have not ended, prepared or not.
    left: usize,
    /// Workers that cannot begin yet.
    unready: usize,
    /// Of a shutdown that waits for the workers.
    ending: Option<ShutdownDone>,
}

impl Perf {
    /// The subsystem, and what starts it.
    pub fn new(options: RunOptions, report: Report) -> (Self, OnReady) {
        let ns = |d: Duration| d.as_nanos() as u64;
        let shared = Arc::new(Shared {
            base: Instant::now(),
            go: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            warm_up: ns(options.warm_up),
            time: ns(options.time),
            interval: ns(options.interval),
            keep_going: options.keep_going,
        });
        let run = Rc::new(RefCell::new(Run {
            options,
            shared,
            report: Some(report),
            collector: None,
            reactors: Vec::new(),
            left: 0,
            unready: 0,
            ending: None,
        }));
        let state = run.clone();
        let start = move |app: &mut App, _: &mut Turn<'_>| {
            app.set_state(state);
            make_next(app, 0);
        };
        (Self(run), Box::new(start))
    }
}

fn with_run<R>(app: &App, f: impl FnOnce(&mut Run) -> R) -> Option<R> {
    app.state::<Run>().map(|run| f(&mut run.borrow_mut()))
}

fn fail(app: &App, text: String) {
    app.later(move |app, cx| app.fail(cx, Error::Call(text)));
}

/// Name of the bdev that stands for a job's target: jobs of one target share it.
fn bdev_name(jobs: &[Job], index: usize) -> Option<String> {
    match &jobs[index].target {
        Target::Bdev(name) => Some(name.clone()),
        Target::Vhost(_) => None,
        target => jobs.iter().position(|j| j.target == *target).map(|first| format!("perf{first}")),
    }
}

/// Makes the bdevs of remote targets from job `index` on, one after the other, then goes on.
fn make_next(app: &mut App, index: usize) {
    if app.shutting_down() {
        return;
    }
    let call = with_run(app, |run| {
        let jobs = &run.options.jobs;
        jobs.get(index).map(|job| {
            let name = bdev_name(jobs, index).filter(|n| *n == format!("perf{index}"));
            let writes = |j: &Job| run.options.fill || j.workload.changes();
            let writes = jobs.iter().any(|j| j.target == job.target && writes(j));
            (job.target.to_string(), name.and_then(|name| job.target.call(&name, !writes)))
        })
    });
    match call.flatten() {
        None => {
            let until = Instant::now() + with_run(app, |run| run.options.patience).unwrap_or_default();
            open_all(app, until);
        }
        Some((_, None)) => make_next(app, index + 1),
        Some((target, Some((method, params)))) => {
            app.call(method, &params, move |app, _, answer| match answer {
                Ok(_) => make_next(app, index + 1),
                Err(e) => {
                    let text = e.message.trim_start_matches(&format!("{method}: ")).to_owned();
                    fail(app, format!("{target}: {text}"));
                }
            });
        }
    }
}

/// Opens the bdevs. One that a server has not brought yet is waited for.
fn open_all(app: &mut App, until: Instant) {
    if app.shutting_down() {
        return;
    }
    let manager = app.manager.clone();
    let opened = with_run(app, |run| {
        let jobs = &run.options.jobs;
        let open = |i: usize| {
            let writes = run.options.fill || jobs[i].workload.changes();
            let mode = if writes { Mode::ReadWrite } else { Mode::ReadOnly };
            // Requests on a bdev that has been removed fail, and the run with them.
            bdev_name(jobs, i).map(|name| manager.open(&name, mode, Box::new(|_| ()))).transpose()
        };
        (0..jobs.len()).map(open).collect::<Result<Vec<_>, _>>()
    });
    match opened {
        None => {}
        Some(Ok(descriptors)) => {
            if let Err(text) = prepare_all(app, descriptors) {
                fail(app, text);
            }
        }
        Some(Err(bdev::Error::NotFound { .. })) if Instant::now() < until => app.later(move |_, cx| {
            let control = cx.handle().clone();
            cx.after(LOOK, move |_| App::send(&control, move |app, _| open_all(app, until)));
        }),
        Some(Err(bdev::Error::NotFound { name })) => {
            let all: Vec<String> = app.manager.list().iter().map(|b| b.bdev.info().name.clone()).collect();
            let there = if all.is_empty() { "none; -c FILE makes some".into() } else { all.join(", ") };
            fail(app, format!("no bdev named {name}; there is {there}"));
        }
        Some(Err(e)) => fail(app, e.to_string()),
    }
}

/// Sends every worker to its reactor, to get its device and memory there.
fn prepare_all(app: &mut App, descriptors: Vec<Option<Descriptor>>) -> Result<(), String> {
    let (registry, reactors, control) =
        (app.manager.registry().clone(), app.reactors.clone(), app.control.clone());
    let cores = app.cpumask.cores().to_vec();
    let run_number = uuid::Uuid::new_v4().as_u128() as u32;
    let Some(state) = app.state::<Run>() else { return Ok(()) };
    let mut run = state.borrow_mut();
    let places = places(&run.options, &cores)?;
    let mut assignments = Vec::new();
    let mut collector = Collector::new(&run.options);
    for ((index, job), descriptor) in run.options.jobs.iter().enumerate().zip(descriptors) {
        for (share, place) in places[index].iter().enumerate() {
            let worker = collector.add(index, cores[*place]);
            let seed = run.options.seed.wrapping_add((index as u64) << 32);
            assignments.push((
                *place,
                Assignment {
                    job: job.clone(),
                    share: (share, places[index].len()),
                    worker,
                    descriptor: descriptor.clone(),
                    seed,
                    run: run_number,
                    fill: run.options.fill,
                },
            ));
        }
    }
    run.collector = Some(collector);
    (run.left, run.unready) = (assignments.len(), assignments.len());
    run.reactors = assignments.iter().map(|(place, _)| reactors[*place].clone()).collect();
    for (place, assignment) in assignments {
        let (registry, shared, control) = (registry.clone(), run.shared.clone(), control.clone());
        reactors[place].send(move |cx| {
            let worker = assignment.worker;
            let prepared = assignment.prepare(cx, &registry, shared, &control);
            App::send(&control, move |app, cx| self::prepared(app, cx, worker, prepared));
        });
    }
    Ok(())
}

/// A worker is there, or will not be.
fn prepared(app: &mut App, cx: &mut Turn<'_>, worker: usize, outcome: Result<u64, String>) {
    match outcome {
        Ok(used) => {
            let fills = with_run(app, |run| {
                run.collector.iter_mut().for_each(|c| c.uses(worker, used));
                run.options.fill
            });
            if fills == Some(false) {
                ready(app, cx);
            }
        }
        Err(text) => {
            with_run(app, |run| run.left -= 1);
            fail(app, text);
            over(app);
        }
    }
}

/// A worker may begin; the last one begins them all.
fn ready(app: &App, cx: &mut Turn<'_>) {
    let go = with_run(app, |run| {
        run.unready -= 1;
        let go = run.unready == 0 && !run.shared.stop.load(Ordering::Relaxed);
        if go {
            let at = (run.shared.base.elapsed() + HEAD_START).as_nanos() as u64;
            run.shared.go.store(at, Ordering::Relaxed);
            run.wake();
        }
        go
    });
    if go == Some(true) {
        watch_end(app, cx);
    }
}

/// What a device never answers does not keep the program for ever.
fn watch_end(app: &App, cx: &mut Turn<'_>) {
    let times = with_run(app, |run| {
        let verifies = run.options.jobs.iter().any(|j| j.workload == Workload::Verify);
        (!verifies).then(|| run.options.warm_up + run.options.time + ANSWER)
    });
    let Some(Some(end)) = times else { return };
    let control = cx.handle().clone();
    cx.after(end, move |_| {
        App::send(&control, |app, _| {
            if let Some(left @ 1..) = with_run(app, |run| run.left) {
                let text = format!(
                    "{left} workers have requests that were not answered within {} s",
                    ANSWER.as_secs()
                );
                fail(app, text);
            }
        });
    });
}

fn heard(app: &mut App, cx: &mut Turn<'_>, worker: usize, said: Said) {
    if matches!(said, Said::Filled) {
        return ready(app, cx);
    }
    let ended = with_run(app, |run| {
        let Some(collector) = &mut run.collector else { return false };
        match said {
            Said::Filled => false,
            Said::Sample(mut sample) => {
                collector.sample(&sample);
                sample.clear();
                run.reactors[worker].send(move |cx| Spares::give_back(cx, sample));
                false
            }
            Said::Done(outcome) => {
                collector.done(*outcome);
                run.left -= 1;
                true
            }
        }
    });
    if ended == Some(true) {
        over(app);
    }
}

/// A worker has gone: if it was the last one, the run is over.
fn over(app: &App) {
    let finished = with_run(app, |run| {
        if run.left > 0 {
            return None;
        }
        let ending = run.ending.take();
        let measured = run.shared.go.load(Ordering::Relaxed) > 0;
        // A run that was stopped before it began has nothing to report but what went wrong.
        let report = run.report.take().filter(|_| measured);
        Some((ending, report, run.collector.take()?.result(&run.options)))
    });
    let Some(Some((ending, report, result))) = finished else { return };
    let failed = report.and_then(|report| report(&result).err());
    match failed.or_else(|| result.complaint()) {
        Some(text) => fail(app, text),
        None => app.later(|app, cx| {
            if !app.shutting_down() {
                app.shutdown(cx);
            }
        }),
    }
    // Behind the messages above, so that a failure is known before the program ends.
    app.later(move |_, _| drop(ending));
}

impl Run {
    /// Makes reactors that sleep look at what has changed.
    fn wake(&self) {
        self.reactors.iter().for_each(|r| r.send(|_| ()));
    }
}

impl Subsystem for Perf {
    fn name(&self) -> &'static str {
        "perf"
    }

    fn methods(&self, _: &mut MethodTable<App>) {}

    fn texts(&self) -> &'static [MethodText] {
        &[]
    }

    fn initialise(&self, _: &mut App, _: &mut Turn<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn config(&self, _: &App) -> Vec<Value> {
        Vec::new()
    }

    /// Ends the run: what was measured until now is reported.
    fn shutdown(&self, _: &mut App, _: &mut Turn<'_>, done: ShutdownDone) {
        let mut run = self.0.borrow_mut();
        if run.left == 0 {
            return done.complete();
        }
        run.shared.stop.store(true, Ordering::Relaxed);
        run.wake();
        run.ending = Some(done);
    }

    /// Requests are not answered: a channel cannot be dropped before they are, so the process ends as it is.
    fn abort(&self, _: &mut App, _: &mut Turn<'_>) {
        let mut run = self.0.borrow_mut();
        let result = run.collector.take().map(|c| c.result(&run.options));
        if let Some((report, result)) = run.report.take().zip(result)
            && let Err(e) = report(&result)
        {
            eprintln!("rnbd-perf: {e}");
        }
        eprintln!("rnbd-perf: the device does not answer; its requests are given up");
        std::process::exit(1);
    }
}

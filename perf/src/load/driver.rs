//! The control thread of a run.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use iobuf::{MapError, Registry};
use reactor::{Handle, IdlePolicy, Reactor, SetupError, Team, Turn};
use rnbd_initiator::client::{CallError, Device, Event, Initiator, RnbdLane};
use rnbd_proto::open::AccessMode;
use rtrs_poll::client::{ControlError, Event as RtrsEvent, PathError, Session};
use verbs::Cm;

use super::options::{LoadOptions, OptionsError};
use super::report::{PathReport, Report, Totals, Verified};
use super::worker::{Start, Worker, WorkerResult};
use super::workload::Workload;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Reactors.
    #[error(transparent)]
    Reactor(#[from] SetupError),
    /// Thread or descriptor.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
    /// Options that no session can have.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The session did not come up, or was lost.
    #[error("{server}: {error}")]
    Path {
        /// Where.
        server: String,
        /// Why.
        error: PathError,
    },
    /// The server does not speak RNBD.
    #[error("{server}: SESS_INFO: {error}")]
    SessInfo {
        /// Where.
        server: String,
        /// Why.
        error: CallError,
    },
    /// The device could not be opened.
    #[error("device '{device}': {error}")]
    Open {
        /// Which.
        device: String,
        /// Why.
        error: CallError,
    },
    /// Options that do not fit the device.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Buffers.
    #[error("no memory for the buffers: {0}")]
    Memory(#[from] MapError),
    /// [`Stopper::stop`] before there was anything to report.
    #[error("interrupted before the load began")]
    Interrupted,
}

/// Ends a run early, from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(Handle);

impl Stopper {
    /// The load ends now, and the report is of what was measured until then. A verifying run skips its last pass.
    pub fn stop(&self) {
        self.0.send(|cx| with_driver(cx, |d, cx| d.interrupt(cx)));
    }
}

/// Everything of a run on the control thread.
struct Driver {
    options: LoadOptions,
    handles: Vec<Handle>,
    initiator: Rc<RefCell<Initiator<Worker>>>,
    registry: Arc<Registry>,
    up: Option<Arc<Session>>,
    /// Why the last path was lost.
    lost: Option<PathError>,
    device: Option<Device>,
    /// Blocks of the run.
    blocks: u64,
    workers: usize,
    results: Vec<WorkerResult>,
    outcome: Option<Result<Report, LoadError>>,
}

/// How results find the driver.
struct DriverCell(Rc<RefCell<Driver>>);

/// Runs the load and returns what was measured, through `cm`, whose provider the paths of `options.session` name. Uses this thread
/// as control thread. `started` gets the means to end it early.
///
/// # Errors
/// [`LoadError`]. Failed requests and mismatches are no errors of the run: see [`Report::is_good`].
pub fn run(
    options: LoadOptions,
    cm: Box<dyn Cm>,
    started: impl FnOnce(Stopper),
) -> Result<Report, LoadError> {
    let mut control = Reactor::new("control", None, IdlePolicy::Adaptive { spin: Duration::ZERO })?;
    let team = Team::start(&options.cores, options.idle)?;
    let stopper = Stopper(control.handle());
    let driver = control.setup(|cx| begin(cx, options, team.handles(), cm));
    let outcome = driver.and_then(|driver| {
        started(stopper);
        control.run();
        driver.borrow_mut().outcome.take().expect("the control thread stops only when there is an outcome")
    });
    drop(team);
    outcome
}

fn begin(
    cx: &mut Turn<'_>,
    options: LoadOptions,
    handles: &[Handle],
    cm: Box<dyn Cm>,
) -> Result<Rc<RefCell<Driver>>, LoadError> {
    let registry = Registry::new();
    let heard = |cx: &mut Turn<'_>, event| with_driver(cx, |d, cx| d.event(cx, event));
    let initiator = Initiator::install(cx, handles, registry.clone(), |_| Worker::default(), heard);
    initiator.borrow().client().borrow_mut().add_cm(cx, cm)?;
    let session = options.session.clone();
    let driver = Rc::new(RefCell::new(Driver {
        options,
        handles: handles.to_vec(),
        initiator: initiator.clone(),
        registry,
        up: None,
        lost: None,
        device: None,
        blocks: 0,
        workers: 0,
        results: Vec::new(),
        outcome: None,
    }));
    cx.set_local(Rc::new(DriverCell(driver.clone())));
    initiator.borrow_mut().create_session(cx, session)?;
    Ok(driver)
}

fn with_driver(cx: &mut Turn<'_>, f: impl FnOnce(&mut Driver, &mut Turn<'_>)) {
    if let Some(cell) = cx.local::<DriverCell>() {
        f(&mut cell.0.borrow_mut(), cx);
    }
}

impl Driver {
    fn event(&mut self, cx: &mut Turn<'_>, event: Event) {
        match event {
            Event::Ready { session, .. } if self.up.is_none() => {
                let id = session.id;
                self.up = Some(session);
                let mode =
                    if self.options.pattern.writes() { AccessMode::ReadWrite } else { AccessMode::ReadOnly };
                let done = |cx: &mut Turn<'_>, result| with_driver(cx, |d, cx| d.opened(cx, result));
                self.initiator.borrow_mut().open(cx, id, &self.options.device, mode, done);
            }
            Event::NotReady { why, .. } if self.up.is_none() && why != CallError::NotConnected => {
                let server = self.server();
                self.fail(cx, LoadError::SessInfo { server, error: why });
            }
            Event::Rtrs(RtrsEvent::PathDown { why, .. }) => self.lost = Some(why),
            Event::Rtrs(RtrsEvent::SessionDown { .. } | RtrsEvent::SessionStalled { .. }) => self.lose(cx),
            _ => {}
        }
    }

    fn server(&self) -> String {
        let servers: Vec<String> = self.options.session.paths.iter().map(|p| p.dst.to_string()).collect();
        servers.join(", ")
    }

    /// The session is gone, or never came.
    fn lose(&mut self, cx: &mut Turn<'_>) {
        let Some(error) = self.lost.clone() else { return };
        if let Some(Ok(report)) = &mut self.outcome {
            // The workers only saw that it ended.
            report.first_error = report.first_error.take().map(|first| format!("{first}: {error}"));
        }
        let server = self.server();
        self.fail(cx, LoadError::Path { server, error });
    }

    fn opened(&mut self, cx: &mut Turn<'_>, result: Result<Device, CallError>) {
        let started = match result {
            Ok(device) => {
                self.device = Some(device);
                self.start_workers(cx, device)
            }
            Err(error) => Err(LoadError::Open { device: self.options.device.clone(), error }),
        };
        if let Err(error) = started {
            self.fail(cx, error);
        }
    }

    fn start_workers(&mut self, cx: &Turn<'_>, device: Device) -> Result<(), LoadError> {
        let Some(up) = &self.up else { return Ok(()) };
        let (o, g) = (&self.options, device.geometry);
        let workers = up.reactors.len();
        let capacity = g.capacity_sectors() * 512;
        let blocks = o.blocks(workers, capacity, g.logical_block_size(), device.max_io_size)?;
        let run = uuid::Uuid::new_v4().as_u128() as u32;
        let share = |n: u64, i: usize| n * i as u64 / workers as u64;
        // All memory first, so that nothing runs if there is not enough.
        let mut starts = Vec::new();
        for i in 0..workers {
            let slots = (share(o.queue_depth.into(), i + 1) - share(o.queue_depth.into(), i)) as u32;
            let (first, end) = (share(blocks, i), share(blocks, i + 1));
            let control = cx.handle().clone();
            starts.push(Start {
                session: device.session,
                device,
                memory: self.registry.map(slots as usize * o.block_size as usize)?,
                slots,
                block_size: o.block_size,
                workload: Workload::new(o.pattern, o.read_percent, first, end - first, o.seed),
                warm_up: o.warm_up,
                time: o.time,
                seed: o.seed,
                run,
                done: Box::new(move |result| {
                    control.send(move |cx| with_driver(cx, |d, cx| d.worker_done(cx, result)));
                }),
            });
        }
        (self.blocks, self.workers) = (blocks, workers);
        // Before the first request, or that would have to wait.
        self.initiator.borrow().client().borrow_mut().refresh_memory();
        for (reactor, start) in up.reactors.iter().zip(starts) {
            RnbdLane::<Worker>::with(&self.handles[*reactor], move |_, worker, io| worker.start(io, start));
        }
        Ok(())
    }

    fn worker_done(&mut self, cx: &mut Turn<'_>, result: WorkerResult) {
        self.results.push(result);
        if self.results.len() < self.workers || self.outcome.is_some() {
            return;
        }
        let report = self.report(cx.now);
        self.outcome = report.map(Ok);
        let Some(device) = self.device else { return self.leave(cx) };
        // If the session is lost meanwhile, the answer says so, which is as good.
        self.initiator.borrow_mut().close(&device, |cx, _| with_driver(cx, |d, cx| d.leave(cx)));
    }

    fn interrupt(&mut self, cx: &mut Turn<'_>) {
        let Some(up) = self.up.as_ref().filter(|_| self.workers > 0) else {
            return self.fail(cx, LoadError::Interrupted);
        };
        for reactor in &up.reactors {
            RnbdLane::<Worker>::with(&self.handles[*reactor], |_, worker, io| worker.interrupt(io));
        }
    }

    fn fail(&mut self, cx: &mut Turn<'_>, error: LoadError) {
        self.outcome.get_or_insert(Err(error));
        self.leave(cx);
    }

    /// Ends the session, and with it this program's control thread.
    fn leave(&mut self, cx: &Turn<'_>) {
        self.initiator.borrow().client().borrow_mut().shutdown(cx, |cx| cx.handle().stop());
    }

    fn report(&mut self, now: Instant) -> Option<Report> {
        let o = &self.options;
        let session = self.initiator.borrow().client().borrow().session(now, self.up.as_ref()?.id)?;
        let (path, limits) = (session.paths.first()?, session.limits?);
        let path = PathReport {
            provider: path.provider.clone(),
            device: path.hca_name.clone().unwrap_or_default(),
            server: path.dst.to_string(),
            connections: session.connections,
            queue_depth: limits.queue_depth,
            max_io_size: limits.max_io_size,
            rotating_keys: path.rotating_keys,
            heartbeat_us: path.latency_ns as f64 / 1000.0,
        };
        let size = self.blocks * u64::from(o.block_size);
        let totals = add_up(std::mem::take(&mut self.results), o.pattern == super::Pattern::Verify)?;
        Some(Report::new(o, size, path, totals))
    }
}

fn add_up(results: Vec<WorkerResult>, verify: bool) -> Option<Totals> {
    let histogram = Histogram::new_from(&results.first()?.latencies);
    let mut t = Totals {
        histogram,
        reads: 0,
        errors: 0,
        first_error: None,
        busy: 0,
        seconds: 0.0,
        cpu_seconds: 0.0,
        reactor_cpu_seconds: Vec::new(),
        verify: None,
    };
    let mut v = Verified { blocks_checked: 0, blocks_checked_at_end: 0, mismatch: None };
    for r in results {
        t.histogram.add(&r.latencies).ok()?;
        t.reads += r.reads;
        t.errors += r.errors;
        t.busy += r.busy;
        t.first_error = t.first_error.or(r.first_error);
        t.seconds = t.seconds.max(r.seconds);
        // Every worker sees the whole process.
        t.cpu_seconds = t.cpu_seconds.max(r.process_cpu);
        t.reactor_cpu_seconds.push(r.thread_cpu);
        v.blocks_checked += r.checked;
        v.blocks_checked_at_end += r.checked_at_end;
        v.mismatch = v.mismatch.or(r.mismatch);
    }
    t.verify = verify.then_some(v);
    Some(t)
}

//! The running program: what the control thread owns, and its pollers.
//!
//! Start-up: reactors → RPC socket → start-up calls of the configuration → subsystems initialised → run-time calls →
//! ready. Shutdown: subsystems in reverse order, each when the former is done → reactors stopped → exit. The control
//! thread is a reactor too, unpinned and always ready to sleep.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{BdevStatus, Manager};
use iobuf::Registry;
use reactor::{CpuMask, Handle, IdlePolicy, Polled, Poller, Reactor, Team, Turn};
use rpc::{Config, MethodTable, Responder, RpcError};
use serde_json::Value;

use crate::isolation::Isolation;
use crate::log::LogControl;
use crate::methods;
use crate::notify::Notifications;
use crate::pending::Pending;
use crate::placement::Placement;
use crate::shutdown::{Ask, Shutdown};
use crate::startup::Startup;
use crate::state::StateMap;
use crate::subsystem::{BdevKind, Subsystem};

/// What the program is started with.
pub struct Options {
    /// The program's name, as it is called.
    pub program: &'static str,
    /// What joins the engine, in the order of initialisation.
    pub subsystems: Vec<Box<dyn Subsystem>>,
    /// Cores of the reactors.
    pub cpumask: CpuMask,
    /// RPC socket.
    pub rpc_socket: PathBuf,
    /// Configuration.
    pub config: Option<Config>,
    /// Wait for `framework_start_init` before initialising.
    pub wait_for_rpc: bool,
    /// Methods that the socket may call; `None`: all.
    pub rpcs_allowed: Option<Vec<String>>,
    /// Go on when a call of the configuration fails.
    pub ignore_init_errors: bool,
    /// Idle policy of the reactors at start.
    pub idle: IdlePolicy,
    /// Levels of the log.
    pub log: LogControl,
    /// Run once the configuration has been carried out, when the program is ready.
    pub on_ready: Option<OnReady>,
    /// A person waits at the terminal, and is told so who keeps the program from ending. `None`: a daemon, which logs it, and
    /// leaves devices in use to its next run where that is possible.
    pub on_refusal: Option<fn(&[String])>,
}

/// See [`Options::on_ready`].
pub type OnReady = Box<dyn FnOnce(&mut App, &mut Turn<'_>)>;

/// Why the program did not start or did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reactors.
    #[error(transparent)]
    Reactor(#[from] reactor::SetupError),
    /// RPC socket.
    #[error(transparent)]
    Rpc(#[from] rpc::ListenError),
    /// Configuration.
    #[error(transparent)]
    Config(#[from] rpc::ConfigError),
    /// A call of the configuration failed, or what the program was started for.
    #[error("{0}")]
    Call(String),
    /// `--rpcs-allowed`.
    #[error("--rpcs-allowed: unknown method {}; rpc_get_methods lists them all", .0.join(", "))]
    Allowed(Vec<String>),
    /// Rights could not be given up.
    #[error("{0}")]
    Isolation(String),
    /// Signals or descriptors.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}

/// What the control thread works on; the context of every RPC handler.
pub struct App {
    /// The program's name, as it is called.
    pub program: &'static str,
    /// Every bdev.
    pub manager: Arc<Manager>,
    /// All methods.
    pub table: Arc<MethodTable<App>>,
    /// Data reactors in order of their cores.
    pub reactors: Vec<Handle>,
    /// Users of `reactors` that the subsystems spread over them.
    pub placement: Placement,
    /// The control thread.
    pub control: Handle,
    /// Cores of `reactors`.
    pub cpumask: CpuMask,
    /// Ring of events for `notify_get_notifications`.
    pub notifications: Arc<Notifications>,
    /// Levels of the log.
    pub log: LogControl,
    /// When the program started.
    pub started: Instant,
    pub(crate) subsystems: Vec<Rc<dyn Subsystem>>,
    pub(crate) startup: Startup,
    pub(crate) shutdown: Shutdown,
    pub(crate) pending: Pending,
    /// Why the program ends with an error.
    pub(crate) failure: Option<Error>,
    pub(crate) on_refusal: Option<fn(&[String])>,
    state: StateMap,
}

/// How messages find the application on the control thread.
struct AppCell(Rc<RefCell<App>>);

impl App {
    /// Runs `f` on the control thread with the reactor's context, soon. For handlers that need it.
    pub fn later(&self, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        Self::send(&self.control, f);
    }

    /// Runs `f` on the control thread `control`.
    pub fn send(control: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        control.send(move |cx| {
            if let Some(cell) = cx.local::<AppCell>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }

    /// Calls a method as the configuration does; `done` gets the outcome, here, soon or when the method answers.
    pub fn call(
        &mut self,
        method: &str,
        params: &Value,
        done: impl FnOnce(&mut Self, &mut Turn<'_>, Result<Value, RpcError>) + Send + 'static,
    ) {
        let control = self.control.clone();
        let answered = move |outcome: rpc::Outcome| {
            Self::send(&control, move |app, cx| done(app, cx, outcome.map(|reply| reply.to_value())));
        };
        let table = self.table.clone();
        let params = Some(params).filter(|p| !p.is_null());
        table.call(self, method, params, Responder::new(method, answered));
    }

    /// The `T` that a subsystem keeps here, once it has been set.
    pub fn state<T: 'static>(&self) -> Option<Rc<RefCell<T>>> {
        self.state.get()
    }

    /// Keeps `value` for [`App::state`], instead of a former `T`.
    pub fn set_state<T: 'static>(&mut self, value: Rc<RefCell<T>>) {
        self.state.set(value);
    }

    /// Has a subsystem carry out a call of `method` about `bdev`, or about all bdevs, if a library below it has to. Gives the
    /// responder back if none does.
    pub(crate) fn call_about(
        &mut self,
        method: &str,
        params: &Value,
        bdev: Option<&BdevStatus>,
        responder: Responder,
    ) -> Option<Responder> {
        let mut responder = responder;
        for subsystem in self.subsystems.clone() {
            responder = subsystem.call_about(self, method, params.clone(), bdev, responder)?;
        }
        Some(responder)
    }

    /// What the subsystem that made this bdev says of it.
    pub(crate) fn bdev_kind(&self, bdev: &BdevStatus) -> Option<BdevKind> {
        self.subsystems.iter().find_map(|s| s.bdev_kind(bdev))
    }
}

/// Runs the configuration.
struct StartupPoller(Rc<RefCell<App>>);

impl Poller for StartupPoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll_startup(cx).into()
    }
}

struct RpcPoller(Rc<RefCell<App>>, rpc::Server<App>);

impl Poller for RpcPoller {
    fn poll(&mut self, _: &mut Turn<'_>) -> Polled {
        self.1.poll(&mut self.0.borrow_mut()).into()
    }

    fn deadline(&self) -> Option<Instant> {
        self.1.deadline()
    }
}

/// Signals of one meaning, as bytes in a socket pair.
struct SignalPoller(Rc<RefCell<App>>, Ask, std::os::unix::net::UnixStream);

impl Poller for SignalPoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        use std::io::Read;
        let mut byte = [0];
        let got = matches!(self.2.read(&mut byte), Ok(1));
        if got {
            self.0.borrow_mut().end(cx, self.1);
        }
        got.into()
    }
}

/// Runs the program on the calling thread until a signal or RPC ends it. `started` gets the control thread's handle.
///
/// # Errors
/// [`Error`], in words for the operator.
pub fn run(options: Options, started: impl FnOnce(&Handle)) -> Result<(), Error> {
    run_isolated(options, &Isolation::none(), started)
}

/// As [`run`], and gives up what `isolation` says before it has a second thread and before it opens what the configuration
/// names, but after the RPC socket.
///
/// # Errors
/// As for that.
pub fn run_isolated(
    options: Options,
    isolation: &Isolation,
    started: impl FnOnce(&Handle),
) -> Result<(), Error> {
    let manager = Manager::new(Registry::new());
    let mut options = options;
    let subsystems: Vec<Rc<dyn Subsystem>> =
        std::mem::take(&mut options.subsystems).into_iter().map(Rc::from).collect();
    let mut control = Reactor::new("control", None, IdlePolicy::Adaptive { spin: Duration::ZERO })?;
    let table = methods::table(&subsystems);
    if let Some(config) = &mut options.config {
        pass_over(config, &table, &subsystems, options.ignore_init_errors);
    }
    let table = prepare_table(table, options.rpcs_allowed.as_deref(), options.config.as_ref())?;
    let unconfigured = options.config.is_none() && !options.wait_for_rpc;
    options.config.iter().for_each(|config| mention_oddities(config, &subsystems));
    if options.config.iter().any(|config| exports(config, &subsystems)) {
        manager.note_export();
    }
    let rpc_server = rpc::Server::listen(&options.rpc_socket, table.clone())?;
    isolation.enter(&options.rpc_socket).map_err(Error::Isolation)?;
    options.log.start_writing();
    let team = Team::start(options.cpumask.cores(), options.idle)?;
    let notifications = Notifications::hook(&manager, control.handle());
    subsystems.iter().for_each(|s| options.log.add_flags(s.log_flags()));
    let app = Rc::new(RefCell::new(App {
        program: options.program,
        manager,
        table,
        reactors: team.handles().to_vec(),
        placement: Placement::new(team.handles()),
        control: control.handle(),
        cpumask: options.cpumask,
        notifications,
        log: options.log,
        started: Instant::now(),
        subsystems: subsystems.clone(),
        startup: Startup::new(
            options.config,
            options.ignore_init_errors,
            options.wait_for_rpc,
            options.on_ready.or_else(|| unconfigured.then(|| nothing_to_do(options.rpc_socket))),
        )?,
        shutdown: Shutdown::default(),
        pending: Pending::default(),
        failure: None,
        on_refusal: options.on_refusal,
        state: StateMap::default(),
    }));
    subsystems.iter().for_each(|s| s.prepare(&mut app.borrow_mut()));
    let added = control.setup(|cx| add_pollers(cx, &app, rpc_server));
    if added.is_ok() {
        started(&control.handle());
        control.run();
    }
    drop(team);
    added?;
    let failure = app.borrow_mut().failure.take();
    failure.map_or(Ok(()), Err)
}

/// A program that serves nothing should not look like one that works.
fn nothing_to_do(rpc_socket: PathBuf) -> OnReady {
    Box::new(move |app, _| {
        let (program, socket) = (app.program, rpc_socket.display());
        tracing::warn!(
            "started without a configuration: nothing is served until calls over {socket} say so; `{program} -c FILE` \
             loads one, `{program} --help` says more"
        );
    })
}

/// Subsystems of SPDK that a configuration of its may name, though nothing here is called so.
const SPDK_SUBSYSTEMS: [&str; 16] = [
    "accel",
    "fsdev",
    "iobuf",
    "iscsi",
    "keyring",
    "nvmf",
    "scheduler",
    "scsi",
    "sock",
    "vfio_user_target",
    "vfu_tgt",
    "vhost_blk",
    "vhost_scsi",
    "vhost_user",
    "vmd",
    "interrupt",
];

/// As SPDK, passes over the calls of SPDK's subsystems that this program has not (a configuration of `spdk_tgt` has many); and
/// with `ignore_errors` whatever it does not know.
fn pass_over(
    config: &mut Config,
    table: &MethodTable<App>,
    subsystems: &[Rc<dyn Subsystem>],
    ignore_errors: bool,
) {
    let absent = |name: &str| {
        SPDK_SUBSYSTEMS.contains(&name) && !subsystems.iter().any(|subsystem| subsystem.name() == name)
    };
    let mut passed_over = Vec::new();
    config.calls.retain(|call| {
        let known = table.states_of(&call.method).is_some();
        let kept = known || !(ignore_errors || absent(&call.subsystem));
        if !kept {
            passed_over.push(format!("{} ({})", call.method, call.subsystem));
        }
        kept
    });
    if !passed_over.is_empty() {
        tracing::warn!("{}: passed over, not there: {}", config.path.display(), passed_over.join(", "));
    }
}

/// Warns of what is probably a slip of the pen in a configuration, and changes nothing.
fn mention_oddities(config: &Config, subsystems: &[Rc<dyn Subsystem>]) {
    let path = config.path.display();
    for key in &config.ignored {
        tracing::warn!("{path}: key '{key}' in the top level means nothing here");
    }
    let own = || subsystems.iter().map(|s| s.name()).chain(["bdev", "reactor"]);
    let mut unknown: Vec<&str> = config.calls.iter().map(|c| c.subsystem.as_str()).collect();
    unknown.dedup();
    unknown.retain(|name| !own().chain(SPDK_SUBSYSTEMS).any(|known| known == *name));
    for name in unknown {
        let known: Vec<&str> = own().collect();
        tracing::warn!(
            "{path}: there is no subsystem '{name}'; its calls are made all the same. There are: {}",
            known.join(", ")
        );
    }
}

/// Whether a configuration says who may have a bdev: already before that call is made, and if it fails or has to wait.
fn exports(config: &Config, subsystems: &[Rc<dyn Subsystem>]) -> bool {
    let exporting: Vec<&str> = subsystems.iter().flat_map(|s| s.exporting()).copied().collect();
    config.calls.iter().any(|call| exporting.contains(&call.method.as_str()))
}

fn prepare_table(
    mut table: MethodTable<App>,
    allowed: Option<&[String]>,
    config: Option<&Config>,
) -> Result<Arc<MethodTable<App>>, Error> {
    if let Some(allowed) = allowed {
        table.set_allowed(allowed).map_err(Error::Allowed)?;
    }
    if let Some(config) = config {
        config.check(&table)?;
    }
    Ok(Arc::new(table))
}

fn add_pollers(cx: &mut Turn<'_>, app: &Rc<RefCell<App>>, server: rpc::Server<App>) -> Result<(), Error> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use std::os::fd::{AsFd, AsRawFd};
    let watch = |cx: &mut Turn<'_>, fd| cx.watch(fd).map_err(|e| Error::System("epoll", e.into()));
    // Started by nohup(1): the loss of the terminal is to be ignored.
    let hang_up = (!is_ignored(SIGHUP)).then_some((Ask::HangUp, &[SIGHUP][..]));
    for (ask, signals) in [(Ask::Once, &[SIGINT, SIGTERM][..])].into_iter().chain(hang_up) {
        let read = on_signals(signals).map_err(|e| Error::System("signals", e))?;
        watch(cx, read.as_raw_fd())?;
        cx.add_poller("signals", Box::new(SignalPoller(app.clone(), ask, read)));
    }
    watch(cx, server.as_fd().as_raw_fd())?;
    cx.set_local(Rc::new(AppCell(app.clone())));
    cx.add_poller("startup", Box::new(StartupPoller(app.clone())));
    cx.add_poller("rpc", Box::new(RpcPoller(app.clone(), server)));
    Ok(())
}

/// Source: proc_pid_status(5), SigIgn.
fn is_ignored(signal: std::ffi::c_int) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// A socket with a byte for each of `signals` that comes.
fn on_signals(signals: &[std::ffi::c_int]) -> std::io::Result<std::os::unix::net::UnixStream> {
    let (read, writer) = std::os::unix::net::UnixStream::pair()?;
    read.set_nonblocking(true)?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, writer.try_clone()?)?;
    }
    Ok(read)
}

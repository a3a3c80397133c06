//! Every RPC method of rnbd-target with parameters made from its schema: right and wrong types, numbers at their limits,
//! missing and unknown keys, deep nesting. The program runs beside the fuzzer, and what a call has made is taken away
//! after each input. There always is an answer; an error has a message and names the method; unknown and missing keys are
//! refused.
#![no_main]

use std::path::PathBuf;
use std::sync::{LazyLock, mpsc};
use std::time::Duration;

use engine::App;
use engine::app::{self, Options};
use engine::log::LogControl;
use libfuzzer_sys::fuzz_target;
use reactor::{Handle, IdlePolicy, Turn};
use rpc::{Config, Kind, Param, RpcError};
use serde_json::{Map, Value, json};
use verbs::loopback::Fabric;

/// What must not happen here. These are called with an unknown key only, which they refuse.
const EXCLUDED: &[(&str, &str)] = &[
    ("spdk_kill_instance", "ends the program"),
    ("framework_set_idle_policy", "would keep a core busy"),
    ("rnbd_create_listener", "listens"),
    ("nbd_server_add_listener", "listens"),
    ("framework_start_init", "ends the start-up of the second program"),
    ("bdev_nbd_create", "connects"),
    ("bdev_rnbd_map", "connects"),
    ("bdev_rnbd_remap", "connects"),
    ("bdev_rnbd_add_path", "connects"),
    ("vhost_create_blk_controller", "makes a socket"),
    ("nbd_start_disk", "takes a device of the kernel"),
    ("ublk_create_target", "opens a device of the kernel"),
    ("ublk_start_disk", "makes a device of the kernel"),
    ("ublk_recover_disk", "takes a device of the kernel"),
];

/// These have files, which are in a temporary folder of ours.
const FILE_KEYS: [&str; 1] = ["filename"];

/// These wait; they do so for a short time.
const TIME_KEYS: [&str; 1] = ["timeout"];

/// Names that mean something.
const WORDS: [&str; 24] = [
    "N0",
    "M1",
    "D1",
    "EE_N0",
    "U1",
    "",
    "read",
    "write",
    "clear",
    "failure",
    "corrupt_data",
    "p99_read",
    "avg_write",
    "static",
    "INFO",
    "all",
    "bdev",
    "rnbd",
    "exp/a",
    "../x",
    "10.0.0.0/24",
    "nbd",
    "a\u{0}b",
    "\u{1f4be}",
];

/// How long any call may take.
const PATIENCE: Duration = Duration::from_secs(8);

struct Method {
    name: String,
    params: Vec<Param>,
    excluded: bool,
    /// Only before the program is initialised.
    startup: bool,
}

struct Program {
    control: Handle,
}

struct Programs {
    running: Program,
    /// Waits to be initialised.
    waiting: Program,
    /// What can be called in one of them.
    methods: Vec<Method>,
}

/// Of this process. Those of former ones, which could not clean up, go.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let all = std::env::temp_dir().join("rnbd-fuzz-rpc");
    std::fs::create_dir_all(&all).unwrap();
    for former in std::fs::read_dir(&all).unwrap().flatten() {
        if !PathBuf::from("/proc").join(former.file_name()).exists() {
            let _ = std::fs::remove_dir_all(former.path());
        }
    }
    let dir = all.join(std::process::id().to_string());
    std::fs::create_dir_all(&dir).unwrap();
    for (name, len) in [("file0", 1 << 20), ("file1", 4096), ("file2", 100)] {
        std::fs::File::create(dir.join(name)).unwrap().set_len(len).unwrap();
    }
    dir
});

static PROGRAMS: LazyLock<Programs> = LazyLock::new(|| {
    let (running, waiting) = (Program::start(false), Program::start(true));
    let methods = with(&running.control, |app, _| {
        let method = |m: rpc::MethodInfo<'_>| Method {
            name: m.name.into(),
            params: m.params.to_vec(),
            excluded: EXCLUDED.iter().any(|(name, _)| *name == m.name),
            startup: !m.states.contains(rpc::State::Runtime),
        };
        app.table.methods().filter(|m| !m.foreign).map(method).collect::<Vec<_>>()
    });
    let known = |name: &str| methods.iter().any(|m| m.name == name);
    assert!(EXCLUDED.iter().all(|(name, _)| known(name)), "an exclusion of what is not there");
    running.call("framework_wait_init", &Value::Null).unwrap();
    Programs { running, waiting, methods }
});

/// Runs `f` on the control thread.
fn with<R: Send + 'static>(
    control: &Handle,
    f: impl FnOnce(&mut App, &mut Turn<'_>) -> R + Send + 'static,
) -> R {
    let (tx, rx) = mpsc::channel();
    App::send(control, move |app, cx| drop(tx.send(f(app, cx))));
    rx.recv_timeout(PATIENCE).expect("the control thread is there")
}

impl Program {
    fn start(wait_for_rpc: bool) -> Self {
        let config = Config::parse(br#"{"subsystems": []}"#.to_vec(), "fuzz").unwrap();
        let (tx, rx) = mpsc::channel();
        let run = move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: rnbd_target::subsystems(vec![Fabric::new().cm()]),
                cpumask: "0x1".parse().unwrap(),
                rpc_socket: FOLDER.join(if wait_for_rpc { "waiting.sock" } else { "running.sock" }),
                config: Some(config),
                wait_for_rpc,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::ZERO },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            app::run(options, |control| tx.send(control.clone()).unwrap()).unwrap();
        };
        std::thread::spawn(run);
        Self { control: rx.recv().unwrap() }
    }

    fn call(&self, method: &str, params: &Value) -> Result<Value, RpcError> {
        let (tx, rx) = mpsc::channel();
        let (name, params_there) = (method.to_owned(), params.clone());
        App::send(&self.control, move |app, _| {
            app.call(&name, &params_there, move |_, _, result| drop(tx.send(result)));
        });
        let result = rx.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{method} {params}: {e}"));
        if let Err(e) = &result {
            assert!(!e.message.is_empty(), "{method} {params}: {e}");
            let of = e.data.as_ref().and_then(|data| data.get("method"));
            assert_eq!(of, Some(&json!(method)), "{params}: {e}");
        }
        result
    }

    /// Takes away what calls have made.
    fn clear(&self, exports: bool) {
        if exports {
            let list = |method| self.call(method, &Value::Null).ok().and_then(|v| v.as_array().cloned());
            for export in list("rnbd_get_exports").unwrap_or_default() {
                let path = json!({"device_path": export["device_path"]});
                self.call("rnbd_delete_export", &path).unwrap_or_else(|e| panic!("{e}"));
            }
            for export in list("nbd_server_get_exports").unwrap_or_default() {
                let name = json!({"name": export["name"]});
                self.call("nbd_server_delete_export", &name).unwrap_or_else(|e| panic!("{e}"));
            }
        }
        // Layers go with their base, and names are free again when the last user is gone, in the next turn or so.
        while with(&self.control, |app, _| {
            let bdevs = app.manager.list();
            for bdev in &bdevs {
                let _ = app.manager.unregister(&bdev.bdev.info().name, Box::new(|| {}));
            }
            !bdevs.is_empty()
        }) {}
    }
}

/// Bytes of the input, zero at its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn number(&mut self) -> Value {
        match self.byte() {
            b if b < 64 => json!(b),
            b if b < 96 => json!(1u64 << (b & 63).min(63)),
            b if b < 112 => json!((1u64 << (b & 15) * 4).wrapping_sub(1)),
            112 => json!(u64::MAX),
            113 => json!(i64::MIN),
            114 => json!(-1),
            115 => json!(1e300),
            116 => json!(0.5),
            117 => json!(4096.0),
            118 => json!(u64::from(u32::MAX) + 1),
            b => json!(512 * u64::from(b)),
        }
    }

    fn string(&mut self, key: &str) -> String {
        let byte = self.byte();
        if FILE_KEYS.contains(&key) {
            return FOLDER.join(format!("file{}", byte % 4)).to_str().unwrap().into();
        }
        match byte {
            255 => "x".repeat(usize::from(self.byte()) * 64),
            254 => uuid(self.byte()),
            253 => char::from(self.byte()).to_string(),
            b => WORDS[usize::from(b) % WORDS.len()].into(),
        }
    }

    /// A value of the right type.
    fn value(&mut self, key: &str, kind: &Kind) -> Value {
        if TIME_KEYS.contains(&key) {
            return json!(self.byte() % 3);
        }
        match kind {
            Kind::Bool => json!(self.byte() & 1 != 0),
            Kind::Int(_) | Kind::Float => self.number(),
            Kind::String => self.string(key).into(),
            Kind::Enum(names) => json!(names[usize::from(self.byte()) % names.len()]),
            Kind::Array(inner) => (0..self.byte() % 4).map(|_| self.value(key, inner)).collect(),
            Kind::Object(keys) => keys.iter().map(|k| ((*k).to_owned(), self.any(k))).collect(),
            Kind::Map => [(self.string(""), self.any(""))].into_iter().collect(),
            Kind::Any => self.any(key),
        }
    }

    /// A value of some type.
    fn any(&mut self, key: &str) -> Value {
        match self.byte() % 8 {
            0 => Value::Null,
            1 => json!(true),
            2 if !TIME_KEYS.contains(&key) => self.number(),
            3 => self.string(key).into(),
            4 => json!([self.string(key)]),
            5 => json!({"session": self.string(""), "x": []}),
            6 => {
                let deep = |value, n| if n & 1 == 0 { json!([value]) } else { json!({"a": value}) };
                (0..self.byte() % 120).fold(json!(1), deep)
            }
            _ => json!(""),
        }
    }
}

fn uuid(byte: u8) -> String {
    format!("{byte:08x}-0000-4000-8000-000000000000")
}

/// Parameters, and whether the method must refuse them.
fn params(method: &Method, input: &mut Input) -> (Value, bool) {
    let how = input.byte();
    if how == 255 && !method.excluded && !method.params.iter().any(|p| FILE_KEYS.contains(&p.name)) {
        return (input.any(""), false);
    }
    let mut map = Map::new();
    let mut missing = false;
    for param in &method.params {
        match input.byte() {
            // Not there.
            0..32 => missing |= param.required,
            32..64 if !param.required => {}
            64..72 => drop(map.insert(param.name.into(), input.any(param.name))),
            _ => drop(map.insert(param.name.into(), input.value(param.name, &param.kind))),
        }
    }
    let unknown = method.excluded || how >= 240;
    if unknown {
        let key = if how & 1 == 0 { "no_such_key".into() } else { "x".to_owned() + &input.string("") };
        let known = method.params.iter().any(|p| p.name == key);
        map.insert(if known { "no_such_key".into() } else { key }, input.any(""));
    }
    (Value::Object(map), unknown || missing)
}

fuzz_target!(|input: &[u8]| {
    let Programs { running, waiting, methods } = &*PROGRAMS;
    let mut input = Input(input);
    let mut exports = false;
    running.call("bdev_null_create", &json!({"name": "N0", "num_blocks": 64, "block_size": 512})).unwrap();
    for _ in 0..8 {
        let Some(which) = input.0.split_off_first() else { break };
        let method = &methods[usize::from(*which) % methods.len()];
        let (params, refused) = params(method, &mut input);
        let result = if method.startup { waiting } else { running }.call(&method.name, &params);
        if refused {
            let e = result.expect_err(&format!("{} {params}", method.name));
            assert_eq!(e.code, -32602, "{} {params}: {e}", method.name);
        } else {
            exports |= result.is_ok() && method.name.ends_with("_create_export");
        }
    }
    running.clear(exports);
});

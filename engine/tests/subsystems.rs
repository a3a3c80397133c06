//! Subsystems join, are initialised, found by their methods, and end in order.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use engine::app::{self, OnReady};
use engine::log::LogControl;
use engine::{App, Error, MethodText, Options, ShutdownDone, Subsystem};
use reactor::{Handle, IdlePolicy, Turn};
use rpc::{MethodTable, States};
use serde_json::{Value, json};

/// Tells what is done to it.
struct Part {
    name: &'static str,
    tell: Sender<String>,
    /// Waits to be aborted before it ends.
    stuck: bool,
    /// How often it was asked whether it is initialised.
    asked: Cell<u32>,
    held: RefCell<Option<ShutdownDone>>,
}

/// What its method counts.
#[derive(Default)]
struct Count(u32);

impl Part {
    fn tell(&self, what: &str) {
        self.tell.send(format!("{} {what}", self.name)).unwrap();
    }
}

impl Subsystem for Part {
    fn name(&self) -> &'static str {
        self.name
    }
    fn methods(&self, t: &mut MethodTable<App>) {
        t.method_without_params(&format!("{}_count", self.name), States::ANY, |app, r| {
            let count = app.state::<Count>().unwrap();
            count.borrow_mut().0 += 1;
            r.ok(count.borrow().0);
        });
    }
    fn texts(&self) -> &'static [MethodText] {
        &[]
    }
    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("part", "part")]
    }
    fn prepare(&self, app: &mut App) {
        app.set_state(Rc::new(RefCell::new(Count::default())));
        self.tell("prepare");
    }
    fn initialise(&self, _: &mut App, _: &mut Turn<'_>) -> Result<(), Error> {
        self.tell("initialise");
        if self.name == "broken" { Err(Error::Call("broken from birth".into())) } else { Ok(()) }
    }
    fn initialised(&self, app: &mut App) -> Result<bool, Error> {
        self.asked.set(self.asked.get() + 1);
        match self.name {
            "slow" if self.asked.get() < 5 => Ok(false),
            "endless" => {
                // The program works meanwhile.
                let control = app.control.clone();
                if self.asked.get() == 5 {
                    App::send(&control, App::shutdown);
                }
                Ok(false)
            }
            "late-failure" if self.asked.get() < 5 => Ok(false),
            "late-failure" => Err(Error::Call("broken later".into())),
            _ => Ok(true),
        }
    }
    fn expects_bdev(&self, app: &App, name: &str) -> bool {
        name == "late" && app.manager.get(name).is_err()
    }
    fn config(&self, app: &App) -> Vec<Value> {
        vec![json!(app.state::<Count>().unwrap().borrow().0)]
    }
    fn shutdown(&self, _: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        self.tell("shutdown");
        if self.stuck {
            self.held.replace(Some(done));
        } else {
            cx.after(Duration::from_millis(5), |_| done.complete());
        }
    }
    fn abort(&self, _: &mut App, _: &mut Turn<'_>) {
        self.tell("abort");
        self.held.take();
    }
}

struct Program {
    _dir: test_support::Dir,
    control: Option<Handle>,
    thread: JoinHandle<Result<(), Error>>,
    told: Receiver<String>,
}

/// Parts by name; those named stuck… are.
fn start(parts: &'static [&'static str], config: Value, on_ready: fn() -> Option<OnReady>) -> Program {
    let dir = test_support::Dir::new("engine");
    let rpc_socket = dir.join("rpc.sock");
    let (tell, told) = channel();
    let (tx, rx) = channel();
    let thread = std::thread::spawn(move || {
        let part = |name: &'static str| -> Box<dyn Subsystem> {
            let stuck = name.starts_with("stuck");
            Box::new(Part { name, tell: tell.clone(), stuck, asked: Cell::new(0), held: RefCell::default() })
        };
        let options = Options {
            program: "test",
            subsystems: parts.iter().copied().map(part).collect(),
            cpumask: "0x1".parse().unwrap(),
            rpc_socket,
            config: Some(rpc::Config::parse(config.to_string().into_bytes(), "test").unwrap()),
            wait_for_rpc: false,
            rpcs_allowed: None,
            ignore_init_errors: false,
            idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
            log: LogControl::detached(),
            on_ready: on_ready(),
            on_refusal: None,
        };
        app::run(options, |control| tx.send(control.clone()).unwrap())
    });
    Program { _dir: dir, control: rx.recv().ok(), thread, told }
}

impl Program {
    fn app(&self, f: impl FnOnce(&mut App, &mut Turn<'_>) + Send + 'static) {
        App::send(self.control.as_ref().unwrap(), f);
    }

    /// How it ended, and all that was told.
    fn end(self) -> (Result<(), Error>, Vec<String>) {
        let result = self.thread.join().unwrap();
        (result, self.told.iter().collect())
    }
}

fn nothing() -> Value {
    json!({"subsystems": []})
}

#[test]
fn shut_down_in_reverse_order_each_when_the_former_is_done() {
    let p = start(&["a", "b"], nothing(), || Some(Box::new(|app, cx| app.shutdown(cx))));
    let (result, told) = p.end();
    result.unwrap();
    let right = ["a prepare", "b prepare", "a initialise", "b initialise", "b shutdown", "a shutdown"];
    assert_eq!(told, right);
}

#[test]
fn a_second_signal_aborts_all_that_is_left() {
    let p = start(&["stuck0", "stuck1"], nothing(), || Some(Box::new(|app, cx| app.shutdown(cx))));
    let wanted = "stuck1 shutdown";
    while p.told.recv().unwrap() != wanted {}
    p.app(|app, cx| {
        assert!(app.shutting_down());
        app.shutdown(cx);
    });
    let (result, told) = p.end();
    result.unwrap();
    assert_eq!(told, ["stuck1 abort", "stuck0 shutdown", "stuck0 abort"]);
}

#[test]
fn a_failing_start_takes_down_what_was_set_up() {
    let (result, told) = start(&["a", "broken", "c"], nothing(), || None).end();
    assert_eq!(result.unwrap_err().to_string(), "broken from birth");
    assert_eq!(told[3..], ["a initialise", "broken initialise", "a shutdown"]);

    let config = json!({"subsystems": [
        {"subsystem": "bdev", "config": [{"method": "bdev_null_delete", "params": {"name": "N"}}]}]});
    let (result, told) = start(&["a"], config, || None).end();
    assert!(result.unwrap_err().to_string().contains("bdev_null_delete"));
    assert_eq!(told, ["a prepare", "a initialise", "a shutdown"]);
}

#[test]
fn methods_find_their_state_and_the_program_its_subsystems() {
    let p = start(&["a", "b"], nothing(), || None);
    let (tx, rx) = channel();
    let tell = tx.clone();
    p.app(move |app, _| {
        app.call("framework_wait_init", &Value::Null, move |_, _, answer| tell.send(answer).unwrap());
    });
    rx.recv().unwrap().unwrap();
    let tell = tx.clone();
    p.app(move |app, _| {
        app.call("a_count", &Value::Null, move |app, _, answer| {
            // The count is of a type, and the last to set it was b.
            tell.send(answer).unwrap();
            app.call("b_count", &json!({}), move |app, _, answer| {
                tell.send(answer).unwrap();
                app.call("b_count", &json!({"x": 1}), move |_, _, answer| tell.send(answer).unwrap());
            });
        });
    });
    assert_eq!(rx.recv().unwrap().unwrap(), 1);
    assert_eq!(rx.recv().unwrap().unwrap(), 2);
    assert!(rx.recv().unwrap().unwrap_err().message.contains("no parameters"));
    p.app(move |app, _| {
        app.call("framework_get_subsystems", &Value::Null, {
            let tx = tx.clone();
            move |_, _, answer| tx.send(answer).unwrap()
        });
        app.call("framework_get_config", &json!({"name": "b"}), {
            let tx = tx.clone();
            move |_, _, answer| tx.send(answer).unwrap()
        });
        app.call("log_get_flags", &Value::Null, move |_, _, answer| tx.send(answer).unwrap());
    });
    let names: Vec<Value> =
        rx.recv().unwrap().unwrap().as_array().unwrap().iter().map(|s| s["subsystem"].clone()).collect();
    assert_eq!(names, ["reactor", "bdev", "a", "b"]);
    assert_eq!(rx.recv().unwrap().unwrap(), json!([2]));
    assert_eq!(rx.recv().unwrap().unwrap()["part"], false);
    p.app(App::shutdown);
    p.end().0.unwrap();
}

#[test]
fn what_names_a_bdev_of_the_future_waits_for_it() {
    let delay = |name: &str, base: &str| {
        json!({"method": "bdev_delay_create", "params": {"name": name, "base_bdev_name": base,
            "avg_read_latency": 0, "p99_read_latency": 0, "avg_write_latency": 0, "p99_write_latency": 0}})
    };
    let blank = |name: &str| json!({"name": name, "num_blocks": 8, "block_size": 512});
    let n = json!({"method": "bdev_null_create", "params": blank("n")});
    let calls = [delay("d0", "late"), delay("d1", "d0"), n];
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": calls}]});
    let p = start(&["a"], config, || None);
    let (tx, rx) = channel();
    let call = |method: &'static str, params: Value| {
        let tx = tx.clone();
        p.app(move |app, _| app.call(method, &params, move |_, _, answer| tx.send(answer).unwrap()));
        rx.recv().unwrap()
    };
    let bdevs = || -> Vec<Value> {
        let list = call("bdev_get_bdevs", json!({})).unwrap();
        list.as_array().unwrap().iter().map(|b| b["name"].clone()).collect()
    };
    call("framework_wait_init", Value::Null).unwrap();
    assert_eq!(bdevs(), ["n"]);
    let saved = call("framework_get_config", json!({"name": "bdev"})).unwrap();
    assert!(saved.as_array().unwrap().contains(&delay("d1", "d0")), "{saved}");
    call("bdev_null_create", blank("late")).unwrap();
    let shown = call("bdev_get_bdevs", json!({"name": "d1", "timeout": 120_000})).unwrap();
    assert_eq!(shown[0]["name"], "d1");
    let saved = call("framework_get_config", json!({"name": "bdev"})).unwrap();
    assert_eq!(saved.as_array().unwrap().iter().filter(|c| c["method"] == "bdev_delay_create").count(), 2);
    p.app(App::shutdown);
    p.end().0.unwrap();
}

#[test]
fn the_next_waits_until_a_slow_one_is_ready() {
    let p = start(&["slow", "b"], nothing(), || Some(Box::new(|app, cx| app.shutdown(cx))));
    let (result, told) = p.end();
    result.unwrap();
    let right =
        ["slow prepare", "b prepare", "slow initialise", "b initialise", "b shutdown", "slow shutdown"];
    assert_eq!(told, right);
}

/// What is about to be ready has something to end; what follows has not.
#[test]
fn one_that_is_never_ready_is_ended() {
    for (part, error) in [("endless", None), ("late-failure", Some("broken later"))] {
        let parts: &[&str] = if part == "endless" { &["endless", "b"] } else { &["late-failure", "b"] };
        let (result, told) = start(parts, nothing(), || None).end();
        assert_eq!(result.err().map(|e| e.to_string()).as_deref(), error);
        let steps = ["prepare", "initialise", "shutdown"].map(|step| format!("{part} {step}"));
        assert_eq!(told, [steps[0].as_str(), "b prepare", &steps[1], &steps[2]]);
    }
}

/// Layers stand before their bases, and there are subsystems that this program has not.
#[test]
fn a_configuration_of_spdk_tgt_is_loaded() {
    let delay = |name: &str, base: &str| {
        json!({"method": "bdev_delay_create", "params": {"name": name, "base_bdev_name": base,
            "avg_read_latency": 0, "p99_read_latency": 0, "avg_write_latency": 0, "p99_write_latency": 0}})
    };
    let blank = |name: &str| json!({"method": "bdev_null_create", "params": {"name": name, "num_blocks": 8, "block_size": 512}});
    let error = json!({"method": "bdev_error_create", "params": {"base_name": "n1"}});
    let wait = json!({"method": "bdev_wait_for_examine"});
    let bdevs = [delay("d0", "EE_n1"), error, delay("d1", "n"), blank("n"), blank("n1"), wait];
    let config = json!({"subsystems": [
        {"subsystem": "scheduler", "config": [{"method": "framework_set_scheduler_", "params": {"name": "static"}}]},
        {"subsystem": "bdev", "config": bdevs},
        {"subsystem": "nvmf", "config": [{"method": "nvmf_set_config", "params": {"admin_cmd_passthru": {}}}]},
        {"subsystem": "iscsi", "config": null},
    ]});
    let p = start(&["a"], config, || None);
    test_support::until("all bdevs", || {
        let (tx, rx) = channel();
        p.app(move |app, _| tx.send(app.manager.list().len()).unwrap());
        rx.recv().unwrap() == 5
    });
    p.app(|app, cx| app.shutdown(cx));
    p.end().0.unwrap();
}

//! What becomes of the connection and the device, in words: the difference between two looks.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::spec::RnbdSpec;
use super::words::{Opened, waits};

/// What the user has been told.
#[derive(Debug)]
pub struct Watch {
    session: String,
    device: String,
    device_path: String,
    /// By name.
    paths: BTreeMap<String, Told>,
    /// Since when there has been no path, after there was one.
    cut_since: Option<Instant>,
    opened: Opened,
    /// What was said of a device that is not open.
    closed: Option<String>,
    /// What will be said, if the next look finds it too.
    perhaps: Option<String>,
}

/// About one path.
#[derive(Debug, Default)]
struct Told {
    connected: bool,
    /// It has been connected once.
    known: bool,
    lost_at: Option<Instant>,
    /// The reason given last.
    why: String,
}

impl Watch {
    pub fn new(spec: &RnbdSpec) -> Self {
        Self {
            session: spec.sessname.clone(),
            device: spec.bdev_name(),
            device_path: spec.device_path.clone(),
            paths: BTreeMap::new(),
            cut_since: None,
            opened: Opened::default(),
            closed: None,
            perhaps: None,
        }
    }

    /// Parameters of `bdev_rnbd_get_sessions` and `bdev_rnbd_get_devices`.
    pub fn asks(&self) -> (Value, Value) {
        (json!({"session": self.session}), json!({"name": self.device}))
    }

    /// Lines about what is new. `sessions`, `devices`: results of `bdev_rnbd_get_sessions` and
    /// `bdev_rnbd_get_devices`.
    pub fn see(&mut self, sessions: &Value, devices: &Value, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        let paths =
            || sessions.as_array().into_iter().flatten().flat_map(|s| s["paths"].as_array()).flatten();
        for path in paths() {
            self.see_path(path, now, &mut lines);
        }
        let connected = paths().filter(|p| is_connected(p)).count();
        let device = devices.as_array().and_then(|d| d.first());
        self.see_cut(connected, device, now, &mut lines);
        if let Some(device) = device.filter(|d| self.cut_since.is_none() || d["given_up"] == true) {
            self.see_device(device, &mut lines);
        }
        lines
    }

    fn see_path(&mut self, path: &Value, now: Instant, lines: &mut Vec<String>) {
        let name = path["path"].as_str().unwrap_or_default();
        let why = path["last_error"].as_str().unwrap_or_default();
        let told = self.paths.entry(name.to_owned()).or_default();
        match (told.connected, is_connected(path)) {
            (false, true) if told.known => {
                let after = told.lost_at.map_or(Duration::ZERO, |t| now.duration_since(t));
                lines.push(format!("path {name}: restored after {:.1} s", after.as_secs_f64()));
            }
            (false, true) => {
                let provider = path["provider"].as_str().unwrap_or_default();
                lines.push(format!("path {name}: connected by {provider}"));
            }
            (true, false) => {
                told.lost_at = Some(now);
                lines.push(format!("path {name}: lost: {}; reconnecting", reason(why)));
            }
            (false, false) if told.why != why && !why.is_empty() => {
                lines.push(format!("path {name}: not connected: {why}; trying again"));
            }
            _ => {}
        }
        told.connected = is_connected(path);
        told.known |= told.connected;
        told.why = if told.connected { String::new() } else { why.into() };
    }

    /// Whether I/O waits.
    fn see_cut(&mut self, connected: usize, device: Option<&Value>, now: Instant, lines: &mut Vec<String>) {
        match (connected, self.cut_since) {
            (0, None) if self.paths.values().any(|p| p.known) => {
                self.cut_since = Some(now);
                let waits = waits(device.unwrap_or(&Value::Null), "one is back");
                lines.push(format!("no path is left: {waits}"));
            }
            (1.., Some(since)) => {
                self.cut_since = None;
                let seconds = now.duration_since(since).as_secs_f64();
                lines.push(format!("connected again after {seconds:.1} s"));
            }
            _ => {}
        }
    }

    fn see_device(&mut self, device: &Value, lines: &mut Vec<String>) {
        let state = device["state"].as_str().unwrap_or_default();
        let what = match state {
            "open" => {
                self.closed = None;
                self.opened.see(device, device["access_mode"].as_str().unwrap_or("rw"))
            }
            "init" => None,
            other => self.see_closed(device, other),
        };
        lines.extend(what.map(|what| format!("device {}: {what}", self.device_path)));
    }

    fn see_closed(&mut self, device: &Value, state: &str) -> Option<String> {
        let why = device["last_error"].as_str().map_or_else(String::new, |why| format!(": {why}"));
        let line = match state {
            _ if device["given_up"] == true => {
                let name = &self.device;
                format!("given up{why}; its I/O fails until bdev_rnbd_remap of {name} is called")
            }
            "closed" => format!("{state}{why}; {}", waits(device, "the server offers it again")),
            _ => format!("{state}{why}"),
        };
        // After a reconnect it is open again soon: said if the next look finds it too.
        let again = self.perhaps.replace(line.clone()).as_ref() == Some(&line);
        if !again || self.closed.as_ref() == Some(&line) {
            return None;
        }
        self.opened.closed();
        self.closed = Some(line.clone());
        Some(line)
    }
}

fn is_connected(path: &Value) -> bool {
    path["state"] == "connected"
}

fn reason(why: &str) -> &str {
    if why.is_empty() { "the server is gone" } else { why.trim_start_matches("path lost: ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch() -> Watch {
        let words = ["sessname=s", "path=ip:10.0.0.1", "device_path=d"].map(str::to_owned);
        Watch::new(&RnbdSpec::parse(&words).unwrap())
    }

    fn sessions(paths: &[(&str, &str, Option<&str>)]) -> Value {
        let path = |(name, state, why): &(&str, &str, Option<&str>)| json!({"path": name, "state": state, "last_error": why, "provider": "soft-roce"});
        json!([{"session": "s", "paths": paths.iter().map(path).collect::<Vec<_>>()}])
    }

    #[test]
    fn a_path_comes_goes_and_returns() {
        let (mut w, t) = (watch(), Instant::now());
        let after = |s| t + Duration::from_secs(s);
        assert!(w.see(&Value::Null, &Value::Null, t).is_empty());
        assert!(w.see(&sessions(&[("a", "connecting", None)]), &json!([]), t).is_empty());
        let up = sessions(&[("a", "connected", None)]);
        assert_eq!(w.see(&up, &json!([]), after(1)), ["path a: connected by soft-roce"]);
        assert!(w.see(&up, &json!([]), after(2)).is_empty());
        let down = sessions(&[("a", "reconnecting", Some("path lost: disconnected by the server"))]);
        assert_eq!(
            w.see(&down, &json!([]), after(3)),
            [
                "path a: lost: disconnected by the server; reconnecting",
                "no path is left: I/O waits until one is back, however long; fast_io_fail_timeout_sec=SECONDS sets a limit"
            ]
        );
        assert!(w.see(&down, &json!([]), after(4)).is_empty());
        let refused = sessions(&[("a", "reconnecting", Some("nobody listens"))]);
        assert_eq!(
            w.see(&refused, &json!([]), after(5)),
            ["path a: not connected: nobody listens; trying again"]
        );
        assert_eq!(
            w.see(&up, &json!([]), after(7)),
            ["path a: restored after 4.0 s", "connected again after 4.0 s"]
        );
    }

    #[test]
    fn one_of_two_paths_is_no_cut() {
        let (mut w, t) = (watch(), Instant::now());
        w.see(&sessions(&[("a", "connected", None), ("b", "connected", None)]), &json!([]), t);
        let one = sessions(&[("a", "connected", None), ("b", "reconnecting", None)]);
        assert_eq!(w.see(&one, &json!([]), t), ["path b: lost: the server is gone; reconnecting"]);
    }

    #[test]
    fn the_device_and_its_size() {
        let (mut w, t) = (watch(), Instant::now());
        let device = |state: &str, blocks: u64| json!([{"name": "d@s", "state": state, "num_blocks": blocks, "block_size": 512, "access_mode": "ro"}]);
        assert!(w.see(&Value::Null, &device("init", 0), t).is_empty());
        let line = "device d: opened (ro), 256 MiB, blocks of 512 bytes";
        assert_eq!(w.see(&Value::Null, &device("open", 524_288), t), [line]);
        assert!(w.see(&Value::Null, &device("open", 524_288), t).is_empty());
        let grown = "device d: resized from 256 MiB to 512 MiB";
        assert_eq!(w.see(&Value::Null, &device("open", 1_048_576), t), [grown]);
    }

    #[test]
    fn a_device_that_is_closed_waits_and_may_be_given_up() {
        let (mut w, t) = (watch(), Instant::now());
        let device = |state: &str, given_up: bool, fast: u64| json!([{"name": "d@s", "state": state, "num_blocks": 8, "block_size": 512, "last_error": "gone", "given_up": given_up, "fast_io_fail_timeout_sec": fast}]);
        assert_eq!(w.see(&Value::Null, &device("open", false, 0), t).len(), 1);
        assert!(w.see(&Value::Null, &device("closed", false, 0), t).is_empty(), "it may be open again soon");
        let line = "device d: closed: gone; I/O waits until the server offers it again, however long; \
                    fast_io_fail_timeout_sec=SECONDS sets a limit";
        assert_eq!(w.see(&Value::Null, &device("closed", false, 0), t), [line]);
        assert!(w.see(&Value::Null, &device("closed", false, 0), t).is_empty());
        assert!(w.see(&Value::Null, &device("closed", true, 0), t).is_empty());
        let line = "device d: given up: gone; its I/O fails until bdev_rnbd_remap of d@s is called";
        assert_eq!(w.see(&Value::Null, &device("closed", true, 0), t), [line]);
        assert_eq!(w.see(&Value::Null, &device("open", false, 0), t).len(), 1, "it is said that it is back");
        w.see(&Value::Null, &device("closed", false, 9), t);
        let line = "device d: closed: gone; I/O waits until the server offers it again, or for at most 9 s";
        assert_eq!(w.see(&Value::Null, &device("closed", false, 9), t), [line]);
    }
}

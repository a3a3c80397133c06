//! Parameters of `spdk_set_options`.

use std::path::PathBuf;
use std::time::Duration;

use bdev::spdk::Options;
use rpc::RpcError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What `spdk_tgt` has as options of its command line, by the names of `spdk_env_opts`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetOptions {
    /// Ordinary memory, no PCI devices.
    #[serde(default)]
    no_huge: bool,
    /// MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    mem_size: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugedir: Option<String>,
    #[serde(default)]
    no_pci: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pci_allowed: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pci_blocked: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iova_mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lcore_map: Option<String>,
    #[serde(default)]
    hugepage_single_segments: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    vf_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    env_context: Option<String>,
    /// Microseconds after which a sleeping reactor looks after SPDK.
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_poll_us: Option<u32>,
    /// A configuration of `spdk_tgt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) config_file: Option<PathBuf>,
    /// The same, in place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) subsystems: Option<Value>,
}

/// Without `idle_poll_us`: 50 looks a second by each thread take some 0.3 % of a core in all.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// `idle_poll_us` from 1 ms to 1 s.
const IDLE_POLL_US: std::ops::RangeInclusive<u32> = 1000..=1_000_000;

/// SPDK's pools alone take 200 MiB.
const LEAST_NO_HUGE_MEM: u32 = 256;

impl SetOptions {
    pub(super) fn check(&self) -> Result<(), RpcError> {
        let wrong = |param: &str, text: &str| {
            Err(RpcError::invalid_params(format!("spdk_set_options: {param}: {text}")).param(param))
        };
        if self.idle_poll_us.is_some_and(|us| !IDLE_POLL_US.contains(&us)) {
            return wrong("idle_poll_us", "1000 to 1000000 are right");
        }
        if self.no_huge && self.mem_size.is_some_and(|mib| mib < LEAST_NO_HUGE_MEM) {
            return wrong("mem_size", "with no_huge, SPDK needs 256 MiB or more");
        }
        if self.no_huge && !self.pci_allowed.is_empty() {
            return wrong("pci_allowed", "devices reach no memory but hugepages; leave no_huge out");
        }
        if !self.pci_allowed.is_empty() && !self.pci_blocked.is_empty() {
            return wrong("pci_blocked", "cannot be combined with pci_allowed, which blocks all others");
        }
        if self.iova_mode.as_ref().is_some_and(|mode| mode != "pa" && mode != "va") {
            return wrong("iova_mode", "\"pa\" or \"va\" is right");
        }
        Ok(())
    }

    pub(super) fn environment(&self) -> Options {
        Options {
            no_huge: self.no_huge,
            mem_size: self.mem_size,
            hugedir: self.hugedir.clone(),
            no_pci: self.no_pci,
            pci_allowed: self.pci_allowed.clone(),
            pci_blocked: self.pci_blocked.clone(),
            iova_mode: self.iova_mode.clone(),
            lcore_map: self.lcore_map.clone(),
            single_file_segments: self.hugepage_single_segments,
            vf_token: self.vf_token.clone(),
            env_context: self.env_context.clone(),
        }
    }

    pub(super) fn idle_poll(&self) -> Duration {
        self.idle_poll_us.map_or(IDLE_POLL, |us| Duration::from_micros(us.into()))
    }

    /// As parameters, with the present configuration in place of the former.
    pub(super) fn to_value(&self, subsystems: Option<Value>) -> Value {
        let config_file = self.config_file.clone().filter(|_| subsystems.is_none());
        serde_json::to_value(Self { config_file, subsystems, ..self.clone() }).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(params: Value) -> Result<SetOptions, String> {
        let options: SetOptions = serde_json::from_value(params).map_err(|e| e.to_string())?;
        options.check().map_err(|e| e.message)?;
        Ok(options)
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (params, part) in [
            (json!({"nohuge": true}), "unknown field `nohuge`"),
            (json!({"idle_poll_us": 10}), "idle_poll_us: 1000 to 1000000"),
            (json!({"no_huge": true, "mem_size": 64}), "mem_size: with no_huge"),
            (json!({"no_huge": true, "pci_allowed": ["0000:01:00.0"]}), "pci_allowed: devices reach"),
            (json!({"iova_mode": "dc"}), "iova_mode: \"pa\" or \"va\""),
        ] {
            let error = check(params).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn saved_options_have_the_present_configuration() {
        let options = check(json!({"no_huge": true, "config_file": "/a", "idle_poll_us": 5000})).unwrap();
        assert_eq!(options.idle_poll(), Duration::from_millis(5));
        let saved = options.to_value(Some(json!([])));
        assert_eq!(saved["subsystems"], json!([]));
        assert!(saved.get("config_file").is_none());
        assert!(check(saved).unwrap().environment().no_huge);
        assert_eq!(options.to_value(None)["config_file"], "/a");
    }
}

//! What both kinds of devices are told about in the same words.

use serde_json::Value;

/// As people say it.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        // For people, and a device of more than 2^53 bytes would not show the difference.
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} bytes"),
    }
}

/// That I/O waits until `until`, and for how long at most. `device`: its row of `bdev_rnbd_get_devices` or
/// `bdev_nbd_get_devices`.
pub(super) fn waits(device: &Value, until: &str) -> String {
    match device["fast_io_fail_timeout_sec"].as_u64() {
        None | Some(0) => {
            format!("I/O waits until {until}, however long; fast_io_fail_timeout_sec=SECONDS sets a limit")
        }
        Some(limit) => format!("I/O waits until {until}, or for at most {limit} s"),
    }
}

/// What has been said of an open device.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// Its size and the rest.
    told: Option<(u64, String)>,
}

impl Opened {
    /// It is open, as its row says: what is new about that.
    pub fn see(&mut self, device: &Value, mode: &str) -> Option<String> {
        let block_size = device["block_size"].as_u64().unwrap_or(512);
        let bytes = device["num_blocks"].as_u64().unwrap_or(0).saturating_mul(block_size);
        let rest = format!("blocks of {block_size} bytes");
        let line = match &self.told {
            Some(told) if (told.0, &told.1) == (bytes, &rest) => return None,
            Some((former, _)) if *former != bytes => {
                format!("resized from {} to {}", size(*former), size(bytes))
            }
            _ => format!("opened ({mode}), {}, {rest}", size(bytes)),
        };
        self.told = Some((bytes, rest));
        Some(line)
    }

    /// It is not open any more.
    pub fn closed(&mut self) {
        self.told = None;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size(1 << 41), "2 TiB");
        assert_eq!(size(1_610_612_736), "1.5 GiB");
        assert_eq!(size(100), "100 bytes");
    }

    #[test]
    fn opened_resized_and_opened_again() {
        let (mut o, row) = (Opened::default(), |blocks| json!({"num_blocks": blocks, "block_size": 512}));
        let line = |s: &str| Some(s.to_owned());
        assert_eq!(o.see(&row(524_288), "rw"), line("opened (rw), 256 MiB, blocks of 512 bytes"));
        assert_eq!(o.see(&row(524_288), "rw"), None);
        assert_eq!(o.see(&row(1_048_576), "rw"), line("resized from 256 MiB to 512 MiB"));
        assert_eq!(o.see(&row(1_048_576), "rw"), None);
        o.closed();
        assert_eq!(o.see(&row(1_048_576), "rw"), line("opened (rw), 512 MiB, blocks of 512 bytes"));
    }
}

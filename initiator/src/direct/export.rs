//! How the mapped device is used on this host: the calls that make it so, and what the user then works with.

use serde_json::{Value, json};

/// One of the ways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Export {
    /// A kernel NBD device.
    Nbd(String),
    /// A ublk device; without a number what an earlier run left of the device, or else the first that is free.
    Ublk(Option<u32>),
    /// A vhost-user-blk socket.
    Vhost(String),
    /// A unix socket with an NBD server.
    NbdSocket(String),
}

impl Export {
    /// Stands for a number that the user left out.
    pub const ANY: &str = "first";

    /// `--ublk NUMBER`.
    ///
    /// # Errors
    /// It is no number.
    pub fn ublk(number: &str) -> Result<Self, String> {
        match number {
            Self::ANY => Ok(Self::Ublk(None)),
            _ => number
                .parse()
                .map(|n| Self::Ublk(Some(n)))
                .map_err(|_| format!("--ublk {number}: a device number such as 0 is right, or none at all")),
        }
    }

    /// Methods with their parameters, in the order in which they are to be called, that offer the bdev `bdev`.
    pub fn calls(&self, bdev: &str) -> Vec<(&'static str, Value)> {
        match self {
            Self::Nbd(device) => {
                vec![("nbd_start_disk", json!({"bdev_name": bdev, "nbd_device": device}))]
            }
            Self::Ublk(number) => {
                let mut disk = json!({"bdev_name": bdev});
                if let Some(id) = number {
                    disk["ublk_id"] = (*id).into();
                }
                vec![("ublk_create_target", json!({})), ("ublk_start_disk", disk)]
            }
            Self::Vhost(path) => {
                vec![("vhost_create_blk_controller", json!({"ctrlr": absolute(path), "dev_name": bdev}))]
            }
            Self::NbdSocket(path) => vec![
                ("nbd_server_create_export", json!({"name": bdev, "bdev_name": bdev})),
                ("nbd_server_add_listener", json!({"path": absolute(path), "export": bdev})),
            ],
        }
    }

    /// What the user works with, from the result of the last call.
    pub fn place(&self, result: &Value) -> String {
        match self {
            Self::Nbd(device) => result.as_str().unwrap_or(device).to_owned(),
            Self::Ublk(number) => {
                let id = result.as_u64().or(number.map(u64::from)).unwrap_or_default();
                format!("/dev/ublkb{id}")
            }
            Self::Vhost(path) => format!("vhost-user-blk socket {}", absolute(path)),
            Self::NbdSocket(path) => format!("nbd+unix:///?socket={}", absolute(path)),
        }
    }
}

/// Subsystems may have folders of their own for names.
fn absolute(path: &str) -> String {
    std::path::absolute(path).map_or_else(|_| path.to_owned(), |p| p.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_named_in_full() {
        let (_, params) = Export::Vhost("vm.sock".into()).calls("d").remove(0);
        let path = params["ctrlr"].as_str().unwrap().to_owned();
        assert!(path.starts_with('/') && path.ends_with("/vm.sock"), "{path}");
        let calls = Export::NbdSocket("/tmp/n".into()).calls("d");
        assert_eq!(calls[1].1, json!({"path": "/tmp/n", "export": "d"}));
        assert_eq!(Export::NbdSocket("/tmp/n".into()).place(&json!(true)), "nbd+unix:///?socket=/tmp/n");
    }

    #[test]
    fn ublk_numbers() {
        assert_eq!(Export::Ublk(Some(7)).calls("d")[1].1["ublk_id"], 7);
        assert_eq!(Export::Ublk(None).calls("d")[1].1, json!({"bdev_name": "d"}));
        assert_eq!(Export::Ublk(None).place(&json!(4)), "/dev/ublkb4");
        assert!(Export::ublk("x").unwrap_err().contains("such as 0"));
    }
}

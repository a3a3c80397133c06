//! How devices are doing, for people and RPC.

use bdev::DriverValue;

use super::*;

/// One device.
#[derive(Clone, Debug)]
pub struct DriveInfo {
    /// As it was asked for, and as it is saved.
    pub params: NbdParams,
    /// init, open, closed or deleted.
    pub state: &'static str,
    /// Why it is not open, or not completely.
    pub last_error: Option<String>,
    /// Nothing is tried any more until it is reconnected.
    pub given_up: bool,
    /// What was agreed upon with the server last.
    pub agreed: Option<Agreed>,
    /// From the first opening on: properties and size in blocks.
    pub bdev: Option<(bdev::Info, u64)>,
    /// Its connections.
    pub connections: Vec<ConnInfo>,
}

/// One connection.
#[derive(Clone, Debug)]
pub struct ConnInfo {
    /// Name of the reactor.
    pub reactor: String,
    /// Where to, and for how long; `None` while it is not up.
    pub up: Option<(Address, Duration)>,
    /// TLS version and cipher suite.
    pub cipher: Option<String>,
    /// How often it was up again after a loss.
    pub reconnects: u64,
}

impl Drives {
    /// All devices in the order in which they were made, or that of the bdev `name`.
    pub fn devices(&self, now: Instant, name: Option<&str>) -> Vec<DriveInfo> {
        let wanted = |d: &&Drive| name.is_none_or(|n| d.params.name == n);
        self.drives.values().filter(wanted).map(|d| self.info(now, d)).collect()
    }

    fn info(&self, now: Instant, d: &Drive) -> DriveInfo {
        let conn = |c: &Conn| ConnInfo {
            reactor: self.reactors[c.reactor].name().to_owned(),
            up: c.up.as_ref().map(|u| (u.address.clone(), now.saturating_duration_since(u.since))),
            cipher: c.up.as_ref().and_then(|u| u.cipher.clone()),
            reconnects: c.reconnects,
        };
        DriveInfo {
            params: d.params.clone(),
            state: d.state.name(),
            last_error: d.reason.clone(),
            given_up: d.given_up,
            agreed: d.agreed.clone(),
            bdev: d.disk.as_ref().map(|disk| (disk.info().clone(), disk.blocks())),
            connections: d.conns.iter().map(conn).collect(),
        }
    }

    /// Renews what `bdev_get_bdevs` shows of a device.
    pub(super) fn shown(&self, number: u64) {
        let Some(drive) = self.drives.get(&number) else { return };
        let Some(disk) = &drive.disk else { return };
        let text = |t: &str| DriverValue::Text(t.to_owned());
        let up = drive.conns.iter().filter(|c| c.up.is_some()).count();
        let mut values = vec![
            ("server", text(&drive.params.server.to_string())),
            ("export", text(&drive.params.export)),
            ("state", text(drive.state.name())),
            ("connections", DriverValue::Number(up as u64)),
        ];
        if let Some(a) = &drive.agreed {
            let rotational = a.flags.has(nbd_proto::wire::TransmissionFlags::ROTATIONAL);
            values.push(("dialect", text(a.framing.name())));
            values.push(("rotational", DriverValue::Bool(rotational)));
            values.push(("tls", DriverValue::Bool(a.tls)));
        }
        if let Some(reason) = &drive.reason {
            values.push(("last_error", text(reason)));
        }
        disk.show(values);
    }
}

//! Which port serves an address, and when a port is closed.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::sync::Arc;

use roce_proto::Nanos;
use rustix::event::epoll;
use verbs::Error;

use super::cm_socket::CmSocket;
use super::{Control, OpenPort};
use crate::clock::now;
use crate::neighbours::slot_name;
use crate::port::{Port, SLOTS};

/// A port that nobody uses stays open for so long, to answer peers that have not heard our last words.
const LINGER: Nanos = 3_000_000_000;

impl Control {
    /// The open port for packets of local address `ip`.
    pub fn port_of(&self, ip: IpAddr) -> Option<&Arc<Port>> {
        let open = |ip: IpAddr| self.ports.iter().map(|open| &open.port).find(|port| port.ip == ip);
        open(ip).or_else(|| open(unspecified(ip)))
    }

    /// As [`Control::port_of`]; opens one if there is none.
    ///
    /// # Errors
    /// The address is not ours, or its RoCE port is somebody else's.
    pub fn port_for(&mut self, ip: IpAddr) -> Result<Arc<Port>, Error> {
        match self.port_of(ip) {
            Some(port) => Ok(port.clone()),
            None => self.open_port(ip),
        }
    }

    /// As [`Control::port_for`], to talk with another process on the same address. If that has all addresses, packets reach
    /// either of us at once only if we join its group: a port of our own would take what is for it.
    ///
    /// # Errors
    /// As for [`Control::port_for`].
    pub fn port_beside(&mut self, ip: IpAddr) -> Result<Arc<Port>, Error> {
        let all = unspecified(ip);
        let neighbours = &self.shared.neighbours;
        let is_taken = |ip| (0..SLOTS).any(|slot| neighbours.is_taken(&slot_name(ip, slot)));
        let joins = self.port_of(ip).is_none() && !is_taken(ip) && is_taken(all);
        // Another user's group does not let us in.
        match joins.then(|| self.open_port(all)) {
            Some(Ok(port)) => Ok(port),
            _ => self.port_for(ip),
        }
    }

    /// Ports for a listener on `ip`, which may be unspecified.
    ///
    /// # Errors
    /// As for [`Control::port_for`].
    pub fn ports_to_listen(&mut self, ip: IpAddr) -> Result<Vec<Arc<Port>>, Error> {
        if ip.is_ipv4() || !ip.is_unspecified() {
            return Ok(vec![self.port_for(ip)?]);
        }
        let v4 = self.port_for(Ipv4Addr::UNSPECIFIED.into())?;
        match self.port_for(ip) {
            Ok(v6) => Ok(vec![v4, v6]),
            Err(e) if e.source.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                tracing::info!("this system has no IPv6: listening on IPv4 only");
                Ok(vec![v4])
            }
            Err(e) => Err(e),
        }
    }

    fn open_port(&mut self, ip: IpAddr) -> Result<Arc<Port>, Error> {
        let (port, sockets) = Port::open(ip, self.shared.clone())?;
        let socket = CmSocket::new(sockets, self.shared.options.faults);
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.sources, socket.fd().as_fd(), data, epoll::EventFlags::IN)
            .map_err(|e| super::error(format!("watch the socket of {ip}"), e.into(), ""))?;
        self.ports.push(OpenPort { port: port.clone(), socket, used: now() });
        Ok(port)
    }

    /// Closes ports that nobody has used for some time; returns when to look again.
    pub fn close_unused_ports(&mut self, now: Nanos) -> Nanos {
        let mut again = Nanos::MAX;
        self.ports.retain_mut(|open| {
            if Arc::strong_count(&open.port) > 1 {
                open.used = now;
                return true;
            }
            let until = open.used.saturating_add(LINGER);
            if until > now {
                again = again.min(until);
            }
            until > now
        });
        again
    }
}

/// All addresses of a family.
pub fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

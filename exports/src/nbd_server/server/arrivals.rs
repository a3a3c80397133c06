//! Who comes: handshakes, and connections on their way to a reactor.

use std::sync::Arc;

use engine::App;
use nbd_poll::listener::{Accepted, Address, Event, HandshakeError, Identity, Peer};
use reactor::Turn;

use super::super::census::Entrance;
use super::super::client::{NewClient, Stats};
use super::super::export::View;
use super::super::lane::Lane;
use super::{Connected, Server};

impl Server {
    pub(super) fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        for place in 0..self.listeners.len() {
            let most = self.max_connections();
            let (census, exports) = (&self.census, &self.exports);
            let admits = |peer: &Peer| census.entrance(most, peer.source(), exports.name(peer)).is_some();
            let listening = &mut self.listeners[place];
            let view = View { exports, default: listening.export.as_deref() };
            busy |= listening.acceptor.poll(cx.now, &admits, &view, &mut self.events);
            if self.events.is_empty() {
                continue;
            }
            let address = listening.address().clone();
            for event in std::mem::take(&mut self.events) {
                self.event(cx, &address, event);
            }
        }
        if self.single_is_gone() {
            self.single = false;
            App::send(&self.control, App::shutdown);
        }
        busy
    }

    fn event(&mut self, cx: &mut Turn<'_>, listener: &Address, event: Event) {
        match event {
            Event::Accepted(accepted) => self.accepted(cx, listener, accepted),
            Event::Left(peer) => tracing::debug!(%peer, "NBD client looked and left"),
            Event::Failed(peer, why @ HandshakeError::Closed) => {
                tracing::debug!(%peer, %why, "NBD handshake");
            }
            Event::Failed(who, why) => self.refused(listener, &who, &why),
            Event::Paused(why) => tracing::error!(%listener, %why, "cannot accept NBD clients for now"),
        }
    }

    fn refused(&mut self, listener: &Address, who: &Identity, why: &HandshakeError) {
        match why {
            HandshakeError::Full => self.turned.away += 1,
            HandshakeError::TimedOut => self.turned.late += 1,
            HandshakeError::Displaced => self.turned.displaced += 1,
            _ => {}
        }
        tracing::warn!(peer = %who, %listener, %why, "NBD client refused");
    }

    /// Gives a connection to the reactor with the fewest users.
    fn accepted(&mut self, cx: &mut Turn<'_>, listener: &Address, accepted: Accepted) {
        // It may have gone after it was chosen and before the answer was sent.
        let Some((name, export)) = self.exports.by_id(accepted.chosen.export) else { return };
        if self.stopping {
            return;
        }
        // Others may have come while it was choosing. A single client is not counted.
        let alone = (*listener == Address::Stdio).then_some(Entrance::Shared);
        let Some(entrance) = alone.or_else(|| self.entrance(&accepted.who.peer)) else {
            return self.refused(listener, &accepted.who, &HandshakeError::Full);
        };
        let source = accepted.who.peer.source();
        let export_name = name.clone();
        let (stats, place) = (Arc::<Stats>::default(), self.placement.take());
        let new = NewClient {
            id: self.next_id,
            socket: accepted.socket,
            export: export.id,
            descriptor: export.descriptor.clone(),
            fence: export.fence.clone(),
            ranges: export.ranges.clone(),
            source,
            stall: self.options.stall_timeout,
            rate: self.options.rate,
            // As the client was told; a size that moved meanwhile is followed at its first request.
            limits: nbd_proto::request::Export {
                size: accepted.chosen.size,
                flags: accepted.chosen.flags,
                ..export.limits()
            },
            agreed: accepted.chosen.agreed,
            stats: stats.clone(),
        };
        let id = self.take_id();
        let reactor = place.reactor().clone();
        tracing::info!(
            id, peer = %accepted.who, %listener, export = export_name, reactor = reactor.name(),
            framing = ?accepted.chosen.agreed.framing, "NBD client connected"
        );
        self.census.enter(source, entrance);
        self.connections.insert(
            id,
            Connected {
                export: new.export,
                export_name,
                who: accepted.who,
                listener: listener.clone(),
                place,
                stats,
                since: cx.now,
                closing: false,
            },
        );
        Lane::send(&reactor, move |lane, cx| lane.add(cx, new));
    }
}

//! Where the server listens: addresses, sockets that were passed to the program, and standard input.

use std::os::fd::OwnedFd;

use nbd_poll::listener::{Acceptor, AcceptorOptions, Address, Event, Listener, Peer};
use reactor::Turn;
use reactor::descriptors::Budget;

use super::super::dialect::Speech;
use super::super::error::ServerError;
use super::Server;

pub(in super::super) struct Listening {
    pub(super) acceptor: Acceptor,
    /// The name of the socket that was passed to the program.
    pub(in super::super) activated: Option<String>,
    pub(in super::super) speech: Speech,
    /// For clients that do not name one.
    pub(in super::super) export: Option<String>,
}

impl Listening {
    pub(in super::super) fn address(&self) -> &Address {
        self.acceptor.address()
    }

    pub(in super::super) fn handshakes(&self) -> usize {
        self.acceptor.handshakes()
    }

    pub(in super::super) fn max_handshakes(&self) -> usize {
        self.acceptor.max_handshakes()
    }
}

impl Server {
    /// Listens on an address; what it became.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(in super::super) fn listen(
        &mut self,
        cx: &mut Turn<'_>,
        address: &Address,
        speech: Speech,
        export: Option<String>,
    ) -> Result<Address, ServerError> {
        if self.listeners.iter().any(|l| l.address() == address) {
            return Err(ServerError::ListenerExists(address.clone()));
        }
        let options = self.check_listener(address, &speech, export.as_deref())?;
        let watch = |e| ServerError::Watch(address.clone(), e);
        let acceptor = Acceptor::new(Listener::bind(address)?, options).map_err(watch)?;
        self.add_acceptor(cx, acceptor, None, speech, export)
    }

    /// As [`Server::listen`], on a socket that was passed to the program, by its name or number.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(in super::super) fn listen_activated(
        &mut self,
        cx: &mut Turn<'_>,
        name: String,
        speech: Speech,
        export: Option<String>,
    ) -> Result<Address, ServerError> {
        let options = self.check_listener(&name, &speech, export.as_deref())?;
        let listener = Listener::adopt(super::super::activation::take(&name)?, &name)?;
        let address = listener.address().clone();
        let acceptor = Acceptor::new(listener, options).map_err(|e| ServerError::Watch(address, e))?;
        self.add_acceptor(cx, acceptor, Some(name), speech, export)
    }

    /// Serves one client on a socket of its own, and ends the program with it.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(in super::super) fn serve_single(
        &mut self,
        cx: &mut Turn<'_>,
        socket: OwnedFd,
        peer: Peer,
        export: Option<String>,
    ) -> Result<(), ServerError> {
        let speech = Speech::default();
        let options = self.check_listener(&Address::Stdio, &speech, export.as_deref())?;
        let acceptor = Acceptor::single(socket, peer, cx.now, options)
            .map_err(|e| ServerError::Watch(Address::Stdio, e))?;
        self.single = true;
        self.add_acceptor(cx, acceptor, None, speech, export).map(|_| ())
    }

    /// Whether the single client of [`Server::serve_single`] has gone.
    pub(super) fn single_is_gone(&self) -> bool {
        let here = |l: &Listening| l.address() == &Address::Stdio && l.handshakes() > 0;
        self.single
            && !self.stopping
            && !self.listeners.iter().any(here)
            && !self.connections.values().any(|c| c.listener == Address::Stdio)
    }

    fn add_acceptor(
        &mut self,
        cx: &mut Turn<'_>,
        acceptor: Acceptor,
        activated: Option<String>,
        speech: Speech,
        export: Option<String>,
    ) -> Result<Address, ServerError> {
        let watch = |e| ServerError::Watch(acceptor.address().clone(), e);
        cx.watch(acceptor.wait_fd()).map_err(|e| watch(e.into()))?;
        let bound = acceptor.address().clone();
        tracing::info!(address = %bound, dialect = ?speech.dialect, tls = ?speech.tls, "listening for NBD");
        self.listeners.push(Listening { acceptor, activated, speech, export });
        self.share_handshakes();
        let (wanted, most) = (self.options.max_connections, self.max_connections());
        if most < wanted {
            let limit = Budget::of_process().limit();
            tracing::warn!(
                "at most {most} NBD clients, where max_connections is {wanted}: {limit} open files (RLIMIT_NOFILE) are too few \
                 for more"
            );
        }
        Ok(bound)
    }

    /// After a listener has come or gone.
    fn share_handshakes(&mut self) {
        let most = self.max_handshakes(self.listeners.len());
        self.listeners.iter_mut().for_each(|l| l.acceptor.set_max_handshakes(most));
    }

    /// What a listener will need, and whether its export can be had by its dialect.
    fn check_listener(
        &self,
        address: &dyn std::fmt::Display,
        speech: &Speech,
        export: Option<&str>,
    ) -> Result<AcceptorOptions, ServerError> {
        if self.stopping {
            return Err(ServerError::Stopping);
        }
        if let Some(name) = export.filter(|name| !name.is_empty()) {
            match self.exports.get(name) {
                Some(export) => speech.fits(name, export.size())?,
                None => tracing::warn!(%address, export = name, "the listener's export does not exist yet"),
            }
        }
        speech.options(&self.options)
    }

    /// Accepts nothing there any more; connections stay.
    ///
    /// # Errors
    /// Nothing listens there.
    pub(in super::super) fn unlisten(
        &mut self,
        cx: &mut Turn<'_>,
        address: &Address,
    ) -> Result<(), ServerError> {
        let found = self.listeners.iter().position(|l| l.address() == address);
        let place = found.ok_or_else(|| ServerError::NoListener(address.clone()))?;
        let mut listening = self.listeners.remove(place);
        Self::end_listener(cx, &mut listening, &mut self.events);
        self.share_handshakes();
        tracing::info!(%address, "no longer listening for NBD");
        Ok(())
    }

    pub(super) fn end_listener(cx: &mut Turn<'_>, listening: &mut Listening, events: &mut Vec<Event>) {
        cx.unwatch(listening.acceptor.wait_fd());
        listening.acceptor.stop();
        listening.acceptor.close_handshakes(events);
        events.clear();
    }
}

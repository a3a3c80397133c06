//! A listening socket and the handshakes of those who connected to it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_proto::haggle::{Chosen, Outcome, Settings};
use reactor::AcceptPause;
use rustix::event::{Timespec, epoll};
use rustls::ServerConfig;

use super::address::{Address, Peer};
use super::handshake::{Handshake, HandshakeError, Progress};
use super::identity::{Identity, Shelf};
use super::link::Socket;
use super::socket::Listener;
use quota::Source;

/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 16;
/// Name of the listener in the epoll set; handshakes have their places.
const LISTENER: u64 = u64::MAX;

/// Limits of an [`Acceptor`].
#[derive(Clone, Debug)]
pub struct AcceptorOptions {
    /// How the server introduces itself.
    pub settings: Settings,
    /// Keys, where the settings have TLS.
    pub tls: Option<Arc<ServerConfig>>,
    /// How long a client may take to choose an export.
    pub timeout: Duration,
    /// Handshakes at once, at least 1. One more takes the place of one of the source that has most: of the one
    /// that is silent for the longest time.
    pub max_handshakes: usize,
}

impl Default for AcceptorOptions {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            tls: None,
            timeout: Duration::from_secs(10),
            max_handshakes: 64,
        }
    }
}

/// A connection in its transmission phase.
#[derive(Debug)]
pub struct Accepted {
    /// Non-blocking.
    pub socket: Socket,
    /// Who it is.
    pub who: Identity,
    /// What it chose.
    pub chosen: Chosen,
}

/// What became of a connection.
#[derive(Debug)]
pub enum Event {
    /// It chose an export.
    Accepted(Accepted),
    /// It said good-bye: it only wanted to know something.
    Left(Identity),
    /// It was closed.
    Failed(Identity, HandshakeError),
    /// Connections cannot be accepted for now; it goes on by itself. Told once in a while as long as it is so.
    Paused(io::Error),
}

/// Accepts, and haggles. Belongs to one thread; polled, and never blocks.
#[derive(Debug)]
pub struct Acceptor {
    epoll: OwnedFd,
    /// `None`: of one client only.
    listener: Option<Listener>,
    address: Address,
    options: AcceptorOptions,
    /// By place; the epoll set knows them by it.
    handshakes: Vec<Option<Handshake>>,
    active: usize,
    /// Counts turns of handshakes.
    turns: u64,
    pause: AcceptPause,
    /// The epoll set reports the listener.
    listening: bool,
    stopping: bool,
}

impl Acceptor {
    /// Takes connections of `listener`.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(listener: Listener, options: AcceptorOptions) -> io::Result<Self> {
        let mut this = Self::idle(listener.address().clone(), options)?;
        let data = epoll::EventData::new_u64(LISTENER);
        epoll::add(&this.epoll, &listener, data, epoll::EventFlags::IN)?;
        (this.listener, this.listening) = (Some(listener), true);
        Ok(this)
    }

    /// The handshake of one client, on a socket that somebody else has accepted.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn single(socket: OwnedFd, peer: Peer, now: Instant, options: AcceptorOptions) -> io::Result<Self> {
        let mut this = Self::idle(Address::Stdio, options)?;
        epoll::add(&this.epoll, &socket, epoll::EventData::new_u64(0), epoll::EventFlags::OUT)?;
        let (tls, deadline) = (this.options.tls.clone(), now + this.options.timeout);
        this.handshakes.push(Some(Handshake::new(socket, peer, this.options.settings, tls, 0, deadline)));
        this.active = 1;
        Ok(this)
    }

    fn idle(address: Address, options: AcceptorOptions) -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener: None,
            address,
            options,
            handshakes: Vec::new(),
            active: 0,
            turns: 0,
            pause: AcceptPause::default(),
            listening: false,
            stopping: false,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Handshakes going on.
    pub fn handshakes(&self) -> usize {
        self.active
    }

    /// Handshakes that there may be at once.
    pub fn max_handshakes(&self) -> usize {
        self.options.max_handshakes
    }

    /// Another number of them, at least 1, from the next connection on.
    pub fn set_max_handshakes(&mut self, most: usize) {
        self.options.max_handshakes = most.max(1);
    }

    /// Readable when there is something to do.
    pub fn wait_fd(&self) -> RawFd {
        self.epoll.as_fd().as_raw_fd()
    }

    /// When [`Acceptor::poll`] has something to do though [`Acceptor::wait_fd`] is quiet.
    pub fn deadline(&self) -> Option<Instant> {
        let handshakes = self.handshakes.iter().flatten().map(|h| h.deadline);
        handshakes.chain(self.pause.until()).min()
    }

    /// Accepts and goes on with what is ready. `admits`: whether one connection more may come from there. Appends to
    /// `events`; true if there was anything to do.
    pub fn poll(
        &mut self,
        now: Instant,
        admits: &dyn Fn(&Peer) -> bool,
        shelf: &dyn Shelf,
        events: &mut Vec<Event>,
    ) -> bool {
        let mut ready =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
                ACCEPTS_PER_TURN * 2];
        // A signal only means that this turn finds nothing.
        let n = epoll::wait(&self.epoll, &mut ready[..], Some(&Timespec::default())).unwrap_or(0);
        for event in &ready[..n] {
            match event.data.u64() {
                LISTENER => self.accept(now, admits, shelf, events),
                place => self.turn(place as usize, shelf, events),
            }
        }
        let expired = self.expire(now, events);
        self.listen_if_possible(now);
        n > 0 || expired
    }

    /// Accepts nothing more, and refuses what handshakes still ask for. The socket's file stays until this is dropped.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.handshakes.iter_mut().flatten().for_each(Handshake::stop);
        self.set_listening(false);
    }

    /// Closes the handshakes that are going on.
    pub fn close_handshakes(&mut self, events: &mut Vec<Event>) {
        for place in 0..self.handshakes.len() {
            self.fail(place, HandshakeError::Stopped, events);
        }
    }

    fn accept(
        &mut self,
        now: Instant,
        admits: &dyn Fn(&Peer) -> bool,
        shelf: &dyn Shelf,
        events: &mut Vec<Event>,
    ) {
        for _ in 0..ACCEPTS_PER_TURN {
            if self.stopping || self.pause.holds(now) {
                return;
            }
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok(None) => return,
                Ok(Some((_, peer))) if !admits(&peer) => {
                    events.push(Event::Failed(Identity { peer, tls: None }, HandshakeError::Full));
                }
                Ok(Some((socket, peer))) => {
                    self.make_room(peer.source(), events);
                    self.begin(now, socket, peer, shelf, events);
                }
                Err(e) => {
                    if self.pause.failed(now) {
                        events.push(Event::Paused(e));
                    }
                }
            }
        }
    }

    /// Ends handshakes until there may be one more, of `newcomer`.
    fn make_room(&mut self, newcomer: Source, events: &mut Vec<Event>) {
        while self.active >= self.options.max_handshakes {
            let Some(place) = self.least_worth(newcomer) else { return };
            self.fail(place, HandshakeError::Displaced, events);
        }
    }

    /// The handshake that goes when there are too many: of the source that has most, the newcomer included, the one that has
    /// been silent for the longest time. Not one that has never spoken rather than another: a newcomer has not, either.
    fn least_worth(&self, newcomer: Source) -> Option<usize> {
        let all = || self.handshakes.iter().enumerate().filter_map(|(place, h)| Some((place, h.as_ref()?)));
        let mut counts = HashMap::from([(newcomer, 1)]);
        all().for_each(|(_, h)| *counts.entry(h.who.peer.source()).or_insert(0) += 1);
        let of = |h: &Handshake| counts.get(&h.who.peer.source()).copied().unwrap_or(0);
        let most = all().map(|(_, h)| of(h)).max()?;
        let theirs = all().filter(|(_, h)| of(h) == most);
        theirs.min_by_key(|(_, h)| h.heard).map(|(place, _)| place)
    }

    fn begin(
        &mut self,
        now: Instant,
        socket: OwnedFd,
        peer: Peer,
        shelf: &dyn Shelf,
        events: &mut Vec<Event>,
    ) {
        let place = self.handshakes.iter().position(Option::is_none).unwrap_or(self.handshakes.len());
        let data = epoll::EventData::new_u64(place as u64);
        if let Err(e) = epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN) {
            let who = Identity { peer, tls: None };
            return events.push(Event::Failed(who, HandshakeError::Failed(e.into())));
        }
        if place == self.handshakes.len() {
            self.handshakes.push(None);
        }
        self.turns += 1;
        let deadline = now + self.options.timeout;
        self.handshakes[place] = Some(Handshake::new(
            socket,
            peer,
            self.options.settings,
            self.options.tls.clone(),
            self.turns,
            deadline,
        ));
        self.active += 1;
        self.turn(place, shelf, events);
    }

    fn turn(&mut self, place: usize, shelf: &dyn Shelf, events: &mut Vec<Event>) {
        let Some(handshake) = self.handshakes.get_mut(place).and_then(Option::as_mut) else { return };
        self.turns += 1;
        let interest = match handshake.turn(self.turns, shelf) {
            Ok(Progress::Read) => epoll::EventFlags::IN,
            Ok(Progress::Write) => epoll::EventFlags::OUT,
            Ok(Progress::Done) => return self.done(place, events),
            Err(e) => return self.fail(place, e, events),
        };
        let data = epoll::EventData::new_u64(place as u64);
        let armed = match handshake.socket() {
            Ok(socket) => epoll::modify(&self.epoll, socket, data, interest).map_err(io::Error::from),
            Err(_) => Ok(()),
        };
        if let Err(e) = armed {
            self.fail(place, HandshakeError::Failed(e), events);
        }
    }

    fn done(&mut self, place: usize, events: &mut Vec<Event>) {
        let Some(handshake) = self.take(place) else { return };
        let (socket, who, outcome) = handshake.into_parts();
        events.push(match (outcome, socket) {
            (Some(Outcome::Transmission(chosen)), Some(socket)) => {
                Event::Accepted(Accepted { socket, who, chosen })
            }
            _ => Event::Left(who),
        });
    }

    fn fail(&mut self, place: usize, why: HandshakeError, events: &mut Vec<Event>) {
        if let Some(handshake) = self.take(place) {
            events.push(Event::Failed(handshake.who, why));
        }
    }

    fn take(&mut self, place: usize) -> Option<Handshake> {
        let mut handshake = self.handshakes.get_mut(place)?.take()?;
        // The socket may live on elsewhere, so it must be told to go.
        if let Ok(socket) = handshake.socket() {
            let _ = epoll::delete(&self.epoll, socket);
        }
        self.active -= 1;
        Some(handshake)
    }

    fn expire(&mut self, now: Instant, events: &mut Vec<Event>) -> bool {
        let before = events.len();
        for place in 0..self.handshakes.len() {
            if self.handshakes[place].as_ref().is_some_and(|h| h.deadline <= now) {
                self.fail(place, HandshakeError::TimedOut, events);
            }
        }
        events.len() > before
    }

    /// A listener that nobody accepts from would keep the thread awake.
    fn listen_if_possible(&mut self, now: Instant) {
        let paused = self.pause.holds(now);
        self.set_listening(!self.stopping && !paused);
    }

    fn set_listening(&mut self, on: bool) {
        let Some(listener) = self.listener.as_ref().filter(|_| on != self.listening) else { return };
        let interest = if on { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        let data = epoll::EventData::new_u64(LISTENER);
        if epoll::modify(&self.epoll, listener, data, interest).is_ok() {
            self.listening = on;
        }
    }
}

//! The queue pairs of an engine and what happens to them.

use roce_proto::cm::Attributes;
use roce_proto::icrc::{Flow, FlowCrc, PeerIds};
use roce_proto::packet::{self, Packet, Parsed};
use roce_proto::{Counter, Nanos, rc};
use rustix::io::Errno;
use verbs::{RecvWr, SendOp, SendWr};

use super::completions::Completions;
use super::entry::{Done, Entry, Link};
use super::place::{Place, pieces};
use super::table::Table;
use super::{Engine, Mail, Source};
use crate::faults::Weather;
use crate::udp::Datagram;
use roce_proto::keys;

/// See the module.
pub struct Qps {
    pub table: Table,
    pub completions: Completions,
    /// Places of queue pairs that may have something to send, or another deadline than is noted.
    pub active: Vec<u16>,
    /// What a state machine has just reported.
    done: Vec<Done>,
    /// Queue pairs that control wants broken.
    failing: Vec<u32>,
    /// See [`crate::Options::faults`].
    weather: Option<Weather>,
}

impl Qps {
    pub fn new(completions: Completions, weather: Option<Weather>) -> Self {
        Self {
            table: Table::new(),
            completions,
            active: Vec::new(),
            // One packet can acknowledge a send queue; a longer one grows it, once.
            done: Vec::with_capacity(256),
            failing: Vec::new(),
            weather,
        }
    }

    pub fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// Has the queue pair at `place` looked at in this turn's sending.
    pub fn activate(&mut self, place: u16) {
        if let Some(entry) = self.table.at(place)
            && !entry.active
        {
            entry.active = true;
            self.active.push(place);
        }
    }

    /// A message from elsewhere. `src_port`: of our packets.
    pub fn mail(&mut self, engine: &Engine, mail: Mail, src_port: u16, now: Nanos) {
        match mail {
            Mail::Add(entry) => self.add(entry),
            Mail::Connect { attrs, config } => self.connect(&attrs, config, src_port, now),
            Mail::Fail { qpn } => self.failing.push(qpn),
            Mail::Stray(stray) => {
                engine.counters().count(Counter::Forwarded);
                self.packet(engine, &stray.from, &stray.bytes, now);
            }
        }
    }

    fn add(&mut self, entry: Box<Entry>) {
        let (qpn, requests) = (entry.qpn, entry.requests());
        if self.table.add(entry).is_ok() {
            self.completions.promise(requests);
        } else {
            tracing::error!(qpn, "too many queue pairs on one completion queue; this one does nothing");
        }
        // Room for the whole list, so that the data path need not grow it.
        let places = self.table.places().len();
        self.active.reserve(places.saturating_sub(self.active.len()));
    }

    fn connect(&mut self, attrs: &Attributes, config: rc::Config, src_port: u16, now: Nanos) {
        if let Some(place) = self.table.find(attrs.qpn)
            && let Some(entry) = self.table.at(place)
        {
            entry.connect(Link::new(attrs, src_port), config, now);
            self.activate(place);
        }
    }

    /// Queue pairs that control wants broken.
    pub fn failing(&self) -> usize {
        self.failing.len()
    }

    /// Breaks the first `n` of them. To be done when all has been received that had come when they were `n`: what a
    /// peer sent before it disconnected, its last acknowledgements above all, is in the socket before control hears of
    /// it.
    pub fn break_failing(&mut self, n: usize) {
        for i in 0..n {
            if let Some(place) = self.failing.get(i).and_then(|qpn| self.table.find(*qpn)) {
                self.fail(place);
            }
        }
        self.failing.drain(..n);
    }

    /// Moves the queue pair at `place` to the error state; the rest of its work flushes.
    pub fn fail(&mut self, place: u16) {
        let Some(entry) = self.table.at(place) else { return };
        let done = &mut self.done;
        entry.rc.fail(&mut |c| done.push(c));
        // What was received was received: the peer is to hear it.
        entry.rc.flush_acks();
        self.settle(place);
    }

    /// See [`Entry::refuse`].
    pub fn refuse(&mut self, engine: &Engine, place: u16, packet: &rc::Outgoing<u32>) {
        if let Some(entry) = self.table.at(place) {
            entry.refuse(packet, engine.counters(), &mut self.done);
        }
        self.settle(place);
    }

    /// A queue pair will be taken out: what it owes its peer becomes due.
    pub fn last_words(&mut self, qpn: u32) {
        if let Some(place) = self.table.find(qpn)
            && let Some(entry) = self.table.at(place)
        {
            entry.rc.flush_acks();
            self.activate(place);
        }
    }

    /// Takes a queue pair out. Completions of it may remain.
    pub fn remove(&mut self, qpn: u32) {
        if let Some(place) = self.table.find(qpn)
            && let Some(entry) = self.table.remove(place)
        {
            self.completions.withdraw(entry.requests());
        }
    }

    fn report(&mut self, place: u16) {
        let Self { table, completions, done, .. } = self;
        let Some(entry) = table.at(place) else { return done.clear() };
        entry.report(done, completions);
        if completions.is_overrun() && entry.rc.state() != rc::State::Error {
            self.break_all();
        }
    }

    /// Completions were lost, so nothing on this queue can be relied on.
    fn break_all(&mut self) {
        tracing::error!("a completion queue overran: more work was posted than it has entries");
        for place in self.table.places() {
            if let Some(entry) = self.table.at(place) {
                let done = &mut self.done;
                entry.rc.fail(&mut |c| done.push(c));
                entry.report(done, &mut self.completions);
            }
            self.activate(place);
        }
    }

    /// What a socket has brought.
    pub fn datagram(&mut self, engine: &Engine, datagram: &Datagram<'_>, now: Nanos) {
        let dst = datagram.dst.unwrap_or(engine.port.ip);
        for (index, udp) in (0..).zip(datagram.bytes.chunks(datagram.segment)) {
            let from = Source { src: datagram.src, src_port: datagram.src_port, dst, index };
            match self.weather.take() {
                None => self.packet(engine, &from, udp, now),
                Some(mut weather) => {
                    weather.pass(&from, udp, |from, udp| self.packet(engine, from, udp, now));
                    self.weather = Some(weather);
                }
            }
        }
    }

    fn packet(&mut self, engine: &Engine, from: &Source, udp: &[u8], now: Nanos) {
        let counters = engine.counters();
        counters.count(Counter::RxPackets);
        counters.add(Counter::RxBytes, udp.len() as u64);
        let result = match packet::parse(udp) {
            Ok(Parsed::Rc(packet)) => self.rc_packet(engine, from, udp, &packet, now),
            Ok(Parsed::Mad(_)) => {
                engine.pass_mad(from, udp);
                Ok(())
            }
            Err(reason) => Err(reason),
        };
        if let Err(reason) = result {
            counters.count(reason);
        }
    }

    fn rc_packet(
        &mut self,
        engine: &Engine,
        from: &Source,
        udp: &[u8],
        packet: &Packet<'_>,
        now: Nanos,
    ) -> Result<(), Counter> {
        let Some(place) = self.table.find(packet.headers.dest_qpn) else {
            return engine.pass_on(packet.headers.dest_qpn, from, udp);
        };
        let entry = self.table.at(place).ok_or(Counter::UnknownQpn)?;
        let link = entry.link.as_mut().ok_or(Counter::WrongState)?;
        if (link.peer, link.local) != (from.src, from.dst) {
            return Err(Counter::WrongSource);
        }
        if entry.rc.state() != rc::State::Ready {
            return Err(Counter::WrongState);
        }
        if !link.verify(from, udp) {
            return Err(Counter::Icrc);
        }
        let Entry { rc, sends, recvs, domain, .. } = entry;
        let mut place_of = Place { keys: &engine.port.keys, domain: *domain, sends, recvs };
        let done = &mut self.done;
        rc.receive(
            now,
            &packet.headers,
            packet.payload,
            packet.pad,
            &mut place_of,
            engine.counters(),
            &mut |c| done.push(c),
        );
        if !entry.heard && rc.heard_from_peer() {
            entry.heard = true;
            engine.heard(entry.conn);
        }
        if !self.done.is_empty() || entry.rc.state() == rc::State::Error {
            self.report(place);
        }
        self.activate(place);
        Ok(())
    }

    /// Does what is due. True: something was.
    pub fn timers(&mut self, engine: &Engine, now: Nanos) -> bool {
        if now < self.table.earliest() {
            return false;
        }
        let mut next = 0;
        let mut any = false;
        while let Some(place) = self.table.next_due(next, now) {
            next = place + 1;
            any = true;
            let Some(entry) = self.table.at(place) else {
                self.table.set_deadline(place, Nanos::MAX);
                continue;
            };
            entry.on_time(now, engine.counters(), &mut self.done);
            let at = entry.deadline();
            self.table.set_deadline(place, at);
            self.report(place);
            self.activate(place);
        }
        any
    }

    /// Acknowledgements that were to wait for company become due.
    pub fn flush_acks(&mut self) {
        for place in self.table.places() {
            if let Some(entry) = self.table.at(place)
                && entry.rc.deadline().is_some()
            {
                entry.rc.flush_acks();
                self.activate(place);
            }
        }
    }

    /// When the next queue pair is due, exactly.
    pub fn exact_deadline(&mut self) -> Nanos {
        // Nothing is due at time 0, so all are looked through.
        self.table.next_due(0, 0);
        self.table.earliest()
    }

    /// Queues sends.
    ///
    /// # Errors
    /// How many were queued, and why not the next.
    pub fn post_send(
        &mut self,
        engine: &Engine,
        qpn: u32,
        wrs: &[SendWr],
        max_sge: u32,
    ) -> Result<(), (usize, Errno)> {
        let place = self.table.find(qpn).ok_or((0, Errno::INVAL))?;
        let entry = self.table.at(place).ok_or((0, Errno::INVAL))?;
        let keys = &engine.port.keys;
        let mut result = Ok(());
        for (i, wr) in wrs.iter().enumerate() {
            if let Err(e) = post_one(entry, keys, wr, max_sge) {
                result = Err((i, e));
                break;
            }
        }
        self.posted(place);
        result
    }

    /// Queues receives.
    ///
    /// # Errors
    /// As for [`Qps::post_send`].
    pub fn post_recv(&mut self, qpn: u32, wrs: &[RecvWr], max_sge: u32) -> Result<(), (usize, Errno)> {
        let place = self.table.find(qpn).ok_or((0, Errno::INVAL))?;
        let entry = self.table.at(place).ok_or((0, Errno::INVAL))?;
        let mut result = Ok(());
        for (i, wr) in wrs.iter().enumerate() {
            let few = wr.sges.as_slice().len() <= max_sge as usize;
            if let Err(e) = if few { entry.post_recv(wr) } else { Err(Errno::INVAL) } {
                result = Err((i, e));
                break;
            }
        }
        if entry.rc.state() == rc::State::Error {
            self.fail(place);
        }
        result
    }

    /// See [`Entry::may_post_send`].
    ///
    /// # Errors
    /// As there.
    pub fn may_post_send(&mut self, qpn: u32) -> Result<(), Errno> {
        let place = self.table.find(qpn).ok_or(Errno::INVAL)?;
        self.table.at(place).ok_or(Errno::INVAL)?.may_post_send()
    }

    /// False if the queue pair is not connected.
    pub fn set_min_rnr_timer(&mut self, qpn: u32, code: u8) -> bool {
        let entry = self.table.find(qpn).and_then(|place| self.table.at(place));
        let entry = entry.filter(|entry| entry.rc.state() == rc::State::Ready);
        entry.map(|entry| entry.rc.set_min_rnr_timer(code)).is_some()
    }

    /// A bind of a window was done (or refused) in the send queue's name.
    ///
    /// # Errors
    /// As for [`Entry::post_done`].
    pub fn post_done(&mut self, qpn: u32, wr: &SendWr, ok: bool, status: u32) -> Result<(), Errno> {
        let place = self.table.find(qpn).ok_or(Errno::INVAL)?;
        self.table.at(place).ok_or(Errno::INVAL)?.post_done(wr, ok, status)?;
        self.posted(place);
        Ok(())
    }

    /// Reports what changed by other means than a packet.
    pub fn settle(&mut self, place: u16) {
        self.report(place);
        self.activate(place);
    }

    fn posted(&mut self, place: u16) {
        let Some(entry) = self.table.at(place) else { return };
        if entry.rc.state() == rc::State::Error {
            self.fail(place);
        } else {
            self.settle(place);
        }
    }
}

fn post_one(entry: &mut Entry, keys: &keys::Table, wr: &SendWr, max_sge: u32) -> Result<(), Errno> {
    if wr.sges.as_slice().len() > max_sge as usize {
        return Err(Errno::INVAL);
    }
    if let SendOp::LocalInvalidate(key) = wr.op {
        entry.may_post_send()?;
        let ok = keys.invalidate(key, entry.domain);
        return entry.post_done(wr, ok, verbs::wc_status::LOC_QP_OP_ERR);
    }
    let access =
        if matches!(wr.op, SendOp::Read { .. }) { keys::Access::LocalWrite } else { keys::Access::LocalRead };
    let sges = wr.sges.as_slice();
    let len = wr.sges.bytes() as u32;
    let local = pieces(sges, 0, len)
        .all(|sge| keys.pin(sge.lkey, entry.domain, sge.addr, u64::from(sge.len), access).is_ok());
    entry.post_send(wr, local)
}

impl Link {
    fn verify(&mut self, from: &Source, udp: &[u8]) -> bool {
        let ids = if self.own_peer { PeerIds::Own { index_in_run: from.index } } else { PeerIds::Foreign };
        // A peer has one source port per queue pair; another one is news, or a stranger's.
        if let Some((port, verifier)) = &mut self.back
            && *port == from.src_port
        {
            return verifier.verify(udp, ids);
        }
        let verifier = FlowCrc::new(Flow { src: from.src, src_port: from.src_port, dst: from.dst });
        let good = verifier.verify(udp, ids);
        if good {
            self.back = Some((from.src_port, verifier));
        }
        good
    }
}

/// Checks the ICRC of a packet of no connection.
pub fn verify_once(from: &Source, udp: &[u8]) -> bool {
    FlowCrc::new(Flow { src: from.src, src_port: from.src_port, dst: from.dst }).verify(udp, PeerIds::Foreign)
}

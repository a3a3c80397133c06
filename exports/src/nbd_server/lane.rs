//! The connections of one reactor.
//!
//! Connections with traffic are asked every turn; quiet ones are waited for in one epoll set, so that many of them cost
//! one system call.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bdev::Completions;
use iobuf::Registry;
use nbd_poll::{Buffers, End, Incoming, Share};
use nbd_proto::wire::ErrorCode;
use quota::Source;
use reactor::{Handle, Polled, Poller, Turn};
use rustix::event::{Timespec, epoll};

use super::client::{Client, NewClient};
use super::disk::{self, Disk, Tag};
use super::question::{Answer, Question};
use super::ranges::{Ticket, Waker};
use super::server::Server;

/// Turns with traffic between two looks at quiet connections.
const LOOK_EVERY: u32 = 16;

pub(super) struct Lane {
    // Field order is drop order: channels wait until the devices have let go of the memory of the connections.
    disks: Vec<Option<Disk>>,
    clients: Vec<Option<Client>>,
    /// How many there are.
    population: usize,
    /// Places of clients that are asked every turn.
    hot: Vec<u32>,
    /// Everything of the connections that is made for the first one.
    base: Option<Base>,
    registry: Arc<Registry>,
    control: Handle,
    /// Of this lane.
    reactor: Handle,
    turns: u32,
    /// When the first of the clients may have let its time pass.
    look_at: Option<Instant>,
    /// The first of those that are left alone is asked again.
    rest_until: Option<Instant>,
    /// Nobody with traffic expects to be asked before, and no device is at work.
    rests: bool,
    incoming: Vec<Incoming>,
    done: Completions,
}

struct Base {
    buffers: Buffers,
    /// The connections by their places.
    epoll: OwnedFd,
    /// What each source has of the memory outside the pools.
    shares: HashMap<Source, Share>,
}

impl Base {
    fn of_source(&mut self, source: Source) -> Buffers {
        self.shares.retain(|_, share| share.is_used());
        self.buffers.of(self.shares.entry(source).or_default())
    }
}

/// How messages find the lane of a reactor.
struct LaneCell(Rc<RefCell<Lane>>);

struct LanePoller(Rc<RefCell<Lane>>);

impl Lane {
    /// Sets up the lane of the reactor of `cx`.
    pub(super) fn install(cx: &mut Turn<'_>, reactor: Handle, control: Handle, registry: Arc<Registry>) {
        let lane = Rc::new(RefCell::new(Self {
            disks: Vec::new(),
            clients: Vec::new(),
            population: 0,
            hot: Vec::new(),
            base: None,
            registry,
            control,
            reactor,
            turns: 0,
            look_at: None,
            rest_until: None,
            rests: false,
            incoming: Vec::with_capacity(64),
            done: Vec::with_capacity(256),
        }));
        cx.set_local(Rc::new(LaneCell(lane.clone())));
        cx.add_poller("nbd_server", Box::new(LanePoller(lane)));
    }

    /// Runs `f` with the lane of `reactor`.
    pub(super) fn send(reactor: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        reactor.send(move |cx| {
            if let Some(cell) = cx.local::<LaneCell>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }

    /// Serves a connection. Its end, or that it could not be served, is told to the server.
    pub(super) fn add(&mut self, cx: &mut Turn<'_>, new: NewClient) {
        let id = new.id;
        if let Err(why) = self.try_add(cx, new) {
            self.tell_end(id, why);
        }
    }

    fn try_add(&mut self, cx: &mut Turn<'_>, new: NewClient) -> Result<(), String> {
        let base = self.base(cx)?;
        let epoll = base.epoll.try_clone().map_err(|e| e.to_string())?;
        let buffers = base.of_source(new.source);
        let disk = self.disk(cx, &new)?;
        let place = self.clients.iter().position(Option::is_none).unwrap_or(self.clients.len());
        let client = Client::new(new, disk, buffers, cx.now).and_then(|client| {
            let data = epoll::EventData::new_u64(place as u64);
            epoll::add(&epoll, borrow(client.connection.wait_fd()), data, epoll::EventFlags::IN)?;
            Ok(client)
        });
        match client {
            Ok(client) if place == self.clients.len() => self.clients.push(Some(client)),
            Ok(client) => self.clients[place] = Some(client),
            Err(e) => {
                self.release_disk(cx, disk);
                return Err(e.to_string());
            }
        }
        self.population += 1;
        self.hot.reserve(self.clients.len());
        self.heat(place as u32);
        Ok(())
    }

    fn base(&mut self, cx: &mut Turn<'_>) -> Result<&mut Base, String> {
        if self.base.is_none() {
            let buffers = Buffers::new(&self.registry).map_err(|e| e.to_string())?;
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| e.to_string())?;
            cx.watch(epoll.as_raw_fd()).map_err(|e| e.to_string())?;
            self.base = Some(Base { buffers, epoll, shares: HashMap::new() });
        }
        Ok(self.base.as_mut().expect("just made"))
    }

    /// The place of the export's disk, with one user more.
    fn disk(&mut self, cx: &mut Turn<'_>, new: &NewClient) -> Result<usize, String> {
        let known = self.disks.iter().position(|d| d.as_ref().is_some_and(|d| d.export == new.export));
        let place = match known {
            Some(place) => place,
            None => {
                let waker = LaneWaker { reactor: self.reactor.clone(), export: new.export };
                let member = new.ranges.join(Arc::new(waker));
                let disk = Disk::new(new.export, &new.descriptor, member).map_err(|e| e.to_string())?;
                if let Some(fd) = disk.channel.wait_fd() {
                    cx.watch(fd).map_err(|e| format!("cannot watch an I/O channel: {e}"))?;
                }
                let place = self.disks.iter().position(Option::is_none).unwrap_or(self.disks.len());
                if place == self.disks.len() {
                    self.disks.push(None);
                }
                self.disks[place] = Some(disk);
                place
            }
        };
        if let Some(disk) = &mut self.disks[place] {
            disk.users += 1;
        }
        Ok(place)
    }

    fn release_disk(&mut self, cx: &mut Turn<'_>, place: usize) {
        let Some(disk) = &mut self.disks[place] else { return };
        disk.users -= 1;
        if disk.users == 0 {
            if let Some(fd) = disk.channel.wait_fd() {
                cx.unwatch(fd);
            }
            self.disks[place] = None;
        }
    }

    /// Lets the requests in flight of a connection end, then closes it.
    pub(super) fn close(&mut self, cx: &mut Turn<'_>, id: u64) {
        let is_it = |c: &Option<Client>| c.as_ref().is_some_and(|c| c.id == id);
        let Some(place) = self.clients.iter().position(is_it) else { return };
        if let Some(client) = &mut self.clients[place] {
            client.close(cx.now);
            if let Some(disk) = self.disks[client.disk].as_mut() {
                disk.cut_short(place as u32);
            }
        }
        self.heat(place as u32);
    }

    /// Closes all connections now. Devices are waited for, answers are not.
    pub(super) fn abort(&mut self, cx: &mut Turn<'_>) {
        for disk in self.disks.iter().flatten() {
            if let Some(fd) = disk.channel.wait_fd() {
                cx.unwatch(fd);
            }
        }
        self.disks.clear();
        self.hot.clear();
        self.population = 0;
        self.note_rest();
        let ids: Vec<u64> = self.clients.drain(..).flatten().map(|c| c.id).collect();
        ids.into_iter().for_each(|id| self.tell_end(id, "given up at shutdown".into()));
    }

    fn heat(&mut self, place: u32) {
        let Some(client) = self.clients.get_mut(place as usize).and_then(Option::as_mut) else { return };
        client.warm();
        if !client.hot {
            client.hot = true;
            self.hot.push(place);
        }
    }

    fn tell_end(&self, id: u64, why: String) {
        Server::send(&self.control, move |server, cx| server.connection_ended(cx, id, &why, false));
    }

    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        self.turns += 1;
        self.shed(cx.now);
        if self.hot.len() < self.population && (self.turns >= LOOK_EVERY || self.hot.is_empty()) {
            self.look_at_quiet_ones();
        }
        let mut busy = false;
        for i in 0..self.hot.len() {
            busy |= self.receive(cx.now, self.hot[i]);
        }
        for place in 0..self.disks.len() {
            busy |= self.complete(place);
        }
        let mut i = 0;
        while i < self.hot.len() {
            let place = self.hot[i];
            if self.send_answers(cx, place) {
                i += 1;
            } else {
                self.hot.swap_remove(i);
            }
        }
        self.note_rest();
        busy
    }

    /// Whether clients with traffic are left alone now, and until when.
    fn note_rest(&mut self) {
        let hot = || self.hot.iter().filter_map(|place| self.clients[*place as usize].as_ref());
        self.rest_until = hot().filter_map(Client::rests_until).min();
        self.rests = self.rest_until.is_some()
            && hot().all(|c| c.rests_until().is_some())
            && self.disks.iter().flatten().all(|d| d.channel.inflight() == 0);
    }

    fn look_at_quiet_ones(&mut self) {
        self.turns = 0;
        let Some(base) = &self.base else { return };
        let mut ready =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 32];
        // A signal only means that the next look finds them.
        let n = epoll::wait(&base.epoll, &mut ready[..], Some(&Timespec::default())).unwrap_or(0);
        for event in &ready[..n] {
            self.heat(event.data.u64() as u32);
        }
    }

    /// Takes requests of one client to its disk.
    fn receive(&mut self, now: Instant, place: u32) -> bool {
        let Some(client) = self.clients[place as usize].as_mut() else { return false };
        let Some(disk) = self.disks[client.disk].as_mut() else { return false };
        client.follow_size(disk.size());
        let moved = client.receive(now, &mut self.incoming);
        for incoming in self.incoming.drain(..) {
            client.stats.count(&incoming);
            if let Some(question) = Question::of(&incoming, disk.shift()) {
                client.questions.push(question);
                continue;
            }
            if disk.is_partial(&incoming) {
                client.armed.get_or_insert_with(|| disk.arm());
            }
            let id = incoming.id;
            if let Some(result) = disk.submit(place, incoming) {
                client.stats.count_result(&result);
                client.connection.reply(id, result);
            }
        }
        self.ask(place);
        moved
    }

    /// Takes the next questions of a client to the control thread, or answers them where that would know no more.
    fn ask(&mut self, place: u32) {
        let Some(client) = self.clients.get_mut(place as usize).and_then(Option::as_mut) else { return };
        let Some(disk) = self.disks[client.disk].as_ref() else { return };
        while let Some(question) = client.questions.next() {
            if question.is_worth_asking(&disk.descriptor) {
                let (descriptor, reactor, id) = (disk.descriptor.clone(), self.reactor.clone(), client.id);
                return self.control.send(move |_| {
                    let answer = question.ask(&descriptor);
                    Self::send(&reactor, move |lane, _| lane.answered(place, id, question, &answer));
                });
            }
            client.answered(question.request, &question.plain());
        }
    }

    /// The control thread has answered a question of client `id`.
    fn answered(&mut self, place: u32, id: u64, question: Question, answer: &Answer) {
        // After an abort there may be nobody there, or somebody else.
        let found = self.clients.get_mut(place as usize).and_then(Option::as_mut).filter(|c| c.id == id);
        let Some(client) = found else { return };
        client.answered(question.request, answer);
        self.heat(place);
        self.ask(place);
    }

    /// Kicks a disk and takes its completions to their clients.
    fn complete(&mut self, place: usize) -> bool {
        let Some(disk) = self.disks[place].as_mut() else { return false };
        if disk.channel.inflight() == 0 {
            return false;
        }
        disk.channel.kick();
        let mut done = std::mem::take(&mut self.done);
        done.clear();
        disk.channel.poll(&mut done);
        for c in &done {
            let Some(disk) = self.disks[place].as_mut() else { break };
            if let Some((tag, result)) = disk.finished(c.cookie, c.status) {
                self.answer(tag, result);
            }
        }
        let any = !done.is_empty();
        self.done = done;
        if any {
            self.resubmit(place);
        }
        any
    }

    /// Runs `f` with the disk of an export, and answers what comes of it.
    fn on_disk(&mut self, export: u64, f: impl FnOnce(&mut Disk) -> Option<disk::Answer>) {
        let Some(disk) = self.disks.iter_mut().flatten().find(|d| d.export == export) else { return };
        if let Some((tag, result)) = f(disk) {
            self.answer(tag, result);
        }
    }

    fn resubmit(&mut self, place: usize) {
        let Some(disk) = self.disks[place].as_mut() else { return };
        // Allocates only for refusals.
        let mut refused = Vec::new();
        disk.resubmit(|answer| refused.push(answer));
        refused.into_iter().for_each(|(tag, result)| self.answer(tag, result));
    }

    fn answer(&mut self, tag: Tag, result: Result<(), ErrorCode>) {
        // Clients stay until all their requests are answered.
        let Some(client) = self.clients.get_mut(tag.client as usize).and_then(Option::as_mut) else { return };
        client.stats.count_result(&result);
        client.connection.reply(tag.request, result);
        self.heat(tag.client);
    }

    /// Sends what is ready; false if the client is gone or quiet.
    fn send_answers(&mut self, cx: &mut Turn<'_>, place: u32) -> bool {
        let Some(client) = self.clients[place as usize].as_mut() else { return false };
        client.connection.send();
        client.mind_progress(cx.now);
        if client.mind_fence()
            && let Some(disk) = self.disks[client.disk].as_mut()
        {
            disk.cut_short(place);
        }
        if client.ending(cx.now) {
            self.remove(cx, place);
            return false;
        }
        client.hot = !client.cools(cx.now);
        if let Some(deadline) = client.deadline() {
            self.look_at = Some(self.look_at.map_or(deadline, |t| t.min(deadline)));
        }
        self.clients[place as usize].as_ref().is_some_and(|c| c.hot)
    }

    /// Looks for clients that have let their time pass, when the first one may have.
    fn shed(&mut self, now: Instant) {
        if self.look_at.is_none_or(|t| t > now) {
            return;
        }
        self.look_at = None;
        let wanted = self.base.as_ref().is_some_and(|base| base.buffers.take_wanted());
        for place in 0..self.clients.len() {
            let Some(client) = self.clients[place].as_mut() else { continue };
            let stalled = client.shed_if_stalled(now, wanted);
            let deadline = client.deadline();
            self.look_at = self.look_at.into_iter().chain(deadline).min();
            if stalled || deadline.is_some_and(|t| t <= now) {
                self.heat(place as u32);
            }
        }
    }

    fn remove(&mut self, cx: &mut Turn<'_>, place: u32) {
        let Some(client) = self.clients[place as usize].take() else { return };
        self.population -= 1;
        if let Some(base) = &self.base {
            // Before its descriptor is closed, whose number may be somebody's soon.
            let _ = epoll::delete(&base.epoll, borrow(client.connection.wait_fd()));
        }
        let shed = matches!(client.connection.end(), Some(End::Stalled | End::Slow));
        let why = client.connection.end().map_or_else(String::new, ToString::to_string);
        self.release_disk(cx, client.disk);
        let id = client.id;
        drop(client);
        Server::send(&self.control, move |server, cx| server.connection_ended(cx, id, &why, shed));
    }
}

/// How the range lock of an export finds its disk on a reactor.
struct LaneWaker {
    reactor: Handle,
    export: u64,
}

impl Waker for LaneWaker {
    fn drain(&self) {
        let export = self.export;
        Lane::send(&self.reactor, move |lane, _| {
            lane.on_disk(export, |disk| {
                disk.drain();
                None
            });
        });
    }

    fn granted(&self, ticket: Ticket) {
        let export = self.export;
        Lane::send(&self.reactor, move |lane, _| lane.on_disk(export, |disk| disk.granted(ticket)));
    }
}

fn borrow<'a>(fd: std::os::fd::RawFd) -> BorrowedFd<'a> {
    // SAFETY: the number of a connection's own epoll descriptor, which is open as long as the connection; it is only
    // handed to epoll_ctl, while the connection is there.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

impl Poller for LanePoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }

    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        let lane = &mut *self.0.borrow_mut();
        // The first turn afterwards looks at everybody.
        lane.turns = LOOK_EVERY;
        let mut awake = lane.disks.iter().flatten().any(|d| d.channel.ready());
        for place in &lane.hot {
            if let Some(client) = lane.clients[*place as usize].as_mut() {
                awake |= client.before_sleep(cx.now);
            }
        }
        awake.into()
    }

    fn deadline(&self) -> Option<Instant> {
        let lane = self.0.borrow();
        let disks = lane.disks.iter().flatten().filter_map(|d| d.channel.deadline());
        let clients = lane.clients.iter().flatten().filter_map(Client::deadline);
        disks.chain(clients).chain(lane.rest_until).min()
    }

    fn rests(&self) -> bool {
        self.0.borrow().rests
    }
}

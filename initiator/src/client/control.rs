//! The control side: sessions, and calls to their servers.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use iobuf::{Region, Registry};
use reactor::{Handle, Turn};
use rnbd_proto::Errno;
use rnbd_proto::device::DevGeometry;
use rnbd_proto::open::AccessMode;
use rnbd_proto::wire::{MsgClose, MsgOpen, MsgOpenRsp, RNBD_PROTO_VER_MAJOR};
use rtrs_poll::client::{
    Client, ControlError, Event as RtrsEvent, Lane, Session, SessionId, SessionOptions, Upper,
};

use super::admin::{ANSWER_ROOM, Answer, Ask, Call};
use super::device::Device;
use super::error::CallError;
use super::lane::RnbdLane;

/// Pause before SESS_INFO is sent again that a server has refused.
const SESS_INFO_RETRY: Duration = Duration::from_secs(1);

/// What becomes of sessions.
#[derive(Clone, Debug)]
pub enum Event {
    /// Connected, and versions are exchanged: open devices now.
    Ready {
        /// Which.
        session: Arc<Session>,
        /// Counts how often it came up: what was opened in an earlier generation is gone.
        generation: u64,
    },
    /// SESS_INFO failed; it is sent again after a while.
    NotReady {
        /// Which.
        session: SessionId,
        /// Why.
        why: CallError,
    },
    /// Of RTRS. Between its `SessionUp` and [`Event::Ready`] nothing can be opened.
    Rtrs(RtrsEvent),
}

type EventHandler = Rc<dyn Fn(&mut Turn<'_>, Event)>;
type CallHandler<C> = Box<dyn FnOnce(&mut Initiator<C>, &mut Turn<'_>, Result<Answer, Errno>) -> Outcome>;
/// What is left to do once the initiator is not borrowed any more.
type Outcome = Option<Box<dyn FnOnce(&mut Turn<'_>)>>;

/// A session that has been up.
struct Entry {
    session: Arc<Session>,
    generation: u64,
    /// SESS_INFO was answered.
    ready: bool,
    /// Where the server writes its answers.
    answers: Option<Arc<Region>>,
}

/// RNBD sessions on the control thread.
pub struct Initiator<C: Upper> {
    client: Rc<RefCell<Client<RnbdLane<C>>>>,
    handler: EventHandler,
    registry: Arc<Registry>,
    reactors: Vec<Handle>,
    sessions: HashMap<SessionId, Entry>,
    calls: HashMap<u64, CallHandler<C>>,
    next_call: u64,
}

/// How messages find the initiator on the control thread.
struct InitiatorCell<C: Upper>(Rc<RefCell<Initiator<C>>>);

impl<C: Upper> Initiator<C> {
    /// Sets an initiator up on the control thread `cx`, with a lane on each of `reactors`. `registry`: the memory of
    /// requests, see [`Client::install`]. `consumer` makes each lane's consumer, on its reactor; `handler` hears what
    /// becomes of sessions, here, and may use the initiator.
    pub fn install(
        cx: &mut Turn<'_>,
        reactors: &[Handle],
        registry: Arc<Registry>,
        consumer: impl Fn(&mut Turn<'_>) -> C + Send + Sync + 'static,
        handler: impl Fn(&mut Turn<'_>, Event) + 'static,
    ) -> Rc<RefCell<Self>> {
        let control = cx.handle().clone();
        let reply = Arc::new(move |number, answer| {
            control.send(move |cx| Self::here(cx, |i, cx| i.answered(cx, number, answer)));
        });
        let client = Client::install(
            cx,
            reactors,
            registry.clone(),
            move |cx| RnbdLane::new(consumer(cx), reply.clone()),
            |cx, event| Self::here(cx, |i, _| i.rtrs_event(event)),
        );
        let initiator = Rc::new(RefCell::new(Self {
            client,
            handler: Rc::new(handler),
            registry,
            reactors: reactors.to_vec(),
            sessions: HashMap::new(),
            calls: HashMap::new(),
            next_call: 0,
        }));
        cx.set_local(Rc::new(InitiatorCell(initiator.clone())));
        initiator
    }

    /// Runs `f` on the initiator of this thread, then what it leaves to do.
    fn here(cx: &mut Turn<'_>, f: impl FnOnce(&mut Self, &mut Turn<'_>) -> Outcome) {
        let Some(cell) = cx.local::<InitiatorCell<C>>() else { return };
        let rest = f(&mut cell.0.borrow_mut(), cx);
        // Not while the initiator is borrowed: handlers may use it.
        if let Some(rest) = rest {
            rest(cx);
        }
    }

    /// The RTRS client, for connection managers, paths, policies and counters. Not to be kept borrowed.
    pub fn client(&self) -> &Rc<RefCell<Client<RnbdLane<C>>>> {
        &self.client
    }

    /// As [`Client::create_session`].
    ///
    /// # Errors
    /// Those of it.
    pub fn create_session(
        &mut self,
        cx: &Turn<'_>,
        options: SessionOptions,
    ) -> Result<SessionId, ControlError> {
        self.client.borrow_mut().create_session(cx, options)
    }

    /// As [`Client::close_session`]: the server then closes what is open in it.
    ///
    /// # Errors
    /// Those of it.
    pub fn close_session(&mut self, cx: &Turn<'_>, session: SessionId) -> Result<(), ControlError> {
        self.client.borrow_mut().close_session(cx, session)
    }

    /// Opens the device that the server finds under `name`; `done` gets what it says. A device that is open already
    /// is only described anew, with the same number.
    pub fn open(
        &mut self,
        cx: &mut Turn<'_>,
        session: SessionId,
        name: &str,
        mode: AccessMode,
        done: impl FnOnce(&mut Turn<'_>, Result<Device, CallError>) + 'static,
    ) {
        let message = MsgOpen::request(mode.to_wire(), name.as_bytes()).filter(|_| !name.is_empty());
        let generation = self.sessions.get(&session).filter(|s| s.ready).map(|s| s.generation);
        let refused = match (&message, generation) {
            (None, _) => CallError::Name,
            (Some(_), None) => CallError::NotConnected,
            (Some(message), Some(generation)) => {
                let ask = Ask::Open(Box::new(*message));
                return self.call(session, ask, move |i, _, answer| {
                    let result = match answer {
                        Ok(Answer::Open(rsp)) => i.opened(session, generation, &rsp),
                        Ok(_) => Err(CallError::Server(Errno::EPROTO)),
                        Err(errno) => Err(call_error(errno)),
                    };
                    Some(Box::new(move |cx| done(cx, result)))
                });
            }
        };
        // Not from within this call: `done` may want the initiator.
        cx.after(Duration::ZERO, move |cx| done(cx, Err(refused)));
    }

    /// Closes a device, which waits for its I/O at the server.
    pub fn close(
        &mut self,
        device: &Device,
        done: impl FnOnce(&mut Turn<'_>, Result<(), CallError>) + 'static,
    ) {
        self.call(device.session, Ask::Close(MsgClose::request(device.id)), move |_, _, answer| {
            let result = answer.map(drop).map_err(call_error);
            Some(Box::new(move |cx| done(cx, result)))
        });
    }

    /// Sends a call to the reactor with con 0; `done` gets the answer.
    fn call(
        &mut self,
        session: SessionId,
        ask: Ask,
        done: impl FnOnce(&mut Self, &mut Turn<'_>, Result<Answer, Errno>) -> Outcome + 'static,
    ) {
        let number = self.next_call;
        self.next_call += 1;
        self.calls.insert(number, Box::new(done));
        // Without a session any lane will do: it knows none either, and says so.
        let reactor = self.sessions.get(&session).and_then(|s| s.session.reactors.first());
        let reactor = reactor.copied().unwrap_or(0);
        Lane::<RnbdLane<C>>::with_upper(&self.reactors[reactor], move |cx, lane, io| {
            lane.call(cx, io, session, Call { number, ask });
        });
    }

    fn answered(&mut self, cx: &mut Turn<'_>, number: u64, answer: Result<Answer, Errno>) -> Outcome {
        let done = self.calls.remove(&number)?;
        done(self, cx, answer)
    }

    fn opened(&mut self, session: SessionId, generation: u64, rsp: &MsgOpenRsp) -> Result<Device, CallError> {
        // An answer of an earlier generation is of no use, though the session may be up again.
        let current = self.sessions.get(&session).filter(|s| s.ready && s.generation == generation);
        let max_io_size = current.ok_or(CallError::NotConnected)?.session.limits.max_io_size;
        let id = rsp.device_id.get();
        match DevGeometry::from_open_rsp(rsp) {
            Ok(geometry) => Ok(Device { session, generation, id, geometry, max_io_size }),
            Err(e) => {
                // As the kernel's client: what cannot be used is given back.
                self.call(session, Ask::Close(MsgClose::request(id)), |_, _, _| None);
                Err(e.into())
            }
        }
    }

    fn tell(&self, event: Event) -> Outcome {
        let handler = self.handler.clone();
        Some(Box::new(move |cx| handler(cx, event)))
    }

    fn rtrs_event(&mut self, event: RtrsEvent) -> Outcome {
        match &event {
            RtrsEvent::SessionUp { session, generation } => self.session_up(session.clone(), *generation),
            RtrsEvent::SessionDown { session } => {
                if let Some(entry) = self.sessions.get_mut(session) {
                    entry.ready = false;
                }
            }
            RtrsEvent::SessionEnded { session, .. } => drop(self.sessions.remove(session)),
            _ => {}
        }
        self.tell(Event::Rtrs(event))
    }

    /// Memory for answers, then SESS_INFO, the first message of a session.
    fn session_up(&mut self, session: Arc<Session>, generation: u64) {
        let (id, reactor) = (session.id, session.reactors.first().copied().unwrap_or(0));
        let former = self.sessions.remove(&id).and_then(|e| e.answers);
        // Without memory the calls fail, as those of a lost session.
        let answers = former.or_else(|| self.registry.map(ANSWER_ROOM).ok());
        self.sessions.insert(id, Entry { session, generation, ready: false, answers: answers.clone() });
        if let Some(answers) = answers {
            Lane::<RnbdLane<C>>::with_upper(&self.reactors[reactor], move |_, lane, _| {
                lane.begin(id, answers);
            });
        }
        self.sess_info(id, generation);
    }

    fn sess_info(&mut self, id: SessionId, generation: u64) {
        self.call(id, Ask::SessInfo, move |i, cx, answer| {
            let entry = i.sessions.get_mut(&id).filter(|e| e.generation == generation)?;
            let why = match answer {
                // The version only says whether the server looks at I/O priorities, which are not sent.
                Ok(Answer::SessInfo(rsp)) if rsp.ver.min(RNBD_PROTO_VER_MAJOR) > 0 => {
                    entry.ready = true;
                    let session = entry.session.clone();
                    return i.tell(Event::Ready { session, generation });
                }
                Ok(_) => CallError::Server(Errno::EPROTO),
                Err(errno) => call_error(errno),
            };
            // A lost session says so itself; this one may only have been refused memory.
            cx.after(SESS_INFO_RETRY, move |cx| {
                Self::here(cx, |i, _| {
                    let current = i.sessions.get(&id).is_some_and(|e| e.generation == generation && !e.ready);
                    if current {
                        i.sess_info(id, generation);
                    }
                    None
                });
            });
            i.tell(Event::NotReady { session: id, why })
        });
    }
}

/// ECONNABORTED is the lane's, and no server's.
fn call_error(errno: Errno) -> CallError {
    if errno == Errno::ECONNABORTED { CallError::NotConnected } else { CallError::Server(errno) }
}

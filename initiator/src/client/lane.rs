//! The reactor side: passes I/O between the RTRS lane and its consumer, and does administration beside.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iobuf::Region;
use reactor::{Handle, Polled, Turn};
use rnbd_proto::Errno;
use rtrs_poll::client::{Io, Lane, LaneRef, PathId, Session, SessionId, SessionKey, Upper};

use super::admin::{Admin, Answer, Call};

/// Highest cookie that a consumer may use.
pub const MAX_COOKIE: u64 = (1 << 63) - 1;
/// Of administration; one call at a time needs one.
pub(super) const ADMIN_COOKIE: u64 = 1 << 63;
/// Pause before a call is tried again that could not be sent.
const RETRY: Duration = Duration::from_millis(1);

/// How answers reach the control thread.
pub(super) type Reply = Arc<dyn Fn(u64, Result<Answer, Errno>) + Send + Sync>;

/// One reactor's share of an RNBD client. `C` is the consumer: it hears of sessions and of its own completions as if
/// it were RTRS's upper layer, and submits with [`super::submit`].
pub struct RnbdLane<C> {
    consumer: C,
    /// Sessions that are up here.
    sessions: Vec<(SessionId, SessionKey)>,
    /// Sessions whose con 0 is here.
    admins: Vec<Admin>,
    reply: Reply,
    retry_at: Option<Instant>,
}

impl<C: Upper> RnbdLane<C> {
    pub(super) fn new(consumer: C, reply: Reply) -> Self {
        Self { consumer, sessions: Vec::new(), admins: Vec::new(), reply, retry_at: None }
    }

    /// For messages of the consumer's control part: the consumer and the lane's I/O side, on `reactor`.
    pub fn with(reactor: &Handle, f: impl FnOnce(&mut Turn<'_>, &mut C, &mut Io) + Send + 'static) {
        Lane::<Self>::with_upper(reactor, move |cx, lane, io| f(cx, &mut lane.consumer, io));
    }

    /// As [`RnbdLane::with`], at once, for others on the same reactor. Not from within a call of the consumer.
    pub fn with_here(cx: &mut Turn<'_>, f: impl FnOnce(&mut Turn<'_>, &mut C, &mut Io)) {
        Lane::<Self>::with_upper_here(cx, |cx, lane, io| f(cx, &mut lane.consumer, io));
    }

    /// The lane of this reactor, for those who have no [`Turn`] at hand.
    pub fn reference(cx: &Turn<'_>) -> LaneRef<Self> {
        Lane::reference(cx)
    }

    fn key(&self, session: SessionId) -> Option<SessionKey> {
        self.sessions.iter().find(|(s, _)| *s == session).map(|(_, k)| *k)
    }

    /// Control: answers of `session`, which has come up, may land in `answers`.
    pub(super) fn begin(&mut self, session: SessionId, answers: Arc<Region>) {
        if let Some(key) = self.key(session) {
            self.admins.push(Admin::new(key, answers));
        }
    }

    /// Control: a call to the server of `session`. It is answered exactly once.
    pub(super) fn call(&mut self, cx: &Turn<'_>, io: &mut Io, session: SessionId, call: Call) {
        let key = self.key(session);
        match self.admins.iter_mut().find(|a| Some(a.key) == key) {
            Some(admin) => admin.push(call),
            None => return (self.reply)(call.number, Err(Errno::ECONNABORTED)),
        }
        self.advance(cx.now, io);
    }

    /// Sends calls that can be sent.
    fn advance(&mut self, now: Instant, io: &mut Io) {
        for admin in &mut self.admins {
            while let Some((call, errno)) = admin.advance(io) {
                (self.reply)(call.number, Err(errno));
            }
        }
        self.retry_at = self.admins.iter().any(Admin::waits).then_some(now + RETRY);
    }

    fn admin_completed(&mut self, now: Instant, io: &mut Io, key: SessionKey, result: Result<(), Errno>) {
        let admin = self.admins.iter_mut().find(|a| a.key == key);
        if let Some((call, answer)) = admin.and_then(|a| a.completed(result)) {
            (self.reply)(call.number, answer);
        }
        self.advance(now, io);
    }
}

impl<C: Upper> Upper for RnbdLane<C> {
    fn session_up(&mut self, cx: &mut Turn<'_>, io: &mut Io, key: SessionKey, session: &Arc<Session>) {
        self.sessions.push((session.id, key));
        self.consumer.session_up(cx, io, key, session);
    }

    fn completed(
        &mut self,
        cx: &mut Turn<'_>,
        io: &mut Io,
        key: SessionKey,
        cookie: u64,
        result: Result<(), Errno>,
    ) {
        if cookie <= MAX_COOKIE {
            self.consumer.completed(cx, io, key, cookie, result);
        } else {
            self.admin_completed(cx.now, io, key, result);
        }
    }

    fn failing_over(&mut self, cx: &mut Turn<'_>, key: SessionKey, cookie: u64, path: PathId) {
        if cookie <= MAX_COOKIE {
            self.consumer.failing_over(cx, key, cookie, path);
        }
    }

    fn session_down(&mut self, cx: &mut Turn<'_>, io: &mut Io, key: SessionKey) {
        self.sessions.retain(|(_, k)| *k != key);
        if let Some(i) = self.admins.iter().position(|a| a.key == key) {
            let unsent = self.admins.swap_remove(i).into_unsent();
            unsent.for_each(|call| (self.reply)(call.number, Err(Errno::ECONNABORTED)));
        }
        self.consumer.session_down(cx, io, key);
    }

    fn poll(&mut self, cx: &mut Turn<'_>, io: &mut Io) -> bool {
        if self.retry_at.is_some_and(|at| at <= cx.now) {
            self.advance(cx.now, io);
        }
        self.consumer.poll(cx, io)
    }

    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.consumer.before_sleep(cx)
    }

    fn deadline(&self) -> Option<Instant> {
        self.consumer.deadline().into_iter().chain(self.retry_at).min()
    }
}

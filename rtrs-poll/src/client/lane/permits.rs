//! Buffer ids of a session on one reactor, and the requests that hold them. They are the session's, not a path's: a
//! request that fails over keeps its id.

use iobuf::{RegionId, Segment};

use super::slab::Key;
use crate::client::upper::{Data, Via};
use crate::upper::MAX_USR_LEN;

/// Pieces of data that one request may have: a send's, less the header's.
pub(in crate::client) const MAX_PIECES: usize = verbs::SgeList::MAX - 1;

/// A request's data, by value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    list: [Segment; MAX_PIECES],
    len: u8,
    read: bool,
}

impl Pieces {
    /// `None` if there are too many. Empty ones say nothing, and to some devices mean 2 GiB: they are left out.
    pub fn new(data: Data<'_>) -> Option<Self> {
        let none = Segment { addr: 0, len: 0, region: RegionId::NONE };
        let mut pieces = Self { list: [none; MAX_PIECES], len: 0, read: matches!(data, Data::Read(_)) };
        let given = match &data {
            Data::Write(pieces) => pieces,
            Data::Read(target) => target.as_slice(),
        };
        for segment in given.iter().filter(|s| s.len > 0) {
            *pieces.list.get_mut(usize::from(pieces.len))? = *segment;
            pieces.len += 1;
        }
        Some(pieces)
    }

    pub fn as_slice(&self) -> &[Segment] {
        &self.list[..usize::from(self.len)]
    }

    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|s| u64::from(s.len)).sum()
    }

    /// The server gives data, or nothing, rather than takes some.
    pub fn is_read(&self) -> bool {
        self.read
    }
}

/// A request without an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub cookie: u64,
    pub via: Via,
    pub usr_len: u16,
    pub data: Pieces,
    /// When it was sent.
    pub since_ns: u64,
    /// By which connection it went, and its answer must come; `None` while it waits for another path.
    pub con: Option<Key>,
}

/// The ids `first..first + count`. Holding one is owning its chunk at the server.
pub(super) struct Permits {
    first: u16,
    slots: Box<[Option<Pending>]>,
    /// The last one given back is the next one used: its header memory is still in the cache.
    free: Vec<u16>,
    /// Requests that wait for another path.
    parked: Vec<u16>,
    /// Their user messages, by index.
    usr: Box<[[u8; MAX_USR_LEN]]>,
}

impl Permits {
    pub fn new(first: u16, count: u16) -> Self {
        let n = usize::from(count);
        Self {
            first,
            slots: vec![None; n].into(),
            free: (0..count).rev().map(|i| first + i).collect(),
            parked: Vec::with_capacity(n),
            usr: vec![[0; MAX_USR_LEN]; n].into(),
        }
    }

    /// The id that [`Permits::take`] will take next.
    pub fn next(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Place of `id` among the reactor's; `None` if it is none of them.
    pub fn index(&self, id: u16) -> Option<usize> {
        id.checked_sub(self.first).map(usize::from).filter(|i| *i < self.slots.len())
    }

    /// Gives the next id to a request.
    pub fn take(&mut self, pending: Pending) {
        if let Some(id) = self.free.pop()
            && let Some(i) = self.index(id)
        {
            self.slots[i] = Some(pending);
        }
    }

    /// The request that holds `id`.
    pub fn pending(&self, id: u16) -> Option<&Pending> {
        self.slots[self.index(id)?].as_ref()
    }

    /// The request of `id` ends, and its id is free.
    pub fn finish(&mut self, id: u16) -> Option<Pending> {
        let i = self.index(id)?;
        let pending = self.slots[i].take()?;
        self.free.push(id);
        Some(pending)
    }

    /// Requests in flight, by id.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Pending)> {
        self.slots.iter().zip(self.first..).filter_map(|(slot, id)| Some((id, slot.as_ref()?)))
    }

    /// Lets every request that went by one of `cons` wait for another path. `usr` copies the user message of the
    /// request at an index. Returns how many there were.
    pub fn park(&mut self, cons: &[Key], mut usr: impl FnMut(usize, &mut [u8])) -> usize {
        let before = self.parked.len();
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if let Some(pending) = slot
                && pending.con.is_some_and(|c| cons.contains(&c))
            {
                pending.con = None;
                usr(i, &mut self.usr[i][..usize::from(pending.usr_len)]);
                self.parked.push(self.first + i as u16);
            }
        }
        self.parked.len() - before
    }

    /// Cookies of the last `n` requests that came to wait.
    pub fn last_parked(&self, n: usize) -> impl Iterator<Item = u64> {
        let ids = self.parked[self.parked.len().saturating_sub(n)..].iter();
        ids.filter_map(|id| self.pending(*id).map(|p| p.cookie))
    }

    /// Takes out a request whose cookie is among `cookies`: its id is free. `Some(None)`: it waited for a path.
    pub fn abandon(&mut self, cookies: &[u64]) -> Option<Option<Key>> {
        let (id, con) = self.iter().find(|(_, p)| cookies.contains(&p.cookie)).map(|(id, p)| (id, p.con))?;
        self.parked.retain(|p| *p != id);
        self.finish(id);
        Some(con)
    }

    /// One that waits for another path, and its user message. It stays until [`Permits::unpark`].
    pub fn next_parked(&self) -> Option<(u16, &Pending, &[u8])> {
        let id = *self.parked.last()?;
        let i = self.index(id)?;
        let pending = self.slots[i].as_ref()?;
        Some((id, pending, &self.usr[i][..usize::from(pending.usr_len)]))
    }

    /// [`Permits::next_parked`] has gone by `con`, or (`None`) has ended.
    pub fn unpark(&mut self, con: Option<Key>, now_ns: u64) {
        let Some(i) = self.parked.pop().and_then(|id| self.index(id)) else { return };
        if let (Some(pending), Some(con)) = (&mut self.slots[i], con) {
            (pending.con, pending.since_ns) = (Some(con), now_ns);
        }
    }

    /// The end of the session's connections: no request waits any more. Returns one that is in flight.
    pub fn abort(&mut self) -> Option<u16> {
        self.parked.clear();
        self.iter().next().map(|(id, _)| id)
    }

    /// Requests in flight.
    pub fn inflight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Ids that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Requests that wait for another path.
    pub fn waiting(&self) -> usize {
        self.parked.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CON: Key = Key { index: 0, generation: 1 };
    const OTHER: Key = Key { index: 1, generation: 1 };

    fn pending(cookie: u64, con: Key) -> Pending {
        let data = Pieces::new(Data::Read(None)).unwrap();
        Pending { cookie, via: Via::Io, usr_len: 2, data, since_ns: 0, con: Some(con) }
    }

    fn cookie_of(p: Option<&Pending>) -> Option<u64> {
        p.map(|p| p.cookie)
    }

    #[test]
    fn ids_run_out_and_come_back() {
        let mut p = Permits::new(10, 3);
        let mut ids = Vec::new();
        for cookie in 0..3 {
            ids.push(p.next().unwrap());
            p.take(pending(cookie, CON));
        }
        assert_eq!((ids, p.next(), p.inflight(), p.free()), (vec![10, 11, 12], None, 3, 0));
        assert_eq!(cookie_of(p.finish(11).as_ref()), Some(1));
        assert_eq!(p.next(), Some(11));
    }

    #[test]
    fn answers_to_nobody_change_nothing() {
        let mut p = Permits::new(10, 3);
        p.take(pending(5, CON));
        for id in [0, 9, 11, 13, 65535] {
            assert!(p.pending(id).is_none() && p.finish(id).is_none(), "{id}");
        }
        assert_eq!(cookie_of(p.finish(10).as_ref()), Some(5));
        assert!(p.finish(10).is_none(), "answered twice");
    }

    #[test]
    fn the_requests_of_a_lost_path_wait_and_go_on() {
        let mut p = Permits::new(10, 4);
        for (cookie, con) in [(0, CON), (1, OTHER), (2, CON)] {
            p.take(pending(cookie, con));
        }
        assert_eq!(p.park(&[CON], |i, usr| usr.fill(i as u8)), 2);
        assert_eq!(p.park(&[CON], |_, _| panic!("they wait already")), 0);
        let (id, parked, usr) = p.next_parked().unwrap();
        assert_eq!((id, parked.cookie, usr), (12, 2, &[2, 2][..]));
        p.unpark(Some(OTHER), 7);
        assert_eq!(p.pending(12).map(|p| (p.con, p.since_ns)), Some((Some(OTHER), 7)));
        assert_eq!((p.waiting(), p.inflight()), (1, 3));
        let mut aborted = Vec::new();
        while let Some(id) = p.abort() {
            aborted.push(p.finish(id).unwrap().cookie);
        }
        assert_eq!((aborted, p.waiting(), p.inflight(), p.free()), (vec![0, 1, 2], 0, 0, 4));
    }

    #[test]
    fn pieces_without_bytes_are_left_out() {
        let segment = |len| Segment { addr: 64, len, region: RegionId::NONE };
        let list: Vec<Segment> = [0, 1, 0, 2, 3, 0].map(segment).into();
        let pieces = Pieces::new(Data::Write(&list)).unwrap();
        assert_eq!((pieces.as_slice().len(), pieces.bytes(), pieces.is_read()), (3, 6, false));
        assert!(Pieces::new(Data::Write(&[segment(1); MAX_PIECES + 1])).is_none());
        let none = Pieces::new(Data::Read(Some(segment(0)))).unwrap();
        assert!(none.as_slice().is_empty() && none.is_read());
    }
}

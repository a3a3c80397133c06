//! What a session is to the layers above.

/// Names a session of a [`super::Client`]; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub(super) u64);

/// A session that has been connected at least once. Nothing of it changes while it is up. A server that was started anew
/// with other options makes another one of the same [`Session::id`], which comes with the next [`super::Event::SessionUp`].
#[derive(Debug)]
pub struct Session {
    /// Its name here.
    pub id: SessionId,
    /// Its name at the server.
    pub name: String,
    /// What a request may be.
    pub limits: Limits,
    /// The reactors that serve it, by their place in the list given to [`super::Client::install`]. Con 0, hence
    /// [`super::Via::Service`], is on the first.
    pub reactors: Vec<usize>,
}

/// What a session takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight, over all reactors and paths. See [`Session::share`].
    pub queue_depth: u16,
    /// Data bytes of one request.
    pub max_io_size: u32,
    /// Pieces of data of one write. A read has one.
    pub max_pieces: usize,
}

impl Session {
    /// Of the queue depth, the part of the `index`th of [`Session::reactors`]: requests that it may have in flight.
    pub fn share(&self, index: usize) -> u16 {
        self.ids(index).1
    }

    /// Buffer ids of the `index`th reactor: first and number.
    pub(super) fn ids(&self, index: usize) -> (u16, u16) {
        id_share(self.limits.queue_depth, index, self.reactors.len())
    }
}

/// Buffer ids of the `index`th of `of` reactors: first and number.
pub(super) fn id_share(queue_depth: u16, index: usize, of: usize) -> (u16, u16) {
    let at = |i: usize| (usize::from(queue_depth) * i / of) as u16;
    (at(index), at(index + 1) - at(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reactors_share_all_ids() {
        for of in [1, 2, 3, 7, 512] {
            let mut next = 0;
            for (first, count) in (0..of).map(|i| id_share(512, i, of)) {
                assert_eq!((first, count > 0), (next, true), "{of} reactors");
                next = first + count;
            }
            assert_eq!(next, 512);
        }
        assert_eq!(id_share(u16::MAX, 0, 1), (0, u16::MAX));
    }
}

//! Who gives way to whom.

use std::collections::HashMap;
use std::net::IpAddr;

use quota::{Over, Source};

use super::{CloseReason, Path, PathId, PathState, Refusal, Resource, SessionId, SessionTable, Usage};

impl SessionTable {
    /// Room for a connection from `src`, of `path` if that exists, else of a new one of `session`, if that exists.
    /// Returns what had to give way for it.
    pub(super) fn room_for_request(
        &mut self,
        session: Option<SessionId>,
        path: Option<PathId>,
        src: IpAddr,
        known: bool,
    ) -> Result<Vec<PathId>, Refusal> {
        let source = Source::of(src);
        let one = Usage { connections: 1, memory: self.limits.connection_bytes, ..Usage::default() };
        if let Some(id) = path
            && self.paths.get(id.0).is_some_and(|p| p.proved)
        {
            let victims = self.find_room(one, source, known, id)?;
            self.evict(&victims);
            return Ok(victims);
        }
        // Nobody gives way to one who may not exist. But he need not ask if only paths are in his way that stay.
        let whole = Usage {
            sessions: u64::from(!session.is_some_and(|id| self.counts(id, &[]))),
            paths: 1,
            memory: one.memory.saturating_add(self.limits.path_bytes),
            ..one
        };
        self.fits(whole, source, known, &self.half_open_paths())
            .map_err(|(what, over)| self.limit(what, over))?;
        let victim = self.room_for_unproved(known, path)?;
        self.evict(victim.as_slice());
        Ok(victim.into_iter().collect())
    }

    /// The address of a path has answered: a connection is established, or INFO_REQ came. Returns what had to give way
    /// for it, which is in [`PathState::Closing`] already: the driver tears it down. Does nothing if that was known.
    ///
    /// # Errors
    /// [`Refusal`]: the driver closes the path.
    pub fn prove(&mut self, id: PathId) -> Result<Vec<PathId>, Refusal> {
        let path = self.paths.get(id.0).filter(|p| p.state == PathState::Connecting && !p.proved);
        let Some(path) = path else { return Ok(Vec::new()) };
        let connections = u64::from(path.cids.present);
        let need = Usage {
            sessions: u64::from(!self.counts(path.session, &[])),
            paths: 1,
            connections,
            memory: connections.saturating_mul(self.limits.connection_bytes),
        };
        let victims = self.find_room(need, Source::of(path.src), path.known, id)?;
        self.evict(&victims);
        if let Some(path) = self.paths.get_mut(id.0) {
            path.proved = true;
        }
        Ok(victims)
    }

    /// Room for the chunks of a path that is coming up, beside its queues. Nobody gives way for it: who is not up has none.
    pub(super) fn room_for_chunks(&self, id: PathId) -> Result<(), CloseReason> {
        let path = self.paths.get(id.0).ok_or(CloseReason::Gone)?;
        let queues = if path.proved { 0 } else { self.usage_of(path).memory };
        let need = Usage { memory: queues.saturating_add(self.limits.path_bytes), ..Usage::default() };
        let fits = self.fits(need, Source::of(path.src), path.known, &[]);
        fits.map_err(|(what, over)| CloseReason::Memory(over, self.limits.of(what)))
    }

    /// What has to give way so that `source` can have `need` for the path `keep`.
    fn find_room(
        &self,
        need: Usage,
        source: Source,
        known: bool,
        keep: PathId,
    ) -> Result<Vec<PathId>, Refusal> {
        let mut victims = Vec::new();
        while let Err((what, over)) = self.fits(need, source, known, &victims) {
            let greedy = match over {
                Over::Share => Some(source),
                Over::Reserved | Over::Total => None,
            };
            let victim = self.oldest_half_open(what, greedy, keep, &victims);
            victims.push(victim.ok_or_else(|| self.limit(what, over))?);
        }
        Ok(victims)
    }

    /// Whether `source` may have `need` once the paths `without` are gone; if not, of what there is too little.
    fn fits(
        &self,
        need: Usage,
        source: Source,
        known: bool,
        without: &[PathId],
    ) -> Result<(), (Resource, Over)> {
        let (used, own) = (self.usage(None, without), self.usage(Some(source), without));
        for what in Resource::ALL {
            if need.of(what) > 0 {
                let limit = self.limits.of(what);
                limit
                    .check(known, own.of(what), used.of(what), need.of(what))
                    .map_err(|over| (what, over))?;
            }
        }
        Ok(())
    }

    fn limit(&self, what: Resource, over: Over) -> Refusal {
        Refusal::Limit(what, over, self.limits.of(what))
    }

    /// What `source`, or everybody, has, apart from the paths `without`. Of unproved paths nothing counts.
    fn usage(&self, source: Option<Source>, without: &[PathId]) -> Usage {
        let mut all = Usage::default();
        for (key, path) in self.paths.iter() {
            let id = PathId(key);
            if source.is_none_or(|s| s == Source::of(path.src)) && path.counts() && !without.contains(&id) {
                all.add(self.usage_of(path));
            }
        }
        let of_source = |s: &super::Session| source.is_none_or(|wanted| wanted == s.source);
        let sessions = self.sessions.iter().filter(|(_, s)| of_source(s));
        all.sessions = sessions.filter(|(key, _)| self.counts(SessionId(*key), without)).count() as u64;
        all
    }

    fn usage_of(&self, path: &Path) -> Usage {
        let connections = u64::from(path.cids.present);
        let queues = connections.saturating_mul(self.limits.connection_bytes);
        let chunks = if path.was_up { self.limits.path_bytes } else { 0 };
        Usage { sessions: 0, paths: 1, connections, memory: queues.saturating_add(chunks) }
    }

    /// The session has a path that counts and is not among `without`.
    fn counts(&self, id: SessionId, without: &[PathId]) -> bool {
        let Some(session) = self.sessions.get(id.0) else { return false };
        let counts = |id: &PathId| self.paths.get(id.0).is_some_and(Path::counts);
        session.paths.iter().any(|id| counts(id) && !without.contains(id))
    }

    /// What is in use of each resource, and its bound.
    pub fn in_use(&self) -> impl Iterator<Item = (Resource, u64, quota::Limit)> {
        let used = self.usage(None, &[]);
        Resource::ALL.into_iter().map(move |what| (what, used.of(what), self.limits.of(what)))
    }

    fn half_open_paths(&self) -> Vec<PathId> {
        let proved = self.paths.iter().filter(|(_, p)| p.state == PathState::Connecting && p.proved);
        proved.map(|(key, _)| PathId(key)).collect()
    }

    /// The oldest path that is proved and not up, of `source`, else of the sources that have most of `what` by them. Not
    /// `keep`, nor one of `without`.
    fn oldest_half_open(
        &self,
        what: Resource,
        source: Option<Source>,
        keep: PathId,
        without: &[PathId],
    ) -> Option<PathId> {
        let mut candidates = self.half_open_paths();
        candidates.retain(|id| *id != keep && !without.contains(id));
        self.oldest_of_most(&candidates, source, |p| match what {
            Resource::Sessions | Resource::Paths => 1,
            Resource::Connections | Resource::Memory => usize::from(p.cids.present),
        })
    }

    /// A place for one more connection of an unproved path. `Some`: the path that has to go for it, never `keep`.
    fn room_for_unproved(&self, known: bool, keep: Option<PathId>) -> Result<Option<PathId>, Refusal> {
        let most = self.limits.max_unproved;
        let count = |paths: &mut dyn Iterator<Item = &Path>| -> usize {
            paths.map(|p| usize::from(p.cids.present)).sum()
        };
        let unproved = || self.paths.iter().map(|(_, p)| p).filter(|p| !p.proved);
        // Those that are being torn down are few, unless requests come faster than that.
        if count(&mut unproved()) >= 2 * most {
            return Err(Refusal::Unproved(most));
        }
        if count(&mut unproved().filter(|p| p.state == PathState::Connecting)) < most {
            return Ok(None);
        }
        let may_go = |p: &Path| !p.proved && p.state == PathState::Connecting && (known || !p.known);
        let candidates = self.paths.iter().filter(|(_, p)| may_go(p)).map(|(key, _)| PathId(key));
        let candidates: Vec<_> = candidates.filter(|id| Some(*id) != keep).collect();
        let connections = |p: &Path| usize::from(p.cids.present);
        self.oldest_of_most(&candidates, None, connections).map(Some).ok_or(Refusal::Unproved(most))
    }

    /// Of `candidates` the one whose time ends first, of `source`, else of the sources that have most by `weight`.
    fn oldest_of_most(
        &self,
        candidates: &[PathId],
        source: Option<Source>,
        weight: impl Fn(&Path) -> usize,
    ) -> Option<PathId> {
        let paths = || candidates.iter().filter_map(|id| Some((*id, self.paths.get(id.0)?)));
        let mut by_source: HashMap<Source, usize> = HashMap::new();
        paths().for_each(|(_, p)| *by_source.entry(Source::of(p.src)).or_default() += weight(p));
        let most = by_source.values().max().copied();
        let wanted = |of: Source| source.map_or(by_source.get(&of).copied() == most, |source| source == of);
        let candidates = paths().filter(|(_, p)| wanted(Source::of(p.src)));
        candidates.min_by_key(|(id, p)| (p.deadline_ns, *id)).map(|(id, _)| id)
    }

    fn evict(&mut self, victims: &[PathId]) {
        for id in victims {
            if let Some(path) = self.paths.get_mut(id.0) {
                (path.state, path.evicted) = (PathState::Closing, true);
            }
        }
    }
}

impl Path {
    /// Counts towards limits.
    fn counts(&self) -> bool {
        self.proved && !self.evicted
    }
}

#[cfg(test)]
mod tests;

//! Reactors on threads of their own.

use std::io;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use crate::{Handle, IdlePolicy, Reactor, SetupError};

/// One running reactor per core. Dropping it stops them and waits for their threads.
pub struct Team {
    handles: Vec<Handle>,
    threads: Vec<JoinHandle<()>>,
}

impl Team {
    /// Starts a reactor, named "reactor_N", on each of `cores`.
    ///
    /// # Errors
    /// A core that this process may not use, or the system refuses; then none runs.
    pub fn start(cores: &[usize], idle: IdlePolicy) -> Result<Self, SetupError> {
        // All of them are made before any runs, so that a wrong core starts nothing.
        for &core in cores {
            drop(Reactor::new("probe", Some(core), idle)?);
        }
        let mut team = Self { handles: Vec::new(), threads: Vec::new() };
        for &core in cores {
            let (tx, rx) = mpsc::channel();
            let name = format!("reactor_{core}");
            let thread = Builder::new().name(name.clone()).spawn(move || {
                // Made on its own thread, because what lives in a reactor does not move between threads.
                match Reactor::new(&name, Some(core), idle) {
                    Ok(reactor) => {
                        let _ = tx.send(Ok(reactor.handle()));
                        reactor.run();
                    }
                    Err(e) => drop(tx.send(Err(e))),
                }
            });
            team.threads.push(thread.map_err(SetupError::Thread)?);
            let ended = |_| SetupError::Thread(io::Error::other("it ended at once"));
            team.handles.push(rx.recv().map_err(ended)??);
        }
        Ok(team)
    }

    /// In the order of the cores.
    pub fn handles(&self) -> &[Handle] {
        &self.handles
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.handles.iter().for_each(Handle::stop);
        for thread in self.threads.drain(..) {
            // A panic there has been printed; there is nothing more to clean up.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_runs_messages_and_stops() {
        let team = Team::start(&[0], IdlePolicy::Poll).unwrap();
        let (tx, rx) = mpsc::channel();
        team.handles()[0].send(move |_| tx.send(std::thread::current().name().map(str::to_owned)).unwrap());
        assert_eq!(rx.recv().unwrap().as_deref(), Some("reactor_0"));
        drop(team);
    }

    #[test]
    fn a_wrong_core_starts_nothing() {
        assert!(matches!(
            Team::start(&[0, 5000], IdlePolicy::Poll),
            Err(SetupError::Core { core: 5000, .. })
        ));
    }
}

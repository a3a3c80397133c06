//! Attempts to connect, on the control thread: none of them blocks it.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::time::Instant;

use nbd_poll::client::{Address, Dial, DialError, DialOptions, Dialled};
use nbd_proto::client::Server;
use reactor::{Polled, Poller, Turn};

use super::error::NbdError;

/// Who asked: a device and one of its connections.
pub(super) type Who = (u64, u32);

/// Gets what became of an attempt.
type Answer = Rc<dyn Fn(&mut Turn<'_>, Who, Result<Dialled, NbdError>)>;

/// All attempts under way.
#[derive(Default)]
pub(super) struct Dialer {
    attempts: Vec<Attempt>,
    /// Names that are being looked up: for whom, with what to do then.
    names: Vec<(Who, DialOptions)>,
}

struct Attempt {
    who: Who,
    dial: Dial,
    fd: RawFd,
    /// To be tried if this one is not there.
    others: Vec<Address>,
    options: DialOptions,
}

/// The dialer of the control thread.
struct DialerCell {
    dialer: Rc<RefCell<Dialer>>,
    answer: Answer,
}

impl Dialer {
    /// Sets up the one of this thread; `answer` is called from its poller.
    pub fn install(
        cx: &mut Turn<'_>,
        answer: impl Fn(&mut Turn<'_>, Who, Result<Dialled, NbdError>) + 'static,
    ) -> Rc<RefCell<Self>> {
        let dialer = Rc::new(RefCell::new(Self::default()));
        let answer: Answer = Rc::new(answer);
        cx.set_local(Rc::new(DialerCell { dialer: dialer.clone(), answer: answer.clone() }));
        cx.add_poller("nbd_dialer", Box::new(DialPoller { dialer: dialer.clone(), answer }));
        dialer
    }

    /// Begins an attempt. What can be told at once is the error; else the answer follows.
    pub fn start(
        &mut self,
        cx: &mut Turn<'_>,
        who: Who,
        server: &Server,
        options: DialOptions,
    ) -> Result<(), NbdError> {
        let address = match server {
            Server::Unix(path) => Address::Unix(path.into()),
            Server::Tcp { host, port } => match host.parse::<IpAddr>() {
                Ok(ip) => Address::Tcp(SocketAddr::new(ip, *port)),
                Err(_) => return self.look_up(cx, who, host, *port, options),
            },
        };
        self.dial(cx, who, vec![address], options).map_err(|e| NbdError::from(&e))
    }

    /// Finds the addresses of a name. That blocks, so it is done by a thread of its own.
    fn look_up(
        &mut self,
        cx: &mut Turn<'_>,
        who: Who,
        host: &str,
        port: u16,
        options: DialOptions,
    ) -> Result<(), NbdError> {
        let (control, name) = (cx.handle().clone(), host.to_owned());
        let thread = std::thread::Builder::new().name("nbd-resolve".into()).spawn(move || {
            let found = (name.as_str(), port).to_socket_addrs();
            let found = found.map(Iterator::collect::<Vec<_>>).map_err(|e| e.to_string());
            control.send(move |cx| Self::found(cx, who, &name, found));
        });
        thread.map_err(|e| NbdError::Resolve { host: host.into(), text: e.to_string() })?;
        self.names.push((who, options));
        Ok(())
    }

    /// A name has been looked up.
    fn found(cx: &mut Turn<'_>, who: Who, host: &str, found: Result<Vec<SocketAddr>, String>) {
        let Some(cell) = cx.local::<DialerCell>() else { return };
        let waiting = {
            let mut dialer = cell.dialer.borrow_mut();
            let at = dialer.names.iter().position(|(w, _)| *w == who);
            at.map(|at| dialer.names.swap_remove(at).1)
        };
        // Cancelled meanwhile.
        let Some(options) = waiting else { return };
        let host = host.to_owned();
        let result = match found {
            Ok(all) if all.is_empty() => Err(NbdError::Resolve { host, text: "it has no address".into() }),
            Ok(all) => {
                let addresses = all.into_iter().map(Address::Tcp).rev().collect();
                let begun = cell.dialer.borrow_mut().dial(cx, who, addresses, options);
                begun.map_err(|e| NbdError::from(&e))
            }
            Err(text) => Err(NbdError::Resolve { host, text }),
        };
        if let Err(e) = result {
            (cell.answer)(cx, who, Err(e));
        }
    }

    /// Tries the last of `addresses`, which are not empty, then the others.
    fn dial(
        &mut self,
        cx: &mut Turn<'_>,
        who: Who,
        mut addresses: Vec<Address>,
        options: DialOptions,
    ) -> Result<(), DialError> {
        let mut failure = None;
        while let Some(address) = addresses.pop() {
            let started = Dial::start(address.clone(), options.clone(), cx.now).and_then(|mut dial| {
                let fd = dial.wait_fd();
                match cx.watch(fd) {
                    Ok(()) => Ok((dial, fd)),
                    Err(e) => Err(DialError::Connect { address, source: e.into() }),
                }
            });
            match started {
                Ok((dial, fd)) => {
                    self.attempts.push(Attempt { who, dial, fd, others: addresses, options });
                    return Ok(());
                }
                Err(e) => failure = Some(e),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Forgets the attempts of a device; nothing is answered.
    pub fn cancel(&mut self, cx: &mut Turn<'_>, number: u64) {
        self.names.retain(|((n, _), _)| *n != number);
        let (gone, rest) = self.attempts.drain(..).partition(|a| a.who.0 == number);
        self.attempts = rest;
        let gone: Vec<Attempt> = gone;
        gone.iter().for_each(|a| cx.unwatch(a.fd));
    }

    /// Goes on with all attempts; appends those that are over.
    fn turn(&mut self, cx: &mut Turn<'_>, over: &mut Vec<(Who, Result<Dialled, NbdError>)>) {
        let mut i = 0;
        while i < self.attempts.len() {
            let Some(result) = self.attempts[i].dial.poll(cx.now) else {
                i += 1;
                continue;
            };
            let Attempt { who, fd, others, options, dial } = self.attempts.swap_remove(i);
            cx.unwatch(fd);
            drop(dial);
            let result = match result {
                // The name has another address.
                Err(e) if e.is_absence() && !others.is_empty() => match self.dial(cx, who, others, options) {
                    Ok(()) => continue,
                    Err(later) => Err(later),
                },
                other => other,
            };
            over.push((who, result.map_err(|e| NbdError::from(&e))));
        }
    }
}

struct DialPoller {
    dialer: Rc<RefCell<Dialer>>,
    answer: Answer,
}

impl Poller for DialPoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        if self.dialer.borrow().attempts.is_empty() {
            return Polled::Idle;
        }
        let mut over = Vec::new();
        self.dialer.borrow_mut().turn(cx, &mut over);
        let busy = !over.is_empty();
        // The dialer is free by now: an answer may begin the next attempt.
        over.into_iter().for_each(|(who, result)| (self.answer)(cx, who, result));
        busy.into()
    }

    fn deadline(&self) -> Option<Instant> {
        self.dialer.borrow().attempts.iter().map(|a| a.dial.deadline()).min()
    }
}

//! The answering thread.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use crate::args::{Options, TAG_BYTES};
use crate::receiver::Receiver;
use crate::run::{Phase, Progress, Usage};
use crate::sender::Sender;

/// What the answering thread did while it was measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Requests answered.
    pub requests: u64,
    /// Turns that found requests.
    pub turns: u64,
    /// CPU time.
    pub usage: Usage,
}

/// Answers requests until the run is over.
pub fn serve(options: &Options, socket: &UdpSocket, progress: &Progress) -> Result<Served, String> {
    let mut server = Server::new(options, socket, progress);
    while progress.phase() == Phase::WarmUp {
        server.turn()?;
    }
    (server.requests, server.turns) = (0, 0);
    let before = Usage::of_this_thread();
    while progress.phase() == Phase::Measure {
        server.turn()?;
    }
    let usage = Usage::of_this_thread() - before;
    Ok(Served { requests: server.requests, turns: server.turns, usage })
}

struct Server<'a> {
    options: &'a Options,
    socket: &'a UdpSocket,
    receiver: Receiver,
    sender: Sender<'a>,
    /// Sizes of a reply's packets.
    sizes: Vec<usize>,
    requests: u64,
    turns: u64,
}

impl<'a> Server<'a> {
    fn new(options: &'a Options, socket: &'a UdpSocket, progress: &'a Progress) -> Self {
        let mut sizes = vec![options.mtu; options.packets() - 1];
        sizes.push(options.tail());
        let receiver = Receiver::new(options.gso, options.request);
        let sender = Sender::new(socket, progress, options.gso, options.mtu);
        Self { options, socket, receiver, sender, sizes, requests: 0, turns: 0 }
    }

    /// Answers what is there.
    fn turn(&mut self) -> Result<(), String> {
        let fd = self.socket.as_raw_fd();
        let count =
            self.receiver.receive(fd, usize::MAX).map_err(|e| format!("recvmmsg of requests: {e}"))?;
        if count == 0 {
            return Ok(());
        }
        self.turns += 1;
        self.answer().and_then(|()| self.sender.flush()).map_err(|e| format!("sendmmsg of replies: {e}"))
    }

    /// Adds the replies to the requests received.
    fn answer(&mut self) -> io::Result<()> {
        for message in self.receiver.messages() {
            for request in message.packets().filter(|r| r.len() == self.options.request) {
                let Some(tag) = request.first_chunk::<TAG_BYTES>() else { continue };
                for &len in &self.sizes {
                    self.sender.packet(&message.from, tag, len)?;
                }
                self.requests += 1;
            }
        }
        Ok(())
    }
}

//! One client on standard input and output, as inetd and libnbd's `connect_command` make it; the program ends with it.

use std::os::fd::OwnedFd;

use engine::{App, Error};
use nbd_poll::listener::{Peer, peer_of};
use reactor::Turn;

use super::subsystem::server;

/// Serves the client on standard input, a connected socket, and shuts the program down when it has gone, or when it
/// cannot be served. `export`: for a client that does not name one. For [`engine::Options::on_ready`].
pub fn serve_stdin(app: &mut App, cx: &mut Turn<'_>, export: Option<String>) {
    if let Err(why) = try_serve(app, cx, export) {
        app.fail(cx, Error::Call(format!("--single: {why}")));
    }
}

fn try_serve(app: &mut App, cx: &mut Turn<'_>, export: Option<String>) -> Result<(), String> {
    let server = server(app).map_err(|e| e.to_string())?;
    let (socket, peer) = stdin()?;
    server.borrow_mut().serve_single(cx, socket, peer, export).map_err(|e| e.to_string())
}

fn stdin() -> Result<(OwnedFd, Peer), String> {
    // Another descriptor of it: standard input itself stays open, so that its number is nobody else's.
    let socket = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).map_err(|e| e.to_string())?;
    match peer_of(&socket) {
        Ok(peer) => Ok((socket, peer)),
        Err(e) => Err(format!(
            "standard input is no connected socket ({e}); inetd and libnbd's nbd_connect_command make one"
        )),
    }
}

//! Ways for this host and its guests to use a bdev: kernel NBD, ublk, vhost-user-blk

mod host;
pub mod nbd;
mod nbd_error;
pub mod nbd_server;
pub mod ublk;
pub mod vhost;

use engine::Subsystem;

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: test_support::Counting = test_support::Counting;

/// All of them, in the order in which programs register them.
pub fn subsystems() -> Vec<Box<dyn Subsystem>> {
    vec![
        Box::new(ublk::Ublk::default()),
        Box::new(vhost::Vhost::default()),
        Box::new(nbd::Nbd::default()),
        Box::new(nbd_server::NbdServer::default()),
    ]
}

//! A device that the server has opened for us.

use rnbd_proto::device::DevGeometry;
use rtrs_poll::client::SessionId;

/// What OPEN told; plain data, good on every reactor of its session, until CLOSE or until the session goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// The session it was opened in.
    pub session: SessionId,
    /// Which connection of the session, see [`super::Event::Ready`].
    pub generation: u64,
    /// The server's number for it.
    pub id: u32,
    /// Capacity, block size and abilities.
    pub geometry: DevGeometry,
    /// Bytes of data in one request, at most.
    pub max_io_size: u32,
}

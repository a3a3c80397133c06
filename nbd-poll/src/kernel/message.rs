//! Messages of the generic netlink family "nbd" (Linux `include/uapi/linux/nbd-netlink.h`).

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, Nla, NlaBuffer, NlasIterator, Parseable, ParseableParametrized,
    emit_u32, emit_u64, parse_string, parse_u8, parse_u32,
};
use netlink_packet_generic::{GenlFamily, GenlHeader};

/// `NBD_GENL_FAMILY_NAME`.
pub(super) const FAMILY: &str = "nbd";
/// `NBD_GENL_MCAST_GROUP_NAME`.
pub(super) const MULTICAST_GROUP: &str = "nbd_mc_group";
/// `NBD_GENL_VERSION`.
const VERSION: u8 = 1;

/// `NBD_CMD_*`.
pub(super) mod cmd {
    pub const CONNECT: u8 = 1;
    pub const DISCONNECT: u8 = 2;
    pub const RECONFIGURE: u8 = 3;
    pub const LINK_DEAD: u8 = 4;
    pub const STATUS: u8 = 5;
}

/// `NBD_ATTR_*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Attr {
    Index(u32),
    SizeBytes(u64),
    BlockSizeBytes(u64),
    TimeoutSec(u64),
    ServerFlags(u64),
    Sockets(Vec<SockItem>),
    DeadConnTimeoutSec(u64),
    DeviceList(Vec<DeviceItem>),
    BackendIdentifier(String),
    /// Of a later kernel.
    Other(DefaultNla),
}

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_DEVICE_LIST: u16 = 9;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;

impl Nla for Attr {
    fn value_len(&self) -> usize {
        match self {
            Self::Index(_) => 4,
            Self::SizeBytes(_)
            | Self::BlockSizeBytes(_)
            | Self::TimeoutSec(_)
            | Self::ServerFlags(_)
            | Self::DeadConnTimeoutSec(_) => 8,
            Self::Sockets(items) => items.as_slice().buffer_len(),
            Self::DeviceList(items) => items.as_slice().buffer_len(),
            Self::BackendIdentifier(text) => text.len() + 1,
            Self::Other(nla) => nla.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Index(_) => ATTR_INDEX,
            Self::SizeBytes(_) => ATTR_SIZE_BYTES,
            Self::BlockSizeBytes(_) => ATTR_BLOCK_SIZE_BYTES,
            Self::TimeoutSec(_) => ATTR_TIMEOUT,
            Self::ServerFlags(_) => ATTR_SERVER_FLAGS,
            Self::Sockets(_) => ATTR_SOCKETS,
            Self::DeadConnTimeoutSec(_) => ATTR_DEAD_CONN_TIMEOUT,
            Self::DeviceList(_) => ATTR_DEVICE_LIST,
            Self::BackendIdentifier(_) => ATTR_BACKEND_IDENTIFIER,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        const FITS: &str = "the buffer has value_len bytes";
        match self {
            Self::Index(v) => emit_u32(buffer, *v).expect(FITS),
            Self::SizeBytes(v)
            | Self::BlockSizeBytes(v)
            | Self::TimeoutSec(v)
            | Self::ServerFlags(v)
            | Self::DeadConnTimeoutSec(v) => emit_u64(buffer, *v).expect(FITS),
            Self::Sockets(items) => items.as_slice().emit(buffer),
            Self::DeviceList(items) => items.as_slice().emit(buffer),
            Self::BackendIdentifier(text) => {
                buffer[..text.len()].copy_from_slice(text.as_bytes());
                buffer[text.len()] = 0;
            }
            Self::Other(nla) => nla.emit_value(buffer),
        }
    }

    fn is_nested(&self) -> bool {
        matches!(self, Self::Sockets(_) | Self::DeviceList(_))
    }
}

impl<'a> Parseable<NlaBuffer<&'a [u8]>> for Attr {
    /// What the kernel sends; the others are only sent.
    fn parse(nla: &NlaBuffer<&'a [u8]>) -> Result<Self, DecodeError> {
        Ok(match nla.kind() {
            ATTR_INDEX => Self::Index(parse_u32(nla.value())?),
            ATTR_DEVICE_LIST => Self::DeviceList(all(nla.value())?),
            ATTR_BACKEND_IDENTIFIER => Self::BackendIdentifier(parse_string(nla.value())?),
            _ => Self::Other(DefaultNla::parse(nla)?),
        })
    }
}

/// Every attribute of `bytes`.
fn all<'a, T: Parseable<NlaBuffer<&'a [u8]>>>(bytes: &'a [u8]) -> Result<Vec<T>, DecodeError> {
    NlasIterator::new(bytes).map(|nla| T::parse(&nla?)).collect()
}

/// `NBD_SOCK_ITEM` with its `NBD_SOCK_FD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SockItem(pub u32);

const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

impl Nla for SockItem {
    fn value_len(&self) -> usize {
        SockFd(self.0).buffer_len()
    }
    fn kind(&self) -> u16 {
        SOCK_ITEM
    }
    fn emit_value(&self, buffer: &mut [u8]) {
        SockFd(self.0).emit(buffer);
    }
    fn is_nested(&self) -> bool {
        true
    }
}

struct SockFd(u32);

impl Nla for SockFd {
    fn value_len(&self) -> usize {
        4
    }
    fn kind(&self) -> u16 {
        SOCK_FD
    }
    fn emit_value(&self, buffer: &mut [u8]) {
        emit_u32(buffer, self.0).expect("the buffer has value_len bytes");
    }
}

/// `NBD_DEVICE_ITEM`: one device of a status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DeviceItem {
    pub index: u32,
    /// Has a configuration: made, or just open.
    pub connected: bool,
}

const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

impl DeviceItem {
    fn parts(&self) -> [DefaultNla; 2] {
        [
            DefaultNla::new(DEVICE_INDEX, self.index.to_ne_bytes().to_vec()),
            DefaultNla::new(DEVICE_CONNECTED, vec![self.connected.into()]),
        ]
    }
}

impl Nla for DeviceItem {
    fn value_len(&self) -> usize {
        self.parts().as_slice().buffer_len()
    }
    fn kind(&self) -> u16 {
        DEVICE_ITEM
    }
    fn emit_value(&self, buffer: &mut [u8]) {
        self.parts().as_slice().emit(buffer);
    }
    fn is_nested(&self) -> bool {
        true
    }
}

impl<'a> Parseable<NlaBuffer<&'a [u8]>> for DeviceItem {
    fn parse(nla: &NlaBuffer<&'a [u8]>) -> Result<Self, DecodeError> {
        let mut item = Self::default();
        for part in NlasIterator::new(nla.value()) {
            let part = part?;
            match part.kind() {
                DEVICE_INDEX => item.index = parse_u32(part.value())?,
                DEVICE_CONNECTED => item.connected = parse_u8(part.value())? != 0,
                _ => {}
            }
        }
        Ok(item)
    }
}

/// A message either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NbdMessage {
    /// One of [`cmd`].
    pub cmd: u8,
    pub attrs: Vec<Attr>,
}

impl NbdMessage {
    /// `NBD_ATTR_INDEX`.
    pub(super) fn index(&self) -> Option<u32> {
        self.attrs.iter().find_map(|a| if let Attr::Index(i) = a { Some(*i) } else { None })
    }

    /// `NBD_ATTR_DEVICE_LIST`.
    pub(super) fn devices(&self) -> &[DeviceItem] {
        self.attrs
            .iter()
            .find_map(|a| if let Attr::DeviceList(d) = a { Some(&d[..]) } else { None })
            .unwrap_or(&[])
    }
}

impl GenlFamily for NbdMessage {
    fn family_name() -> &'static str {
        FAMILY
    }
    fn command(&self) -> u8 {
        self.cmd
    }
    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for NbdMessage {
    fn buffer_len(&self) -> usize {
        self.attrs.as_slice().buffer_len()
    }
    fn emit(&self, buffer: &mut [u8]) {
        self.attrs.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for NbdMessage {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        Ok(Self { cmd: header.cmd, attrs: all(bytes)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emit(message: &NbdMessage) -> Vec<u8> {
        let mut bytes = vec![0xee; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<NbdMessage, DecodeError> {
        NbdMessage::parse_with_param(bytes, GenlHeader { cmd: cmd::STATUS, version: 1 })
    }

    /// Little-endian host.
    #[test]
    fn connect_golden_bytes() {
        let attrs = vec![
            Attr::Index(2),
            Attr::SizeBytes(0x1000),
            Attr::Sockets(vec![SockItem(7), SockItem(8)]),
            Attr::BackendIdentifier("ab".into()),
        ];
        #[rustfmt::skip]
        let wanted = [
            8, 0, 1, 0,  2, 0, 0, 0,
            12, 0, 2, 0,  0, 0x10, 0, 0, 0, 0, 0, 0,
            28, 0, 7, 0x80,
                12, 0, 1, 0x80,  8, 0, 1, 0,  7, 0, 0, 0,
                12, 0, 1, 0x80,  8, 0, 1, 0,  8, 0, 0, 0,
            7, 0, 10, 0,  b'a', b'b', 0, 0,
        ];
        let bytes = emit(&NbdMessage { cmd: cmd::CONNECT, attrs });
        if cfg!(target_endian = "little") {
            assert_eq!(bytes, wanted);
        }
    }

    #[test]
    fn status_is_read_as_it_is_written() {
        let items = vec![DeviceItem { index: 0, connected: false }, DeviceItem { index: 5, connected: true }];
        let message = NbdMessage { cmd: cmd::STATUS, attrs: vec![Attr::DeviceList(items.clone())] };
        let parsed = parse(&emit(&message)).unwrap();
        assert_eq!((parsed.devices(), parsed.index()), (&items[..], None));
    }

    #[test]
    fn unknown_attributes_are_let_pass_and_broken_ones_are_not() {
        let other = NbdMessage { cmd: 5, attrs: vec![Attr::Other(DefaultNla::new(77, vec![1, 2, 3]))] };
        assert_eq!(parse(&emit(&other)).unwrap().index(), None);
        assert!(parse(&[3, 0, 1, 0]).is_err());
        assert!(parse(&[200, 0, 1, 0, 1, 0, 0, 0]).is_err());
        assert!(parse(&[6, 0, 1, 0, 1, 0, 0, 0]).is_err(), "an index of two bytes");
    }
}

//! One request as it lies in a chunk. The fields that say the same thing twice can be made to disagree.

use rtrs_proto::limits::Geometry;
use rtrs_proto::wire::{MsgRdmaRead, MsgRdmaWrite, SgDesc, msg_type};
use zerocopy::IntoBytes;

/// A request: `[data or hole][user message][RTRS header][descriptors]`.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Sent at the start of the chunk; empty for reads.
    pub data: Vec<u8>,
    /// Bytes left out at the start of the chunk, for the server to fill.
    pub hole: u32,
    /// User message.
    pub usr: Vec<u8>,
    /// `type` of the header.
    pub msg_type: u16,
    /// `usr_len` of the header; the length of `usr` unless overridden.
    pub usr_len: Option<u16>,
    /// `flags` of a read's header.
    pub flags: u16,
    /// `sg_cnt` of a read's header; the number of `descs` unless overridden.
    pub sg_cnt: Option<u16>,
    /// Descriptors behind a read's header.
    pub descs: Vec<SgDesc>,
    /// Offset in the immediate; that of the header unless overridden.
    pub off: Option<u32>,
}

impl Frame {
    /// A request that brings `data`.
    pub fn write(data: &[u8], usr: &[u8]) -> Self {
        Self {
            data: data.into(),
            hole: 0,
            usr: usr.into(),
            msg_type: msg_type::WRITE,
            usr_len: None,
            flags: 0,
            sg_cnt: None,
            descs: Vec::new(),
            off: None,
        }
    }

    /// A request that leaves room for `room` bytes, to be sent to `desc`.
    pub fn read(room: u32, usr: &[u8], desc: Option<SgDesc>) -> Self {
        Self {
            hole: room,
            msg_type: msg_type::READ,
            descs: desc.into_iter().collect(),
            ..Self::write(&[], usr)
        }
    }

    /// Where the header lies, unless the immediate lies.
    pub fn header_off(&self) -> u32 {
        (self.data.len() + self.usr.len()) as u32 + self.hole
    }

    /// The immediate for buffer `id`.
    pub fn imm(&self, geometry: &Geometry, id: u16) -> u32 {
        geometry.imm_layout().io_req(id, self.off.unwrap_or_else(|| self.header_off()))
    }

    /// The bytes to put at offset `hole` of the chunk.
    pub fn bytes(&self) -> Vec<u8> {
        let usr_len = self.usr_len.unwrap_or(self.usr.len() as u16).into();
        let mut out = [&self.data[..], &self.usr].concat();
        if self.msg_type == msg_type::READ {
            let sg_cnt = self.sg_cnt.unwrap_or(self.descs.len() as u16).into();
            let hdr =
                MsgRdmaRead { msg_type: self.msg_type.into(), usr_len, flags: self.flags.into(), sg_cnt };
            out.extend_from_slice(hdr.as_bytes());
            out.extend_from_slice(self.descs.as_bytes());
        } else {
            out.extend_from_slice(MsgRdmaWrite { msg_type: self.msg_type.into(), usr_len }.as_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtrs_proto::client::{encode_read, encode_write};

    #[test]
    fn honest_frames_are_what_the_encoders_make() {
        let g = Geometry::default();
        let mut out = [0; 128];
        let w = Frame::write(&[7; 512], &[1; 32]);
        let post = encode_write(&g, 5, &[1; 32], 512, &mut out).unwrap();
        assert_eq!((w.imm(&g, 5), &w.bytes()[512..]), (post.imm, &out[..post.hdr_len]));
        let desc = SgDesc::new(0x1000, 9, 512);
        let r = Frame::read(512, &[2; 32], Some(desc));
        let post = encode_read(&g, 6, &[2; 32], 512, Some(desc), false, &mut out).unwrap();
        assert_eq!((r.imm(&g, 6), r.hole, &r.bytes()[..]), (post.imm, post.chunk_off, &out[..post.hdr_len]));
    }
}

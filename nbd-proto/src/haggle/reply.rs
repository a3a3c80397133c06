//! Replies to options, appended to what is to be sent.

use zerocopy::IntoBytes;

use super::catalog::Export;
use super::option::Wanted;
use super::wire::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, ExportNameReply, InfoBlockSize, InfoExport, OPTION_REPLY_MAGIC,
    ReplyHeader, info, rep,
};
use crate::framing::ALLOCATION_CONTEXT;

/// Longest text of an error reply, bytes. The protocol has room for more; a person has not.
const MAX_TEXT: usize = 1024;

/// Writes replies to one option.
pub(super) struct Replies<'a> {
    pub(super) out: &'a mut Vec<u8>,
    pub(super) option: u32,
}

impl Replies<'_> {
    fn reply(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        let header = ReplyHeader {
            magic: OPTION_REPLY_MAGIC.into(),
            option: self.option.into(),
            kind: kind.into(),
            len: (len as u32).into(),
        };
        self.out.extend_from_slice(header.as_bytes());
        parts.iter().for_each(|part| self.out.extend_from_slice(part));
    }

    pub(super) fn ack(&mut self) {
        self.reply(rep::ACK, &[]);
    }

    /// An error with its reason.
    pub(super) fn error(&mut self, kind: u32, text: &str) {
        let end = text.floor_char_boundary(MAX_TEXT);
        self.reply(kind, &[&text.as_bytes()[..end]]);
    }

    /// `base:allocation`, as selected or as one that could be.
    pub(super) fn allocation(&mut self, selected: bool) {
        let id = if selected { ALLOCATION_CONTEXT } else { 0 };
        self.reply(rep::META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()]);
    }

    /// One line of LIST.
    pub(super) fn server(&mut self, export: &Export<'_>) {
        let len = (export.name.len() as u32).to_be_bytes();
        self.reply(rep::SERVER, &[&len, export.name.as_bytes(), export.description.as_bytes()]);
    }

    /// What INFO and GO tell: EXPORT, and of the rest what was asked for.
    pub(super) fn infos(&mut self, export: &Export<'_>, wanted: Wanted) {
        let main =
            InfoExport { kind: info::EXPORT.into(), size: export.size.into(), flags: export.flags.0.into() };
        self.reply(rep::INFO, &[main.as_bytes()]);
        if wanted.name {
            self.reply(rep::INFO, &[&info::NAME.to_be_bytes(), export.name.as_bytes()]);
        }
        if wanted.description && !export.description.is_empty() {
            self.reply(rep::INFO, &[&info::DESCRIPTION.to_be_bytes(), export.description.as_bytes()]);
        }
        if wanted.block_size {
            self.block_size(export);
        }
    }

    pub(super) fn block_size(&mut self, export: &Export<'_>) {
        let sizes = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: export.sizes.minimum.into(),
            preferred: export.sizes.preferred.into(),
            max_payload: export.sizes.max_payload.into(),
        };
        self.reply(rep::INFO, &[sizes.as_bytes()]);
    }

    /// The answer to EXPORT_NAME, which has no header.
    pub(super) fn export_name(&mut self, export: &Export<'_>, zeroes: bool) {
        let reply = ExportNameReply { size: export.size.into(), flags: export.flags.0.into() };
        self.out.extend_from_slice(reply.as_bytes());
        if zeroes {
            self.out.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
    }
}

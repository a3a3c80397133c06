//! The client's side of the handshake.
//!
//! The transport does, over and over, what [`Haggle::next`] says: write [`Haggle::transmit`], read exactly
//! [`Haggle::missing`] bytes more and give all unused ones to [`Haggle::handle_input`], or start TLS. As no byte is
//! read ahead, nothing that came in the clear can be taken for something encrypted, and nothing of the transmission
//! phase is read too early.

mod error;

use zerocopy::{FromBytes, IntoBytes};

use super::agreed::{Agreed, Tls, Wishes};
use crate::framing::Framing;
use crate::haggle::BlockSizes;
use crate::haggle::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, ExportNameReply, FLAG_C_FIXED_NEWSTYLE, FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, InfoBlockSize, InfoExport, MAX_STRING, NBDMAGIC,
    OLDSTYLE_MAGIC, OPTION_REPLY_MAGIC, OldGreeting, OptionHeader, ReplyHeader, info, opt, rep,
};
use crate::wire::TransmissionFlags;

pub use error::HaggleError;

/// Most bytes of data in one reply to an option: a string, and what stands in front of one.
pub const MAX_REPLY_DATA: u32 = MAX_STRING as u32 + 64;
/// Most replies to one option.
pub const MAX_REPLIES: u32 = 256;
/// Longest part of a server's text that goes into an error, bytes.
const MAX_TEXT: usize = 512;

/// What the transport does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Write [`Haggle::transmit`].
    Write,
    /// Read [`Haggle::missing`] bytes.
    Read,
    /// Do the TLS handshake on the socket, then call [`Haggle::tls_started`]; later bytes go through TLS.
    StartTls,
    /// Over: the next byte in either direction belongs to the transmission phase.
    Transmission(Agreed),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// The first two words of the server.
    Greeting,
    /// All of an oldstyle greeting.
    Old,
    /// Flags of a newstyle greeting.
    Flags,
    /// The answers to an option, so many of which have come.
    Replies {
        option: u32,
        count: u32,
    },
    /// The answer to EXPORT_NAME, with the reserved bytes or not.
    ExportName {
        zeroes: bool,
    },
    StartTls,
    Over(Agreed),
}

/// One handshake.
#[derive(Debug)]
pub struct Haggle {
    wishes: Wishes,
    state: State,
    out: Vec<u8>,
    sent: usize,
    no_zeroes: bool,
    tls: bool,
    framing: Framing,
    contexts: Vec<(u32, String)>,
    /// What GO has told.
    export: Option<(u64, TransmissionFlags)>,
    sizes: Option<BlockSizes>,
}

impl Haggle {
    /// A handshake; the server has the first word.
    pub fn new(wishes: Wishes) -> Self {
        Self {
            wishes,
            state: State::Greeting,
            out: Vec::new(),
            sent: 0,
            no_zeroes: false,
            tls: false,
            framing: Framing::Simple,
            contexts: Vec::new(),
            export: None,
            sizes: None,
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> Next {
        match &self.state {
            _ if !self.transmit().is_empty() => Next::Write,
            State::StartTls => Next::StartTls,
            State::Over(agreed) => Next::Transmission(agreed.clone()),
            _ => Next::Read,
        }
    }

    /// What to send now.
    #[must_use]
    pub fn transmit(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    /// `n` bytes of [`Haggle::transmit`] went out.
    pub fn transmitted(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.out.len());
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
    }

    /// Bytes that must follow `input`, which was not used so far, before [`Haggle::handle_input`] does anything with
    /// it, as far as can be told; never more than belong to the handshake.
    #[must_use]
    pub fn missing(&self, input: &[u8]) -> usize {
        let whole = match &self.state {
            State::Greeting => 16,
            State::Old => size_of::<OldGreeting>(),
            State::Flags => 18,
            State::Replies { .. } => match ReplyHeader::ref_from_prefix(input) {
                Ok((header, _)) if header.len.get() <= MAX_REPLY_DATA => {
                    size_of::<ReplyHeader>() + header.len.get() as usize
                }
                _ => size_of::<ReplyHeader>(),
            },
            State::ExportName { zeroes } => {
                size_of::<ExportNameReply>() + if *zeroes { EXPORT_NAME_ZEROES } else { 0 }
            }
            State::StartTls | State::Over(_) => 0,
        };
        whole.saturating_sub(input.len())
    }

    /// Looks at one message of `input` and returns its length. 0: more bytes, please, or it is not the server's turn.
    ///
    /// # Errors
    /// Close the connection.
    pub fn handle_input(&mut self, input: &[u8]) -> Result<usize, HaggleError> {
        if !self.transmit().is_empty() || self.missing(input) > 0 {
            return Ok(0);
        }
        match self.state.clone() {
            State::Greeting => self.greeting(input),
            State::Old => self.old(input),
            State::Flags => self.flags(input),
            State::Replies { option, count } => self.reply(option, count, input),
            State::ExportName { zeroes } => self.chosen_by_name(zeroes, input),
            State::StartTls | State::Over(_) => Ok(0),
        }
    }

    /// The connection is encrypted from here on. What was agreed upon before counts for nothing.
    pub fn tls_started(&mut self) {
        self.tls = true;
        self.framing = Framing::Simple;
        self.contexts.clear();
        self.after(opt::STARTTLS);
    }

    fn greeting(&mut self, input: &[u8]) -> Result<usize, HaggleError> {
        let (magic, style) = (word(input, 0), word(input, 8));
        if magic != NBDMAGIC {
            return Err(HaggleError::NotNbd(magic.to_be_bytes()));
        }
        self.state = match style {
            IHAVEOPT => State::Flags,
            OLDSTYLE_MAGIC => State::Old,
            other => return Err(HaggleError::Style(other)),
        };
        // The same bytes are the beginning of a longer message.
        if self.missing(input) > 0 { Ok(0) } else { self.handle_input(input) }
    }

    fn old(&mut self, input: &[u8]) -> Result<usize, HaggleError> {
        let Ok((greeting, _)) = OldGreeting::ref_from_prefix(input) else { return Ok(0) };
        if self.wishes.tls == Tls::Require {
            return Err(HaggleError::Lacks("is oldstyle, and TLS, which is required, came later"));
        }
        if !self.wishes.export.is_empty() {
            return Err(HaggleError::Lacks(
                "is oldstyle and has one export without a name: leave the name out",
            ));
        }
        self.over("oldstyle", greeting.size.get(), greeting.flags.get())?;
        Ok(size_of::<OldGreeting>())
    }

    fn flags(&mut self, input: &[u8]) -> Result<usize, HaggleError> {
        let Some(bytes) = input.get(16..18) else { return Ok(0) };
        let flags = u16::from_be_bytes([bytes[0], bytes[1]]);
        let fixed = flags & FLAG_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & FLAG_NO_ZEROES != 0;
        if !fixed && self.wishes.tls == Tls::Require {
            return Err(HaggleError::Lacks("is not fixed newstyle and has no TLS, which is required"));
        }
        let mut ours = if fixed { FLAG_C_FIXED_NEWSTYLE } else { 0 };
        ours |= if self.no_zeroes { FLAG_C_NO_ZEROES } else { 0 };
        self.out.extend_from_slice(ClientFlags { flags: ours.into() }.as_bytes());
        if !fixed || (!self.wishes.options && self.wishes.tls == Tls::Off) {
            self.export_name();
        } else if self.wishes.tls == Tls::Off {
            self.after(opt::STARTTLS);
        } else {
            self.ask(opt::STARTTLS, &[]);
        }
        Ok(18)
    }

    /// Asks for what comes behind `option`, which is done with.
    fn after(&mut self, option: u32) {
        let w = &self.wishes;
        let chunks = self.framing != Framing::Simple;
        if !w.options {
            return self.export_name();
        }
        // In the order in which a server has to hear of them; each at most once.
        let order = [
            (opt::EXTENDED_HEADERS, w.extended),
            (opt::STRUCTURED_REPLY, (w.structured || w.extended) && !chunks),
            (opt::SET_META_CONTEXT, !w.contexts.is_empty() && chunks),
            (opt::GO, true),
        ];
        let done = order.iter().position(|(o, _)| *o == option).map_or(0, |i| i + 1);
        let Some((next, _)) = order[done..].iter().find(|(_, wanted)| *wanted) else { return };
        match *next {
            opt::SET_META_CONTEXT => {
                let data = contexts_data(&w.export, &w.contexts);
                self.ask(opt::SET_META_CONTEXT, &data);
            }
            opt::GO => {
                let data = go_data(&w.export);
                self.ask(opt::GO, &data);
            }
            other => self.ask(other, &[]),
        }
    }

    fn export_name(&mut self) {
        let name = self.wishes.export.clone();
        self.send(opt::EXPORT_NAME, name.as_bytes());
        self.state = State::ExportName { zeroes: !self.no_zeroes };
    }

    fn ask(&mut self, option: u32, data: &[u8]) {
        self.send(option, data);
        self.state = State::Replies { option, count: 0 };
    }

    fn send(&mut self, option: u32, data: &[u8]) {
        let header =
            OptionHeader { magic: IHAVEOPT.into(), option: option.into(), len: (data.len() as u32).into() };
        self.out.extend_from_slice(header.as_bytes());
        self.out.extend_from_slice(data);
    }

    fn reply(&mut self, option: u32, count: u32, input: &[u8]) -> Result<usize, HaggleError> {
        let Ok((header, rest)) = ReplyHeader::ref_from_prefix(input) else { return Ok(0) };
        if header.magic.get() != OPTION_REPLY_MAGIC {
            return Err(HaggleError::Magic(header.magic.get()));
        }
        if header.option.get() != option {
            return Err(HaggleError::OtherOption { asked: option, answered: header.option.get() });
        }
        let (kind, len) = (header.kind.get(), header.len.get());
        if len > MAX_REPLY_DATA || count >= MAX_REPLIES {
            return Err(HaggleError::TooMuch { option });
        }
        let Some(data) = rest.get(..len as usize) else { return Ok(0) };
        self.state = State::Replies { option, count: count + 1 };
        match (option, kind) {
            (_, rep::ACK) if len > 0 => return Err(HaggleError::Data { option, what: "an ACK with data" }),
            (_, rep::ACK) => self.acknowledged(option)?,
            (_, error) if error & rep::ERROR != 0 => self.refused(option, error, data)?,
            (opt::GO, rep::INFO) => self.info(data)?,
            (opt::SET_META_CONTEXT, rep::META_CONTEXT) => self.context(data)?,
            _ => return Err(HaggleError::Kind { option, kind }),
        }
        Ok(size_of::<ReplyHeader>() + len as usize)
    }

    fn acknowledged(&mut self, option: u32) -> Result<(), HaggleError> {
        match option {
            opt::STARTTLS => self.state = State::StartTls,
            opt::EXTENDED_HEADERS => {
                self.framing = Framing::Extended;
                self.after(option);
            }
            opt::STRUCTURED_REPLY => {
                self.framing = Framing::Structured;
                self.after(option);
            }
            opt::GO => {
                let (size, flags) = self.export.ok_or(HaggleError::NoExport)?;
                self.over("fixed newstyle", size, flags.0)?;
            }
            _ => self.after(option),
        }
        Ok(())
    }

    /// An option is not to be had. Most can be done without.
    fn refused(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), HaggleError> {
        let optional = match option {
            opt::STARTTLS => self.wishes.tls == Tls::Allow,
            opt::EXTENDED_HEADERS | opt::STRUCTURED_REPLY | opt::SET_META_CONTEXT => {
                !matches!(kind, rep::ERR_TLS_REQD | rep::ERR_SHUTDOWN)
            }
            // Servers before 2016 do not know GO. EXPORT_NAME must not follow EXTENDED_HEADERS.
            opt::GO if kind == rep::ERR_UNSUP && self.framing != Framing::Extended => {
                self.export = None;
                self.sizes = None;
                self.export_name();
                return Ok(());
            }
            _ => false,
        };
        if !optional {
            return Err(HaggleError::Refused { option, kind, text: shown(data) });
        }
        if option == opt::SET_META_CONTEXT {
            self.contexts.clear();
        }
        self.after(option);
        Ok(())
    }

    fn info(&mut self, data: &[u8]) -> Result<(), HaggleError> {
        let wrong = |what| Err(HaggleError::Data { option: opt::GO, what });
        let Some(kind) = data.first_chunk::<2>() else { return wrong("an INFO without a type") };
        match u16::from_be_bytes(*kind) {
            info::EXPORT => {
                let Ok(export) = InfoExport::ref_from_bytes(data) else {
                    return wrong("EXPORT not of 12 bytes");
                };
                let export = (export.size.get(), TransmissionFlags(export.flags.get()));
                if self.export.replace(export).is_some_and(|old| old != export) {
                    return wrong("two different EXPORTs");
                }
            }
            info::BLOCK_SIZE => {
                let Ok(s) = InfoBlockSize::ref_from_bytes(data) else {
                    return wrong("BLOCK_SIZE not of 14 bytes");
                };
                let (minimum, preferred) = (s.minimum.get(), s.preferred.get());
                let sizes = BlockSizes { minimum, preferred, max_payload: s.max_payload.get() };
                if !sizes.are_legal() {
                    return wrong("block sizes that the protocol does not allow");
                }
                self.sizes = Some(sizes);
            }
            // Names, descriptions, and what others may invent.
            _ => {}
        }
        Ok(())
    }

    fn context(&mut self, data: &[u8]) -> Result<(), HaggleError> {
        let wrong = |what| Err(HaggleError::Data { option: opt::SET_META_CONTEXT, what });
        let Some((id, name)) = data.split_first_chunk::<4>() else {
            return wrong("a context without a number");
        };
        let id = u32::from_be_bytes(*id);
        let Ok(name) = std::str::from_utf8(name) else { return wrong("a context whose name is not UTF-8") };
        if !self.wishes.contexts.iter().any(|wanted| wanted == name) {
            return wrong("a context that was not asked for");
        }
        if self.contexts.iter().any(|(i, n)| *i == id || n == name) {
            return wrong("a context twice");
        }
        self.contexts.push((id, name.into()));
        Ok(())
    }

    fn chosen_by_name(&mut self, zeroes: bool, input: &[u8]) -> Result<usize, HaggleError> {
        let Ok((reply, _)) = ExportNameReply::ref_from_prefix(input) else { return Ok(0) };
        let (size, flags) = (reply.size.get(), reply.flags.get());
        self.over("newstyle", size, flags)?;
        Ok(size_of::<ExportNameReply>() + if zeroes { EXPORT_NAME_ZEROES } else { 0 })
    }

    fn over(&mut self, style: &'static str, size: u64, flags: u16) -> Result<(), HaggleError> {
        if size > i64::MAX as u64 {
            return Err(HaggleError::Size(size));
        }
        let flags = TransmissionFlags(flags);
        self.state = State::Over(Agreed {
            style,
            tls: self.tls,
            framing: self.framing,
            size,
            // Without HAS_FLAGS the others mean nothing.
            flags: if flags.has(TransmissionFlags::HAS_FLAGS) { flags } else { TransmissionFlags(0) },
            sizes: self.sizes,
            contexts: std::mem::take(&mut self.contexts),
        });
        Ok(())
    }
}

/// `u64` at `at` of what is long enough.
fn word(input: &[u8], at: usize) -> u64 {
    input.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
}

/// GO: the name, and one information request.
fn go_data(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&1u16.to_be_bytes());
    data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    data
}

/// SET_META_CONTEXT: the name of the export and the contexts, each with its length.
fn contexts_data(export: &str, contexts: &[String]) -> Vec<u8> {
    let mut data = Vec::new();
    let string = |text: &str, data: &mut Vec<u8>| {
        data.extend_from_slice(&(text.len() as u32).to_be_bytes());
        data.extend_from_slice(text.as_bytes());
    };
    string(export, &mut data);
    data.extend_from_slice(&(contexts.len() as u32).to_be_bytes());
    contexts.iter().for_each(|c| string(c, &mut data));
    data
}

/// A server's text as it may appear in ours: printable, and not endless.
fn shown(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    let end = text.floor_char_boundary(MAX_TEXT);
    // A quotation mark is as printable as a letter.
    let plain = |c: char| if matches!(c, '\'' | '"') { c.to_string() } else { c.escape_debug().to_string() };
    text[..end].chars().map(plain).collect()
}

#[cfg(test)]
mod tests;

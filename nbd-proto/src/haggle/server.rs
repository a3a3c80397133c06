//! The server's side of haggling.
//!
//! The transport calls, over and over: write [`ServerHaggle::transmit`] and tell how much of it went
//! ([`ServerHaggle::transmitted`]); when [`ServerHaggle::outcome`] has something, stop; otherwise
//! [`ServerHaggle::handle_input`]. A client that does not read its replies gets no further option looked at, so that
//! what is kept for it stays below [`MAX_OUTPUT`].

use std::fmt;

use zerocopy::{FromBytes, IntoBytes};

use super::catalog::{BlockSizes, Catalog, Export, Refusal};
use super::option::{InfoRequest, OptionRequest};
use super::reply::Replies;
use super::wire::{
    ClientFlags, FLAG_C_FIXED_NEWSTYLE, FLAG_C_NO_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Greeting,
    IHAVEOPT, MAX_STRING, NBDMAGIC, OptionHeader, opt, option_name, rep,
};
use crate::wire::TransmissionFlags;

/// Longest data of an option that is looked at: a name, and more information requests than there are types.
pub const MAX_OPTION_DATA: usize = MAX_STRING + 1024;
/// Longest data of an option that is skipped and answered with ERR_TOO_BIG. Beyond, the connection is closed.
pub const MAX_SKIPPED_DATA: u32 = 1 << 20;
/// Options of one connection; a client that needs more is not haggling.
pub const MAX_OPTIONS: u32 = 1024;
/// Bytes of input that the transport must be able to hold.
pub const MAX_INPUT: usize = size_of::<OptionHeader>() + MAX_OPTION_DATA;
/// Never more than this waits to be sent: a piece of a list, and its last line.
pub const MAX_OUTPUT: usize = LIST_PIECE + 2 * MAX_STRING + 256;
/// A list goes out in pieces of this many bytes and one line.
const LIST_PIECE: usize = 16 << 10;

/// How the server introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Offer fixed newstyle. Without it a client can only choose by EXPORT_NAME.
    pub fixed_newstyle: bool,
    /// Offer to leave out the reserved zeroes after EXPORT_NAME.
    pub no_zeroes: bool,
    /// Answer LIST; otherwise a client must know the name of its export.
    pub list: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { fixed_newstyle: true, no_zeroes: true, list: true }
    }
}

/// The end of a handshake. Nothing is left to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Input that was not used is the first of the transmission phase.
    Transmission(Chosen),
    /// The client sent ABORT: close.
    Aborted,
}

/// What was agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// [`Export::id`].
    pub export: u64,
    /// As told to the client.
    pub flags: TransmissionFlags,
    /// As told to the client, bytes.
    pub size: u64,
    /// How the client chose: [`opt::GO`] or [`opt::EXPORT_NAME`].
    pub option: u32,
    /// The client was told the block sizes and must respect them.
    pub knows_sizes: bool,
}

/// Why a connection is closed without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Client flags that nobody offered.
    ClientFlags(u32),
    /// No option starts like this.
    Magic(u64),
    /// A client that is not fixed newstyle may only send EXPORT_NAME.
    NotFixed {
        /// As sent.
        option: u32,
    },
    /// Too much to skip.
    TooLong {
        /// As sent.
        option: u32,
        /// Bytes of data.
        len: u32,
    },
    /// More than [`MAX_OPTIONS`].
    TooManyOptions,
    /// EXPORT_NAME for nothing that can be had: the name, and why.
    ExportName(String, String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientFlags(flags) => {
                write!(f, "client flags {flags:#x} contain some that were not offered")
            }
            Self::Magic(word) => {
                write!(f, "{word:#018x} where an option begins with IHAVEOPT: no NBD client")
            }
            Self::NotFixed { option } => {
                let name = option_name(*option);
                write!(
                    f,
                    "{name} ({option}) from a client without fixed newstyle, which has EXPORT_NAME only"
                )
            }
            Self::TooLong { option, len } => write!(f, "{} ({option}) of {len} bytes", option_name(*option)),
            Self::TooManyOptions => write!(f, "more than {MAX_OPTIONS} options"),
            Self::ExportName(name, why) => write!(f, "EXPORT_NAME for '{}': {why}", shown(name)),
        }
    }
}

impl std::error::Error for Error {}

/// One handshake.
#[derive(Debug)]
pub struct ServerHaggle {
    settings: Settings,
    state: State,
    client: u32,
    options: u32,
    /// To be sent from `sent` on.
    out: Vec<u8>,
    sent: usize,
    stopping: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// Greeted; the client's flags are next.
    ClientFlags,
    /// An option is next.
    Options,
    /// Bytes of data to skip.
    Skipping(u32),
    /// Telling exports, after the one of this name.
    Listing(Option<String>),
    Ended(Outcome),
}

impl ServerHaggle {
    /// A handshake whose greeting is ready to be sent.
    pub fn new(settings: Settings) -> Self {
        let mut haggle = Self {
            settings,
            state: State::ClientFlags,
            client: 0,
            options: 0,
            out: Vec::new(),
            sent: 0,
            stopping: false,
        };
        let greeting =
            Greeting { magic: NBDMAGIC.into(), style: IHAVEOPT.into(), flags: haggle.flags().into() };
        haggle.out.extend_from_slice(greeting.as_bytes());
        haggle
    }

    fn flags(&self) -> u16 {
        let fixed = if self.settings.fixed_newstyle { FLAG_FIXED_NEWSTYLE } else { 0 };
        fixed | if self.settings.no_zeroes { FLAG_NO_ZEROES } else { 0 }
    }

    /// What to send now; empty when the client has its turn.
    #[must_use]
    pub fn transmit(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    /// `n` bytes of [`ServerHaggle::transmit`] went out.
    pub fn transmitted(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.out.len());
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
    }

    /// How it ended, once everything was sent.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            State::Ended(outcome) if self.transmit().is_empty() => Some(outcome),
            _ => None,
        }
    }

    /// The server is about to end: every option but ABORT is refused from now on.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Bytes that must follow `input`, which was not used so far, before [`ServerHaggle::handle_input`] does anything
    /// with it, as far as can be told. A transport that reads no more than these never reads into the transmission
    /// phase. 0 if it need not read now.
    #[must_use]
    pub fn missing(&self, input: &[u8]) -> usize {
        let whole = match &self.state {
            State::ClientFlags => size_of::<ClientFlags>(),
            State::Options => match OptionHeader::ref_from_prefix(input) {
                // What is too long is skipped or refused by its header.
                Ok((header, _)) if header.len.get() as usize <= MAX_OPTION_DATA => {
                    size_of::<OptionHeader>() + header.len.get() as usize
                }
                _ => size_of::<OptionHeader>(),
            },
            State::Skipping(left) => (*left as usize).min(MAX_INPUT),
            State::Listing(_) | State::Ended(_) => 0,
        };
        whole.saturating_sub(input.len())
    }

    /// Looks at one message of `input` and returns its length. 0 with nothing to transmit: more bytes, please.
    ///
    /// Does nothing while something is to be sent, or after the end: bytes behind the choice of an export belong to
    /// the transmission phase.
    ///
    /// # Errors
    /// The connection must be closed, without an answer.
    pub fn handle_input(&mut self, input: &[u8], catalog: &dyn Catalog) -> Result<usize, Error> {
        if !self.transmit().is_empty() {
            return Ok(0);
        }
        match &mut self.state {
            State::ClientFlags => self.client_flags(input),
            State::Options => self.option(input, catalog),
            State::Skipping(left) => {
                let n = input.len().min(*left as usize);
                *left -= n as u32;
                if *left == 0 {
                    self.state = State::Options;
                }
                Ok(n)
            }
            State::Listing(after) => {
                let after = after.take();
                self.list(after, catalog);
                Ok(0)
            }
            State::Ended(_) => Ok(0),
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> Result<usize, Error> {
        let Ok((message, _)) = ClientFlags::ref_from_prefix(input) else { return Ok(0) };
        let flags = message.flags.get();
        let offered = u32::from(self.flags());
        if flags & !offered != 0 {
            return Err(Error::ClientFlags(flags));
        }
        self.client = flags;
        self.state = State::Options;
        Ok(size_of::<ClientFlags>())
    }

    fn option(&mut self, input: &[u8], catalog: &dyn Catalog) -> Result<usize, Error> {
        let Ok((header, rest)) = OptionHeader::ref_from_prefix(input) else { return Ok(0) };
        if header.magic.get() != IHAVEOPT {
            return Err(Error::Magic(header.magic.get()));
        }
        let (option, len) = (header.option.get(), header.len.get());
        if option != opt::EXPORT_NAME && self.client & FLAG_C_FIXED_NEWSTYLE == 0 {
            return Err(Error::NotFixed { option });
        }
        if len as usize > MAX_OPTION_DATA {
            return self.skip(option, len);
        }
        let Some(data) = rest.get(..len as usize) else { return Ok(0) };
        self.count()?;
        self.answer(option, data, catalog)?;
        Ok(size_of::<OptionHeader>() + len as usize)
    }

    fn count(&mut self) -> Result<(), Error> {
        self.options += 1;
        if self.options > MAX_OPTIONS { Err(Error::TooManyOptions) } else { Ok(()) }
    }

    /// An option with more data than any has: refused, and its data passed over.
    fn skip(&mut self, option: u32, len: u32) -> Result<usize, Error> {
        if option == opt::EXPORT_NAME || len > MAX_SKIPPED_DATA {
            return Err(Error::TooLong { option, len });
        }
        self.count()?;
        let text = format!("{len} bytes of data; at most {MAX_OPTION_DATA} are looked at");
        self.replies(option).error(rep::ERR_TOO_BIG, &text);
        self.state = State::Skipping(len);
        Ok(size_of::<OptionHeader>())
    }

    fn answer(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog) -> Result<(), Error> {
        if self.stopping && option != opt::ABORT {
            if option == opt::EXPORT_NAME {
                return Err(Error::ExportName(String::new(), "the server is about to end".into()));
            }
            self.replies(option).error(rep::ERR_SHUTDOWN, "the server is about to end");
            return Ok(());
        }
        match OptionRequest::parse(option, data) {
            Ok(OptionRequest::ExportName(name)) => return self.export_name(name, catalog),
            Ok(OptionRequest::Abort) => {
                self.replies(option).ack();
                self.state = State::Ended(Outcome::Aborted);
            }
            Ok(OptionRequest::List) if !self.settings.list => {
                self.replies(option).error(rep::ERR_POLICY, "exports are not listed here");
            }
            Ok(OptionRequest::List) => self.list(None, catalog),
            Ok(OptionRequest::Info(request) | OptionRequest::Go(request)) => {
                self.info(option, &request, catalog);
            }
            Ok(OptionRequest::Other(option)) => {
                let text = format!("{} ({option}) is not supported here", option_name(option));
                self.replies(option).error(rep::ERR_UNSUP, &text);
            }
            Err(bad) if option == opt::EXPORT_NAME => {
                return Err(Error::ExportName(String::from_utf8_lossy(data).into(), bad.to_string()));
            }
            Err(bad) => self.replies(option).error(bad.reply(), &bad.to_string()),
        }
        Ok(())
    }

    fn export_name(&mut self, name: &str, catalog: &dyn Catalog) -> Result<(), Error> {
        let export = catalog
            .find(name)
            .map_err(|refusal| Error::ExportName(name.into(), refusal_text(name, refusal).1))?;
        let zeroes = self.client & FLAG_C_NO_ZEROES == 0;
        self.replies(opt::EXPORT_NAME).export_name(&export, zeroes);
        self.choose(opt::EXPORT_NAME, &export, false);
        Ok(())
    }

    fn info(&mut self, option: u32, request: &InfoRequest<'_>, catalog: &dyn Catalog) {
        let mut replies = self.replies(option);
        let export = match catalog.find(request.name) {
            Ok(export) => export,
            Err(refusal) => {
                let (kind, text) = refusal_text(request.name, refusal);
                return replies.error(kind, &text);
            }
        };
        let knows_sizes = request.wanted.block_size;
        if !knows_sizes && export.sizes.minimum > BlockSizes::UNTOLD_MINIMUM {
            // Told all the same, so that a client that looks at it need not ask again.
            replies.block_size(&export);
            let text = format!(
                "requests must be multiples of {} bytes; ask for the block sizes with the option",
                export.sizes.minimum
            );
            return replies.error(rep::ERR_BLOCK_SIZE_REQD, &text);
        }
        replies.infos(&export, request.wanted);
        replies.ack();
        if option == opt::GO {
            self.choose(option, &export, knows_sizes);
        }
    }

    fn choose(&mut self, option: u32, export: &Export<'_>, knows_sizes: bool) {
        let chosen =
            Chosen { export: export.id, flags: export.flags, size: export.size, option, knows_sizes };
        self.state = State::Ended(Outcome::Transmission(chosen));
    }

    /// A piece of the answer to LIST, from the export after `after` on.
    fn list(&mut self, mut after: Option<String>, catalog: &dyn Catalog) {
        let mut replies = self.replies(opt::LIST);
        while replies.out.len() < LIST_PIECE {
            let Some(export) = catalog.next(after.as_deref()) else {
                replies.ack();
                self.state = State::Options;
                return;
            };
            replies.server(&export);
            after = Some(export.name.into());
        }
        self.state = State::Listing(after);
    }

    fn replies(&mut self, option: u32) -> Replies<'_> {
        Replies { out: &mut self.out, option }
    }
}

/// Reply type and text for a refused export.
fn refusal_text(name: &str, refusal: Refusal) -> (u32, String) {
    match refusal {
        Refusal::Unknown if name.is_empty() => {
            (rep::ERR_UNKNOWN, "there is no default export; ask for one by its name".into())
        }
        Refusal::Unknown => (rep::ERR_UNKNOWN, format!("there is no export named '{}'", shown(name))),
        Refusal::Policy(why) => (rep::ERR_POLICY, why),
    }
}

/// A name from a client as it may appear in texts: printable, and not endless.
fn shown(name: &str) -> String {
    let end = name.floor_char_boundary(256);
    let dots = if end < name.len() { "…" } else { "" };
    format!("{}{dots}", name[..end].escape_debug())
}

//! The server's side of haggling.
//!
//! The transport calls, over and over: write [`ServerHaggle::transmit`] and tell how much of it went
//! ([`ServerHaggle::transmitted`]); when [`ServerHaggle::outcome`] has something, stop; otherwise
//! [`ServerHaggle::handle_input`]. A client that does not read its replies gets no further option looked at, so that
//! what is kept for it stays below [`MAX_OUTPUT`].

mod answers;

use answers::refusal_text;

use zerocopy::{FromBytes, IntoBytes};

use super::catalog::{Catalog, Export};
use super::reply::Replies;
use super::settings::{Error, Outcome, Settings, Style};
use super::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, FLAG_C_FIXED_NEWSTYLE, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Greeting,
    IHAVEOPT, MAX_STRING, NBDMAGIC, OLDSTYLE_MAGIC, OldGreeting, OptionHeader, opt, rep,
};
use crate::framing::Framing;
use crate::wire::{ORIGINAL_MAX_SIZE, TransmissionFlags};

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

/// One handshake.
#[derive(Debug)]
pub struct ServerHaggle {
    settings: Settings,
    state: State,
    client: u32,
    options: u32,
    /// Inside TLS.
    encrypted: bool,
    structured: bool,
    extended: bool,
    /// The export of which `base:allocation` was selected.
    allocation: Option<u64>,
    /// To be sent from `sent` on.
    out: Vec<u8>,
    sent: usize,
    stopping: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// The client has nothing to say; the export is looked up first.
    Begin,
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
            state: State::Begin,
            client: 0,
            options: 0,
            encrypted: false,
            structured: false,
            extended: false,
            allocation: None,
            out: Vec::new(),
            sent: 0,
            stopping: false,
        };
        if settings.style == Style::Newstyle {
            let greeting =
                Greeting { magic: NBDMAGIC.into(), style: IHAVEOPT.into(), flags: haggle.flags().into() };
            haggle.out.extend_from_slice(greeting.as_bytes());
            haggle.state = State::ClientFlags;
        }
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

    /// TLS is established: the options begin anew, and nothing is left of what was agreed before.
    pub fn encrypted(&mut self) {
        if matches!(self.state, State::Ended(Outcome::StartTls)) {
            (self.structured, self.extended, self.allocation) = (false, false, None);
            self.encrypted = true;
            self.state = State::Options;
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
            State::Begin | State::Listing(_) | State::Ended(_) => 0,
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
            State::Begin => self.begin(catalog).map(|()| 0),
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

    /// The handshake of those who do not haggle.
    fn begin(&mut self, catalog: &dyn Catalog) -> Result<(), Error> {
        if self.stopping {
            return Err(Error::NoExport("the server is about to end".into()));
        }
        let export = catalog.find("").map_err(|refusal| Error::NoExport(refusal_text("", refusal).1))?;
        if let Style::Original { reply_magic } = self.settings.style {
            if export.size > ORIGINAL_MAX_SIZE {
                return Err(Error::TooLarge { size: export.size });
            }
            // READ and WRITE are all there is.
            let flags = TransmissionFlags(export.flags.0 & TransmissionFlags::READ_ONLY.0);
            self.end(0, &Export { flags, ..export }, Framing::Original { reply_magic });
            return Ok(());
        }
        let greeting = OldGreeting {
            magic: NBDMAGIC.into(),
            style: OLDSTYLE_MAGIC.into(),
            size: export.size.into(),
            global_flags: 0.into(),
            flags: export.flags.0.into(),
            zeroes: [0; EXPORT_NAME_ZEROES],
        };
        self.out.extend_from_slice(greeting.as_bytes());
        self.end(0, &export, Framing::Simple);
        Ok(())
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

    fn replies(&mut self, option: u32) -> Replies<'_> {
        Replies { out: &mut self.out, option }
    }
}

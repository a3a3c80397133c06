//! The server's side of haggling.
//!
//! The transport calls, over and over: write [`ServerHaggle::transmit`] and tell how much of it went
//! ([`ServerHaggle::transmitted`]); when [`ServerHaggle::outcome`] has something, stop; otherwise
//! [`ServerHaggle::handle_input`]. A client that does not read its replies gets no further option looked at, so that
//! what is kept for it stays below [`MAX_OUTPUT`].

use zerocopy::{FromBytes, IntoBytes};

use super::catalog::{BlockSizes, Catalog, Export, Refusal};
use super::option::{InfoRequest, MetaRequest, OptionRequest};
use super::reply::Replies;
use super::settings::{Chosen, Error, Outcome, Settings, Style, Tls};
use super::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, FLAG_C_FIXED_NEWSTYLE, FLAG_C_NO_ZEROES, FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES, Greeting, IHAVEOPT, MAX_STRING, NBDMAGIC, OLDSTYLE_MAGIC, OldGreeting, OptionHeader, opt,
    option_name, rep,
};
use crate::framing::{Agreed, Framing};
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
            self.end(0, &Export { flags, ..export }, false, Framing::Original { reply_magic });
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
        self.end(0, &export, false, Framing::Simple);
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

    fn answer(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog) -> Result<(), Error> {
        if self.stopping && option != opt::ABORT {
            if option == opt::EXPORT_NAME {
                return Err(Error::ExportName(String::new(), "the server is about to end".into()));
            }
            self.replies(option).error(rep::ERR_SHUTDOWN, "the server is about to end");
            return Ok(());
        }
        if self.settings.tls == Tls::Require
            && !self.encrypted
            && option != opt::ABORT
            && option != opt::STARTTLS
        {
            if option == opt::EXPORT_NAME {
                return Err(Error::ExportName(String::new(), "this server requires TLS".into()));
            }
            self.replies(option).error(rep::ERR_TLS_REQD, "this server requires TLS: send STARTTLS first");
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
            Ok(OptionRequest::StartTls) => self.start_tls(),
            Ok(OptionRequest::StructuredReply) => self.structured_reply(),
            Ok(OptionRequest::ExtendedHeaders) if self.settings.extended => {
                self.extended = true;
                self.replies(option).ack();
            }
            Ok(OptionRequest::ListMetaContext(request) | OptionRequest::SetMetaContext(request))
                if self.settings.structured || self.settings.extended =>
            {
                self.meta_context(option, &request, catalog);
            }
            Ok(_) => {
                let text = format!("{} ({option}) is not supported here", option_name(option));
                self.replies(option).error(rep::ERR_UNSUP, &text);
            }
            Err(bad) if option == opt::EXPORT_NAME => {
                return Err(Error::ExportName(String::from_utf8_lossy(data).into(), bad.to_string()));
            }
            Err(bad) => {
                // "replaces all previously-set metadata contexts (including when this command fails)"
                if option == opt::SET_META_CONTEXT {
                    self.allocation = None;
                }
                self.replies(option).error(bad.reply(), &bad.to_string());
            }
        }
        Ok(())
    }

    fn start_tls(&mut self) {
        if self.settings.tls == Tls::Off {
            return self.replies(opt::STARTTLS).error(rep::ERR_UNSUP, "there is no TLS here");
        }
        if self.encrypted {
            return self.replies(opt::STARTTLS).error(rep::ERR_INVALID, "this is TLS already");
        }
        self.replies(opt::STARTTLS).ack();
        self.state = State::Ended(Outcome::StartTls);
    }

    fn structured_reply(&mut self) {
        if self.extended {
            let text = "extended headers were agreed upon, which take the place of structured replies";
            return self.replies(opt::STRUCTURED_REPLY).error(rep::ERR_EXT_HEADER_REQD, text);
        }
        if !self.settings.structured {
            return self
                .replies(opt::STRUCTURED_REPLY)
                .error(rep::ERR_UNSUP, "there are simple replies only");
        }
        self.structured = true;
        self.replies(opt::STRUCTURED_REPLY).ack();
    }

    fn meta_context(&mut self, option: u32, request: &MetaRequest<'_>, catalog: &dyn Catalog) {
        let sets = option == opt::SET_META_CONTEXT;
        if sets {
            self.allocation = None;
        }
        if !self.structured && !self.extended {
            let text = "metadata contexts need structured replies or extended headers first";
            return self.replies(option).error(rep::ERR_INVALID, text);
        }
        let export = match catalog.find(request.name) {
            Ok(export) => export,
            Err(refusal) => {
                let (kind, text) = refusal_text(request.name, refusal);
                return self.replies(option).error(kind, &text);
            }
        };
        let found = request.allocation || (!sets && (request.base || request.queries == 0));
        if sets && found {
            self.allocation = Some(export.id);
        }
        let mut replies = self.replies(option);
        if found {
            replies.allocation(sets);
        }
        replies.ack();
    }

    fn export_name(&mut self, name: &str, catalog: &dyn Catalog) -> Result<(), Error> {
        let export = catalog
            .find(name)
            .map_err(|refusal| Error::ExportName(name.into(), refusal_text(name, refusal).1))?;
        if self.extended {
            return Err(Error::ExportName(name.into(), "after EXTENDED_HEADERS only GO is right".into()));
        }
        let export = self.told(export);
        let zeroes = self.client & FLAG_C_NO_ZEROES == 0;
        self.replies(opt::EXPORT_NAME).export_name(&export, zeroes);
        self.choose(opt::EXPORT_NAME, &export, false);
        Ok(())
    }

    fn info(&mut self, option: u32, request: &InfoRequest<'_>, catalog: &dyn Catalog) {
        let export = match catalog.find(request.name) {
            Ok(export) => export,
            Err(refusal) => {
                let (kind, text) = refusal_text(request.name, refusal);
                return self.replies(option).error(kind, &text);
            }
        };
        let export = self.told(export);
        let mut replies = self.replies(option);
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

    /// The export with the flags that depend on what was agreed upon.
    fn told<'a>(&self, export: Export<'a>) -> Export<'a> {
        let chunks = self.structured || self.extended;
        let filter = self.extended && self.allocation == Some(export.id);
        let flags = export
            .flags
            .with_if(TransmissionFlags::SEND_DF, chunks)
            .with_if(TransmissionFlags::BLOCK_STATUS_PAYLOAD, filter);
        Export { flags, ..export }
    }

    fn choose(&mut self, option: u32, export: &Export<'_>, knows_sizes: bool) {
        let framing = match (self.extended, self.structured) {
            (true, _) => Framing::Extended,
            (_, true) => Framing::Structured,
            _ => Framing::Simple,
        };
        self.end(option, export, knows_sizes, framing);
    }

    fn end(&mut self, option: u32, export: &Export<'_>, knows_sizes: bool, framing: Framing) {
        let allocation = self.allocation == Some(export.id);
        let chosen = Chosen {
            export: export.id,
            flags: export.flags,
            size: export.size,
            option,
            agreed: Agreed { framing, allocation },
            knows_sizes,
        };
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
        Refusal::TlsRequired => {
            (rep::ERR_TLS_REQD, format!("'{}' requires TLS and a certificate", shown(name)))
        }
        Refusal::Policy(why) => (rep::ERR_POLICY, why),
    }
}

/// A name from a client as it may appear in texts: printable, and not endless.
pub(super) fn shown(name: &str) -> String {
    let end = name.floor_char_boundary(256);
    let dots = if end < name.len() { "…" } else { "" };
    format!("{}{dots}", name[..end].escape_debug())
}

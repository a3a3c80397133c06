//! What a server answers to each option.

use super::super::catalog::{Catalog, Export, Refusal};
use super::super::option::{InfoRequest, MetaRequest, OptionRequest};
use super::super::settings::{Chosen, Error, Outcome, Tls, shown};
use super::super::wire::{FLAG_C_NO_ZEROES, opt, option_name, rep};
use super::{LIST_PIECE, ServerHaggle, State};
use crate::framing::{Agreed, Framing};
use crate::wire::TransmissionFlags;

impl ServerHaggle {
    pub(super) fn answer(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog) -> Result<(), Error> {
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
        self.choose(opt::EXPORT_NAME, &export);
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
        replies.infos(&export, request.wanted);
        replies.ack();
        if option == opt::GO {
            self.choose(option, &export);
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

    fn choose(&mut self, option: u32, export: &Export<'_>) {
        let framing = match (self.extended, self.structured) {
            (true, _) => Framing::Extended,
            (_, true) => Framing::Structured,
            _ => Framing::Simple,
        };
        self.end(option, export, framing);
    }

    pub(super) fn end(&mut self, option: u32, export: &Export<'_>, framing: Framing) {
        let allocation = self.allocation == Some(export.id);
        let chosen = Chosen {
            export: export.id,
            flags: export.flags,
            size: export.size,
            option,
            agreed: Agreed { framing, allocation },
        };
        self.state = State::Ended(Outcome::Transmission(chosen));
    }

    /// A piece of the answer to LIST, from the export after `after` on.
    pub(super) fn list(&mut self, mut after: Option<String>, catalog: &dyn Catalog) {
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
}

/// Reply type and text for a refused export.
pub(super) fn refusal_text(name: &str, refusal: Refusal) -> (u32, String) {
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

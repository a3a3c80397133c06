//! Whom to trust: rustls' own rules, and certificates that are trusted themselves; and what its refusals mean.
//!
//! `openssl req -x509` makes a certificate that is an authority's (CA:TRUE) and signed by itself. Shown as a server's or
//! client's own, rustls refuses it; peers with GnuTLS or OpenSSL take it if it is in `ca-cert.pem`. So do we: who put the
//! very certificate there trusts whoever has its key.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// Certificates of `ca-cert.pem`.
pub(super) type Trusted = Vec<CertificateDer<'static>>;

/// Checks a server's certificate.
#[derive(Debug)]
pub(super) struct TrustedServer {
    pub(super) rules: Arc<WebPkiServerVerifier>,
    pub(super) trusted: Trusted,
}

/// Checks a client's certificate.
#[derive(Debug)]
pub(super) struct TrustedClient {
    pub(super) rules: Arc<dyn ClientCertVerifier>,
    pub(super) trusted: Trusted,
}

/// The certificate was refused for being an authority's, and is trusted itself. Its time was checked before that; what it
/// may be used for (extended key usage) is not checked: who put it there has seen it.
fn is_trusted_itself(why: &Error, shown: &CertificateDer<'_>, trusted: &Trusted) -> bool {
    matches!(webpki_error(why), Some(webpki::Error::CaUsedAsEndEntity)) && trusted.contains(shown)
}

fn webpki_error(error: &Error) -> Option<&webpki::Error> {
    let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return None };
    other.0.downcast_ref()
}

impl ServerCertVerifier for TrustedServer {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.rules.verify_server_cert(shown, between, name, ocsp, now) {
            Err(why) if is_trusted_itself(&why, shown, &self.trusted) => {
                verify_server_name(&ParsedCertificate::try_from(shown)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rules.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rules.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.rules.supported_verify_schemes()
    }
}

impl ClientCertVerifier for TrustedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.rules.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.rules.verify_client_cert(shown, between, now) {
            Err(why) if is_trusted_itself(&why, shown, &self.trusted) => Ok(ClientCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rules.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.rules.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.rules.supported_verify_schemes()
    }
}

/// What an error of rustls means to somebody who makes keys and certificates.
pub(super) fn explain(error: &Error) -> String {
    match (error, webpki_error(error)) {
        (_, Some(webpki::Error::CaUsedAsEndEntity)) => {
            "the certificate is an authority's (basicConstraints CA:TRUE), and is not in ca-cert.pem itself: put it \
             there, or make one with CA:FALSE that an authority in ca-cert.pem has signed"
                .into()
        }
        (_, Some(webpki::Error::UnsupportedCertVersion)) => {
            "the certificate is of X.509 version 1: make one of version 3, for instance with openssl x509 -req \
             -extfile and a subjectAltName"
                .into()
        }
        (_, Some(other)) => format!("the certificate is refused: {other:?}"),
        (Error::InvalidCertificate(CertificateError::UnknownIssuer), _) => {
            format!("{error}: no trusted authority has signed it")
        }
        (Error::General(why), _) if why.contains("private key") => {
            format!("{why}: RSA keys have 2048 to 8192 bits, others are of P-256, P-384, P-521 or Ed25519")
        }
        _ => error.to_string(),
    }
}

//! Keys and certificates from files, in the layout of libnbd, nbdkit and qemu: `ca-cert.pem`, and, to say who one is,
//! `client-cert.pem` with `client-key.pem`, or `server-cert.pem` with `server-key.pem`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::trust::{Trusted, TrustedServer, explain};

/// Where distributions keep the certificates that everybody trusts.
const SYSTEM_TRUST: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Why there is no TLS with these files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file that is not there, or not what it should be.
    #[error("{}: {why}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Nobody to trust.
    #[error(
        "no certificates of authorities: give a directory with ca-cert.pem (tls-certificates), or install the \
         system's (package ca-certificates)"
    )]
    NoTrust,
    /// rustls does not take its settings.
    #[error("{0}")]
    Rejected(#[from] rustls::Error),
}

/// The provider of all cryptography here. AWS-LC, since *ring* takes no RSA keys of sizes between the usual ones, and no
/// P-521.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A client that trusts `directory`'s `ca-cert.pem`, or the system's authorities without a directory, and shows
/// `client-cert.pem` if it is there. `verify` false: it accepts whoever answers.
///
/// # Errors
/// [`TlsError`].
pub fn client_config(directory: Option<&Path>, verify: bool) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let verifier: Arc<dyn ServerCertVerifier> =
        if verify { Arc::new(trusted_server(directory)?) } else { Arc::new(Anybody(provider)) };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let identity = directory.map(|d| (d.join("client-cert.pem"), d.join("client-key.pem")));
    Ok(Arc::new(match identity.filter(|(cert, _)| cert.exists()) {
        Some((cert, key)) => builder
            .with_client_auth_cert(certificates(&cert)?, private_key(&key)?)
            .map_err(|e| unusable_identity(cert, key, &e))?,
        None => builder.with_no_client_auth(),
    }))
}

/// What a client checks its server's certificate with.
pub(super) fn trusted_server(directory: Option<&Path>) -> Result<TrustedServer, TlsError> {
    let (roots, trusted) = trust(directory)?;
    let rules = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    Ok(TrustedServer { rules: rules.map_err(|_| TlsError::NoTrust)?, trusted })
}

/// The file that is to blame: a key that cannot be read, or a certificate that does not go with it.
pub(super) fn unusable_identity(certificate: PathBuf, key: PathBuf, why: &rustls::Error) -> TlsError {
    let path = if matches!(why, rustls::Error::General(_)) { key } else { certificate };
    TlsError::File { path, why: explain(why) }
}

/// Whom to trust: authorities, and, of a directory, the certificates themselves.
///
/// # Errors
/// [`TlsError`]. One certificate of the system's that is broken does not spoil the others.
pub(super) fn trust(directory: Option<&Path>) -> Result<(RootCertStore, Trusted), TlsError> {
    let (mut store, mut trusted) = (RootCertStore::empty(), Trusted::new());
    match directory {
        Some(directory) => {
            let path = directory.join("ca-cert.pem");
            trusted = certificates(&path)?;
            for certificate in &trusted {
                store
                    .add(certificate.clone())
                    .map_err(|e| TlsError::File { path: path.clone(), why: explain(&e) })?;
            }
        }
        None => {
            let path = SYSTEM_TRUST.iter().map(Path::new).find(|p| p.exists()).ok_or(TlsError::NoTrust)?;
            store.add_parsable_certificates(certificates(path)?);
        }
    }
    if store.is_empty() { Err(TlsError::NoTrust) } else { Ok((store, trusted)) }
}

/// All certificates of a PEM file, at least one.
///
/// # Errors
/// [`TlsError::File`].
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |why: String| TlsError::File { path: path.into(), why };
    let all = CertificateDer::pem_file_iter(path).map_err(|e| file(e.to_string()))?;
    let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|e| file(e.to_string()))?;
    if all.is_empty() { Err(file("no certificate in it".into())) } else { Ok(all) }
}

/// The private key of a PEM file.
///
/// # Errors
/// [`TlsError::File`].
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| TlsError::File { path: path.into(), why: e.to_string() })
}

/// Accepts every certificate whose key the server has: encryption without knowing with whom.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

//! Keys and certificates from files, in the layout of libnbd, nbdkit and qemu: `ca-cert.pem`, and, to say who one is,
//! `client-cert.pem` with `client-key.pem`, or `server-cert.pem` with `server-key.pem`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

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
    /// The certificate and its key do not go together, or rustls does not take them.
    #[error("{0}")]
    Rejected(#[from] rustls::Error),
}

/// The provider of all cryptography here.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
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
    let builder = if verify {
        builder.with_root_certificates(trust(directory)?)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
    };
    let identity = directory.map(|d| (d.join("client-cert.pem"), d.join("client-key.pem")));
    Ok(Arc::new(match identity.filter(|(cert, _)| cert.exists()) {
        Some((cert, key)) => builder.with_client_auth_cert(certificates(&cert)?, private_key(&key)?)?,
        None => builder.with_no_client_auth(),
    }))
}

/// Whom to trust.
///
/// # Errors
/// [`TlsError`]. One certificate of the system's that is broken does not spoil the others.
pub fn trust(directory: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    match directory {
        Some(directory) => {
            let path = directory.join("ca-cert.pem");
            for certificate in certificates(&path)? {
                store
                    .add(certificate)
                    .map_err(|e| TlsError::File { path: path.clone(), why: e.to_string() })?;
            }
        }
        None => {
            let path = SYSTEM_TRUST.iter().map(Path::new).find(|p| p.exists()).ok_or(TlsError::NoTrust)?;
            store.add_parsable_certificates(certificates(path)?);
        }
    }
    if store.is_empty() { Err(TlsError::NoTrust) } else { Ok(store) }
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

//! The server's keys, and whom it lets in.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};

use super::files::{TlsError, certificates, private_key, provider, trust, unusable_identity};
use super::trust::TrustedClient;

/// A server that shows `server-cert.pem` of `directory` and its key `server-key.pem`. `verify`: clients must show a
/// certificate of an authority in `ca-cert.pem`; otherwise nobody is asked for one.
///
/// # Errors
/// [`TlsError`].
pub fn server_config(directory: &Path, verify: bool) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = if verify {
        let (roots, trusted) = trust(Some(directory))?;
        let rules = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let rules = rules.map_err(|e| unusable(directory, &e))?;
        builder.with_client_cert_verifier(Arc::new(TrustedClient { rules, trusted }))
    } else {
        builder.with_no_client_auth()
    };
    let (cert, key) = (directory.join("server-cert.pem"), directory.join("server-key.pem"));
    let config = builder.with_single_cert(certificates(&cert)?, private_key(&key)?);
    Ok(Arc::new(config.map_err(|e| unusable_identity(cert, key, &e))?))
}

fn unusable(directory: &Path, error: &VerifierBuilderError) -> TlsError {
    TlsError::File { path: directory.join("ca-cert.pem"), why: error.to_string() }
}

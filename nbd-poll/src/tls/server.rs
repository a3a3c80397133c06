//! The server's keys, and whom it lets in.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};

use super::files::{TlsError, certificates, private_key, provider, trust};

/// A server that shows `server-cert.pem` of `directory` and its key `server-key.pem`. `verify`: clients must show a
/// certificate of an authority in `ca-cert.pem`; otherwise nobody is asked for one.
///
/// # Errors
/// [`TlsError`].
pub fn server_config(directory: &Path, verify: bool) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = if verify {
        let roots = Arc::new(trust(Some(directory))?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
        builder.with_client_cert_verifier(verifier.map_err(|e| unusable(directory, &e))?)
    } else {
        builder.with_no_client_auth()
    };
    let chain = certificates(&directory.join("server-cert.pem"))?;
    let key = private_key(&directory.join("server-key.pem"))?;
    Ok(Arc::new(builder.with_single_cert(chain, key)?))
}

fn unusable(directory: &Path, error: &VerifierBuilderError) -> TlsError {
    TlsError::File { path: directory.join("ca-cert.pem"), why: error.to_string() }
}

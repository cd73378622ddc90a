//! HTTP and HTTPS clients of commands: they trust the CA that they are told, and no other.

use anyhow::{Context, Result};
use heliostat_runtime::wire::{read_certificates, tls_crypto};
use reqwest::Client;
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;

/// A client without a proxy. Without `ca` it trusts no server of HTTPS.
pub(crate) fn client(ca: Option<&Path>) -> Result<Client> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = ca {
        for certificate in read_certificates(path)? {
            roots.add(certificate).with_context(|| format!("the CA {}", path.display()))?;
        }
    }
    let tls = ClientConfig::builder_with_provider(tls_crypto())
        .with_safe_default_protocol_versions()
        .context("cannot speak TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = Client::builder().no_proxy().tls_backend_preconfigured(tls);
    client.build().context("cannot speak HTTP")
}

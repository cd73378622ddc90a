//! TLS between processes: certificates of one CA on both sides, read again when their files change.
//!
//! Whoever connects checks that the certificate is a node's and names the address; whoever accepts checks that the peer
//! has one of any kind. So the certificate of a client cannot pose as a head or a node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Files are looked at again after this.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// First byte of a connection that speaks TLS.
pub(crate) const TLS_FIRST_BYTE: u8 = 0x16;

/// Who a process is and whom it trusts: files in PEM, as `helio cert` writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Certificates of the CA.
    pub ca: PathBuf,
    /// This process's certificate, with those between it and the CA's.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The name that the certificate of every node has, checked instead of the address. Without it the address is.
    pub server_name: Option<String>,
}

impl TlsFiles {
    /// `ca.crt`, `tls.crt` and `tls.key` in a directory: as `helio cert` writes them and Kubernetes mounts them.
    pub fn in_dir(dir: &Path) -> Self {
        let [ca, cert, key] = ["ca.crt", "tls.crt", "tls.key"].map(|name| dir.join(name));
        Self { ca, cert, key, server_name: None }
    }

    /// Reads and checks the files.
    ///
    /// # Errors
    /// What is wrong with which of them.
    pub fn check(&self) -> Result<(), TlsError> {
        Contexts::load(self).map(drop)
    }

    fn stamps(&self) -> [Option<(SystemTime, u64)>; 3] {
        [&self.ca, &self.cert, &self.key].map(|path| {
            let about = fs::metadata(path).ok()?;
            Some((about.modified().ok()?, about.len()))
        })
    }
}

/// Certificates that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read, or is something else.
    #[error("{what} {path}: {why}; `helio cert` makes one")]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// Key and certificate do not belong together, or the key is of an unknown kind.
    #[error("certificate {cert} with key {key}: {why}")]
    Pair {
        /// The certificate's file.
        cert: String,
        /// The key's file.
        key: String,
        /// What is wrong.
        why: String,
    },
    /// Not a name.
    #[error("`{0}` is no host name or address that a certificate could bear")]
    Name(String),
}

/// Both sides of TLS for one process.
struct Contexts {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Contexts {
    fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        if let Some(name) = &files.server_name {
            server_name(name)?;
        }
        let roots = Arc::new(roots(&files.ca)?);
        let (chain, key) = (read_certificates(&files.cert)?, read_private_key(&files.key)?);
        let unusable = |why: String| TlsError::File {
            what: "CA certificate",
            path: files.ca.display().to_string(),
            why,
        };
        let pair = |why: rustls::Error| TlsError::Pair {
            cert: files.cert.display().to_string(),
            key: files.key.display().to_string(),
            why: why.to_string(),
        };
        let crypto = Arc::new(ring::default_provider());
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), crypto.clone());
        let clients = WebPkiClientVerifier::builder_with_provider(roots, crypto.clone());
        let servers = servers.build().map_err(|e| unusable(e.to_string()))?;
        let clients = clients.build().map_err(|e| unusable(e.to_string()))?;
        let versions = &[&rustls::version::TLS13];
        let client = ClientConfig::builder_with_provider(crypto.clone())
            .with_protocol_versions(versions)
            .map_err(pair)?
            .with_webpki_verifier(servers);
        let mut client = client.with_client_auth_cert(chain.clone(), key.clone_key()).map_err(pair)?;
        // Connections are few and long; a resumed one would not look at new files.
        client.resumption = Resumption::disabled();
        let server = ServerConfig::builder_with_provider(crypto)
            .with_protocol_versions(versions)
            .map_err(pair)?
            .with_client_cert_verifier(clients);
        let mut server = server.with_single_cert(chain, key).map_err(pair)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |why: String| TlsError::File { what, path: path.display().to_string(), why };
    let bytes = fs::read(path).map_err(|e| failed(e.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(failed("it holds no certificate in PEM".into())),
        Ok(found) => Ok(found),
        Err(e) => Err(failed(format!("it is not PEM: {e}"))),
    }
}

/// The certificate chain in a PEM file.
///
/// # Errors
/// It cannot be read or holds none.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates("certificate", path)
}

/// The private key in a PEM file.
///
/// # Errors
/// It cannot be read or holds none.
pub fn read_private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let failed = |why: String| TlsError::File { what: "private key", path: path.display().to_string(), why };
    let bytes = fs::read(path).map_err(|e| failed(e.to_string()))?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|e| failed(format!("it holds no private key in PEM: {e}")))
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("CA certificate", path)? {
        roots.add(certificate).map_err(|e| TlsError::File {
            what: "CA certificate",
            path: path.display().to_string(),
            why: e.to_string(),
        })?;
    }
    Ok(roots)
}

fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Name(host.to_owned()))
}

/// What rustls computes with, for whoever makes a configuration of its own.
pub fn tls_crypto() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// TLS of one process. Certificates that are renewed on disk count from the next connection on.
pub(crate) struct Tls {
    files: TlsFiles,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    contexts: Arc<Contexts>,
    stamps: [Option<(SystemTime, u64)>; 3],
    looked: Instant,
}

impl Tls {
    /// Reads the files.
    pub(crate) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let stamps = files.stamps();
        let contexts = Arc::new(Contexts::load(&files)?);
        Ok(Self { files, loaded: Mutex::new(Loaded { contexts, stamps, looked: Instant::now() }) })
    }

    /// The newest usable ones.
    fn contexts(&self) -> Arc<Contexts> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.looked.elapsed() >= LOOK_EVERY {
            loaded.looked = Instant::now();
            let stamps = self.files.stamps();
            if stamps != loaded.stamps {
                match Contexts::load(&self.files) {
                    Ok(contexts) => {
                        tracing::info!(cert = %self.files.cert.display(), "certificates were renewed");
                        (loaded.contexts, loaded.stamps) = (Arc::new(contexts), stamps);
                    }
                    // They are being written, or damaged: looked at again, and the old ones serve on.
                    Err(error) => tracing::warn!(%error, "renewed certificates cannot be used"),
                }
            }
        }
        loaded.contexts.clone()
    }

    /// Shakes hands as the side that connected to `endpoint`.
    pub(crate) async fn connect(
        &self,
        endpoint: &str,
        tcp: TcpStream,
    ) -> Result<client::TlsStream<TcpStream>, String> {
        let host = self.files.server_name.as_deref().unwrap_or_else(|| host_of(endpoint));
        let name = server_name(host).map_err(|e| e.to_string())?;
        let connecting = TlsConnector::from(self.contexts().client.clone()).connect(name, tcp);
        connecting.await.map_err(|error| match fault(&error) {
            Some(fault) => explain(fault, host),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                "it closed the connection during the TLS handshake".into()
            }
            None => error.to_string(),
        })
    }

    /// Shakes hands as the side that accepted.
    pub(crate) async fn accept(&self, tcp: TcpStream) -> Result<server::TlsStream<TcpStream>, String> {
        let accepting = TlsAcceptor::from(self.contexts().server.clone()).accept(tcp);
        let (error, mut tcp) = match accepting.into_fallible().await {
            Ok(stream) => return Ok(stream),
            Err(failed) => failed,
        };
        let why = fault(&error).map_or_else(|| error.to_string(), |fault| explain(fault, ""));
        super::link::part(&mut tcp).await;
        Err(why)
    }
}

/// The host of `host:port` or `[v6]:port`.
fn host_of(endpoint: &str) -> &str {
    let host = endpoint.rsplit_once(':').map_or(endpoint, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// The fault of TLS in an error of a stream.
pub(crate) fn fault(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// A fault in words that name the fix. `host` is whom the certificate should name.
pub(crate) fn explain(fault: &rustls::Error, host: &str) -> String {
    use rustls::Error as E;
    match fault {
        E::InvalidCertificate(why) => explain_certificate(why, host),
        E::NoCertificatesPresented => "it shows no certificate: give it one of our CA (`helio cert`)".into(),
        E::InvalidMessage(_) => {
            "it does not speak TLS and this process does: set [security] in both, or in neither".into()
        }
        E::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "it refuses our certificate, which another CA made: use certificates of one CA".into()
        }
        E::AlertReceived(AlertDescription::CertificateExpired) => {
            "it refuses our certificate, which has expired: make a new one with `helio cert`".into()
        }
        E::AlertReceived(AlertDescription::CertificateRequired) => {
            "it wants a certificate: give this process one of its CA (`helio cert`)".into()
        }
        E::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown,
        ) => "it refuses our certificate".into(),
        other => format!("TLS: {other}"),
    }
}

fn explain_certificate(why: &CertificateError, host: &str) -> String {
    use CertificateError as C;
    match why {
        C::UnknownIssuer | C::BadSignature => {
            "its certificate was made by another CA: use certificates of one CA".into()
        }
        C::Expired | C::ExpiredContext { .. } => {
            "its certificate has expired: make a new one with `helio cert`".into()
        }
        C::NotValidYet | C::NotValidYetContext { .. } => {
            "its certificate is not valid yet: do the clocks of both machines agree?".into()
        }
        C::NotValidForName | C::NotValidForNameContext { .. } => format!(
            "its certificate does not name {host}: make one with `helio cert node NAME --host {host}`, or set \
             `server_name` in [security]"
        ),
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "its certificate is a client's: nodes and heads need one of `helio cert node`".into()
        }
        other => format!("its certificate cannot be used: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_an_endpoint_is_what_a_certificate_names() {
        assert_eq!(host_of("10.0.0.1:80"), "10.0.0.1");
        assert_eq!(host_of("[::1]:80"), "::1");
        assert_eq!(host_of("node-1.local:80"), "node-1.local");
        assert!(server_name("::1").is_ok() && server_name("a b").is_err());
    }
}

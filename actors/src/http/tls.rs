//! HTTPS: one certificate, read again when its files change.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use heliostat_runtime::wire::{TlsError, read_certificates, read_private_key, tls_crypto};
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::CertFiles;

/// Files are looked at again after this.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// TLS 1.2 and 1.3 for anybody who trusts the certificate.
///
/// # Errors
/// What is wrong with which file.
pub fn server_config(files: &CertFiles) -> Result<ServerConfig, TlsError> {
    let certificate = Arc::new(Certificate::load(files.clone())?);
    let config = ServerConfig::builder_with_provider(tls_crypto()).with_safe_default_protocol_versions();
    let config = config.map_err(|why| pair(files, why.to_string()))?;
    Ok(config.with_no_client_auth().with_cert_resolver(certificate))
}

fn pair(files: &CertFiles, why: String) -> TlsError {
    TlsError::Pair { cert: files.cert.display().to_string(), key: files.key.display().to_string(), why }
}

/// The certificate that a server shows.
#[derive(Debug)]
pub struct Certificate {
    files: CertFiles,
    loaded: Mutex<Loaded>,
}

type Stamps = [Option<(SystemTime, u64)>; 2];

#[derive(Debug)]
struct Loaded {
    key: Arc<CertifiedKey>,
    stamps: Stamps,
    looked: Instant,
}

impl Certificate {
    /// Reads the files.
    ///
    /// # Errors
    /// What is wrong with which of them.
    pub fn load(files: CertFiles) -> Result<Self, TlsError> {
        let stamps = stamps(&files);
        let loaded = Loaded { key: read(&files)?, stamps, looked: Instant::now() };
        Ok(Self { files, loaded: Mutex::new(loaded) })
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.looked.elapsed() >= LOOK_EVERY {
            loaded.looked = Instant::now();
            let stamps = stamps(&self.files);
            if stamps != loaded.stamps {
                match read(&self.files) {
                    Ok(key) => (loaded.key, loaded.stamps) = (key, stamps),
                    // They are being written, or damaged: looked at again, and the old ones serve on.
                    Err(error) => tracing::warn!(%error, "a renewed certificate cannot be used"),
                }
            }
        }
        Some(loaded.key.clone())
    }
}

fn stamps(files: &CertFiles) -> Stamps {
    [&files.cert, &files.key].map(|path| {
        let about = fs::metadata(path).ok()?;
        Some((about.modified().ok()?, about.len()))
    })
}

fn read(files: &CertFiles) -> Result<Arc<CertifiedKey>, TlsError> {
    let (chain, key) = (read_certificates(&files.cert)?, read_private_key(&files.key)?);
    let made = CertifiedKey::from_der(chain, key, &tls_crypto());
    made.map(Arc::new).map_err(|why| pair(files, why.to_string()))
}

//! The door of every HTTP server of ours: who comes in, how often, and how long they may take.
//!
//! It knows no route. The servers decide what a refusal looks like.

mod body;
mod keys;
mod rates;
mod tls;

use std::path::PathBuf;
use std::time::Duration;

use bincode::{Decode, Encode};

pub use body::{BodyTime, within};
pub use keys::{ApiKeys, KeysError};
pub use rates::{Caller, Rates};
pub use tls::{Certificate, server_config};

/// Who may come in to an HTTP server, and by what.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct HttpDoor {
    /// What clients must prove to know; required beyond loopback.
    pub keys: ApiKeys,
    /// HTTPS.
    pub tls: Option<CertFiles>,
    /// Origins whose web pages may use it.
    pub cors_origins: Vec<String>,
    /// What strangers may cost.
    pub bounds: Bounds,
}

/// Files of the certificate that an HTTP server shows, in PEM.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct CertFiles {
    /// The certificate, with those between it and its CA.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Bounds on what strangers may cost.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Bounds {
    /// Connections at a time; others wait to be accepted.
    pub connections_max: u32,
    /// Requests of one client (by its key, else by its address) per second; 0 is no limit.
    pub requests_per_s: u32,
    /// How long a connection may take to say what it wants.
    pub header_timeout: Duration,
    /// How long a request's body may take.
    pub body_timeout: Duration,
    /// How long a request to the model may take from its head to the end of its answer; without it as long as it does.
    pub request_timeout: Option<Duration>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            requests_per_s: 0,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            request_timeout: None,
        }
    }
}

impl Bounds {
    /// The share of one of `threads` in the connections.
    pub fn connections_per_thread(&self, threads: usize) -> usize {
        (self.connections_max as usize).div_ceil(threads.max(1)).max(1)
    }
}

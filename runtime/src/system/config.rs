//! How a process takes part in the cluster, and why it cannot.

use std::net::SocketAddr;
use std::time::Duration;

use crate::handle::{ActorId, Incarnation, ProcessId};
use crate::wire::FRAME_BYTES_MAX;
use crate::wire::handshake::Secret;
use crate::wire::tls::{TlsError, TlsFiles};

/// How a process takes part in the cluster.
#[derive(Debug, Clone)]
pub struct SystemConfig {
    /// Where to listen; port 0 picks a free one.
    pub bind: SocketAddr,
    /// The host name or address that others connect to; needed when `bind` is a wildcard address.
    pub advertise: Option<String>,
    /// The cluster token. Without it the system listens on loopback only.
    pub token: Option<Secret>,
    /// Certificates for TLS with every peer; without them connections are not encrypted. All processes of a cluster
    /// have some, or none has.
    pub tls: Option<TlsFiles>,
    /// The identity of this run of the process.
    pub process: ProcessId,
    /// Largest frame sent or accepted; at most `wire::FRAME_BYTES_MAX`.
    pub frame_bytes_max: usize,
    /// Bytes that may wait for one peer; one more message is refused and handed back.
    pub queue_bytes_max: usize,
    /// Connections that others may hold open to this process; one more is refused.
    pub connections_max: usize,
    /// Messages sent by `Handle::tell_or_return` that may be without a receipt; one more is refused and handed back.
    pub returnable_max: usize,
    /// Limit of connecting and shaking hands.
    pub connect_timeout: Duration,
    /// A peer that says nothing for so long is lost. Live peers say something four times as often.
    pub silence_max: Duration,
    /// Threads shared by the actors that `spawn` starts.
    pub arbiters: usize,
}

impl SystemConfig {
    /// Listens at `bind`, with defaults.
    pub fn new(bind: SocketAddr) -> Self {
        Self {
            bind,
            advertise: None,
            token: None,
            tls: None,
            process: ProcessId::random(),
            frame_bytes_max: FRAME_BYTES_MAX,
            queue_bytes_max: FRAME_BYTES_MAX,
            connections_max: 16_384,
            returnable_max: 16_384,
            connect_timeout: Duration::from_secs(5),
            silence_max: Duration::from_secs(20),
            arbiters: 2,
        }
    }

    /// Listens on a free loopback port.
    pub fn loopback() -> Self {
        Self::new(SocketAddr::from(([127, 0, 0, 1], 0)))
    }
}

/// Why a system could not start.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// It would be open to everybody.
    #[error(
        "refusing to listen at {bind}, which other hosts can reach, without a cluster token: set one, or bind to 127.0.0.1"
    )]
    TokenRequired {
        /// The address asked for.
        bind: SocketAddr,
    },
    /// It would keep nobody out.
    #[error("the cluster token is empty")]
    TokenEmpty,
    /// Its certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Others would not know where to connect to.
    #[error(
        "listening at the wildcard address {bind} needs an address to advertise, by which other hosts reach this one"
    )]
    AdvertiseRequired {
        /// The address asked for.
        bind: SocketAddr,
    },
    /// The address cannot be bound.
    #[error("cannot listen at {bind}: {source}")]
    Bind {
        /// The address asked for.
        bind: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// A bound of the configuration makes no sense.
    #[error("frame_bytes_max is {0}, at most {FRAME_BYTES_MAX} is possible")]
    FrameLimit(usize),
    /// The threads of the actors could not be started.
    #[error("cannot start actor threads: {0}")]
    Threads(String),
}

/// Why an actor could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpawnError {
    /// The same or a later incarnation is there.
    #[error("actor {id} is already here, in incarnation {present}")]
    AlreadyHere {
        /// The actor.
        id: ActorId,
        /// The incarnation that is there.
        present: Incarnation,
    },
    /// The system is shutting down.
    #[error("the process is shutting down")]
    ShuttingDown,
}

/// Which actor to start.
#[derive(Debug, Clone, Copy)]
pub struct SpawnOptions {
    /// Its id.
    pub id: ActorId,
    /// Its incarnation; a later one replaces an earlier one.
    pub incarnation: Incarnation,
    /// Messages that wait at most.
    pub mailbox_capacity: usize,
}

impl SpawnOptions {
    /// An actor at a well-known id, of which there is one per process.
    pub fn well_known(id: ActorId) -> Self {
        Self { id, incarnation: Incarnation(1), mailbox_capacity: 4096 }
    }
}

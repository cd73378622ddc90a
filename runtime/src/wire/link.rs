//! Connections to and from peers: connecting on demand, accepting, and noticing when a peer is gone.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::conn::Conn;
use super::handshake::{self, Hello};
use super::reader::{End, Reader};
use super::stream::{Secure, Stream};
use super::tls::TLS_FIRST_BYTE;
use crate::system::Shared;
use crate::system::gate::Place;

/// How long a peer that is sent away may take to close its end, and how much more it may say.
const PARTING: Duration = Duration::from_millis(500);
const PARTING_READS: usize = 64;

/// Milliseconds since the first call in this process.
pub(crate) fn now_ms() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// The way to one peer: a connection that is made when it is needed and again after it broke.
pub(crate) struct Link {
    endpoint: String,
    shared: Weak<Shared>,
    conn: Mutex<Option<Arc<Conn>>>,
}

impl Link {
    pub(crate) fn new(endpoint: &str, shared: Weak<Shared>) -> Self {
        Self { endpoint: endpoint.to_owned(), shared, conn: Mutex::new(None) }
    }

    /// Whether there is a connection, or one is being made.
    pub(crate) fn is_connected(&self) -> bool {
        let slot = self.conn.lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().is_some_and(|conn| !conn.is_closed())
    }

    /// The connection that is open or being made, or a new one.
    pub(crate) fn conn(&self) -> Arc<Conn> {
        let mut slot = self.conn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(conn) = slot.as_ref().filter(|conn| !conn.is_closed()) {
            return conn.clone();
        }
        let conn = match self.shared.upgrade() {
            Some(shared) => {
                let conn = Conn::new(shared.limits, shared.runtime.clone());
                match shared.stopping() {
                    true => conn.close("this process is shutting down"),
                    false => {
                        shared.adopt(&conn);
                        shared.tasks.spawn_on(
                            connect(shared.clone(), conn.clone(), self.endpoint.clone()),
                            &shared.runtime,
                        );
                    }
                }
                conn
            }
            None => unreachable!("a link is used through a handle, which holds the system"),
        };
        *slot = Some(conn.clone());
        conn
    }
}

async fn connect(shared: Arc<Shared>, conn: Arc<Conn>, endpoint: String) {
    let hello = shared.hello();
    let attempt = async {
        let mut tcp = TcpStream::connect(&endpoint).await.map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        let token = shared.token.as_ref();
        let Some(tls) = &shared.tls else {
            let theirs = handshake::connect(&mut tcp, &hello, token).await.map_err(|e| e.to_string())?;
            return Ok((Stream::Plain(tcp), theirs));
        };
        let mut stream = tls.connect(&endpoint, tcp).await?;
        let theirs = handshake::connect(&mut stream, &hello, token).await.map_err(|e| e.to_string())?;
        let (tcp, session) = stream.into_inner();
        Ok::<_, String>((Stream::Tls(Secure::new(tcp, session)), theirs))
    };
    let limit = shared.connect_timeout;
    let outcome =
        timeout(limit, attempt).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")));
    match outcome {
        Ok((stream, theirs)) => run(&shared, &conn, (End::Asking, stream), &theirs).await,
        Err(why) => {
            tracing::debug!(%endpoint, %why, "could not connect");
            conn.close(&format!("{endpoint}: {why}"));
        }
    }
}

/// Serves a connection that a peer made.
pub(crate) async fn serve(shared: Arc<Shared>, tcp: TcpStream, from: SocketAddr, mut place: Place) {
    let (stream, theirs) = match timeout(shared.connect_timeout, greet(&shared, tcp)).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(error)) => return shared.refused_peers.note(from, &error),
        Err(_) => return shared.refused_peers.note(from, &"no greeting in time"),
    };
    if let Err(full) = place.greeted() {
        return shared.refused_peers.note(from, &full);
    }
    let conn = Conn::new(shared.limits, shared.runtime.clone());
    shared.adopt(&conn);
    run(&shared, &conn, (End::Serving, stream), &theirs).await;
}

/// The handshake with a peer that connected.
async fn greet(shared: &Shared, mut tcp: TcpStream) -> Result<(Stream, Hello), String> {
    tcp.set_nodelay(true).map_err(|e| e.to_string())?;
    let (hello, token) = (shared.hello(), shared.token.as_ref());
    let Some(tls) = &shared.tls else {
        let theirs = match handshake::accept(&mut tcp, &hello, token).await {
            Ok(theirs) => theirs,
            Err(error) => {
                part(&mut tcp).await;
                return Err(error.to_string());
            }
        };
        return Ok((Stream::Plain(tcp), theirs));
    };
    refuse_plain(&mut tcp).await?;
    let mut stream = tls.accept(tcp).await?;
    let theirs = handshake::accept(&mut stream, &hello, token).await.map_err(|e| e.to_string())?;
    let (tcp, session) = stream.into_inner();
    Ok((Stream::Tls(Secure::new(tcp, session)), theirs))
}

/// Sends away whoever does not begin with TLS, with words that its end understands.
async fn refuse_plain(tcp: &mut TcpStream) -> Result<(), String> {
    let mut first = [0; 1];
    tcp.peek(&mut first).await.map_err(|e| e.to_string())?;
    if first[0] == TLS_FIRST_BYTE {
        return Ok(());
    }
    handshake::refuse_plain(tcp).await.map_err(|e| e.to_string())?;
    part(tcp).await;
    Err("it does not speak TLS and this process does: set [security] in both, or in neither".into())
}

/// Closes our direction and waits a moment for the peer to close its own: bytes that nobody reads would reset the
/// connection and take our last words with them.
pub(super) async fn part(tcp: &mut TcpStream) {
    let _ = tcp.shutdown().await;
    let mut rest = [0; 1024];
    let read_out = async {
        for _ in 0..PARTING_READS {
            match tcp.read(&mut rest).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    let _ = timeout(PARTING, read_out).await;
}

/// From the end of the handshake to the end of the connection.
async fn run(shared: &Arc<Shared>, conn: &Arc<Conn>, (end, stream): (End, Stream), theirs: &Hello) {
    shared.peers.connected(theirs);
    match stream.read_apart(shared.home().is_some()) {
        Ok(stream) => {
            if conn.open(stream) {
                let why = Reader::new(shared.clone(), conn.clone(), end, theirs.process).read().await;
                conn.close(&format!("{}: {why}", theirs.endpoint));
            }
        }
        Err(error) => conn.close(&error.to_string()),
    }
    let why = conn.closed().unwrap_or_default();
    tracing::debug!(process = %theirs.process, endpoint = %theirs.endpoint, %why, "connection closed");
    shared.peers.disconnected(theirs, &why);
}

/// Connections that were refused here. Logged, at most ten times a second: strangers must not fill a disk.
#[derive(Default)]
pub(crate) struct RefusedPeers {
    unlogged: AtomicU64,
    logged_ms: AtomicU64,
}

impl RefusedPeers {
    pub(crate) fn note(&self, from: SocketAddr, reason: &dyn std::fmt::Display) {
        let refused = self.unlogged.fetch_add(1, Ordering::Relaxed) + 1;
        let (now, last) = (now_ms().max(1), self.logged_ms.load(Ordering::Relaxed));
        let due = last == 0 || now >= last + 100;
        if due && self.logged_ms.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.unlogged.fetch_sub(refused, Ordering::Relaxed);
            tracing::warn!(%from, %reason, refused, "refused a connection");
        }
    }
}

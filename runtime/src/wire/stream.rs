//! The bytes of a connection after the handshake: plain TCP, or TLS over it.
//!
//! Both are used without waiting: whoever has something to send writes at once, and one task reads. In TLS the two
//! share the session under a lock, which nobody holds while waiting for the socket. The plain way has no cost from this.

use std::cell::Cell;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use rustls::Connection;
use tokio::net::TcpStream;

/// Ciphertext that is read at a time.
const CIPHER_BYTES: usize = 64 << 10;
/// Plaintext that is encrypted ahead of the socket.
const AHEAD_BYTES: usize = 64 << 10;

/// An open connection.
pub(crate) enum Stream {
    /// As the bytes are.
    Plain(TcpStream),
    /// The same, read by another runtime than it was made in; this one registers it only while there is no room to write.
    Apart(std::net::TcpStream),
    /// Encrypted.
    Tls(Box<Secure>),
}

/// What is read of a connection.
pub(crate) enum Inlet<'a> {
    Plain(&'a TcpStream),
    Apart(TcpStream),
    Tls(&'a Secure),
}

impl Inlet<'_> {
    /// Waits until reading may yield something.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.readable().await,
            Self::Apart(tcp) => tcp.readable().await,
            Self::Tls(tls) if tls.early.load(Ordering::Relaxed) => Ok(()),
            Self::Tls(tls) => tls.tcp.readable().await,
        }
    }

    /// Appends what is there to `buf`; `WouldBlock` if that is nothing, 0 at the end.
    pub(crate) fn try_read_buf(&self, buf: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.try_read_buf(buf),
            Self::Apart(tcp) => tcp.try_read_buf(buf),
            Self::Tls(tls) => tls.read(buf),
        }
    }
}

impl Stream {
    /// A connection of this runtime, to be read by another one where that is `wanted` and possible.
    pub(crate) fn read_apart(self, wanted: bool) -> io::Result<Self> {
        match self {
            Self::Plain(tcp) if wanted => tcp.into_std().map(Self::Apart),
            stream => Ok(stream),
        }
    }

    pub(crate) fn is_apart(&self) -> bool {
        matches!(self, Self::Apart(_))
    }

    /// What to read from; of a connection that is read apart, by the runtime that asks.
    pub(crate) fn inlet(&self) -> io::Result<Inlet<'_>> {
        Ok(match self {
            Self::Plain(tcp) => Inlet::Plain(tcp),
            Self::Apart(tcp) => Inlet::Apart(TcpStream::from_std(tcp.try_clone()?)?),
            Self::Tls(tls) => Inlet::Tls(tls),
        })
    }

    /// Appends what is there to `buf`, whoever else may be about to read. Only where reading is apart.
    pub(crate) fn read_now(&self, buf: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Plain(_) | Self::Tls(_) => Err(io::ErrorKind::WouldBlock.into()),
            Self::Apart(tcp) => with_scratch(|scratch| {
                let got = (&mut &*tcp).read(scratch)?;
                buf.extend_from_slice(&scratch[..got]);
                Ok(got)
            }),
        }
    }

    /// Waits until the socket takes something.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.writable().await,
            Self::Apart(tcp) => TcpStream::from_std(tcp.try_clone()?)?.writable().await,
            Self::Tls(tls) => tls.tcp.writable().await,
        }
    }

    /// Takes what it can and returns how much that was; `WouldBlock` if that is nothing. What was taken is out only
    /// when `flush` says so.
    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.try_write_vectored(slices),
            Self::Apart(tcp) => (&mut &*tcp).write_vectored(slices),
            Self::Tls(tls) => tls.write(slices),
        }
    }

    /// Hands what was taken to the socket; false while it takes no more.
    pub(crate) fn flush(&self) -> io::Result<bool> {
        match self {
            Self::Plain(_) | Self::Apart(_) => Ok(true),
            Self::Tls(tls) => tls.push(&mut tls.session()),
        }
    }

    /// Bytes that were taken and are not out yet.
    pub(crate) fn unsent(&self) -> usize {
        match self {
            Self::Plain(_) | Self::Apart(_) => 0,
            Self::Tls(tls) => tls.unsent.load(Ordering::Relaxed),
        }
    }

    /// Ends it in both directions.
    pub(crate) fn shutdown(&self) {
        let tcp = match self {
            Self::Plain(tcp) => tcp.as_fd(),
            Self::Apart(tcp) => tcp.as_fd(),
            Self::Tls(tls) => {
                let mut session = tls.session();
                session.send_close_notify();
                let _ = tls.push(&mut session);
                tls.tcp.as_fd()
            }
        };
        // The peer may be gone already.
        let _ = rustix::net::shutdown(tcp, rustix::net::Shutdown::Both);
    }
}

/// A TLS session and its socket.
pub(crate) struct Secure {
    tcp: TcpStream,
    session: Mutex<Connection>,
    /// Plaintext came together with the end of the handshake.
    early: AtomicBool,
    /// Plaintext that was taken since the socket last had everything.
    unsent: AtomicUsize,
}

impl Secure {
    /// A session whose handshake is over.
    pub(crate) fn new(tcp: TcpStream, session: impl Into<Connection>) -> Box<Self> {
        let mut session = session.into();
        session.set_buffer_limit(Some(AHEAD_BYTES));
        let early = session.process_new_packets().is_ok_and(|state| state.plaintext_bytes_to_read() > 0);
        let (early, unsent) = (AtomicBool::new(early), AtomicUsize::new(0));
        Box::new(Self { tcp, session: Mutex::new(session), early, unsent })
    }

    fn session(&self) -> MutexGuard<'_, Connection> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, buf: &mut BytesMut) -> io::Result<usize> {
        if self.early.swap(false, Ordering::Relaxed) {
            let got = take_plaintext(&mut self.session(), buf)?;
            if got > 0 {
                return Ok(got);
            }
        }
        with_scratch(|scratch| {
            loop {
                let bytes = self.tcp.try_read(scratch)?;
                // An end without TLS's own is told from a cut by the frames: a peer that means it says goodbye.
                if bytes == 0 {
                    return Ok(0);
                }
                let got = self.decrypt(&scratch[..bytes], buf)?;
                if got > 0 {
                    return Ok(got);
                }
            }
        })
    }

    fn decrypt(&self, mut cipher: &[u8], buf: &mut BytesMut) -> io::Result<usize> {
        let mut session = self.session();
        let mut got = 0;
        while !cipher.is_empty() {
            if session.read_tls(&mut cipher)? == 0 {
                break;
            }
            if let Err(error) = session.process_new_packets() {
                // Tells the peer why, if it still listens.
                let _ = self.push(&mut session);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            got += take_plaintext(&mut session, buf)?;
        }
        // The session may have something to say of itself, such as that it has new keys.
        if session.wants_write() {
            self.push(&mut session)?;
        }
        Ok(got)
    }

    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut session = self.session();
        if !self.push(&mut session)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = session.writer().write_vectored(slices)?;
        self.unsent.fetch_add(taken, Ordering::Relaxed);
        self.push(&mut session)?;
        Ok(taken)
    }

    /// Writes ciphertext until all is out or the socket is full; says which.
    fn push(&self, session: &mut Connection) -> io::Result<bool> {
        while session.wants_write() {
            match session.write_tls(&mut Socket(&self.tcp)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.unsent.store(0, Ordering::Relaxed);
        Ok(true)
    }
}

fn take_plaintext(session: &mut Connection, buf: &mut BytesMut) -> io::Result<usize> {
    let (mut reader, mut got) = (session.reader(), 0);
    loop {
        let bytes = match reader.fill_buf() {
            Ok(plain) => {
                buf.extend_from_slice(plain);
                plain.len()
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            // The end of TLS, or of the socket: what came before it counts, the socket tells the rest.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => 0,
            Err(e) => return Err(e),
        };
        if bytes == 0 {
            return Ok(got);
        }
        reader.consume(bytes);
        got += bytes;
    }
}

/// The socket as TLS writes to it.
struct Socket<'a>(&'a TcpStream);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lends a buffer of this thread. Not reentrant; a nested use gets a fresh buffer.
fn with_scratch<R>(work: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local!(static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) });
    let mut buffer = SCRATCH.take();
    buffer.resize(CIPHER_BYTES, 0);
    let result = work(&mut buffer);
    SCRATCH.set(buffer);
    result
}

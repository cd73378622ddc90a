//! How two processes meet: magic, protocol version, identities, and a mutual proof that both hold the cluster token.
//!
//! The proof is an HMAC-SHA256 over both nonces and both identities, with a different label for each side, so that
//! one cannot be replayed as the other. It proves the peer at the start of a connection; frames are not signed.

use std::fmt;
use std::io;
use std::sync::Arc;

use bincode::{Decode, Encode};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::tls::{self, TLS_FIRST_BYTE};
use super::{PROTOCOL_VERSION, codec};
use crate::handle::ProcessId;

const MAGIC: &[u8; 8] = b"heliowir";
/// A greeting is small; more is not ours.
const HELLO_BYTES_MAX: usize = 4096;
const PROOF_BYTES: usize = 32;
/// In the place of a version: this end speaks TLS only.
const TLS_ONLY: u16 = u16::MAX;

/// The cluster token. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// A token of these bytes.
    pub fn new(bytes: impl AsRef<[u8]>) -> Self {
        Self(bytes.as_ref().into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// For the file by which a node hands the token to its workers.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a process says of itself. The fields before it (magic, version) are the same in all versions.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Hello {
    pub(crate) process: ProcessId,
    /// Where it listens.
    pub(crate) endpoint: String,
    pub(crate) has_token: bool,
    pub(crate) nonce: [u8; 32],
}

/// Why two processes do not talk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it does not speak Heliostat's protocol; is the port right?")]
    Magic,
    #[error(
        "it speaks protocol version {theirs}, this process speaks {ours}: run the same helio on all hosts"
    )]
    Version { theirs: u16, ours: u16 },
    #[error("it speaks TLS only: give this process certificates of its CA, in [security] or by --tls")]
    TlsThere,
    #[error("it speaks TLS and this process does not: set [security] in both, or in neither")]
    TlsHere,
    #[error("{0}")]
    Tls(String),
    #[error("greeting of {0} bytes is too long")]
    TooLong(usize),
    #[error("its greeting is malformed: {0}")]
    Malformed(String),
    #[error("it has a cluster token and this process has none: give this process the token")]
    TokenMissingHere,
    #[error("it has no cluster token and this process has one: give that process the token")]
    TokenMissingThere,
    #[error("its cluster token differs from ours")]
    TokenWrong,
    #[error("it closed the connection during the handshake; if it has a cluster token, it differs from ours")]
    Closed,
}

/// Runs the handshake as the side that connected. Returns what the peer says of itself.
pub(crate) async fn connect<S>(
    stream: &mut S,
    ours: &Hello,
    token: Option<&Secret>,
) -> Result<Hello, HandshakeError>
where
    S: AsyncReadExt + AsyncWriteExt + Unpin,
{
    write_hello(stream, ours).await?;
    let theirs = read_hello(stream).await?;
    check_tokens(&theirs, token)?;
    if let Some(token) = token {
        stream.write_all(&proof(token, b"connect", ours, &theirs)).await?;
        stream.flush().await?;
        check_proof(&read_proof(stream).await?, &proof(token, b"accept!", ours, &theirs))?;
    }
    Ok(theirs)
}

/// Runs the handshake as the side that accepted. Returns what the peer says of itself.
pub(crate) async fn accept<S>(
    stream: &mut S,
    ours: &Hello,
    token: Option<&Secret>,
) -> Result<Hello, HandshakeError>
where
    S: AsyncReadExt + AsyncWriteExt + Unpin,
{
    let theirs = match read_hello(stream).await {
        Ok(theirs) => theirs,
        // The answer lets the peer say the same: which versions met, or that this is no TLS.
        Err(error @ (HandshakeError::Version { .. } | HandshakeError::TlsHere)) => {
            write_hello(stream, ours).await?;
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    write_hello(stream, ours).await?;
    check_tokens(&theirs, token)?;
    if let Some(token) = token {
        check_proof(&read_proof(stream).await?, &proof(token, b"connect", &theirs, ours))?;
        stream.write_all(&proof(token, b"accept!", &theirs, ours)).await?;
        stream.flush().await?;
    }
    Ok(theirs)
}

async fn write_hello<S: AsyncWriteExt + Unpin>(stream: &mut S, hello: &Hello) -> Result<(), HandshakeError> {
    stream.write_all(&hello_bytes(hello, PROTOCOL_VERSION)).await?;
    stream.flush().await?;
    Ok(())
}

/// `[magic 8][version u16][len u32][Hello]`.
fn hello_bytes(hello: &Hello, version: u16) -> Vec<u8> {
    let body = codec::to_bytes(hello).expect("a greeting has no unencodable field");
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

async fn read_hello<S: AsyncReadExt + Unpin>(stream: &mut S) -> Result<Hello, HandshakeError> {
    let mut fixed = [0; 14];
    read_exact(stream, &mut fixed).await?;
    let (magic, rest) = fixed.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(if magic[0] == TLS_FIRST_BYTE { HandshakeError::TlsHere } else { HandshakeError::Magic });
    }
    let theirs = u16::from_le_bytes([rest[0], rest[1]]);
    if theirs == TLS_ONLY {
        return Err(HandshakeError::TlsThere);
    }
    if theirs != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { theirs, ours: PROTOCOL_VERSION });
    }
    let len = u32::from_le_bytes([rest[2], rest[3], rest[4], rest[5]]) as usize;
    if len > HELLO_BYTES_MAX {
        return Err(HandshakeError::TooLong(len));
    }
    let mut body = vec![0; len];
    read_exact(stream, &mut body).await?;
    codec::from_bytes(&body).map_err(|e| HandshakeError::Malformed(e.to_string()))
}

async fn read_proof<S: AsyncReadExt + Unpin>(stream: &mut S) -> Result<[u8; PROOF_BYTES], HandshakeError> {
    let mut proof = [0; PROOF_BYTES];
    read_exact(stream, &mut proof).await?;
    Ok(proof)
}

async fn read_exact<S: AsyncReadExt + Unpin>(stream: &mut S, buf: &mut [u8]) -> Result<(), HandshakeError> {
    match stream.read_exact(buf).await {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
            Err(HandshakeError::Closed)
        }
        // Whoever accepted looks at our certificate when the TLS handshake is over for us.
        Err(e) => Err(match tls::fault(&e) {
            Some(fault) => HandshakeError::Tls(tls::explain(fault, "")),
            None => e.into(),
        }),
    }
}

/// Tells a process that came without TLS what is missing.
pub(crate) async fn refuse_plain<S: AsyncWriteExt + Unpin>(stream: &mut S) -> Result<(), HandshakeError> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&TLS_ONLY.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    stream.write_all(&out).await?;
    Ok(())
}

fn check_tokens(theirs: &Hello, token: Option<&Secret>) -> Result<(), HandshakeError> {
    match (theirs.has_token, token.is_some()) {
        (true, false) => Err(HandshakeError::TokenMissingHere),
        (false, true) => Err(HandshakeError::TokenMissingThere),
        (true, true) | (false, false) => Ok(()),
    }
}

fn proof(token: &Secret, label: &[u8], connecting: &Hello, accepting: &Hello) -> [u8; PROOF_BYTES] {
    let mut mac = Hmac::<Sha256>::new_from_slice(&token.0).expect("HMAC takes a key of any length");
    mac.update(label);
    mac.update(&hello_bytes(connecting, PROTOCOL_VERSION));
    mac.update(&hello_bytes(accepting, PROTOCOL_VERSION));
    mac.finalize().into_bytes().into()
}

fn check_proof(given: &[u8; PROOF_BYTES], expected: &[u8; PROOF_BYTES]) -> Result<(), HandshakeError> {
    // Every byte is looked at, so the time says nothing of where they differ.
    let differs = given.iter().zip(expected).fold(0, |acc, (a, b)| acc | (a ^ b));
    match std::hint::black_box(differs) {
        0 => Ok(()),
        _ => Err(HandshakeError::TokenWrong),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello(process: u64, has_token: bool) -> Hello {
        Hello {
            process: ProcessId(process),
            endpoint: "host:1".into(),
            has_token,
            nonce: [process as u8; 32],
        }
    }

    proptest! {
        /// Whatever a stranger says, it is an error or a greeting; it is never waited for beyond its length.
        #[test]
        fn strangers_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..300), magic in any::<bool>()) {
            let mut said = bytes;
            if magic && said.len() >= 10 {
                said[..8].copy_from_slice(MAGIC);
                said[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(read_hello(&mut std::io::Cursor::new(said)));
        }
    }

    #[tokio::test]
    async fn a_proof_is_not_worth_anything_for_another_role_or_connection() {
        let token = Secret::new("token");
        let (one, two) = (hello(1, true), hello(2, true));
        let given = proof(&token, b"connect", &one, &two);
        assert!(check_proof(&given, &proof(&token, b"connect", &one, &two)).is_ok());
        for other in [
            proof(&token, b"accept!", &one, &two),
            proof(&token, b"connect", &two, &one),
            proof(&token, b"connect", &one, &hello(3, true)),
            proof(&Secret::new("tokem"), b"connect", &one, &two),
        ] {
            assert!(matches!(check_proof(&given, &other), Err(HandshakeError::TokenWrong)));
        }
    }

    #[tokio::test]
    async fn both_sides_learn_of_a_wrong_token() {
        let (mut here, mut there) = tokio::io::duplex(4096);
        let connecting = tokio::spawn(async move {
            connect(&mut here, &hello(1, true), Some(&Secret::new("sun"))).await.unwrap_err().to_string()
        });
        let accepted = accept(&mut there, &hello(2, true), Some(&Secret::new("moon"))).await;
        assert!(matches!(accepted, Err(HandshakeError::TokenWrong)));
        drop(there);
        assert!(connecting.await.unwrap().contains("if it has a cluster token, it differs from ours"));
    }
}

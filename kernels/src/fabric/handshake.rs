//! What two ranks say to each other before the first frame, and how each proves that it knows the shared secret.
//!
//! ```text
//! dialer                                      acceptor
//! Hello (epoch, ranks, nonce)            ->
//!                                        <-   Challenge (nonce, proof), or Refused
//! Proof                                  ->   (the listener thread is done; `connect` takes over)
//! Offer (shared memory, if any)          ->
//!                                        <-   Offer, or Refused
//! Verdict (mapped?)                     <->   Verdict
//! Ready (this rank has all its links)   <->   Ready
//! ```
//! Every message has [`MESSAGE_BYTES`], so nobody ever reads a length from a stranger.

use std::io;

use bincode::{Decode, Encode};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::ring::MapOffer;

/// Size of every message.
pub(super) const MESSAGE_BYTES: usize = 128;

/// Opens every message. The last byte is the version of the protocol, frames included.
const MAGIC: [u8; 8] = *b"HELFAB\0\x01";

/// A proof of knowledge of the secret.
pub(super) type Proof = [u8; 32];

/// Unpredictable and never used twice.
pub(super) type Nonce = [u8; 16];

/// What the dialer says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Hello {
    pub epoch: u64,
    pub from: u32,
    pub to: u32,
    pub world: u32,
    pub nonce: Nonce,
}

/// Shared memory that a rank offers to a peer: the ring that the rank writes, and its bell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct MemoryOffer {
    pub ring: MapOffer,
    pub bell: MapOffer,
}

/// Why an acceptor sends a dialer away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum Refusal {
    /// The acceptor is at a newer epoch.
    Stale { newer: u64 },
    /// The proof is wrong.
    Secret,
    /// The acceptor is another rank, or its group has another size.
    Misdirected,
}

/// All that is said before the first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum Message {
    Hello(Hello),
    Challenge { nonce: Nonce, proof: Proof },
    Proof(Proof),
    Offer(Option<MemoryOffer>),
    Verdict { mapped: bool },
    Ready,
    Refused(Refusal),
}

impl Message {
    pub(super) fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        bincode::encode_into_slice(self, &mut bytes[MAGIC.len()..], codec()).expect("every message fits");
        bytes
    }

    pub(super) fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, String> {
        let (magic, body) = bytes.split_at(MAGIC.len());
        if magic[..7] != MAGIC[..7] {
            return Err("it does not speak the fabric's protocol".to_owned());
        }
        if magic[7] != MAGIC[7] {
            return Err(format!("it speaks version {} of the protocol, not {}", magic[7], MAGIC[7]));
        }
        let (message, _) = bincode::decode_from_slice(body, codec()).map_err(|error| error.to_string())?;
        Ok(message)
    }
}

fn codec() -> impl bincode::config::Config {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MESSAGE_BYTES>()
}

/// Which end of the handshake proves itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum End {
    Dialer = 1,
    Acceptor = 2,
}

/// The proof of one end: an HMAC-SHA256 under the secret over everything that makes this handshake unique. Without a
/// secret it is all zeros, which no end that has one takes.
pub(super) fn prove(secret: Option<&[u8]>, end: End, hello: &Hello, acceptor: &Nonce) -> Proof {
    secret.map_or([0; 32], |secret| mac(secret, end, hello, acceptor).finalize().into_bytes().into())
}

/// Whether a proof is right, in constant time.
pub(super) fn verify(
    secret: Option<&[u8]>,
    end: End,
    hello: &Hello,
    acceptor: &Nonce,
    proof: &Proof,
) -> bool {
    secret.map_or(*proof == [0; 32], |secret| mac(secret, end, hello, acceptor).verify_slice(proof).is_ok())
}

fn mac(secret: &[u8], end: End, hello: &Hello, acceptor: &Nonce) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of every length");
    mac.update(&MAGIC);
    mac.update(&[end as u8]);
    mac.update(&hello.epoch.to_le_bytes());
    mac.update(&hello.from.to_le_bytes());
    mac.update(&hello.to.to_le_bytes());
    mac.update(&hello.world.to_le_bytes());
    mac.update(&hello.nonce);
    mac.update(acceptor);
    mac
}

/// Random bytes of the operating system.
pub(super) fn nonce() -> io::Result<Nonce> {
    let mut nonce = [0; 16];
    let read = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    if read != nonce.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(nonce)
}

/// A random number of the operating system.
pub(super) fn random() -> io::Result<u64> {
    Ok(u64::from_le_bytes(std::array::from_fn({
        let nonce = nonce()?;
        move |at| nonce[at]
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello { epoch: 3, from: 2, to: 1, world: 4, nonce: [7; 16] };

    #[test]
    fn messages_round_trip_and_strangers_are_named() {
        let map = MapOffer { pid: u32::MAX, fd: i32::MAX, bytes: u64::MAX, token: u64::MAX };
        let messages = [
            Message::Hello(HELLO),
            Message::Challenge { nonce: [1; 16], proof: [2; 32] },
            Message::Offer(Some(MemoryOffer { ring: map, bell: map })),
            Message::Refused(Refusal::Stale { newer: 9 }),
        ];
        for message in messages {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
        let mut bytes = Message::Ready.encode();
        bytes[7] = 9;
        assert!(Message::decode(&bytes).unwrap_err().contains("version 9"));
        bytes[0] = b'G';
        assert!(Message::decode(&bytes).unwrap_err().contains("does not speak"));
    }

    #[test]
    fn a_proof_holds_for_one_end_of_one_handshake_only() {
        let secret = Some(&b"secret"[..]);
        let proof = prove(secret, End::Dialer, &HELLO, &[1; 16]);
        assert!(verify(secret, End::Dialer, &HELLO, &[1; 16], &proof));
        assert!(!verify(secret, End::Acceptor, &HELLO, &[1; 16], &proof), "reflected");
        assert!(!verify(secret, End::Dialer, &HELLO, &[2; 16], &proof), "replayed");
        assert!(!verify(secret, End::Dialer, &Hello { epoch: 4, ..HELLO }, &[1; 16], &proof));
        assert!(!verify(Some(b"other"), End::Dialer, &HELLO, &[1; 16], &proof));
        assert!(!verify(None, End::Dialer, &HELLO, &[1; 16], &proof));
        assert!(!verify(secret, End::Dialer, &HELLO, &[1; 16], &prove(None, End::Dialer, &HELLO, &[1; 16])));
    }
}

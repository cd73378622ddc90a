//! Frames, codec, handshake and connections between processes.
//!
//! A connection carries calls (with their cancellation, and credit for streams) in one direction and their answers in
//! the other; a process pair that talks both ways has two. Nothing here knows an actor: `crate::mailbox` delivers what arrives.

pub(crate) mod answer;
pub(crate) mod calls;
pub(crate) mod codec;
pub(crate) mod conn;
pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod link;
mod outbound;
pub(crate) mod reader;
pub(crate) mod stream;
pub(crate) mod tls;

pub use tls::{TlsError, TlsFiles, read_certificates, read_private_key, tls_crypto};

pub use codec::{CodecError, from_bytes, to_bytes};

/// Version of handshake, frames and what heads, nodes and workers say to each other. Both ends must speak the same one.
pub const PROTOCOL_VERSION: u16 = 4;

/// Largest frame that any configuration allows, bytes.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// FNV-1a: a stable 64-bit id of a name, computed at compile time.
pub(crate) const fn name_hash(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

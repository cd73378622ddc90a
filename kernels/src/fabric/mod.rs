//! Links between the ranks of a group: shared memory on one host, TCP across hosts.
//!
//! A [`FabricListener`] lives as long as its rank process and announces an [`Endpoint`]. For every membership epoch all
//! ranks call [`FabricListener::connect`], which links every pair and returns a [`Fabric`]. One engine thread owns it;
//! other threads hold an [`Abort`] and a [`Waker`].
//!
//! Guarantees:
//! * (FB-1) Frames of one [`Stream`] from one rank arrive once and in the order in which they were sent. Streams are
//!   independent: a header may be received before data that was sent earlier.
//! * (FB-2) A blocked call ends: by its frame or room, an abort, the loss of a rank, or a timeout.
//! * (FB-3) Ranks that send to each other at the same time never deadlock: whoever waits takes in what arrives.
//! * (FB-4) What a peer writes is untrusted: bad bytes are a [`FabricError::Protocol`], never a panic.
//! * (FB-5) A killed process leaves nothing behind, and its peers learn of it from their connection to it.
//!
//! Frames are neither encrypted nor signed: the secret decides who may link, the network must be trusted with the rest.
//!
//! It never retries, never reorders and never knows what a frame means.

mod bell;
mod connect;
mod endpoint;
mod error;
mod frame;
mod handshake;
mod links;
mod listener;
mod pairing;
mod peer;
mod ring;
mod waiting;
mod waits;
mod watch;

pub use bell::{Abort, Waker};
pub use connect::{Connect, Transport};
pub use endpoint::{Endpoint, HostId};
pub use error::FabricError;
pub use frame::{Frame, Kind, Stream, Tag};
pub use links::{Event, Fabric, LinkKind};
pub use listener::FabricListener;
pub use waits::{Wait, Waited};

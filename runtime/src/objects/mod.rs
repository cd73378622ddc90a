//! Objects: large values that are put once and read by many, by refs that travel in messages.
//!
//! `counts` (pure) knows who has refs to what; `table` is that of one process, with the objects that it owns; `store` is
//! the shared memory of a node, in the process of its agent; `client` is what users call. Bytes go from process to process
//! of a node by a shared mapping, and from node to node in pieces.
//!
//! ```
//! use heliostat_runtime::cluster::Cluster;
//! use heliostat_runtime::head::{self, HeadConfig};
//! use heliostat_runtime::node::{self, NodeConfig};
//! use heliostat_runtime::state::StateConfig;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let state = StateConfig::Embedded { dir: dir.path().join("state") };
//! # let bind = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
//! # let head = head::run(HeadConfig::new(bind, state)).await?;
//! # let mut config = NodeConfig::new("n0", bind.to_string(), dir.path().join("n0"));
//! # config.worker_command = vec!["/bin/false".to_owned()];
//! # let node = node::run(config).await?;
//! let (one, other) = (Cluster::connect(&bind.to_string(), None).await?, Cluster::connect(&bind.to_string(), None).await?);
//! let object = one.objects().put(&vec![7; 1 << 20]).await?;
//! let bytes = other.objects().get(&object).await?; // mapped, not copied
//! assert_eq!((bytes.len(), bytes[1000]), (1 << 20, 7));
//!
//! let names = one.objects().put_value(&vec!["a".to_owned(), "b".to_owned()]).await?;
//! assert_eq!(other.objects().get_value::<Vec<String>>(&names).await?, ["a", "b"]);
//! # one.shutdown().await?;
//! # node.stopped().await;
//! # head.stop().await;
//! # Ok(())
//! # }
//! ```

mod args;
mod client;
mod counts;
#[cfg(test)]
mod counts_tests;
mod error;
mod keeper;
mod link;
mod map;
mod messages;
mod object_ref;
mod pool;
pub(crate) mod scope;
mod socket;
pub(crate) mod store;
mod table;

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

pub use args::ArgRefs;
pub(crate) use args::{Keep, digest as args_digest, encode as encode_args};
pub use client::{ObjectBytes, ObjectWriter, Objects};
pub use error::ObjectError;
pub use messages::{ObjectPlace, ObjectStatus, StoreStatus};
pub use object_ref::ObjectRef;
pub(crate) use table::Table;

use crate::handle::ProcessId;

/// Objects up to this size live in the memory of their owner and are copied to whoever gets them: a mapping of their own
/// would cost more than they do.
pub const SMALL_BYTES_MAX: usize = 64 << 10;
/// Bytes of an object in one message.
pub(crate) const CHUNK_BYTES: u32 = 1 << 20;

/// Which object: who put it, and its number there. Never used again.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct ObjectId {
    /// The process that put it and owns it.
    pub owner: ProcessId,
    /// Counts the objects of that process.
    pub number: u64,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.owner, self.number)
    }
}

/// What a ref says of its object.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ObjectAddr {
    pub(crate) id: ObjectId,
    /// Where its owner listens.
    pub(crate) owner: String,
    /// Where the agent of the owner's node listens, whose store knows whether the owner lives.
    pub(crate) store: Option<String>,
    /// Whether that store has the bytes, not the owner itself.
    pub(crate) in_store: bool,
    /// Its size.
    pub(crate) bytes: u64,
}

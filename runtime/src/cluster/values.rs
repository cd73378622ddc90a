//! Values that outlive the actor that keeps them, and its machine: few, small, gone with the cluster.

use std::time::Duration;

use super::{Cluster, ClusterError};
use crate::head::messages::{GetValue, PutValue};
pub use crate::head::messages::{Kept, PutError};

/// Why a value was not kept.
#[derive(Debug, thiserror::Error)]
pub enum NotKept {
    /// The head does not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The head says no.
    #[error(transparent)]
    Put(#[from] PutError),
}

impl Cluster {
    /// What is kept under a key.
    ///
    /// # Errors
    /// The head does not answer.
    pub async fn value(&self, key: &str) -> Result<Option<Kept>, ClusterError> {
        self.ask(GetValue { key: key.to_owned() }).await
    }

    /// Keeps a value, at most 1 MiB, under a key, and returns its revision once it is durable. It is refused unless
    /// what is there has revision `expect`; 0 is nothing there.
    ///
    /// # Errors
    /// The head does not answer, or refuses it.
    pub async fn put_value(&self, key: &str, expect: u64, value: Vec<u8>) -> Result<u64, NotKept> {
        let put = PutValue { key: key.to_owned(), expect, value };
        // Sent twice, the second would find what the first has kept.
        Ok(self.ask_within(put, Duration::ZERO, false).await??)
    }
}

//! Election of one leader: whoever creates the key first. The key goes with its owner's lease.
//!
//! The revision of the key is the fencing token: a leader that adds `Leadership::guard` to its transactions cannot
//! overwrite what a later leader wrote.

use super::{Expect, LeaseId, Op, Revision, StateError, StateStore};

/// Proof of having been elected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leadership {
    key: String,
    revision: Revision,
}

impl Leadership {
    /// Grows from one leader to the next.
    pub fn term(&self) -> Revision {
        self.revision
    }

    /// An operation that lets a transaction happen only while this leadership lasts.
    pub fn guard(&self) -> Op {
        Op::Check { key: self.key.clone(), expect: Expect::Revision(self.revision) }
    }
}

impl StateStore {
    /// Waits until elected. `value` says who leads; the leadership lasts as long as the lease.
    pub async fn campaign(
        &self,
        election: &str,
        value: impl Into<Vec<u8>>,
        lease: LeaseId,
    ) -> Result<Leadership, StateError> {
        let key = election_key(election);
        let value = value.into();
        loop {
            let put = Op::Put {
                key: key.clone(),
                value: value.clone(),
                expect: Expect::Absent,
                lease: Some(lease),
            };
            match self.txn(vec![put]).await {
                Ok(revision) => return Ok(Leadership { key, revision }),
                Err(StateError::Conflict { .. }) => self.wait_until_absent(&key).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// What the present leader said of itself.
    pub async fn leader(&self, election: &str) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.get(&election_key(election)).await?.map(|entry| entry.value))
    }

    /// Gives the leadership up, if it lasts.
    pub async fn resign(&self, leadership: Leadership) -> Result<(), StateError> {
        match self.delete(&leadership.key, Expect::Revision(leadership.revision)).await {
            Ok(_) | Err(StateError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn wait_until_absent(&self, key: &str) -> Result<(), StateError> {
        let now = self.range(key).await?;
        if !now.entries.iter().any(|entry| entry.key == key) {
            return Ok(());
        }
        let mut watch = self.watch(key, Revision(now.revision.0 + 1)).await?;
        loop {
            let event = match watch.next().await {
                Ok(event) => event,
                Err(StateError::Compacted { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            if event.key == key && event.value.is_none() {
                return Ok(());
            }
        }
    }
}

fn election_key(election: &str) -> String {
    format!("election/{election}")
}

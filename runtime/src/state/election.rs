//! Election of one leader: whoever creates the key first. The key goes with its owner's lease.
//!
//! The revision of the key is the fencing token: a leader that adds `Leadership::guard` to its transactions cannot
//! overwrite what a later leader wrote.

use super::{Entry, Expect, LeaseId, Op, Revision, StateError, StateStore};

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
        let value = value.into();
        loop {
            if let Some(leadership) = self.stand(election, value.clone(), lease).await? {
                return Ok(leadership);
            }
            self.vacant(election).await?;
        }
    }

    /// Is elected, unless somebody leads.
    pub async fn stand(
        &self,
        election: &str,
        value: impl Into<Vec<u8>>,
        lease: LeaseId,
    ) -> Result<Option<Leadership>, StateError> {
        let key = election_key(election);
        let put =
            Op::Put { key: key.clone(), value: value.into(), expect: Expect::Absent, lease: Some(lease) };
        match self.txn(vec![put]).await {
            Ok(revision) => Ok(Some(Leadership { key, revision })),
            Err(StateError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Leads from now on, whoever led before and without a lease: for a store that one process alone can open.
    pub async fn seize(&self, election: &str, value: impl Into<Vec<u8>>) -> Result<Leadership, StateError> {
        let key = election_key(election);
        let revision = self.txn(vec![Op::put(key.clone(), value)]).await?;
        Ok(Leadership { key, revision })
    }

    /// Ends the leadership that was won in that revision, if it lasts: its holder is known to be gone.
    pub async fn evict(&self, election: &str, won: Revision) -> Result<(), StateError> {
        self.resign(Leadership { key: election_key(election), revision: won }).await
    }

    /// Waits until nobody leads.
    pub async fn vacant(&self, election: &str) -> Result<(), StateError> {
        self.wait_until_absent(&election_key(election)).await
    }

    /// The present leader's entry: what it said of itself, and the revision in which it won.
    pub async fn leader_entry(&self, election: &str) -> Result<Option<Entry>, StateError> {
        self.get(&election_key(election)).await
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

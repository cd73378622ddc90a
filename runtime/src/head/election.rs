//! How a head becomes the leader: it stands by until nobody leads, and the first to write its name with a lease leads.

use std::time::{Duration, Instant};

use bincode::{Decode, Encode};

use crate::state::{Entry, Expect, Leadership, LeaseId, Op, Revision, StateError, StateStore};
use crate::wire::{from_bytes, to_bytes};

/// Name of the election.
const ELECTION: &str = "head";
/// Written when a cluster is shut down, so that heads that stand by end, too.
const CLOSED: &str = "election/head.closed";
/// Pause before a store that does not answer is asked again.
pub(super) const STORE_PAUSE: Duration = Duration::from_millis(200);

/// What a leader says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Candidate {
    pub(super) endpoint: String,
    pub(super) host: String,
    pub(super) pid: u32,
}

impl Candidate {
    /// Whether that is an earlier process of this head: nobody else can listen there.
    fn is_own_past(&self, leader: &Self) -> bool {
        self.endpoint == leader.endpoint && self.host == leader.host
    }

    fn bytes(&self) -> Result<Vec<u8>, StateError> {
        to_bytes(self).map_err(|error| StateError::Invalid(error.to_string()))
    }
}

/// How standing by ended.
pub(super) enum Outcome {
    Elected(Elected),
    /// The cluster was shut down.
    Closed,
}

pub(super) struct Elected {
    pub(super) leadership: Leadership,
    pub(super) lease: Option<LeaseId>,
    /// When the lease was asked for.
    pub(super) asked: Duration,
    /// Whether another head led before.
    pub(super) succeeds: bool,
}

/// Leads a store that nobody else can open.
pub(super) async fn alone(store: &StateStore, own: &Candidate) -> Result<Elected, StateError> {
    let leadership = store.seize(ELECTION, own.bytes()?).await?;
    Ok(Elected { leadership, lease: None, asked: Duration::ZERO, succeeds: false })
}

/// Stands by until elected. `stands_by` hears of every leader. `started` is the moment that time counts from.
pub(super) async fn elect(
    store: &StateStore,
    own: &Candidate,
    (ttl, started): (Duration, Instant),
    stands_by: impl Fn(&str),
) -> Result<Outcome, StateError> {
    let mut closed: Option<Option<Revision>> = None;
    let (mut succeeds, mut said) = (false, false);
    loop {
        match step(store, own, (ttl, started), &mut closed, &stands_by).await {
            Ok(Step::Elected(elected)) => {
                return Ok(Outcome::Elected(Elected { succeeds, ..elected }));
            }
            Ok(Step::Again) => {}
            Ok(Step::Succeeds) => succeeds = true,
            Ok(Step::Closed) => return Ok(Outcome::Closed),
            Err(StateError::Unavailable(why)) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(why, "cannot stand for election, tries again");
                }
                tokio::time::sleep(STORE_PAUSE).await;
            }
            Err(StateError::LeaseExpired) => {}
            Err(error) => return Err(error),
        }
    }
}

enum Step {
    Elected(Elected),
    Again,
    Succeeds,
    Closed,
}

async fn step(
    store: &StateStore,
    own: &Candidate,
    (ttl, started): (Duration, Instant),
    closed: &mut Option<Option<Revision>>,
    stands_by: &impl Fn(&str),
) -> Result<Step, StateError> {
    let now = store.get(CLOSED).await?.map(|entry| entry.revision);
    if *closed.get_or_insert(now) != now {
        return Ok(Step::Closed);
    }
    if let Some(Entry { value, revision, .. }) = store.leader_entry(ELECTION).await? {
        let leader: Candidate = from_bytes(&value).map_err(|error| StateError::Invalid(error.to_string()))?;
        if own.is_own_past(&leader) {
            tracing::info!(pid = leader.pid, "takes the place of the earlier process of this head");
            store.evict(ELECTION, revision).await?;
            return Ok(Step::Again);
        }
        stands_by(&leader.endpoint);
        store.vacant(ELECTION).await?;
        return Ok(Step::Succeeds);
    }
    let asked = started.elapsed();
    let lease = store.grant(ttl).await?;
    match store.stand(ELECTION, own.bytes()?, lease).await? {
        Some(leadership) => {
            Ok(Step::Elected(Elected { leadership, lease: Some(lease), asked, succeeds: false }))
        }
        None => {
            store.revoke(lease).await?;
            Ok(Step::Again)
        }
    }
}

/// Lets the next head lead at once; after the end of the cluster no head that stands by does.
pub(super) async fn resign(
    store: &StateStore,
    leadership: Leadership,
    lease: Option<LeaseId>,
    over: bool,
) -> Result<(), StateError> {
    if over {
        store.txn(vec![leadership.guard(), Op::put(CLOSED, b"".to_vec()).expect(Expect::Any)]).await?;
    }
    store.resign(leadership).await?;
    match lease {
        Some(lease) => store.revoke(lease).await,
        None => Ok(()),
    }
}

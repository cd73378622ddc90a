//! One round at one stop of the tree: its own ranks, the subtrees below it, and what all of them say.
//!
//! MS-1: every rank of the subtree is either in the result or among the failed, with a reason.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use super::error::{RankError, RankFailure};
use super::host::{Membership, MeshActor, Views};
use super::messages::{Declined, Down, Kind, Round, Up};
use super::table::Calls;
use super::tree::{Part, Plan, children};
use crate::handle::{ActorAddr, ActorId, Handle, Incarnation};
use crate::system::System;

/// Each level of the tree answers so much before the one above it gives up, so that it can still say who is late.
const SLACK: Duration = Duration::from_millis(100);
/// And never more than this part of what is left.
const SLACK_PART: u32 = 16;
/// More bytes than this are reduced on a thread that may block.
const FOLD_INLINE_BYTES: usize = 64 << 10;

/// What is left of a round's time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Time {
    pub(super) until: Option<Instant>,
}

impl Time {
    pub(super) fn of(limit: Option<Duration>) -> Self {
        Self { until: limit.and_then(|limit| Instant::now().checked_add(limit)) }
    }

    /// How long a stop waits for its ranks and subtrees, and how long it tells these that they have.
    fn split(self) -> (Option<Duration>, u64) {
        let Some(until) = self.until else { return (None, 0) };
        let left = until.saturating_duration_since(Instant::now());
        let slack = (left / SLACK_PART).min(SLACK);
        let below = u64::try_from((left - slack).as_micros()).unwrap_or(u64::MAX);
        (Some(left - slack / 2), below.max(1))
    }
}

/// Does the part of this process in a round, and sees to the subtrees below it.
pub(super) async fn take_part(system: &System, membership: &Membership, down: Down) -> Result<Up, Declined> {
    let time = Time::of((down.left_us > 0).then(|| Duration::from_micros(down.left_us)));
    let round = down.round;
    let plan = membership.plan(&round, time.until).await?;
    let stops = down.stops.0 as usize..down.stops.1 as usize;
    if stops.is_empty() || stops.end > plan.runs.len() {
        return Err(Declined::Malformed(format!("stops {stops:?} of {}", plan.runs.len())));
    }
    let own = plan.runs[stops.start].clone();
    let calls = find_calls(system, &plan.members[own.start].1, &round);
    let mut answers: FuturesUnordered<BoxFuture<'static, Up>> = FuturesUnordered::new();
    // First those with most work below them.
    for stops in children(stops, round.fan_out as usize) {
        let subtree = Subtree { system: system.clone(), plan: plan.clone(), round: round.clone(), stops };
        let views = membership.follow();
        answers.push(Box::pin(async move {
            match subtree.ask(time, views).await {
                Ok(up) => up,
                Err(lost) => subtree.blame(&lost),
            }
        }));
    }
    let mut up = Up::default();
    for position in own.clone() {
        let (rank, addr) = &plan.members[position];
        match &calls {
            Ok(calls) => match speak(system, *calls, (position, *rank, addr), (&round, time)) {
                Spoken::Done => {}
                Spoken::Failed(failure) => up.failed.push(failure),
                Spoken::Answers(answer) => answers.push(answer),
            },
            Err(why) => up.failed.push(RankFailure { rank: *rank, addr: addr.clone(), why: why.clone() }),
        }
    }
    while let Some(answer) = answers.next().await {
        up.parts.extend(answer.parts);
        up.failed.extend(answer.failed);
    }
    Ok(match (round.kind, calls) {
        (Kind::Reduce, Ok(calls)) => reduce(system, calls, &plan, own, up).await,
        (Kind::Cast | Kind::Gather | Kind::Reduce, _) => up,
    })
}

/// What to do with the message, by the table of the actor.
fn find_calls(system: &System, actor: &ActorAddr, round: &Round) -> Result<Calls, RankError> {
    let refused = |why: String| RankError::Refused(why);
    let entry = system
        .registry()
        .find(actor.actor, actor.incarnation)
        .map_err(|refusal| refused(refusal.to_string()))?;
    let calls = entry
        .mesh()
        .find(round.message)
        .ok_or_else(|| refused(crate::handle::Refusal::UnknownMessage.to_string()))?;
    if round.kind == Kind::Reduce && calls.fold.is_none() {
        return Err(refused(format!(
            "{} does not reduce the answers to this message: add it by accept_reduced instead of accept",
            entry.type_name
        )));
    }
    Ok(calls)
}

/// What came of speaking to a rank of this process.
enum Spoken {
    /// Its mailbox has the message, and that is all.
    Done,
    Failed(RankFailure),
    Answers(BoxFuture<'static, Up>),
}

fn speak(
    system: &System,
    calls: Calls,
    (position, rank, addr): (usize, u32, &ActorAddr),
    (round, time): (&Round, Time),
) -> Spoken {
    let addr = addr.clone();
    match round.kind {
        Kind::Cast => match (calls.tell)(system, &addr, &round.payload) {
            Ok(()) => Spoken::Done,
            Err(why) => Spoken::Failed(RankFailure { rank, addr, why }),
        },
        Kind::Gather | Kind::Reduce => {
            let answer = (calls.ask)(system, &addr, &round.payload, time.split().0);
            let position = u32::try_from(position).expect("a mesh has at most RANKS_MAX ranks");
            Spoken::Answers(Box::pin(async move {
                match answer.await {
                    Ok(bytes) => Up { parts: vec![Part::of(position, bytes)], failed: Vec::new() },
                    Err(why) => Up { parts: Vec::new(), failed: vec![RankFailure { rank, addr, why }] },
                }
            }))
        }
    }
}

/// Reduces what can be at this stop. Once a rank has failed there will be no result, so there is nothing to reduce.
async fn reduce(system: &System, calls: Calls, plan: &Plan, own: Range<usize>, up: Up) -> Up {
    let Up { parts, mut failed } = up;
    let (Some(fold), true) = (calls.fold, failed.is_empty()) else { return Up { parts: Vec::new(), failed } };
    let count = u32::try_from(plan.members.len()).expect("a mesh has at most RANKS_MAX ranks");
    let bytes: usize = parts.iter().map(|part| part.value.len()).sum();
    let folded = if bytes <= FOLD_INLINE_BYTES {
        fold(count, parts)
    } else {
        let folding = system.runtime().spawn_blocking(move || fold(count, parts));
        folding.await.unwrap_or(Err(RankError::Stopped))
    };
    match folded {
        Ok(parts) => Up { parts, failed },
        Err(why) => {
            let (rank, addr) = plan.members[own.start].clone();
            failed.push(RankFailure { rank, addr, why });
            Up { parts: Vec::new(), failed }
        }
    }
}

/// Some neighbouring stops, of which the first is asked to see to the others.
pub(super) struct Subtree {
    pub(super) system: System,
    pub(super) plan: Arc<Plan>,
    pub(super) round: Arc<Round>,
    pub(super) stops: Range<usize>,
}

/// Why a subtree gave nothing.
#[derive(Debug)]
pub(super) enum Lost {
    /// Its first stop took no part, and so nobody.
    Declined(Declined),
    /// Its first stop is gone or silent.
    First(RankError),
}

impl Subtree {
    /// Asks, and stops waiting when the first stop is not in the mesh any more.
    pub(super) async fn ask(&self, time: Time, views: Views) -> Result<Up, Lost> {
        let (rank, member) = &self.plan.members_of(self.stops.clone())[0];
        let addr = ActorAddr { actor: ActorId::MESH, incarnation: Incarnation::ANY, ..member.clone() };
        let handle: Handle<MeshActor> = self.system.handle(addr);
        let (limit, left_us) = time.split();
        let handle = match limit {
            Some(limit) => handle.with_deadline(limit),
            None => handle,
        };
        let stop = |stop: usize| u32::try_from(stop).expect("a mesh has at most RANKS_MAX ranks");
        let stops = (stop(self.stops.start), stop(self.stops.end));
        let down = Down { round: self.round.clone(), stops, left_us };
        tokio::select! {
            biased;
            answer = handle.ask(down) => match answer {
                Ok(Ok(up)) => Ok(up),
                Ok(Err(declined)) => Err(Lost::Declined(declined)),
                Err(error) => Err(Lost::First(error.into())),
            },
            epoch = left(views, self.round.epoch, *rank, member) => Err(Lost::First(RankError::Moved { epoch })),
        }
    }

    /// MS-1: who failed, and who was only behind.
    pub(super) fn blame(&self, lost: &Lost) -> Up {
        let first = match lost {
            Lost::Declined(Declined::Stale { epoch }) => RankError::Moved { epoch: *epoch },
            Lost::Declined(declined) => RankError::Refused(declined.to_string()),
            Lost::First(why) => why.clone(),
        };
        let members = self.plan.members_of(self.stops.clone());
        let own = self.plan.members_of(self.stops.start..self.stops.start + 1).len();
        let behind = RankError::Behind { rank: members[0].0 };
        let failure = |(i, (rank, addr)): (usize, &(u32, ActorAddr))| RankFailure {
            rank: *rank,
            addr: addr.clone(),
            why: if i < own { first.clone() } else { behind.clone() },
        };
        Up { parts: Vec::new(), failed: members.iter().enumerate().map(failure).collect() }
    }
}

/// Waits until a later epoch of the mesh does not have this incarnation of the rank; returns that epoch.
async fn left(mut views: Views, epoch: u64, rank: u32, member: &ActorAddr) -> u64 {
    let gone = |view: &Option<Arc<crate::group::GroupView>>| {
        view.as_ref().is_some_and(|view| {
            let seat = view.members.get(rank as usize);
            view.epoch > epoch && seat.and_then(|seat| seat.addr.as_ref()) != Some(member)
        })
    };
    let later = match views.wait_for(gone).await {
        Ok(view) => view.as_ref().map(|view| view.epoch),
        Err(_) => None,
    };
    match later {
        Some(later) => later,
        // Nobody tells of epochs any more; then the connection has to.
        None => std::future::pending().await,
    }
}

//! A mesh, or a slice of it, as a caller holds it: cast, gather and reduce.
//!
//! It follows the mesh from epoch to epoch. A round belongs to one epoch and is never repeated once anybody may have
//! seen its message.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix::Handler;
use tokio_util::task::AbortOnDropHandle;

use super::dims::{Dims, ShapeError, Slice};
use super::error::{MeshError, RankFailure, RoundFailure};
use super::host::Views;
use super::messages::{Declined, Kind, Round, Up};
use super::round::{Lost, Subtree, Time};
use super::table::Reduce;
use super::tree::{Fold, Part, Plan};
use crate::actor::{RemoteActor, WireMessage};
use crate::group::GroupView;
use crate::handle::Handle;
use crate::objects::scope;
use crate::system::System;
use crate::wire::{from_bytes, name_hash, to_bytes};

/// A k-nomial tree of 64 processes has 3 levels with this.
const FAN_OUT: u32 = 4;

/// A mesh of actors of type `A`, or a slice of one. Cheap to clone; usable from any thread.
pub struct Mesh<A> {
    shared: Arc<Shared>,
    slice: Slice,
    deadline: Option<Duration>,
    fan_out: u32,
    /// The plan of the slice in the view that it was used with last.
    plan: Arc<Mutex<Option<Planned>>>,
    actor: PhantomData<fn() -> A>,
}

/// A plan and the view that it is of. Not the epoch: a mesh that was removed and spawned anew counts from 1 again.
type Planned = (Arc<GroupView>, Arc<Plan>);

struct Shared {
    system: System,
    name: String,
    dims: Dims,
    views: Views,
    /// Asks the head for views, where nobody else does.
    _follower: Option<AbortOnDropHandle<()>>,
}

impl<A> Clone for Mesh<A> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), plan: self.plan.clone(), ..self.with_slice(self.slice.clone()) }
    }
}

impl<A> std::fmt::Debug for Mesh<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mesh({} {})", self.shared.name, self.shared.dims)
    }
}

impl<A> Mesh<A> {
    pub(super) fn new(
        system: System,
        (name, dims): (&str, Dims),
        views: Views,
        follower: Option<AbortOnDropHandle<()>>,
    ) -> Self {
        let slice = dims.all();
        let shared = Shared { system, name: name.to_owned(), dims, views, _follower: follower };
        Self {
            shared: Arc::new(shared),
            slice,
            deadline: None,
            fan_out: FAN_OUT,
            plan: Arc::default(),
            actor: PhantomData,
        }
    }

    /// Name of the mesh.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Shape of the whole mesh.
    pub fn dims(&self) -> &Dims {
        &self.shared.dims
    }

    /// The part of it that this handle speaks to.
    pub fn slice(&self) -> &Slice {
        &self.slice
    }

    fn with_slice(&self, slice: Slice) -> Self {
        Self {
            shared: self.shared.clone(),
            slice,
            deadline: self.deadline,
            fan_out: self.fan_out,
            plan: Arc::default(),
            actor: PhantomData,
        }
    }

    /// The part whose index along a dimension is in `range`.
    pub fn range(&self, dim: &str, range: Range<u32>) -> Result<Self, ShapeError> {
        Ok(self.with_slice(self.slice.range(dim, range)?))
    }

    /// The part at one index along a dimension.
    pub fn at(&self, dim: &str, index: u32) -> Result<Self, ShapeError> {
        Ok(self.with_slice(self.slice.at(dim, index)?))
    }

    /// Each `step`th index along a dimension.
    pub fn every(&self, dim: &str, step: u32) -> Result<Self, ShapeError> {
        Ok(self.with_slice(self.slice.every(dim, step)?))
    }

    /// One handle for each index along a dimension.
    pub fn each(&self, dim: &str) -> Result<Vec<Self>, ShapeError> {
        Ok(self.slice.each(dim)?.into_iter().map(|slice| self.with_slice(slice)).collect())
    }

    /// The same, but each round is good for `deadline` only: then the ranks that have not answered are named.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
    }

    /// The same with a tree in which each stop has up to `fan_out - 1` children per level; 2 at least. A large one is a
    /// flat loop at the first rank.
    pub fn with_fan_out(&self, fan_out: u32) -> Self {
        Self { fan_out: fan_out.max(2), ..self.clone() }
    }

    /// Who is in the mesh, as of the latest epoch that was heard of. `None` before it was complete for the first time.
    pub fn view(&self) -> Option<Arc<GroupView>> {
        self.shared.views.borrow().clone()
    }

    /// Waits for the first epoch after `epoch` (0 for any) and returns its view: a member was lost, or the mesh is complete
    /// again. `None` if nobody tells any more.
    pub async fn changed(&self, epoch: u64) -> Option<Arc<GroupView>> {
        let mut views = self.shared.views.clone();
        let later = views.wait_for(|view| view.as_ref().is_some_and(|view| view.epoch > epoch)).await;
        later.ok().and_then(|view| view.clone())
    }

    /// Waits until all ranks of the slice are ready.
    pub async fn ready(&self, limit: Duration) -> Result<(), MeshError> {
        let mut views = self.shared.views.clone();
        let ready =
            views.wait_for(|view| view.as_ref().is_some_and(|view| Plan::new(view, &self.slice).is_ok()));
        match tokio::time::timeout(limit, ready).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(match self.plan() {
                Err(error) => error,
                Ok(_) => MeshError::Deadline(self.shared.name.clone()),
            }),
        }
    }

    /// The slice's ranks in the present epoch.
    fn plan(&self) -> Result<Planned, MeshError> {
        let view = self.view();
        let not_ready = |epoch, ranks| MeshError::NotReady { mesh: self.shared.name.clone(), epoch, ranks };
        let Some(view) = view else { return Err(not_ready(0, self.slice.ranks().collect())) };
        let mut cached = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, plan)) = cached.as_ref()
            && Arc::ptr_eq(of, &view)
        {
            return Ok((view, plan.clone()));
        }
        let plan = Arc::new(Plan::new(&view, &self.slice).map_err(|absent| not_ready(view.epoch, absent))?);
        *cached = Some((view.clone(), plan.clone()));
        Ok((view, plan))
    }
}

impl<A: RemoteActor> Mesh<A> {
    /// A handle to the present incarnation of the rank at a position of the slice.
    pub fn actor(&self, position: u32) -> Result<Handle<A>, MeshError> {
        let (_, plan) = self.plan()?;
        let member = plan.members.get(position as usize);
        let (_, addr) = member.ok_or_else(|| {
            let size = self.slice.len();
            MeshError::Unknown(format!("there is no position {position} in a slice of {size} ranks"))
        })?;
        Ok(self.shared.system.handle(addr.clone()))
    }

    /// Sends a message to all ranks. When it returns, each mailbox has it; else the error names those that have not, or may
    /// not have.
    pub async fn cast<M>(&self, message: M) -> Result<(), MeshError>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let (up, failure) = self.round(Kind::Cast, &message).await?;
        whole(up, failure).map(|_| ())
    }

    /// Asks all ranks; their answers, in rank order. If one fails, the error names it.
    pub async fn gather<M>(&self, message: M) -> Result<Vec<M::Result>, MeshError>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let (up, failure) = self.round(Kind::Gather, &message).await?;
        let parts = whole(up, failure)?;
        let mut answers = Vec::with_capacity(parts.len());
        for (position, part) in sorted(parts, self.slice.len())? {
            answers.push(self.decode::<M>(position, &part)?);
        }
        Ok(answers)
    }

    /// Asks all ranks; what became of each, in rank order.
    pub async fn gather_each<M>(&self, message: M) -> Result<Vec<Result<M::Result, RankFailure>>, MeshError>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let (up, failure) = self.round(Kind::Gather, &message).await?;
        let ranks: Vec<u32> = self.slice.ranks().collect();
        let mut answers: Vec<Option<Result<M::Result, RankFailure>>> = ranks.iter().map(|_| None).collect();
        for part in up.parts {
            let position = part.position().ok_or_else(|| broken("a reduced answer"))?;
            let answer = answers.get_mut(position as usize).ok_or_else(|| broken("a position too many"))?;
            *answer = Some(Ok(self.decode::<M>(position, &part.value)?));
        }
        for failed in failure.failed {
            let position = ranks.binary_search(&failed.rank).map_err(|_| broken("a rank too many"))?;
            answers[position] = Some(Err(failed));
        }
        answers.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| broken("a rank too few"))
    }

    /// Asks all ranks and reduces their answers to one on the way: in rank order, and in an order of operations that
    /// depends on the number of ranks alone. If a rank fails, the error names it.
    pub async fn reduce<M>(&self, message: M) -> Result<M::Result, MeshError>
    where
        A: Handler<M>,
        M: Reduce,
    {
        let (up, failure) = self.round(Kind::Reduce, &message).await?;
        let mut decoded = Vec::new();
        for part in whole(up, failure)? {
            decoded.push(part.try_map(|bytes: Vec<u8>| {
                let decoded = scope::received(self.shared.system.objects(), || from_bytes(&bytes));
                decoded.map_err(|error| MeshError::Codec(error.to_string()))
            })?);
        }
        // The first stop has done it all already.
        Fold::new(self.slice.len(), decoded, M::reduce).into_whole().ok_or_else(|| broken("a part too few"))
    }

    fn decode<M: WireMessage>(&self, position: u32, bytes: &[u8]) -> Result<M::Result, MeshError> {
        let decoded = scope::received(self.shared.system.objects(), || from_bytes(bytes));
        decoded.map_err(|error| MeshError::Codec(format!("the answer at position {position}: {error}")))
    }

    /// One round, in an epoch in which all ranks of the slice are ready.
    async fn round<M: WireMessage>(&self, kind: Kind, message: &M) -> Result<(Up, RoundFailure), MeshError> {
        let payload: Arc<[u8]> =
            to_bytes(message).map_err(|error| MeshError::Codec(error.to_string()))?.into();
        let time = Time::of(self.deadline);
        loop {
            let (view, plan) = self.plan()?;
            let epoch = view.epoch;
            let (mesh, ranks) = (self.shared.name.clone(), self.slice.len());
            let round = Arc::new(Round {
                mesh: mesh.clone(),
                epoch,
                slice: self.slice.clone(),
                fan_out: self.fan_out,
                kind,
                message: const { name_hash(M::NAME) },
                payload: payload.clone(),
            });
            let stops = 0..plan.runs.len();
            let all = Subtree { system: self.shared.system.clone(), plan, round, stops };
            let mut up = match all.ask(time, self.shared.views.clone()).await {
                Ok(up) => up,
                // Nobody has seen the message yet, so it may go to the ranks of the epoch that is.
                Err(Lost::Declined(Declined::Stale { epoch })) => {
                    self.heard_of(epoch, time).await?;
                    continue;
                }
                Err(lost) => all.blame(&lost),
            };
            up.failed.sort_by_key(|failure| failure.rank);
            let failed = std::mem::take(&mut up.failed);
            return Ok((up, RoundFailure { mesh, epoch, ranks, failed }));
        }
    }

    /// Waits until this handle has heard of an epoch that ranks are in already.
    async fn heard_of(&self, epoch: u64, time: Time) -> Result<(), MeshError> {
        let late = || MeshError::Deadline(self.shared.name.clone());
        let heard = self.changed(epoch.saturating_sub(1));
        let heard = match time.until {
            Some(until) => tokio::time::timeout_at(Instant::into(until), heard).await.map_err(|_| late())?,
            None => heard.await,
        };
        heard.map(|_| ()).ok_or_else(late)
    }
}

/// The parts, if nobody failed.
fn whole(up: Up, failure: RoundFailure) -> Result<Vec<Part<Vec<u8>>>, MeshError> {
    match failure.failed.is_empty() {
        true => Ok(up.parts),
        false => Err(MeshError::Ranks(failure)),
    }
}

/// Answers by position; an error if one is missing.
fn sorted(parts: Vec<Part<Vec<u8>>>, count: u32) -> Result<Vec<(u32, Vec<u8>)>, MeshError> {
    let mut answers = Vec::with_capacity(parts.len());
    for part in parts {
        answers.push((part.position().ok_or_else(|| broken("a reduced answer"))?, part.value));
    }
    answers.sort_by_key(|(position, _)| *position);
    match answers.iter().map(|(position, _)| *position).eq(0..count) {
        true => Ok(answers),
        false => Err(broken("a rank too few or too many")),
    }
}

/// A peer that is not of this version, or broken.
fn broken(what: &str) -> MeshError {
    MeshError::Codec(format!("the answers of the tree are not whole: {what}"))
}

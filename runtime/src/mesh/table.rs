//! How an encoded message reaches an actor of this process in a round, and how encoded answers are reduced.
//!
//! It only knows types: the tree and the epochs are `round`'s.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use actix::Handler;
use futures_util::future::BoxFuture;

use super::error::RankError;
use super::tree::{Fold, Part};
use crate::actor::{Accepts, RemoteActor, WireMessage};
use crate::handle::{ActorAddr, Handle};
use crate::objects::scope;
use crate::panics;
use crate::system::System;
use crate::wire::{from_bytes, name_hash, to_bytes};

/// A message whose answers can be reduced to one of their kind.
pub trait Reduce: WireMessage {
    /// Joins the answers of two neighbouring ranges of ranks; `earlier` is of the lower ranks. It must be associative, and
    /// need not be commutative. It runs in the processes of the tree, so it should be quick and must not block.
    fn reduce(earlier: Self::Result, later: Self::Result) -> Self::Result;
}

type TellFn = fn(&System, &ActorAddr, &[u8]) -> Result<(), RankError>;
type AskFn =
    fn(&System, &ActorAddr, &[u8], Option<Duration>) -> BoxFuture<'static, Result<Vec<u8>, RankError>>;
type FoldFn = fn(u32, Vec<Part<Vec<u8>>>) -> Result<Vec<Part<Vec<u8>>>, RankError>;

/// What a round does with one message of an actor.
#[derive(Clone, Copy)]
pub(super) struct Calls {
    pub(super) tell: TellFn,
    pub(super) ask: AskFn,
    /// There if the answers can be reduced.
    pub(super) fold: Option<FoldFn>,
}

/// Message id to calls.
#[derive(Default)]
pub(crate) struct MeshTable(HashMap<u64, Calls>);

impl MeshTable {
    pub(crate) fn insert<A, M>(&mut self)
    where
        A: RemoteActor + Handler<M>,
        M: WireMessage,
    {
        let calls = Calls { tell: tell::<A, M>, ask: ask::<A, M>, fold: None };
        self.0.insert(const { name_hash(M::NAME) }, calls);
    }

    pub(super) fn find(&self, message: u64) -> Option<Calls> {
        self.0.get(&message).copied()
    }
}

impl<A: RemoteActor> Accepts<A> {
    /// Adds a message type, as `accept` does, whose answers `Mesh::reduce` may reduce.
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept_reduced<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: Reduce,
    {
        self.accept::<M>();
        if let Some(calls) = self.mesh.0.get_mut(&const { name_hash(M::NAME) }) {
            calls.fold = Some(fold::<M>);
        }
        self
    }
}

fn decode<M: WireMessage>(system: &System, payload: &[u8]) -> Result<M, RankError> {
    let message = scope::received(system.objects(), || from_bytes::<M>(payload));
    message.map_err(|error| RankError::Codec(error.to_string()))
}

fn tell<A, M>(system: &System, addr: &ActorAddr, payload: &[u8]) -> Result<(), RankError>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage,
{
    let handle: Handle<A> = system.handle(addr.clone());
    handle
        .tell(decode::<M>(system, payload)?)
        .map_err(|refused| RankError::Refused(refused.reason.to_string()))
}

fn ask<A, M>(
    system: &System,
    addr: &ActorAddr,
    payload: &[u8],
    limit: Option<Duration>,
) -> BoxFuture<'static, Result<Vec<u8>, RankError>>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage,
{
    let handle: Handle<A> = system.handle(addr.clone());
    let message = decode::<M>(system, payload);
    Box::pin(async move {
        let handle = match limit {
            Some(limit) => handle.with_deadline(limit),
            None => handle,
        };
        let answer = handle.ask(message?).await?;
        to_bytes(&answer).map_err(|error| RankError::Codec(error.to_string()))
    })
}

fn fold<M: Reduce>(count: u32, parts: Vec<Part<Vec<u8>>>) -> Result<Vec<Part<Vec<u8>>>, RankError> {
    let codec = |error: crate::wire::CodecError| RankError::Codec(error.to_string());
    let decoded: Result<Vec<Part<M::Result>>, _> =
        parts.into_iter().map(|part| part.try_map(|bytes| from_bytes(&bytes).map_err(codec))).collect();
    let decoded = decoded?;
    // User code: its panic is an answer, not the end of the process.
    let folded = catch_unwind(AssertUnwindSafe(|| Fold::new(count, decoded, M::reduce).into_parts()));
    let folded = folded
        .map_err(|panic| RankError::Panicked(format!("in Reduce::reduce: {}", panics::message(&*panic))))?;
    folded.into_iter().map(|part| part.try_map(|value| to_bytes(&value).map_err(codec))).collect()
}

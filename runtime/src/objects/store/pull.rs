//! Brings an object of another node here, in pieces that are asked for ahead of each other.
//!
//! Pieces go between the agents of two nodes, over a connection of their own: reports to the head and messages of actors
//! take other ones, and what waits for one peer is bounded (`AHEAD` pieces of each pull, `PULLS_MAX` pulls).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};

use super::super::messages::ReadObject;
use super::super::{CHUNK_BYTES, ObjectAddr, ObjectError, map};
use super::Store;
use super::disk::write_at;
use super::service::StoreActor;
use crate::backoff::Backoff;
use crate::handle::{ActorId, AskError, Handle};

/// Pieces that are under way at once.
const AHEAD: usize = 4;
/// Limit of one piece.
const PIECE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a node may be out of reach: its agent may be started anew.
const PATIENCE: Duration = Duration::from_secs(5);

/// The object in sealed memory of this node.
pub(super) async fn pull(store: &Arc<Store>, addr: ObjectAddr) -> Result<OwnedFd, ObjectError> {
    let _place = store.pulls.acquire().await.map_err(ObjectError::io)?;
    let (started, mut backoff) = (Instant::now(), Backoff::reconnect());
    loop {
        match attempt(store, &addr).await {
            Err(ObjectError::Unreachable { .. } | ObjectError::StoreAway(_))
                if started.elapsed() < PATIENCE =>
            {
                backoff.pause().await;
            }
            outcome => return outcome,
        }
    }
}

async fn attempt(store: &Arc<Store>, addr: &ObjectAddr) -> Result<OwnedFd, ObjectError> {
    let at = addr.store.clone().unwrap_or_else(|| addr.owner.clone());
    let from: Handle<StoreActor> = store.system.handle_at(&at, ActorId::OBJECTS).with_deadline(PIECE_TIMEOUT);
    let (object, bytes) = (addr.id, addr.bytes);
    let memory = tokio::task::spawn_blocking(move || map::memory_file(bytes)).await;
    let memory = Arc::new(memory.map_err(ObjectError::io)?.map_err(ObjectError::io)?);
    let offsets = (0..bytes.div_ceil(u64::from(CHUNK_BYTES))).map(|n| n * u64::from(CHUNK_BYTES));
    let pieces = stream::iter(offsets).map(|offset| {
        let (from, at) = (from.clone(), at.clone());
        async move {
            let max = CHUNK_BYTES.min(u32::try_from(bytes - offset).unwrap_or(CHUNK_BYTES));
            let unreachable =
                |error: AskError<ReadObject>| ObjectError::Unreachable { object, at, why: error.to_string() };
            let piece = from.ask(ReadObject { object, offset, max }).await.map_err(unreachable)??;
            match piece.len() == max as usize {
                true => Ok((offset, piece)),
                false => Err(ObjectError::Io(format!("object {object} has not the size that its ref says"))),
            }
        }
    });
    let mut pieces = pieces.buffer_unordered(AHEAD);
    while let Some((offset, piece)) = pieces.try_next().await? {
        write_at(memory.as_fd(), offset, &piece).map_err(ObjectError::io)?;
    }
    map::seal(memory.as_fd()).map_err(ObjectError::io)?;
    Ok(Arc::into_inner(memory).expect("nobody else has it"))
}

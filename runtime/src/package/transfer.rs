//! Moving a package: a client uploads it to the head, a node fetches it from other nodes or the head.
//!
//! Pieces are asked for ahead of each other, so that a transfer is as fast as the network. What arrives is believed only
//! when its SHA-256 is right.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::service::PackageActor;
use super::{
    CHUNK_BYTES, Digest, PackageChunk, PackageId, PackageStore, ReadPackage, RegisterMode, RegistryError,
    StoreError, WritePackage,
};
use crate::cluster::{Cluster, PackageError};
use crate::handle::{ActorId, Handle};
use crate::system::System;

/// Pieces that are under way at once.
const AHEAD: usize = 4;
/// Limit of one piece.
const PIECE_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a package could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The file that is uploaded, or the one that is written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The directory of packages.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The other side.
    #[error("package {sha256} from or to {at}: {why}", sha256 = .sha256.short())]
    Peer {
        /// Which.
        sha256: Digest,
        /// Where the other side listens.
        at: String,
        /// What went wrong.
        why: String,
    },
    /// Nobody has it.
    #[error("package {sha256} cannot be fetched: {why}", sha256 = .sha256.short())]
    Nowhere {
        /// Which.
        sha256: Digest,
        /// What each source said.
        why: String,
    },
}

fn actor_at(system: &System, endpoint: &str) -> Handle<PackageActor> {
    system.handle_at(endpoint, ActorId::PACKAGES).with_deadline(PIECE_TIMEOUT)
}

async fn piece(
    from: Handle<PackageActor>,
    sha256: Digest,
    offset: u64,
) -> Result<(u64, PackageChunk), TransferError> {
    let failed = |why: String| TransferError::Peer { sha256, at: from.addr().endpoint.clone(), why };
    let wanted = ReadPackage { sha256, offset, max: CHUNK_BYTES };
    let chunk = from.ask(wanted).await.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
    Ok((offset, chunk))
}

/// Fetches a package into a store from the first source that has it whole; nothing if it is there already.
pub(crate) async fn fetch(
    system: &System,
    store: &PackageStore,
    sha256: Digest,
    sources: &[String],
) -> Result<(), TransferError> {
    if store.size(sha256).is_some() {
        return Ok(());
    }
    let mut said = Vec::new();
    for source in sources {
        match fetch_from(system, store, sha256, source).await {
            Ok(()) => return Ok(()),
            Err(error) => said.push(error.to_string()),
        }
    }
    let why = if said.is_empty() { "nobody is known to have it".to_owned() } else { said.join("; ") };
    Err(TransferError::Nowhere { sha256, why })
}

async fn fetch_from(
    system: &System,
    store: &PackageStore,
    sha256: Digest,
    source: &str,
) -> Result<(), TransferError> {
    let from = actor_at(system, source);
    let (_, first) = piece(from.clone(), sha256, 0).await?;
    let mut receiving = store.receive(sha256, first.total)?;
    let mut whole = receiving.write(0, &first.bytes)?;
    let step = u64::from(CHUNK_BYTES);
    let offsets = stream::iter((1..first.total.div_ceil(step)).map(|n| n * step));
    let pieces = offsets.map(|offset| piece(from.clone(), sha256, offset));
    let mut pieces = std::pin::pin!(pieces.buffered(AHEAD));
    while let Some((offset, chunk)) = pieces.try_next().await? {
        whole = receiving.write(offset, &chunk.bytes)?;
    }
    if !whole {
        let why = "it ended before its size".to_owned();
        return Err(TransferError::Peer { sha256, at: source.to_owned(), why });
    }
    Ok(store.keep(receiving)?)
}

/// Uploads a file to the head.
async fn upload(cluster: &Cluster, path: &Path, sha256: Digest) -> Result<(), TransferError> {
    let failed = |source| TransferError::File { path: path.display().to_string(), source };
    let file = File::open(path).map_err(failed)?;
    let total = file.metadata().map_err(failed)?.len();
    let head = cluster.head();
    let to = actor_at(cluster.system(), &head);
    let (number, step) = (rand::random::<u64>(), u64::from(CHUNK_BYTES));
    let write = |offset: u64| {
        let mut bytes = vec![0; usize::try_from((total - offset).min(step)).unwrap_or_default()];
        let read = file.read_exact_at(&mut bytes, offset);
        let (to, head) = (to.clone(), head.clone());
        async move {
            read.map_err(failed)?;
            let piece = WritePackage { upload: number, sha256, total, offset, bytes };
            let failed = |why: String| TransferError::Peer { sha256, at: head, why };
            match to.ask(piece).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(why)) => Err(failed(why)),
                Err(error) => Err(failed(error.to_string())),
            }
        }
    };
    // Messages to one actor arrive in the order in which they are sent: `buffered` starts them in order.
    let offsets = (0..total.div_ceil(step).max(1)).map(|n| n * step);
    stream::iter(offsets).map(write).buffered(AHEAD).try_collect().await
}

/// Why a package was not pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// It could not be uploaded.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The registry says no.
    #[error(transparent)]
    Registry(#[from] PackageError),
}

/// Registers a package, after an upload if the head has it not: what is refused is not uploaded.
pub async fn push(
    cluster: &Cluster,
    path: &Path,
    id: &PackageId,
    mode: RegisterMode,
) -> Result<(), PushError> {
    match cluster.register_package(id.clone(), mode).await {
        Err(PackageError::Registry(RegistryError::NotThere(_))) => {
            upload(cluster, path, id.sha256).await?;
            Ok(cluster.register_package(id.clone(), mode).await?)
        }
        outcome => Ok(outcome?),
    }
}

/// Fetches a package from the head into a directory; the file's path, verified.
pub async fn download(cluster: &Cluster, sha256: Digest, into: &Path) -> Result<PathBuf, TransferError> {
    let failed = |source| TransferError::File { path: into.display().to_string(), source };
    let store = PackageStore::open(into, u64::MAX).map_err(failed)?;
    fetch(cluster.system(), &store, sha256, &[cluster.head()]).await?;
    Ok(store.verified(sha256)?)
}

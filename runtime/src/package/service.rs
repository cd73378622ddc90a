//! The actor that serves a directory of packages: pieces out, and on the head uploads in.
//!
//! It has a thread of its own, since it blocks on the disk; the head and the node agent never do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, AsyncContext, Context, Handler};

use super::store::Receiving;
use super::{CHUNK_BYTES, PackageChunk, PackageStore, ReadPackage, StoreError, WritePackage};
use crate::actor::{Accepts, CreateError, RemoteActor};
use crate::handle::ActorId;
use crate::system::{SpawnOptions, System};

/// Uploads at once.
const UPLOADS_MAX: usize = 8;
/// An upload that brings nothing for so long is dropped.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Who may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// Pieces go out only.
    Out,
    /// Uploads come in, too.
    InAndOut,
}

/// Serves packages.
pub(crate) struct PackageActor {
    store: Arc<PackageStore>,
    door: Door,
    uploads: Vec<Upload>,
}

struct Upload {
    number: u64,
    receiving: Receiving,
    heard: Instant,
}

impl PackageActor {
    /// Starts one at its well-known id.
    pub(crate) async fn start(
        system: &System,
        store: Arc<PackageStore>,
        door: Door,
    ) -> Result<(), CreateError> {
        let options = SpawnOptions::well_known(ActorId::PACKAGES);
        let create = move || async move { Ok(Self { store, door, uploads: Vec::new() }) };
        system.spawn_async(options, create).await.map(drop)
    }

    fn write(&mut self, piece: &WritePackage) -> Result<(), StoreError> {
        if self.store.verified(piece.sha256).is_ok() {
            return Ok(());
        }
        let known = self.uploads.iter().position(|upload| upload.number == piece.upload);
        let at = match known {
            Some(at) => at,
            None if self.uploads.len() == UPLOADS_MAX => return Err(StoreError::Busy(UPLOADS_MAX)),
            None => {
                let receiving = self.store.receive(piece.sha256, piece.total)?;
                self.uploads.push(Upload { number: piece.upload, receiving, heard: Instant::now() });
                self.uploads.len() - 1
            }
        };
        let upload = &mut self.uploads[at];
        upload.heard = Instant::now();
        match upload.receiving.write(piece.offset, &piece.bytes) {
            Ok(false) => Ok(()),
            Ok(true) => self.store.keep(self.uploads.swap_remove(at).receiving),
            Err(error) => {
                self.uploads.swap_remove(at);
                Err(error)
            }
        }
    }
}

impl Actor for PackageActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(IDLE_MAX / 4, |actor, _| {
            actor.uploads.retain(|upload| upload.heard.elapsed() < IDLE_MAX);
        });
    }
}

impl RemoteActor for PackageActor {
    const TYPE: &'static str = "packages";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<ReadPackage>().accept::<WritePackage>();
    }
}

impl Handler<ReadPackage> for PackageActor {
    type Result = Result<PackageChunk, String>;

    fn handle(&mut self, wanted: ReadPackage, _: &mut Context<Self>) -> Self::Result {
        let max = wanted.max.min(CHUNK_BYTES);
        self.store.read(wanted.sha256, wanted.offset, max).map_err(|error| error.to_string())
    }
}

impl Handler<WritePackage> for PackageActor {
    type Result = Result<(), String>;

    fn handle(&mut self, piece: WritePackage, _: &mut Context<Self>) -> Self::Result {
        match self.door {
            Door::Out => Err("packages are uploaded to the head".to_owned()),
            Door::InAndOut => self.write(&piece).map_err(|error| error.to_string()),
        }
    }
}

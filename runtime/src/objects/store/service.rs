//! The store as an actor: pieces for other nodes, the fate of processes, listings.
//!
//! It has a thread of its own: it reads memory and disk, and the node agent waits for neither.

use std::sync::Arc;

use actix::{Actor, Context, Handler, MessageResult};

use super::super::CHUNK_BYTES;
use super::super::ObjectError;
use super::super::messages::{FateOf, FindStore, ListObjects, ReadObject};
use super::Store;
use crate::actor::{Accepts, CreateError, RemoteActor};
use crate::handle::ActorId;
use crate::system::SpawnOptions;

/// The store as an actor.
pub(crate) struct StoreActor {
    store: Arc<Store>,
}

/// Starts it at its well-known id.
pub(super) async fn start(store: &Arc<Store>) -> Result<(), CreateError> {
    let (system, store) = (store.system.clone(), store.clone());
    let create = move || async move { Ok(StoreActor { store }) };
    system.spawn_async(SpawnOptions::well_known(ActorId::OBJECTS), create).await.map(drop)
}

impl Actor for StoreActor {
    type Context = Context<Self>;
}

impl RemoteActor for StoreActor {
    const TYPE: &'static str = "objects";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<ReadObject>().accept::<FateOf>().accept::<ListObjects>().accept::<FindStore>();
    }
}

impl Handler<ReadObject> for StoreActor {
    type Result = Result<Vec<u8>, ObjectError>;

    fn handle(&mut self, wanted: ReadObject, _: &mut Context<Self>) -> Self::Result {
        self.store.piece(wanted.object, wanted.offset, wanted.max.min(CHUNK_BYTES) as usize)
    }
}

impl Handler<FateOf> for StoreActor {
    type Result = MessageResult<FateOf>;

    fn handle(&mut self, asked: FateOf, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.store.with(|core| core.fate(asked.process)))
    }
}

impl Handler<ListObjects> for StoreActor {
    type Result = MessageResult<ListObjects>;

    fn handle(&mut self, _: ListObjects, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.store.status())
    }
}

impl Handler<FindStore> for StoreActor {
    type Result = String;

    fn handle(&mut self, _: FindStore, _: &mut Context<Self>) -> String {
        self.store.config.socket.display().to_string()
    }
}

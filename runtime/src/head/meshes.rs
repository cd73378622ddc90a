//! What clients ask the head about meshes.

use std::time::Duration;

use actix::{AsyncContext, Context, Handler, MessageResult, ResponseFuture};

use super::HeadActor;
use crate::mesh::{MeshNow, RemoveMesh, WatchMesh};

/// The mesh at this moment.
#[derive(actix::Message)]
#[rtype(result = "Result<MeshNow, String>")]
struct Look {
    mesh: String,
}

impl Handler<Look> for HeadActor {
    type Result = MessageResult<Look>;

    fn handle(&mut self, look: Look, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.core.mesh(&look.mesh))
    }
}

impl Handler<WatchMesh> for HeadActor {
    type Result = ResponseFuture<Result<MeshNow, String>>;

    fn handle(&mut self, watch: WatchMesh, ctx: &mut Context<Self>) -> Self::Result {
        let WatchMesh { mesh, epoch, wait_ms } = watch;
        let now = self.core.mesh(&mesh);
        let is_news = move |now: &Result<MeshNow, String>| match now {
            Ok(now) => Some(now.view.epoch) != epoch,
            Err(_) => true,
        };
        if is_news(&now) {
            return Box::pin(async { now });
        }
        let (mut version, head) = (self.version.subscribe(), ctx.address());
        Box::pin(async move {
            let news = async {
                while version.changed().await.is_ok() {
                    match head.send(Look { mesh: mesh.clone() }).await {
                        Ok(now) if !is_news(&now) => {}
                        Ok(now) => return Some(now),
                        Err(_) => break,
                    }
                }
                None
            };
            let news = tokio::time::timeout(Duration::from_millis(wait_ms), news).await;
            news.ok().flatten().unwrap_or(now)
        })
    }
}

impl Handler<RemoveMesh> for HeadActor {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, remove: RemoveMesh, ctx: &mut Context<Self>) -> Self::Result {
        match self.core.remove_mesh(self.now(), &remove.mesh) {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(why) => return Box::pin(async { Err(why) }),
        }
        self.durably(())
    }
}

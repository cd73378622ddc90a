//! Answers whether an actor may still be started: at once, or when that changes. The core decides it; who asks waits on
//! what is written down, so nothing polls and nobody is searched for.

use std::time::Duration;

use actix::{AsyncContext, Context, Handler, ResponseFuture};
use tokio::sync::broadcast::{self, error::RecvError};

use super::actor::HeadActor;
use super::core::{Key, LifeRecord, Record, Write};
use super::messages::{Find, Found, IsOver};

/// Names that wait for a question that is slow; one that misses some looks anew.
const NEWS_MAX: usize = 1024;

/// Names of actors that were forgotten, are dead for good, or have another spec.
#[derive(Debug)]
pub(super) struct Lives(broadcast::Sender<String>);

impl Default for Lives {
    fn default() -> Self {
        Self(broadcast::Sender::new(NEWS_MAX))
    }
}

impl Lives {
    fn written(&self, write: &Write) {
        let name = match write {
            Write::Put(record) => match &**record {
                Record::Spec(spec) => &spec.name,
                Record::Actor(actor) if matches!(actor.life, LifeRecord::Dead(_)) => &actor.name,
                _ => return,
            },
            Write::Delete(Key::Spec(name)) => name,
            Write::Delete(_) => return,
        };
        // Nobody may be asking.
        let _ = self.0.send(name.clone());
    }
}

/// Looks anew.
#[derive(actix::Message)]
#[rtype(result = "bool")]
struct Look(IsOver);

impl HeadActor {
    /// Writes something down, and lets those know who wait for it.
    pub(super) fn write(&mut self, write: &Write) {
        self.keeper.write(write);
        self.lives.written(write);
    }
}

impl Handler<Look> for HeadActor {
    type Result = bool;

    fn handle(&mut self, Look(asked): Look, _: &mut Context<Self>) -> bool {
        self.core.is_over(&asked.actor, asked.args)
    }
}

impl Handler<IsOver> for HeadActor {
    type Result = ResponseFuture<bool>;

    fn handle(&mut self, asked: IsOver, ctx: &mut Context<Self>) -> Self::Result {
        let (mut news, head) = (self.lives.0.subscribe(), ctx.address());
        let over = self.core.is_over(&asked.actor, asked.args);
        Box::pin(async move {
            let changed = async {
                loop {
                    match news.recv().await {
                        Ok(name) if name != asked.actor => {}
                        Ok(_) | Err(RecvError::Lagged(_)) => {
                            if head.send(Look(asked.clone())).await.unwrap_or(false) {
                                return true;
                            }
                        }
                        Err(RecvError::Closed) => return false,
                    }
                }
            };
            let wait = Duration::from_millis(asked.wait_ms);
            over || tokio::time::timeout(wait, changed).await.unwrap_or(false)
        })
    }
}

impl Handler<Find> for HeadActor {
    type Result = Option<Found>;

    fn handle(&mut self, find: Find, _: &mut Context<Self>) -> Self::Result {
        self.core.find(&find.actor)
    }
}

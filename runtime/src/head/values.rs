//! What clients ask of the values that the head keeps. What is decided stands in `core::values`.

use actix::{Context, Handler, ResponseFuture};

use super::actor::HeadActor;
use super::messages::{GetValue, Kept, PutError, PutValue};

impl Handler<PutValue> for HeadActor {
    type Result = ResponseFuture<Result<u64, PutError>>;

    fn handle(&mut self, put: PutValue, ctx: &mut Context<Self>) -> Self::Result {
        let revision = match self.core.put_value(&put.key, put.expect, put.value) {
            Ok((revision, commands)) => {
                self.carry_out(commands, ctx);
                revision
            }
            Err(refused) => return Box::pin(async move { Err(refused) }),
        };
        let durable = self.durably(revision);
        Box::pin(async move { durable.await.map_err(PutError::NotDurable) })
    }
}

impl Handler<GetValue> for HeadActor {
    type Result = Option<Kept>;

    fn handle(&mut self, get: GetValue, _: &mut Context<Self>) -> Self::Result {
        self.core.value(&get.key).cloned()
    }
}

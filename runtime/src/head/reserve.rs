//! What the head's actor does about placement groups and drained nodes: it carries the core's commands to the nodes and
//! to the store, and clients' requests to the core. It decides nothing.

use std::time::Duration;

use actix::{AsyncContext, Context, Handler, MessageResult, ResponseFuture};

use super::actor::{HeadActor, ORDER_PAUSE};
use super::core::Event;
use super::messages::{
    ApplyError, DrainNode, MakePlacementGroup, PrepareBundles, RemovePlacementGroup, UndrainNode,
    WatchPlacementGroup,
};
use super::tenure::Superseded;
use crate::cluster::status::PlacementGroupStatus;

/// The same of `PrepareBundles`.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct PrepareAgain {
    node: String,
    order: PrepareBundles,
}

/// Something happened that the core waits for.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct Learnt(Event);

/// Asks for the status of one placement group.
#[derive(actix::Message)]
#[rtype(result = "Option<PlacementGroupStatus>")]
struct GroupSnapshot(String);

impl HeadActor {
    /// Says so when everything that was queued for the store is durable.
    pub(super) fn await_durable(&self, group: String, epoch: u64, ctx: &mut Context<Self>) {
        let (durable, head) = (self.keeper.drained(), ctx.address());
        actix::spawn(async move {
            if durable.await {
                head.do_send(Learnt(Event::BundlesDurable { group, epoch }));
            }
        });
    }

    /// Asks a node to confirm. Asked again while its fate is unknown and the answer is still wanted.
    pub(super) fn prepare_bundles(&self, node: String, order: PrepareBundles, ctx: &mut Context<Self>) {
        let Some(link) = self.nodes.get(&node) else { return };
        let (handle, head, authority) = (link.handle.clone(), ctx.address(), self.authority.clone());
        actix::spawn(async move {
            match handle.ask(order.clone()).await {
                Ok(Ok(outcome)) => {
                    let PrepareBundles { group, epoch, .. } = order;
                    let refused = outcome.err();
                    head.do_send(Learnt(Event::BundlesPrepared { group, epoch, node, refused }));
                }
                Ok(Err(Superseded { term })) => {
                    authority.heard(term);
                }
                Err(error) => {
                    tracing::debug!(node, group = order.group, %error, "cannot ask for bundles");
                    tokio::time::sleep(ORDER_PAUSE).await;
                    head.do_send(PrepareAgain { node, order });
                }
            }
        });
    }
}

impl Handler<PrepareAgain> for HeadActor {
    type Result = ();

    fn handle(&mut self, PrepareAgain { node, order }: PrepareAgain, ctx: &mut Context<Self>) {
        if self.core.awaits_bundles(&order.group, order.epoch, &node) && self.authority.may_act() {
            self.prepare_bundles(node, order, ctx);
        }
    }
}

impl Handler<Learnt> for HeadActor {
    type Result = ();

    fn handle(&mut self, Learnt(event): Learnt, ctx: &mut Context<Self>) {
        self.feed(event, ctx);
    }
}

impl Handler<GroupSnapshot> for HeadActor {
    type Result = MessageResult<GroupSnapshot>;

    fn handle(&mut self, GroupSnapshot(name): GroupSnapshot, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.core.placement_group(&name))
    }
}

impl Handler<MakePlacementGroup> for HeadActor {
    type Result = ResponseFuture<Result<(), ApplyError>>;

    fn handle(&mut self, make: MakePlacementGroup, ctx: &mut Context<Self>) -> Self::Result {
        if !self.authority.may_act() {
            return Box::pin(async { Err(ApplyError::NotDurable("this head leads no more".to_owned())) });
        }
        match self.core.apply_placement_group(self.now(), make.spec) {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(invalid) => return Box::pin(async { Err(ApplyError::Spec(invalid)) }),
        }
        let durable = self.durably(());
        Box::pin(async move { durable.await.map_err(ApplyError::NotDurable) })
    }
}

impl Handler<RemovePlacementGroup> for HeadActor {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, remove: RemovePlacementGroup, ctx: &mut Context<Self>) -> Self::Result {
        match self.core.remove_placement_group(self.now(), &remove.name) {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(error) => return Box::pin(async move { Err(error.to_string()) }),
        }
        self.durably(())
    }
}

impl Handler<DrainNode> for HeadActor {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, drain: DrainNode, ctx: &mut Context<Self>) -> Self::Result {
        let grace = Duration::from_millis(drain.grace_ms);
        match self.core.drain_node(self.now(), &drain.node, grace, drain.leave) {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(error) => return Box::pin(async move { Err(error.to_string()) }),
        }
        self.durably(())
    }
}

impl Handler<UndrainNode> for HeadActor {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, undrain: UndrainNode, ctx: &mut Context<Self>) -> Self::Result {
        match self.core.undrain_node(self.now(), &undrain.node) {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(error) => return Box::pin(async move { Err(error.to_string()) }),
        }
        self.durably(())
    }
}

impl Handler<WatchPlacementGroup> for HeadActor {
    type Result = ResponseFuture<Option<PlacementGroupStatus>>;

    fn handle(&mut self, watch: WatchPlacementGroup, ctx: &mut Context<Self>) -> Self::Result {
        let (mut version, head) = (self.version.subscribe(), ctx.address());
        let mut now = self.core.placement_group(&watch.name);
        Box::pin(async move {
            let as_seen = |now: &Option<PlacementGroupStatus>| {
                now.as_ref().is_some_and(|group| Some(&group.state) == watch.seen.as_ref())
            };
            let changed = async {
                while as_seen(&now) && version.changed().await.is_ok() {
                    match head.send(GroupSnapshot(watch.name.clone())).await {
                        Ok(group) => now = group,
                        Err(_) => return,
                    }
                }
            };
            // At the end of the wait the last that was seen is told.
            let _ = tokio::time::timeout(Duration::from_millis(watch.wait_ms), changed).await;
            now
        })
    }
}

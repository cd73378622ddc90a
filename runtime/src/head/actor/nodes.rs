//! Nodes that report: one that is new is taken when the head has reached it.

use std::time::Duration;

use actix::{ActorFutureExt, ActorResponse, Context, Handler, WrapFuture};

use super::{HeadActor, NodeLink};
use crate::head::core::Event;
use crate::head::messages::{NodeReport, NodeVerdict, ProcessStatus, WhoIs};
use crate::node::NodeActor;

/// How long a node that is new may take to answer at the address that it names: less than it waits for its verdict.
const REACH_DEADLINE: Duration = Duration::from_secs(2);

impl Handler<NodeReport> for HeadActor {
    type Result = ActorResponse<Self, NodeVerdict>;

    fn handle(&mut self, report: NodeReport, ctx: &mut Context<Self>) -> Self::Result {
        if self.link(&report).is_some() {
            return ActorResponse::reply(self.take_report(report, ctx));
        }
        let node = self.system.handle::<NodeActor>(report.addr.clone()).with_deadline(REACH_DEADLINE);
        let asked = async move { (node.ask(WhoIs).await, report) }.into_actor(self);
        ActorResponse::r#async(asked.map(|(there, report), head: &mut Self, ctx| match there {
            Ok((name, boot)) if (&name, boot) == (&report.name, report.boot) => head.take_report(report, ctx),
            there => {
                let why = there.map_or_else(
                    |error| error.to_string(),
                    |(name, _)| format!("another node agent answers there, {name}"),
                );
                let at = &report.addr.endpoint;
                let why = format!("it cannot reach this node at {at} (`--bind`, `--advertise`): {why}");
                tracing::warn!(node = report.name, "a node is not taken: {why}");
                NodeVerdict::Refused { why }
            }
        }))
    }
}

impl HeadActor {
    /// The way to the agent that reports, if it is known.
    fn link(&self, report: &NodeReport) -> Option<&NodeLink> {
        self.nodes.get(&report.name).filter(|link| link.process == report.addr.process)
    }

    fn take_report(&mut self, report: NodeReport, ctx: &mut Context<Self>) -> NodeVerdict {
        let seen = match self.seen(report.term) {
            Ok(seen) => seen,
            Err(superseded) => return NodeVerdict::Superseded(superseded),
        };
        if let Err(why) = self.core.admits(&report) {
            return NodeVerdict::Refused { why };
        }
        if self.link(&report).is_none() {
            let handle = self.system.handle(report.addr.clone());
            let (boot, process) = (report.boot, report.addr.process);
            self.nodes.insert(report.name.clone(), NodeLink { boot, process, handle });
        }
        for worker in report.workers.iter().filter(|worker| worker.status != ProcessStatus::Running) {
            self.workers.remove(&worker.incarnation);
        }
        if let Some(packages) = &self.packages {
            packages.offered(&report.packages, &self.system, &report.addr.endpoint);
        }
        self.feed(Event::NodeReport(report), ctx);
        NodeVerdict::Accepted(seen)
    }
}

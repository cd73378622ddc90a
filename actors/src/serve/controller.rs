//! The serve controller as an actor: takes documents, answers questions, and has its service run.

use std::path::PathBuf;

use actix::{Actor, Context, Handler, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, Items, RemoteActor, Spawn};
use tokio_util::task::AbortOnDropHandle;

use super::core::SiteArgs;
use super::messages::{
    DeleteApps, DeployApps, DeployRefused, GetCalls, GetDetails, GetTable, ReportCalls, TableActors,
    WatchDeployment,
};
use super::service::Service;
use super::target::{AppTarget, DeploymentTarget, Rollout, Settings, Source};
use crate::deployment::ModelDeployment;
use crate::ingress_actor::IngressArgs;

/// Arguments of the controller.
#[derive(Clone, Debug, Encode, Decode)]
pub struct ServeArgs {
    /// What cluster.toml says of models; documents say what differs. Without a section `[model]` its model has no name.
    pub base: ModelDeployment,
    /// The application of that model, if it is to be served.
    pub application: Option<String>,
    /// Where relative paths of documents start.
    pub dir: PathBuf,
    /// Of every ingress; those that share a machine with another one have ports of their own.
    pub ingress: IngressArgs,
    /// Where ingresses are.
    pub sites: SiteArgs,
}

impl ServeArgs {
    /// cluster.toml's application. It has the devices of the cluster to itself, so an update makes room first.
    pub(super) fn base_app(&self) -> Option<AppTarget> {
        let rollout = Rollout::InPlace { thousandths: 1000 };
        let deployment = DeploymentTarget {
            name: self.base.model_name.clone(),
            workload: self.base.clone().into(),
            settings: Settings { rollout, ..Settings::default() },
        };
        Some(AppTarget {
            name: self.application.clone()?,
            route_prefix: Some("/".to_owned()),
            source: Source::Cluster,
            // Not JSON, so not taken for a document; told apart by what cluster.toml says.
            config: format!("{} {:?} {:?}", self.base.model.display(), self.base.topology, self.base.engine),
            deployments: vec![deployment],
        })
    }
}

/// The actor.
pub struct ServeController {
    service: Service,
    /// Runs for as long as the actor lives.
    _driver: AbortOnDropHandle<()>,
}

impl Actor for ServeController {
    type Context = Context<Self>;
}

impl RemoteActor for ServeController {
    const TYPE: &'static str = "serve";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<DeployApps>().accept::<DeleteApps>().accept::<GetDetails>().accept::<GetTable>();
        m.accept_stream::<WatchDeployment>().accept::<ReportCalls>().accept::<GetCalls>();
    }
}

impl Spawn for ServeController {
    type Args = ServeArgs;

    async fn create(args: ServeArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let cluster = cx.cluster().cloned();
        let cluster =
            cluster.ok_or_else(|| CreateError::Failed("this process is in no cluster".to_owned()))?;
        let service = Service::open(args, cluster).await.map_err(CreateError::Failed)?;
        let driver = AbortOnDropHandle::new(tokio::spawn(service.clone().drive()));
        Ok(Self { service, _driver: driver })
    }
}

impl Handler<DeployApps> for ServeController {
    type Result = ResponseFuture<Result<(), DeployRefused>>;

    fn handle(&mut self, deploy: DeployApps, _: &mut Self::Context) -> Self::Result {
        let service = self.service.clone();
        Box::pin(async move { service.deploy(deploy.json).await })
    }
}

impl Handler<DeleteApps> for ServeController {
    type Result = ResponseFuture<Result<(), DeployRefused>>;

    fn handle(&mut self, _: DeleteApps, _: &mut Self::Context) -> Self::Result {
        let service = self.service.clone();
        Box::pin(async move { service.delete_all().await })
    }
}

impl Handler<GetDetails> for ServeController {
    type Result = ResponseFuture<String>;

    fn handle(&mut self, _: GetDetails, _: &mut Self::Context) -> Self::Result {
        let service = self.service.clone();
        Box::pin(async move { service.details().await })
    }
}

impl Handler<GetTable> for ServeController {
    type Result = actix::MessageResult<GetTable>;

    fn handle(&mut self, asked: GetTable, _: &mut Self::Context) -> Self::Result {
        actix::MessageResult(self.service.welcome(&asked.ingress))
    }
}

impl Handler<WatchDeployment> for ServeController {
    type Result = Items<Option<TableActors>>;

    fn handle(&mut self, watch: WatchDeployment, _: &mut Self::Context) -> Self::Result {
        Items::new(self.service.watch(watch))
    }
}

impl Handler<ReportCalls> for ServeController {
    type Result = ();

    fn handle(&mut self, report: ReportCalls, _: &mut Self::Context) {
        self.service.hear_caller(report);
    }
}

impl Handler<GetCalls> for ServeController {
    type Result = actix::MessageResult<GetCalls>;

    fn handle(&mut self, _: GetCalls, _: &mut Self::Context) -> Self::Result {
        actix::MessageResult(self.service.calls())
    }
}

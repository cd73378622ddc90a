//! The ingress as an actor: hears what is served, the ranks and the groups' views, and gives HTTP its line to them.

mod eplb;
mod pools;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, AsyncContext, Context, Handler, MessageResult, ResponseFuture};
use actix_web::web::{Data, ServiceConfig};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::group::GroupView;
use heliostat_runtime::handle::{ActorAddr, Handle, Refusal as WireRefusal};
use heliostat_runtime::system::PeerEvent;

use crate::deployment::SERVE;
use crate::http::HttpDoor;
use crate::ingress::apps::Apps;
use crate::ingress::engine::{EngineLink, RankCommand, Refusal, Unavailable};
use crate::ingress::model::ServedModel;
use crate::ingress::server::{HttpConfig, HttpService, ServeError, serve};
use crate::messages::{
    Abort, AttachIngress, AwaitServing, Busy, GetRequests, GetServing, RankOutputs, RankRefused, Submit,
};
use crate::rank::Rank;
use crate::serve::ServeController;
use crate::serve::messages::{GetTable, SetTable, TableModel, TableReport, Welcome};
use crate::telemetry::{Provenance, TelemetryArgs, Tracing};
use pools::{Handles, Pools, lock};
use tokio::sync::oneshot;

/// How long an ingress that starts waits to hear what is served.
const TABLE_PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// How long it waits for the port of an ingress that gives it up, and the pause between two attempts.
const PORT_PATIENCE: Duration = Duration::from_secs(5);
const PORT_AGAIN: Duration = Duration::from_millis(50);
/// Streams of an ingress that goes take as long as they take: the controller ends it.
const LAST_STREAM: Duration = Duration::from_secs(7 * 24 * 3600);

/// Arguments of the ingress actor.
#[derive(Clone, Debug, Encode, Decode)]
pub struct IngressArgs {
    /// Where HTTP is served. Port 0: one of its own, which it keeps when it starts again.
    pub bind: SocketAddr,
    /// Largest request body, bytes.
    pub body_bytes_max: u64,
    /// Who may come in.
    pub door: HttpDoor,
    /// Where it sends traces, if anywhere.
    pub telemetry: Option<TelemetryArgs>,
}

/// The actor.
pub struct IngressActor {
    cx: ActorCx,
    pools: Pools,
    handles: Handles,
    tracing: Tracing,
    /// Who waits until everything takes requests.
    waiting: Vec<oneshot::Sender<()>>,
    /// Serves for as long as the actor lives.
    service: HttpService,
}

impl Actor for IngressActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let (me, mut events) = (ctx.address(), self.cx.system().peer_events());
        actix::spawn(async move {
            while let Some(event) = events.next().await {
                me.do_send(Peer(event));
            }
        });
        self.refresh();
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.pools.stop_taking_requests();
        self.tracing.close();
    }
}

impl RemoteActor for IngressActor {
    const TYPE: &'static str = "ingress";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<GroupView>().accept::<RankOutputs>().accept::<RankRefused>().accept::<SetTable>();
        m.accept::<GetServing>().accept::<GetRequests>().accept::<AwaitServing>();
    }
}

/// The line from HTTP to the ranks.
struct RankLink {
    handles: Handles,
    me: ActorAddr,
}

impl EngineLink for RankLink {
    fn send(&self, rank: u32, command: RankCommand, from: Provenance) -> Result<(), Unavailable> {
        let (handle, kv_at) = {
            let handles = lock(&self.handles);
            let of = |rank| handles.get(rank);
            let kv_at = match &command {
                RankCommand::Continue(_, from) => of(from).map(|handle| handle.addr().clone()),
                RankCommand::Submit(_) | RankCommand::Abort(_) => None,
            };
            (of(&rank).cloned(), kv_at)
        };
        let Some(handle) = handle else {
            return Err(Unavailable { rank, command: Box::new(command), cause: Refusal::Gone });
        };
        let refused = match command {
            RankCommand::Submit(request) | RankCommand::Continue(request, _) => handle
                .tell(Submit { request: *request, from, reply_to: self.me.clone(), kv_at })
                .map_err(|refused| (RankCommand::Submit(Box::new(refused.message.request)), refused.reason)),
            RankCommand::Abort(id) => handle
                .tell(Abort { id })
                .map_err(|refused| (RankCommand::Abort(refused.message.id), refused.reason)),
        };
        refused.map_err(|(command, reason)| {
            let cause = match reason {
                WireRefusal::MailboxFull | WireRefusal::QueueFull | WireRefusal::TooManyPending(_) => {
                    Refusal::Full
                }
                WireRefusal::NoSuchActor
                | WireRefusal::WrongIncarnation
                | WireRefusal::WrongProcess
                | WireRefusal::Elsewhere(_)
                | WireRefusal::Unreachable(_) => Refusal::Gone,
                WireRefusal::UnknownMessage
                | WireRefusal::Unsendable(_)
                | WireRefusal::Malformed(_)
                | WireRefusal::Cancelled => Refusal::Unservable(reason.to_string()),
            };
            Unavailable { rank, command: Box::new(command), cause }
        })
    }
}

impl IngressActor {
    fn link(&self) -> RankLink {
        RankLink { handles: Arc::clone(&self.handles), me: self.cx.addr() }
    }

    /// Brings pools and routes in line with table and views. Ranks that are new are told to send their figures here.
    fn refresh(&mut self) {
        let (system, me) = (self.cx.system().clone(), self.cx.addr());
        let handles = Arc::clone(&self.handles);
        let mut met = HashSet::new();
        self.pools.refresh(|rank| {
            let Some(addr) = &rank.member.addr else { return };
            met.insert(rank.number);
            let known = lock(&handles).get(&rank.number).is_some_and(|handle| handle.addr() == addr);
            if !known {
                let handle = system.handle::<Rank>(addr.clone());
                attach(rank.number, &handle, me.clone());
                lock(&handles).insert(rank.number, handle);
            }
        });
        lock(&self.handles).retain(|rank, _| met.contains(rank));
        if self.pools.all_serve() {
            for waiting in self.waiting.drain(..) {
                // Who has stopped waiting is not told.
                let _ = waiting.send(());
            }
        }
    }

    fn load(&self, models: Vec<(String, String, TableModel)>, ctx: &mut Context<Self>) {
        for key in models {
            let me = ctx.address();
            actix::spawn(async move {
                let wanted = key.2.clone();
                let loaded = tokio::task::spawn_blocking(move || pools::load(&wanted)).await;
                let model = loaded.unwrap_or_else(|why| Err(why.to_string()));
                me.do_send(Loaded { key, model });
            });
        }
    }
}

impl Handler<SetTable> for IngressActor {
    type Result = MessageResult<SetTable>;

    fn handle(&mut self, told: SetTable, ctx: &mut Self::Context) -> Self::Result {
        let SetTable { table, leaving, turns } = told;
        if leaving {
            self.service.leave();
        }
        self.pools.advance(&turns);
        if !self.pools.serves(&table) {
            let models = self.pools.set_table(table);
            self.load(models, ctx);
            self.refresh();
        }
        let (open, port) = (self.service.presence().open(), self.service.bound().port());
        MessageResult(TableReport { open, port, ..self.pools.report() })
    }
}

/// A model's text files were read.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct Loaded {
    key: (String, String, TableModel),
    model: Result<ServedModel, String>,
}

impl Handler<Loaded> for IngressActor {
    type Result = ();

    fn handle(&mut self, loaded: Loaded, _: &mut Self::Context) {
        let link = self.link();
        self.pools.loaded(loaded.key, loaded.model, link);
        self.refresh();
    }
}

impl Handler<GroupView> for IngressActor {
    type Result = ();

    fn handle(&mut self, view: GroupView, _: &mut Self::Context) {
        self.pools.set_view(view);
        self.refresh();
    }
}

fn attach(rank: u32, handle: &Handle<Rank>, ingress: ActorAddr) {
    if let Err(refused) = handle.tell(AttachIngress { ingress }) {
        tracing::warn!(rank, "cannot attach to the rank: {}", refused.reason);
    }
}

/// A connection of this process came or went.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct Peer(PeerEvent);

/// Moves sequences away from a rank as soon as the connection to it breaks, and takes the rank back when a new one is
/// there. A rank that loses the connection forgets this ingress's sequences, so both sides agree.
impl Handler<Peer> for IngressActor {
    type Result = ();

    fn handle(&mut self, Peer(event): Peer, _: &mut Self::Context) {
        let of = |process| {
            let handles = lock(&self.handles).clone();
            handles.into_iter().filter(move |(_, handle)| handle.addr().process == process)
        };
        match event {
            PeerEvent::Lost { process, .. } => {
                for (rank, handle) in of(process) {
                    if let Some(ingress) = self.pools.of_rank(rank) {
                        ingress.on_rank_lost(rank);
                    }
                    attach(rank, &handle, self.cx.addr());
                }
            }
            PeerEvent::Connected { process, .. } => {
                if of(process).next().is_some() {
                    self.pools.repeat();
                }
            }
            PeerEvent::Missed(missed) => tracing::error!("missed {missed} connection events"),
        }
    }
}

impl Handler<RankOutputs> for IngressActor {
    type Result = ();

    fn handle(&mut self, message: RankOutputs, _: &mut Self::Context) {
        if let Some(ingress) = self.pools.of_rank(message.dp) {
            ingress.on_outputs(message.dp, message.outputs);
            ingress.on_stats(message.dp, message.stats);
            ingress.on_spans(message.dp, message.spans);
        }
    }
}

impl Handler<RankRefused> for IngressActor {
    type Result = ();

    fn handle(&mut self, message: RankRefused, _: &mut Self::Context) {
        let refusal = match message.why {
            Busy::QueueFull { .. } => Refusal::Full,
            Busy::Unservable(why) => Refusal::Unservable(why),
        };
        if let Some(ingress) = self.pools.of_rank(message.dp) {
            ingress.on_refused(message.dp, message.id, refusal);
        }
    }
}

impl Handler<GetServing> for IngressActor {
    type Result = MessageResult<GetServing>;

    fn handle(&mut self, _: GetServing, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.pools.all().map(|ingress| ingress.metrics().serving()).collect())
    }
}

impl Handler<AwaitServing> for IngressActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: AwaitServing, _: &mut Self::Context) -> Self::Result {
        let (waiting, serving) = oneshot::channel();
        self.waiting.retain(|waiting| !waiting.is_closed());
        if self.pools.all_serve() {
            let _ = waiting.send(());
        } else {
            self.waiting.push(waiting);
        }
        // An actor that ends says so by itself.
        Box::pin(async move { serving.await.unwrap_or(()) })
    }
}

impl Handler<GetRequests> for IngressActor {
    type Result = MessageResult<GetRequests>;

    fn handle(&mut self, _: GetRequests, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.pools.all().flat_map(|ingress| ingress.metrics().spans()).collect())
    }
}

/// Asks the controller what is served: who is told that this actor is ready finds a server that answers.
async fn welcome(cluster: Option<&Cluster>, ingress: &str) -> Welcome {
    let Some(cluster) = cluster else { return Welcome::default() };
    let ask = async {
        loop {
            if let Ok(controller) = cluster.handle::<ServeController>(SERVE).await {
                match controller.ask(GetTable { ingress: ingress.to_owned() }).await {
                    Ok(welcome) => return welcome,
                    Err(_) => cluster.forget(SERVE),
                }
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    };
    tokio::time::timeout(TABLE_PATIENCE, ask).await.unwrap_or_else(|_| {
        tracing::warn!("the serve controller does not answer: nothing is served until it does");
        Welcome::default()
    })
}

/// Listens where it is told. An ingress without a configured port takes the one that it had `before`, if it is free; one
/// with waits a while for an ingress that gives it up.
async fn listen(
    http: &HttpConfig,
    before: Option<u16>,
    serve: impl Fn(&HttpConfig) -> Result<HttpService, ServeError>,
) -> Result<HttpService, ServeError> {
    if let (0, Some(port)) = (http.bind.port(), before) {
        let again = HttpConfig { bind: SocketAddr::new(http.bind.ip(), port), ..http.clone() };
        if let Ok(service) = serve(&again) {
            return Ok(service);
        }
    }
    let until = tokio::time::Instant::now() + PORT_PATIENCE;
    loop {
        match serve(http) {
            Err(ServeError::Bind { cause, .. })
                if cause.kind() == std::io::ErrorKind::AddrInUse && tokio::time::Instant::now() < until =>
            {
                tokio::time::sleep(PORT_AGAIN).await;
            }
            served => return served,
        }
    }
}

impl Spawn for IngressActor {
    type Args = IngressArgs;

    async fn create(args: IngressArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let (handles, apps) = (Handles::default(), Apps::default());
        let mut pools = Pools::new(apps.clone(), cx.system().clone());
        let Welcome { table, port } = welcome(cx.cluster(), cx.name()).await;
        for key in pools.set_table(table) {
            let wanted = key.2.clone();
            let model = tokio::task::spawn_blocking(move || pools::load(&wanted)).await;
            let model = model.map_err(|why| CreateError::Failed(why.to_string()))?;
            pools.loaded(key, model, RankLink { handles: Arc::clone(&handles), me: cx.addr() });
        }
        let http = HttpConfig {
            bind: args.bind,
            keys: args.door.keys.clone(),
            tls: args.door.tls.clone(),
            cors_origins: args.door.cors_origins.clone(),
            bounds: args.door.bounds.clone(),
            body_max: args.body_bytes_max as usize,
            drain: LAST_STREAM,
            ..HttpConfig::default()
        };
        let cluster = cx.cluster().cloned();
        let tracing = Tracing::of(args.telemetry.as_ref(), &cx);
        let traced = tracing.clone();
        let routes = move |app: &mut ServiceConfig| {
            app.app_data(Data::new(traced.clone()));
            eplb::routes(app, cluster.clone());
        };
        let serve = |http: &HttpConfig| serve(http, apps.clone(), routes.clone());
        let service = listen(&http, port, serve).await.map_err(CreateError::failed)?;
        let scheme = if http.tls.is_some() { "https" } else { "http" };
        tracing::info!("serving HTTP at {scheme}://{}", service.bound());
        Ok(Self { cx, pools, handles, tracing, waiting: Vec::new(), service })
    }
}

//! The ingress as an actor: hears the ranks and the group's views, and gives HTTP its line to them.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actix::{Actor, AsyncContext, Context, Handler, MessageResult};
use actix_web::HttpResponse;
use actix_web::web::{self, Data, ServiceConfig};
use bincode::{Decode, Encode};
use heliostat_engine::config::{GenerationDefaults, ModelConfig};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::group::{GroupView, Member, MemberState};
use heliostat_runtime::handle::{ActorAddr, Handle, Refusal as WireRefusal};
use heliostat_runtime::system::PeerEvent;

use crate::deployment::EPLB;
use crate::eplb::{Eplb, EplbMetrics};
use crate::http::HttpDoor;
use crate::ingress::Ingress;
use crate::ingress::dispatch::DispatchConfig;
use crate::ingress::engine::{EngineLink, RankCommand, Ranks, Refusal, Unavailable};
use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;
use crate::ingress::server::{HttpConfig, HttpService, serve};
use crate::ingress::text::TextModel;
use crate::messages::{
    Abort, AttachIngress, Busy, GetRequests, GetServing, GetStatus, RankOutputs, RankRefused, Rebalance,
    Submit,
};
use crate::rank::Rank;

/// How long the EPLB actor may take to answer a client.
const EPLB_DEADLINE: Duration = Duration::from_secs(10);
/// How often it is asked for the figures of `/metrics`.
const EPLB_PERIOD: Duration = Duration::from_secs(5);

/// Arguments of the ingress actor.
#[derive(Clone, Debug, Encode, Decode)]
pub struct IngressArgs {
    /// Checkpoint directory, for tokenizer and template.
    pub model: PathBuf,
    /// Name of the model in the API.
    pub model_name: String,
    /// Where HTTP is served.
    pub bind: SocketAddr,
    /// DP ranks of the group: its ranks 0 to `dp`.
    pub dp: u32,
    /// Tokens per sequence.
    pub max_model_len: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Sequences that may wait at one rank.
    pub max_waiting: u32,
    /// Largest request body, bytes.
    pub body_bytes_max: u64,
    /// Who may come in.
    pub door: HttpDoor,
}

/// The actor.
pub struct IngressActor {
    cx: ActorCx,
    dp: u32,
    ingress: Ingress,
    eplb: EplbMetrics,
    handles: Handles,
    /// As last told to the ingress.
    ranks: Ranks,
    /// Serves for as long as the actor lives.
    _service: HttpService,
}

/// The DP ranks of the newest view.
type Handles = Arc<Mutex<HashMap<u32, Handle<Rank>>>>;

impl Actor for IngressActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let metrics = self.eplb.clone();
        ctx.run_interval(EPLB_PERIOD, move |this, _| {
            let (cluster, metrics) = (Data::new(this.cx.cluster().cloned()), metrics.clone());
            actix::spawn(async move {
                let Ok(eplb) = eplb(&cluster).await else { return };
                // An actor that is away answers next time.
                let Ok(answer) = eplb.ask(GetStatus).await else { return };
                match serde_json::from_str(&answer) {
                    Ok(status) => metrics.report(&status),
                    Err(why) => tracing::warn!("the EPLB actor's status is none: {why}"),
                }
            });
        });
        let (me, mut events) = (ctx.address(), self.cx.system().peer_events());
        actix::spawn(async move {
            while let Some(event) = events.next().await {
                me.do_send(Peer(event));
            }
        });
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.ingress.stop_taking_requests();
    }
}

impl RemoteActor for IngressActor {
    const TYPE: &'static str = "ingress";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<GroupView>().accept::<RankOutputs>().accept::<RankRefused>();
        m.accept::<GetServing>().accept::<GetRequests>();
    }
}

/// The line from HTTP to the ranks.
struct RankLink {
    handles: Handles,
    me: ActorAddr,
}

impl EngineLink for RankLink {
    fn send(&self, rank: u32, command: RankCommand) -> Result<(), Unavailable> {
        let handle = lock(&self.handles).get(&rank).cloned();
        let Some(handle) = handle else {
            return Err(Unavailable { rank, command: Box::new(command), cause: Refusal::Gone });
        };
        let refused = match command {
            RankCommand::Submit(request) => handle
                .tell(Submit { request: *request, reply_to: self.me.clone() })
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

fn lock(handles: &Handles) -> MutexGuard<'_, HashMap<u32, Handle<Rank>>> {
    handles.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handler<GroupView> for IngressActor {
    type Result = ();

    fn handle(&mut self, view: GroupView, _: &mut Self::Context) {
        let mut ready = BTreeMap::new();
        let mut handles = HashMap::new();
        for member in view.members.iter().filter(|member| member.rank < self.dp) {
            if let Some(addr) = &member.addr {
                let handle = self.cx.system().handle::<Rank>(addr.clone());
                attach(member.rank, &handle, self.cx.addr());
                ready.insert(member.rank, addr.incarnation.0);
                handles.insert(member.rank, handle);
            }
        }
        let missing = view.members.iter().filter_map(missing).collect();
        *lock(&self.handles) = handles;
        self.ranks = Ranks { size: self.dp, ready, missing };
        self.ingress.on_ranks(self.ranks.clone());
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
                    self.ingress.on_rank_lost(rank);
                    attach(rank, &handle, self.cx.addr());
                }
            }
            PeerEvent::Connected { process, .. } => {
                if of(process).next().is_some() {
                    self.ingress.on_ranks(self.ranks.clone());
                }
            }
            PeerEvent::Missed(missed) => tracing::error!("missed {missed} connection events"),
        }
    }
}

/// What a rank that is not ready lacks, in words.
fn missing(member: &Member) -> Option<String> {
    match member.state {
        MemberState::Ready => None,
        MemberState::Starting => Some(format!("rank {} is starting", member.rank)),
        MemberState::Absent => Some(format!("rank {} has no process", member.rank)),
    }
}

impl Handler<RankOutputs> for IngressActor {
    type Result = ();

    fn handle(&mut self, message: RankOutputs, _: &mut Self::Context) {
        self.ingress.on_outputs(message.dp, message.outputs);
        self.ingress.on_stats(message.dp, message.stats);
    }
}

impl Handler<RankRefused> for IngressActor {
    type Result = ();

    fn handle(&mut self, message: RankRefused, _: &mut Self::Context) {
        let refusal = match message.why {
            Busy::QueueFull { .. } => Refusal::Full,
            Busy::Unservable(why) => Refusal::Unservable(why),
        };
        self.ingress.on_refused(message.dp, message.id, refusal);
    }
}

impl Handler<GetServing> for IngressActor {
    type Result = MessageResult<GetServing>;

    fn handle(&mut self, _: GetServing, _: &mut Self::Context) -> Self::Result {
        MessageResult(vec![self.ingress.metrics().serving()])
    }
}

impl Handler<GetRequests> for IngressActor {
    type Result = MessageResult<GetRequests>;

    fn handle(&mut self, _: GetRequests, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.ingress.metrics().spans())
    }
}

impl Spawn for IngressActor {
    type Args = IngressArgs;

    async fn create(args: IngressArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let handles = Handles::default();
        let link = RankLink { handles: Arc::clone(&handles), me: cx.addr() };
        let dispatch = DispatchConfig {
            block_size: args.block_size as usize,
            queue_max: args.max_waiting as usize,
            ..DispatchConfig::default()
        };
        let config = ModelConfig::from_dir(&args.model).map_err(CreateError::failed)?;
        let model = ServedModel {
            names: vec![args.model_name.clone()],
            context_length: args.max_model_len as usize,
            vocab_size: config.vocab_size,
            text: TextModel::load(&args.model).map_err(CreateError::failed)?,
            defaults: GenerationDefaults::from_dir(&args.model).map_err(CreateError::failed)?,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        let ingress = Ingress::new(&args.model_name, dispatch, link);
        let http = HttpConfig {
            bind: args.bind,
            keys: args.door.keys.clone(),
            tls: args.door.tls.clone(),
            cors_origins: args.door.cors_origins.clone(),
            bounds: args.door.bounds.clone(),
            body_max: args.body_bytes_max as usize,
            ..HttpConfig::default()
        };
        let cluster = cx.cluster().cloned();
        let routes = move |app: &mut ServiceConfig| eplb_routes(app, cluster.clone());
        let service = serve(&http, ingress.clone(), model, routes).map_err(CreateError::failed)?;
        let scheme = if http.tls.is_some() { "https" } else { "http" };
        tracing::info!("serving HTTP at {scheme}://{}", service.bound());
        let mut eplb = EplbMetrics::default();
        ingress.metrics().register(|registry| eplb = EplbMetrics::new(registry));
        Ok(Self { dp: args.dp, cx, ingress, eplb, handles, ranks: Ranks::default(), _service: service })
    }
}

/// `GET /api/eplb` and `POST /api/eplb/rebalance`, answered by the EPLB actor.
fn eplb_routes(app: &mut ServiceConfig, cluster: Option<Cluster>) {
    app.app_data(Data::new(cluster))
        .route("/api/eplb", web::get().to(eplb_status))
        .route("/api/eplb/rebalance", web::post().to(eplb_rebalance));
}

async fn eplb_status(cluster: Data<Option<Cluster>>) -> Result<HttpResponse, ApiError> {
    let answer = eplb(&cluster).await?.ask(GetStatus).await.map_err(eplb_unavailable)?;
    Ok(HttpResponse::Ok().content_type("application/json").body(answer))
}

async fn eplb_rebalance(cluster: Data<Option<Cluster>>) -> Result<HttpResponse, ApiError> {
    match eplb(&cluster).await?.ask(Rebalance).await.map_err(eplb_unavailable)? {
        Ok(started) => Ok(HttpResponse::Accepted().json(started)),
        Err(refused) => {
            let error = serde_json::json!({ "message": refused.to_string(), "detail": refused });
            Ok(HttpResponse::Conflict().json(serde_json::json!({ "error": error })))
        }
    }
}

async fn eplb(cluster: &Data<Option<Cluster>>) -> Result<Handle<Eplb>, ApiError> {
    let cluster =
        cluster.as_ref().as_ref().ok_or_else(|| eplb_unavailable("this process is in no cluster"))?;
    let handle = cluster.handle::<Eplb>(EPLB).await.map_err(eplb_unavailable)?;
    Ok(handle.with_deadline(EPLB_DEADLINE))
}

fn eplb_unavailable(why: impl Display) -> ApiError {
    ApiError::not_ready(format!("the EPLB actor cannot be reached: {why}"))
}

//! The HTTP server: binds where it is told, routes, names every request, and drains when it stops.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix_cors::Cors;
use actix_web::body::MessageBody;
use actix_web::dev::{Extensions, Server as ActixServer, ServerHandle, ServiceRequest, ServiceResponse};
use actix_web::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use actix_web::http::{ConnectionType, Method, StatusCode, Uri, Version};
use actix_web::middleware::{Condition, Next, from_fn};
use actix_web::web::{self, Data, PayloadConfig, ServiceConfig};
use actix_web::{App, HttpMessage, HttpRequest, HttpResponse, HttpServer, ResponseError};
use bytes::Bytes;
use heliostat_runtime::wire::TlsError;
use serde_json::json;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::apps::{AppRoute, Apps};
use super::error::ApiError;
use super::forward::{self, ActorPool, Terms};
use super::handle::Ingress;
use super::metrics::{CONTENT_TYPE as METRICS_CONTENT_TYPE, spans_of_process};
use super::openai;
use super::presence::Presence;
use super::spans::{HttpSpan, RequestTrace};
use crate::http::{self, ApiKeys, BodyTime, Bounds, Caller, CertFiles, Rates};
use crate::telemetry::Tracing;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;
/// How long a browser remembers that it may ask, in seconds.
const PREFLIGHT_KEPT_S: usize = 600;

/// Where and how to serve.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpConfig {
    /// Exactly this address is bound. Beyond loopback a key is required.
    pub bind: SocketAddr,
    /// With any, all but `/health` asks for `Authorization: Bearer KEY`.
    pub keys: ApiKeys,
    /// Serves HTTPS with this certificate.
    pub tls: Option<CertFiles>,
    /// Origins whose web pages may use the API; `*` is all.
    pub cors_origins: Vec<String>,
    /// What strangers may cost.
    pub bounds: Bounds,
    /// Longest body, bytes.
    pub body_max: usize,
    /// How long an idle connection is kept.
    pub keep_alive: Duration,
    /// How long requests in flight may take to finish when the server stops.
    pub drain: Duration,
    /// Threads that serve connections.
    pub threads: usize,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 8000)),
            keys: ApiKeys::default(),
            tls: None,
            cors_origins: Vec::new(),
            bounds: Bounds::default(),
            body_max: 16 << 20,
            keep_alive: Duration::from_secs(75),
            drain: Duration::from_secs(30),
            threads: 2,
        }
    }
}

/// A server that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Anyone could use it.
    #[error("HTTP would listen on {0}, which others can reach: set `api_key_file`, or bind 127.0.0.1")]
    OpenWithoutKey(SocketAddr),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address is taken or not ours.
    #[error("cannot listen on {bind}: {cause}")]
    Bind {
        /// The address.
        bind: SocketAddr,
        /// Why.
        cause: std::io::Error,
    },
}

/// A running server. It ends with [`Self::stop`]; dropping it closes it at once.
pub struct HttpService {
    bound: SocketAddr,
    apps: Apps,
    presence: Presence,
    handle: ServerHandle,
    task: JoinHandle<()>,
}

/// Serves `apps`, as they are at each request. `extend` adds routes of other parts; it runs once in each thread.
///
/// Must be called inside a tokio runtime.
///
/// # Errors
/// The address cannot be bound, or would be open to others without a key.
pub fn serve(
    config: &HttpConfig,
    apps: Apps,
    extend: impl Fn(&mut ServiceConfig) + Clone + Send + 'static,
) -> Result<HttpService, ServeError> {
    if !config.bind.ip().is_loopback() && config.keys.is_empty() {
        return Err(ServeError::OpenWithoutKey(config.bind));
    }
    let presence = Presence::default();
    let (server, bound) = start(config, (&apps, &presence), extend)?;
    let handle = server.handle();
    let task = tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the HTTP server ended");
        }
    });
    Ok(HttpService { bound, apps, presence, handle, task })
}

fn start(
    config: &HttpConfig,
    (apps, presence): (&Apps, &Presence),
    extend: impl Fn(&mut ServiceConfig) + Clone + Send + 'static,
) -> Result<(ActixServer, SocketAddr), ServeError> {
    let (body_max, door, origins) =
        (config.body_max, Data::new(Door::new(config)), config.cors_origins.clone());
    let (apps, presence) = (Data::new(apps.clone()), Data::new(presence.clone()));
    let app = move || {
        App::new()
            .app_data(apps.clone())
            .app_data(door.clone())
            .app_data(presence.clone())
            .app_data(PayloadConfig::new(body_max))
            .wrap(from_fn(around))
            // Outside of the door: a browser asks without a key whether it may ask.
            .wrap(Condition::new(!origins.is_empty(), cors(&origins)))
            .configure(extend.clone())
            .configure(routes)
            .default_service(web::to(no_such_route))
    };
    let threads = config.threads.max(1);
    let server = HttpServer::new(app)
        .workers(threads)
        .max_connections(config.bounds.connections_per_thread(threads))
        .client_request_timeout(config.bounds.header_timeout)
        .tls_handshake_timeout(config.bounds.header_timeout)
        .keep_alive(config.keep_alive)
        .shutdown_timeout(config.drain.as_secs())
        // A client that closes its end has gone away: its sequences are aborted at once, not after the answer.
        .h1_allow_half_closed(false)
        .disable_signals();
    let failed = |cause| ServeError::Bind { bind: config.bind, cause };
    let server = match &config.tls {
        None => server.bind(config.bind),
        Some(files) => server.bind_rustls_0_23(config.bind, http::server_config(files)?),
    };
    let server = server.map_err(failed)?;
    let bound = server.addrs().first().copied().unwrap_or(config.bind);
    Ok((server.run(), bound))
}

/// Lets web pages of these origins in.
fn cors(origins: &[String]) -> Cors {
    let cors = Cors::default()
        // What a path does not take is answered 405; users' actors may take any of these.
        .allowed_methods(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
        // Clients have headers of their own (`x-stainless-...` of OpenAI's), and none that we read does harm.
        .allow_any_header()
        .expose_headers([REQUEST_ID, RETRY_AFTER])
        .max_age(PREFLIGHT_KEPT_S);
    match origins.iter().any(|origin| origin == "*") {
        true => cors.allow_any_origin(),
        false => origins.iter().fold(cors, |cors, origin| cors.allowed_origin(origin)),
    }
}

impl HttpService {
    /// The address that was bound, with its port.
    pub fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// What is open.
    pub fn presence(&self) -> &Presence {
        &self.presence
    }

    /// Accepts no connection from now on. What is open goes on to its end, connections are closed behind their next answer.
    pub fn leave(&self) {
        if !self.presence.is_leaving() {
            self.presence.leave();
            let handle = self.handle.clone();
            tokio::spawn(async move { handle.stop(true).await });
        }
    }

    /// Refuses new requests, lets those in flight finish for the configured time, then closes.
    pub async fn stop(self) {
        self.apps.stop_taking_requests();
        self.handle.stop(true).await;
    }
}

impl Drop for HttpService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn routes(app: &mut ServiceConfig) {
    let refused = || web::to(wrong_method);
    let get = |path: &str, route| web::resource(path.to_owned()).route(route).default_service(refused());
    app.service(get("/v1/completions", web::post().to(openai::completions)))
        .service(get("/v1/chat/completions", web::post().to(openai::chat_completions)))
        .service(get("/v1/responses", web::post().to(openai::responses)))
        .service(get("/v1/embeddings", web::post().to(openai::embeddings)))
        .service(get("/tokenize", web::post().to(openai::tokenize)))
        .service(get("/detokenize", web::post().to(openai::detokenize)))
        .service(get("/tokenizer_info", web::get().to(openai::tokenizer_info)))
        .service(get("/v1/models", web::get().to(openai::models)))
        .service(get("/v1/models/{name:.+}", web::get().to(openai::model)))
        .service(get("/-/healthz", web::get().to(|| async { "success" })))
        .service(get("/-/routes", web::get().to(prefixes)))
        .service(get("/health", web::get().to(health)))
        .service(get("/metrics", web::get().to(metrics)));
}

/// Of the application that the path names; without one of all.
async fn health(
    apps: Data<Apps>,
    presence: Data<Presence>,
    route: Option<Data<Arc<AppRoute>>>,
) -> Result<HttpResponse, ApiError> {
    if presence.is_leaving() {
        return Err(leaving());
    }
    let ready = match route {
        Some(route) => route.ready().map_err(|missing| missing.join("; ")),
        None => apps.ready(),
    };
    ready.map_err(|missing| ApiError::not_ready(format!("not ready: {missing}")))?;
    Ok(HttpResponse::Ok().json(json!({"status": "ready"})))
}

fn leaving() -> ApiError {
    ApiError::not_ready("This ingress is ending; another one takes requests.")
}

/// Prefixes with the names of their applications, as Ray's proxies tell them.
async fn prefixes(apps: Data<Apps>) -> HttpResponse {
    let routes = apps.all().into_iter().map(|route| (route.prefix().to_owned(), route.name.clone().into()));
    HttpResponse::Ok().json(serde_json::Value::Object(routes.collect()))
}

async fn metrics(apps: Data<Apps>, tracing: Option<Data<Tracing>>) -> HttpResponse {
    let own = tracing.filter(|tracing| tracing.is_on()).map(|tracing| spans_of_process(tracing.counts()));
    let text = apps.metrics(own.unwrap_or_default());
    HttpResponse::Ok().insert_header((CONTENT_TYPE, METRICS_CONTENT_TYPE)).body(text)
}

/// Whether a path is answered without an application.
fn is_common(path: &str) -> bool {
    path.starts_with("/-/") || path.starts_with("/api/") || matches!(path, "/health" | "/metrics")
}

/// The model that a request names, where there are several. The body is read for it, and put back.
async fn model_named(request: &mut ServiceRequest) -> Result<Option<String>, ApiError> {
    #[derive(serde::Deserialize)]
    struct Named {
        model: Option<String>,
    }
    let bytes = request.extract::<Bytes>().await.map_err(|error| openai::not_whole(&error))?;
    let named = serde_json::from_slice::<Named>(&bytes).ok().and_then(|named| named.model);
    request.set_payload(bytes.into());
    Ok(named)
}

/// Finds the application of a request and takes its prefix off the path: handlers see their model, and a path that
/// begins at the root.
async fn find_app(apps: &Apps, request: &mut ServiceRequest) -> Result<(), ApiError> {
    let path = request.path().to_owned();
    let Some((route, rest)) = apps.find(&path) else {
        if is_common(&path) {
            return Ok(());
        }
        if apps.all().is_empty() {
            return Err(ApiError::not_ready("The server is not ready: no application is deployed."));
        }
        let message = format!("No application answers at `{path}`; `GET /-/routes` lists their prefixes.");
        return Err(ApiError::new(StatusCode::NOT_FOUND, message).with_code("unknown_url"));
    };
    let has_actors = route.actors().is_some();
    if has_actors && is_common(&path) {
        return Ok(());
    }
    if rest.len() != path.len() {
        let rest = if rest.is_empty() { "/" } else { rest };
        let query = request.query_string();
        let target = if query.is_empty() { rest.to_owned() } else { format!("{rest}?{query}") };
        let target = target.parse::<Uri>().map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("The path cannot be read: {error}."))
        })?;
        request.match_info_mut().get_mut().update(&target);
        request.head_mut().uri = target;
    }
    if has_actors {
        let mut found = Extensions::new();
        found.insert(Data::new(route));
        request.add_data_container(Rc::new(found));
        return Ok(());
    }
    let named = match route.has_several() && request.method() == Method::POST {
        true => model_named(request).await?,
        false => None,
    };
    let Some(model) = route.choose(named.as_deref()) else { return Ok(()) };
    let mut found = Extensions::new();
    found.insert(model.ingress.clone());
    found.insert(model.model.clone());
    found.insert(Data::new(route));
    request.add_data_container(Rc::new(found));
    Ok(())
}

async fn no_such_route(http: HttpRequest) -> HttpResponse {
    let message = format!("There is no `{} {}`.", http.method(), http.path());
    ApiError::new(StatusCode::NOT_FOUND, message).with_code("unknown_url").error_response()
}

async fn wrong_method(http: HttpRequest) -> HttpResponse {
    let message = format!("`{}` does not take {}.", http.path(), http.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed").error_response()
}

/// Who may come in, and how often.
struct Door {
    keys: ApiKeys,
    rates: Option<Mutex<Rates>>,
    body_time: BodyTime,
    request_time: Option<Duration>,
    opened: Instant,
}

impl Door {
    fn new(config: &HttpConfig) -> Self {
        let per_s = config.bounds.requests_per_s;
        Self {
            keys: config.keys.clone(),
            rates: (per_s > 0).then(|| Mutex::new(Rates::new(per_s))),
            body_time: BodyTime::Whole(config.bounds.body_timeout),
            request_time: config.bounds.request_timeout,
            opened: Instant::now(),
        }
    }

    /// Lets a request in, or says why not.
    fn admit(&self, request: &mut ServiceRequest) -> Result<(), ApiError> {
        if matches!(request.path(), "/health" | "/-/healthz") {
            return Ok(());
        }
        let key = self.keys.find(request.headers().get(AUTHORIZATION));
        if key.is_none() && !self.keys.is_empty() {
            let message = "The header `Authorization: Bearer KEY` is missing or has another key.";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key"));
        }
        let from = || request.peer_addr().map_or(Caller::Other, |from| Caller::at(from.ip()));
        let caller = key.map_or_else(from, Caller::Key);
        let until = self.request_time.map(|time| (tokio::time::Instant::now() + time, time));
        request.extensions_mut().insert(Admitted { caller, until });
        if let Some(rates) = &self.rates {
            let mut rates = rates.lock().unwrap_or_else(PoisonError::into_inner);
            rates.count(caller, self.opened.elapsed()).map_err(ApiError::too_many)?;
        }
        http::within(request, self.body_time);
        Ok(())
    }
}

/// Whom a request that was let in is from, and until when it must be done.
#[derive(Clone, Copy)]
struct Admitted {
    caller: Caller,
    until: Option<RequestLimit>,
}

/// When a request must be done, and how long it had from its start.
pub(crate) type RequestLimit = (tokio::time::Instant, Duration);

/// Whom a request is from.
pub(crate) fn client(http: &HttpRequest) -> Caller {
    http.extensions().get::<Admitted>().map_or(Caller::Other, |admitted| admitted.caller)
}

/// Until when a request must be done.
pub(crate) fn request_limit(http: &HttpRequest) -> Option<RequestLimit> {
    http.extensions().get::<Admitted>()?.until
}

/// The name of a request, the client's if it gave one.
#[derive(Clone)]
struct RequestName(String);

/// The name of a request.
pub(crate) fn request_id(http: &HttpRequest) -> String {
    http.extensions().get::<RequestName>().map_or_else(new_name, |name| name.0.clone())
}

/// Where the spans of a request's sequences begin, if its trace is recorded.
pub(crate) fn request_trace(http: &HttpRequest) -> Option<RequestTrace> {
    http.extensions().get::<RequestTrace>().cloned()
}

fn new_name() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// The replicas that answer a request, where its application is an actor of a user.
fn actors_of(request: &ServiceRequest) -> Option<(ActorPool, Terms)> {
    let pool = request.app_data::<Data<Arc<AppRoute>>>()?.actors()?.clone();
    let hide_key = request.app_data::<Data<Door>>().is_some_and(|door| !door.keys.is_empty());
    let limit = request.extensions().get::<Admitted>().and_then(|admitted| admitted.until);
    Some((pool, Terms { limit, hide_key }))
}

/// A refusal for want of room, in the words of the deployment's `backpressure_config` if it has one.
fn under_backpressure(response: ServiceResponse) -> ServiceResponse {
    let full = response.response().error().and_then(|error| error.as_error::<ApiError>());
    let Some(error) = full.filter(|error| error.is_queue_full()).cloned() else { return response };
    let request = response.request();
    let of_actors = || request.app_data::<Data<Arc<AppRoute>>>()?.actors()?.backpressure();
    let of_model = || request.app_data::<Data<Ingress>>()?.backpressure();
    match of_actors().or_else(of_model) {
        Some(terms) => {
            let (request, _) = response.into_parts();
            ServiceResponse::new(request, error.under(terms).error_response())
        }
        None => response,
    }
}

/// Around every request: its name, the door, the count of answers.
async fn around(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let given = request.headers().get(&REQUEST_ID).and_then(|value| value.to_str().ok());
    let usable = |name: &&str| (1..=REQUEST_ID_BYTES_MAX).contains(&name.len()) && name.is_ascii();
    let name = given.filter(usable).map_or_else(new_name, str::to_owned);
    let header = HeaderValue::from_str(&name);
    let asked = tracing::enabled!(tracing::Level::DEBUG)
        .then(|| (Instant::now(), format!("{} {}", request.method(), request.path())));
    request.extensions_mut().insert(RequestName(name.clone()));
    let tracing = request.app_data::<Data<Tracing>>().filter(|tracing| tracing.is_on()).cloned();
    let traced =
        tracing.filter(|_| !is_common(request.path())).map(|tracing| (tracing, request.path().to_owned()));
    let presence = request.app_data::<Data<Presence>>().map(|presence| presence.as_ref().clone());
    let visit = presence.as_ref().map(Presence::enter);
    let goes = presence.is_some_and(|presence| presence.is_leaving());
    let door = request.app_data::<Data<Door>>().cloned();
    let mut admitted = match goes && request.version() == Version::HTTP_2 {
        // Its connection would not end by itself.
        true => Err(leaving()),
        false => door.map_or(Ok(()), |door| door.admit(&mut request)),
    };
    if admitted.is_ok()
        && let Some(apps) = request.app_data::<Data<Apps>>().cloned()
    {
        admitted = find_app(&apps, &mut request).await;
    }
    let route = request.app_data::<Data<Arc<AppRoute>>>().cloned();
    let of_actors = route.as_ref().filter(|route| route.actors().is_some());
    let pattern = of_actors.map_or_else(|| request.match_pattern(), |route| Some(route.pattern(&request)));
    let mut span =
        traced.and_then(|(tracing, path)| HttpSpan::begin(&tracing, &request, (path, pattern, &name)));
    let ingress = request.app_data::<Data<Ingress>>().cloned();
    let ongoing = route.map(|route| route.begin(&request));
    // Whatever its handler says is said of this request.
    let log = tracing::debug_span!("request", request_id = name);
    let mut response = match admitted {
        Ok(()) => match actors_of(&request) {
            None => next.call(request).instrument(log).await?.map_into_boxed_body(),
            Some((pool, terms)) => {
                let answer = forward::answer(&pool, &mut request, terms).instrument(log).await;
                // Keeps the error, which `into_response` does not.
                ServiceResponse::new(request.into_parts().0, answer)
            }
        },
        Err(refusal) => request.into_response(refusal.error_response()),
    };
    response = under_backpressure(response);
    if let Some(span) = &mut span {
        span.answered(response.status().as_u16());
    }
    if let Some(ingress) = ingress {
        ingress.count_response(response.status().as_u16());
    }
    if let Ok(header) = header {
        if let Some((began, asked)) = asked {
            let (status, ms) = (response.status().as_u16(), began.elapsed().as_secs_f64() * 1e3);
            tracing::debug!(request_id = header.to_str().unwrap_or_default(), asked, status, ms, "answered");
        }
        response.headers_mut().insert(REQUEST_ID, header);
    }
    if goes {
        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
    }
    if let Some(ongoing) = ongoing {
        response = ongoing.answer(response, span);
    }
    if let Some(visit) = visit {
        response = visit.answer(response);
    }
    Ok(response)
}

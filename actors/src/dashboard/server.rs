//! Binds exactly where it is told, guards the door, and serves the routes that others add.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use actix_web::dev::ServerHandle;
use actix_web::http::StatusCode;
use actix_web::middleware::from_fn;
use actix_web::web::{self, Data, PayloadConfig, ServiceConfig};
use actix_web::{App, HttpRequest, HttpResponse};
use serde_json::json;
use tokio::task::JoinHandle;

use super::door::{Door, guard};
use crate::http::{self, HttpDoor};
use crate::ingress::server::ServeError;

/// The version of Ray whose APIs are spoken here.
const RAY_VERSION: &str = "2.60.0";
/// Version of its Jobs API.
const API_VERSION: &str = "4";
/// Largest body of a request, bytes; a route may set another.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Threads that serve connections.
const THREADS: usize = 2;

/// Where to serve.
#[derive(Clone, Debug)]
pub struct DashboardArgs {
    /// Exactly this address is bound.
    pub bind: SocketAddr,
    /// Who may come in; a key is required beyond loopback. Origins of web pages count for nothing here.
    pub door: HttpDoor,
}

impl DashboardArgs {
    /// Binds.
    ///
    /// # Errors
    /// The address is taken, or would be open to others without a key.
    pub fn listen(&self) -> Result<TcpListener, ServeError> {
        if !self.bind.ip().is_loopback() && self.door.keys.is_empty() {
            return Err(ServeError::OpenWithoutKey(self.bind));
        }
        TcpListener::bind(self.bind).map_err(|cause| ServeError::Bind { bind: self.bind, cause })
    }
}

/// Routes of one part, with what their handlers need; added once in each thread.
type Routes = Arc<dyn Fn(&mut ServiceConfig) + Send + Sync>;

/// A dashboard that does not serve yet.
pub struct Dashboard {
    args: DashboardArgs,
    parts: Vec<Routes>,
}

impl Dashboard {
    /// One that serves its version and nothing else.
    pub fn new(args: DashboardArgs) -> Self {
        Self { args, parts: Vec::new() }
    }

    /// The same with the routes of another part.
    #[must_use]
    pub fn with(mut self, routes: impl Fn(&mut ServiceConfig) + Send + Sync + 'static) -> Self {
        self.parts.push(Arc::new(routes));
        self
    }

    /// Serves. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The listener cannot be used.
    pub fn start(self, listener: TcpListener) -> Result<DashboardServer, ServeError> {
        let Self { args, parts } = self;
        let failed = |cause| ServeError::Bind { bind: args.bind, cause };
        let bounds = args.door.bounds.clone();
        let door = Data::new(Door::new(&args.door, args.bind.ip().is_loopback()));
        let app = move || {
            let app = App::new()
                .app_data(door.clone())
                .app_data(PayloadConfig::new(BODY_BYTES_MAX))
                .wrap(from_fn(guard))
                .route("/api/version", web::get().to(version))
                .route("/api/ray/version", web::get().to(version));
            let app = parts.iter().fold(app, |app, routes| app.configure(&**routes));
            app.default_service(web::to(no_such_route))
        };
        let server = actix_web::HttpServer::new(app)
            .workers(THREADS)
            .max_connections(bounds.connections_per_thread(THREADS))
            .client_request_timeout(bounds.header_timeout)
            .tls_handshake_timeout(bounds.header_timeout)
            .shutdown_timeout(0)
            .disable_signals();
        let server = match &args.door.tls {
            None => server.listen(listener),
            Some(files) => server.listen_rustls_0_23(listener, http::server_config(files)?),
        };
        let server = server.map_err(failed)?.run();
        let handle = server.handle();
        let task = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "the dashboard ended");
            }
        });
        Ok(DashboardServer { handle, task })
    }
}

/// A running dashboard; dropping it closes it.
pub struct DashboardServer {
    handle: ServerHandle,
    task: JoinHandle<()>,
}

impl Drop for DashboardServer {
    fn drop(&mut self) {
        // The order to stop is sent when it is called; its future only waits.
        drop(self.handle.stop(false));
        self.task.abort();
    }
}

/// By which URL clients on this machine reach an address.
pub fn url(bind: SocketAddr, is_https: bool) -> String {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let scheme = if is_https { "https" } else { "http" };
    format!("{scheme}://{}", SocketAddr::new(ip, bind.port()))
}

/// An answer that is a reason in plain text.
pub fn refuse(status: StatusCode, why: impl ToString) -> HttpResponse {
    HttpResponse::build(status).content_type("text/plain; charset=utf-8").body(why.to_string())
}

async fn no_such_route(http: HttpRequest) -> HttpResponse {
    refuse(StatusCode::NOT_FOUND, format!("There is no `{} {}`.", http.method(), http.path()))
}

async fn version() -> HttpResponse {
    HttpResponse::Ok().json(json!({
        "version": API_VERSION,
        "ray_version": RAY_VERSION,
        "ray_commit": "",
        "session_name": "heliostat",
        "heliostat_version": env!("CARGO_PKG_VERSION"),
    }))
}

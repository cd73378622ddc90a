//! The servers: the real ingress before a replica, and actix-web alone.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use actix_web::{App, HttpResponse, HttpServer, web};
use heliostat_actors::deployment::Duty;
use heliostat_actors::http::{Bounds, HttpDoor};
use heliostat_actors::ingress_actor::{IngressActor, IngressArgs};
use heliostat_actors::serve::messages::{
    SetTable, Table, TableApp, TableDeployment, TableModel, TableReplica,
};
use heliostat_runtime::actor::{ActorCx, CxParts, RemoteActor, Reports};
use heliostat_runtime::group::{GroupView, Member, MemberState};
use heliostat_runtime::handle::{ActorAddr, ActorId, Incarnation, ProcessId};
use heliostat_runtime::system::{System, SystemConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::AnyError;
use crate::replica::REPLICA;

/// As long as an answer of `/v1/completions` to one token.
const BARE_ANSWER: &str = r#"{"id":"cmpl-00000000000000000000000000000000","object":"text_completion","created":1764000000,"model":"sundial-20m","choices":[{"index":0,"text":" the","logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}}"#;

/// A child that ends with its standard input, which this closes.
pub(crate) struct Process {
    child: Child,
    /// What it printed first.
    pub(crate) line: String,
}

impl Process {
    /// Starts this program with other arguments and waits for its first line.
    pub(crate) fn start(args: &[String]) -> Result<Self, AnyError> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
        Ok(Self { child, line: line.trim().to_owned() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It is our child: whether it ended by itself or now does not matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<SocketAddr, AnyError> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Serves until its standard input ends; prints its address and the process of the replica.
pub(crate) fn serve(step: Duration, log: Option<PathBuf>) -> Result<(), AnyError> {
    let mut args = vec!["replica".to_owned(), step.as_micros().to_string()];
    args.extend(log.map(|log| log.display().to_string()));
    let replica = Process::start(&args)?;
    crate::runtime()?.block_on(async {
        let bind = free_port()?;
        let system = System::start(SystemConfig::loopback()).await?;
        let cx = ActorCx::new(CxParts {
            system: system.clone(),
            name: "ingress".into(),
            actor: ActorId::named("ingress"),
            incarnation: Incarnation(1),
            device: None,
            group: None,
            reports: Reports::new(),
        });
        let args = heliostat_runtime::wire::to_bytes(&ingress_args(bind))?;
        let types = heliostat_actors::actor_types();
        let ingress = types.create(IngressActor::TYPE, args, 65_536, cx).await?;
        let addr = ActorAddr {
            actor: REPLICA,
            incarnation: Incarnation(1),
            process: ProcessId::ANY,
            endpoint: replica.line.clone(),
        };
        let member = Member { rank: 0, addr: Some(addr), join_info: Vec::new(), state: MemberState::Ready };
        let view = GroupView { group: "ep".into(), epoch: 1, members: vec![member] };
        let ingress = system.handle::<IngressActor>(ingress);
        ingress
            .ask(SetTable { table: table(), leaving: false, turns: Vec::new() })
            .await
            .map_err(|why| why.to_string())?;
        ingress.ask(view).await.map_err(|why| why.to_string())?;
        serves(bind).await?;
        println!("{bind} {}", replica.pid());
        tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin())).await??;
        Ok(())
    })
}

fn ingress_args(bind: SocketAddr) -> IngressArgs {
    let door = HttpDoor { bounds: Bounds::default(), ..HttpDoor::default() };
    IngressArgs { bind, body_bytes_max: 4 << 20, door, telemetry: None }
}

/// One model on one rank.
fn table() -> Table {
    let model = TableModel {
        names: vec!["sundial-20m".into()],
        path: Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/sundial-20m"),
        max_model_len: 4096,
        block_size: 16,
        max_waiting: 4096,
    };
    let replica = TableReplica { number: 1, group: "ep".into(), first_rank: 0, dp: 1, draining: false };
    let deployment = TableDeployment {
        duty: Duty::Whole,
        name: "llm".into(),
        model,
        in_flight_max: None,
        backpressure: None,
        may_wait: false,
        replicas: vec![replica],
    };
    let app = TableApp {
        name: "bench".into(),
        route_prefix: Some("/".into()),
        deployments: vec![deployment],
        actors: vec![],
    };
    Table { apps: vec![app] }
}

/// Waits until the model's tokenizer is loaded and its rank known.
async fn serves(bind: SocketAddr) -> Result<(), AnyError> {
    let request = b"GET /health HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n";
    let began = Instant::now();
    loop {
        let mut answer = Vec::new();
        let mut connection = tokio::net::TcpStream::connect(bind).await?;
        connection.write_all(request).await?;
        connection.read_to_end(&mut answer).await?;
        if answer.starts_with(b"HTTP/1.1 200") {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(20) {
            return Err(String::from_utf8_lossy(&answer).into_owned().into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Answers the same text to everybody.
pub(crate) fn bare() -> Result<(), AnyError> {
    let bind = free_port()?;
    actix_web::rt::System::new().block_on(async move {
        let answer = || async { HttpResponse::Ok().content_type("application/json").body(BARE_ANSWER) };
        let app = move || {
            let drained = move |_: web::Bytes| answer();
            App::new().route("/v1/completions", web::post().to(drained))
        };
        let server = HttpServer::new(app).workers(2).disable_signals().bind(bind)?.run();
        println!("{bind}");
        let served = actix_web::rt::spawn(server);
        tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin())).await??;
        served.abort();
        Ok(())
    })
}

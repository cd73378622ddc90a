//! An actor of one's own behind a route: it greets, counts, streams, and changes its tone without a restart.
//!
//! `helio package push target/debug/examples/greeter`, then `helio serve deploy examples/greeter.yaml`, then
//! `curl http://127.0.0.1:8000/hello/you`

use std::time::Duration;

use futures_util::stream;
use heliostat::prelude::*;
use heliostat::serve::{CheckHealth, HttpPart, HttpRequest, HttpResponse, Items, Reconfigure, ReplicaArgs};
use serde::Deserialize;

/// `args` of the application.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Args {
    greeting: String,
}

/// `user_config` of the deployment.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tone {
    mark: String,
}

struct Greeter {
    replica: u64,
    greeting: String,
    mark: String,
    requests: u64,
    ill: bool,
}

impl Actor for Greeter {
    type Context = Context<Self>;
}

impl RemoteActor for Greeter {
    const TYPE: &'static str = "Greeter";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_stream::<HttpRequest>().accept::<Reconfigure>().accept::<CheckHealth>();
    }
}

impl Spawn for Greeter {
    type Args = ReplicaArgs;

    async fn create(args: ReplicaArgs, _: ActorCx) -> Result<Self, CreateError> {
        let Args { greeting } = args.parse()?;
        Ok(Self { replica: args.replica, greeting, mark: ".".to_owned(), requests: 0, ill: false })
    }
}

impl Handler<HttpRequest> for Greeter {
    type Result = Items<HttpPart>;

    fn handle(&mut self, request: HttpRequest, _: &mut Context<Self>) -> Items<HttpPart> {
        self.requests += 1;
        let who = request.path.trim_start_matches('/').to_owned();
        match (request.method.as_str(), who.as_str()) {
            ("GET", "replica") => HttpResponse::json(200, &self.replica).into(),
            ("GET", "requests") => HttpResponse::json(200, &self.requests).into(),
            ("GET", "slow") => {
                let work = async {
                    tokio::time::sleep(Duration::from_secs(600)).await;
                    HttpResponse::text(200, "at last")
                };
                HttpResponse::later(work)
            }
            // One line every 100 ms, for as long as somebody reads.
            ("GET", "ticks") => {
                let ticks = stream::unfold(0_u64, |tick| async move {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    Some((Ok(format!("tick {tick}\n").into_bytes()), tick + 1))
                });
                HttpResponse::new(200).header("content-type", "text/plain").chunks(ticks).into()
            }
            ("POST", "echo") => {
                let kind = request.header("content-type").unwrap_or("application/octet-stream").to_owned();
                HttpResponse::new(201)
                    .header("content-type", kind)
                    .header("x-query", request.query)
                    .body(request.body)
                    .into()
            }
            ("POST", "panic") => panic!("as was asked for"),
            ("POST", "ill") => {
                self.ill = true;
                HttpResponse::new(204).into()
            }
            ("GET", _) => HttpResponse::text(200, format!("{}, {who}{}\n", self.greeting, self.mark)).into(),
            (method, _) => HttpResponse::text(405, format!("{method} is not for me\n")).into(),
        }
    }
}

impl Handler<Reconfigure> for Greeter {
    type Result = Result<(), String>;

    fn handle(&mut self, settings: Reconfigure, _: &mut Context<Self>) -> Result<(), String> {
        self.mark = settings.parse::<Tone>()?.mark;
        Ok(())
    }
}

impl Handler<CheckHealth> for Greeter {
    type Result = Result<(), String>;

    fn handle(&mut self, _: CheckHealth, _: &mut Context<Self>) -> Result<(), String> {
        if self.ill { Err("I am ill".to_owned()) } else { Ok(()) }
    }
}

fn main() -> std::process::ExitCode {
    Program::new("greeter", env!("CARGO_PKG_VERSION")).actor::<Greeter>().run(driver)
}

/// Replicas are started by the cluster. Nothing is left to do for a driver.
async fn driver(_: Driver) -> Result<(), BoxError> {
    Ok(())
}

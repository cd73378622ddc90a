//! What an actor of a user speaks that is a deployment: its arguments, HTTP requests, live settings, health.
//!
//! Plain messages, and what makes them pleasant to use. Who calls them, and when, is decided elsewhere.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use actix::{Actor, Context, Handler, Message};
use bincode::{Decode, Encode};
use futures_util::{Stream, StreamExt, stream};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, Items, RemoteActor, StreamMessage};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::calls::DeploymentHandle;
use crate::messages::wire;

wire! {
    Reconfigure => "serve.reconfigure",
    CheckHealth => "serve.check_health",
}

/// `Spawn::Args` of an actor that is a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ReplicaArgs {
    /// Name of the application.
    pub application: String,
    /// Name of the deployment.
    pub deployment: String,
    /// The replica's number, never used again.
    pub replica: u64,
    /// `args` of the application, a JSON object.
    pub args: String,
}

impl ReplicaArgs {
    /// The arguments as a type of one's own.
    ///
    /// # Errors
    /// They do not fit; the error names the field, and `Spawn::create` may return it as it is.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, CreateError> {
        parse(self.args.as_bytes())
            .map_err(|why| CreateError::Failed(format!("args of the application: {why}")))
    }

    /// The application's deployment of another type of actor, to ask its replicas. `cx` is what `Spawn::create` was given.
    /// A handle is cloned rather than made twice: what the bounds of the deployment count is counted by handle.
    ///
    /// # Errors
    /// The process is in no cluster, as in a test.
    pub fn deployment<A: RemoteActor>(&self, cx: &ActorCx) -> Result<DeploymentHandle<A>, CreateError> {
        DeploymentHandle::new(self, cx)
    }
}

/// New settings, `user_config` of the deployment: once after each start and whenever they change. An error leaves the
/// replica as it is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Message)]
#[rtype(result = "Result<(), String>")]
pub struct Reconfigure {
    /// JSON.
    pub user_config: String,
}

impl Reconfigure {
    /// The settings as a type of one's own.
    ///
    /// # Errors
    /// They do not fit; the error names the field.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, String> {
        parse(self.user_config.as_bytes())
    }
}

/// Whether the replica can serve. An actor that does not accept it is healthy for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Message)]
#[rtype(result = "Result<(), String>")]
pub struct CheckHealth;

/// An HTTP request below the application's route.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct HttpRequest {
    /// `GET`, `POST` and so on.
    pub method: String,
    /// Below the route; begins with `/`.
    pub path: String,
    /// What follows the `?`, as it was sent; empty without one.
    pub query: String,
    /// In the order they came, names in lower case; those that concern the connection alone are left out.
    pub headers: Vec<(String, Vec<u8>)>,
    /// All of it.
    pub body: Vec<u8>,
}

impl fmt::Debug for HttpRequest {
    /// Without headers and body, which may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HttpRequest({} {}, {} bytes)", self.method, self.path, self.body.len())
    }
}

impl HttpRequest {
    /// The first header of that name, which is given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(known, _)| known == name)?;
        std::str::from_utf8(value).ok()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is none, or does not fit; the error names the field.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, String> {
        parse(&self.body)
    }
}

impl Message for HttpRequest {
    type Result = Items<HttpPart>;
}

impl StreamMessage for HttpRequest {
    type Item = HttpPart;
    const NAME: &'static str = "serve.http";
}

/// A part of an answer: `Whole` alone, or `Head` and any number of `Chunk`s, of which `Failed` may be the last.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum HttpPart {
    /// All of the answer.
    Whole {
        /// Status and headers.
        head: HttpHead,
        /// The body.
        body: Vec<u8>,
    },
    /// Its begin: chunks follow.
    Head(HttpHead),
    /// A piece of the body; it is sent on at once.
    Chunk(Vec<u8>),
    /// The body ends before its time, and why; the client sees that it is not whole.
    Failed(String),
}

/// Status and headers of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HttpHead {
    /// 200 and so on.
    pub status: u16,
    /// Each with its value; names may repeat.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// An answer to an [`HttpRequest`]. `.into()` makes it what a handler returns.
pub struct HttpResponse {
    head: HttpHead,
    body: Body,
}

enum Body {
    Whole(Vec<u8>),
    Chunks(Pin<Box<dyn Stream<Item = Result<Vec<u8>, String>>>>),
}

impl HttpResponse {
    /// Without a body.
    pub fn new(status: u16) -> Self {
        Self { head: HttpHead { status, headers: Vec::new() }, body: Body::Whole(Vec::new()) }
    }

    /// Text.
    pub fn text(status: u16, text: impl Into<String>) -> Self {
        Self::new(status).header("content-type", "text/plain; charset=utf-8").body(text.into())
    }

    /// A value as JSON; 500 where it has none.
    pub fn json(status: u16, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::new(status).header("content-type", "application/json").body(body),
            Err(why) => Self::text(500, format!("the answer has no JSON: {why}")),
        }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.head.headers.push((name.to_ascii_lowercase(), value.into()));
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn body(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: Body::Whole(body.into()), ..self }
    }

    /// Sets a body that is sent piece by piece as it is made. The stream is polled as fast as the client reads, and
    /// dropped when the client is gone. An error breaks the answer off.
    #[must_use]
    pub fn chunks(self, chunks: impl Stream<Item = Result<Vec<u8>, String>> + 'static) -> Self {
        Self { body: Body::Chunks(Box::pin(chunks)), ..self }
    }

    /// What a handler returns whose answer takes a while. The work is dropped when the client is gone.
    pub fn later(work: impl Future<Output = Self> + 'static) -> Items<HttpPart> {
        Items::new(stream::once(work).flat_map(Items::from))
    }
}

impl From<HttpResponse> for Items<HttpPart> {
    fn from(HttpResponse { head, body }: HttpResponse) -> Self {
        match body {
            Body::Whole(body) => Self::new(stream::iter([HttpPart::Whole { head, body }])),
            Body::Chunks(chunks) => {
                let part = |chunk| match chunk {
                    Ok(chunk) => HttpPart::Chunk(chunk),
                    Err(why) => HttpPart::Failed(why),
                };
                Self::new(stream::iter([HttpPart::Head(head)]).chain(chunks.map(part)))
            }
        }
    }
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    serde_path_to_error::deserialize(&mut reader).map_err(|why| why.to_string())
}

/// Any actor that is a deployment, as those see it who only call it: there is no value of this type.
pub(crate) enum AnyReplica {}

impl Actor for AnyReplica {
    type Context = Context<Self>;
}

impl RemoteActor for AnyReplica {
    const TYPE: &'static str = "serve.replica";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_stream::<HttpRequest>().accept::<Reconfigure>().accept::<CheckHealth>();
    }
}

impl Handler<HttpRequest> for AnyReplica {
    type Result = Items<HttpPart>;

    fn handle(&mut self, _: HttpRequest, _: &mut Self::Context) -> Self::Result {
        match *self {}
    }
}

impl Handler<Reconfigure> for AnyReplica {
    type Result = Result<(), String>;

    fn handle(&mut self, _: Reconfigure, _: &mut Self::Context) -> Self::Result {
        match *self {}
    }
}

impl Handler<CheckHealth> for AnyReplica {
    type Result = Result<(), String>;

    fn handle(&mut self, _: CheckHealth, _: &mut Self::Context) -> Self::Result {
        match *self {}
    }
}

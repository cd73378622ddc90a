//! The spans of a request: HTTP, each of its sequences, where that waited, and every rank that it was sent to.
//!
//! Names of attributes are OpenTelemetry's for HTTP and generative AI, and vLLM's where it has more; ours begin with
//! `heliostat.`. All of it is nothing where a trace is not recorded.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use actix_web::HttpMessage;
use actix_web::dev::ServiceRequest;
use actix_web::http::header::USER_AGENT;
use heliostat_engine::request::{Request, RequestId};
use opentelemetry::{Array, KeyValue, StringValue, Value};

use super::metrics::Finish;
use crate::telemetry::{Kind, Span, TraceContext, Tracing};

/// Why a sequence left a rank that nobody called lost.
const MOVED: &str = "the sequence went on at another rank";

/// A request over HTTP, until its answer has ended.
#[derive(Debug)]
pub(super) struct HttpSpan {
    span: Span,
    status_code: u16,
}

impl HttpSpan {
    /// Of a request that came as `path`, which `route` is the pattern of; leaves what its sequences need in the request's extensions.
    pub(super) fn begin(
        tracing: &Tracing,
        request: &ServiceRequest,
        (path, route, request_id): (String, Option<String>, &str),
    ) -> Option<Self> {
        let method = request.method().to_string();
        let name = route.as_ref().map_or_else(|| method.clone(), |route| format!("{method} {route}"));
        let connection = request.connection_info();
        let mut attributes = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("url.path", path),
            KeyValue::new("url.scheme", connection.scheme().to_owned()),
            KeyValue::new("server.address", connection.host().to_owned()),
            KeyValue::new("heliostat.request_id", request_id.to_owned()),
        ];
        drop(connection);
        attributes.extend(route.map(|route| KeyValue::new("http.route", route)));
        let address = request.peer_addr().map(|from| from.ip().to_string());
        attributes.extend(address.map(|address| KeyValue::new("client.address", address)));
        let agent = request.headers().get(USER_AGENT).and_then(|agent| agent.to_str().ok());
        attributes.extend(agent.map(|agent| KeyValue::new("user_agent.original", agent.to_owned())));
        let span = tracing.request(name, request.headers(), attributes)?;
        let trace = RequestTrace {
            tracing: tracing.clone(),
            parent: span.context(),
            request_id: request_id.to_owned(),
            asked: None,
        };
        request.extensions_mut().insert(trace);
        // What was never answered was given up by its client.
        Some(Self { span, status_code: 499 })
    }

    /// Its status is known; the span goes on to the last byte.
    pub(super) fn answered(&mut self, status_code: u16) {
        self.status_code = status_code;
    }
}

impl Drop for HttpSpan {
    fn drop(&mut self) {
        let code = self.status_code;
        self.span.set([KeyValue::new("http.response.status_code", i64::from(code))]);
        if code >= 500 {
            self.span.set([KeyValue::new("error.type", code.to_string())]);
            self.span.fail(format!("HTTP {code}"));
        }
    }
}

/// What the spans of a request's sequences begin with.
#[derive(Clone, Debug)]
pub struct RequestTrace {
    tracing: Tracing,
    parent: TraceContext,
    request_id: String,
    asked: Option<Asked>,
}

/// Of what a client asked, that which its sequences do not know.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// `chat`, `text_completion`.
    pub(super) operation: &'static str,
    /// The model by the name that clients know.
    pub(super) model: String,
    /// Sequences of each prompt.
    pub(super) choices: usize,
}

impl RequestTrace {
    pub(super) fn with(self, asked: Asked) -> Self {
        Self { asked: Some(asked), ..self }
    }

    /// The spans of one sequence.
    pub(super) fn sequence(&self, request: &Request, arrived: Instant) -> Option<SequenceTrace> {
        let (stop, sampling) = (&request.stop, &request.sampling);
        let mut attributes = vec![
            KeyValue::new("gen_ai.provider.name", "heliostat"),
            KeyValue::new("gen_ai.request.id", self.request_id.clone()),
            KeyValue::new("heliostat.sequence", Hex(request.id).to_string()),
            KeyValue::new("gen_ai.request.max_tokens", i64::from(stop.max_tokens)),
            KeyValue::new("gen_ai.request.temperature", f64::from(sampling.temperature)),
            KeyValue::new("gen_ai.request.top_p", f64::from(sampling.top_p)),
            KeyValue::new("gen_ai.usage.prompt_tokens", request.prompt.len() as i64),
            KeyValue::new("gen_ai.usage.input_tokens", request.prompt.len() as i64),
        ];
        if let Some(Asked { operation, model, choices }) = &self.asked {
            attributes.extend([
                KeyValue::new("gen_ai.operation.name", *operation),
                KeyValue::new("gen_ai.request.model", model.clone()),
                KeyValue::new("gen_ai.response.model", model.clone()),
                KeyValue::new("gen_ai.request.n", *choices as i64),
            ]);
        }
        let at = wall(arrived);
        let whole = self.tracing.under(&self.parent, ("llm_request", Kind::Internal), at, attributes)?;
        let route = whole.child(("route", Kind::Internal), at, Vec::new());
        let spans = Spans { whole: Some(whole), route, call: None, arrived, first_token: None, calls: 0 };
        Some(SequenceTrace(Arc::new(Mutex::new(spans))))
    }
}

/// A sequence under way: shared by whoever tells the ranks of it and whoever tells its client.
#[derive(Clone, Debug)]
pub(super) struct SequenceTrace(Arc<Mutex<Spans>>);

#[derive(Debug)]
struct Spans {
    whole: Option<Span>,
    /// While it has no rank.
    route: Option<Span>,
    /// The rank that it was sent to.
    call: Option<(u32, Span)>,
    arrived: Instant,
    first_token: Option<Instant>,
    calls: i64,
}

impl SequenceTrace {
    /// It is sent to a rank, with so many tokens that it had before: where the rank's spans go on. The rank before has lost
    /// it, unless that one has `handed_over`.
    pub(super) fn sent(&self, rank: u32, generated: usize, handed_over: bool) -> Option<TraceContext> {
        let (mut spans, now) = (self.lock(), SystemTime::now());
        if handed_over {
            spans.call = None;
        }
        spans.leave(MOVED, now);
        let engine = KeyValue::new("heliostat.engine", i64::from(rank));
        if let Some(mut route) = spans.route.take() {
            route.set([engine.clone()]);
            route.end(now);
        }
        let had = KeyValue::new("heliostat.generated_before", generated as i64);
        let call = spans.whole.as_ref()?.child(("rank.submit", Kind::Client), now, vec![engine, had])?;
        let context = call.context();
        spans.calls += 1;
        spans.call = Some((rank, call));
        Some(context)
    }

    /// The ranks changed: it is at that one now, or at none.
    pub(super) fn stays(&self, rank: Option<u32>, why: &str) {
        let mut spans = self.lock();
        if spans.call.as_ref().is_some_and(|(at, _)| Some(*at) != rank) {
            spans.leave(why, SystemTime::now());
        }
    }

    /// Tokens came from its rank, and maybe its end.
    pub(super) fn heard(&self, tokens: usize, finished: bool) {
        let mut spans = self.lock();
        if tokens > 0 {
            spans.first_token.get_or_insert_with(Instant::now);
        }
        if finished {
            spans.call = None;
        }
    }

    /// It has ended for its client.
    pub(super) fn end(&self, finish: Finish, output_tokens: u32, failure: Option<String>) {
        let (mut spans, now) = (self.lock(), SystemTime::now());
        let Some(mut whole) = spans.whole.take() else { return };
        spans.route = None;
        spans.call = None;
        let reasons = Array::String(vec![StringValue::from(finish.word())]);
        whole.set([
            KeyValue::new("gen_ai.response.finish_reasons", Value::Array(reasons)),
            KeyValue::new("gen_ai.usage.completion_tokens", i64::from(output_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", i64::from(output_tokens)),
            KeyValue::new("gen_ai.latency.e2e", spans.arrived.elapsed().as_secs_f64()),
            KeyValue::new("heliostat.ranks_tried", spans.calls),
        ]);
        let first = spans.first_token.map(|first| (first - spans.arrived).as_secs_f64());
        whole.set(first.map(|first| KeyValue::new("gen_ai.latency.time_to_first_token", first)));
        if let Some(why) = failure {
            whole.fail(why);
        }
        whole.end(now);
    }

    fn lock(&self) -> MutexGuard<'_, Spans> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spans {
    /// It has a rank no more, if it had one.
    fn leave(&mut self, why: &str, now: SystemTime) {
        let Some((_, mut call)) = self.call.take() else { return };
        call.fail(why.to_owned());
        call.end(now);
        let route = |whole: &Span| whole.child(("route", Kind::Internal), now, Vec::new());
        self.route = self.whole.as_ref().and_then(route);
    }
}

/// A sequence as `helio timeline`, traces and logs name it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hex(pub(crate) RequestId);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0.0)
    }
}

/// A moment by the clock on the wall.
fn wall(at: Instant) -> SystemTime {
    SystemTime::now() - at.elapsed()
}

//! A span under way, and the context by which other processes add to its trace.

use std::time::SystemTime;

use actix_web::http::header::HeaderMap;
use bincode::{Decode, Encode};
use opentelemetry::KeyValue;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState, Tracer,
};

use super::{Context, TraceContextExt, Tracing};

/// A place in a trace that is recorded: what a message carries so that its receiver can go on with the trace.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TraceContext {
    /// The trace.
    pub trace: u128,
    /// The span under which the receiver's begin.
    pub span: u64,
    /// W3C's `tracestate`, as it was received.
    pub state: String,
}

/// The HTTP request that a sequence belongs to, for logs and traces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Provenance {
    /// `X-Request-Id`.
    pub request_id: String,
    /// Where the spans of the rank begin, if the trace is recorded.
    pub trace: Option<TraceContext>,
}

/// Which side of a call a span tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The one that was asked.
    Server,
    /// The one that asked.
    Client,
    /// Neither.
    Internal,
}

/// A span that is recorded. It ends when it is dropped, or by [`Span::end`].
#[derive(Debug)]
pub struct Span {
    tracing: Tracing,
    inner: opentelemetry_sdk::trace::Span,
}

/// Headers of a request.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

impl Tracing {
    /// The span of a request: under the `traceparent` of its client if it has one. None where the trace is not recorded.
    pub fn request(&self, name: String, headers: &HeaderMap, attributes: Vec<KeyValue>) -> Option<Span> {
        let parent = self.0.as_ref()?.propagator.extract_with_context(&Context::new(), &Headers(headers));
        self.begin(&parent, (name, Kind::Server), SystemTime::now(), attributes)
    }

    /// A span under one of another process, or of another part of this one.
    pub fn under(
        &self,
        parent: &TraceContext,
        (name, kind): (&'static str, Kind),
        at: SystemTime,
        attributes: Vec<KeyValue>,
    ) -> Option<Span> {
        let remote = matches!(kind, Kind::Server);
        let context = Context::new().with_remote_span_context(parent.to_span_context(remote));
        self.begin(&context, (name.to_owned(), kind), at, attributes)
    }

    fn begin(
        &self,
        parent: &Context,
        (name, kind): (String, Kind),
        at: SystemTime,
        attributes: Vec<KeyValue>,
    ) -> Option<Span> {
        let kind = match kind {
            Kind::Server => SpanKind::Server,
            Kind::Client => SpanKind::Client,
            Kind::Internal => SpanKind::Internal,
        };
        let builder =
            SpanBuilder::from_name(name).with_kind(kind).with_start_time(at).with_attributes(attributes);
        let inner = self.0.as_ref()?.tracer.build_with_context(builder, parent);
        // The sampler's no is a span as well, of which nobody will hear.
        inner.span_context().is_sampled().then(|| Span { tracing: self.clone(), inner })
    }
}

impl TraceContext {
    fn to_span_context(&self, remote: bool) -> SpanContext {
        SpanContext::new(
            TraceId::from(self.trace),
            SpanId::from(self.span),
            TraceFlags::SAMPLED,
            remote,
            self.state.parse::<TraceState>().unwrap_or_default(),
        )
    }
}

impl Span {
    /// Where others go on.
    pub fn context(&self) -> TraceContext {
        let context = self.inner.span_context();
        TraceContext {
            trace: u128::from_be_bytes(context.trace_id().to_bytes()),
            span: u64::from_be_bytes(context.span_id().to_bytes()),
            state: context.trace_state().header(),
        }
    }

    /// A span within this one.
    pub fn child(
        &self,
        what: (&'static str, Kind),
        at: SystemTime,
        attributes: Vec<KeyValue>,
    ) -> Option<Span> {
        self.tracing.under(&self.context(), what, at, attributes)
    }

    /// Adds what has become known.
    pub fn set(&mut self, attributes: impl IntoIterator<Item = KeyValue>) {
        self.inner.set_attributes(attributes);
    }

    /// Notes something that happened.
    pub fn event(&mut self, name: &'static str, at: SystemTime, attributes: Vec<KeyValue>) {
        self.inner.add_event_with_timestamp(name, at, attributes);
    }

    /// It went wrong.
    pub fn fail(&mut self, why: String) {
        self.inner.set_status(Status::error(why));
    }

    /// Ends it.
    pub fn end(mut self, at: SystemTime) {
        self.inner.end_with_timestamp(at);
    }
}

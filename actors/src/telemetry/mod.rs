//! Traces for an OpenTelemetry collector: what a process begins and ends, and how it gets there.
//!
//! Off unless it was asked for. What knows of traces holds a [`Tracing`] and is never told by it to wait: spans go into
//! a bounded queue, what finds no room there is dropped and counted, and a thread of its own sends the rest.

mod export;
mod span;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bincode::{Decode, Encode};
use heliostat_runtime::actor::ActorCx;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanProcessor,
};

pub use export::SpanCounts;
use export::{Bounded, Counting, Counts, Sender};
pub use span::{Kind, Provenance, Span, TraceContext};

/// Spans of one message to the collector.
const BATCH_MAX: usize = 512;
/// What a process that stops gives its last spans.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Where traces go, and how many.
#[derive(Clone, PartialEq, Encode, Decode)]
pub struct TelemetryArgs {
    /// The collector's address for traces, path included.
    pub endpoint: String,
    /// Headers of every message to it, which may hold secrets.
    pub headers: Vec<(String, String)>,
    /// How many of the requests that come without a `traceparent` are traced, 0 to 1.
    pub sample_ratio: f64,
    /// `service.name`.
    pub service_name: String,
    /// More attributes of every process.
    pub resource: Vec<(String, String)>,
    /// How long one message may take.
    pub timeout: Duration,
    /// How long a span may wait for others.
    pub interval: Duration,
    /// Spans that may wait; more are dropped.
    pub queue_max: u32,
}

impl fmt::Debug for TelemetryArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&String> = self.headers.iter().map(|(name, _)| name).collect();
        f.debug_struct("TelemetryArgs").field("endpoint", &self.endpoint).field("headers", &names).finish()
    }
}

/// What begins spans. Cheap to clone; the default begins none.
#[derive(Clone, Default)]
pub struct Tracing(Option<Arc<Running>>);

struct Running {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    counts: Arc<Counts>,
    propagator: TraceContextPropagator,
}

impl fmt::Debug for Tracing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tracing").field(&self.is_on()).finish()
    }
}

/// Traces cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracingError {
    /// There is no HTTP client or no thread for it.
    #[error("cannot speak HTTP to the collector: {0}")]
    Client(String),
    /// The address or the environment does not fit.
    #[error(transparent)]
    Exporter(#[from] ExporterBuildError),
}

impl Tracing {
    /// Of an actor. Where traces cannot be sent it serves without, and its log says why.
    pub fn of(args: Option<&TelemetryArgs>, cx: &ActorCx) -> Self {
        let Some(args) = args else { return Self::default() };
        let process = [
            KeyValue::new("service.instance.id", format!("{}/{}", cx.name(), cx.incarnation().0)),
            KeyValue::new("heliostat.actor", cx.name().to_owned()),
            KeyValue::new("heliostat.incarnation", cx.incarnation().0 as i64),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ];
        Self::start(args, process).unwrap_or_else(|why| {
            tracing::warn!("no traces are sent to {}: {why}", args.endpoint);
            Self::default()
        })
    }

    /// Begins to send spans; `process` says whose they are.
    ///
    /// # Errors
    /// There is no client for the address.
    pub fn start(
        args: &TelemetryArgs,
        process: impl IntoIterator<Item = KeyValue>,
    ) -> Result<Self, TracingError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Sender::new(&args.endpoint, args.timeout).map_err(TracingError::Client)?)
            .with_endpoint(&args.endpoint)
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(args.timeout)
            .with_headers(args.headers.iter().cloned().collect::<HashMap<_, _>>())
            .build()?;
        let counts = Arc::new(Counts::default());
        let queue_max = args.queue_max as usize;
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(queue_max)
            .with_max_export_batch_size(queue_max.min(BATCH_MAX))
            .with_scheduled_delay(args.interval)
            .build();
        let batches = BatchSpanProcessor::builder(Counting::new(exporter, Arc::clone(&counts)))
            .with_batch_config(config)
            .build();
        let others = args.resource.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
        let resource = Resource::builder_empty()
            .with_attributes(others)
            .with_service_name(args.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attributes(process)
            .build();
        let bounded = Bounded::new(batches, Arc::clone(&counts), queue_max);
        Ok(Self::with_processor(bounded, counts, args.sample_ratio, resource))
    }

    fn with_processor(
        processor: impl SpanProcessor + 'static,
        counts: Arc<Counts>,
        sample_ratio: f64,
        resource: Resource,
    ) -> Self {
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(sample_ratio)));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(sampler)
            .with_resource(resource)
            .build();
        let (tracer, propagator) = (provider.tracer("heliostat"), TraceContextPropagator::new());
        Self(Some(Arc::new(Running { provider, tracer, counts, propagator })))
    }

    /// Whether any span may begin.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// What became of this process's spans.
    pub fn counts(&self) -> SpanCounts {
        self.0.as_ref().map_or_else(SpanCounts::default, |running| running.counts.get())
    }

    /// Sends what is left, for as long as that may take, and nothing more afterwards.
    pub fn close(&self) {
        if let Some(running) = &self.0 {
            // What the collector does not take in time is lost with the process.
            let _ = running.provider.shutdown_with_timeout(LAST_WORDS);
        }
    }
}

//! The way of ended spans to the collector: a bounded queue, a thread, HTTP. Everything that is lost on it is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bincode::{Decode, Encode};
use heliostat_runtime::wire::tls_crypto;
use opentelemetry::Context;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::BuilderVerifierExt;
use tokio::runtime::{Builder, Runtime};

/// What became of a process's spans since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct SpanCounts {
    /// The collector took them.
    pub exported: u64,
    /// There was no room in the queue.
    pub dropped: u64,
    /// The collector did not take them, or was out of reach.
    pub failed: u64,
}

impl SpanCounts {
    /// Each with its name.
    pub fn by_outcome(&self) -> [(&'static str, u64); 3] {
        [("exported", self.exported), ("dropped", self.dropped), ("failed", self.failed)]
    }
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    waiting: AtomicUsize,
    exported: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

impl Counts {
    pub(super) fn get(&self) -> SpanCounts {
        SpanCounts {
            exported: self.exported.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }
}

/// Lets in as many spans as may wait. The queue of the processor behind it is as long, so it never drops any uncounted.
#[derive(Debug)]
pub(super) struct Bounded<P> {
    inner: P,
    counts: Arc<Counts>,
    queue_max: usize,
}

impl<P> Bounded<P> {
    pub(super) fn new(inner: P, counts: Arc<Counts>, queue_max: usize) -> Self {
        Self { inner, counts, queue_max }
    }
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, span: &mut Span, cx: &Context) {
        self.inner.on_start(span, cx);
    }

    fn on_end(&self, span: SpanData) {
        let room = |waiting| (waiting < self.queue_max).then_some(waiting + 1);
        match self.counts.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room) {
            Ok(_) => self.inner.on_end(span),
            Err(_) => _ = self.counts.dropped.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Counts what the exporter within it sends.
#[derive(Debug)]
pub(super) struct Counting<E> {
    inner: E,
    counts: Arc<Counts>,
    /// The last batch did not arrive: the log has said so.
    failing: AtomicBool,
}

impl<E> Counting<E> {
    pub(super) fn new(inner: E, counts: Arc<Counts>) -> Self {
        Self { inner, counts, failing: AtomicBool::new(false) }
    }
}

impl<E: SpanExporter> SpanExporter for Counting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let sent = self.inner.export(batch).await;
        self.counts.waiting.fetch_sub(spans, Ordering::Relaxed);
        let count = if sent.is_ok() { &self.counts.exported } else { &self.counts.failed };
        count.fetch_add(spans as u64, Ordering::Relaxed);
        match (&sent, self.failing.swap(sent.is_err(), Ordering::Relaxed)) {
            (Err(why), false) => tracing::warn!(spans, "traces do not reach their collector: {why}"),
            (Ok(()), true) => tracing::info!("traces reach their collector again"),
            (Err(_), true) | (Ok(()), false) => {}
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// HTTP on the thread that sends spans, by a runtime of its own: the actor's threads have no part in it.
#[derive(Debug)]
pub(super) struct Sender {
    client: reqwest::Client,
    /// Taken when this is dropped.
    runtime: Option<Runtime>,
}

impl Sender {
    /// A client for that address. Of certificates it trusts those that this machine does, and reads them only where
    /// it must: a container may have none.
    pub(super) fn new(endpoint: &str, timeout: Duration) -> Result<Self, String> {
        let tls = ClientConfig::builder_with_provider(tls_crypto()).with_safe_default_protocol_versions();
        let tls = match endpoint.starts_with("https://") {
            true => tls.and_then(|tls| tls.with_platform_verifier()),
            false => tls.map(|tls| tls.with_root_certificates(RootCertStore::empty())),
        };
        let tls = tls.map_err(|why| why.to_string())?.with_no_client_auth();
        let client = reqwest::Client::builder()
            .timeout(timeout)
            .no_proxy()
            // Between two messages nobody would notice that a connection was closed.
            .pool_max_idle_per_host(0)
            .tls_backend_preconfigured(tls)
            .build()
            .map_err(|why| why.to_string())?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|why| why.to_string())?;
        Ok(Self { client, runtime: Some(runtime) })
    }
}

#[async_trait]
impl HttpClient for Sender {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // Blocks the thread of the batch processor, which has nothing else to do.
        let runtime = self.runtime.as_ref().ok_or("the client is closed")?;
        runtime.block_on(self.client.send_bytes(request))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // An ordinary drop would wait for its threads, which no asynchronous thread may.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

//! A collector of OpenTelemetry: takes OTLP over HTTP and keeps the spans.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::rig::PATIENCE;

/// A span and the attributes of its process.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) span: Span,
    pub(crate) process: BTreeMap<String, String>,
}

#[derive(Default)]
struct Kept {
    spans: Mutex<Vec<Seen>>,
    /// The heads of all requests, in lower case.
    heads: Mutex<Vec<String>>,
    more: Notify,
}

pub(crate) struct Collector {
    pub(crate) url: String,
    kept: Arc<Kept>,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let kept = Arc::new(Kept::default());
        let keeper = Arc::clone(&kept);
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let kept = Arc::clone(&keeper);
                tokio::spawn(async move { take(connection, &kept).await });
            }
        });
        Self { url, kept }
    }

    /// Waits until `enough` of the spans of a trace have come.
    pub(crate) async fn trace(&self, trace: &str, enough: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
        let (id, began) = (unhex(trace), Instant::now());
        loop {
            let more = self.kept.more.notified();
            let spans: Vec<Seen> = self.spans().into_iter().filter(|seen| seen.span.trace_id == id).collect();
            if enough(&spans) {
                return spans;
            }
            let left = PATIENCE.saturating_sub(began.elapsed());
            let names: Vec<&String> = spans.iter().map(|seen| &seen.span.name).collect();
            tokio::time::timeout(left, more)
                .await
                .unwrap_or_else(|_| panic!("trace {trace} has only {names:?}"));
        }
    }

    /// All spans so far.
    pub(crate) fn spans(&self) -> Vec<Seen> {
        self.kept.spans.lock().unwrap().clone()
    }

    /// The heads of all requests so far, in lower case.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.kept.heads.lock().unwrap().clone()
    }
}

async fn take(mut connection: TcpStream, kept: &Kept) {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if connection.read_buf(&mut bytes).await.unwrap() == 0 {
            return;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).to_lowercase();
    let length: usize =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap();
    while bytes.len() < head_end + length {
        assert!(connection.read_buf(&mut bytes).await.unwrap() > 0, "the body ended early");
    }
    let request = ExportTraceServiceRequest::decode(&bytes[head_end..head_end + length]).unwrap();
    for group in request.resource_spans {
        let process: BTreeMap<String, String> =
            group.resource.unwrap().attributes.iter().map(|pair| (pair.key.clone(), text(pair))).collect();
        let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
        let seen = spans.map(|span| Seen { span, process: process.clone() });
        kept.spans.lock().unwrap().extend(seen);
    }
    kept.heads.lock().unwrap().push(head);
    kept.more.notify_waiters();
    let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
    connection.write_all(answer.as_bytes()).await.unwrap();
}

fn text(pair: &KeyValue) -> String {
    show(pair.value.as_ref().and_then(|value| value.value.as_ref()))
}

fn show(value: Option<&any_value::Value>) -> String {
    match value {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::DoubleValue(number)) => number.to_string(),
        Some(any_value::Value::ArrayValue(list)) => {
            let shown = |value: &AnyValue| show(value.value.as_ref());
            list.values.iter().map(shown).collect::<Vec<_>>().join(",")
        }
        other => format!("{other:?}"),
    }
}

impl Seen {
    /// An attribute of the span.
    pub(crate) fn says(&self, key: &str) -> Option<String> {
        self.span.attributes.iter().find(|pair| pair.key == key).map(text)
    }

    /// A number among its attributes.
    pub(crate) fn number(&self, key: &str) -> f64 {
        let said = self.says(key).unwrap_or_else(|| panic!("{} says no {key}", self.span.name));
        said.parse().unwrap()
    }

    /// The steps that are events of it.
    pub(crate) fn steps(&self) -> Vec<u64> {
        let step = |pair: &&KeyValue| pair.key == "heliostat.step";
        let events = self.span.events.iter().filter(|event| event.name == "step");
        events.map(|event| text(event.attributes.iter().find(step).unwrap()).parse().unwrap()).collect()
    }

    /// What it says went wrong.
    pub(crate) fn failure(&self) -> String {
        self.span.status.as_ref().map(|status| status.message.clone()).unwrap_or_default()
    }
}

pub(crate) fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

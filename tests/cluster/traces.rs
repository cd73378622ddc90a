//! Traces of requests, as an OpenTelemetry collector receives them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::collector::{Collector, Seen, unhex};
use crate::programs::example;
use crate::rig::{Cluster, greedy, kill, text};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// Few processes, and spans that come soon.
async fn traced(endpoint: &str, more: &str) -> Cluster {
    let telemetry = format!("otlp_endpoint = {endpoint:?}\ninterval_s = 0.05\n{more}");
    Cluster::up(&[("telemetry", &telemetry), ("devices", "cpu = 2\nthreads = 1")]).await
}

async fn ask(cluster: &Cluster, body: &Value, traceparent: &str) -> u16 {
    let request = cluster.client.post(cluster.url("/v1/completions")).json(body);
    let answer =
        request.header("traceparent", traceparent).header("x-request-id", "mine").send().await.unwrap();
    let status = answer.status().as_u16();
    answer.bytes().await.unwrap();
    status
}

fn named<'a>(spans: &'a [Seen], name: &str) -> Vec<&'a Seen> {
    spans.iter().filter(|seen| seen.span.name == name).collect()
}

fn one<'a>(spans: &'a [Seen], name: &str) -> &'a Seen {
    let found = named(spans, name);
    assert_eq!(found.len(), 1, "{name} among {:?}", spans.iter().map(|s| &s.span.name).collect::<Vec<_>>());
    found[0]
}

/// Every span hangs on another one of the trace, and the first on the client's.
fn assert_connected(spans: &[Seen]) {
    let ids: BTreeSet<&Vec<u8>> = spans.iter().map(|seen| &seen.span.span_id).collect();
    let client = unhex(CLIENT);
    for Seen { span, .. } in spans {
        let is_root = span.parent_span_id == client;
        assert_eq!(is_root, span.name.starts_with("POST "), "{}", span.name);
        assert!(is_root || ids.contains(&span.parent_span_id), "{} hangs on nothing", span.name);
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano, "{} ends before it begins", span.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_one_trace_from_http_to_steps() {
    let collector = Collector::start().await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "# a key\nX-Collector-Key: s3cret\n").unwrap();
    let cluster = traced(&collector.url, &format!("headers_file = {:?}", secret.path())).await;
    // Its client does not want this one recorded.
    let other = "0af7651916cd43dd8448eb211c80319c";
    assert_eq!(ask(&cluster, &greedy(1, 4), &format!("00-{other}-{CLIENT}-00")).await, 200);

    assert_eq!(ask(&cluster, &greedy(0, 24), &format!("00-{TRACE}-{CLIENT}-01")).await, 200);
    let spans = collector.trace(TRACE, |spans| spans.len() >= 8).await;
    assert_connected(&spans);
    let names: Vec<&str> = spans.iter().map(|seen| seen.span.name.as_str()).collect();
    assert_eq!(names.len(), 8, "{names:?}");

    let http = one(&spans, "POST /v1/completions");
    assert_eq!(http.says("http.response.status_code").as_deref(), Some("200"));
    assert_eq!(http.says("heliostat.request_id").as_deref(), Some("mine"));
    assert_eq!(http.process["service.name"], "heliostat");
    assert_eq!(http.process["heliostat.actor"], "ingress");
    let request = one(&spans, "llm_request");
    assert_eq!(request.says("gen_ai.response.model").as_deref(), Some("sundial-20m"));
    assert_eq!(request.says("gen_ai.request.id").as_deref(), Some("mine"));
    assert_eq!(request.number("gen_ai.usage.output_tokens"), 24.0);
    assert_eq!(request.says("gen_ai.response.finish_reasons").as_deref(), Some("length"));
    let prompt = request.number("gen_ai.usage.prompt_tokens");
    assert!(
        prompt > 0.0
            && request.number("gen_ai.latency.e2e") > request.number("gen_ai.latency.time_to_first_token")
    );
    let (routed, sent) = (one(&spans, "route"), one(&spans, "rank.submit"));
    assert_eq!(routed.says("heliostat.engine"), sent.says("heliostat.engine"));
    let rank = one(&spans, "rank.generate");
    assert_eq!(rank.span.parent_span_id, sent.span.span_id);
    let actor = format!("rank-{}", rank.says("heliostat.rank").unwrap());
    assert_eq!(rank.process["heliostat.actor"], actor);
    assert!(rank.process["heliostat.incarnation"].parse::<u64>().unwrap() > 0);
    one(&spans, "queue");
    let (prefill, decode) = (one(&spans, "prefill"), one(&spans, "decode"));
    assert!(!prefill.steps().is_empty() && prefill.steps().len() + decode.steps().len() == 24);
    assert_eq!(rank.number("heliostat.steps"), 24.0);

    assert!(collector.spans().iter().all(|seen| seen.span.trace_id != unhex(other)), "not recorded");
    let heads = collector.heads();
    assert!(
        heads
            .iter()
            .all(|head| head.starts_with("post /v1/traces ") && head.contains("x-collector-key: s3cret"))
    );
}

/// When a recorded step began and ended, nanoseconds, by the actor of its rank and its number: in that time it was
/// scheduled. Both clocks may be a little apart.
fn recorded(timeline: &Value) -> BTreeMap<(String, u64), (u64, u64)> {
    let events = timeline["traceEvents"].as_array().unwrap();
    let names = events.iter().filter(|event| event["name"] == "process_name");
    let actors: BTreeMap<u64, &str> = names
        .map(|event| (event["pid"].as_u64().unwrap(), event["args"]["name"].as_str().unwrap()))
        .collect();
    let steps = events.iter().filter(|event| event["name"] == "step");
    let ns = |event: &Value, key: &str| event[key].as_u64().unwrap() * 1000;
    steps
        .map(|step| {
            let actor = actors[&step["pid"].as_u64().unwrap()].to_owned();
            let (began, took) = (ns(step, "ts"), ns(step, "dur"));
            ((actor, step["args"]["step"].as_u64().unwrap()), (began - 500_000, began + took + 500_000))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_of_a_trace_are_those_of_a_recording() {
    let collector = Collector::start().await;
    let cluster = traced(&collector.url, "").await;
    let over = Arc::new(AtomicBool::new(false));
    let (client, url, told) = (cluster.client.clone(), cluster.url("/v1/completions"), Arc::clone(&over));
    let load = tokio::spawn(async move {
        while !told.load(Ordering::Relaxed) {
            client.post(&url).json(&greedy(0, 24)).send().await.unwrap().bytes().await.unwrap();
        }
    });
    let made = tokio::task::block_in_place(|| cluster.helio(&["timeline", "--seconds", "2", "-o", "t.json"]));
    over.store(true, Ordering::Relaxed);
    load.await.unwrap();
    assert!(made.status.success(), "{}", text(&made));
    let timeline: Value =
        serde_json::from_slice(&std::fs::read(cluster.dir.path().join("t.json")).unwrap()).unwrap();
    let recorded = recorded(&timeline);
    let (mut found, mut wrong) = (0, Vec::new());
    for seen in collector.spans().iter().filter(|seen| ["prefill", "decode"].contains(&&*seen.span.name)) {
        let actor = &seen.process["heliostat.actor"];
        for (step, event) in seen.steps().into_iter().zip(&seen.span.events) {
            let Some((began, ended)) = recorded.get(&(actor.clone(), step)) else { continue };
            found += 1;
            if !(*began..*ended).contains(&event.time_unix_nano) {
                wrong.push((actor.clone(), step, event.time_unix_nano, *began, *ended));
            }
        }
    }
    assert!(found > 24 && wrong.is_empty(), "of {found} steps {wrong:?} were at another time");
    let sequences =
        timeline["traceEvents"].as_array().unwrap().iter().filter(|event| event["name"] == "sequence");
    let known: BTreeSet<String> =
        sequences.map(|event| event["args"]["id"].as_str().unwrap().to_owned()).collect();
    let traced = |seen: &Seen| seen.says("heliostat.sequence").is_some_and(|id| known.contains(&id));
    assert!(collector.spans().iter().any(traced), "no sequence of the recording is in a trace");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_on_at_another_rank_when_one_dies() {
    let collector = Collector::start().await;
    let cluster = traced(&collector.url, "").await;
    let mut body = greedy(0, 400);
    body["stream"] = json!(true);
    let client = cluster.client.clone();
    let request = client.post(cluster.url("/v1/completions")).json(&body).header("x-data-parallel-rank", "1");
    let request = request.header("traceparent", format!("00-{TRACE}-{CLIENT}-01"));
    let mut answer = request.send().await.unwrap();
    answer.chunk().await.unwrap().unwrap();
    kill(cluster.pid("rank-1"));
    let mut rest = Vec::new();
    while let Some(chunk) = answer.chunk().await.unwrap() {
        rest.extend_from_slice(&chunk);
    }
    assert!(String::from_utf8_lossy(&rest).ends_with("data: [DONE]\n\n"));

    let done = |spans: &[Seen]| named(spans, "llm_request").len() + named(spans, "rank.generate").len() == 2;
    let spans =
        collector.trace(TRACE, |spans| done(spans) && !named(spans, "POST /v1/completions").is_empty()).await;
    // Of the dead rank's spans those that had ended may have been sent, without the one that they hang on.
    let alive = one(&spans, "rank.generate").process.clone();
    let spans: Vec<Seen> = spans
        .into_iter()
        .filter(|seen| seen.process == alive || seen.process["heliostat.actor"] == "ingress")
        .collect();
    assert_connected(&spans);
    let sent = named(&spans, "rank.submit");
    assert_eq!(sent.len(), 2);
    let (first, second) = match sent[0].number("heliostat.generated_before") {
        0.0 => (sent[0], sent[1]),
        _ => (sent[1], sent[0]),
    };
    assert_eq!(
        (first.says("heliostat.engine").as_deref(), first.failure().as_str()),
        (Some("1"), "the rank was lost")
    );
    assert!(second.number("heliostat.generated_before") > 0.0 && second.failure().is_empty());
    assert_eq!(named(&spans, "route").len(), 2);
    let rank = one(&spans, "rank.generate");
    assert_eq!(rank.span.parent_span_id, second.span.span_id);
    let request = one(&spans, "llm_request");
    assert_eq!(
        (request.number("gen_ai.usage.output_tokens"), request.number("heliostat.ranks_tried")),
        (400.0, 2.0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_hangs_costs_spans_and_nothing_else() {
    // It takes connections and says nothing.
    let hangs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", hangs.local_addr().unwrap());
    let cluster = traced(&endpoint, "max_queued_spans = 4\ntimeout_s = 30").await;
    let cluster = &cluster;
    let asked = (0..8).map(|number| async move { cluster.complete(&greedy(0, 4 + number)).await });
    futures_util::future::join_all(asked).await;
    let metrics = cluster.client.get(cluster.url("/metrics")).send().await.unwrap().text().await.unwrap();
    let count = |start: &str| -> u64 {
        let lines = metrics.lines().filter(|line| line.starts_with(start));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    };
    assert!(metrics.contains("# TYPE heliostat:trace_spans counter"), "{metrics}");
    // HTTP, the sequence, its route and its rank; the last request's may still be under way.
    assert!(count("heliostat:trace_spans_total{outcome=\"dropped\"}") >= 24, "{metrics}");
    assert_eq!(count("heliostat:trace_spans_total{outcome=\"exported\"}"), 0);
    let dropped = metrics
        .lines()
        .filter(|line| line.starts_with("heliostat:rank_trace_spans_total") && line.contains("dropped"));
    assert!(
        dropped.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum::<u64>() > 0,
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_span_of_a_users_streamed_answer_ends_with_its_last_byte() {
    let collector = Collector::start().await;
    let telemetry = format!("otlp_endpoint = {:?}\ninterval_s = 0.05", collector.url);
    let cluster =
        Cluster::up_bare(&[("telemetry", &telemetry), ("devices", "device = \"cpu\"\ncpu = 1")]).await;
    let pushed = cluster.helio(&["package", "push", example("greeter").to_str().unwrap()]);
    assert!(pushed.status.success(), "{}", text(&pushed));
    cluster.deploy_and_wait(json!([{
        "name": "hello", "route_prefix": "/hello", "import_path": "greeter:Greeter",
        "args": { "greeting": "Hello" },
    }]));
    let request = cluster.client.get(cluster.url("/hello/ticks"));
    let ticks = request.header("traceparent", format!("00-{TRACE}-{CLIENT}-01")).send().await.unwrap();
    // One every 100 ms, and then the client goes away.
    let chunks = ticks.bytes_stream().take(4).map(|chunk| chunk.unwrap().len()).collect::<Vec<_>>().await;
    assert_eq!(chunks.len(), 4);
    let spans = collector.trace(TRACE, |spans| !spans.is_empty()).await;
    let http = one(&spans, "GET /hello");
    let took = http.span.end_time_unix_nano - http.span.start_time_unix_nano;
    assert!(took > 300_000_000, "it ended after {took} ns");
    assert_eq!(http.says("http.response.status_code").as_deref(), Some("200"));
    assert_eq!(http.says("url.path").as_deref(), Some("/hello/ticks"));
}

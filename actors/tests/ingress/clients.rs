//! Clients that go away, that read slowly, and a server that stops while they are served.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::rig::{Options, Rig};

const LONG: u32 = 2000;

fn request(stream: bool) -> String {
    let body = json!({"prompt": "The", "max_tokens": LONG, "ignore_eos": true, "n": 2, "stream": stream})
        .to_string();
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

async fn connect(rig: &Rig, stream: bool) -> TcpStream {
    let mut socket = TcpStream::connect(rig.url.strip_prefix("http://").unwrap()).await.unwrap();
    socket.write_all(request(stream).as_bytes()).await.unwrap();
    socket
}

async fn running(rig: &Rig, sequences: u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.stats(0).running < sequences {
        assert!(Instant::now() < deadline, "{:?}", rig.stats(0));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_blocks() {
    let rig = Rig::start(Options::default());
    for stream in [true, false] {
        let drawn = rig.stats(0).output_tokens;
        let mut socket = connect(&rig, stream).await;
        running(&rig, 2).await;
        if stream {
            socket.read_exact(&mut [0; 64]).await.unwrap();
        }
        drop(socket);
        rig.idle(Duration::from_secs(10)).await;
        assert!(rig.stats(0).output_tokens - drawn < u64::from(2 * LONG), "it was not aborted");
    }
    let metrics = rig.ingress.metrics().render();
    assert!(metrics.contains(r#"finished_reason="abort"} 4"#), "{metrics}");
    assert!(metrics.contains(r#"heliostat:sequences_in_flight{model_name="sundial"} 0"#));
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_nobody() {
    let rig = Rig::start(Options::default());
    let deaf = connect(&rig, true).await;
    running(&rig, 2).await;
    for _ in 0..3 {
        let answer = rig.ask("/v1/completions", json!({"prompt": "fn main", "max_tokens": 8})).await;
        assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
    }
    // All its tokens wait for it, and no more than those.
    rig.idle(Duration::from_secs(60)).await;
    let mut deaf = deaf;
    let mut text = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    while !String::from_utf8_lossy(&text).contains("[DONE]") {
        let read = deaf.read(&mut chunk).await.unwrap();
        assert!(read > 0);
        text.extend_from_slice(&chunk[..read]);
    }
    let lengths = String::from_utf8_lossy(&text).matches(r#""finish_reason":"length""#).count();
    assert_eq!(lengths, 2);
}

#[tokio::test]
async fn tokens_come_while_others_are_yet_to_be_drawn() {
    let rig = Rig::start(Options::default());
    let body = json!({"prompt": "The", "max_tokens": LONG, "ignore_eos": true, "stream": true});
    let (answer, ()) = tokio::join!(rig.post("/v1/completions", body), async {
        running(&rig, 1).await;
        rig.paused.store(true, Ordering::Relaxed);
    });
    let mut answer = answer.bytes_stream();
    let first = tokio::time::timeout(Duration::from_secs(10), answer.next()).await;
    first.expect("the answer was held back until its end").unwrap().unwrap();
    let drawn = rig.stats(0).output_tokens;
    assert!(drawn < u64::from(LONG), "{drawn}");
}

#[tokio::test]
async fn a_server_that_stops_lets_answers_finish() {
    let rig = Rig::start(Options::default());
    let body = json!({"prompt": "The", "max_tokens": 300, "ignore_eos": true, "stream": true});
    let answer = rig.post("/v1/completions", body).await;
    rig.stop();
    while rig.ingress.ready().is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Connections that are open are told; new ones find nobody.
    let refused =
        rig.http.post(format!("{}/v1/completions", rig.url)).json(&json!({"prompt": "x"})).send().await;
    assert!(refused.map_or(true, |response| response.status() == 503));
    let text = answer.text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n") && text.contains(r#""finish_reason":"length""#));
    let began = Instant::now();
    rig.join();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let rig = Rig::start(Options::default());
    rig.ask("/v1/completions", json!({"prompt": "The", "max_tokens": 5, "ignore_eos": true})).await;
    rig.idle(Duration::from_secs(5)).await;
    let response = rig.http.get(format!("{}/metrics", rig.url)).send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = response.text().await.unwrap();
    let labels = r#"{model_name="sundial",engine="0"}"#;
    for line in [
        format!("vllm:generation_tokens_total{labels} 5"),
        format!("vllm:prompt_tokens_total{labels} 2"),
        format!("vllm:time_to_first_token_seconds_count{labels} 1"),
        format!("vllm:inter_token_latency_seconds_count{labels} 4"),
        r#"vllm:request_success_total{model_name="sundial",engine="0",finished_reason="length"} 1"#.into(),
        r#"heliostat:http_responses_total{model_name="sundial",code="200"} 1"#.into(),
    ] {
        assert!(text.contains(&format!("\n{line}\n")), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_up_the_stop() {
    let rig = Rig::start(Options::default());
    let mut idle = TcpStream::connect(rig.url.strip_prefix("http://").unwrap()).await.unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
    idle.read_exact(&mut [0; 64]).await.unwrap();
    let began = Instant::now();
    rig.join();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

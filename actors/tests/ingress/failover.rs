//! A rank is lost while it generates: its streams go on at another, or wait for its next incarnation, token for token.

use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_actors::ingress::dispatch::DispatchConfig;
use serde_json::{Value as Json, json};

use crate::rig::{Options, Rig};

const PATH: &str = "/v1/completions";
const TOKENS: u32 = 300;

fn body(prompt: &str, temperature: f32) -> Json {
    json!({"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": true, "temperature": temperature, "seed": 3, "logprobs": 0})
}

/// Text, token log-probabilities and usage of a streamed answer.
fn content(events: &[Json]) -> (String, Vec<f64>) {
    let choices = || events.iter().map(|event| &event["choices"][0]);
    let text = choices().map(|choice| choice["text"].as_str().unwrap()).collect();
    let logprobs = choices().filter_map(|choice| choice["logprobs"]["token_logprobs"].as_array()).flatten();
    (text, logprobs.map(|logprob| logprob.as_f64().unwrap()).collect())
}

#[tokio::test]
async fn streams_of_a_lost_rank_go_on_elsewhere_without_a_gap() {
    let rig = Rig::start(Options { ranks: 2, ..Options::default() });
    let prompts = ["The Vec type", "fn main() {", "SELECT * FROM", "In Python, a list"];
    let temperature = |index: usize| (index % 2) as f32;
    let mut expected = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        expected.push(content(&rig.stream(PATH, body(prompt, temperature(index))).await));
    }
    let streams =
        prompts.iter().enumerate().map(|(index, prompt)| rig.stream(PATH, body(prompt, temperature(index))));
    let streams = futures_util::future::join_all(streams);
    let kill = async {
        while rig.stats(1).running < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Between two steps, so that exactly its two streams are lost.
        rig.paused.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(30)).await;
        rig.kill_rank(1);
        rig.paused.store(false, Ordering::Relaxed);
    };
    let (streams, ()) = tokio::join!(streams, kill);
    let got: Vec<_> = streams.iter().map(|events| content(events)).collect();
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(got.1.len(), TOKENS as usize);
        assert_eq!(got, expected);
    }
    let metrics = rig.ingress.metrics().render();
    assert!(metrics.contains(r#"heliostat:sequences_moved_total{model_name="sundial"} 2"#), "{metrics}");
}

#[tokio::test]
async fn the_only_rank_comes_back_or_its_streams_get_an_error() {
    let dispatch = DispatchConfig { park_timeout: Duration::from_millis(1500), ..DispatchConfig::default() };
    let rig = Rig::start(Options { dispatch, ..Options::default() });
    let expected = content(&rig.stream(PATH, body("The Vec type", 0.0)).await);
    let run = async |back: bool| {
        let mut request = body("The Vec type", 0.0);
        request["stream"] = json!(true);
        let response = rig.post(PATH, request).await;
        rig.kill_rank(0);
        if back {
            tokio::time::sleep(Duration::from_millis(200)).await;
            rig.start_rank(0);
        }
        response.text().await.unwrap()
    };
    let healed = run(true).await;
    assert_eq!(content(&crate::rig::events(&healed)), expected);
    let failed = run(false).await;
    let last = failed.trim_end().rsplit("\n\n").next().unwrap().strip_prefix("data: ").unwrap();
    let error: Json = serde_json::from_str(last).unwrap();
    assert_eq!(error["error"]["code"], "rank_lost");
    assert!(error["error"]["message"].as_str().unwrap().contains("rank 0 is starting"));
}

//! Wrong requests, and requests at the wrong time: the status, OpenAI's shape, the field that is wrong.

use std::sync::atomic::Ordering;
use std::time::Duration;

use heliostat_actors::http::{ApiKeys, Bounds};
use heliostat_actors::ingress::dispatch::DispatchConfig;
use heliostat_actors::ingress::engine::Admission;
use heliostat_actors::ingress::server::HttpConfig;
use heliostat_actors::serve::target::Backpressure;
use serde_json::{Value as Json, json};

use crate::rig::{Options, Rig, shared};

async fn error(response: reqwest::Response) -> (u16, Json) {
    let status = response.status().as_u16();
    let body: Json = response.json().await.unwrap();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("no error: {body}"));
    let keys: Vec<&str> = error.keys().map(String::as_str).collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    (status, body["error"].clone())
}

/// Posts `base` with the fields of `change` and expects a 400 that names `param` and says `part`.
async fn refused(path: &str, base: &Json, change: Json, param: &str, part: &str) {
    let mut body = base.clone();
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    let (status, error) = error(shared().post(path, body).await).await;
    let message = error["message"].as_str().unwrap();
    assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{change}: {error}");
    assert!(message.contains(part), "{message}");
    assert_eq!(error["type"], "invalid_request_error");
}

#[tokio::test]
async fn each_wrong_field_is_named() {
    let base = json!({"model": "sundial", "prompt": "The"});
    let long = vec![json!(300); 2100];
    for (change, param, part) in [
        (json!({"temperature": -1}), "temperature", "between 0 and 2"),
        (json!({"temperature": "hot"}), "temperature", "invalid type"),
        (json!({"top_p": 0}), "top_p", "above 0"),
        (json!({"top_k": -2}), "top_k", "-1, 0 or positive"),
        (json!({"n": 0}), "n", "between 1 and 128"),
        (json!({"best_of": 3, "n": 4}), "best_of", "between `n`, 4, and 128"),
        (json!({"best_of": 3, "stream": true}), "best_of", "known at the end"),
        (json!({"suffix": "end"}), "suffix", "not supported"),
        (json!({"logprobs": 21}), "logprobs", "between 0 and 20"),
        (json!({"logit_bias": {"9999": 1}}), "logit_bias", "below 4096"),
        (json!({"stop": ["a", ""]}), "stop", "empty string"),
        (json!({"stop": 5}), "stop", "a string or an array"),
        (json!({"stop_token_ids": [5000]}), "stop_token_ids", "below 4096"),
        (json!({"min_tokens": 40}), "min_tokens", "at most 16"),
        (json!({"max_tokens": 0}), "max_tokens", "at least 1"),
        (json!({"max_tokens": -5}), "max_tokens", "invalid value"),
        (
            json!({"max_tokens": 2047}),
            "max_tokens",
            "maximum context length is 2048 tokens. However, you requested 2049",
        ),
        (
            json!({"prompt": long}),
            "prompt",
            "maximum context length is 2048 tokens. However, your prompt has 2100",
        ),
        (json!({"prompt": "x".repeat(200_000)}), "prompt", "However, your prompt has at least"),
        (
            json!({"n": 128, "prompt": ["a", "b", "c", "d", "e"]}),
            "n",
            "640 sequences, but the queues hold 512",
        ),
        (json!({"prompt": [1, "a"]}), "prompt", "must be a string"),
        (json!({"prompt": []}), "prompt", "empty"),
        (json!({"prompt": [4096]}), "prompt", "below 4096"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "only allowed"),
        (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs", "not available"),
        (json!({"guided_json": {"type": "nothing"}}), "guided_json", "cannot be followed"),
        (json!({"guided_regex": "("}), "guided_regex", "cannot be followed"),
        (json!({"guided_grammar": "root ::= \"a\""}), "guided_grammar", "in GBNF"),
        (json!({"guided_choice": []}), "guided_choice", "between 1 and"),
        (json!({"guided_regex": "a", "guided_choice": ["b"]}), "guided_choice", "Only one grammar"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format", "has no `schema`"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "unknown variant"),
    ] {
        refused("/v1/completions", &base, change, param, part).await;
    }
    let base = json!({"model": "sundial", "messages": [{"role": "user", "content": "Hi"}]});
    let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
    for (change, param, part) in [
        (json!({"tools": [{"type": "function"}]}), "tools[0].function.name", "must be 1 to 64"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0]", "only functions"),
        (json!({"functions": [{"name": "f"}]}), "functions", "Use `tools`"),
        (json!({"tool_choice": "required"}), "tool_choice", "`tools` is empty"),
        (json!({"top_logprobs": 2}), "top_logprobs", "`logprobs` is true"),
        (json!({"messages": []}), "messages", "0 messages"),
        (json!({"messages": [{"role": "king", "content": ""}]}), "messages[0].role", "`king`"),
        (json!({"messages": [{"role": "user", "content": image}]}), "messages[0].content[0]", "only text"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "must be a string"),
        (json!({"messages": "Hi"}), "messages", "invalid type"),
        (json!({"max_completion_tokens": 4000}), "max_completion_tokens", "2048"),
    ] {
        refused("/v1/chat/completions", &base, change, param, part).await;
    }
    let none = error(shared().post("/v1/completions", json!({})).await).await;
    assert_eq!((none.0, none.1["param"].as_str()), (400, Some("prompt")));
}

#[tokio::test]
async fn fields_that_ask_for_nothing_pass() {
    let body = json!({"prompt": "The", "max_tokens": 1, "suffix": null, "best_of": 1, "user": "me", "unheard_of": {"a": 1},
        "response_format": {"type": "text"}, "guided_json": null, "logit_bias": null, "stop": null});
    shared().ask("/v1/completions", body).await;
    let body = json!({"messages": [{"role": "user", "content": "Hi", "name": "Al"}], "max_tokens": 1, "tools": [],
        "tool_choice": "auto", "modalities": ["text"], "store": false, "metadata": {}, "parallel_tool_calls": true});
    shared().ask("/v1/chat/completions", body).await;
}

#[tokio::test]
async fn models_routes_methods_and_bodies() {
    let rig = shared();
    let (status, wrong) =
        error(rig.post("/v1/completions", json!({"model": "gpt", "prompt": "x"})).await).await;
    assert_eq!((status, &wrong["code"], &wrong["param"]), (404, &json!("model_not_found"), &json!("model")));
    let get = |path: &str| rig.http.get(format!("{}{path}", rig.url)).send();
    let (status, unknown) = error(get("/v1/nothing").await.unwrap()).await;
    assert_eq!((status, &unknown["message"]), (404, &json!("There is no `GET /v1/nothing`.")));
    assert_eq!(error(get("/v1/completions").await.unwrap()).await.0, 405);
    assert_eq!(error(get("/v1/models/other").await.unwrap()).await.0, 404);

    let models: Json = get("/v1/models").await.unwrap().json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "sundial");
    assert_eq!(models["data"][0]["max_model_len"], 2048);
    let one: Json = get("/v1/models/sundial/20m").await.unwrap().json().await.unwrap();
    assert_eq!(one["id"], "sundial/20m");
    assert_eq!(get("/extra").await.unwrap().text().await.unwrap(), "extra");

    let post = |body: String, kind: &str| {
        rig.http.post(format!("{}/v1/completions", rig.url)).header("content-type", kind).body(body).send()
    };
    assert_eq!(error(post("{".into(), "application/json").await.unwrap()).await.0, 400);
    assert_eq!(error(post("[]".into(), "application/json; charset=utf-8").await.unwrap()).await.0, 400);
    assert_eq!(error(post("{}".into(), "text/plain").await.unwrap()).await.0, 415);
    let large = json!({"prompt": "x".repeat(300 << 10)}).to_string();
    assert_eq!(error(post(large, "application/json").await.unwrap()).await.0, 413);
    let long = json!({"prompt": "long ".repeat(20 << 10)}).to_string();
    let (status, long) = error(post(long, "application/json").await.unwrap()).await;
    assert_eq!((status, &long["code"]), (400, &json!("context_length_exceeded")));
}

#[tokio::test]
async fn the_name_of_a_request_comes_back() {
    let rig = shared();
    let post = |name: Option<&str>| {
        let request = rig.http.post(format!("{}/v1/completions", rig.url));
        let request = request.json(&json!({"prompt": "The", "max_tokens": 1}));
        name.into_iter().fold(request, |request, name| request.header("x-request-id", name)).send()
    };
    let named = post(Some("my-request")).await.unwrap();
    assert_eq!(named.headers()["x-request-id"], "my-request");
    assert_eq!(named.json::<Json>().await.unwrap()["id"], "cmpl-my-request");
    assert_eq!(post(None).await.unwrap().headers()["x-request-id"].len(), 32);
}

#[tokio::test]
async fn a_rank_can_be_named() {
    let rig = shared();
    let post = |rank: &str| {
        let request =
            rig.http.post(format!("{}/v1/completions", rig.url)).header("X-data-parallel-rank", rank);
        request.json(&json!({"prompt": "The", "max_tokens": 1})).send()
    };
    assert_eq!(post("1").await.unwrap().status(), 200);
    let (status, error_2) = error(post("2").await.unwrap()).await;
    assert_eq!((status, &error_2["param"]), (400, &json!("X-data-parallel-rank")));
    assert_eq!(error(post("one").await.unwrap()).await.0, 400);
}

#[tokio::test]
async fn until_a_rank_is_ready_requests_are_told_what_is_missing() {
    let rig = Rig::start_without_ranks(Options::default());
    let health = || rig.http.get(format!("{}/health", rig.url)).send();
    let response = rig.post("/v1/completions", json!({"prompt": "The"})).await;
    assert_eq!(response.headers()["retry-after"], "5");
    let (status, missing) = error(response).await;
    assert_eq!((status, &missing["type"]), (503, &json!("server_error")));
    assert!(missing["message"].as_str().unwrap().contains("rank 0 is starting"), "{missing}");
    let (status, unhealthy) = error(health().await.unwrap()).await;
    assert_eq!(status, 503);
    assert!(unhealthy["message"].as_str().unwrap().contains("rank 0 is starting"));
    rig.start_rank(0);
    assert_eq!(health().await.unwrap().status(), 200);
    rig.ask("/v1/completions", json!({"prompt": "The"})).await;
}

#[tokio::test]
async fn full_queues_and_mailboxes_answer_429() {
    let dispatch = DispatchConfig { queue_max: 4, ..DispatchConfig::default() };
    let rig = Rig::start(Options { dispatch, ..Options::default() });
    rig.paused.store(true, Ordering::Relaxed);
    let body = json!({"prompt": "The", "n": 4, "max_tokens": 2});
    let waiting = rig.http.post(format!("{}/v1/completions", rig.url)).json(&body).send();
    let waiting = tokio::spawn(waiting);
    while !rig.ingress.metrics().render().contains("sequences_in_flight{model_name=\"sundial\"} 4") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let response = rig.post("/v1/completions", json!({"prompt": "The"})).await;
    assert_eq!(response.headers()["retry-after"], "1");
    let (status, full) = error(response).await;
    assert_eq!(
        (status, &full["type"], &full["code"]),
        (429, &json!("rate_limit_error"), &json!("queue_full"))
    );
    // As the deployment has it.
    let backpressure = Some(Backpressure { status_code: 503, retry_after_s: Some(7) });
    rig.ingress.set_admission(Admission { backpressure, ..Admission::default() });
    let response = rig.post("/v1/completions", json!({"prompt": "The"})).await;
    assert_eq!(response.headers()["retry-after"], "7");
    let (status, full) = error(response).await;
    assert_eq!((status, &full["type"], &full["code"]), (503, &json!("server_error"), &json!("queue_full")));
    rig.ingress.set_admission(Admission::default());
    rig.paused.store(false, Ordering::Relaxed);
    assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    rig.idle(Duration::from_secs(5)).await;

    rig.mailbox_full.store(true, Ordering::Relaxed);
    assert_eq!(error(rig.post("/v1/completions", json!({"prompt": "The"})).await).await.0, 429);
    rig.mailbox_full.store(false, Ordering::Relaxed);
    rig.ask("/v1/completions", json!({"prompt": "The"})).await;
}

#[tokio::test]
async fn a_request_that_takes_too_long_ends() {
    let bounds = Bounds { request_timeout: Some(Duration::from_millis(300)), ..Bounds::default() };
    let http = HttpConfig { bounds, ..Options::default().http };
    let rig = Rig::start(Options { http, ..Options::default() });
    rig.ask("/v1/completions", json!({"prompt": "The", "max_tokens": 1})).await;
    let long = json!({"prompt": "The", "max_tokens": 2000, "ignore_eos": true});
    let (status, late) = error(rig.post("/v1/completions", long.clone()).await).await;
    assert_eq!((status, &late["code"]), (408, &json!("request_timeout")), "{late}");
    assert!(late["message"].as_str().unwrap().contains("within 0.3 s"), "{late}");
    let mut streamed = long;
    streamed["stream"] = json!(true);
    let text = rig.post("/v1/completions", streamed).await.text().await.unwrap();
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    let last: Json = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "request_timeout");
    // What nobody waits for is not generated.
    rig.idle(Duration::from_secs(10)).await;
}

/// One with a key of its own gets its turn, and its part of the queue, while another has queued all it could.
#[tokio::test]
async fn a_client_that_queues_much_does_not_shut_another_out() {
    let dispatch = DispatchConfig { queue_max: 48, ..DispatchConfig::default() };
    let http = HttpConfig { keys: ApiKeys::new(["greedy", "modest"]), ..Options::default().http };
    let rig = Rig::start(Options { dispatch, http, ..Options::default() });
    rig.paused.store(true, Ordering::Relaxed);
    let post = |key: &str, body: Json| {
        rig.http.post(format!("{}/v1/completions", rig.url)).bearer_auth(key).json(&body).send()
    };
    let long = json!({"prompt": "The", "n": 48, "max_tokens": 100, "ignore_eos": true});
    let greedy = tokio::spawn(post("greedy", long));
    let queued = |count: &str| format!("sequences_in_flight{{model_name=\"sundial\"}} {count}\n");
    while !rig.ingress.metrics().render().contains(&queued("48")) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let short = json!({"prompt": "fn", "max_tokens": 2});
    assert_eq!(post("modest", short.clone()).await.unwrap().status(), 429, "the queue is full");
    rig.paused.store(false, Ordering::Relaxed);
    // 16 run at a time: there is room as soon as they have left the queue, and its turn comes before the other's rest.
    let modest = loop {
        let response = post("modest", short.clone()).await.unwrap();
        if response.status() == 200 {
            break response;
        }
        assert_eq!(response.status(), 429);
    };
    assert_eq!(modest.json::<Json>().await.unwrap()["usage"]["completion_tokens"], 2);
    assert!(!greedy.is_finished(), "it was served after all of the other's");
    assert_eq!(greedy.await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn a_key_is_asked_of_all_but_health() {
    let http = HttpConfig { keys: ApiKeys::new(["sesame"]), ..Options::default().http };
    let rig = Rig::start(Options { http, ..Options::default() });
    let get = |path: &str, key: &str| rig.http.get(format!("{}{path}", rig.url)).bearer_auth(key).send();
    assert_eq!(get("/v1/models", "sesame").await.unwrap().status(), 200);
    for (path, key) in [("/v1/models", "sesam"), ("/metrics", ""), ("/extra", "sesame2")] {
        assert_eq!(error(get(path, key).await.unwrap()).await.0, 401);
    }
    assert_eq!(get("/health", "").await.unwrap().status(), 200);
}

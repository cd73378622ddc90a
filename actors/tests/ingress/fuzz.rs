//! Whatever bytes and fields come: an answer in OpenAI's shape or a closed connection, and a server that serves on.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::{Map, Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::rig::{Options, Rig};

/// Fields that any endpoint reads or refuses.
const FIELDS: &str = "model prompt messages input max_tokens max_completion_tokens max_output_tokens temperature top_p \
    top_k min_p n best_of seed stop stop_token_ids logprobs top_logprobs prompt_logprobs logit_bias echo suffix stream \
    stream_options tools tool_choice parallel_tool_calls response_format structured_outputs guided_json guided_regex \
    guided_choice guided_grammar text instructions priority min_tokens ignore_eos presence_penalty frequency_penalty \
    repetition_penalty skip_special_tokens add_special_tokens add_generation_prompt chat_template_kwargs tokens \
    return_token_strs use_beam_search allowed_token_ids previous_response_id user metadata";
/// Words that fields give a meaning to, beside any others.
const WORDS: &str = "user assistant system tool function auto none required text json_object json_schema regex grammar \
    role content name type arguments parameters tool_calls tool_call_id schema properties string object items enum \
    image_url sundial include_usage continuous_usage_stats id format choice pattern $ref anyOf additionalProperties";
const PATHS: [&str; 5] =
    ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"];

/// A rig whose ranks take nothing: what is right is answered by 429.
fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| {
        let rig = Rig::start(Options::default());
        rig.mailbox_full.store(true, Ordering::Relaxed);
        rig
    })
}

fn word(of: &'static str) -> impl Strategy<Value = String> {
    prop::sample::select(of.split_whitespace().collect::<Vec<_>>()).prop_map(str::to_owned)
}

fn any_json() -> impl Strategy<Value = Json> {
    let text = prop_oneof![word(WORDS), any::<String>(), "[\\PC\\n<>{}\\[\\]|:\"]{0,40}"];
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        (-5i64..300).prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        text.clone().prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        let key = prop_oneof![3 => word(WORDS), 1 => any::<String>()];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Json::from),
            prop::collection::vec((key, inner), 0..6)
                .prop_map(|pairs| Json::Object(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// A body that would be right, with some fields replaced.
fn any_body() -> impl Strategy<Value = (&'static str, Json)> {
    let changes = prop::collection::vec((word(FIELDS), any_json()), 0..4);
    (prop::sample::select(PATHS.to_vec()), changes).prop_map(|(path, changes)| {
        let mut body = match path {
            "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "Hi"}]}),
            "/v1/responses" => json!({"input": "Hi"}),
            "/detokenize" => json!({"tokens": [1, 2]}),
            _ => json!({"prompt": "Hi"}),
        };
        body.as_object_mut().expect("an object").extend(changes);
        (path, body)
    })
}

/// Posts a text and returns the status with the answer, which must be JSON: of an error, OpenAI's.
async fn answer(rig: &Rig, path: &str, text: Vec<u8>) -> Result<u16, TestCaseError> {
    let post =
        rig.http.post(format!("{}{path}", rig.url)).header("content-type", "application/json").body(text);
    let response = post.send().await.map_err(|why| TestCaseError::fail(format!("no answer: {why}")))?;
    let status = response.status().as_u16();
    let body: Json =
        response.json().await.map_err(|why| TestCaseError::fail(format!("{status} without JSON: {why}")))?;
    if status != 200 {
        let message = body["error"]["message"].as_str().unwrap_or_default();
        prop_assert!(!message.is_empty() && body["error"]["type"].is_string(), "{status}: {body}");
    }
    Ok(status)
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// Runs `case` on inputs that come from proptest, in a runtime of its own.
fn fuzz<S: Strategy>(cases: u32, inputs: S, case: impl AsyncFn(S::Value) -> Result<(), TestCaseError>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runner(cases).run(&inputs, |input| runtime.block_on(case(input))).unwrap();
}

#[test]
fn any_fields_are_answered_by_name_or_taken() {
    fuzz(1500, any_body(), async |(path, body)| {
        let status = answer(rig(), path, body.to_string().into_bytes()).await?;
        prop_assert!([200, 400, 404, 429].contains(&status), "{status} for {body}");
        Ok(())
    });
}

#[test]
fn broken_json_is_answered() {
    let cut = (any_body(), any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>());
    fuzz(500, cut, async |((path, body), at, end, byte)| {
        let mut text = body.to_string().into_bytes();
        let position = at.index(text.len());
        text[position] = byte;
        text.truncate(end.index(text.len()) + 1);
        let status = answer(rig(), path, text).await?;
        prop_assert!([200, 400, 404, 429].contains(&status), "{status}");
        Ok(())
    });
}

#[test]
fn nesting_without_end_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{{\"prompt\":{}1{}}}", open.repeat(30_000), close.repeat(30_000));
            assert_eq!(answer(rig(), "/v1/completions", deep.into_bytes()).await.unwrap(), 400);
        }
        let schema =
            (0..90).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}));
        let body = json!({"prompt": "Hi", "guided_json": schema});
        let status = answer(rig(), "/v1/completions", body.to_string().into_bytes()).await.unwrap();
        assert!([400, 429].contains(&status), "{status}");
    });
}

/// Pieces of requests, and what is none.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "POST /v1/completions HTTP/1.1\r\n",
            "GET /health HTTP/1.1\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "host: a\r\n",
            "content-type: application/json\r\n",
            "content-length: 20\r\n",
            "content-length: 99999999999999999999\r\n",
            "content-length: -1\r\n",
            "transfer-encoding: chunked\r\n",
            "expect: 100-continue\r\n",
            "X-data-parallel-rank: 18446744073709551616\r\n",
            "x-request-id: \u{7f}\r\n",
            "authorization: Bearer \r\n",
            "upgrade: websocket\r\nconnection: upgrade\r\n",
            "\r\n",
            "\r\n\r\n",
            "5\r\n{\"a\":\r\n",
            "ffffffffffffffff\r\n",
            "0\r\n\r\n",
            "{\"prompt\":\"a\"}",
            "\0",
            "\u{16}\u{3}\u{1}",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..30),
    ];
    prop::collection::vec(piece, 1..12).prop_map(|pieces| pieces.concat())
}

#[test]
fn any_bytes_on_a_connection_leave_the_server_serving() {
    fuzz(400, any_bytes(), async |bytes| {
        let rig = rig();
        let mut socket = TcpStream::connect(rig.url.strip_prefix("http://").unwrap()).await.unwrap();
        // The server may close before it has read all.
        let _ = socket.write_all(&bytes).await;
        let _ = socket.shutdown().await;
        let mut said = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), socket.read_to_end(&mut said)).await;
        prop_assert!(read.is_ok(), "the connection stays open after its end");
        let said = String::from_utf8_lossy(&said);
        prop_assert!(said.is_empty() || said.starts_with("HTTP/1."), "{said}");
        let health = rig.http.get(format!("{}/health", rig.url)).send().await;
        prop_assert!(health.is_ok_and(|response| response.status() == 200));
        Ok(())
    });
}

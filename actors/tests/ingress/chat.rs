//! `/v1/chat/completions`.

use serde_json::{Value as Json, json};

use crate::rig::{reference, shared};

const PATH: &str = "/v1/chat/completions";

fn ask(content: Json) -> Json {
    json!({"model": "sundial", "messages": [{"role": "user", "content": content}], "max_tokens": 32, "ignore_eos": true})
}

#[tokio::test]
async fn greedy_answers_are_transformers() {
    for prompt in reference("chat") {
        let answer = shared().ask(PATH, ask(prompt["prompt"].clone())).await;
        assert_eq!(answer["object"], "chat.completion");
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], prompt["greedy_text"]);
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(answer["usage"]["prompt_tokens"], prompt["prompt_ids"].as_array().unwrap().len());
        let parts = json!([{"type": "text", "text": prompt["prompt"]}]);
        assert_eq!(shared().ask(PATH, ask(parts)).await["choices"][0]["message"], choice["message"]);
    }
}

#[tokio::test]
async fn a_stream_is_the_role_then_text_then_the_reason_then_the_usage() {
    let prompt = &reference("chat")[0];
    let mut body = ask(prompt["prompt"].clone());
    body["n"] = json!(2);
    body["stream_options"] = json!({"include_usage": true});
    let events = shared().stream(PATH, body).await;
    let (usage, chunks) = events.split_last().unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 64);
    assert!(
        chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["usage"].is_null())
    );
    for index in 0..2 {
        let of_index = |chunk: &&Json| chunk["choices"][0]["index"] == index;
        let deltas: Vec<&Json> = chunks.iter().filter(of_index).map(|chunk| &chunk["choices"][0]).collect();
        let (first, last) = (deltas[0], deltas[deltas.len() - 1]);
        assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
        let text: String = deltas[1..deltas.len() - 1]
            .iter()
            .map(|delta| delta["delta"]["content"].as_str().unwrap())
            .collect();
        assert_eq!(prompt["greedy_text"], text);
        assert!(deltas[..deltas.len() - 1].iter().all(|delta| delta["finish_reason"].is_null()));
    }
}

#[tokio::test]
async fn log_probabilities_cover_the_text_byte_by_byte() {
    let mut body = ask(json!("Explain ownership in Rust."));
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(3);
    let answer = shared().ask(PATH, body.clone()).await;
    let choice = &answer["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 32);
    let bytes = |entry: &Json| -> Vec<u8> { serde_json::from_value(entry["bytes"].clone()).unwrap() };
    let joined: Vec<u8> = entries.iter().flat_map(bytes).collect();
    assert_eq!(String::from_utf8_lossy(&joined), choice["message"]["content"].as_str().unwrap());
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"]), (3, &entry["token"]), "greedy draws the best");
        assert_eq!(top[0]["logprob"], entry["logprob"]);
    }
    let streamed = shared().stream(PATH, body).await;
    let contents = streamed.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(contents.flatten().cloned().collect::<Vec<_>>(), *entries);
}

#[tokio::test]
async fn without_a_limit_it_answers_until_it_stops_or_generation_config_says() {
    let body = json!({"messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is VACUUM in PostgreSQL?"},
    ]});
    let answer = shared().ask(PATH, body).await;
    let (choice, usage) = (&answer["choices"][0], &answer["usage"]);
    match choice["finish_reason"].as_str().unwrap() {
        "stop" => {
            assert!(choice["stop_reason"].is_null(), "the model's own end is no reason of the client's")
        }
        "length" => assert_eq!(usage["completion_tokens"], 256),
        other => panic!("{other}"),
    }
    assert!(!choice["message"]["content"].as_str().unwrap().contains("<|"));
}

#[tokio::test]
async fn the_usage_comes_with_every_chunk_where_it_is_wanted() {
    let mut body = ask(json!("What is a Vec?"));
    body["max_tokens"] = json!(6);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = shared().stream(PATH, body.clone()).await;
    let counts: Vec<u64> =
        events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&6) && counts[0] < 6, "{counts:?}");
    body["stream_options"] = json!({"continuous_usage_stats": true});
    assert!(shared().stream(PATH, body).await.iter().all(|event| event.get("usage").is_none()));
}

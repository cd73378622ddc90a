//! Answers that must follow a grammar, and the best of several.

use serde_json::{Value as Json, json};

use crate::rig::shared;

async fn completion(change: Json) -> Json {
    let mut body = json!({"prompt": "The answer is", "max_tokens": 500, "temperature": 1.0, "seed": 5});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    shared().ask("/v1/completions", body).await["choices"][0].clone()
}

fn person() -> Json {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    })
}

fn assert_person(text: &str) {
    let person: Json = serde_json::from_str(text).unwrap_or_else(|why| panic!("{text:?}: {why}"));
    let keys: Vec<&String> = person.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["name", "age", "kind"]);
    assert!(person["age"].as_u64().unwrap() <= 150 && person["name"].is_string(), "{text}");
    assert!(["cat", "dog"].contains(&person["kind"].as_str().unwrap()), "{text}");
}

#[tokio::test]
async fn every_way_to_ask_for_a_grammar_is_followed() {
    for seed in 0..4 {
        let schema =
            json!({"type": "json_schema", "json_schema": {"name": "p", "strict": true, "schema": person()}});
        let choice = completion(json!({"response_format": schema, "seed": seed})).await;
        assert_person(choice["text"].as_str().unwrap());
        // The end of the grammar is the end of the text: no token is spent on saying so.
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &Json::Null));
    }
    for field in ["guided_json", "structured_outputs"] {
        let value = if field == "guided_json" { person() } else { json!({"json": person()}) };
        assert_person(completion(json!({field: value})).await["text"].as_str().unwrap());
    }
    let regex = completion(json!({"response_format": {"type": "regex", "regex": "[0-9]{3}-[a-f]{2}"}})).await;
    let text = regex["text"].as_str().unwrap();
    assert!(text.len() == 6 && text.as_bytes()[3] == b'-' && text[..3].parse::<u32>().is_ok(), "{text}");
    let choice = completion(json!({"structured_outputs": {"choice": ["yes, \"sir\"", "no"]}})).await;
    assert!(["yes, \"sir\"", "no"].contains(&choice["text"].as_str().unwrap()), "{choice}");
    let lark = json!({"type": "grammar", "grammar": "start: \"<\" WORD \">\"\nWORD: /[a-z]{1,5}/"});
    let text = completion(json!({"response_format": lark})).await["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with('<') && text.ends_with('>') && text.len() <= 7, "{text}");
    let object = completion(json!({"response_format": {"type": "json_object"}, "max_tokens": 900})).await;
    assert!(object["text"].as_str().unwrap().starts_with('{'), "{object}");
}

#[tokio::test]
async fn a_chat_streams_under_a_grammar() {
    let schema = json!({"type": "json_schema", "json_schema": {"name": "p", "schema": person()}});
    let body = json!({"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 500, "seed": 3,
        "response_format": schema, "n": 2, "logprobs": true});
    let events = shared().stream("/v1/chat/completions", body).await;
    for index in 0..2 {
        let of_choice =
            events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        let text: String = of_choice.filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_person(&text);
    }
}

#[tokio::test]
async fn the_best_are_the_likeliest() {
    let all = json!({"prompt": "The", "max_tokens": 6, "seed": 7, "n": 4, "logprobs": 0, "ignore_eos": true});
    let all = shared().ask("/v1/completions", all).await;
    let mean = |choice: &Json| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs.iter().map(|logprob| logprob.as_f64().unwrap()).sum::<f64>() / logprobs.len() as f64
    };
    let mut ranked: Vec<&Json> = all["choices"].as_array().unwrap().iter().collect();
    ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = json!({"prompt": ["The", "The"], "max_tokens": 6, "seed": 7, "n": 2, "best_of": 4, "ignore_eos": true});
    let best = shared().ask("/v1/completions", best).await;
    for (index, choice) in best["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &ranked[index % 2]["text"]));
        assert_eq!(choice["logprobs"], Json::Null);
    }
    assert_eq!(best["choices"].as_array().unwrap().len(), 4);
    assert_eq!(best["usage"]["completion_tokens"], 2 * 4 * 6);
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let info = shared().http.get(format!("{}/tokenizer_info", shared().url)).send().await.unwrap();
    let info: Json = info.json().await.unwrap();
    assert_eq!(info["eos_token"], "<|end_of_sentence|>");
    assert!(info["chat_template"].as_str().unwrap().contains("messages"));
    let tokens = shared().ask("/tokenize", json!({"prompt": "The sun", "return_token_strs": true})).await;
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["token_strs"][1], "The");
    assert_eq!(tokens["max_model_len"], 2048);
    let text = shared().ask("/detokenize", json!({"tokens": tokens["tokens"]})).await;
    assert_eq!(text["prompt"], "<|begin_of_sentence|>The sun");
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let chat = shared().ask("/tokenize", chat).await;
    let text = shared().ask("/detokenize", json!({"tokens": chat["tokens"]})).await;
    assert_eq!(text["prompt"], "<|begin_of_sentence|><|user|>Hi<|assistant|>");
    let refused = shared().post("/v1/embeddings", json!({"input": "x"})).await;
    assert_eq!(refused.status(), 400);
}

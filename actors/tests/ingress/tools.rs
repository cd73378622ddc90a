//! Tools: calls that are required, named or chosen, in one piece and streamed, and their results in the conversation.

use serde_json::{Value as Json, json};

use crate::rig::shared;

fn tools() -> Json {
    let tool = |name: &str, parameters: Json| json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}});
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"],
        "additionalProperties": false});
    let add = json!({"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["a"], "additionalProperties": false});
    json!([tool("get_weather", city), tool("add", add)])
}

fn body(change: Json) -> Json {
    let mut body = json!({"messages": [{"role": "user", "content": "Weather?"}], "tools": tools(), "max_tokens": 120,
        "seed": 1});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

fn check(call: &Json) {
    let arguments: Json = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    match call["function"]["name"].as_str().unwrap() {
        "get_weather" => assert!(["Bern", "Rome"].contains(&arguments["city"].as_str().unwrap())),
        "add" => assert!(arguments["a"].as_u64().unwrap() <= 9),
        other => panic!("{other}"),
    }
    assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
    assert_eq!(call["type"], "function");
}

#[tokio::test]
async fn a_required_call_is_made() {
    for seed in 0..4 {
        let change = json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": seed});
        let answer = shared().ask("/v1/chat/completions", body(change)).await;
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &Json::Null)
        );
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), 1);
        check(&calls[0]);
    }
}

#[tokio::test]
async fn a_named_function_is_called_piece_by_piece() {
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    let events = shared().stream("/v1/chat/completions", body(json!({"tool_choice": named}))).await;
    let deltas =
        events.iter().map(|event| &event["choices"][0]["delta"]["tool_calls"][0]).filter(|d| !d.is_null());
    let deltas: Vec<&Json> = deltas.collect();
    assert!(deltas.len() > 2 && deltas.iter().all(|delta| delta["index"] == 0), "{deltas:?}");
    assert_eq!(deltas[0]["function"], json!({"name": "get_weather", "arguments": ""}));
    let arguments: String =
        deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
    check(
        &json!({"id": deltas[0]["id"], "type": "function", "function": {"name": "get_weather", "arguments": arguments}}),
    );
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn what_the_model_writes_as_a_call_is_one() {
    // The model is too small to call by itself: a grammar makes it write what its template teaches.
    let regex = r#"Wait\. <tool_call>\{"name": "add", "arguments": \{"a": [0-9]\}\}</tool_call>"#;
    let format = json!({"response_format": {"type": "regex", "regex": regex}, "logprobs": true});
    let answer = shared().ask("/v1/chat/completions", body(format.clone())).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"], "Wait. ");
    check(&message["tool_calls"][0]);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    let events = shared().stream("/v1/chat/completions", body(format)).await;
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "Wait. ");
    let logprobs = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert!(logprobs.flatten().count() > 10);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn calls_and_their_results_go_into_the_prompt() {
    let call =
        json!({"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 4}"}});
    let messages = json!([
        {"role": "user", "content": "4?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "five"},
    ]);
    let tokens = shared().ask("/tokenize", json!({"messages": messages, "tools": tools()})).await;
    let text = shared().ask("/detokenize", json!({"tokens": tokens["tokens"]})).await;
    let text = text["prompt"].as_str().unwrap();
    let part = "<|assistant|><tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 4}}</tool_call><|end_of_sentence|>\
        <tool_response>five</tool_response>\n<|assistant|>";
    assert!(text.ends_with(part), "{text}");
    assert!(
        text.contains("{\"name\": \"get_weather\", \"description\": \"d\", \"parameters\": {\"type\""),
        "{text}"
    );
}

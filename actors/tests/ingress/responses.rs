//! OpenAI's responses API.

use serde_json::{Value as Json, json};

use crate::rig::shared;

async fn greedy(messages: Json, tokens: u32) -> String {
    let body = json!({"messages": messages, "max_tokens": tokens, "temperature": 0});
    let answer = shared().ask("/v1/chat/completions", body).await;
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_response_is_what_chat_says() {
    let expected =
        greedy(json!([{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]), 7).await;
    let body = json!({"model": "sundial", "instructions": "Be.", "input": "Hi", "max_output_tokens": 7, "temperature": 0,
        "metadata": {"a": "b"}, "store": false});
    let answer = shared().ask("/v1/responses", body.clone()).await;
    assert_eq!(answer["output"][0]["content"][0]["text"], expected.as_str());
    assert_eq!((&answer["status"], &answer["object"]), (&json!("incomplete"), &json!("response")));
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!((&answer["usage"]["output_tokens"], &answer["metadata"]["a"]), (&json!(7), &json!("b")));
    let mut stream = body;
    stream["stream"] = json!(true);
    let text = shared().post("/v1/responses", stream).await.text().await.unwrap();
    let events: Vec<(&str, Json)> = text
        .split_terminator("\n\n")
        .map(|event| {
            let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            (name, serde_json::from_str(data).unwrap())
        })
        .collect();
    for (number, (name, data)) in events.iter().enumerate() {
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(number)));
    }
    let names: Vec<&str> =
        events.iter().map(|(name, _)| *name).filter(|name| !name.ends_with("text.delta")).collect();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    let deltas = events.iter().filter(|(name, _)| *name == "response.output_text.delta");
    let streamed: String = deltas.map(|(_, data)| data["delta"].as_str().unwrap()).collect();
    assert_eq!(streamed, expected);
    assert_eq!(events.last().unwrap().1["response"]["output"][0]["content"][0]["text"], expected.as_str());
}

#[tokio::test]
async fn a_conversation_and_a_format() {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"], "additionalProperties": false});
    let input = json!([
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]},
        {"role": "user", "content": "A number"},
    ]);
    let format = json!({"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": true}});
    let answer =
        shared().ask("/v1/responses", json!({"input": input, "text": format, "max_output_tokens": 90})).await;
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(serde_json::from_str::<Json>(text).unwrap()["n"].as_u64().unwrap() <= 9, "{text}");
    assert_eq!(answer["status"], "completed");
    for (body, param) in [
        (json!({"input": "x", "previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"input": "x", "tools": [{"type": "web_search"}]}), "tools"),
        (json!({"input": [{"type": "function_call_output"}]}), "input[0]"),
        (json!({"input": 3}), "input"),
    ] {
        let response = shared().post("/v1/responses", body).await;
        assert_eq!(response.status(), 400);
        assert_eq!(response.json::<Json>().await.unwrap()["error"]["param"], param);
    }
}

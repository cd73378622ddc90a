//! `/v1/completions`: equal to transformers, and every option does what it says.

use serde_json::{Value as Json, json};

use crate::rig::{reference, shared};

const PATH: &str = "/v1/completions";

fn texts(events: &[Json], choices: usize) -> Vec<String> {
    let mut texts = vec![String::new(); choices];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        texts[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
    }
    texts
}

#[tokio::test]
async fn greedy_text_is_transformers_whole_and_streamed() {
    let reference = reference("text");
    let prompts: Vec<&Json> = reference.iter().map(|prompt| &prompt["prompt"]).collect();
    let body = json!({"model": "sundial", "prompt": prompts, "max_tokens": 32, "ignore_eos": true});
    let whole = shared().ask(PATH, body.clone()).await;
    assert_eq!(whole["object"], "text_completion");
    for (index, prompt) in reference.iter().enumerate() {
        let choice = &whole["choices"][index];
        assert_eq!(choice["text"], prompt["greedy_text"]);
        assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!("length"), &json!(index)));
    }
    let tokens: usize = reference.iter().map(|prompt| prompt["prompt_ids"].as_array().unwrap().len()).sum();
    assert_eq!(whole["usage"]["prompt_tokens"], tokens);
    assert_eq!(whole["usage"]["completion_tokens"], 32 * prompts.len());

    let mut streaming = body;
    streaming["stream_options"] = json!({"include_usage": true});
    let events = shared().stream(PATH, streaming).await;
    let (usage, chunks) = events.split_last().unwrap();
    assert_eq!(
        (&usage["choices"], &usage["usage"]["total_tokens"]),
        (&json!([]), &whole["usage"]["total_tokens"])
    );
    assert!(chunks.len() > prompts.len() && chunks.iter().all(|chunk| chunk["usage"].is_null()));
    assert!(chunks.iter().all(|chunk| chunk["id"] == usage["id"] && chunk["object"] == "text_completion"));
    for (text, prompt) in texts(chunks, prompts.len()).iter().zip(&reference) {
        assert_eq!(prompt["greedy_text"], **text);
    }
}

#[tokio::test]
async fn token_ids_are_prompts_too_and_an_equal_prefix_is_cached() {
    let reference = &reference("text")[0];
    let ids = [reference["prompt_ids"].as_array().unwrap().as_slice(), &vec![json!(300); 60]].concat();
    let ask =
        |prompt: Json| shared().ask(PATH, json!({"prompt": prompt, "max_tokens": 4, "ignore_eos": true}));
    let one = ask(json!(ids)).await;
    assert_eq!(one["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let two = ask(json!([ids, ids])).await;
    assert_eq!(two["choices"][0]["text"], one["choices"][0]["text"]);
    assert_eq!(two["choices"][1]["text"], one["choices"][0]["text"]);
    let cached = two["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= 64, "the router sends a prompt where its prefix is: {cached}");
}

#[tokio::test]
async fn echo_is_byte_exact_with_log_probabilities_of_all() {
    let prompt = "  The é☃ 𝄞\n\ttype\u{301} ";
    let body = json!({"prompt": prompt, "max_tokens": 8, "echo": true, "logprobs": 2, "ignore_eos": true});
    let answer = shared().ask(PATH, body.clone()).await;
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().unwrap();
    assert!(text.starts_with(prompt) && text.len() > prompt.len());
    let logprobs = &choice["logprobs"];
    let count = logprobs["tokens"].as_array().unwrap().len();
    assert_eq!(answer["usage"]["total_tokens"], count);
    for key in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), count);
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for index in 1..count {
        let own = logprobs["token_logprobs"][index].as_f64().unwrap();
        let top = logprobs["top_logprobs"][index].as_object().unwrap();
        assert!((1..=3).contains(&top.len()), "parts of characters share a text");
        assert!(top.values().all(|other| other.as_f64().unwrap() <= 0.0) && own <= 0.0);
        let offset = logprobs["text_offset"][index].as_u64().unwrap() as usize;
        let rest: String = text.chars().skip(offset).collect();
        let token = logprobs["tokens"][index].as_str().unwrap();
        assert!(token.contains('\u{FFFD}') || rest.starts_with(token), "{token:?} at {rest:?}");
    }
    assert_eq!(texts(&shared().stream(PATH, body).await, 1)[0], text);

    let alone = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 0});
    let alone = shared().ask(PATH, alone).await;
    assert_eq!(alone["choices"][0]["text"], prompt);
    assert_eq!(alone["usage"]["completion_tokens"], 0);
    assert_eq!(alone["choices"][0]["logprobs"]["token_logprobs"][1], logprobs["token_logprobs"][1]);
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it_and_frees_the_rank() {
    let greedy = reference("text")[1].clone();
    let ask = |stop: Json, include: bool| json!({"prompt": greedy["prompt"], "max_tokens": 1000, "stop": stop, "include_stop_str_in_output": include});
    let whole = shared().ask(PATH, ask(json!(["nowhere", "3];\n"]), false)).await;
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], " vec![1, 2, ");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("3];\n")));
    assert!(whole["usage"]["completion_tokens"].as_u64().unwrap() < 20);
    let streamed = shared().stream(PATH, ask(json!("3];\n"), true)).await;
    assert_eq!(texts(&streamed, 1)[0], " vec![1, 2, 3];\n");
    assert_eq!(streamed.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_stop_token_is_told_and_min_tokens_puts_it_off() {
    let greedy = reference("text")[0].clone();
    let stop = greedy["greedy_ids"][3].clone();
    let body = json!({"prompt": greedy["prompt"], "max_tokens": 8, "stop_token_ids": [stop]});
    let answer = shared().ask(PATH, body.clone()).await;
    assert_eq!(answer["choices"][0]["stop_reason"], stop);
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    assert!(
        greedy["greedy_text"].as_str().unwrap().starts_with(answer["choices"][0]["text"].as_str().unwrap())
    );
    let mut longer = body;
    longer["min_tokens"] = json!(6);
    assert!(shared().ask(PATH, longer).await["usage"]["completion_tokens"].as_u64().unwrap() >= 6);
}

#[tokio::test]
async fn a_seed_gives_the_same_choices_again_and_they_differ() {
    let body = json!({"prompt": "The", "n": 4, "temperature": 1.0, "seed": 7, "max_tokens": 12});
    let first = shared().ask(PATH, body.clone()).await;
    let again = shared().ask(PATH, body).await;
    let texts = |answer: &Json| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(&first), texts(&again));
    let distinct: std::collections::BTreeSet<String> = texts(&first).into_iter().collect();
    assert!(distinct.len() >= 3, "{distinct:?}");
}

#[tokio::test]
async fn prompt_log_probabilities_have_vllms_shape() {
    let body = json!({"prompt": "The Vec type is", "max_tokens": 1, "prompt_logprobs": 1});
    let answer = shared().ask(PATH, body).await;
    let prompt = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], prompt.len());
    assert!(prompt[0].is_null());
    for entry in &prompt[1..] {
        let entry = entry.as_object().unwrap();
        assert!((1..=2).contains(&entry.len()));
        assert!(
            entry
                .values()
                .all(|token| token["rank"].as_u64().unwrap() >= 1 && token["decoded_token"].is_string())
        );
    }
}

#[tokio::test]
async fn penalties_and_biases_reach_the_sampler() {
    let reference = &reference("text")[0];
    let first = reference["greedy_ids"][0].clone();
    let bias = json!({ first.to_string(): -100 });
    let body = json!({"prompt": reference["prompt"], "max_tokens": 1, "logit_bias": bias});
    let biased = shared().ask(PATH, body).await;
    let greedy = reference["greedy_text"].as_str().unwrap();
    assert!(!greedy.starts_with(biased["choices"][0]["text"].as_str().unwrap()));
}

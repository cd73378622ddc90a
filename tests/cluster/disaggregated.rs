//! Prefill and decode apart, against the real binary: the same bits as on one group, and nothing lost when ranks die.

use serde_json::{Value, json};

use crate::rig::{Cluster, PATIENCE, bundled, kill};

/// The bundled model as two deployments behind `/apart`, and as one behind `/whole`.
fn apps(num_replicas: u32) -> Value {
    let llm = |role: &str| {
        let mut kwargs =
            json!({ "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512, "block_size": 8 });
        if role != "whole" {
            kwargs["kv_transfer_config"] = json!({ "kv_connector": "NixlConnector", "kv_role": role });
        }
        json!({
            "model_loading_config": { "model_id": "sundial", "model_source": bundled() },
            "engine_kwargs": kwargs,
            "deployment_config": { "num_replicas": if role == "kv_consumer" { num_replicas } else { 1 } },
        })
    };
    json!([
        {
            "name": "apart", "route_prefix": "/apart", "import_path": "ray.serve.llm:build_pd_openai_app",
            "args": { "prefill_config": llm("kv_both"), "decode_config": llm("kv_consumer") },
        },
        {
            "name": "whole", "route_prefix": "/whole", "import_path": "ray.serve.llm:build_openai_app",
            "args": { "llm_configs": [llm("whole")] },
        },
    ])
}

/// Requests of every kind whose answers must not depend on where they are computed.
fn requests() -> Vec<Value> {
    let long = "The Vec type is a growable array. ".repeat(12);
    let ask = |more: Value| {
        let mut body = json!({ "model": "sundial", "prompt": long, "max_tokens": 24, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        body
    };
    vec![
        ask(json!({})),
        ask(json!({ "prompt": "Hi" })),
        ask(json!({ "temperature": 0.9, "seed": 7, "n": 2, "top_p": 0.9 })),
        ask(json!({ "logprobs": 3, "prompt_logprobs": 1, "max_tokens": 6 })),
        ask(json!({ "max_tokens": 1 })),
        ask(json!({ "repetition_penalty": 1.3, "frequency_penalty": 0.5, "stop": ["the"] })),
        ask(
            json!({ "response_format": { "type": "json_object" }, "min_tokens": 4, "temperature": 1.0, "seed": 3 }),
        ),
    ]
}

impl Cluster {
    async fn answer(&self, app: &str, body: &Value) -> Value {
        let (status, answer) = self.post(&format!("/{app}/v1/completions"), body).await;
        assert_eq!(status, 200, "{answer}");
        json!([answer["choices"], answer["usage"]["completion_tokens"]])
    }

    /// The sum of a metric over the ranks of the application.
    async fn metric(&self, name: &str) -> f64 {
        let text = reqwest::get(self.url("/metrics")).await.unwrap().text().await.unwrap();
        let lines =
            text.lines().filter(|line| line.starts_with(name) && line.contains("application=\"apart\""));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

#[tokio::test]
async fn prefill_and_decode_apart_give_the_same_bits_through_the_deaths_of_both() {
    let cluster =
        Cluster::up(&[("model", "deploy = false"), ("devices", "device = \"cpu\"\ncpu = 4\nthreads = 1")])
            .await;
    cluster.deploy_and_wait(apps(2));
    let status = cluster.serve_status();
    let deployments: Vec<&String> = status["apart"]["deployments"].as_object().unwrap().keys().collect();
    assert_eq!(deployments, ["PDDecodeServer:sundial", "PDPrefillServer:sundial"]);

    let mut whole = Vec::new();
    for body in requests() {
        whole.push(cluster.answer("whole", &body).await);
        assert_eq!(cluster.answer("apart", &body).await, *whole.last().unwrap(), "{body}");
    }
    // Prompts came from where they were computed, and no rank computed one again.
    let fetched = tokio::time::timeout(PATIENCE, async {
        loop {
            let bytes = cluster.metric("heliostat:kv_fetched_bytes_total").await;
            if bytes > 0.0 {
                return bytes;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
    assert!(fetched.await.unwrap() > 0.0);
    assert_eq!(cluster.metric("heliostat:kv_fetch_failures_total").await, 0.0);

    // Streams go on while one rank after the other is killed.
    let body = json!({ "model": "sundial", "prompt": "The Vec type is a growable array".repeat(4), "max_tokens": 200,
        "temperature": 0.8, "seed": 11, "ignore_eos": true });
    let expected = cluster.answer("whole", &body).await[0][0]["text"].as_str().unwrap().to_owned();
    for victim in ["PDDecodeServer", "PDPrefillServer"] {
        let ranks: Vec<(String, i64)> = cluster
            .pids()
            .into_iter()
            .filter(|(name, _)| name.contains(victim) && name.contains("rank-"))
            .collect();
        assert!(!ranks.is_empty(), "{victim}: {:?}", cluster.pids());
        let url = cluster.url("/apart/v1/completions");
        let streams = (0..3).map(|number| {
            let (kill_now, ranks) = (number == 0, ranks.clone());
            cluster.stream_at(&url, &body, move |seen| {
                if kill_now && seen == 5 {
                    ranks.iter().for_each(|(_, pid)| kill(*pid));
                }
            })
        });
        for text in futures_util::future::join_all(streams).await {
            assert_eq!(text.unwrap(), expected, "{victim}");
        }
        let again = |cluster: &Cluster| {
            let now: Vec<i64> = cluster
                .pids()
                .into_iter()
                .filter(|(name, _)| ranks.iter().any(|(it, _)| it == name))
                .map(|(_, pid)| pid)
                .collect();
            (now.len() == ranks.len() && ranks.iter().all(|(_, pid)| !now.contains(pid))).then_some(())
        };
        cluster.until("the ranks are back", again).await;
    }
    assert_eq!(cluster.answer("apart", &body).await[0][0]["text"], json!(expected));
}

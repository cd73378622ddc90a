//! Prefill and decode apart, against the real binary: the same bits as on one group, and nothing lost when ranks die.

use serde_json::{Value, json};

use crate::rig::{Cluster, bundled, kill};

/// The bundled model as two deployments behind `/apart`, and as one behind `/whole`; `engine` is added to the engine
/// arguments of all.
pub(crate) fn apps(num_decode_replicas: u32, engine: &Value) -> Value {
    let llm = |role: &str| {
        let mut kwargs = json!({ "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512 });
        kwargs.as_object_mut().unwrap().extend(engine.as_object().cloned().unwrap());
        if role != "whole" {
            kwargs["kv_transfer_config"] = json!({ "kv_connector": "NixlConnector", "kv_role": role });
        }
        let num_replicas = if role == "kv_consumer" { num_decode_replicas } else { 1 };
        json!({
            "model_loading_config": { "model_id": "sundial", "model_source": bundled() },
            "engine_kwargs": kwargs,
            "deployment_config": { "num_replicas": num_replicas },
        })
    };
    let apart = json!({ "prefill_config": llm("kv_both"), "decode_config": llm("kv_consumer") });
    let whole = json!({ "llm_configs": [llm("whole")] });
    let app = |name: &str, builder: &str, args: Value| {
        let import_path = format!("ray.serve.llm:{builder}");
        json!({ "name": name, "route_prefix": format!("/{name}"), "import_path": import_path, "args": args })
    };
    json!([app("apart", "build_pd_openai_app", apart), app("whole", "build_openai_app", whole)])
}

/// Requests of every kind whose answers must not depend on where they are computed.
fn requests() -> Vec<Value> {
    let long = "The Vec type is a growable array. ".repeat(12);
    let ask = |more: Value| {
        let mut body = json!({ "model": "sundial", "prompt": long, "max_tokens": 24, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        body
    };
    let json = json!({ "type": "json_object" });
    vec![
        ask(json!({})),
        ask(json!({ "prompt": "Hi" })),
        ask(json!({ "temperature": 0.9, "seed": 7, "n": 2, "top_p": 0.9 })),
        ask(json!({ "logprobs": 3, "prompt_logprobs": 1, "max_tokens": 6 })),
        ask(json!({ "max_tokens": 1 })),
        ask(json!({ "repetition_penalty": 1.3, "frequency_penalty": 0.5, "stop": ["the"] })),
        ask(json!({ "response_format": json, "min_tokens": 4, "temperature": 1.0, "seed": 3 })),
    ]
}

impl Cluster {
    async fn answer(&self, app: &str, body: &Value) -> Value {
        let (status, answer) = self.post(&format!("/{app}/v1/completions"), body).await;
        assert_eq!(status, 200, "{answer}");
        json!([answer["choices"], answer["usage"]["completion_tokens"]])
    }

    /// The sum of a metric over the ranks of the application whose prefill and decode are apart.
    async fn metric(&self, name: &str) -> f64 {
        let text = self.client.get(self.url("/metrics")).send().await.unwrap().text().await.unwrap();
        let ours = |line: &&str| line.starts_with(name) && line.contains("application=\"apart\"");
        text.lines().filter(ours).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Ranks of a deployment, with their processes.
    fn ranks_of(&self, deployment: &str) -> Vec<(String, i64)> {
        let of = |(name, _): &(String, i64)| name.contains(deployment) && name.contains("rank-");
        self.pids().into_iter().filter(of).collect()
    }

    /// Has every kind of request answered by both applications alike, with prompts that were computed once.
    pub(crate) async fn apart_answers_as_whole(&self) {
        for body in requests() {
            let whole = self.answer("whole", &body).await;
            assert_eq!(self.answer("apart", &body).await, whole, "{body}");
        }
        // Figures come with the step reports.
        while self.metric("heliostat:kv_fetches_total").await < 5.0 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        assert!(self.metric("heliostat:kv_fetched_bytes_total").await > 0.0);
        assert_eq!(self.metric("heliostat:kv_fetch_failures_total").await, 0.0);
    }
}

#[tokio::test]
async fn prefill_and_decode_apart_give_the_same_bits_through_the_deaths_of_both() {
    let devices = ("devices", "device = \"cpu\"\ncpu = 4\nthreads = 1");
    let cluster = Cluster::up(&[("model", "deploy = false"), devices]).await;
    cluster.deploy_and_wait(apps(2, &json!({ "block_size": 8 })));
    let status = cluster.serve_status();
    let deployments: Vec<&String> = status["apart"]["deployments"].as_object().unwrap().keys().collect();
    assert_eq!(deployments, ["PDDecodeServer:sundial", "PDPrefillServer:sundial"]);
    tokio::time::timeout(crate::rig::PATIENCE, cluster.apart_answers_as_whole()).await.unwrap();

    // Streams go on while ranks of the one kind are killed, and of the other.
    let body = json!({
        "model": "sundial", "prompt": "The Vec type is a growable array".repeat(4), "max_tokens": 200,
        "temperature": 0.8, "seed": 11, "ignore_eos": true,
    });
    let expected = cluster.answer("whole", &body).await[0][0]["text"].as_str().unwrap().to_owned();
    let url = cluster.url("/apart/v1/completions");
    for victim in ["PDDecodeServer", "PDPrefillServer"] {
        let ranks = cluster.ranks_of(victim);
        assert!(!ranks.is_empty(), "{victim}: {:?}", cluster.pids());
        let streams = (0..3).map(|number| {
            let victims = if number == 0 { ranks.clone() } else { Vec::new() };
            cluster.stream_at(&url, &body, move |seen| {
                if seen == 5 {
                    victims.iter().for_each(|(_, pid)| kill(*pid));
                }
            })
        });
        for text in futures_util::future::join_all(streams).await {
            assert_eq!(text.unwrap(), expected, "{victim}");
        }
        let back = |cluster: &Cluster| {
            let now = cluster.ranks_of(victim);
            (now.len() == ranks.len() && now.iter().all(|rank| !ranks.contains(rank))).then_some(())
        };
        cluster.until("the ranks are back", back).await;
    }
    assert_eq!(cluster.answer("apart", &body).await[0][0]["text"], json!(expected));
}

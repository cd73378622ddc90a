//! What is served does not depend on where anything runs.

use futures_util::future::join_all;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::rig::{Cluster, bundled, greedy};

#[tokio::test(flavor = "multi_thread")]
async fn every_shape_of_the_group_generates_what_transformers_does() {
    let reference: Value =
        serde_json::from_slice(&std::fs::read(bundled().join("reference.json")).unwrap()).unwrap();
    let shapes = [
        (1, 1, true, 64),
        (2, 2, true, 16),
        (4, 4, true, 512),
        (1, 4, true, 7),
        (4, 2, true, 33),
        (2, 3, false, 64),
    ];
    for (dp, ep, colocate, chunk) in shapes {
        let parallel = format!("dp = {dp}\nep = {ep}\ncolocate = {colocate}");
        let engine = format!(
            "max_num_seqs = 7\nmax_num_batched_tokens = {chunk}\nblock_size = {}",
            1 << ((dp + ep) % 5)
        );
        let cluster =
            Cluster::up(&[("parallel", &parallel), ("engine", &engine), ("devices", "cpu = 5\nthreads = 1")])
                .await;
        let prompts = reference["prompts"].as_array().unwrap();
        let asks = prompts.iter().map(|prompt| {
            let ids = &prompt["prompt_ids"];
            let tokens = prompt["greedy_ids"].as_array().unwrap().len();
            let body = json!({ "model": "sundial-20m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "skip_special_tokens": false });
            let cluster = &cluster;
            async move { cluster.complete(&body).await["text"].as_str().unwrap().to_owned() }
        });
        for (prompt, got) in prompts.iter().zip(join_all(asks).await) {
            assert_eq!(got, prompt["greedy_text"].as_str().unwrap(), "dp {dp} x ep {ep}, chunk {chunk}");
        }
    }
}

/// 16 requests with log-probabilities, half of them sampled.
async fn sixteen(cluster: &Cluster) -> Vec<Value> {
    let asks = (0..16).map(|number| {
        let mut body = greedy(number, 96);
        body["logprobs"] = json!(5);
        if number % 2 == 1 {
            body["temperature"] = json!(0.9);
            body["seed"] = json!(number);
        }
        async move { cluster.complete(&body).await }
    });
    join_all(asks).await
}

fn random_layout(seed: u64) -> Value {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let layer = |_| {
        let mut slots: Vec<u32> = (0..32).chain((0..8).map(|_| rng.random_range(0..32))).collect();
        slots.shuffle(&mut rng);
        slots
    };
    json!({ "physical_to_logical_map": (0..5).map(layer).collect::<Vec<_>>() })
}

#[tokio::test(flavor = "multi_thread")]
async fn remaps_and_layouts_change_no_bit() {
    let still = Cluster::up(&[("eplb", "enable_eplb = false")]).await;
    let expected = sixteen(&still).await;
    drop(still);
    for (seed, policy) in [(1, "deepseek"), (2, "incremental")] {
        let files = tempfile::tempdir().unwrap();
        let layout = files.path().join("layout.json");
        std::fs::write(&layout, random_layout(seed).to_string()).unwrap();
        let eplb = format!(
            "step_interval = 20\nwindow_size = 20\nnum_redundant_experts = 8\npolicy = \"{policy}\"\ninitial_layout = {layout:?}"
        );
        let cluster = Cluster::up(&[("eplb", &eplb)]).await;
        let mut committed = 0;
        for round in 0.. {
            assert_eq!(sixteen(&cluster).await, expected, "policy {policy}, round {round}");
            let (_, status) = cluster.get("/api/eplb").await;
            let history = status["history"].as_array().unwrap();
            committed = history.iter().filter(|remap| remap["end"] == "committed").count();
            if committed >= 3 {
                break;
            }
            assert!(round < 20, "remaps take place while the requests run: {history:#?}");
        }
        eprintln!("{policy}: {committed} remaps");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remap_on_request_balances_a_skewed_load() {
    let cluster = Cluster::up(&[("eplb", "enable_eplb = false")]).await;
    while cluster.get("/api/eplb").await.1["ready"] != 4 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let (status, reply) = cluster.post("/api/eplb/rebalance", &json!({})).await;
    assert_eq!((status, reply["error"]["detail"]["reason"].as_str()), (409, Some("no_load")), "{reply}");
    sixteen(&cluster).await;
    let (_, before) = cluster.get("/api/eplb").await;
    let (status, started) = cluster.post("/api/eplb/rebalance", &json!({})).await;
    assert_eq!(status, 202, "{started}");
    let after = cluster.until_remapped(started["epoch"].as_u64().unwrap()).await;
    let balance = |status: &Value| status["balancedness"]["avg"].as_f64().unwrap();
    assert!(balance(&after) > balance(&before).max(0.9), "{} -> {}", balance(&before), balance(&after));
    let remap = &after["history"][0];
    assert_eq!(remap["end"], "committed");
    assert!(remap["moves"].as_u64().unwrap() > 0 && remap["moved"]["host"]["experts"].as_u64().unwrap() > 0);
    assert_eq!(remap["moved"]["disk"]["experts"], 0, "peers hold every expert");
    assert_eq!(remap["moved"]["nvlink"]["experts"], 0, "CPU devices have none");
    let layer = &after["layers"][0];
    let counts: u64 = layer["replica_counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(counts as usize, layer["physical_to_logical"].as_array().unwrap().len());
}

impl Cluster {
    /// Waits for the end of a remap and returns the EPLB status.
    pub(crate) async fn until_remapped(&self, epoch: u64) -> Value {
        loop {
            let (_, status) = self.get("/api/eplb").await;
            if status["history"][0]["epoch"].as_u64() == Some(epoch) {
                return status;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

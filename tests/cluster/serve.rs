//! `helio serve` and Ray Serve's REST against the real binary: several applications, updates, drains, scaling.

use serde_json::{Value, json};

use crate::rig::{Cluster, PATIENCE, bundled, kill};

/// One application of the bundled model with one rank; `options` are its deployment's.
pub(crate) fn app(name: &str, max_num_seqs: u32, options: Value) -> Value {
    json!({
        "name": name,
        "route_prefix": format!("/{name}"),
        "import_path": "ray.serve.llm:build_openai_app",
        "args": { "llm_configs": [{
            "model_loading_config": { "model_id": name, "model_source": bundled() },
            "engine_kwargs": { "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 64, "max_model_len": 512 },
            "deployment_config": options,
        }] },
    })
}

impl Cluster {
    async fn empty() -> Self {
        Self::up(&[("model", "deploy = false"), ("devices", "device = \"cpu\"\ncpu = 3\nthreads = 1")]).await
    }

    pub(crate) fn deploy(&self, apps: Value, more: &[&str]) -> (bool, String) {
        self.deploy_document(&json!({ "applications": apps }), more)
    }

    pub(crate) fn deploy_document(&self, document: &Value, more: &[&str]) -> (bool, String) {
        let file = self.dir.path().join("serve.yaml");
        std::fs::write(&file, document.to_string()).unwrap();
        let args = [&["serve", "deploy", "serve.yaml"], more].concat();
        let output = self.helio(&args);
        (output.status.success(), crate::rig::text(&output))
    }

    pub(crate) fn deploy_and_wait(&self, apps: Value) {
        let (deployed, said) = self.deploy(apps, &["--wait"]);
        assert!(deployed, "{said}");
    }

    /// `helio serve status --json`.
    pub(crate) fn serve_status(&self) -> Value {
        let output = self.helio(&["serve", "status", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Replicas of an application, by number, with their states.
    pub(crate) fn replicas(&self, app: &str) -> Vec<(String, String)> {
        let status = self.serve_status();
        let deployments = status[app]["deployments"].as_object().cloned().unwrap_or_default();
        let replicas =
            deployments.values().flat_map(|it| it["replicas"].as_array().cloned().unwrap_or_default());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        replicas.map(|it| (text(&it["replica_id"]), text(&it["state"]))).collect()
    }

    async fn ask(&self, app: &str) -> (u16, Value) {
        let body = json!({ "model": app, "prompt": "The Vec type is", "max_tokens": 8, "temperature": 0 });
        self.post(&format!("/{app}/v1/completions"), &body).await
    }
}

#[tokio::test]
async fn applications_stand_side_by_side_and_only_what_differs_changes() {
    let cluster = Cluster::empty().await;
    assert_eq!(cluster.post("/v1/completions", &json!({})).await.0, 503, "nothing is deployed yet");
    cluster.deploy_and_wait(json!([app("chat", 8, json!({})), app("code", 8, json!({}))]));
    let (status, chat) = cluster.ask("chat").await;
    assert_eq!(status, 200, "{chat}");
    let (_, code) = cluster.ask("code").await;
    assert_eq!(chat["choices"][0]["text"], code["choices"][0]["text"]);
    assert_eq!(cluster.get("/code/v1/models").await.1["data"][0]["id"], "code");
    assert_eq!(cluster.post("/code/v1/completions", &json!({ "model": "chat", "prompt": "a" })).await.0, 404);
    assert_eq!(cluster.get("/-/routes").await.1, json!({ "/chat": "chat", "/code": "code" }));
    assert_eq!(cluster.get("/v1/models").await.0, 404);

    // A document that asks for too much is refused by name and changes nothing.
    let mut wrong = app("chat", 8, json!({}));
    wrong["args"]["llm_configs"][0]["engine_kwargs"]["tensor_parallel_size"] = json!(2);
    let (deployed, said) = cluster.deploy(json!([wrong]), &[]);
    let path = "applications.0.args.llm_configs.0.engine_kwargs.tensor_parallel_size: 2 is not supported";
    assert!(!deployed && said.contains(path), "{said}");

    // Settings of EPLB change live; the other application is not listed and goes.
    let before = cluster.replicas("chat");
    let live = json!({ "user_config": { "eplb_config": { "step_interval": 77 } } });
    cluster.deploy_and_wait(json!([app("chat", 8, live)]));
    assert_eq!(cluster.replicas("chat"), before);
    cluster.until("code gone", |cluster| cluster.serve_status().get("code").is_none().then_some(())).await;
    let forgotten = async {
        while cluster.ask("code").await.0 != 404 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, forgotten).await.unwrap();
    assert_eq!(cluster.ask("chat").await.0, 200);

    let shutdown = cluster.helio(&["serve", "shutdown"]);
    assert!(shutdown.status.success());
    assert_eq!(cluster.serve_status(), json!({}));
    let left = cluster.status().unwrap()["actors"].as_array().unwrap().len();
    assert_eq!(left, 3, "ingress, jobs and serve");
}

#[tokio::test]
async fn an_update_loses_no_stream_and_what_does_not_start_is_rolled_back() {
    let cluster = Cluster::empty().await;
    cluster.deploy_and_wait(json!([app("chat", 8, json!({}))]));
    let old = cluster.replicas("chat")[0].0.clone();
    let body = json!({ "model": "chat", "prompt": "The Vec type", "max_tokens": 400, "temperature": 0, "ignore_eos": true });
    let (whole, reference) = (cluster.post("/chat/v1/completions", &body), async {
        // The update begins while the request runs.
        let (deployed, said) = cluster.deploy(json!([app("chat", 9, json!({}))]), &[]);
        assert!(deployed, "{said}");
    });
    let ((status, reply), ()) = tokio::join!(whole, reference);
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["usage"]["completion_tokens"], 400);
    cluster
        .until("the new replica alone", |cluster| {
            let replicas = cluster.replicas("chat");
            (replicas.len() == 1 && replicas[0].1 == "RUNNING" && replicas[0].0 != old).then_some(())
        })
        .await;

    // A cache that holds no sequence cannot be: its ranks are not created.
    let mut broken = app("chat", 9, json!({}));
    broken["args"]["llm_configs"][0]["engine_kwargs"]["kv_cache_memory_bytes"] = json!(1);
    let (deployed, said) = cluster.deploy(json!([broken]), &["--wait"]);
    assert!(!deployed && said.contains("rolled back"), "{said}");
    assert_eq!(cluster.ask("chat").await.0, 200);
}

#[tokio::test]
async fn replicas_follow_the_load_to_zero_and_back_and_survive_controller_and_head() {
    let cluster = Cluster::empty().await;
    let auto = json!({ "autoscaling_config": {
        "min_replicas": 0, "initial_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2,
        "look_back_period_s": 0.5, "upscale_delay_s": 0.2, "downscale_delay_s": 0.5,
    } });
    cluster.deploy_and_wait(json!([app("chat", 8, auto)]));
    cluster.until("no replica", |cluster| cluster.replicas("chat").is_empty().then_some(())).await;
    kill(cluster.pid("serve"));
    kill(cluster.status().unwrap()["head"]["pid"].as_i64().unwrap());
    let (status, reply) = cluster.ask("chat").await;
    assert_eq!(status, 200, "it waited for the first replica: {reply}");
    cluster.until("no replica again", |cluster| cluster.replicas("chat").is_empty().then_some(())).await;
}

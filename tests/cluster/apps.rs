//! Actors of users as deployments behind routes, on a cluster without a model: the example, deployed as a user would.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::programs::example;
use crate::rig::{Cluster, PATIENCE, kill, root, text};

/// The example's application; `options` are its deployment's.
fn app(greeting: &str, options: Value) -> Value {
    let mut deployment = json!({
        "name": "Greeter", "user_config": { "mark": "!" }, "ray_actor_options": { "num_cpus": 0.1 },
    });
    deployment.as_object_mut().unwrap().extend(options.as_object().cloned().unwrap());
    json!([{
        "name": "hello", "route_prefix": "/hello", "import_path": "greeter:Greeter",
        "args": { "greeting": greeting }, "deployments": [deployment],
    }])
}

impl Cluster {
    /// A bare cluster that has the example's package.
    async fn with_greeter() -> Self {
        let cluster = Self::up_bare(&[("devices", "device = \"cpu\"\ncpu = 1")]).await;
        let pushed = cluster.helio(&["package", "push", example("greeter").to_str().unwrap()]);
        assert!(pushed.status.success(), "{}", text(&pushed));
        cluster
    }

    async fn hello(&self, path: &str) -> (u16, String) {
        let response = self.client.get(self.url(&format!("/hello{path}"))).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    fn message(&self) -> String {
        self.serve_status()["hello"]["deployments"]["Greeter"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Names of the actors of its replicas.
    fn actors(&self) -> Vec<String> {
        let status = self.serve_status();
        let replicas = status["hello"]["deployments"]["Greeter"]["replicas"].as_array().cloned();
        let name = |replica: &Value| replica["actor_name"].as_str().map(str::to_owned);
        replicas.unwrap_or_default().iter().filter_map(name).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_is_served_by_a_cluster_without_a_model() {
    let cluster = Cluster::with_greeter().await;
    assert_eq!(cluster.get("/health").await.0, 503, "nothing is deployed");
    let document = root().join("examples/greeter.yaml");
    let deployed = cluster.helio(&["serve", "deploy", document.to_str().unwrap(), "--wait"]);
    assert!(deployed.status.success(), "{}", text(&deployed));
    assert_eq!(cluster.hello("/you").await, (200, "Hello, you!\n".to_owned()));
    assert_eq!(cluster.get("/-/routes").await.1, json!({ "/hello": "hello" }));
    assert_eq!(cluster.get("/health").await.0, 200);

    // All of a request arrives, and all of an answer.
    let request =
        cluster.client.post(cluster.url("/hello/echo?a=1&b=%20")).header("content-type", "image/png");
    let answer = request.body(vec![0_u8, 255, 7]).send().await.unwrap();
    assert_eq!(answer.status(), 201);
    assert_eq!(
        (&answer.headers()["content-type"], &answer.headers()["x-query"]),
        (&"image/png".parse().unwrap(), &"a=1&b=%20".parse().unwrap())
    );
    assert_eq!(answer.bytes().await.unwrap().as_ref(), [0, 255, 7]);
    assert_eq!(cluster.client.delete(cluster.url("/hello/x")).send().await.unwrap().status(), 405);

    // Both replicas get requests, and chunks come as they are made.
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        seen.insert(cluster.hello("/replica").await.1);
    }
    let ticks = cluster.client.get(cluster.url("/hello/ticks")).send().await.unwrap();
    let chunks: Vec<_> = ticks.bytes_stream().take(2).map(|chunk| chunk.unwrap()).collect().await;
    assert_eq!(chunks, ["tick 0\n", "tick 1\n"]);

    // Settings change live: the same processes, another tone.
    let before = cluster.replicas("hello");
    cluster.deploy_and_wait(app(
        "Hello",
        json!({ "num_replicas": 2, "max_ongoing_requests": 10, "user_config": { "mark": "?" } }),
    ));
    assert_eq!(cluster.replicas("hello"), before);
    for _ in 0..8 {
        assert_eq!(cluster.hello("/you").await.1, "Hello, you?\n");
    }
    // Settings that it does not take change nothing, and are told.
    let (deployed, said) = cluster.deploy(
        app("Hello", json!({ "num_replicas": 2, "max_ongoing_requests": 10, "user_config": { "tone": 1 } })),
        &[],
    );
    assert!(deployed, "{said}");
    cluster.until("the refusal", |cluster| cluster.message().contains("tone").then_some(())).await;
    assert_eq!(cluster.serve_status()["hello"]["status"], "UNHEALTHY");
    assert_eq!(cluster.hello("/you").await.1, "Hello, you?\n");

    assert!(cluster.helio(&["serve", "shutdown"]).status.success());
    assert_eq!(cluster.serve_status(), json!({}));
    assert_eq!(cluster.hello("/you").await.0, 503, "no application is deployed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_loses_no_request_and_what_does_not_start_is_rolled_back() {
    let cluster = Cluster::with_greeter().await;
    cluster.deploy_and_wait(app("Hello", json!({})));
    let old = cluster.actors();
    let (deployed, said) = cluster.deploy(app("Ahoy", json!({})), &[]);
    assert!(deployed, "{said}");
    let started = Instant::now();
    while cluster.actors() == old || cluster.actors().len() != 1 {
        let (status, said) = cluster.hello("/you").await;
        assert_eq!(status, 200, "{said}");
        assert!(started.elapsed() < PATIENCE);
    }
    assert_eq!(cluster.hello("/you").await.1, "Ahoy, you!\n");

    // What cannot be created serves nobody, and says why.
    let mut wrong = app("Ahoy", json!({}));
    wrong[0]["args"] = json!({ "greting": "Ahoy" });
    let (deployed, said) = cluster.deploy(wrong, &["--wait"]);
    assert!(!deployed && said.contains("rolled back") && said.contains("greting"), "{said}");
    assert_eq!(cluster.hello("/you").await.1, "Ahoy, you!\n");
    // A document that names what is not there changes nothing.
    let mut wrong = app("Ahoy", json!({}));
    wrong[0]["import_path"] = json!("greter:Greeter");
    let (deployed, said) = cluster.deploy(wrong, &[]);
    assert!(
        !deployed && said.contains("applications.0.import_path") && said.contains("package push"),
        "{said}"
    );
    let in_use = cluster.helio(&["package", "remove", "greeter", env!("CARGO_PKG_VERSION")]);
    assert!(!in_use.status.success(), "{}", text(&in_use));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_a_dying_replica_had_fails_with_the_cause_and_others_go_elsewhere() {
    let cluster = Cluster::with_greeter().await;
    let options = json!({ "health_check_period_s": 0.2, "max_ongoing_requests": 1, "max_queued_requests": 0,
            "backpressure_config": { "status_code": 429, "retry_after_s": 6.5 } });
    cluster.deploy_and_wait(app("Hello", options));
    let actor = cluster.actors().remove(0);

    // A full replica and a full queue say when to come again; a client that is gone makes room.
    let (client, url) = (cluster.client.clone(), cluster.url("/hello/slow"));
    // The other requests may have taken the place when it comes.
    let slow = tokio::spawn(async move { while client.get(&url).send().await.unwrap().status() == 429 {} });
    let full = async {
        loop {
            let answer = cluster.client.get(cluster.url("/hello/you")).send().await.unwrap();
            if answer.status() == 429 {
                return answer;
            }
        }
    };
    let full = tokio::time::timeout(PATIENCE, full).await.unwrap();
    assert_eq!(full.headers()["retry-after"], "7");
    assert!(full.text().await.unwrap().contains("no replica is free"));
    slow.abort();
    let free = async { while cluster.hello("/you").await.0 != 200 {} };
    tokio::time::timeout(PATIENCE, free).await.unwrap();

    // What it had begun fails with the cause; what comes next waits for its next incarnation.
    cluster.deploy_and_wait(app("Hello", json!({ "health_check_period_s": 0.2 })));
    assert_eq!(cluster.actors(), std::slice::from_ref(&actor), "bounds change live");
    let requests = || async { cluster.hello("/requests").await.1.parse::<u64>().unwrap() };
    let mut seen = requests().await;
    let slow = tokio::spawn(cluster.client.get(cluster.url("/hello/slow")).send());
    let begun = async {
        loop {
            let now = requests().await;
            if now > seen + 1 {
                break;
            }
            seen = now;
        }
    };
    tokio::time::timeout(PATIENCE, begun).await.unwrap();
    kill(cluster.pid(&actor));
    let lost = slow.await.unwrap().unwrap();
    assert_eq!(lost.status(), 502);
    let said = lost.text().await.unwrap();
    assert!(said.contains("died before it answered") && said.contains("may have begun"), "{said}");
    assert_eq!(cluster.hello("/you").await, (200, "Hello, you!\n".to_owned()));

    // A panic is an error of that request.
    let panicked = cluster.client.post(cluster.url("/hello/panic")).send().await.unwrap();
    assert_eq!(panicked.status(), 500);
    assert!(panicked.text().await.unwrap().contains("as was asked for"));
    // What comes while the process ends may be lost with it, and is told so.
    let free = async { while cluster.hello("/you").await.0 != 200 {} };
    tokio::time::timeout(PATIENCE, free).await.unwrap();

    // One that fails its checks is replaced by another.
    let before = cluster.replicas("hello");
    assert_eq!(cluster.client.post(cluster.url("/hello/ill")).send().await.unwrap().status(), 204);
    cluster
        .until("another replica", |cluster| {
            let now = cluster.replicas("hello");
            (now != before && now.len() == 1 && now[0].1 == "RUNNING").then_some(())
        })
        .await;
    assert_eq!(cluster.hello("/you").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_actors_rest_and_come_back_and_a_new_controller_goes_on() {
    let cluster = Cluster::with_greeter().await;
    let auto = json!({ "autoscaling_config": {
        "min_replicas": 0, "initial_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1,
        "look_back_period_s": 0.5, "upscale_delay_s": 0.2, "downscale_delay_s": 0.5,
    } });
    cluster.deploy_and_wait(app("Hello", auto));
    cluster.until("no replica", |cluster| cluster.replicas("hello").is_empty().then_some(())).await;
    kill(cluster.pid("serve"));
    assert_eq!(
        cluster.hello("/you").await,
        (200, "Hello, you!\n".to_owned()),
        "it waited for the first replica"
    );
    let slow = [(); 3].map(|()| tokio::spawn(cluster.client.get(cluster.url("/hello/slow")).send()));
    cluster.until("two replicas", |cluster| (cluster.replicas("hello").len() == 2).then_some(())).await;
    slow.iter().for_each(tokio::task::JoinHandle::abort);
    cluster.until("none again", |cluster| cluster.replicas("hello").is_empty().then_some(())).await;
    tokio::time::timeout(Duration::from_secs(1), cluster.get("/health")).await.unwrap();
}

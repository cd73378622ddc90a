//! Applications of several deployments of users' actors: the example, deployed as a user would, and what befalls it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::programs::example;
use crate::rig::{Cluster, PATIENCE, kill, root, text};

fn merged(mut below: Value, above: &Value) -> Value {
    below.as_object_mut().unwrap().extend(above.as_object().cloned().unwrap());
    below
}

/// The example's application, with options of its two deployments.
fn app(gateway: &Value, translator: &Value) -> Value {
    let gateway = merged(
        json!({ "name": "Gateway", "max_ongoing_requests": 100, "ray_actor_options": { "num_cpus": 0.1 } }),
        gateway,
    );
    let translator = merged(
        json!({
            "name": "Translator", "user_config": words("hallo", 0), "ray_actor_options": { "num_cpus": 0.1 },
        }),
        translator,
    );
    json!([{
        "name": "phrases", "route_prefix": "/phrases", "import_path": "phrasebook:Gateway",
        "deployments": [gateway, translator],
    }])
}

fn words(hello: &str, pause_ms: u64) -> Value {
    json!({ "words": { "hello": hello }, "pause_ms": pause_ms })
}

impl Cluster {
    /// A bare cluster that has the example's package.
    async fn with_phrasebook() -> Self {
        let cluster = Self::up_bare(&[("devices", "device = \"cpu\"\ncpu = 1")]).await;
        let pushed = cluster.helio(&["package", "push", example("phrasebook").to_str().unwrap()]);
        assert!(pushed.status.success(), "{}", text(&pushed));
        cluster
    }

    async fn phrase(&self, path: &str) -> (u16, String) {
        let response = self.client.get(self.url(&format!("/phrases/{path}"))).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// The deployment as Ray's tools see it.
    fn deployment(&self, name: &str) -> Value {
        self.serve_status()["phrases"]["deployments"][name].clone()
    }

    /// Names of the actors of a deployment's replicas.
    fn actors_of(&self, name: &str) -> Vec<String> {
        let replicas = self.deployment(name)["replicas"].as_array().cloned().unwrap_or_default();
        replicas.iter().filter_map(|it| it["actor_name"].as_str().map(str::to_owned)).collect()
    }

    /// Clients that ask without pause until they are told to stop; each says what it got that was no answer.
    fn load(&self, clients: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let client = || {
            let (client, url, stop) = (self.client.clone(), self.url("/phrases/hello"), Arc::clone(&stop));
            tokio::spawn(async move {
                let (mut answers, mut failures) = (0, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    let answer = client.get(&url).send().await.unwrap();
                    let (status, said) = (answer.status().as_u16(), answer.text().await.unwrap());
                    match status {
                        200 => answers += 1,
                        _ => failures.push(format!("{status}: {said}")),
                    }
                }
                (answers, failures)
            })
        };
        Load { clients: (0..clients).map(|_| client()).collect(), stop }
    }
}

struct Load {
    clients: Vec<JoinHandle<(u64, Vec<String>)>>,
    stop: Arc<AtomicBool>,
}

impl Load {
    /// Answers, and what else came.
    async fn end(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut all, mut failed) = (0, Vec::new());
        for client in self.clients {
            let (answers, failures) = tokio::time::timeout(PATIENCE, client).await.unwrap().unwrap();
            all += answers;
            failed.extend(failures);
        }
        (all, failed)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_of_two_deployments_answers() {
    let cluster = Cluster::with_phrasebook().await;
    let document = root().join("examples/phrasebook.yaml");
    let deployed = cluster.helio(&["serve", "deploy", document.to_str().unwrap(), "--wait"]);
    assert!(deployed.status.success(), "{}", text(&deployed));
    assert_eq!(cluster.phrase("hello").await, (200, "hallo".to_owned()));
    assert_eq!(cluster.phrase("spell/world").await, (200, "w\ne\nl\nt\n".to_owned()));
    assert_eq!(cluster.phrase("nothing").await.0, 404);
    for (name, replicas) in [("Gateway", 1), ("Translator", 2)] {
        let deployment = cluster.deployment(name);
        assert_eq!((&deployment["status"], cluster.actors_of(name).len()), (&json!("HEALTHY"), replicas));
    }
    // Both translators are asked.
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        let (_, busy) = cluster.phrase("busy").await;
        seen.insert(serde_json::from_str::<(u64, u64)>(&busy).unwrap().0);
    }

    // Calls are counted: those over HTTP by the ingress, those behind it by the dashboard.
    let metrics = async |url: String| cluster.client.get(url).send().await.unwrap().text().await.unwrap();
    let text = metrics(cluster.url("/metrics")).await;
    for line in [
        r#"ray_serve_num_http_requests_total{application="phrases",route="/phrases",method="GET",status_code="404"} 1"#,
        r#"ray_serve_num_deployment_http_error_requests_total{application="phrases",deployment="Gateway",method="GET",error_code="404"} 1"#,
        r#"ray_serve_deployment_error_counter_total{application="phrases",deployment="Gateway"} 0"#,
    ] {
        assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
    }
    let dashboard = std::fs::read_to_string(cluster.dir.path().join("run/dashboard")).unwrap();
    let behind = async {
        let spelt =
            r#"ray_serve_deployment_request_counter_total{application="phrases",deployment="Translator"} "#;
        loop {
            let text = metrics(format!("{}/metrics", dashboard.trim())).await;
            let calls = text.lines().find_map(|line| line.strip_prefix(spelt)?.parse::<u64>().ok());
            // One word, one spelt, one unknown, and each question who is busy.
            if calls.is_some_and(|calls| calls >= 5) {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, behind).await.unwrap();

    // Settings of the deployment behind change live, and those who ask it stay.
    let before = (cluster.actors_of("Gateway"), cluster.actors_of("Translator"));
    cluster.deploy_and_wait(app(
        &json!({}),
        &json!({ "num_replicas": 2, "max_ongoing_requests": 10, "user_config": words("moin", 0) }),
    ));
    assert_eq!(before, (cluster.actors_of("Gateway"), cluster.actors_of("Translator")));
    assert_eq!(cluster.phrase("hello").await, (200, "moin".to_owned()));

    assert!(cluster.helio(&["serve", "shutdown"]).status.success());
    assert_eq!(cluster.serve_status(), json!({}));
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_of_the_deployment_behind_hold_and_a_client_that_goes_ends_its_work() {
    let cluster = Cluster::with_phrasebook().await;
    let bounds = json!({
        "max_ongoing_requests": 2, "max_queued_requests": 1, "user_config": words("hallo", 600_000),
    });
    cluster.deploy_and_wait(app(&json!({}), &bounds));
    let url = cluster.url("/phrases/hello");
    // The third is refused where the question below is in its place.
    let slow = |_| {
        let (client, url) = (cluster.client.clone(), url.clone());
        tokio::spawn(async move { while client.get(&url).send().await.unwrap().status() == 503 {} })
    };
    let slow: Vec<_> = (0..3).map(slow).collect();
    // Two run, one waits, and one more is too many. One that came before the third waits in its place, and goes again.
    let full = async {
        loop {
            let busy = cluster.client.get(cluster.url("/phrases/busy")).timeout(Duration::from_millis(200));
            match busy.send().await {
                Ok(answer) if answer.status() == 503 => return answer.text().await.unwrap(),
                _ => {}
            }
        }
    };
    let full = tokio::time::timeout(PATIENCE, full).await.unwrap();
    assert!(full.contains("max_queued_requests"), "{full}");
    slow.iter().for_each(JoinHandle::abort);
    let idle = async { while cluster.phrase("busy").await.1.split(',').nth(1) != Some("0]") {} };
    tokio::time::timeout(PATIENCE, idle).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_is_lost_by_updates_and_scaling_and_none_that_was_not_begun_by_a_death() {
    let cluster = Cluster::with_phrasebook().await;
    let two = |more: Value| merged(json!({ "num_replicas": 2, "user_config": words("hallo", 5) }), &more);
    cluster.deploy_and_wait(app(&json!({}), &two(json!({}))));
    let load = cluster.load(8);

    // Other processes, one by one, while calls go on.
    let old = cluster.actors_of("Translator");
    let other = json!({ "ray_actor_options": { "num_cpus": 0.2 } });
    cluster.deploy_and_wait(app(&json!({}), &two(other.clone())));
    let new = cluster.actors_of("Translator");
    assert!(new.len() == 2 && new.iter().all(|it| !old.contains(it)), "{old:?} {new:?}");
    // More, and fewer again.
    let scaled = |replicas| merged(two(other.clone()), &json!({ "num_replicas": replicas }));
    cluster.deploy_and_wait(app(&json!({}), &scaled(4)));
    cluster.deploy_and_wait(app(&json!({}), &scaled(1)));
    // Whoever asks is replaced as well.
    cluster.deploy_and_wait(app(&json!({ "ray_actor_options": { "num_cpus": 0.2 } }), &scaled(2)));
    let (answers, failures) = load.end().await;
    assert!(answers > 100 && failures.is_empty(), "{answers} answers, and {failures:#?}");

    // A death costs what that replica had begun, with the cause, and nothing else.
    let load = cluster.load(8);
    let victim = cluster.actors_of("Translator").remove(0);
    let before = cluster.pid(&victim);
    kill(before);
    cluster
        .until("the translator again", |cluster| {
            let now = cluster.status()?["actors"].as_array()?.iter().find(|it| it["name"] == victim)?["pid"]
                .as_i64();
            let back = now.is_some_and(|now| now != before);
            (back && cluster.deployment("Translator")["status"] == "HEALTHY").then_some(())
        })
        .await;
    let (answers, failures) = load.end().await;
    assert!(answers > 10 && failures.len() <= 5, "{answers} answers, and {failures:#?}");
    assert!(failures.iter().all(|it| it.starts_with("502: replica ")), "{failures:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deployment_behind_rests_and_is_started_by_who_asks_it_also_under_a_new_controller() {
    let cluster = Cluster::with_phrasebook().await;
    let auto = json!({ "autoscaling_config": {
        "min_replicas": 0, "initial_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 1,
        "look_back_period_s": 0.5, "upscale_delay_s": 0.2, "downscale_delay_s": 0.5,
    } });
    cluster.deploy_and_wait(app(&json!({}), &auto));
    assert_eq!(cluster.actors_of("Translator"), Vec::<String>::new());
    assert_eq!(cluster.phrase("hello").await, (200, "hallo".to_owned()), "it waited for the first replica");
    let none = |cluster: &Cluster| cluster.actors_of("Translator").is_empty().then_some(());
    cluster.until("no translator", none).await;
    kill(cluster.pid("serve"));
    assert_eq!(cluster.phrase("hello").await, (200, "hallo".to_owned()));
    // The load of callers counts.
    let slow = merged(auto, &json!({ "user_config": words("hallo", 600_000) }));
    cluster.deploy_and_wait(app(&json!({}), &slow));
    let url = cluster.url("/phrases/hello");
    let slow = [(); 4].map(|()| tokio::spawn(cluster.client.get(&url).send()));
    cluster
        .until("two translators", |cluster| (cluster.actors_of("Translator").len() == 2).then_some(()))
        .await;
    slow.iter().for_each(JoinHandle::abort);
    cluster.until("none again", none).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_calls_under_way_and_who_asks_goes_first() {
    let cluster = Cluster::with_phrasebook().await;
    cluster.deploy_and_wait(app(&json!({}), &json!({ "user_config": words("hallo", 1500) })));
    let url = cluster.url("/phrases/hello");
    let slow = tokio::spawn(cluster.client.get(&url).send());
    cluster
        .until("a call", |cluster| {
            let busy = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(cluster.phrase("busy"))
            });
            busy.1.ends_with("1]").then_some(())
        })
        .await;
    assert!(cluster.helio(&["serve", "shutdown"]).status.success());
    let answer = tokio::time::timeout(Duration::from_secs(10), slow).await.unwrap().unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap()), (200, "hallo".to_owned()));
    cluster.until("nothing left", |cluster| (cluster.serve_status() == json!({})).then_some(())).await;
}

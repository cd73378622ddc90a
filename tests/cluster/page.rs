//! The dashboard's page in a real Chromium over a cluster that serves, and what it asks for; `helio top` and
//! `helio timeline` beside it.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::rig::{Cluster, greedy, text};

fn url(cluster: &Cluster) -> String {
    std::fs::read_to_string(cluster.dir.path().join("run/dashboard")).unwrap().trim().to_owned()
}

async fn json_of(cluster: &Cluster, path: &str) -> Value {
    let answer = cluster.client.get(format!("{}{path}", url(cluster))).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200, "{path}");
    answer.json().await.unwrap()
}

/// Streams that come one after another until they are told to end.
struct Load {
    over: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn on(cluster: &Cluster, streams: usize) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let one = |number: usize| {
            let (over, client, url) =
                (Arc::clone(&over), cluster.client.clone(), cluster.url("/v1/completions"));
            tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let answer = client.post(&url).json(&greedy(number, 48)).send().await.unwrap();
                    answer.bytes().await.unwrap();
                }
            })
        };
        let tasks = (0..streams).map(one).collect();
        Self { over, tasks }
    }

    async fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_a_cluster_that_serves() {
    let cluster = Cluster::up(&[("eplb", "enable_eplb = false")]).await;
    let job = [
        "job",
        "submit",
        "--no-wait",
        "--submission-id",
        "clock",
        "--",
        "sh",
        "-c",
        "while :; do date; sleep 1; done",
    ];
    assert!(cluster.helio(&job).status.success());
    let load = Load::on(&cluster, 8);
    let browser = Browser::open().await;
    browser.go(&url(&cluster)).await;

    browser.until_text("sundial-20m").await;
    browser.until_text("membership epoch 1").await;
    // Figures of a model that generates, in numbers and in a chart that has been drawn.
    browser.until("/Output\\s+[1-9]/.test(document.body.innerText)").await;
    browser.until("document.querySelectorAll('.uplot canvas').length >= 2").await;
    browser.picture("overview").await;

    browser.press("Serving").await;
    browser.until("/Between tokens/.test(document.body.innerText) && document.querySelectorAll('.uplot').length == 6").await;
    browser.until("document.querySelectorAll('main .scroll tbody tr').length == 4").await;
    browser.picture("serving").await;

    browser.press("Experts").await;
    browser.until_text("map epoch 0").await;
    browser.until("document.querySelectorAll('.heat canvas').length == 3").await;
    browser.press("Rebalance").await;
    browser.confirm().await;
    browser.until_text("map epoch 1").await;
    browser.until_text("committed").await;
    browser.picture("experts").await;

    browser.press("Nodes").await;
    browser.until_text("rank-3").await;
    browser.picture("nodes").await;

    browser.press("Actors").await;
    browser.press("ingress").await;
    browser.until_text("serving HTTP at").await;
    browser.picture("actors").await;

    browser.press("Placement").await;
    browser.until_text("Groups of ranks").await;
    browser.picture("placement").await;

    browser.press("Jobs").await;
    browser.press("clock").await;
    browser.until("/20\\d\\d/.test(document.querySelector('pre.log')?.innerText)").await;
    browser.picture("jobs").await;
    browser.press("Stop").await;
    browser.confirm().await;
    browser.until_text("stopped").await;

    // The other theme.
    browser.run("document.querySelector('header button').click()").await;
    for view in ["Overview", "Serving", "Experts"] {
        browser.press(view).await;
        browser.until("document.querySelectorAll('main canvas').length > 0").await;
        browser.picture(&format!("{}-other", view.to_lowercase())).await;
    }
    load.end().await;
    assert_eq!(browser.complaints().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_page_orders_needs_the_token_and_no_other_page_may_ask() {
    let token = "a-token-of-this-test-and-no-other";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, token).unwrap();
    let security = format!("token_file = {file:?}");
    let cluster = Cluster::up(&[("cluster", &security), ("eplb", "enable_eplb = false")]).await;
    for prompt in 0..4 {
        cluster.complete(&greedy(prompt, 32)).await;
    }
    let order = |path: &str| cluster.client.post(format!("{}{path}", url(&cluster)));
    let status = |request: reqwest::RequestBuilder| async { request.send().await.unwrap().status().as_u16() };
    assert_eq!(status(order("/api/eplb/eplb/rebalance")).await, 403);
    let wrong = order("/api/eplb/eplb/rebalance").header("x-heliostat-token", "another");
    assert_eq!(status(wrong).await, 403);
    assert_eq!(status(order("/api/nodes/nobody/drain")).await, 403);
    let right = order("/api/nodes/nobody/drain").header("x-heliostat-token", token);
    assert_eq!(status(right).await, 409, "there is no such node");
    let foreign =
        cluster.client.get(format!("{}/api/status", url(&cluster))).header("origin", "http://evil.example");
    assert_eq!(status(foreign).await, 403);

    let browser = Browser::open().await;
    browser.go(&format!("{}/#/experts", url(&cluster))).await;
    browser.press("Rebalance").await;
    browser.confirm().await;
    browser.until_text("Token of the cluster").await;
    let fill = format!(
        "const i = document.querySelector('input[name=token]'); i.value = {}; i.dispatchEvent(new Event('input'))",
        json!(token)
    );
    browser.run(&fill).await;
    browser.confirm().await;
    browser.until("!document.querySelector('dialog[open]')").await;
    browser.until_text("map epoch 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn top_timeline_and_metrics_tell_of_the_load() {
    let cluster = Cluster::up(&[]).await;
    let load = Load::on(&cluster, 4);
    let top = cluster
        .until("top sees tokens", |cluster| {
            let top = cluster.helio(&["top", "--once"]);
            assert!(top.status.success(), "{}", text(&top));
            let top = text(&top);
            let line = top.lines().find(|line| line.contains(" tokens/s")).map(str::to_owned);
            line.filter(|line| !line.trim_start().starts_with("0 ")).map(|_| top)
        })
        .await;
    for says in [
        "nodes 1/1",
        "group ep 4/4 membership epoch 1",
        "sundial-20m",
        "ms between tokens",
        "balancedness",
        "compute",
    ] {
        assert!(top.contains(says), "{says} is not in\n{top}");
    }

    let made = cluster.helio(&["timeline", "--seconds", "1", "-o", "t.json"]);
    assert!(made.status.success() && text(&made).contains("of 4 ranks"), "{}", text(&made));
    let trace: Value =
        serde_json::from_slice(&std::fs::read(cluster.dir.path().join("t.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let count = |name: &str| events.iter().filter(|event| event["name"] == name).count();
    for name in ["step", "model", "schedule", "sample", "wait for dispatch", "wait for combine", "sequence"] {
        assert!(count(name) > 0, "no {name} among {} events", events.len());
    }

    // One a second.
    let began = Instant::now();
    let samples = loop {
        let samples = json_of(&cluster, "/api/serving").await;
        if samples[0]["samples"].as_array().unwrap().len() > 1 {
            break samples;
        }
        assert!(began.elapsed() < Duration::from_secs(15), "{samples}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let last = samples[0]["samples"].as_array().unwrap().last().unwrap()["at_ms"].as_u64().unwrap();
    let later = json_of(&cluster, &format!("/api/serving?since_ms={last}")).await;
    assert!(later[0]["samples"].as_array().unwrap().len() < 5, "only what came since");
    let metrics =
        cluster.client.get(format!("{}/metrics", url(&cluster))).send().await.unwrap().text().await.unwrap();
    for line in [
        "ray_cluster_active_nodes{node_type=\"node\"} 1",
        "ray_actors{Name=\"rank\",State=\"ALIVE\"} 4",
        "heliostat:ranks_ready{eplb=\"eplb\",group=\"ep\"} 4",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    }
    let engine = cluster.client.get(cluster.url("/metrics")).send().await.unwrap();
    let told = format!("{metrics}{}", engine.text().await.unwrap());
    let dashboard = std::fs::read_to_string(crate::rig::root().join("docs/grafana.json")).unwrap();
    let is_name = |word: &&str| ["vllm:", "heliostat:", "ray_"].iter().any(|prefix| word.starts_with(prefix));
    let words = dashboard.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    for name in words.filter(is_name) {
        let family = ["_total", "_bucket"].iter().fold(name, |name, end| name.trim_end_matches(end));
        assert!(told.contains(&format!("# TYPE {family} ")), "Grafana asks for {name}, which nobody tells");
    }
    load.end().await;
    let without = Command::new(env!("CARGO_BIN_EXE_helio"))
        .arg("top")
        .current_dir(cluster.dir.path())
        .output()
        .unwrap();
    assert!(text(&without).contains("--once"), "{}", text(&without));
}

//! Several ingresses: one on each node, each a whole door to all replicas.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::{Value, json};

use crate::rig::{Cluster, PATIENCE, greedy, kill, text};
use crate::serve::app;

/// Two nodes of this machine.
const NODES: (&str, &str) = ("[nodes]", "name = \"a\"\n[[nodes]]\nname = \"b\"");
const DEVICES: (&str, &str) = ("devices", "device = \"cpu\"\ncpu = 2\nthreads = 1");

impl Cluster {
    /// What is served, by Ray's REST; null where nobody answers.
    async fn details(&self) -> Value {
        let url = std::fs::read_to_string(self.dir.path().join("cluster.toml")).unwrap();
        let port = url.split("[dashboard]\nport = ").nth(1).unwrap().lines().next().unwrap().to_owned();
        let url = format!("http://127.0.0.1:{port}/api/serve/applications/");
        let Ok(answer) = self.client.get(url).send().await else { return Value::Null };
        answer.json().await.unwrap_or_default()
    }

    /// `proxies` of it: by node the actor, its status and where it listens.
    async fn proxies(&self) -> BTreeMap<String, (String, String, String)> {
        let details = self.details().await;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let proxies = details["proxies"].as_object().cloned().unwrap_or_default();
        let told = |(node, it): (String, Value)| {
            (node, (text(&it["actor_name"]), text(&it["status"]), text(&it["http_address"])))
        };
        proxies.into_iter().map(told).collect()
    }

    /// Waits until exactly these nodes have an ingress that serves; returns where.
    async fn ingresses_on(&self, nodes: &[&str]) -> BTreeMap<String, String> {
        let there = async {
            loop {
                let proxies = self.proxies().await;
                let healthy = proxies.values().all(|(_, status, _)| status == "HEALTHY");
                if healthy && proxies.keys().map(String::as_str).eq(nodes.iter().copied()) {
                    return proxies.into_iter().map(|(node, (_, _, at))| (node, at)).collect();
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, there).await {
            Ok(found) => found,
            Err(_) => panic!("no ingress on {nodes:?} alone: {:?}", self.proxies().await),
        }
    }

    async fn healthy_at(&self, address: &str) {
        let healthy = async {
            loop {
                let answer = self.client.get(format!("http://{address}/health")).send().await;
                if answer.is_ok_and(|answer| answer.status() == 200) {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, healthy).await.unwrap();
    }
}

/// The routes of Ray's target groups, and what stands behind each.
fn target_groups(details: &Value) -> Vec<(String, BTreeSet<String>)> {
    let address = |target: &Value| format!("{}:{}", target["ip"].as_str().unwrap(), target["port"]);
    let group = |group: &Value| {
        let targets = group["targets"].as_array().unwrap().iter().map(address).collect();
        (group["route_prefix"].as_str().unwrap().to_owned(), targets)
    };
    details["target_groups"].as_array().unwrap().iter().map(group).collect()
}

fn completions(address: &str) -> String {
    format!("http://{address}/v1/completions")
}

/// A command that takes its time, beside what the test does.
fn beside(cluster: &Cluster, args: &[&str]) -> std::process::Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_helio"));
    command.args(args).current_dir(cluster.dir.path()).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_has_an_ingress_and_the_end_of_one_is_no_matter_to_the_others() {
    let serve = ("serve", "proxy_location = \"EveryNode\"");
    let cluster = Cluster::up(&[serve, DEVICES, NODES, ("parallel", "dp = 2")]).await;
    let at = cluster.ingresses_on(&["a", "b"]).await;
    let own = format!("127.0.0.1:{}", cluster.http);
    assert_eq!(at.values().filter(|at| **at == own).count(), 1, "one has the configured port: {at:?}");
    assert_ne!(at["a"], at["b"]);
    let groups = target_groups(&cluster.details().await);
    assert_eq!(groups, [("/".to_owned(), at.values().cloned().collect())], "what a load balancer is told");
    let shown = text(&cluster.helio(&["serve", "status"]));
    assert!(at.values().all(|at| shown.contains(&format!("HEALTHY  at {at}"))), "{shown}");
    let other = cluster.proxies().await.into_values().find(|(.., at)| *at != own).unwrap();
    let urls = [completions(&own), completions(&other.2)];

    // All ranks serve all doors, and the same tokens come out of each.
    let body = greedy(0, 600);
    let whole = cluster.stream(&body, |_| ()).await.unwrap();
    assert_eq!(cluster.stream_at(&urls[1], &body, |_| ()).await.unwrap(), whole);

    // An ingress is killed while another one streams; it comes back where it was.
    let pid = cluster.pid(&other.0);
    let lost = cluster.stream_at(&urls[1], &body, |_| ());
    let kept = cluster.stream(&body, |chunks| {
        if chunks == 5 {
            kill(pid);
        }
    });
    let (kept, lost) = tokio::join!(kept, lost);
    assert_eq!(kept.unwrap(), whole);
    assert!(lost.is_err(), "its client has seen that it is not whole");
    cluster.until_healed().await;
    assert_eq!(cluster.actor(&other.0)["restarts"], 1);
    cluster.healthy_at(&other.2).await;
    assert_eq!(cluster.stream_at(&urls[1], &body, |_| ()).await.unwrap(), whole);

    // A rank is killed: no stream of any ingress ends.
    let pid = cluster.pid("rank-0");
    let first = cluster.stream(&body, |chunks| {
        if chunks == 5 {
            kill(pid);
        }
    });
    let rest = (1..4).map(|number| cluster.stream_at(&urls[number % 2], &body, |_| ()));
    let (first, rest) = tokio::join!(first, futures_util::future::join_all(rest));
    for text in rest.into_iter().chain([first]) {
        assert_eq!(text.unwrap(), whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_drained_lets_its_streams_end_and_documents_say_where_ingresses_are() {
    // The dashboard, which tells of them, stays where it is, on the first node.
    let (model, node) = (("model", "deploy = false"), ("serve", "node = \"a\""));
    let cluster = Cluster::up(&[model, node, DEVICES, NODES, ("parallel", "dp = 1")]).await;
    cluster.ingresses_on(&["a"]).await;
    let document = |location: Value, max_num_seqs: u32| {
        let options = json!({ "graceful_shutdown_timeout_s": 50 });
        json!({ "proxy_location": location, "applications": [app("chat", max_num_seqs, options)] })
    };
    let deploy = |document: Value| {
        let (deployed, said) = cluster.deploy_document(&document, &["--wait"]);
        assert!(deployed, "{said}");
    };
    deploy(document(json!("EveryNode"), 8));
    let at = cluster.ingresses_on(&["a", "b"]).await;
    let url = |node: &str| format!("http://{}/chat/v1/completions", at[node]);
    let (home, away) = ("a", "b");
    assert_eq!(at[home], format!("127.0.0.1:{}", cluster.http), "the configured port stays where it was");
    cluster.healthy_at(&at[away]).await;
    let mut body = greedy(1, 400);
    body["model"] = json!("chat");
    let whole = cluster.stream_at(&url(home), &body, |_| ()).await.unwrap();

    // An update waits for the streams of both.
    let streams = [home, away].map(|node| {
        let (url, mut begun) = (url(node), false);
        let (cluster, body) = (&cluster, &body);
        async move {
            let seen = |_| {
                if node == away && !std::mem::replace(&mut begun, true) {
                    let (deployed, said) = cluster.deploy_document(&document(json!("EveryNode"), 9), &[]);
                    assert!(deployed, "{said}");
                }
            };
            cluster.stream_at(&url, body, seen).await
        }
    });
    for text in futures_util::future::join_all(streams).await {
        assert_eq!(text.unwrap(), whole);
    }
    cluster
        .until("the new replica alone", |cluster| {
            let replicas = cluster.replicas("chat");
            (replicas.len() == 1 && replicas[0] == ("2".to_owned(), "RUNNING".to_owned())).then_some(())
        })
        .await;

    // The other node is drained under a stream: whoever comes now is turned away at the door, the stream goes on.
    let (mut drain, door) = (None, url(away));
    let stream = cluster.stream_at(&door, &body, |chunks| {
        if chunks == 3 {
            drain = Some(beside(&cluster, &["drain", away, "--deadline", "50"]));
        }
    });
    assert_eq!(stream.await.unwrap(), whole);
    assert!(drain.unwrap().wait().unwrap().success());
    cluster.ingresses_on(&[home]).await;
    assert!(cluster.client.get(format!("http://{}/health", at[away])).send().await.is_err());
    assert_eq!(cluster.stream_at(&url(home), &body, |_| ()).await.unwrap(), whole);
    assert!(cluster.helio(&["undrain", away]).status.success());
    cluster.ingresses_on(&["a", "b"]).await;

    // A document that says nothing of it leaves it to cluster.toml.
    deploy(document(Value::Null, 9));
    assert_eq!(cluster.ingresses_on(&[home]).await[home], at[home]);
    deploy(document(json!("Disabled"), 9));
    cluster.ingresses_on(&[]).await;
    assert!(cluster.client.get(cluster.url("/health")).send().await.is_err());
    assert!(cluster.helio(&["serve", "shutdown"]).status.success());
    cluster.ingresses_on(&[home]).await;
}

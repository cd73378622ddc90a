//! What the cluster says of itself: `helio list|get|summary`, Ray's state API, waiting for a job.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rig::{Cluster, kill, text};

const SMALL: [(&str, &str); 1] = [("devices", "device = \"cpu\"\ncpu = 1")];

fn listed(cluster: &Cluster, args: &[&str]) -> Vec<Value> {
    let output = cluster.helio(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    serde_json::from_slice::<Value>(&output.stdout).unwrap().as_array().unwrap().clone()
}

fn names(rows: &[Value], key: &str) -> BTreeSet<String> {
    rows.iter().map(|row| row[key].as_str().unwrap().to_owned()).collect()
}

/// An answer of the dashboard.
async fn dashboard(cluster: &Cluster, path: &str) -> (u16, Value) {
    let url = std::fs::read_to_string(cluster.dir.path().join("run/dashboard")).unwrap();
    let answer = cluster.client.get(format!("{}{path}", url.trim())).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_can_be_listed_filtered_and_counted() {
    let cluster = Cluster::up(&SMALL).await;
    let all = listed(&cluster, &["list", "actors"]);
    assert_eq!(names(&all, "name"), cluster.pids().into_iter().map(|(name, _)| name).collect());
    let jobs = listed(&cluster, &["list", "actors", "-f", "type_name=JOBS", "--filter", "state=ready"]);
    assert_eq!(names(&jobs, "name"), BTreeSet::from(["jobs".to_owned()]));
    let pid = cluster.pid("jobs");
    let rest = listed(&cluster, &["list", "actors", "-f", &format!("pid!={pid}")]);
    assert_eq!(rest.len(), all.len() - 1);
    let table = text(&cluster.helio(&["list", "actors", "-f", "name=jobs"]));
    assert_eq!(table.lines().count(), 2, "{table}");
    for (args, says) in [
        (&["list", "actors", "-f", "nme=x"][..], "no column \"nme\""),
        (&["list", "actors", "-f", "pid=x"], "pid holds a number"),
        (&["list", "actors", "-f", "name"], "write KEY=VALUE"),
    ] {
        let refused = cluster.helio(args);
        assert!(refused.status.code() == Some(2) && text(&refused).contains(says), "{}", text(&refused));
    }

    let submit = cluster.helio(&["job", "submit", "--submission-id", "one", "--", "true"]);
    assert!(submit.status.success(), "{}", text(&submit));
    assert_eq!(
        names(&listed(&cluster, &["list", "jobs", "-f", "status=succeeded"]), "submission_id").len(),
        1
    );
    assert_eq!(listed(&cluster, &["list", "nodes"]).len(), 1);
    assert_eq!(listed(&cluster, &["list", "groups", "-f", "complete=true"]).len(), 1);

    let got = text(&cluster.helio(&["get", "actors", "jobs"]));
    let line = ["pid".to_owned(), pid.to_string()];
    assert!(got.lines().any(|text| text.split_whitespace().eq(&line)), "{got}");
    let nobody = cluster.helio(&["get", "actors", "nobody"]);
    assert!(
        nobody.status.code() == Some(1) && text(&nobody).contains("helio list actors"),
        "{}",
        text(&nobody)
    );
    let summary: Value =
        serde_json::from_slice(&cluster.helio(&["summary", "actors", "--json"]).stdout).unwrap();
    assert_eq!(summary["counts"]["jobs"], json!({"ready": 1}), "{summary}");
    assert_eq!(summary["total"], all.len());

    // Why an incarnation died can be asked for, too.
    kill(pid);
    let died =
        ["list", "actors", "-f", "last_death=killed", "-f", "last_death.signal=9", "-f", "state=ready"];
    cluster.until("the death is listed", |cluster| (listed(cluster, &died).len() == 1).then_some(())).await;
    let got = text(&cluster.helio(&["get", "actors", "jobs"]));
    assert!(got.contains("it died: worker process killed by signal 9 (SIGKILL"), "{got}");
    assert!(got.contains("last_words"), "{got}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rays_state_api_says_what_the_head_says() {
    let cluster = Cluster::up(&SMALL).await;
    let rows = |answer: &Value| answer["data"]["result"]["result"].as_array().unwrap().clone();
    let (status, actors) = dashboard(&cluster, "/api/v0/actors?detail=True&limit=100&timeout=24").await;
    assert_eq!((status, &actors["result"]), (200, &json!(true)));
    let known = cluster.pids();
    for row in rows(&actors) {
        let name = row["actor_id"].as_str().unwrap();
        assert_eq!(row["state"], "ALIVE", "{row}");
        assert!(known.contains(&(name.to_owned(), row["pid"].as_i64().unwrap())), "{row}");
    }
    let one = "/api/v0/actors?limit=1&filter_keys=state&filter_predicates=!%3D&filter_values=DEAD";
    let (_, one) = dashboard(&cluster, one).await;
    let of = |key: &str| one["data"]["result"][key].as_u64().unwrap() as usize;
    assert_eq!((of("total"), of("num_filtered"), rows(&one).len()), (known.len(), known.len(), 1));
    let (_, nodes) = dashboard(&cluster, "/api/v0/nodes").await;
    assert_eq!(rows(&nodes)[0]["is_head_node"], true, "{nodes}");
    let (_, summary) = dashboard(&cluster, "/api/v0/actors/summarize").await;
    let cluster_summary = &summary["data"]["result"]["result"]["node_id_to_summary"]["cluster"];
    assert_eq!(cluster_summary["summary"]["jobs"]["state_counts"]["ALIVE"], 1, "{summary}");
    for (path, status, says) in [
        ("/api/v0/tasks", 404, "keeps no record of tasks"),
        ("/api/v0/actors?limit=100000", 400, "1 to 10000"),
        ("/api/v0/actors?filter_keys=x&filter_predicates=%3D&filter_values=1", 400, "no column \"x\""),
        ("/api/v0/nodes/summarize", 404, "no summary of nodes"),
    ] {
        let (code, answer) = dashboard(&cluster, path).await;
        let message = answer["msg"].as_str().unwrap();
        assert!(code == status && answer["result"] == false && message.contains(says), "{path}: {answer}");
    }
    let (_, whole) = dashboard(&cluster, "/api/status").await;
    assert_eq!(whole["head"]["pid"], cluster.status().unwrap()["head"]["pid"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_job_can_be_waited_for() {
    let cluster = Cluster::up(&SMALL).await;
    let go = cluster.dir.path().join("go");
    let script = format!("while [ ! -e {} ]; do sleep 0.01; done", go.display());
    let args = ["job", "submit", "--no-wait", "--submission-id", "w", "--", "sh", "-c", &script];
    assert!(cluster.helio(&args).status.success());
    let (_, early) = dashboard(&cluster, "/api/jobs/w/wait?timeout_s=0.2").await;
    assert!(["PENDING", "RUNNING"].contains(&early["status"].as_str().unwrap()), "{early}");
    let waits = dashboard(&cluster, "/api/jobs/w/wait");
    let ends = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        std::fs::write(&go, "").unwrap();
        Instant::now()
    };
    let ((_, late), ended) = tokio::join!(waits, ends);
    assert_eq!(late["status"], "SUCCEEDED", "{late}");
    assert!(ended.elapsed() < Duration::from_secs(2), "it answers at the end, not at its limit");
}

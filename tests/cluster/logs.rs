//! Logs as others collect them: an object a line that says whose it is, and of which request.

use serde_json::Value;

use crate::rig::{Cluster, greedy, kill};

const ACTORS: [&str; 6] = ["eplb", "ingress", "jobs", "rank-0", "rank-1", "serve"];

/// The whole lines of all actors' logs.
fn lines(cluster: &Cluster) -> Vec<Value> {
    let mut lines = Vec::new();
    let mut folders = vec![cluster.dir.path().join("run")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if ACTORS.iter().any(|actor| path.ends_with(format!("{actor}.log"))) {
                let text = std::fs::read_to_string(&path).unwrap();
                let read = |line: &str| {
                    serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("{path:?}: {line}"))
                };
                let whole = text.rfind('\n').map_or("", |end| &text[..end]);
                // The node agent marks where a process begins.
                lines.extend(whole.lines().filter(|line| !line.starts_with("=== ")).map(read));
            }
        }
    }
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_says_whose_it_is_and_a_request_is_found_at_every_actor() {
    let environment = [("HELIO_LOG_FORMAT", "json"), ("HELIO_LOG", "info,heliostat_actors=debug")];
    let cluster = Cluster::up_with(&[("devices", "cpu = 2\nthreads = 1")], &environment).await;
    let request = cluster.client.post(cluster.url("/v1/completions")).json(&greedy(0, 300));
    let request = request.header("x-request-id", "mine-1").header("x-data-parallel-rank", "1").send();
    let answering = tokio::spawn(request);
    cluster
        .until("rank 1 has it", |cluster| {
            lines(cluster).into_iter().find(|line| line["message"] == "took a sequence")
        })
        .await;
    kill(cluster.pid("rank-1"));
    let answer = answering.await.unwrap().unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    answer.bytes().await.unwrap();
    cluster
        .until("both have said all", |cluster| {
            let said = |message: &str| lines(cluster).iter().any(|line| line["message"] == message);
            (said("answered") && said("ended a sequence")).then_some(())
        })
        .await;

    let lines = lines(&cluster);
    for line in &lines {
        for key in ["timestamp", "level", "process", "pid", "message"] {
            assert!(!line[key].is_null(), "{line} says no {key}");
        }
        let of_actor =
            line["actor"].is_string() && line["incarnation"].as_u64().is_some_and(|number| number > 0);
        assert_eq!(of_actor, line["process"] == "worker", "{line}");
    }
    let mine: Vec<&Value> = lines.iter().filter(|line| line["request_id"] == "mine-1").collect();
    let said = |actor: &str, message: &str| {
        let found = mine.iter().find(|line| line["actor"] == actor && line["message"] == message);
        (*found.unwrap_or_else(|| panic!("{actor} has not said {message:?} of it: {mine:#?}"))).clone()
    };
    let sequence = said("ingress", "sent a sequence")["sequence"].clone();
    assert_eq!(said("rank-1", "took a sequence")["sequence"], sequence);
    let moved = said("ingress", "moved a sequence");
    assert_eq!(
        (&moved["before"], &moved["sequence"], &moved["level"]),
        (&1.into(), &sequence, &"INFO".into())
    );
    let ended = if moved["rank"] == 0 {
        said("rank-0", "ended a sequence")
    } else {
        said("rank-1", "ended a sequence")
    };
    assert_eq!(ended["sequence"], sequence);
    assert_eq!(said("ingress", "answered")["status"], 200);
}

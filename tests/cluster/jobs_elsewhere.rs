//! Jobs whose bundle is on another node than the jobs actor: nothing is different, but where they run.

use serde_json::Value;

use crate::jobs::{job, pid_in, until};
use crate::rig::{Cluster, is_alive, kill, text};

/// Two nodes of this machine. Jobs that ask for it run on `b`; the jobs actor is on `a`.
async fn up() -> Cluster {
    let nodes = "name = \"a\"\n[[nodes]]\nname = \"b\"\nresources = { there = 1 }";
    let dashboard = ("dashboard", "max_log_bytes = 200000\nstop_grace_s = 1.0\norphan_grace_s = 2.0");
    let cluster =
        Cluster::up_bare(&[("devices", "device = \"cpu\"\ncpu = 1"), ("[nodes]", nodes), dashboard]).await;
    assert_eq!(cluster.actor("jobs")["node"], "a");
    cluster
}

fn submit(cluster: &Cluster, id: &str, script: &str) {
    let words = ["job", "submit", "--no-wait", "--submission-id", id, "--entrypoint-resource", "there=1"];
    let output = cluster.helio(&[&words[..], &["--", "sh", "-c", script]].concat());
    assert!(output.status.success(), "{}", text(&output));
}

/// A script that runs until it is ended, and says which process it is.
async fn endless(cluster: &Cluster, id: &str, trap: &str) -> i64 {
    let file = cluster.dir.path().join(id);
    submit(cluster, id, &format!("{trap} echo $$ > {}; while :; do sleep 0.05; done", file.display()));
    let pid = pid_in(cluster, &file).await;
    until(cluster, id, "RUNNING").await;
    pid
}

async fn gone(cluster: &Cluster, id: &str, pid: i64) {
    cluster.until("the script is gone", |_| (!is_alive(pid)).then_some(())).await;
    let no_actor = |cluster: &Cluster| {
        let status = cluster.status()?;
        let name = format!("job.{id}");
        let is_free = |node: &Value| node["used"]["custom"].get("there").is_none_or(|used| used == 0);
        let is_over = |actor: &Value| actor["name"] != *name || actor["state"]["state"] == "dead";
        let over = status["actors"].as_array()?.iter().all(is_over)
            && status["nodes"].as_array()?.iter().all(is_free);
        over.then_some(())
    };
    cluster.until("what it had is given back", no_actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_where_its_bundle_is() {
    let cluster = up().await;
    let code = cluster.dir.path().join("code");
    std::fs::create_dir(&code).unwrap();
    std::fs::write(code.join("data"), "what the package holds\n").unwrap();
    let script = "cat data; echo $HELIOSTAT_JOB_ID; \"$HELIOSTAT_PROGRAM\" list actors; seq 30000; exit 7";
    let words = ["job", "submit", "--submission-id", "seven", "--entrypoint-resource", "there=1"];
    let dir = code.display().to_string();
    let ran = cluster.helio(&[&words[..], &["--working-dir", &dir, "--", "sh", "-c", script]].concat());
    let said = text(&ran);
    assert_eq!(ran.status.code(), Some(1), "{said}");
    assert!(said.contains("what the package holds\nseven\n") && said.contains("\n30000\n"), "{said}");
    assert_eq!(said.matches("Running entrypoint for job").count(), 1, "{said}");
    let runner = said.lines().find(|line| line.starts_with("job.seven "));
    assert!(runner.is_some_and(|line| line.contains(" b ")), "{runner:?}");
    let ended = job(&cluster, "seven");
    assert_eq!((&ended["driver_node_id"], &ended["driver_exit_code"]), (&"b".into(), &7.into()), "{ended}");
    gone(&cluster, "seven", i64::MAX).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_elsewhere_is_stopped_and_leaves_nothing() {
    let cluster = up().await;
    let pid = endless(&cluster, "stopped", "trap 'echo bye; exit 0' TERM;").await;
    let stop = cluster.helio(&["job", "stop", "stopped"]);
    assert!(stop.status.success() && text(&stop).contains("STOPPED"), "{}", text(&stop));
    let log = text(&cluster.helio(&["job", "logs", "stopped"]));
    assert!(log.ends_with("bye\n"), "{log}");
    gone(&cluster, "stopped", pid).await;

    // Its keeper is killed, whose driver owns what runs there.
    let pid = endless(&cluster, "unkept", "").await;
    let record = cluster.dir.path().join("run/jobs/jobs/unkept/keeper.json");
    let record: Value = serde_json::from_str(&std::fs::read_to_string(record).unwrap()).unwrap();
    kill(record["keeper"]["pid"].as_i64().unwrap());
    until(&cluster, "unkept", "FAILED").await;
    gone(&cluster, "unkept", pid).await;

    // Its node is drained: it cannot move, and does not run a second time.
    let pid = endless(&cluster, "drained", "").await;
    assert!(cluster.helio(&["drain", "b", "--deadline", "0"]).status.success());
    let drained = until(&cluster, "drained", "FAILED").await;
    assert_eq!(drained["error_type"], "JOB_SUPERVISOR_ACTOR_DIED", "{drained}");
    assert!(cluster.helio(&["undrain", "b"]).status.success());
    gone(&cluster, "drained", pid).await;
    let file = std::fs::read_to_string(cluster.dir.path().join("drained")).unwrap();
    assert_eq!(file.trim(), pid.to_string());

    // What runs it there is killed.
    let pid = endless(&cluster, "lost", "").await;
    kill(cluster.pid("job.lost"));
    let lost = until(&cluster, "lost", "FAILED").await;
    assert!(lost["message"].as_str().unwrap().contains("lost on node b"), "{lost}");
    assert_eq!(lost["error_type"], "JOB_SUPERVISOR_ACTOR_DIED");
    gone(&cluster, "lost", pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_elsewhere_survives_the_jobs_actor_and_the_head() {
    let cluster = up().await;
    let go = cluster.dir.path().join("go");
    submit(&cluster, "long", &format!("until [ -e {} ]; do sleep 0.05; done; echo done", go.display()));
    until(&cluster, "long", "RUNNING").await;
    let head = cluster.status().unwrap()["head"]["pid"].as_i64().unwrap();
    let (jobs, runner) = (cluster.pid("jobs"), cluster.pid("job.long"));
    kill(jobs);
    kill(head);
    let replaced = |cluster: &Cluster| cluster.actor("jobs")["pid"].as_i64().filter(|pid| *pid != jobs);
    cluster.until("another head", |cluster| cluster.status().map(drop)).await;
    cluster.until("another jobs actor", replaced).await;
    cluster.until_healed().await;
    assert_eq!(cluster.pid("job.long"), runner);
    std::fs::write(go, "").unwrap();
    until(&cluster, "long", "SUCCEEDED").await;
    assert!(text(&cluster.helio(&["job", "logs", "long"])).ends_with("\ndone\n"));
}

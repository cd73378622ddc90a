//! Starting and stopping, and starts that fail.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::rig::{Cluster, PATIENCE, bundled, free_port, helio, is_alive, kill, text, write_config};

/// Waits until none of the processes lives.
fn all_gone(pids: &[i64]) {
    let started = Instant::now();
    while pids.iter().any(|&pid| is_alive(pid)) {
        assert!(started.elapsed() < PATIENCE, "left behind: {pids:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    eprintln!("all gone after {:?}", started.elapsed());
}

/// Process ids of supervisor, head, node agent and workers.
fn everybody(cluster: &Cluster) -> Vec<i64> {
    let status = cluster.status().unwrap();
    let mut pids: Vec<i64> = cluster.pids().into_iter().map(|(_, pid)| pid).collect();
    pids.push(status["head"]["pid"].as_i64().unwrap());
    pids.push(status["nodes"][0]["pid"].as_i64().unwrap());
    pids.push(supervisor(cluster));
    pids
}

/// The detached `helio up`: the parent of the head.
fn supervisor(cluster: &Cluster) -> i64 {
    let head = cluster.status().unwrap()["head"]["pid"].as_i64().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{head}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn down_leaves_nothing_behind() {
    let cluster = Cluster::up(&[]).await;
    let pids = everybody(&cluster);
    let down = cluster.helio(&["down"]);
    assert!(down.status.success(), "{}", text(&down));
    assert!(pids.iter().all(|&pid| !is_alive(pid)), "`helio down` returns when all is gone");
}

/// Without [model] there is nothing that serves a model, and jobs run.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_a_model_runs_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cluster.toml");
    let text_of = |head: u16, http: u16, dashboard: u16| {
        format!(
            "[cluster]\nrun_dir = \"run\"\n[head]\nbind = \"127.0.0.1:{head}\"\n[devices]\ndevice = \"cpu\"\ncpu = 1\n\
             [serve]\nport = {http}\n[dashboard]\nport = {dashboard}\n"
        )
    };
    std::fs::write(&file, text_of(free_port(), free_port(), free_port())).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_helio"));
        command.args(args).current_dir(dir.path()).output().unwrap()
    };
    let check = run(&["check"]);
    assert!(
        check.status.success() && text(&check).contains("none: it runs actors and jobs"),
        "{}",
        text(&check)
    );
    let started = Instant::now();
    let up = run(&["up", "--detach"]);
    assert!(up.status.success() && text(&up).contains("nothing is served yet"), "{}", text(&up));
    eprintln!("a cluster without a model is up after {:?}", started.elapsed());
    let job = run(&["job", "submit", "--", "echo", "no", "model"]);
    assert!(job.status.success() && text(&job).contains("no model"), "{}", text(&job));
    let actors: serde_json::Value =
        serde_json::from_slice(&run(&["list", "actors", "--json"]).stdout).unwrap();
    let names: Vec<&str> =
        actors.as_array().unwrap().iter().map(|actor| actor["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["ingress", "jobs", "serve"]);
    let down = run(&["down"]);
    assert!(down.status.success(), "{}", text(&down));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_up_leaves_no_orphans() {
    let cluster = Cluster::up(&[]).await;
    let pids = everybody(&cluster);
    kill(supervisor(&cluster));
    all_gone(&pids);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_says_who_runs_there() {
    let cluster = Cluster::up(&[]).await;
    let file = cluster.dir.path().join("cluster.toml");
    let second = helio(&["up", file.to_str().unwrap(), "--detach"]);
    assert!(!second.status.success());
    assert!(text(&second).contains("already"), "{}", text(&second));
}

#[test]
fn a_torn_checkpoint_is_named_before_anything_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(bundled()).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
        }
    }
    let shard = model.join("model-00002-of-00002.safetensors");
    let torn = std::fs::OpenOptions::new().write(true).open(&shard).unwrap();
    torn.set_len(9_000_000).unwrap();
    let (file, _) = write_config(dir.path(), &model, &[]);
    let up = Command::new(env!("CARGO_BIN_EXE_helio"))
        .args(["up", file.to_str().unwrap(), "--detach"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!up.status.success());
    assert!(text(&up).contains("model-00002-of-00002.safetensors"), "{}", text(&up));
    let status = helio(&["status", "--address", "127.0.0.1:1"]);
    assert_eq!(status.status.code(), Some(3), "{}", text(&status));
}

/// Two nodes of this machine, without a model.
const TWO: [(&str, &str); 2] =
    [("devices", "device = \"cpu\"\ncpu = 1"), ("[nodes]", "name = \"a\"\n[[nodes]]\nname = \"b\"")];

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_left_stays_away() {
    let cluster = Cluster::up_bare(&TWO).await;
    let left = cluster.helio(&["drain", "b", "--leave"]);
    assert!(left.status.success(), "{}", text(&left));
    let log = cluster.dir.path().join("run/logs/up.log");
    let said = |_: &Cluster| std::fs::read_to_string(&log).ok()?.contains("b has left").then_some(());
    cluster.until("the supervisor sees it", said).await;
    let status = cluster.status().unwrap();
    let names: Vec<&str> =
        status["nodes"].as_array().unwrap().iter().map(|node| node["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a"]);
}

/// A supervisor says what it does to a terminal, or to a log on a disk. Neither need be there.
#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_nobody_hears_goes_on() {
    let cluster = Cluster::by_hand().await;
    let (file, _) = write_config(cluster.dir.path(), &bundled(), &[]);
    let mut up = Command::new(env!("CARGO_BIN_EXE_helio"));
    let mut up = up.arg("up").arg(file).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(up.stderr.take());
    let mut said = BufReader::new(up.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line.starts_with("Stop:")), "it serves");
    drop(said);
    let agent = |cluster: &Cluster| cluster.status()?["nodes"][0]["pid"].as_i64();
    let before = cluster.until("a node", agent).await;
    kill(before);
    cluster.until("another agent", |cluster| agent(cluster).filter(|pid| *pid != before)).await;
    assert!(up.try_wait().unwrap().is_none(), "the supervisor lives");
    assert!(cluster.helio(&["down"]).status.success());
    assert!(up.wait().unwrap().success());
}

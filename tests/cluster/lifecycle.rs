//! Starting and stopping, and starts that fail.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::rig::{Cluster, PATIENCE, bundled, helio, is_alive, kill, text, write_config};

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

//! Kills under load: the cluster heals by itself, and every stream ends as if nothing had happened.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::rig::{Cluster, PATIENCE, free_port, greedy, is_alive, kill};

pub(crate) const STREAMS: usize = 8;
const TOKENS: u32 = 160;

/// A greedy stream; every fourth follows a grammar.
fn body(number: usize) -> Value {
    let mut body = greedy(number, TOKENS);
    if number % 4 == 3 {
        body["structured_outputs"] = json!({"regex": "([a-z]{1,9} ){1000}"});
    }
    body
}

/// Texts of an undisturbed run.
pub(crate) async fn undisturbed(cluster: &Cluster) -> Vec<String> {
    cluster.until_served().await;
    let asks = (0..STREAMS).map(|number| {
        let body = body(number);
        async move { cluster.stream(&body, |_| ()).await.unwrap() }
    });
    let texts = join_all(asks).await;
    assert!(texts[3].chars().all(|char| char == ' ' || char.is_ascii_lowercase()), "{}", texts[3]);
    texts
}

/// Runs all streams; once they flow, `harm` is done. Returns the texts and the longest pause of any stream.
pub(crate) async fn disturbed(
    cluster: &Cluster,
    harm: impl AsyncFnOnce(),
) -> (Vec<Result<String, String>>, Duration) {
    let flowing = AtomicUsize::new(0);
    let notify = tokio::sync::Notify::new();
    let streams = (0..STREAMS).map(|number| {
        let (flowing, notify) = (&flowing, &notify);
        async move {
            let (mut last, mut pause) = (Instant::now(), Duration::ZERO);
            let text = cluster
                .stream(&body(number), |chunks| {
                    pause = pause.max(last.elapsed());
                    last = Instant::now();
                    if chunks == 3 && flowing.fetch_add(1, Ordering::Relaxed) + 1 == STREAMS {
                        notify.notify_one();
                    }
                })
                .await;
            (text, pause)
        }
    });
    let harmed = async {
        notify.notified().await;
        harm().await;
    };
    let (results, ()) = tokio::join!(join_all(streams), harmed);
    let pause = results.iter().map(|(_, pause)| *pause).max().unwrap();
    (results.into_iter().map(|(text, _)| text).collect(), pause)
}

pub(crate) fn all_equal(got: Vec<Result<String, String>>, expected: &[String]) {
    for (number, (got, expected)) in got.into_iter().zip(expected).enumerate() {
        assert_eq!(
            &got.unwrap_or_else(|why| panic!("stream {number} failed: {why}")),
            expected,
            "stream {number}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_rank_loses_no_stream() {
    let cluster = Cluster::up(&[]).await;
    let expected = undisturbed(&cluster).await;
    for rank in ["rank-1", "rank-0"] {
        let pid = cluster.pid(rank);
        let (got, pause) = disturbed(&cluster, async || kill(pid)).await;
        all_equal(got, &expected);
        cluster.until_healed().await;
        let actor = cluster.actor(rank);
        assert_eq!(actor["restarts"], 1, "{actor}");
        assert_ne!(actor["pid"], pid);
        assert!(actor["last_death"].to_string().contains('9'), "{actor}");
        eprintln!("{rank} killed: longest pause of a stream {pause:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_rank_is_restarted_and_loses_no_stream() {
    let cluster = Cluster::up(&[("parallel", "step_timeout_s = 1.0")]).await;
    let expected = undisturbed(&cluster).await;
    let pid = cluster.pid("rank-1");
    let freeze =
        async || assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap().success());
    let (got, pause) = disturbed(&cluster, freeze).await;
    all_equal(got, &expected);
    cluster.until_healed().await;
    assert_ne!(cluster.pid("rank-1"), pid);
    eprintln!("rank-1 frozen, step time-out 1 s: longest pause of a stream {pause:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_killed_during_remaps_loses_no_stream() {
    let eplb = "step_interval = 5\nwindow_size = 20\nnum_redundant_experts = 8";
    let cluster = Cluster::up(&[("eplb", eplb)]).await;
    let expected = undisturbed(&cluster).await;
    for rank in ["rank-2", "rank-3", "rank-1"] {
        let pid = cluster.pid(rank);
        all_equal(disturbed(&cluster, async || kill(pid)).await.0, &expected);
        cluster.until_healed().await;
    }
    let (_, status) = cluster.get("/api/eplb").await;
    let history = status["history"].as_array().unwrap();
    eprintln!(
        "{} remaps, of which {} were committed",
        history.len(),
        history.iter().filter(|remap| remap["end"] == "committed").count()
    );
    assert!(history.iter().any(|remap| remap["end"] == "committed"));
    assert_eq!(status["membership_epoch"], 7, "three losses, three completions, one start");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_agent_is_replaced_and_adopts_its_workers() {
    let cluster = Cluster::up(&[]).await;
    let expected = undisturbed(&cluster).await;
    let before = cluster.pids();
    let node = cluster.status().unwrap()["nodes"][0]["pid"].as_i64().unwrap();
    let (got, pause) = disturbed(&cluster, async || kill(node)).await;
    all_equal(got, &expected);
    cluster
        .until("another node agent", |cluster| {
            let status = cluster.status()?;
            let entry = &status["nodes"][0];
            (entry["pid"].as_i64()? != node && entry["state"]["state"] == "ready").then_some(())
        })
        .await;
    cluster.until_healed().await;
    assert_eq!(cluster.pids(), before, "no worker was restarted");
    eprintln!("node agent killed: longest pause of a stream {pause:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_head_is_replaced_and_serving_never_stops() {
    let cluster = Cluster::up(&[]).await;
    let expected = undisturbed(&cluster).await;
    let before = cluster.pids();
    let head = cluster.status().unwrap()["head"]["pid"].as_i64().unwrap();
    let (got, pause) = disturbed(&cluster, async || kill(head)).await;
    all_equal(got, &expected);
    cluster
        .until("another head", |cluster| (cluster.status()?["head"]["pid"].as_i64()? != head).then_some(()))
        .await;
    cluster.until_healed().await;
    assert_eq!(cluster.pids(), before, "no worker was restarted");
    eprintln!("head killed: longest pause of a stream {pause:?}");
    // The new head supervises: it heals what dies now.
    let pid = cluster.pid("rank-2");
    kill(pid);
    cluster
        .until("rank-2 restarted", |cluster| (cluster.actor("rank-2")["restarts"] == 1).then_some(()))
        .await;
    cluster.until_healed().await;
    all_equal(disturbed(&cluster, async || ()).await.0, &expected);
}

/// Has processes stand still for a while.
async fn freeze(pids: &[i64], time: Duration) {
    let signal = |name: &str| {
        let pids = pids.iter().map(i64::to_string);
        assert!(Command::new("kill").arg(name).args(pids).status().unwrap().success());
    };
    signal("-STOP");
    tokio::time::sleep(time).await;
    signal("-CONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_stood_still_goes_on() {
    let cluster = Cluster::up(&[]).await;
    let expected = undisturbed(&cluster).await;
    let (before, status) = (cluster.pids(), cluster.status().unwrap());
    let mut pids: Vec<i64> = before.iter().map(|(_, pid)| *pid).collect();
    pids.extend([&status["head"]["pid"], &status["nodes"][0]["pid"]].map(|pid| pid.as_i64().unwrap()));
    // Longer than a handler may take, and than a node may be silent.
    let still = Duration::from_secs(12);
    all_equal(disturbed(&cluster, async || freeze(&pids, still).await).await.0, &expected);
    cluster.until_healed().await;
    assert_eq!(cluster.pids(), before, "no worker was restarted");
    all_equal(disturbed(&cluster, async || ()).await.0, &expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_stood_still_gives_up_nobody() {
    let cluster = Cluster::up(&[("supervision", "node_grace_s = 1.0")]).await;
    let expected = undisturbed(&cluster).await;
    let (before, status) = (cluster.pids(), cluster.status().unwrap());
    let head = [status["head"]["pid"].as_i64().unwrap()];
    let still = Duration::from_secs(4);
    let (got, pause) = disturbed(&cluster, async || freeze(&head, still).await).await;
    all_equal(got, &expected);
    cluster.until_healed().await;
    assert_eq!(cluster.pids(), before, "no worker was restarted");
    eprintln!("head frozen for 4 s: longest pause of a stream {pause:?}");
    // It supervises again.
    kill(cluster.pid("rank-2"));
    cluster
        .until("rank-2 restarted", |cluster| (cluster.actor("rank-2")["restarts"] == 1).then_some(()))
        .await;
    cluster.until_healed().await;
    all_equal(disturbed(&cluster, async || ()).await.0, &expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_eplb_or_ingress_comes_back() {
    let cluster = Cluster::up(&[]).await;
    let expected = undisturbed(&cluster).await;
    let eplb = cluster.pid("eplb");
    let (got, _) = disturbed(&cluster, async || kill(eplb)).await;
    all_equal(got, &expected);
    cluster.until_healed().await;
    let (status, reply) = cluster.post("/api/eplb/rebalance", &serde_json::json!({})).await;
    assert!(status == 202 || status == 409, "{status} {reply}");
    kill(cluster.pid("ingress"));
    cluster
        .until("ingress restarted", |cluster| (cluster.actor("ingress")["restarts"] == 1).then_some(()))
        .await;
    cluster.until_healed().await;
    all_equal(disturbed(&cluster, async || ()).await.0, &expected);
}

/// What `/api/eplb` says, once it says so.
async fn eplb(cluster: &Cluster, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let fitting = async {
        loop {
            let (_, status) = cluster.get("/api/eplb").await;
            if fits(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, fitting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_eplb_actor_goes_on_from_what_the_ranks_have_now() {
    let cluster = Cluster::up(&[("eplb", "enable_eplb = false")]).await;
    undisturbed(&cluster).await;
    let (status, reply) = cluster.post("/api/eplb/rebalance", &serde_json::json!({})).await;
    assert_eq!(status, 202, "{reply}");
    let before = eplb(&cluster, "the remap", |status| status["history"][0]["end"] == "committed").await;
    kill(cluster.pid("eplb"));
    let killed = |cluster: &Cluster| (cluster.actor("eplb")["restarts"] == 1).then_some(());
    cluster.until("eplb restarted", killed).await;
    let after =
        eplb(&cluster, "all ranks", |status| status["ready"] == 4 && status["history"][0].is_null()).await;
    assert_eq!(after["map_epoch"], before["map_epoch"], "it knows of the remap before its time");
}

/// A real etcd on free ports.
pub(crate) struct Etcd {
    dir: tempfile::TempDir,
    pub(crate) client: u16,
    peer: u16,
    process: Child,
}

impl Etcd {
    pub(crate) fn start() -> Self {
        let (dir, client, peer) = (tempfile::tempdir().unwrap(), free_port(), free_port());
        let process = Self::spawn(&dir, client, peer);
        Self { dir, client, peer, process }
    }

    fn spawn(dir: &tempfile::TempDir, client: u16, peer: u16) -> Child {
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        Command::new("etcd")
            .args(["--data-dir", dir.path().join("etcd").to_str().unwrap()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed by scripts/setup")
    }

    /// Waits until it listens.
    pub(crate) async fn answers(&self) {
        while tokio::net::TcpStream::connect(("127.0.0.1", self.client)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.process = Self::spawn(&self.dir, self.client, self.peer);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_etcd_stops_nothing_and_keeps_everything() {
    let mut etcd = Etcd::start();
    let state = format!("store = \"etcd\"\nendpoints = [\"http://127.0.0.1:{}\"]", etcd.client);
    let cluster = Cluster::up(&[("state", &state)]).await;
    let expected = undisturbed(&cluster).await;
    let before = cluster.pids();
    let (got, _) = disturbed(&cluster, async || etcd.kill()).await;
    all_equal(got, &expected);
    // Without its store the head still heals a rank.
    kill(cluster.pid("rank-3"));
    cluster
        .until("rank-3 restarted", |cluster| (cluster.actor("rank-3")["restarts"] == 1).then_some(()))
        .await;
    cluster.until_healed().await;
    etcd.restart();
    let healthy = |cluster: &Cluster| {
        let store = &cluster.status()?["state_store"];
        (store["error"].is_null() && store["queued"] == 0).then_some(())
    };
    cluster.until("the store is healthy again", healthy).await;
    // The head that starts now finds in etcd what the other one knew.
    let head = cluster.status().unwrap()["head"]["pid"].as_i64().unwrap();
    let now = cluster.pids();
    kill(head);
    cluster
        .until("another head", |cluster| (cluster.status()?["head"]["pid"].as_i64()? != head).then_some(()))
        .await;
    cluster.until_healed().await;
    assert_eq!(cluster.pids(), now);
    assert_eq!(before.len(), now.len());
    assert!(now.iter().all(|(_, pid)| is_alive(*pid)));
    all_equal(disturbed(&cluster, async || ()).await.0, &expected);
}

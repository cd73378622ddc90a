//! Several heads on one etcd: whatever becomes of the leader, another takes over, and serving never stops.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heliostat_runtime::cluster::Cluster as Client;
use heliostat_runtime::spec::ActorSpec;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::faults::{Etcd, all_equal, disturbed, undisturbed};
use crate::rig::{Cluster, bundled, free_port, helio, is_alive, kill, text};

/// Longer than a lease lasts, and etcd takes to notice, on a busy machine.
const TAKEOVER_MAX: Duration = Duration::from_secs(8);

/// Two heads, of which the first leads, and one node, all started by hand.
struct Party {
    cluster: Cluster,
    ports: [u16; 2],
    heads: [Child; 2],
    node: Option<Child>,
    /// Directory of certificates, where they talk TLS.
    tls: Option<PathBuf>,
    _etcd: Etcd,
}

fn spawn(dir: &Path, log: &str, args: &[&str]) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("run").join(log)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_helio"));
    command.args(args).current_dir(dir).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn signal(process: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap();
    assert!(status.success());
}

impl Party {
    /// `wire` is where the first head finds etcd, if that is not etcd itself.
    async fn start(etcd: Etcd, wire: Option<u16>) -> Self {
        Self::start_with(etcd, wire, None).await
    }

    /// `tls` has the certificates of all processes.
    async fn start_with(etcd: Etcd, wire: Option<u16>, tls: Option<PathBuf>) -> Self {
        let (cluster, ports) = (Cluster::by_hand().await, [free_port(), free_port()]);
        etcd.answers().await;
        let dir = cluster.dir.path().to_owned();
        let files = ["cluster.toml", "b.toml"].map(|name| dir.join(name));
        for (i, file) in files.iter().enumerate() {
            let config = format!(
                "[cluster]\nrun_dir = {:?}\n[head]\nbind = \"127.0.0.1:{}\"\npeers = [\"127.0.0.1:{}\"]\n\
                 [state]\nstore = \"etcd\"\nendpoints = [\"http://127.0.0.1:{}\"]\n[model]\npath = {:?}\n\
                 [serve]\nport = {}\n[devices]\ndevice = \"cpu\"\ncpu = 4\nthreads = 1\n{}",
                dir.join(["run", "run-b"][i]),
                ports[i],
                ports[1 - i],
                wire.filter(|_| i == 0).unwrap_or(etcd.client),
                bundled(),
                cluster.http,
                tls.iter().map(|dir| format!("[security]\ndir = {dir:?}\n")).collect::<String>(),
            );
            std::fs::write(file, config).unwrap();
        }
        std::fs::create_dir_all(dir.join("run")).unwrap();
        let first = spawn(&dir, "head-0.log", &["head", files[0].to_str().unwrap()]);
        cluster.until("the first head leads", |cluster| cluster.status().map(drop)).await;
        let second = spawn(&dir, "head-1.log", &["head", files[1].to_str().unwrap()]);
        let party = Self { cluster, ports, heads: [first, second], node: None, tls, _etcd: etcd };
        party.stands_by(1, 0).await;
        party
    }

    /// The same with a node that serves.
    async fn serving() -> Self {
        let mut party = Self::start(Etcd::start(), None).await;
        party.join().await;
        party
    }

    async fn join(&mut self) {
        let heads = self.address(0) + "," + &self.address(1);
        let args = ["node", "--join", &heads, "--name", "n", "--devices", "cpu=4", "--threads", "1"];
        let run_dir = self.cluster.dir.path().join("run/node");
        let tls = self.tls_args();
        let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
        let args = [&args[..], &["--run-dir", run_dir.to_str().unwrap()], &tls].concat();
        self.node = Some(spawn(self.cluster.dir.path(), "node.log", &args));
        self.cluster
            .until("the deployment", |cluster| {
                let status = cluster.status()?;
                let there = |name| status["actors"].as_array()?.iter().find(|it| it["name"] == name);
                there("ingress").and(there("eplb")).map(|_| ())
            })
            .await;
        self.cluster.until_healed().await;
    }

    fn tls_args(&self) -> Vec<String> {
        self.tls.iter().flat_map(|dir| ["--tls".to_owned(), dir.display().to_string()]).collect()
    }

    fn address(&self, head: usize) -> String {
        format!("127.0.0.1:{}", self.ports[head])
    }

    fn log(&self, head: usize) -> String {
        std::fs::read_to_string(self.cluster.dir.path().join(format!("run/head-{head}.log"))).unwrap()
    }

    /// Waits until a command that comes to one head is told that it stands by for the other.
    async fn stands_by(&self, head: usize, leader: usize) {
        let told = format!("the head at {} stands by; {} leads", self.address(head), self.address(leader));
        self.cluster
            .until(&told, |_| {
                let (address, tls) = (self.address(head), self.tls_args());
                let args: Vec<&str> = ["status", "--address", &address]
                    .into_iter()
                    .chain(tls.iter().map(String::as_str))
                    .collect();
                text(&helio(&args)).contains(&told).then_some(())
            })
            .await;
    }

    /// Waits until that head leads; the time since `from`, and the status.
    async fn taken_over(&self, head: usize, from: Instant) -> (Duration, Value) {
        let address = self.address(head);
        let status = self
            .cluster
            .until("another head", |cluster| {
                cluster.status().filter(|status| status["head"]["endpoint"] == *address)
            })
            .await;
        let took = from.elapsed();
        assert!(took < TAKEOVER_MAX, "it took {took:?}");
        (took, status)
    }

    /// Waits until the leader has heard of the node and waits for nothing.
    async fn recovered(&self) -> Value {
        self.cluster
            .until("recovered", |cluster| {
                let status = cluster.status()?;
                let node = status["nodes"][0]["state"]["state"] == "ready";
                (node && status["head"]["recovering"] == false).then_some(status)
            })
            .await
    }

    /// A rank is killed; the present leader starts it again, once, and no stream is lost.
    async fn heals(&self, rank: &str, expected: &[String]) {
        let pid = self.cluster.pid(rank);
        let (got, pause) = disturbed(&self.cluster, async || kill(pid)).await;
        all_equal(got, expected);
        self.cluster
            .until("the rank came back", |cluster| (cluster.actor(rank)["restarts"] == 1).then_some(()))
            .await;
        self.cluster.until_healed().await;
        eprintln!("{rank} killed after the takeover: longest pause of a stream {pause:?}");
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for head in 0..2 {
                eprintln!("== head {head}\n{}", self.log(head));
            }
        }
        for head in &self.heads {
            let mut thaw = Command::new("kill");
            let _ = thaw.args(["-CONT", &head.id().to_string()]).stderr(Stdio::null()).status();
        }
        self.cluster.helio(&["down"]);
        for child in self.heads.iter_mut().chain(&mut self.node) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_replaced_by_the_head_that_stands_by() {
    let mut party = Party::serving().await;
    let expected = undisturbed(&party.cluster).await;
    let (before, status) = (party.cluster.pids(), party.cluster.status().unwrap());
    let mut killed = Instant::now();
    let leader = i64::from(party.heads[0].id());
    let (got, pause) = disturbed(&party.cluster, async || {
        kill(leader);
        killed = Instant::now();
    })
    .await;
    all_equal(got, &expected);
    let (_, after) = party.taken_over(1, killed).await;
    assert!(after["head"]["term"].as_u64() > status["head"]["term"].as_u64());
    let after = party.recovered().await;
    assert_eq!(party.cluster.pids(), before, "no worker was restarted");
    for part in ["groups", "workers"] {
        assert_eq!(after[part], status[part], "the new leader knows all {part}");
    }
    eprintln!("leader killed: longest pause of a stream {pause:?}");
    // The new leader supervises.
    party.heals("rank-1", &expected).await;
    // The old one comes back and stands by; and takes over in its turn.
    party.heads[0].wait().unwrap();
    let file = party.cluster.dir.path().join("cluster.toml");
    party.heads[0] = spawn(party.cluster.dir.path(), "head-0.log", &["head", file.to_str().unwrap()]);
    party.stands_by(0, 1).await;
    let before = party.cluster.pids();
    kill(i64::from(party.heads[1].id()));
    let (took, _) = party.taken_over(0, Instant::now()).await;
    party.recovered().await;
    assert_eq!(party.cluster.pids(), before, "no worker was restarted");
    eprintln!("leader killed: the next one leads after {took:?}");
    // One that is asked to end hands over at once.
    let file = party.cluster.dir.path().join("b.toml");
    party.heads[1].wait().unwrap();
    party.heads[1] = spawn(party.cluster.dir.path(), "head-1.log", &["head", file.to_str().unwrap()]);
    party.stands_by(1, 0).await;
    signal(&party.heads[0], "-TERM");
    let (took, _) = party.taken_over(1, Instant::now()).await;
    party.heads[0].wait().unwrap();
    eprintln!("leader ended by SIGTERM: the next one leads after {took:?}");
    // `helio down` ends them all: nobody takes over from a leader that has shut the cluster down.
    let pids = party.cluster.pids();
    let down = party.cluster.helio(&["down"]);
    assert!(down.status.success(), "{}", text(&down));
    assert!(pids.iter().all(|(_, pid)| !is_alive(*pid)));
}

/// The same where every connection has certificates at both ends: heads with each other, node, ranks and commands.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_replaced_under_tls() {
    let certs = tempfile::tempdir().unwrap();
    crate::security::certificates(certs.path());
    let tls = Some(certs.path().join("head"));
    let mut party = Party::start_with(Etcd::start(), None, tls).await;
    party.join().await;
    let expected = undisturbed(&party.cluster).await;
    let before = party.cluster.pids();
    let mut killed = Instant::now();
    let leader = i64::from(party.heads[0].id());
    let (got, pause) = disturbed(&party.cluster, async || {
        kill(leader);
        killed = Instant::now();
    })
    .await;
    all_equal(got, &expected);
    let (took, _) = party.taken_over(1, killed).await;
    party.recovered().await;
    assert_eq!(party.cluster.pids(), before, "no worker was restarted");
    eprintln!(
        "leader killed under TLS: the next one leads after {took:?}; longest pause of a stream {pause:?}"
    );
    party.heals("rank-1", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_leader_gives_no_order_when_it_thaws() {
    let party = Party::serving().await;
    let expected = undisturbed(&party.cluster).await;
    let before = party.cluster.pids();
    let mut frozen = Instant::now();
    let (got, pause) = disturbed(&party.cluster, async || {
        signal(&party.heads[0], "-STOP");
        frozen = Instant::now();
    })
    .await;
    all_equal(got, &expected);
    let (took, _) = party.taken_over(1, frozen).await;
    eprintln!("leader frozen: the next one answers after {took:?}; longest pause of a stream {pause:?}");
    party.recovered().await;
    // While it sleeps, a rank dies: its death is the first thing that the old leader hears.
    kill(party.cluster.pid("rank-2"));
    signal(&party.heads[0], "-CONT");
    party.stands_by(0, 1).await;
    party.cluster.until_healed().await;
    assert_eq!(party.cluster.actor("rank-2")["restarts"], 1);
    let after = party.cluster.pids();
    let moved = |(name, pid): &(String, i64)| !before.contains(&(name.clone(), *pid));
    let moved: Vec<&str> = after.iter().filter(|actor| moved(actor)).map(|(name, _)| name.as_str()).collect();
    assert_eq!(moved, ["rank-2"], "nobody else was restarted");
    assert!(party.log(0).contains("leads no more"), "{}", party.log(0));
    all_equal(disturbed(&party.cluster, async || ()).await.0, &expected);
    assert_eq!(party.cluster.status().unwrap()["head"]["endpoint"], party.address(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_the_kill_is_there_after_it() {
    let mut party = Party::start(Etcd::start(), None).await;
    party
        .cluster
        .until("deployed", |cluster| (!cluster.status()?["actors"].as_array()?.is_empty()).then_some(()))
        .await;
    let client = Client::connect(&party.address(0), None).await.unwrap();
    let applied = client.apply(vec![ActorSpec::new("extra", "nobody-makes-this", vec![])]).await.unwrap();
    party.heads[0].kill().unwrap();
    let killed = Instant::now();
    assert_eq!(applied.started, 1);
    // The driver finds the new leader by itself: the old one had named it.
    let status = loop {
        match client.status().await {
            Ok(status) => break status,
            Err(_) => assert!(killed.elapsed() < TAKEOVER_MAX),
        }
    };
    eprintln!("leader killed: a driver has the new one's answer after {:?}", killed.elapsed());
    assert_eq!(status.head.endpoint, party.address(1));
    assert!(status.actor("extra").is_some() && status.actor("serve").is_some(), "{status:#?}");
    client.remove_actor("extra").await.unwrap();
    // Nodes that come later find the new leader, and what was deployed by the old one serves.
    party.join().await;
    let expected = undisturbed(&party.cluster).await;
    all_equal(disturbed(&party.cluster, async || ()).await.0, &expected);
}

/// A wire that can be cut: connections to it go to `target` until then.
fn wire(target: u16) -> (u16, JoinHandle<()>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        let mut connections = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            connections.spawn(async move {
                if let Ok(mut far) = TcpStream::connect(("127.0.0.1", target)).await {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    });
    (port, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_from_etcd_stands_down() {
    let etcd = Etcd::start();
    etcd.answers().await;
    let (port, cable) = wire(etcd.client);
    let mut party = Party::start(etcd, Some(port)).await;
    party.join().await;
    let before = party.cluster.pids();
    cable.abort();
    let cut = Instant::now();
    let (took, _) = party.taken_over(1, cut).await;
    eprintln!("leader cut off from etcd: the next one leads after {took:?}");
    party.recovered().await;
    party.cluster.until_healed().await;
    assert_eq!(party.cluster.pids(), before, "no worker was restarted");
    assert!(party.log(0).contains("leads no more"), "{}", party.log(0));
    let expected = undisturbed(&party.cluster).await;
    party.heals("rank-0", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_reaches_no_node_hands_over_before_it_gives_their_actors_up() {
    let party = Party::serving().await;
    let before = party.cluster.pids();
    let node = party.node.as_ref().unwrap();
    signal(node, "-STOP");
    let (took, _) = party.taken_over(1, Instant::now()).await;
    eprintln!("no node can be reached: the next one leads after {took:?}");
    party.stands_by(0, 1).await;
    signal(node, "-CONT");
    party.recovered().await;
    party.cluster.until_healed().await;
    assert_eq!(party.cluster.pids(), before, "no worker was restarted");
}

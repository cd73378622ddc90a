//! One suite for both state stores: what the head relies on must hold in a local file and in etcd.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail its test")]

#[path = "support/pki.rs"]
mod pki;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heliostat_runtime::state::{
    EtcdTls, Event, Expect, FORMAT_VERSION, Op, Revision, StateConfig, StateError, StateStore, Watch,
};
use pki::{Ca, NODE};
use tempfile::TempDir;
use tokio::time::timeout;

/// Long enough for a loaded machine, short enough for a hang to show.
const SOON: Duration = Duration::from_secs(10);

/// A real etcd in a directory of its own, killed when dropped.
struct EtcdServer {
    child: Child,
    dir: TempDir,
    client_url: String,
    peer_url: String,
}

impl EtcdServer {
    async fn start() -> Self {
        let url = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}", listener.local_addr().unwrap())
        };
        let (dir, client_url, peer_url) = (TempDir::new().unwrap(), url(), url());
        let child = Self::spawn(dir.path(), &client_url, &peer_url);
        let server = Self { child, dir, client_url, peer_url };
        server.wait_until_ready().await;
        server
    }

    fn spawn(dir: &Path, client_url: &str, peer_url: &str) -> Child {
        Self::spawn_with(dir, client_url, peer_url, &[])
    }

    fn spawn_with(dir: &Path, client_url: &str, peer_url: &str, more: &[&str]) -> Child {
        let log = std::fs::File::create(dir.join("log")).unwrap();
        Command::new("etcd")
            .args(["--name", "test", "--data-dir"])
            .arg(dir.join("data"))
            .args(["--listen-client-urls", client_url, "--advertise-client-urls", client_url])
            .args(["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url])
            .args(["--initial-cluster", &format!("test={peer_url}")])
            .args(more)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| {
                panic!("cannot start etcd ({e}): install it (Debian: apt-get install etcd-server)")
            })
    }

    async fn wait_until_ready(&self) {
        let started = Instant::now();
        while let Err(error) = StateStore::open(&self.config("ready")).await {
            if started.elapsed() > Duration::from_secs(30) {
                let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                panic!("etcd does not get ready: {error}\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn config(&self, prefix: &str) -> StateConfig {
        StateConfig::Etcd { endpoints: vec![self.client_url.clone()], prefix: prefix.to_owned(), tls: None }
    }

    /// kill -9, then the same server again on the same data.
    async fn kill_and_restart(&mut self, pause: Duration) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        tokio::time::sleep(pause).await;
        self.child = Self::spawn(self.dir.path(), &self.client_url, &self.peer_url);
        self.wait_until_ready().await;
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn next(watch: &mut Watch) -> Event {
    timeout(SOON, watch.next()).await.expect("no event").unwrap()
}

/// Everything that must hold in every store.
async fn conforms(store: &StateStore) {
    reads_what_it_wrote(store).await;
    swaps_only_what_is_expected(store).await;
    transactions_are_all_or_nothing(store).await;
    watches_miss_nothing(store).await;
    leases_take_their_keys_along(store).await;
    one_leads_at_a_time(store).await;
}

async fn reads_what_it_wrote(store: &StateStore) {
    assert_eq!(store.get("r/a").await.unwrap(), None);
    let first = store.put("r/a", "1", Expect::Any).await.unwrap();
    let second = store.put("r/b", "2", Expect::Any).await.unwrap();
    assert!(second > first);
    store.put("rx", "not in the prefix", Expect::Any).await.unwrap();
    let entry = store.get("r/a").await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), entry.value.as_slice(), entry.revision), ("r/a", &b"1"[..], first));
    let snapshot = store.range("r/").await.unwrap();
    let keys: Vec<_> = snapshot.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["r/a", "r/b"]);
    assert!(snapshot.revision > second);
    store.delete("r/a", Expect::Any).await.unwrap();
    store.delete("r/none", Expect::Any).await.unwrap();
    assert_eq!(store.get("r/a").await.unwrap(), None);
    let big = vec![7; 1 << 20];
    store.put("r/big", big.clone(), Expect::Any).await.unwrap();
    assert!(store.get("r/big").await.unwrap().unwrap().value == big);
}

async fn swaps_only_what_is_expected(store: &StateStore) {
    let revision = store.put("cas", "1", Expect::Absent).await.unwrap();
    let conflict = |present| Err(StateError::Conflict { key: "cas".into(), present });
    assert_eq!(store.put("cas", "2", Expect::Absent).await, conflict(Some(revision)));
    assert_eq!(store.put("cas", "2", Expect::Revision(Revision(1_000_000))).await, conflict(Some(revision)));
    let newer = store.put("cas", "2", Expect::Revision(revision)).await.unwrap();
    assert_eq!(store.delete("cas", Expect::Revision(revision)).await, conflict(Some(newer)));
    store.delete("cas", Expect::Revision(newer)).await.unwrap();
    assert_eq!(store.put("cas", "3", Expect::Revision(newer)).await, conflict(None));
    // Of many who count up at once, none is lost.
    store.put("count", [0], Expect::Any).await.unwrap();
    let counting = (0..4).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..10 {
                loop {
                    let now = store.get("count").await.unwrap().unwrap();
                    let next = [now.value[0] + 1];
                    match store.put("count", next, Expect::Revision(now.revision)).await {
                        Ok(_) => break,
                        Err(StateError::Conflict { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        })
    });
    for counting in counting.collect::<Vec<_>>() {
        counting.await.unwrap();
    }
    assert_eq!(store.get("count").await.unwrap().unwrap().value, [40]);
}

async fn transactions_are_all_or_nothing(store: &StateStore) {
    store.put("t/guard", "g", Expect::Any).await.unwrap();
    let refused = store
        .txn(vec![
            Op::put("t/a", "1"),
            Op::delete("t/guard"),
            Op::Check { key: "t/missing".into(), expect: Expect::Revision(Revision(1)) },
        ])
        .await;
    assert_eq!(refused, Err(StateError::Conflict { key: "t/missing".into(), present: None }));
    assert_eq!(store.get("t/a").await.unwrap(), None);
    assert!(store.get("t/guard").await.unwrap().is_some());
    let revision =
        store.txn(vec![Op::put("t/a", "1"), Op::put("t/b", "2"), Op::delete("t/guard")]).await.unwrap();
    let snapshot = store.range("t/").await.unwrap();
    assert!(snapshot.entries.iter().all(|entry| entry.revision == revision));
    assert_eq!(snapshot.entries.len(), 2);
    let many: Vec<_> = (0..129).map(|i| Op::put(format!("t/{i}"), "")).collect();
    assert!(store.txn(many[..128].to_vec()).await.is_ok());
    assert!(matches!(store.txn(many).await, Err(StateError::Invalid(_))));
    let twice = store.txn(vec![Op::put("t/a", "1"), Op::delete("t/a")]).await;
    assert!(matches!(twice, Err(StateError::Invalid(_))), "{twice:?}");
}

async fn watches_miss_nothing(store: &StateStore) {
    let start = store.put("w/0", "0", Expect::Any).await.unwrap();
    for i in 1..20 {
        store.put(&format!("w/{i}"), [i], Expect::Any).await.unwrap();
        store.put(&format!("other/{i}"), [i], Expect::Any).await.unwrap();
    }
    let mut watch = store.watch("w/", Revision(start.0 + 1)).await.unwrap();
    for i in 1..20 {
        let event = next(&mut watch).await;
        assert_eq!((event.key, event.value), (format!("w/{i}"), Some(vec![i])));
    }
    let revision = store.txn(vec![Op::put("w/x", "x"), Op::delete("w/0")]).await.unwrap();
    let (x, gone) = (next(&mut watch).await, next(&mut watch).await);
    assert_eq!((x.revision, gone.revision), (revision, revision));
    assert_eq!((x.value, gone.value), (Some(b"x".to_vec()), None));
    assert!(timeout(Duration::from_millis(100), watch.next()).await.is_err(), "an event out of nowhere");
}

async fn leases_take_their_keys_along(store: &StateStore) {
    let lease = store.grant(Duration::from_secs(2)).await.unwrap();
    let put = |key: &str| Op::Put {
        key: key.into(),
        value: b"mine".to_vec(),
        expect: Expect::Any,
        lease: Some(lease),
    };
    let revision = store.txn(vec![put("l/a"), put("l/b")]).await.unwrap();
    let mut watch = store.watch("l/", Revision(revision.0 + 1)).await.unwrap();
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        store.keep_alive(lease).await.unwrap();
    }
    assert!(store.get("l/a").await.unwrap().is_some(), "a lease that is kept alive ended");
    let mut gone = [next(&mut watch).await, next(&mut watch).await].map(|event| (event.key, event.value));
    gone.sort();
    assert_eq!(gone, [("l/a".to_owned(), None), ("l/b".to_owned(), None)]);
    assert_eq!(store.keep_alive(lease).await, Err(StateError::LeaseExpired));
    assert_eq!(store.txn(vec![put("l/c")]).await, Err(StateError::LeaseExpired));
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let key = Op::Put { key: "l/d".into(), value: vec![], expect: Expect::Any, lease: Some(lease) };
    store.txn(vec![key]).await.unwrap();
    store.revoke(lease).await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(store.get("l/d").await.unwrap(), None);
}

async fn one_leads_at_a_time(store: &StateStore) {
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let first = store.campaign("head", "first", lease).await.unwrap();
    assert_eq!(store.leader("head").await.unwrap(), Some(b"first".to_vec()));
    let second = tokio::spawn({
        let store = store.clone();
        async move { store.campaign("head", "second", lease).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!second.is_finished());
    store.txn(vec![first.guard(), Op::put("led", "by first")]).await.unwrap();
    store.resign(first.clone()).await.unwrap();
    let second = timeout(SOON, second).await.unwrap().unwrap();
    assert!(second.term() > first.term());
    // The first does not know yet, and cannot do harm.
    let stale = store.txn(vec![first.guard(), Op::put("led", "by first")]).await;
    assert!(matches!(stale, Err(StateError::Conflict { .. })), "{stale:?}");
    store.txn(vec![second.guard(), Op::put("led", "by second")]).await.unwrap();
}

fn embedded(dir: &TempDir) -> StateConfig {
    StateConfig::Embedded { dir: dir.path().join("state") }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_store_conforms() {
    let dir = TempDir::new().unwrap();
    conforms(&StateStore::open(&embedded(&dir)).await.unwrap()).await;
}

#[tokio::test]
async fn a_state_file_of_another_version_is_refused_and_left_as_it_is() {
    let dir = TempDir::new().unwrap();
    drop(reopen(&dir).await);
    let counters = redb::TableDefinition::<&str, u64>::new("counters");
    let mark = |format: u64| {
        let file = redb::Database::open(state_file(&dir)).unwrap();
        let write = file.begin_write().unwrap();
        let before = write.open_table(counters).unwrap().insert("format", format).unwrap().unwrap().value();
        write.commit().unwrap();
        before
    };
    let mut before = FORMAT_VERSION;
    for other in [FORMAT_VERSION - 1, FORMAT_VERSION + 1] {
        assert_eq!(mark(other), before, "opening changed the mark");
        before = other;
        let error = refusal(&embedded(&dir)).await;
        assert!(error.contains(&format!("state.redb has format {other}")), "{error}");
        assert!(error.contains(&format!("reads format {FORMAT_VERSION}: run the version")), "{error}");
        assert!(error.contains("another dir in [state]"), "{error}");
    }
    mark(FORMAT_VERSION);
    drop(reopen(&dir).await);
}

/// Why the store is not opened, for good.
async fn refusal(config: &StateConfig) -> String {
    let error = StateStore::open(config).await.err().expect("it opened");
    assert!(matches!(error, StateError::Format { .. }) && !error.is_transient(), "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_prefix_of_another_version_is_refused() {
    let server = EtcdServer::start().await;
    let config = server.config("heliostat");
    drop(StateStore::open(&config).await.unwrap());
    drop(StateStore::open(&config).await.expect("the same format again"));
    let mut client = etcd_client::Client::connect([&server.client_url], None).await.unwrap();
    for other in [FORMAT_VERSION - 1, FORMAT_VERSION + 1] {
        client.put("heliostat.format", other.to_string(), None).await.unwrap();
        let error = refusal(&config).await;
        assert!(error.contains(&format!("etcd under heliostat/ has format {other}")), "{error}");
        assert!(error.contains("another prefix in [state]"), "{error}");
    }
    StateStore::open(&server.config("helio")).await.expect("another cluster's own");
    // What was written before there were marks has none.
    client.put("old/head/spec/a", "x", None).await.unwrap();
    let error = refusal(&server.config("old")).await;
    assert!(error.contains("etcd under old/ has format 1"), "{error}");
    let kept = client.get("old", Some(etcd_client::GetOptions::new().with_prefix())).await.unwrap();
    assert_eq!(kept.count(), 1, "it is left as it is");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conforms() {
    let server = EtcdServer::start().await;
    conforms(&StateStore::open(&server.config("heliostat")).await.unwrap()).await;
    // Another prefix of the same etcd sees none of it.
    let other = StateStore::open(&server.config("helio")).await.unwrap();
    assert_eq!(other.range("").await.unwrap().entries, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_store_survives_restarts_and_never_counts_back() {
    let dir = TempDir::new().unwrap();
    let store = StateStore::open(&embedded(&dir)).await.unwrap();
    let lease = store.grant(Duration::from_millis(300)).await.unwrap();
    let leased = Op::Put { key: "leased".into(), value: vec![], expect: Expect::Any, lease: Some(lease) };
    store.txn(vec![leased]).await.unwrap();
    let before = store.put("kept", "value", Expect::Any).await.unwrap();
    let gone = store.delete("never", Expect::Any).await.unwrap();
    assert_eq!(gone, before, "a change of nothing is no change");
    drop(store);
    let store = reopen(&dir).await;
    assert_eq!(store.get("kept").await.unwrap().unwrap().revision, before);
    let mut watch = store.watch("leased", before).await.unwrap();
    assert_eq!(next(&mut watch).await.value, None, "the lease of a former life did not end");
    assert!(store.put("kept", "newer", Expect::Revision(before)).await.unwrap() > before);
    let mut history = store.watch("kept", Revision(1)).await.unwrap();
    assert_eq!(next(&mut history).await.value, Some(b"value".to_vec()));
    assert_eq!(next(&mut history).await.value, Some(b"newer".to_vec()));
}

/// The store of a dropped handle closes when its last task ends, a moment later.
async fn reopen(dir: &TempDir) -> StateStore {
    for _ in 0..100 {
        match StateStore::open(&embedded(dir)).await {
            Ok(store) => return store,
            Err(StateError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the store was not closed");
}

#[tokio::test]
async fn a_directory_has_one_owner() {
    let dir = TempDir::new().unwrap();
    let _store = StateStore::open(&embedded(&dir)).await.unwrap();
    let error = StateStore::open(&embedded(&dir)).await.err().unwrap().to_string();
    assert!(error.contains(&format!("in use by process {}", std::process::id())), "{error}");
    assert!(error.contains("a directory of its own"), "{error}");
}

fn state_file(dir: &TempDir) -> PathBuf {
    dir.path().join("state/state.redb")
}

#[tokio::test]
async fn a_damaged_file_is_named_with_the_remedy() {
    let sound = {
        let dir = TempDir::new().unwrap();
        let store = StateStore::open(&embedded(&dir)).await.unwrap();
        for i in 0..200 {
            store.put(&format!("key/{i}"), vec![i; 500], Expect::Any).await.unwrap();
        }
        drop(store);
        drop(reopen(&dir).await);
        std::fs::read(state_file(&dir)).unwrap()
    };
    let len = sound.len();
    let mut foreign = sound.clone();
    foreign[..64].fill(b'x');
    let mut flipped = sound.clone();
    flipped[4096..len / 2].iter_mut().step_by(97).for_each(|byte| *byte ^= 0xff);
    for (name, bytes) in [("foreign", foreign), ("flipped", flipped), ("torn", sound[..len / 3].to_vec())] {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        std::fs::write(state_file(&dir), bytes).unwrap();
        match StateStore::open(&embedded(&dir)).await {
            Err(error @ StateError::Damaged { .. }) => {
                let text = error.to_string();
                assert!(text.contains("state.redb is damaged"), "{name}: {text}");
                assert!(text.contains("put back a copy, or move it away"), "{name}: {text}");
            }
            Err(error) => panic!("{name}: {error}"),
            Ok(_) => panic!("{name}: it opened"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_is_followed_through_its_restart() {
    let mut server = EtcdServer::start().await;
    let store = StateStore::open(&server.config("heliostat")).await.unwrap();
    let before = store.put("a", "1", Expect::Any).await.unwrap();
    let mut watch = store.watch("a", Revision(before.0 + 1)).await.unwrap();
    assert!(timeout(Duration::from_millis(100), watch.next()).await.is_err());
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let asked = Instant::now();
    let error = store.get("a").await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(asked.elapsed() < Duration::from_secs(5));
    server.kill_and_restart(Duration::ZERO).await;
    let restarted = Instant::now();
    let after = loop {
        match store.put("a", "2", Expect::Revision(before)).await {
            Ok(revision) => break revision,
            Err(error) => assert!(error.is_transient() && restarted.elapsed() < SOON, "{error}"),
        }
    };
    let event = next(&mut watch).await;
    assert_eq!((event.revision, event.value), (after, Some(b"2".to_vec())));
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_an_error() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config =
        StateConfig::Etcd { endpoints: vec![format!("http://{free}")], prefix: "p".into(), tls: None };
    let error = StateStore::open(&config).await.err().unwrap();
    assert!(error.is_transient() && error.to_string().contains(&free.to_string()), "{error}");
}

/// An etcd that speaks TLS only and asks clients for a certificate.
#[tokio::test]
async fn an_etcd_with_certificates_lets_only_their_holders_in() {
    let (dir, ca) = (TempDir::new().unwrap(), Ca::new());
    let files = ca.make(&dir.path().join("certs"), &NODE);
    let url = |scheme: &str| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("{scheme}://{}", listener.local_addr().unwrap())
    };
    let (client, peer) = (url("https"), url("http"));
    let [ca, cert, key] = [&files.ca, &files.cert, &files.key].map(|path| path.to_str().unwrap());
    let tls = ["--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", ca];
    let mut server = EtcdServer::spawn_with(dir.path(), &client, &peer, &tls);
    let config = |tls| StateConfig::Etcd { endpoints: vec![client.clone()], prefix: "p".into(), tls };
    let identity = Some((files.cert.clone(), files.key.clone()));
    let ours = EtcdTls { ca: files.ca.clone(), identity: identity.clone() };
    let started = Instant::now();
    let store = loop {
        match StateStore::open(&config(Some(ours.clone()))).await {
            Ok(store) => break store,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(30), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    store.put("a", "1", Expect::Absent).await.unwrap();
    assert_eq!(store.get("a").await.unwrap().unwrap().value, b"1");
    let other = Ca::new().make(&dir.path().join("other"), &NODE);
    for (tls, who) in [
        (Some(EtcdTls { ca: files.ca.clone(), identity: None }), "no certificate"),
        (Some(EtcdTls { ca: other.ca.clone(), identity: identity.clone() }), "another CA than the server's"),
        (None, "no TLS"),
    ] {
        assert!(StateStore::open(&config(tls)).await.is_err(), "{who}");
    }
    let missing = EtcdTls { ca: "/nowhere/ca.crt".into(), identity: None };
    let error = StateStore::open(&config(Some(missing))).await.err().unwrap();
    assert!(!error.is_transient() && error.to_string().contains("/nowhere/ca.crt"), "{error}");
    server.kill().unwrap();
    server.wait().unwrap();
}

//! Jobs: submitted, followed, stopped, deleted, and what they survive.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use heliostat_runtime::cluster::Cluster as Client;
use heliostat_runtime::spec::{ActorSpec, PlacementGroupSpec, Resources};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::rig::{Cluster, PATIENCE, helio, is_alive, kill, text, write_config};

/// Two CPU devices are enough: jobs need none.
const SMALL: [(&str, &str); 2] =
    [("devices", "device = \"cpu\"\ncpu = 1"), ("dashboard", "max_log_bytes = 2000\nstop_grace_s = 1.0")];

pub(crate) fn job(cluster: &Cluster, id: &str) -> Value {
    let output = cluster.helio(&["job", "status", id, "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn submit(cluster: &Cluster, id: &str, script: &str) {
    let args = ["job", "submit", "--no-wait", "--submission-id", id, "--", "sh", "-c", script];
    let output = cluster.helio(&args);
    assert!(output.status.success(), "{}", text(&output));
}

/// Waits until a job has this status.
pub(crate) async fn until(cluster: &Cluster, id: &str, status: &str) -> Value {
    let is = |cluster: &Cluster| Some(job(cluster, id)).filter(|job| job["status"] == status);
    cluster.until(&format!("{id} is {status}"), is).await
}

/// What a job wrote to a file of the test: a process id.
pub(crate) async fn pid_in(cluster: &Cluster, path: &Path) -> i64 {
    let read = |_: &Cluster| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    cluster.until("a job writes its pid", read).await
}

fn follow(cluster: &Cluster, id: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_helio"))
        .args(["job", "logs", id, "-f"])
        .current_dir(cluster.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_run_fail_and_are_forgotten() {
    let cluster = Cluster::up(&SMALL).await;
    let hi = cluster.helio(&["job", "submit", "--", "echo", "it's  hi"]);
    assert!(hi.status.success() && text(&hi).contains("\nit's  hi\n"), "{}", text(&hi));
    let failed =
        cluster.helio(&["job", "submit", "--submission-id", "three", "--", "sh", "-c", "echo why; exit 3"]);
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed));
    assert!(text(&failed).contains("exit code 3"), "{}", text(&failed));
    let three = job(&cluster, "three");
    assert_eq!(
        (&three["driver_exit_code"], &three["error_type"]),
        (&json!(3), &json!("JOB_ENTRYPOINT_COMMAND_ERROR"))
    );
    assert!(three["message"].as_str().unwrap().ends_with("\nwhy\n"), "{three}");
    let again = cluster.helio(&["job", "submit", "--submission-id", "three", "--", "true"]);
    assert!(text(&again).contains("already exists"), "{}", text(&again));

    let dir = cluster.dir.path().join("code");
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    std::fs::write(dir.join("sub/main.sh"), "echo $GREETING from $HELIOSTAT_JOB_ID").unwrap();
    let dir = dir.to_str().unwrap().to_owned();
    let args = ["job", "submit", "--submission-id", "wd", "--working-dir", &dir, "--env", "GREETING=hello"];
    let output = cluster.helio(&[&args[..], &["--", "sh", "sub/main.sh"]].concat());
    assert!(text(&output).contains("hello from wd"), "{}", text(&output));

    let deleted = cluster.helio(&["job", "delete", "three"]);
    assert!(deleted.status.success(), "{}", text(&deleted));
    assert!(text(&cluster.helio(&["job", "logs", "three"])).contains("Job three does not exist"));
    let list: Value = serde_json::from_slice(&cluster.helio(&["job", "list", "--json"]).stdout).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");

    let long = cluster.helio(&["job", "submit", "--", "sh", "-c", "seq 1 2000"]);
    assert!(long.status.success() && text(&long).contains("\n2000\n"), "{}", text(&long));
    let log = text(&cluster.helio(&["job", "logs", &last_id(&cluster)]));
    assert!(
        log.len() < 2200 && log.contains("earlier bytes were dropped") && log.ends_with("\n2000\n"),
        "{log}"
    );
}

fn last_id(cluster: &Cluster) -> String {
    let list: Value = serde_json::from_slice(&cluster.helio(&["job", "list", "--json"]).stdout).unwrap();
    list.as_array().unwrap().last().unwrap()["submission_id"].as_str().unwrap().to_owned()
}

/// What is set aside of the only node's CPUs.
fn used_cpus(cluster: &Cluster) -> f64 {
    cluster.status().unwrap()["nodes"][0]["used"]["cpus"].as_f64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_job_asks_for_comes_from_the_pool_of_actors() {
    let devices = ("devices", "device = \"cpu\"\ncpu = 1");
    let node = ("[nodes]", "cpus = 4\nresources = { licence = 1 }");
    let cluster = Cluster::up_bare(&[devices, node]).await;
    let before = used_cpus(&cluster);
    let head = cluster.status().unwrap()["head"]["endpoint"].as_str().unwrap().to_owned();
    let client = Client::connect(&head, None).await.unwrap();
    let group = |name: &str| PlacementGroupSpec::new(name, 1, Resources::cpus(3));
    let other = client.placement_group(group("other")).await.unwrap();
    other.ready(PATIENCE).await.unwrap();

    let go = cluster.dir.path().join("go");
    let script =
        format!("echo device $HELIOSTAT_DEVICES; while [ ! -e {} ]; do sleep 0.05; done", go.display());
    let asked = ["--entrypoint-num-cpus", "2", "--entrypoint-num-gpus", "1"];
    let more = ["--entrypoint-memory", "1024", "--entrypoint-resource", "licence=1"];
    let words = ["job", "submit", "--no-wait", "--submission-id", "big"];
    let submitted = cluster.helio(&[&words[..], &asked, &more, &["--", "sh", "-c", &script]].concat());
    assert!(submitted.status.success(), "{}", text(&submitted));
    let why = |cluster: &Cluster| job(cluster, "big")["message"].as_str()?.split_once("CPUs free").map(drop);
    cluster.until("the job says what it waits for", why).await;
    assert_eq!(job(&cluster, "big")["status"], "PENDING");
    let small = cluster.helio(&["job", "submit", "--", "true"]);
    assert!(small.status.success(), "one that asks for nothing does not wait: {}", text(&small));

    other.remove().await.unwrap();
    until(&cluster, "big", "RUNNING").await;
    assert_eq!(used_cpus(&cluster), before + 2.0);
    let node = cluster.status().unwrap()["nodes"][0].clone();
    assert_eq!(node["used"]["custom"]["licence"], 1, "{node}");
    assert_eq!(node["devices"][0]["owner"], "bundle 0 of placement group job.big", "{node}");
    let actor = ActorSpec { resources: Resources::cpus(3), ..ActorSpec::new("next", "none", Vec::new()) };
    client.apply(vec![actor]).await.unwrap();
    let waits = |cluster: &Cluster| {
        let state = cluster.actor("next")["state"].clone();
        state["reason"].as_str().is_some_and(|why| why.contains("2 of 4 CPUs free")).then_some(())
    };
    cluster.until("an actor waits for the job", waits).await;
    std::fs::write(&go, "").unwrap();
    until(&cluster, "big", "SUCCEEDED").await;
    assert!(text(&cluster.helio(&["job", "logs", "big"])).contains("\ndevice 0\n"));
    let started = |cluster: &Cluster| (cluster.actor("next")["state"]["state"] != "pending").then_some(());
    cluster.until("the actor has its place", started).await;
    client.remove_actor("next").await.unwrap();
    cluster.until("all is given back", |cluster| (used_cpus(cluster) == before).then_some(())).await;

    let words = ["job", "submit", "--no-wait", "--submission-id", "robbed", "--entrypoint-num-cpus", "1"];
    let submitted = cluster.helio(&[&words[..], &["--", "sleep", "100"]].concat());
    assert!(submitted.status.success(), "{}", text(&submitted));
    until(&cluster, "robbed", "RUNNING").await;
    kill(cluster.pid("jobs"));
    // The next jobs actor looks after it, too.
    cluster.until("another jobs actor", |cluster| job(cluster, "robbed")["status"].as_str().map(drop)).await;
    client.remove_placement_group("job.robbed").await.unwrap();
    let robbed = until(&cluster, "robbed", "FAILED").await;
    assert_eq!(robbed["error_type"], "JOB_SUPERVISOR_ACTOR_DIED", "{robbed}");
    assert!(robbed["message"].as_str().unwrap().contains("job.robbed was removed"), "{robbed}");
    cluster.until("all is given back", |cluster| (used_cpus(cluster) == before).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_the_whole_tree() {
    let cluster = Cluster::up(&SMALL).await;
    let (left, shell) = (cluster.dir.path().join("left"), cluster.dir.path().join("shell"));
    // One child leaves the group and does not listen to SIGTERM.
    let script = format!(
        "setsid sh -c 'trap \"\" TERM; echo $$ > {}; while :; do sleep 0.1; done' & echo $$ > {}; wait",
        left.display(),
        shell.display()
    );
    submit(&cluster, "tree", &script);
    let pids = [pid_in(&cluster, &left).await, pid_in(&cluster, &shell).await];
    let not_yet = cluster.helio(&["job", "delete", "tree"]);
    assert!(text(&not_yet).contains("non-terminal state"), "{}", text(&not_yet));
    let stopped = cluster.helio(&["job", "stop", "tree"]);
    assert!(stopped.status.success() && text(&stopped).contains("STOPPED"), "{}", text(&stopped));
    assert!(pids.iter().all(|&pid| !is_alive(pid)), "{pids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_the_jobs_actor_and_the_head() {
    let cluster = Cluster::up(&SMALL).await;
    let (go, shell) = (cluster.dir.path().join("go"), cluster.dir.path().join("shell"));
    let script = format!(
        "echo $$ > {}; echo before; while [ ! -e {} ]; do sleep 0.05; done; echo after; exit 7",
        shell.display(),
        go.display()
    );
    submit(&cluster, "survivor", &script);
    let pid = pid_in(&cluster, &shell).await;
    let follower = follow(&cluster, "survivor");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let actor = cluster.pid("jobs");
    kill(actor);
    // Between the two there is none, and so no process.
    let is_back =
        |cluster: &Cluster| cluster.actor("jobs")["pid"].as_i64().filter(|&now| now != actor).map(drop);
    cluster.until("another jobs actor", is_back).await;
    until(&cluster, "survivor", "RUNNING").await;
    kill(cluster.status().unwrap()["head"]["pid"].as_i64().unwrap());
    cluster.until("another head", |cluster| cluster.status().map(drop)).await;
    assert!(is_alive(pid));
    std::fs::write(&go, "").unwrap();
    let ended = until(&cluster, "survivor", "FAILED").await;
    assert_eq!(
        ended["driver_exit_code"], 7,
        "the exit code is known to the actor that did not start it: {ended}"
    );
    let followed = follower.wait_with_output().unwrap();
    let log = text(&followed);
    assert!(
        log.contains("before\nafter\n") && log.lines().filter(|line| *line == "before").count() == 1,
        "{log}"
    );
    assert_eq!(followed.status.code(), Some(1), "a job that failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_keeper_is_told_and_leaves_nothing() {
    let cluster = Cluster::up(&SMALL).await;
    let shell = cluster.dir.path().join("shell");
    submit(&cluster, "kept", &format!("echo $$ > {}; sleep 100 & wait", shell.display()));
    let pid = pid_in(&cluster, &shell).await;
    let record = cluster.dir.path().join("run/jobs/jobs/kept/keeper.json");
    let record: Value = serde_json::from_str(&std::fs::read_to_string(record).unwrap()).unwrap();
    let keeper = record["keeper"]["pid"].as_i64().unwrap();
    kill(keeper);
    let ended = until(&cluster, "kept", "FAILED").await;
    assert_eq!(ended["error_type"], "JOB_SUPERVISOR_ACTOR_DIED", "{ended}");
    cluster.until("the shell is gone", |_| (!is_alive(pid)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_actor_that_is_stopped_leaves_its_jobs_to_the_next() {
    let cluster = Cluster::up(&SMALL).await;
    let go = cluster.dir.path().join("go");
    submit(&cluster, "long", &format!("until [ -e {} ]; do sleep 0.05; done; echo done", go.display()));
    until(&cluster, "long", "RUNNING").await;
    let pid = cluster.pid("jobs");
    let stopped = Command::new("kill").args(["-TERM", &pid.to_string()]).status().unwrap();
    assert!(stopped.success());
    let replaced = |cluster: &Cluster| cluster.actor("jobs")["pid"].as_i64().filter(|new| *new != pid);
    cluster.until("another jobs actor", replaced).await;
    cluster.until_healed().await;
    assert_eq!(job(&cluster, "long")["status"], "RUNNING");
    std::fs::write(go, "").unwrap();
    until(&cluster, "long", "SUCCEEDED").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_in_a_job_find_their_cluster() {
    let cluster = Cluster::up(&SMALL).await;
    let script = "\"$HELIOSTAT_PROGRAM\" status && \"$HELIOSTAT_PROGRAM\" job list";
    let inner = cluster.helio(&["job", "submit", "--submission-id", "inner", "--", "sh", "-c", script]);
    let said = text(&inner);
    assert!(inner.status.success() && said.contains("actors; head") && said.contains("RUNNING"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn down_ends_jobs_and_keeps_their_records() {
    let cluster = Cluster::up(&SMALL).await;
    let shell = cluster.dir.path().join("shell");
    submit(&cluster, "last", &format!("echo $$ > {}; sleep 100", shell.display()));
    let pid = pid_in(&cluster, &shell).await;
    assert!(cluster.helio(&["down"]).status.success());
    assert!(!is_alive(pid), "`helio down` returns when all is gone");
    let up = helio(&["up", cluster.dir.path().join("cluster.toml").to_str().unwrap(), "--detach"]);
    assert!(up.status.success(), "{}", text(&up));
    let last = until(&cluster, "last", "STOPPED").await;
    assert!(last["message"].as_str().unwrap().contains("cluster was stopped"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (file, _) = write_config(dir.path(), &crate::rig::bundled(), &[]);
    let port = other.local_addr().unwrap().port();
    let config = std::fs::read_to_string(&file).unwrap();
    let (before, after) = config.split_once("[dashboard]\nport = ").unwrap();
    let rest = after.split_once('\n').unwrap().1;
    std::fs::write(&file, format!("{before}[dashboard]\nport = {port}\n{rest}")).unwrap();
    let up = helio(&["up", file.to_str().unwrap(), "--detach"]);
    assert!(!up.status.success() && text(&up).contains("`port` in [dashboard]"), "{}", text(&up));
}

/// Sends one request as raw bytes and returns all of the answer.
async fn raw(port: u16, request: String, body: &[u8]) -> Vec<u8> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    answer
}

fn dashboard(cluster: &Cluster) -> u16 {
    let url = std::fs::read_to_string(cluster.dir.path().join("run/dashboard")).unwrap();
    url.trim().rsplit_once(':').unwrap().1.parse().unwrap()
}

/// What Ray 2.60's client sends, as recorded from it: method, path, headers, body.
fn recorded() -> Vec<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/ray_client.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_requests_of_rays_client_are_answered_as_it_expects() {
    let cluster = Cluster::up(&SMALL).await;
    let port = dashboard(&cluster);
    for request in recorded() {
        let word = |key: &str| request[key].as_str().unwrap_or_default();
        let hex = word("body_hex").as_bytes().chunks(2);
        let body: Vec<u8> =
            hex.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        let mut head = format!("{} {} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n", word("method"), word("path"));
        for (name, value) in request["headers"].as_object().unwrap() {
            head += &format!("{name}: {}\r\n", value.as_str().unwrap());
        }
        if let Some((id, status)) = request["once"].as_str().and_then(|once| once.split_once(' ')) {
            until(&cluster, id, status).await;
        }
        let answer = raw(port, head + "\r\n", &body).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with(&format!("HTTP/1.1 {}", request["status"])), "{request}: {answer}");
        for part in request["answer_has"].as_array().unwrap() {
            assert!(answer.contains(part.as_str().unwrap()), "{request}: {answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_web_page_cannot_submit() {
    let cluster = Cluster::up(&SMALL).await;
    let port = dashboard(&cluster);
    let body = br#"{"entrypoint": "true"}"#;
    for header in [
        format!("Host: 127.0.0.1:{port}\r\nOrigin: http://evil.example"),
        format!("Host: 127.0.0.1:{port}\r\nSec-Fetch-Site: cross-site"),
        format!("Host: evil.example:{port}"),
    ] {
        let length = body.len();
        let head = format!(
            "POST /api/jobs/ HTTP/1.1\r\n{header}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        let answer = raw(port, head, body).await;
        assert!(answer.starts_with(b"HTTP/1.1 403"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(cluster.helio(&["job", "list", "--json"]).stdout, b"[]\n");
}

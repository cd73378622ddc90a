//! Programs of users: examples of this repository, built, shipped and run as a user would.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;

use crate::rig::{Cluster, PATIENCE, kill, text};

/// Two nodes of this machine, each with a run directory and so packages of its own.
const TWO_NODES: [(&str, &str); 2] =
    [("devices", "device = \"cpu\"\ncpu = 1"), ("[nodes]", "name = \"a\"\n[[nodes]]\nname = \"b\"")];

/// An example, which cargo has built beside the tests' own binary, or builds now.
pub(crate) fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--locked", "--package", "heliostat", "--examples"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.current_dir(crate::rig::root()).status().unwrap().success(), "examples do not build");
    });
    let beside = PathBuf::from(env!("CARGO_BIN_EXE_helio"));
    beside.parent().unwrap().join("examples").join(name)
}

fn submit(cluster: &Cluster, options: &[&str], name: &str, args: &[&str]) -> Output {
    let binary = example(name);
    let mut words = vec!["submit"];
    words.extend(options);
    words.push(binary.to_str().unwrap());
    if !args.is_empty() {
        words.push("--");
        words.extend(args);
    }
    cluster.helio(&words)
}

/// What the driver printed: the log of its job begins with how it was started.
fn printed(output: &Output) -> String {
    let log = String::from_utf8_lossy(&output.stdout);
    let (first, rest) = log.split_once('\n').unwrap_or_default();
    assert!(first.starts_with("Running entrypoint for job "), "{log}");
    rest.to_owned()
}

fn packages(cluster: &Cluster) -> Vec<Value> {
    let listed = cluster.helio(&["package", "list", "--json"]);
    serde_json::from_slice(&listed.stdout).unwrap_or_else(|_| panic!("{}", text(&listed)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submitted_program_runs_its_actors_from_its_own_package() {
    let cluster = Cluster::up(&TWO_NODES).await;
    let counter = submit(&cluster, &[], "counter", &["3"]);
    assert!(counter.status.success(), "{}", text(&counter));
    assert_eq!(printed(&counter), "101\n102\n103\n");
    let package = &packages(&cluster)[0];
    assert_eq!((package["name"].as_str(), package["replaced"].as_bool()), (Some("counter"), Some(false)));
    // The same binary again is uploaded by its name only; what it prints is what its own driver says.
    let again = submit(&cluster, &[], "counter", &["1"]);
    assert_eq!(printed(&again), "101\n", "{}", text(&again));
    assert_eq!(packages(&cluster).len(), 1);

    let pi = submit(&cluster, &[], "pi", &[]);
    assert_eq!(printed(&pi), "pi is about 3.142\n", "{}", text(&pi));
    let left = cluster.status().unwrap();
    let of_programs = left["actors"].as_array().unwrap().iter().filter(|actor| {
        actor["name"].as_str().unwrap().starts_with("functions-") || actor["name"] == "counter"
    });
    assert_eq!(of_programs.count(), 0, "drivers that end leave no actors behind: {left:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_binary_under_the_same_version_is_refused_until_it_replaces_the_first() {
    let cluster = Cluster::up(&TWO_NODES).await;
    assert!(submit(&cluster, &[], "counter", &["1"]).status.success());
    // Other bytes, the same program: what follows the end of an executable is not loaded.
    let other = cluster.dir.path().join("counter");
    std::fs::copy(example("counter"), &other).unwrap();
    let mut bytes = std::fs::read(&other).unwrap();
    bytes.extend(b"another build");
    std::fs::write(&other, bytes).unwrap();
    let other = other.to_str().unwrap();
    let refused = cluster.helio(&["submit", other, "--", "1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("--replace"), "{}", text(&refused));
    let replaced = cluster.helio(&["submit", "--replace", other, "--", "1"]);
    assert!(replaced.status.success(), "{}", text(&replaced));
    // Now the first is the one that disagrees: a driver of it is refused before it starts anything.
    let address = std::fs::read_to_string(cluster.dir.path().join("run/address")).unwrap();
    let mut old = Command::new(example("counter"));
    let old = old.env("HELIOSTAT_ADDRESS", address.trim()).output().unwrap();
    assert!(
        !old.status.success() && text(&old).contains("in this cluster, and this binary is"),
        "{}",
        text(&old)
    );
    let removed = cluster.helio(&["package", "remove", "counter", env!("CARGO_PKG_VERSION")]);
    assert!(removed.status.success(), "{}", text(&removed));
    assert!(packages(&cluster).is_empty());
    // What is no program of ours is told so, and never uploaded.
    let cat = cluster.helio(&["submit", "/bin/cat"]);
    assert!(text(&cat).contains("heliostat::Program"), "{}", text(&cat));
}

#[tokio::test(flavor = "multi_thread")]
async fn actors_of_programs_survive_their_worker_and_the_head_and_a_damaged_package_is_not_run() {
    let cluster = Cluster::up(&TWO_NODES).await;
    let address = std::fs::read_to_string(cluster.dir.path().join("run/address")).unwrap();
    let keep = Command::new(example("counter"))
        .args(["1", "keep"])
        .env("HELIOSTAT_ADDRESS", address.trim())
        .output()
        .unwrap();
    assert!(keep.status.success(), "{}", text(&keep));
    let before = cluster.pid("counter");
    let exe = std::fs::read_link(format!("/proc/{before}/exe")).unwrap();
    let sha256 = packages(&cluster)[0]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(exe.file_name().unwrap().to_str(), Some(&*sha256), "the worker runs the package");
    kill(cluster.status().unwrap()["head"]["pid"].as_i64().unwrap());
    cluster.until("another head", |cluster| cluster.status().map(drop)).await;
    kill(before);
    let is_back = |cluster: &Cluster| {
        let actor = cluster.actor("counter");
        let ready = actor["state"]["state"] == "ready";
        actor["pid"].as_i64().filter(|pid| ready && *pid != before)
    };
    let now = cluster.until("the counter is back", is_back).await;
    // The node notices that the file is another one, and fetches it anew.
    std::fs::remove_file(&exe).unwrap();
    std::fs::write(&exe, "#!/bin/sh\nexit 0\n").unwrap();
    kill(now);
    let back = cluster.until("from a package that is whole", |cluster: &Cluster| {
        let actor = cluster.actor("counter");
        let ready = actor["state"]["state"] == "ready";
        actor["pid"].as_i64().filter(|pid| ready && *pid != now)
    });
    let back = tokio::time::timeout(PATIENCE, back).await.unwrap();
    assert_ne!(back, before);
    let in_use = cluster.helio(&["package", "remove", "counter", env!("CARGO_PKG_VERSION")]);
    assert!(text(&in_use).contains("used by counter"), "{}", text(&in_use));
}

//! A cluster that talks TLS only: what works with certificates, and who stays outside.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::rig::{Cluster, greedy, helio, kill, text};

/// Makes a CA with a certificate for the cluster and one for a client.
pub(crate) fn certificates(dir: &Path) {
    let dir = dir.display().to_string();
    for args in [&["ca"][..], &["node", "head"], &["client", "ada"]] {
        let made = helio(&[&["cert"], args, &["--dir", &dir]].concat());
        assert!(made.status.success(), "{}", text(&made));
    }
}

/// Starts a node agent that is told so.
fn join_as_node(head: &str, tls: &Path, told: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Command::new(env!("CARGO_BIN_EXE_helio"))
        .args(["node", "--join", head, "--name", "zz", "--devices", "cpu=1", "--run-dir"])
        .args([dir.path(), Path::new("--tls"), tls])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(node.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains(told)));
    node.kill().unwrap();
    node.wait().unwrap();
}

/// SE-1, SE-2: head, node agent, ranks and commands all talk TLS; whoever has no certificate learns so.
#[tokio::test]
async fn a_cluster_with_certificates_serves_and_keeps_others_out() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificates(ours.path());
    certificates(theirs.path());
    let dir = format!("dir = {:?}", ours.path().join("head"));
    let keys = ours.path().join("keys");
    std::fs::write(&keys, "# two\n0123456789abcdef\nfedcba9876543210\n").unwrap();
    let [cert, key] = ["tls.crt", "tls.key"].map(|name| ours.path().join("head").join(name));
    let https = format!("tls_cert = {cert:?}\ntls_key = {key:?}\napi_key_file = {keys:?}");
    let cluster =
        Cluster::up(&[("security", &dir), ("dashboard", &https), ("devices", "cpu = 2\ndevice = \"cpu\"")])
            .await;
    let answer = cluster.complete(&greedy(0, 8)).await;
    let status = cluster.status().unwrap();
    let address = status["head"]["endpoint"].as_str().unwrap();
    let status = |tls: Option<&Path>| {
        // A directory without a cluster: nothing is found in it.
        let nowhere = tempfile::tempdir().unwrap();
        let nowhere = nowhere.path().display().to_string();
        let mut args = vec!["status", "--address", address, "--run-dir", &nowhere];
        let tls = tls.map(|dir| dir.display().to_string());
        args.extend(tls.iter().flat_map(|dir| ["--tls", dir]));
        let output = helio(&args);
        (output.status.code(), text(&output))
    };
    let (code, said) = status(Some(&ours.path().join("ada")));
    assert!(code == Some(0) && said.contains("rank-1"), "{said}");
    let (code, said) = status(None);
    assert!(code == Some(3) && said.contains("it speaks TLS only"), "{said}");
    let (code, said) = status(Some(&theirs.path().join("ada")));
    assert!(code == Some(3) && said.contains("made by another CA"), "{said}");
    // The dashboard is HTTPS: commands on this machine know its CA and key, others have to be told.
    let job = cluster.helio(&["job", "submit", "--", "echo", "over", "https"]);
    assert!(job.status.success() && text(&job).contains("over https"), "{}", text(&job));
    let url = std::fs::read_to_string(cluster.dir.path().join("run/dashboard")).unwrap();
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let list = |ca: &Path| {
        let (ca, second) = (ca.join("ca.crt").display().to_string(), ours.path().join("second"));
        std::fs::write(&second, "fedcba9876543210").unwrap();
        helio(&[
            "job",
            "list",
            "--address",
            url.trim(),
            "--tls-ca",
            &ca,
            "--api-key-file",
            &second.display().to_string(),
        ])
    };
    let told = list(ours.path());
    assert!(told.status.success(), "{}", text(&told));
    let stranger = list(theirs.path());
    assert!(stranger.status.code() == Some(3), "{}", text(&stranger));
    // SE-2: nor can it be a node, which the head connects to.
    join_as_node(address, &ours.path().join("ada"), "its certificate is a client's");
    assert_eq!(cluster.status().unwrap()["nodes"].as_array().unwrap().len(), 1);
    // A rank is replaced, and its group complete again, over TLS.
    let pid = cluster.pid("rank-1");
    kill(pid);
    let replaced = |cluster: &Cluster| cluster.actor("rank-1")["pid"].as_i64().filter(|new| *new != pid);
    cluster.until("another process", replaced).await;
    cluster.until_healed().await;
    assert_eq!(cluster.complete(&greedy(0, 8)).await["text"], answer["text"]);
}

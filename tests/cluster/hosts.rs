//! Several hosts: a head and nodes started by hand, each in a network namespace of its own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rig::{PATIENCE, bundled, kill};

const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];

/// Two hosts and the wire between them.
struct Hosts {
    names: [String; 2],
    processes: Vec<Child>,
}

fn ip(args: &str) -> bool {
    let output = Command::new("ip").args(args.split_whitespace()).stderr(Stdio::null()).status();
    output.is_ok_and(|status| status.success())
}

impl Hosts {
    /// `None` where namespaces cannot be made.
    fn new() -> Option<Self> {
        let names = ["a", "b"].map(|host| format!("helio-{}-{host}", std::process::id()));
        let hosts = Self { names, processes: Vec::new() };
        let [a, b] = &hosts.names;
        let wire = ["hva", "hvb"].map(|end| format!("{end}{}", std::process::id()));
        let made = ip(&format!("netns add {a}"))
            && ip(&format!("netns add {b}"))
            && ip(&format!("link add {} netns {a} type veth peer name {} netns {b}", wire[0], wire[1]));
        if !made {
            return None;
        }
        for ((host, address), end) in hosts.names.iter().zip(ADDRESSES).zip(&wire) {
            assert!(ip(&format!("-n {host} addr add {address}/24 dev {end}")));
            assert!(ip(&format!("-n {host} link set {end} up")) && ip(&format!("-n {host} link set lo up")));
        }
        Some(hosts)
    }

    fn command(&self, host: usize, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], program]).args(args);
        command
    }

    fn start(&mut self, host: usize, args: &[&str]) {
        let child =
            self.command(host, env!("CARGO_BIN_EXE_helio"), args).stdin(Stdio::null()).spawn().unwrap();
        self.processes.push(child);
    }

    fn status(&self, dir: &Path) -> Option<Value> {
        let address = format!("{}:6379", ADDRESSES[0]);
        let token = dir.join("token");
        let args = ["status", "--json", "--address", &address, "--token-file", token.to_str().unwrap()];
        let output = self.command(1, env!("CARGO_BIN_EXE_helio"), &args).output().unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    fn until<T>(&self, dir: &Path, what: &str, look: impl Fn(&Value) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            let status = self.status(dir);
            if let Some(found) = status.as_ref().and_then(&look) {
                return found;
            }
            assert!(started.elapsed() < PATIENCE, "waited in vain: {what}; {status:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A greedy completion, asked for on the host of the ingress.
    fn complete(&self, status: &Value, prompt: &Value, tokens: usize) -> Value {
        let node = actor(status, "ingress")["node"].as_str().unwrap().to_owned();
        let host = usize::from(node == "b");
        let body = json!({ "model": "sundial-20m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "skip_special_tokens": false });
        let args = [
            "-s",
            "http://127.0.0.1:8000/v1/completions",
            "-H",
            "content-type: application/json",
            "-d",
            &body.to_string(),
        ];
        let output = self.command(host, "curl", &args).output().unwrap();
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|why| panic!("{why}: {}", String::from_utf8_lossy(&output.stdout)))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for process in &self.processes {
            let _ = Command::new("kill").arg(process.id().to_string()).status();
        }
        self.processes.iter_mut().for_each(|process| drop(process.wait()));
        for host in &self.names {
            ip(&format!("netns del {host}"));
        }
    }
}

fn actor<'a>(status: &'a Value, name: &str) -> &'a Value {
    status["actors"].as_array().unwrap().iter().find(|actor| actor["name"] == name).unwrap()
}

fn all_ready(status: &Value) -> Option<Value> {
    let actors = status["actors"].as_array()?;
    let complete = status["groups"][0]["complete"] == true;
    let ready = actors.iter().all(|actor| actor["state"]["state"] == "ready");
    (ready && complete && !actors.is_empty()).then(|| status.clone())
}

#[test]
fn a_group_over_two_hosts_serves_and_heals() {
    let Some(mut hosts) = Hosts::new() else {
        eprintln!("skipped: network namespaces need root and iproute2");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), "a token that both hosts know, 32 bytes\n").unwrap();
    let config = format!(
        "[cluster]\nrun_dir = {:?}\ntoken_file = {:?}\n[head]\nbind = \"{}:6379\"\n[model]\npath = {:?}\n[devices]\ncpu = 2\nthreads = 1\n[[nodes]]\nname = \"a\"\n[[nodes]]\nname = \"b\"\nhost = \"{}\"\n",
        dir.path().join("run"),
        dir.path().join("token"),
        ADDRESSES[0],
        bundled(),
        ADDRESSES[1],
    );
    let file = dir.path().join("cluster.toml");
    std::fs::write(&file, config).unwrap();
    hosts.start(0, &["head", file.to_str().unwrap()]);
    let token = dir.path().join("token");
    let run_dirs = ["run-a", "run-b"].map(|name| dir.path().join(name));
    for host in 0..2 {
        let head = format!("{}:6379", ADDRESSES[0]);
        hosts.start(
            host,
            &[
                "node",
                "--join",
                &head,
                "--name",
                ["a", "b"][host],
                "--bind",
                ADDRESSES[host],
                "--devices",
                "cpu=2",
                "--token-file",
                token.to_str().unwrap(),
                "--run-dir",
                run_dirs[host].to_str().unwrap(),
            ],
        );
    }
    let status = hosts.until(dir.path(), "the group is complete", all_ready);
    let nodes: Vec<&str> =
        (0..4).map(|rank| actor(&status, &format!("rank-{rank}"))["node"].as_str().unwrap()).collect();
    assert!(nodes.contains(&"a") && nodes.contains(&"b"), "{nodes:?}");

    let reference: Value =
        serde_json::from_slice(&std::fs::read(bundled().join("reference.json")).unwrap()).unwrap();
    let prompt = &reference["prompts"][0];
    let tokens = prompt["greedy_ids"].as_array().unwrap().len();
    let reply = hosts.complete(&status, &prompt["prompt_ids"], tokens);
    assert_eq!(reply["choices"][0]["text"], prompt["greedy_text"], "{reply}");

    let other_host = (0..4).rev().find(|&rank| nodes[rank] == "b").unwrap();
    let name = format!("rank-{other_host}");
    kill(actor(&status, &name)["pid"].as_i64().unwrap());
    let healed = hosts.until(dir.path(), "the rank came back", |status| {
        (actor(status, &name)["restarts"] == 1).then(|| all_ready(status)).flatten()
    });
    let reply = hosts.complete(&healed, &prompt["prompt_ids"], tokens);
    assert_eq!(reply["choices"][0]["text"], prompt["greedy_text"], "{reply}");
}

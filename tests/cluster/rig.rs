//! A cluster of its own for each test: free ports, a temporary run directory, gone when dropped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

/// The machine's few cores serve one cluster at a time.
static TURN: Mutex<()> = Mutex::const_new(());

/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) http: u16,
    pub(crate) client: reqwest::Client,
    _turn: MutexGuard<'static, ()>,
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn bundled() -> PathBuf {
    root().join("models/sundial-20m")
}

/// A port that nobody listens on, below those that the kernel gives to outgoing connections: one of these may be taken
/// before the test has used it.
pub(crate) fn free_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let turn = TAKEN.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id().wrapping_mul(97));
        let port = 10_000 + (turn % 20_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Runs `helio` and returns what it said.
pub(crate) fn helio(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_helio")).args(args).output().unwrap()
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A configuration with free ports; `sections` adds keys by section.
pub(crate) fn write_config(dir: &Path, model: &Path, sections: &[(&str, &str)]) -> (PathBuf, u16) {
    configure(dir, Some(model), sections)
}

fn configure(dir: &Path, model: Option<&Path>, sections: &[(&str, &str)]) -> (PathBuf, u16) {
    let http = free_port();
    let mut all = vec![
        ("cluster", format!("run_dir = {:?}", dir.join("run"))),
        ("head", format!("bind = \"127.0.0.1:{}\"", free_port())),
        ("serve", format!("port = {http}")),
        ("dashboard", format!("port = {}", free_port())),
    ];
    all.extend(model.map(|model| ("model", format!("path = {model:?}"))));
    if !sections.iter().any(|(section, keys)| *section == "devices" && keys.contains("device")) {
        all.push(("devices", "device = \"cpu\"".to_owned()));
    }
    for (section, keys) in sections {
        match all.iter_mut().find(|(name, _)| name == section) {
            Some((_, text)) => *text = format!("{text}\n{keys}"),
            None => all.push((section, (*keys).to_owned())),
        }
    }
    let text: String = all.iter().map(|(name, keys)| format!("[{name}]\n{keys}\n\n")).collect();
    let file = dir.join("cluster.toml");
    std::fs::write(&file, text).unwrap();
    (file, http)
}

impl Cluster {
    /// A serving cluster of the bundled model.
    pub(crate) async fn up(sections: &[(&str, &str)]) -> Self {
        Self::up_model(&bundled(), sections).await
    }

    /// A directory and a port for a cluster whose processes are started by hand.
    pub(crate) async fn by_hand() -> Self {
        let turn = TURN.lock().await;
        let dir = tempfile::tempdir().unwrap();
        Self { dir, http: free_port(), client: client(), _turn: turn }
    }

    /// The same, started with these variables.
    pub(crate) async fn up_with(sections: &[(&str, &str)], environment: &[(&str, &str)]) -> Self {
        Self::start(Some(&bundled()), sections, environment).await
    }

    pub(crate) async fn up_model(model: &Path, sections: &[(&str, &str)]) -> Self {
        Self::start(Some(model), sections, &[]).await
    }

    /// A cluster without a model.
    pub(crate) async fn up_bare(sections: &[(&str, &str)]) -> Self {
        Self::start(None, sections, &[]).await
    }

    async fn start(model: Option<&Path>, sections: &[(&str, &str)], environment: &[(&str, &str)]) -> Self {
        let turn = TURN.lock().await;
        let dir = tempfile::tempdir().unwrap();
        let (file, http) = configure(dir.path(), model, sections);
        let started = Instant::now();
        let mut command = Command::new(env!("CARGO_BIN_EXE_helio"));
        command.args(["up", file.to_str().unwrap(), "--detach"]).envs(environment.iter().copied());
        let up = command.output().unwrap();
        assert!(up.status.success(), "helio up failed: {}", text(&up));
        eprintln!("cluster ready after {:?}", started.elapsed());
        Self { dir, http, client: client(), _turn: turn }
    }

    /// Runs a command against this cluster.
    pub(crate) fn helio(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_helio"));
        command.args(args).current_dir(self.dir.path()).output().unwrap()
    }

    /// `helio status --json`; none while the head is away.
    pub(crate) fn status(&self) -> Option<Value> {
        let output = self.helio(&["status", "--json"]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// One actor's entry of the status.
    pub(crate) fn actor(&self, name: &str) -> Value {
        let status = self.status().unwrap();
        let actors = status["actors"].as_array().unwrap();
        actors.iter().find(|actor| actor["name"] == name).unwrap().clone()
    }

    pub(crate) fn pid(&self, actor: &str) -> i64 {
        self.actor(actor)["pid"].as_i64().unwrap()
    }

    /// Process ids of all workers, by actor.
    pub(crate) fn pids(&self) -> Vec<(String, i64)> {
        let status = self.status().unwrap();
        let actors = status["actors"].as_array().unwrap();
        let pid =
            |actor: &Value| (actor["name"].as_str().unwrap().to_owned(), actor["pid"].as_i64().unwrap());
        actors.iter().map(pid).collect()
    }

    /// Waits until `what` is there.
    pub(crate) async fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(started.elapsed() < PATIENCE, "waited in vain: {what}; status {:#?}", self.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until all actors are ready and the group is complete.
    pub(crate) async fn until_healed(&self) {
        self.until("all actors ready", |cluster| {
            let status = cluster.status()?;
            // A head that has just taken over knows of an actor before its node has said where it runs.
            let ready = |actor: &Value| actor["state"]["state"] == "ready" && actor["pid"].is_i64();
            status["actors"].as_array()?.iter().all(ready).then_some(())
        })
        .await;
    }

    /// Waits until the ingress has heard of a rank: after the head has, by a message.
    pub(crate) async fn until_served(&self) {
        let started = Instant::now();
        // The ingress may not listen yet.
        let healthy = async || {
            let answer = self.client.get(self.url("/health")).send().await;
            answer.is_ok_and(|answer| answer.status() == 200)
        };
        while !healthy().await {
            assert!(started.elapsed() < PATIENCE, "nothing is served; status {:#?}", self.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.http)
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(self.url(path)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap_or(Value::Null))
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.client.post(self.url(path)).json(body).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap_or(Value::Null))
    }

    /// A completion that must succeed: its first choice.
    pub(crate) async fn complete(&self, body: &Value) -> Value {
        let (status, reply) = self.post("/v1/completions", body).await;
        assert_eq!(status, 200, "{reply}");
        reply["choices"][0].clone()
    }

    /// A streamed completion: calls `seen` with the chunks so far, returns the whole text and how it ended.
    pub(crate) async fn stream(&self, body: &Value, seen: impl FnMut(usize)) -> Result<String, String> {
        self.stream_at(&self.url("/v1/completions"), body, seen).await
    }

    /// The same, by another door or route.
    pub(crate) async fn stream_at(
        &self,
        url: &str,
        body: &Value,
        mut seen: impl FnMut(usize),
    ) -> Result<String, String> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let request = self.client.post(url).json(&body);
        let response = request.send().await.map_err(|why| why.to_string())?;
        if !response.status().is_success() {
            return Err(response.text().await.unwrap_or_default());
        }
        let (mut bytes, mut buffer, mut text, mut chunks) =
            (response.bytes_stream(), String::new(), String::new(), 0);
        while let Some(part) = bytes.next().await {
            buffer.push_str(&String::from_utf8_lossy(&part.map_err(|why| why.to_string())?));
            while let Some(end) = buffer.find("\n\n") {
                let event: String = buffer.drain(..end + 2).collect();
                let data = event.trim().trim_start_matches("data: ");
                if data == "[DONE]" {
                    return Ok(text);
                }
                let chunk: Value = serde_json::from_str(data).map_err(|why| format!("{why}: {data}"))?;
                if let Some(error) = chunk.get("error") {
                    return Err(error.to_string());
                }
                text.push_str(chunk["choices"][0]["text"].as_str().unwrap_or_default());
                chunks += 1;
                seen(chunks);
            }
        }
        Err("the stream ended without [DONE]".to_owned())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", logs(self.dir.path()));
        }
        self.helio(&["down"]);
    }
}

/// The last lines of all logs, for failed tests.
fn logs(dir: &Path) -> String {
    let output = Command::new("sh")
        .arg("-c")
        .arg("for f in $(find run -name '*.log'); do echo \"== $f\"; tail -n 25 $f; done")
        .current_dir(dir)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A client that trusts no server of HTTPS.
pub(crate) fn client() -> reqwest::Client {
    let tls = rustls::ClientConfig::builder_with_provider(heliostat_runtime::wire::tls_crypto())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    reqwest::Client::builder().tls_backend_preconfigured(tls).build().unwrap()
}

/// Sends SIGKILL.
pub(crate) fn kill(pid: i64) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(status.success(), "cannot kill {pid}");
}

/// Whether a process lives; a zombie does not.
pub(crate) fn is_alive(pid: i64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

/// A greedy completion of one of several prompts.
pub(crate) fn greedy(number: usize, max_tokens: u32) -> Value {
    let prompts = [
        "The Vec type is a growable array",
        "In Python, a list comprehension",
        "SELECT name FROM users",
        "# Channels\n\nRust provides",
        "def main():\n    ",
        "CREATE TABLE",
        "The borrow checker",
        "import os\n",
    ];
    let prompt = format!("{} {}", prompts[number % prompts.len()], number / prompts.len());
    json!({ "model": "sundial-20m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

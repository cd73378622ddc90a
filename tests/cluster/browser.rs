//! A real Chromium, driven over WebDriver: what a person would see and press.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rig::{PATIENCE, client};

/// A browser with one tab, gone when dropped.
pub(crate) struct Browser {
    driver: Child,
    client: reqwest::Client,
    session: String,
}

/// A driver and its port, unless it ends at once.
fn start_driver() -> Option<(Child, u16)> {
    let started =
        Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut driver = started.expect("chromedriver starts (scripts/setup installs it)");
    let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
    let port = lines.map_while(Result::ok).find_map(|line| {
        let (_, rest) = line.split_once("started successfully on port ")?;
        rest.trim_end_matches('.').parse::<u16>().ok()
    });
    if port.is_none() {
        let _ = driver.wait();
    }
    Some((driver, port?))
}

impl Browser {
    /// An empty tab.
    pub(crate) async fn open() -> Self {
        // The port that it draws may be taken where it listens next: for IPv6 after IPv4.
        let (driver, port) = (0..5).find_map(|_| start_driver()).expect("chromedriver names its port");
        let base = format!("http://127.0.0.1:{port}");
        // In a container Chromium has neither a sandbox nor a large /dev/shm.
        let args = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1500,1000",
        ];
        let options = json!({"goog:chromeOptions": {"args": args}, "goog:loggingPrefs": {"browser": "ALL"}});
        let client = client();
        let body = json!({"capabilities": {"alwaysMatch": options}});
        let answer = client.post(format!("{base}/session")).json(&body).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        let id = answer["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("no session: {answer}"));
        Self { driver, client, session: format!("{base}/session/{id}") }
    }

    async fn command(&self, command: &str, body: &Value) -> Value {
        let answer = self.client.post(format!("{}/{command}", self.session)).json(body).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        assert!(answer["value"].get("error").is_none(), "{command}: {answer}");
        answer["value"].clone()
    }

    /// Goes there.
    pub(crate) async fn go(&self, url: &str) {
        self.command("url", &json!({ "url": url })).await;
    }

    /// The value of a function's body in the page.
    pub(crate) async fn run(&self, script: &str) -> Value {
        self.command("execute/sync", &json!({"script": script, "args": []})).await
    }

    /// Waits until an expression is true.
    pub(crate) async fn until(&self, expression: &str) {
        let started = Instant::now();
        while self.run(&format!("return !!({expression})")).await != json!(true) {
            let page = self.run("return document.body.innerText").await;
            assert!(
                started.elapsed() < PATIENCE,
                "in vain: {expression}\n{}",
                page.as_str().unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a text is on the page.
    pub(crate) async fn until_text(&self, text: &str) {
        self.until(&format!("document.body.innerText.includes({})", json!(text))).await;
    }

    /// Presses the button, link or row that bears a text.
    pub(crate) async fn press(&self, text: &str) {
        let found = format!(
            "[...document.querySelectorAll('main button:not(:disabled), nav a, tr.pick')].find(e => e.innerText.includes({}))",
            json!(text)
        );
        self.until(&found).await;
        self.run(&format!("({found}).click()")).await;
    }

    /// Gives the order that the page asks about.
    pub(crate) async fn confirm(&self) {
        let button = "document.querySelector('dialog[open] button.first:not(:disabled)')";
        self.until(button).await;
        self.run(&format!("{button}.click()")).await;
    }

    /// What the page complained about.
    pub(crate) async fn complaints(&self) -> Vec<String> {
        let log = self.command("se/log", &json!({"type": "browser"})).await;
        let severe = log.as_array().unwrap().iter().filter(|entry| entry["level"] == "SEVERE");
        severe.map(|entry| entry["message"].to_string()).collect()
    }

    /// A picture of the whole page, where `HELIO_SCREENSHOTS` names a directory for it.
    pub(crate) async fn picture(&self, name: &str) {
        let Some(dir) = std::env::var_os("HELIO_SCREENSHOTS") else { return };
        let height = self.run("return Math.max(1000, document.documentElement.scrollHeight)").await;
        let rect = json!({"width": 1500, "height": height.as_u64().unwrap() + 90});
        self.command("window/rect", &rect).await;
        // The page is told of its new size between two frames.
        self.command("execute/async", &json!({"script": "setTimeout(arguments[0], 300)", "args": []})).await;
        let answer = self.client.get(format!("{}/screenshot", self.session)).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        let file = std::path::Path::new(&dir).join(format!("{name}.png.base64"));
        std::fs::write(file, answer["value"].as_str().unwrap()).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser as well.
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

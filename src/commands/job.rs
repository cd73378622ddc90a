//! `helio job`: talks to the dashboard's REST API, as Ray's clients do.

use super::{print, print_json};
use crate::args::{Job, JobArgs, Submit};
use crate::client::client;
use crate::cluster::{places, run_dir};
use crate::failure::{FAILED, Failure, NO_CLUSTER, say};
use crate::rundir::read_token;
use crate::show;
use anyhow::{Context, Result};
use futures_util::StreamExt;
use heliostat_actors::jobs::package;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Map, Value as Json, json};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a dashboard is unless something says otherwise.
const DEFAULT_URL: &str = "http://127.0.0.1:8265";
/// How often the end of a job is asked for.
const POLL: Duration = Duration::from_millis(50);
/// How long a dashboard that went away while a log was followed may take to be back.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(30);

/// Runs `helio job`.
pub(crate) async fn run(args: &JobArgs) -> Result<()> {
    let api = Api::find(args)?;
    match &args.command {
        Job::Submit(submit) => self::submit(&api, submit, args.json).await,
        Job::Status { id } => {
            let job = api.job(id).await?;
            if args.json { print_json(&job) } else { print(&show::job::one(&job)) }
        }
        Job::Logs { id, follow: false } => {
            let logs = api.json(Method::GET, &format!("jobs/{id}/logs")).await?;
            if args.json { print_json(&logs) } else { print(logs["logs"].as_str().unwrap_or_default()) }
        }
        Job::Logs { id, follow: true } => {
            api.follow(id).await?;
            failed_if(&api.job(id).await?)
        }
        Job::Stop { id, no_wait } => stop(&api, id, *no_wait, args.json).await,
        Job::List => {
            let jobs = api.json(Method::GET, "jobs/").await?;
            if args.json { print_json(&jobs) } else { print(&show::job::list(&jobs)) }
        }
        Job::Delete { id } => {
            let deleted = api.json(Method::DELETE, &format!("jobs/{id}")).await?;
            if args.json { print_json(&deleted) } else { print(&format!("job {id} is deleted\n")) }
        }
    }
}

pub(super) async fn submit(api: &Api, args: &Submit, as_json: bool) -> Result<()> {
    start(api, args, join(&args.entrypoint), as_json).await
}

/// Submits a shell command with the options of `args`, whose own command is not used.
pub(super) async fn start(api: &Api, args: &Submit, entrypoint: String, as_json: bool) -> Result<()> {
    let mut runtime_env = Map::new();
    if let Some(dir) = &args.working_dir {
        runtime_env.insert("working_dir".into(), api.upload(dir).await?.into());
    }
    if !args.env.is_empty() {
        runtime_env.insert("env_vars".into(), object(&args.env));
    }
    let body = json!({
        "entrypoint": entrypoint,
        "submission_id": args.submission_id,
        "runtime_env": runtime_env,
        "metadata": object(&args.metadata),
        "entrypoint_num_cpus": args.entrypoint_num_cpus,
        "entrypoint_num_gpus": args.entrypoint_num_gpus,
        "entrypoint_memory": args.entrypoint_memory,
        "entrypoint_resources": object(&args.entrypoint_resource),
        "entrypoint_label_selector": object(&args.entrypoint_label),
    });
    let accepted = api.send(api.request(Method::POST, "jobs/").json(&body)).await?;
    let accepted: Json = accepted.json().await.context("the dashboard's answer")?;
    let id = accepted["submission_id"].as_str().context("the dashboard's answer has no submission_id")?;
    if args.no_wait {
        return if as_json { print_json(&accepted) } else { print(&format!("{id}\n")) };
    }
    if !as_json {
        say(format_args!("job {id} is submitted (helio job stop {id})"));
        api.follow(id).await?;
    }
    let job = api.end(id).await?;
    if as_json {
        print_json(&job)?;
    } else if job["status"] == "STOPPED" {
        say(format_args!("job {id} was stopped"));
    }
    failed_if(&job)
}

async fn stop(api: &Api, id: &str, no_wait: bool, as_json: bool) -> Result<()> {
    let answer = api.json(Method::POST, &format!("jobs/{id}/stop")).await?;
    if no_wait {
        let text = if answer["stopped"] == true { "is being stopped" } else { "has ended already" };
        return if as_json { print_json(&answer) } else { print(&format!("job {id} {text}\n")) };
    }
    let job = api.end(id).await?;
    if as_json {
        print_json(&job)?;
    } else {
        print(&format!("job {id}: {}\n", job["status"].as_str().unwrap_or_default()))?;
    }
    failed_if(&job)
}

/// An error if the job failed.
fn failed_if(job: &Json) -> Result<()> {
    if job["status"] != "FAILED" {
        return Ok(());
    }
    // Its last lines were shown, or can be; the first line says how it ended.
    let message = job["message"].as_str().unwrap_or_default().lines().next().unwrap_or_default();
    let message = message.split(", last available logs").next().unwrap_or_default();
    let id = job["submission_id"].as_str().unwrap_or_default();
    Err(Failure::error(FAILED, format!("job {id} failed: {message}")))
}

fn object<V: Clone + Into<Json>>(pairs: &[(String, V)]) -> Json {
    pairs.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect::<Map<_, _>>().into()
}

/// A shell command that runs exactly these words.
pub(super) fn join(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    let quote = |word: &String| match !word.is_empty() && word.chars().all(plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\"'\"'")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// A dashboard.
pub(super) struct Api {
    url: String,
    key: Option<String>,
    client: Client,
}

impl Api {
    pub(super) fn find(args: &JobArgs) -> Result<Self> {
        let at = (args.address.clone(), args.api_key_file.as_deref(), args.tls_ca.clone());
        Self::at(at, args.run_dir.as_deref())
    }

    /// The dashboard at a URL, with the files of its key and its CA; what is not named is that of the run directory.
    pub(super) fn at(
        (url, api_key_file, tls_ca): (Option<String>, Option<&Path>, Option<PathBuf>),
        run: Option<&Path>,
    ) -> Result<Self> {
        let in_file = || places(run).and_then(|places| places.dashboard);
        let in_job = std::env::var_os("HELIOSTAT_TLS").filter(|path| run.is_none() && !path.is_empty());
        let in_job = in_job.map(|path| heliostat::tls_files(Path::new(&path))).transpose()?;
        let run = run_dir(run, None)?;
        let url = url.or_else(|| run.dashboard()).or_else(in_file).unwrap_or_else(|| DEFAULT_URL.into());
        let url = if url.contains("://") { url } else { format!("http://{url}") };
        let key = match api_key_file {
            Some(path) => Some(read_token(path)?.0),
            None => read_token(&run.dashboard_key_path()).ok().map(|token| token.0),
        };
        let ca = tls_ca.or_else(|| Some(in_job.or_else(|| run.tls())?.ca));
        let client = client(ca.as_deref())?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), key, client })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}/api/{path}", self.url));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// A success, or the dashboard's words as an error.
    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let response = request.send().await.map_err(|why| self.nobody(&why))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        let text = if text.trim().is_empty() { status.to_string() } else { text };
        let text = if status == StatusCode::UNAUTHORIZED {
            format!("{}\n  name the file of the key with --api-key-file", text.trim())
        } else {
            text
        };
        Err(Failure::error(FAILED, text.trim()))
    }

    fn nobody(&self, why: &reqwest::Error) -> anyhow::Error {
        let mut cause: &dyn std::error::Error = why;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let (cause, url) = (cause.to_string(), &self.url);
        if cause.contains("UnknownIssuer") || cause.contains("certificate") {
            let fix = "name the certificate of its CA with --tls-ca";
            return Failure::error(
                NO_CLUSTER,
                format!("the dashboard at {url} is not trusted: {cause}\n  {fix}"),
            );
        }
        let fix = if cause.contains("invalid HTTP version") {
            "if it speaks HTTPS, say so: --address https://HOST:PORT"
        } else {
            "start a cluster with `helio up`, or name its dashboard with --address URL"
        };
        Failure::error(NO_CLUSTER, format!("no dashboard answers at {url}: {cause}\n  {fix}"))
    }

    async fn json(&self, method: Method, path: &str) -> Result<Json> {
        self.send(self.request(method, path)).await?.json().await.context("the dashboard's answer")
    }

    async fn job(&self, id: &str) -> Result<Json> {
        self.json(Method::GET, &format!("jobs/{id}")).await
    }

    /// The job once it has ended.
    async fn end(&self, id: &str) -> Result<Json> {
        loop {
            let job = self.job(id).await?;
            if !matches!(job["status"].as_str(), Some("PENDING" | "RUNNING")) {
                return Ok(job);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Prints a log until its job ends. A dashboard that is restarted meanwhile is found again, and no byte is lost.
    async fn follow(&self, id: &str) -> Result<()> {
        let (mut offset, mut away) = (0, None);
        loop {
            match self.stream(id, &mut offset, &mut away).await {
                Ok(()) => return Ok(()),
                Err(error)
                    if error.downcast_ref::<Failure>().is_some_and(|failure| failure.code == FAILED) =>
                {
                    return Err(error);
                }
                Err(error) => {
                    let since = *away.get_or_insert_with(std::time::Instant::now);
                    if offset == 0 || since.elapsed() > RECONNECT_PATIENCE {
                        return Err(error);
                    }
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn stream(&self, id: &str, offset: &mut u64, away: &mut Option<std::time::Instant>) -> Result<()> {
        let request = self.request(Method::GET, &format!("jobs/{id}/logs/stream?offset={offset}"));
        let mut parts = self.send(request).await?.bytes_stream();
        *away = None;
        while let Some(part) = parts.next().await {
            let part = part.context("the log breaks off")?;
            let mut out = std::io::stdout().lock();
            out.write_all(&part)
                .and_then(|()| out.flush())
                .map_err(|why| Failure::error(FAILED, format!("cannot write to stdout: {why}")))?;
            *offset += part.len() as u64;
        }
        Ok(())
    }

    /// Sends a directory, unless the dashboard has it; returns its URI.
    async fn upload(&self, dir: &Path) -> Result<String> {
        anyhow::ensure!(dir.is_dir(), "--working-dir: {} is no directory", dir.display());
        let file = tempfile::tempfile().context("cannot make a temporary file")?;
        let mut file = package::pack(dir, file).context("--working-dir")?;
        let rewind = |file: &mut std::fs::File| file.rewind().context("cannot read the package");
        rewind(&mut file)?;
        let name = package::name_of(&package::sha256(&file).context("cannot read the package")?);
        rewind(&mut file)?;
        let path = format!("packages/gcs/{name}");
        let there = self.request(Method::GET, &path).send().await.map_err(|why| self.nobody(&why))?;
        if !there.status().is_success() {
            let body = reqwest::Body::from(tokio::fs::File::from_std(file));
            self.send(self.request(Method::PUT, &path).body(body)).await?;
        }
        Ok(format!("gcs://{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        let words = |words: &[&str]| join(&words.iter().map(|w| w.to_string()).collect::<Vec<_>>());
        assert_eq!(words(&["echo", "a b", "it's", "$HOME", ""]), r#"echo 'a b' 'it'"'"'s' '$HOME' ''"#);
        assert_eq!(words(&["python", "x.py", "--lr=0.1"]), "python x.py --lr=0.1");
    }
}

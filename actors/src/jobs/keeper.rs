//! The keeper: a process per job that runs its entrypoint, writes its log, ends its tree and says how it ended.
//!
//! It outlives the jobs actor, so that a job, its log and its exit code survive a restart of the actor. It ends its job
//! when it gets SIGTERM, and when no actor holds the lock for too long. It knows files and processes only.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, WaitOptions, set_child_subreaper, wait};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::core::{End, ProcessId};
use super::log::LogWriter;
use super::process::{descendants, identify, signal_all};
use super::relay::{self, Remote};
use super::store;

/// Names the devices of a job.
const DEVICES: &str = "HELIOSTAT_DEVICES";
/// What the GPUs are that a process may use.
const GPUS: &str = "CUDA_VISIBLE_DEVICES";
/// How often it looks whether a jobs actor is there.
const LOOK: Duration = Duration::from_millis(500);
/// How often it looks whether a tree that was asked to end has done so.
const POLL: Duration = Duration::from_millis(20);
/// How long a pipe may stay open that nobody should have any more.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long killed processes may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// What a keeper is to do: `order.json` in the job's directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The job.
    pub id: String,
    /// A shell command.
    pub entrypoint: String,
    /// Added to the environment; `${NAME}` stands for a variable of the environment before.
    pub env: BTreeMap<String, String>,
    /// Devices of the node that it owns, by index: HELIOSTAT_DEVICES.
    #[serde(default)]
    pub devices: Vec<u32>,
    /// Those of them that are GPUs, by ordinal among the ones that this process is shown: CUDA_VISIBLE_DEVICES.
    #[serde(default)]
    pub gpus: Vec<u32>,
    /// Bytes of log that are kept.
    pub log_bytes_max: u64,
    /// Between SIGTERM and SIGKILL.
    pub stop_grace: Duration,
    /// Held by the jobs actor as long as it lives.
    pub lock: PathBuf,
    /// How long the job lives on while nobody holds the lock.
    pub orphan_grace: Duration,
    /// Where it runs, if not here.
    #[serde(default)]
    pub remote: Option<Remote>,
    /// Nobody looks into the directory once the job is an orphan: it is removed.
    #[serde(default)]
    pub passing: bool,
}

/// Who keeps a job: `keeper.json`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// The keeper.
    pub keeper: ProcessId,
    /// The entrypoint's shell, leader of its process group; none where it could not be started.
    pub driver: Option<ProcessId>,
}

/// Runs the job of a directory to its end. `environment` looks up a variable of this process.
///
/// # Errors
/// The order cannot be read, another keeper has the job, or the disk fails.
pub async fn run(dir: &Path, environment: impl Fn(&str) -> Option<String>) -> io::Result<()> {
    let order: Order = store::read_json(&dir.join(store::ORDER))?;
    // Only one keeper ever runs a job.
    File::create_new(dir.join(store::CLAIM))?;
    let me = std::process::id();
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut log = LogWriter::create(&dir.join(store::LOG), order.log_bytes_max)?;
    // Of one that runs elsewhere the keeper there says so.
    if order.remote.is_none() {
        log.write(format!("Running entrypoint for job {}: {}\n", order.id, order.entrypoint).as_bytes())?;
    }
    let keeper = identify(me).ok_or_else(|| io::Error::other("/proc cannot be read"))?;
    let mut terminate = signal(SignalKind::terminate())?;
    if let Some(remote) = &order.remote {
        store::write_json(&dir.join(store::KEEPER), &Kept { keeper, driver: None })?;
        let end = relay::run(&order, remote, &mut log, &mut terminate).await;
        return store::write_json(&dir.join(store::EXIT), &end);
    }
    let end = match start(&order, dir, environment) {
        Err(error) => {
            store::write_json(&dir.join(store::KEEPER), &Kept { keeper, driver: None })?;
            End::NotStarted { why: format!("the entrypoint could not be started: {error}") }
        }
        Ok((mut child, output)) => {
            let driver = child.id().and_then(identify);
            store::write_json(&dir.join(store::KEEPER), &Kept { keeper, driver })?;
            let mut running =
                Running { order: &order, log, output, buffer: vec![0; 64 << 10], closed: false };
            tokio::select! {
                end = running.until_end(&mut child) => end?,
                _ = terminate.recv() => {
                    running.stop(&mut child).await?;
                    End::Terminated
                }
                () = orphaned(&order) => {
                    running.stop(&mut child).await?;
                    End::Orphaned
                }
            }
        }
    };
    if order.passing && end == End::Orphaned {
        return fs::remove_dir_all(dir);
    }
    store::write_json(&dir.join(store::EXIT), &end)
}

/// Starts the shell, as the leader of a process group, with one pipe for all that it says.
fn start(
    order: &Order,
    dir: &Path,
    environment: impl Fn(&str) -> Option<String>,
) -> io::Result<(Child, pipe::Receiver)> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(&order.entrypoint).current_dir(dir.join(store::WORK));
    command.envs(own_devices(order, &environment));
    command.envs(order.env.iter().map(|(name, value)| (name, expand(value, &environment))));
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
    let child = command.spawn()?;
    Ok((child, pipe::Receiver::from_owned_fd(reader.into())?))
}

/// Shows a job the devices that it owns, and no other GPU.
fn own_devices(order: &Order, environment: impl Fn(&str) -> Option<String>) -> BTreeMap<&str, String> {
    let list = |all: Vec<String>| all.join(",");
    let mut own = BTreeMap::new();
    if !order.devices.is_empty() {
        own.insert(DEVICES, list(order.devices.iter().map(u32::to_string).collect()));
    }
    if !order.gpus.is_empty() {
        let shown = environment(GPUS).filter(|shown| !shown.trim().is_empty());
        let shown: Vec<&str> = shown.iter().flat_map(|shown| shown.split(',')).map(str::trim).collect();
        let name =
            |gpu: &u32| shown.get(*gpu as usize).map_or_else(|| gpu.to_string(), |name| (*name).into());
        own.insert(GPUS, list(order.gpus.iter().map(name).collect()));
    }
    own
}

/// Replaces every `${NAME}`; a variable that is not there is empty.
fn expand(value: &str, environment: impl Fn(&str) -> Option<String>) -> String {
    let (mut done, mut rest) = (String::new(), value);
    while let Some((before, after)) = rest.split_once("${") {
        done.push_str(before);
        match after.split_once('}') {
            Some((name, after)) => {
                done.push_str(&environment(name).unwrap_or_default());
                rest = after;
            }
            None => {
                done.push_str("${");
                rest = after;
            }
        }
    }
    done + rest
}

/// Ends when no jobs actor has held the lock for the grace.
pub(super) async fn orphaned(order: &Order) {
    let mut since: Option<Instant> = None;
    loop {
        tokio::time::sleep(LOOK).await;
        let alone = File::open(&order.lock)
            .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_ok());
        since = alone.then(|| since.unwrap_or_else(Instant::now));
        if since.is_some_and(|since| since.elapsed() > order.orphan_grace) {
            return;
        }
    }
}

/// A job whose shell was started.
struct Running<'a> {
    order: &'a Order,
    log: LogWriter,
    output: pipe::Receiver,
    buffer: Vec<u8>,
    /// Nobody can write to the pipe any more.
    closed: bool,
}

impl Running<'_> {
    /// Copies output until the shell ends, then ends what it left behind.
    async fn until_end(&mut self, child: &mut Child) -> io::Result<End> {
        let status = loop {
            tokio::select! {
                () = Self::copy(&mut self.log, &mut self.output, &mut self.buffer, &mut self.closed),
                    if !self.closed => {}
                status = child.wait() => break status?,
            }
        };
        self.kill_rest().await;
        self.last_words().await;
        Ok(End::Exited { code: code(status) })
    }

    /// SIGTERM to the whole tree, and SIGKILL for what is left after the grace.
    async fn stop(&mut self, child: &mut Child) -> io::Result<()> {
        signal_all(&descendants(std::process::id()), Signal::TERM);
        let asked = Instant::now();
        let mut ended = false;
        while asked.elapsed() < self.order.stop_grace {
            ended = ended || child.try_wait()?.is_some();
            if ended {
                reap();
            }
            self.drain();
            if ended && descendants(std::process::id()).is_empty() {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        signal_all(&descendants(std::process::id()), Signal::KILL);
        if !ended {
            child.wait().await?;
        }
        self.kill_rest().await;
        self.last_words().await;
        Ok(())
    }

    /// Copies what can be read, or waits for more.
    async fn copy(log: &mut LogWriter, output: &mut pipe::Receiver, buffer: &mut [u8], closed: &mut bool) {
        match output.read(buffer).await {
            Ok(0) => *closed = true,
            Ok(read) => write(log, &buffer[..read]),
            Err(error) => {
                tracing::error!(%error, "the output of a job cannot be read");
                *closed = true;
            }
        }
    }

    /// Copies what is left to its end, at most a few pipes full: all writers are gone, unless one got away.
    async fn last_words(&mut self) {
        for _ in 0..16 {
            if self.closed {
                return;
            }
            let copied = Self::copy(&mut self.log, &mut self.output, &mut self.buffer, &mut self.closed);
            if tokio::time::timeout(LAST_WORDS, copied).await.is_err() {
                return;
            }
        }
    }

    /// Copies what is there now, at most a few pipes full: a job may write for ever.
    fn drain(&mut self) {
        for _ in 0..16 {
            match self.output.try_read(&mut self.buffer) {
                Ok(read @ 1..) => write(&mut self.log, &self.buffer[..read]),
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Kills all below this process until nothing is left.
    async fn kill_rest(&mut self) {
        let asked = Instant::now();
        while asked.elapsed() < KILL_PATIENCE {
            reap();
            let left = descendants(std::process::id());
            if left.is_empty() {
                return;
            }
            signal_all(&left, Signal::KILL);
            self.drain();
            tokio::time::sleep(POLL).await;
        }
    }
}

/// A full disk costs the job its log, not its life.
pub(super) fn write(log: &mut LogWriter, bytes: &[u8]) {
    if let Err(error) = log.write(bytes) {
        let _ = writeln!(io::stderr(), "the log cannot be written: {error}");
    }
}

fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// The exit code, or minus the signal.
fn code(status: ExitStatus) -> i32 {
    status.code().or(status.signal().map(|signal| -signal)).unwrap_or(-1)
}

/// How a job ended, if its keeper has said so.
pub fn ended(dir: &Path) -> Option<End> {
    store::read_json(&dir.join(store::EXIT)).ok()
}

/// Who keeps a job, if its keeper has said so.
pub fn kept(dir: &Path) -> Option<Kept> {
    fs::exists(dir.join(store::KEEPER)).ok()?.then(|| store::read_json(&dir.join(store::KEEPER)).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_shown_the_gpus_that_it_owns() {
        let order = |devices: &[u32], gpus: &[u32]| Order {
            id: "j".into(),
            entrypoint: "true".into(),
            env: BTreeMap::new(),
            devices: devices.to_vec(),
            gpus: gpus.to_vec(),
            log_bytes_max: 1,
            stop_grace: Duration::ZERO,
            lock: PathBuf::new(),
            orphan_grace: Duration::ZERO,
            remote: None,
            passing: false,
        };
        let own = |order: &Order, shown: Option<&str>| {
            format!("{:?}", own_devices(order, |_| shown.map(str::to_owned)))
        };
        assert_eq!(own(&order(&[], &[]), Some("4,5")), "{}", "nothing is hidden from one that asks for none");
        assert_eq!(own(&order(&[1], &[]), None), r#"{"HELIOSTAT_DEVICES": "1"}"#);
        let two = order(&[1, 2], &[1, 3]);
        assert_eq!(
            own(&two, Some("4, 5,6,GPU-77")),
            r#"{"CUDA_VISIBLE_DEVICES": "5,GPU-77", "HELIOSTAT_DEVICES": "1,2"}"#
        );
        assert_eq!(own(&two, None), r#"{"CUDA_VISIBLE_DEVICES": "1,3", "HELIOSTAT_DEVICES": "1,2"}"#);
    }

    #[test]
    fn variables_are_put_in() {
        let environment = |name: &str| (name == "PATH").then(|| "/bin".to_owned());
        assert_eq!(expand("/x:${PATH}", environment), "/x:/bin");
        assert_eq!(expand("${NONE}|${PATH}${", environment), "|/bin${");
        assert_eq!(expand("$PATH", environment), "$PATH");
    }
}

//! What becomes of jobs: which may start, which wait, how each ends.
//!
//! Pure: events and the time in, commands out. It never touches a file, a process or a clock; `service` executes.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::request::Submission;

/// Bounds of everything that jobs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Jobs that run at once.
    pub running_max: usize,
    /// Jobs that wait.
    pub queued_max: usize,
    /// Ended jobs that are remembered.
    pub kept_max: usize,
}

/// How a job is, in Ray's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// It waits, or is being started.
    Pending,
    /// Its entrypoint runs.
    Running,
    /// Somebody stopped it.
    Stopped,
    /// Its entrypoint ended with code 0.
    Succeeded,
    /// Anything else.
    Failed,
}

impl Status {
    /// Whether the job has ended.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Pending | Self::Running => false,
            Self::Stopped | Self::Succeeded | Self::Failed => true,
        }
    }
}

/// Why a job failed, in Ray's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorType {
    /// Its working directory could not be made.
    RuntimeEnvSetupFailure,
    /// The process that keeps it could not be started.
    JobSupervisorActorStartFailure,
    /// The process that keeps it was killed.
    JobSupervisorActorDied,
    /// The shell could not be started.
    JobEntrypointCommandStartError,
    /// The entrypoint ended with another code than 0.
    JobEntrypointCommandError,
}

/// The process that keeps an entrypoint; the start time tells it from a later one of the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

/// One job, as it is kept on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its submission id.
    pub id: String,
    /// Rises with every submission; never used twice.
    pub number: u64,
    /// What was asked for.
    pub submission: Submission,
    /// How it is.
    pub status: Status,
    /// Whether somebody asked to stop it.
    pub stop_requested: bool,
    /// What happened, for people.
    pub message: Option<String>,
    /// Why it failed.
    pub error_type: Option<ErrorType>,
    /// When it was submitted, milliseconds since 1970.
    pub start_time: u64,
    /// When it ended.
    pub end_time: Option<u64>,
    /// Exit code of the entrypoint; minus the signal that killed it.
    pub exit_code: Option<i32>,
    /// The process that keeps its entrypoint.
    pub keeper: Option<ProcessId>,
}

/// How the process that keeps an entrypoint ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum End {
    /// The entrypoint ended by itself.
    Exited {
        /// Its exit code; minus the signal that killed it.
        code: i32,
    },
    /// SIGTERM was asked for: by a stop, or by the end of the cluster.
    Terminated,
    /// No jobs actor was there for too long.
    Orphaned,
    /// The shell could not be started.
    NotStarted {
        /// The system's words.
        why: String,
    },
    /// The keeper itself was killed; what it kept is ended.
    Lost,
    /// It ran on another node, and that, or what ran it there, is gone.
    NodeLost {
        /// The node.
        node: String,
        /// What was heard of it last.
        why: String,
    },
}

/// What the shell is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Write the job to disk.
    Save(String),
    /// Have what it asks for set aside and say `reserved`, `waits` or `unreserved`; also where that was done before.
    Reserve(String),
    /// Give back what was, or is about to be, set aside for it.
    Release(String),
    /// Start its entrypoint and say `started` or `not_started`.
    Start(String),
    /// Ask its keeper to end it.
    Stop(String),
    /// Delete all that is kept of it.
    Forget(String),
}

/// Why a request about jobs is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The id is taken.
    #[error("Job with submission_id {0} already exists. Please use a different submission_id.")]
    Exists(String),
    /// Too many wait.
    #[error("{0} jobs wait already (`max_jobs_queued` in [dashboard]); submit again later")]
    QueueFull(usize),
    /// There is no such job.
    #[error("Job {0} does not exist")]
    NoSuchJob(String),
    /// It has not ended.
    #[error("Attempted to delete job '{id}', but it is in a non-terminal state {status:?}.")]
    NotEnded {
        /// Its id.
        id: String,
        /// How it is.
        status: Status,
    },
}

/// All jobs.
#[derive(Debug)]
pub struct JobsState {
    limits: Limits,
    jobs: BTreeMap<String, Entry>,
    next_number: u64,
}

#[derive(Debug)]
struct Entry {
    job: Job,
    /// What it asks for is set aside; so it is for a job that asks for nothing.
    reserved: bool,
    /// `Start` was ordered and nothing was heard of it yet.
    starting: bool,
    /// What was set aside is no more, and why: it is being ended.
    unreserved: Option<String>,
}

impl Entry {
    fn new(job: Job) -> Self {
        let reserved = !job.submission.reserves() || job.status == Status::Running;
        Self { job, reserved, starting: false, unreserved: None }
    }

    /// Whether it takes one of the places.
    fn is_active(&self) -> bool {
        self.starting || self.job.status == Status::Running
    }

    /// Whether it waits, for a place or for what it asks for.
    fn is_queued(&self) -> bool {
        self.job.status == Status::Pending && !self.starting
    }

    /// Gives back what it asked for, if anything.
    fn release(&self) -> Option<Command> {
        self.job.submission.reserves().then(|| Command::Release(self.job.id.clone()))
    }
}

impl JobsState {
    /// The jobs that were kept on disk. Those that ran are active until `recovered` or `ended` says more.
    pub fn new(limits: Limits, jobs: Vec<Job>) -> Self {
        let next_number = jobs.iter().map(|job| job.number + 1).max().unwrap_or(0);
        let jobs = jobs.into_iter().map(|job| (job.id.clone(), Entry::new(job)));
        Self { limits, jobs: jobs.collect(), next_number }
    }

    /// One job.
    pub fn get(&self, id: &str) -> Option<&Job> {
        self.jobs.get(id).map(|entry| &entry.job)
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<&Job> {
        let mut jobs: Vec<&Job> = self.jobs.values().map(|entry| &entry.job).collect();
        jobs.sort_by_key(|job| job.number);
        jobs
    }

    /// Takes a job, or says why not.
    ///
    /// # Errors
    /// The id is taken, or the queue is full.
    pub fn submit(&mut self, id: &str, submission: Submission, now: u64) -> Result<Vec<Command>, Refused> {
        if self.jobs.contains_key(id) {
            return Err(Refused::Exists(id.to_owned()));
        }
        let starts = !submission.reserves() && self.has_place() && self.ready().next().is_none();
        let queued = || self.jobs.values().filter(|entry| entry.is_queued());
        if !starts && queued().count() >= self.limits.queued_max {
            return Err(Refused::QueueFull(self.limits.queued_max));
        }
        let job = Job {
            id: id.to_owned(),
            number: self.next_number,
            submission,
            status: Status::Pending,
            stop_requested: false,
            message: None,
            error_type: None,
            start_time: now,
            end_time: None,
            exit_code: None,
            keeper: None,
        };
        self.next_number += 1;
        let entry = Entry::new(job);
        let mut commands = vec![Command::Save(id.to_owned())];
        commands.extend((!entry.reserved).then(|| Command::Reserve(id.to_owned())));
        self.jobs.insert(id.to_owned(), entry);
        commands.extend(self.start_what_fits());
        Ok(commands)
    }

    /// What a job asks for is set aside.
    pub fn reserved(&mut self, id: &str) -> Vec<Command> {
        let Some(entry) = self.jobs.get_mut(id).filter(|entry| entry.is_queued()) else { return Vec::new() };
        entry.reserved = true;
        entry.job.message = None;
        self.start_what_fits()
    }

    /// What a job asks for is not there now.
    pub fn waits(&mut self, id: &str, why: &str) {
        if let Some(entry) = self.jobs.get_mut(id).filter(|entry| entry.is_queued()) {
            entry.reserved = false;
            entry.job.message =
                Some(format!("Job has not started yet. It waits for what it asks for: {why}"));
        }
    }

    /// What was set aside for a job is no more: one that runs must end, one that does not waits again.
    pub fn unreserved(&mut self, id: &str, why: String) -> Vec<Command> {
        let Some(entry) = self.jobs.get_mut(id) else { return Vec::new() };
        match entry.job.status {
            Status::Running => {
                entry.unreserved.get_or_insert(why);
                vec![Command::Stop(id.to_owned())]
            }
            // It is asked to end as soon as it has started.
            Status::Pending if entry.starting => {
                entry.unreserved.get_or_insert(why);
                Vec::new()
            }
            Status::Pending => {
                self.waits(id, &why);
                Vec::new()
            }
            Status::Stopped | Status::Succeeded | Status::Failed => Vec::new(),
        }
    }

    /// What a job asks for can never be set aside.
    pub fn refused(&mut self, id: &str, why: String, now: u64) -> Vec<Command> {
        if self.jobs.get(id).is_some_and(Entry::is_active) {
            return self.unreserved(id, why);
        }
        let why = format!("the job cannot have what it asks for: {why}");
        self.not_started(id, ErrorType::JobSupervisorActorStartFailure, why, now)
    }

    /// The keeper runs.
    pub fn started(&mut self, id: &str, keeper: ProcessId) -> Vec<Command> {
        let Some(entry) = self.jobs.get_mut(id) else { return Vec::new() };
        entry.starting = false;
        entry.job.status = Status::Running;
        entry.job.keeper = Some(keeper);
        let mut commands = vec![Command::Save(id.to_owned())];
        if entry.job.stop_requested || entry.unreserved.is_some() {
            commands.push(Command::Stop(id.to_owned()));
        }
        commands
    }

    /// The keeper could not be started.
    pub fn not_started(&mut self, id: &str, error: ErrorType, why: String, now: u64) -> Vec<Command> {
        self.finish(id, now, |job| {
            job.status = if job.stop_requested { Status::Stopped } else { Status::Failed };
            job.message = Some(why);
            job.error_type = (!job.stop_requested).then_some(error);
        })
    }

    /// The keeper ended; `tail` holds the last lines of the log.
    pub fn ended(&mut self, id: &str, end: End, tail: &str, now: u64) -> Vec<Command> {
        let unreserved = self.jobs.get_mut(id).and_then(|entry| entry.unreserved.take());
        self.finish(id, now, |job| {
            if job.stop_requested {
                job.status = Status::Stopped;
                return;
            }
            let failed = |job: &mut Job, error, message: String| {
                (job.status, job.error_type, job.message) = (Status::Failed, Some(error), Some(message));
            };
            match end {
                End::Exited { code: 0 } => (job.status, job.exit_code) = (Status::Succeeded, Some(0)),
                End::Exited { code } => {
                    job.exit_code = Some(code);
                    let logs = match tail {
                        "" => "No logs available.".to_owned(),
                        tail => format!("last available logs (truncated to 20,000 chars):\n{tail}"),
                    };
                    let separator = if tail.is_empty() { ". " } else { ", " };
                    let message =
                        format!("Job entrypoint command failed with exit code {code}{separator}{logs}");
                    failed(job, ErrorType::JobEntrypointCommandError, message);
                }
                End::Terminated | End::NodeLost { .. } if unreserved.is_some() => {
                    let why = unreserved.unwrap_or_default();
                    let message =
                        format!("The job was ended because what was set aside for it is lost: {why}");
                    failed(job, ErrorType::JobSupervisorActorDied, message);
                }
                End::Terminated => {
                    job.status = Status::Stopped;
                    job.message = Some("The cluster was stopped while the job ran.".into());
                }
                End::Orphaned => {
                    let message = "The job was ended because no jobs actor was there for too long \
                                   (`orphan_grace_s` in [dashboard]).";
                    failed(job, ErrorType::JobSupervisorActorDied, message.into());
                }
                End::NotStarted { why } => failed(job, ErrorType::JobEntrypointCommandStartError, why),
                End::Lost => {
                    let message = "The process that kept the job was killed: how the job ended is lost.";
                    failed(job, ErrorType::JobSupervisorActorDied, message.into());
                }
                End::NodeLost { node, why } => {
                    let message = format!("The job was lost on node {node}, where it ran: {why}");
                    failed(job, ErrorType::JobSupervisorActorDied, message);
                }
            }
        })
    }

    /// Asks for the end of a job. False where it has ended already.
    ///
    /// # Errors
    /// There is no such job.
    pub fn stop(&mut self, id: &str, now: u64) -> Result<(bool, Vec<Command>), Refused> {
        let entry = self.jobs.get_mut(id).ok_or_else(|| Refused::NoSuchJob(id.to_owned()))?;
        if entry.job.status.is_terminal() {
            return Ok((false, Vec::new()));
        }
        entry.job.stop_requested = true;
        let save = Command::Save(id.to_owned());
        let commands = match (entry.job.status, entry.starting) {
            (Status::Running, _) => vec![save, Command::Stop(id.to_owned())],
            (_, true) => vec![save],
            (_, false) => self.finish(id, now, |job| job.status = Status::Stopped),
        };
        Ok((true, commands))
    }

    /// Forgets an ended job.
    ///
    /// # Errors
    /// There is no such job, or it has not ended.
    pub fn delete(&mut self, id: &str) -> Result<Vec<Command>, Refused> {
        let job = self.get(id).ok_or_else(|| Refused::NoSuchJob(id.to_owned()))?;
        if !job.status.is_terminal() {
            return Err(Refused::NotEnded { id: id.to_owned(), status: job.status });
        }
        self.jobs.remove(id);
        Ok(vec![Command::Forget(id.to_owned())])
    }

    /// A submission that could not be written never was.
    pub fn withdraw(&mut self, id: &str) {
        self.jobs.remove(id);
    }

    /// After a restart, once what runs was found: stops that were asked for are asked for again, what was set aside is
    /// looked after, and what waits starts.
    pub fn recovered(&mut self) -> Vec<Command> {
        let mut commands = Vec::new();
        for entry in self.jobs.values().filter(|entry| !entry.job.status.is_terminal()) {
            let id = entry.job.id.clone();
            if entry.job.submission.reserves() {
                commands.push(Command::Reserve(id.clone()));
            }
            if entry.job.status == Status::Running && entry.job.stop_requested {
                commands.push(Command::Stop(id));
            }
        }
        commands.extend(self.start_what_fits());
        commands
    }

    /// Those that only wait for a place.
    fn ready(&self) -> impl Iterator<Item = &Entry> {
        self.jobs.values().filter(|entry| entry.is_queued() && entry.reserved)
    }

    fn has_place(&self) -> bool {
        self.jobs.values().filter(|entry| entry.is_active()).count() < self.limits.running_max
    }

    /// In the order of submission, among those whose resources are there.
    fn start_what_fits(&mut self) -> Vec<Command> {
        let mut commands = Vec::new();
        while self.has_place()
            && let Some(next) = self.ready().min_by_key(|entry| entry.job.number)
        {
            let id = next.job.id.clone();
            if let Some(entry) = self.jobs.get_mut(&id) {
                entry.starting = true;
            }
            commands.push(Command::Start(id));
        }
        commands
    }

    fn finish(&mut self, id: &str, now: u64, how: impl FnOnce(&mut Job)) -> Vec<Command> {
        let Some(entry) = self.jobs.get_mut(id).filter(|entry| !entry.job.status.is_terminal()) else {
            return Vec::new();
        };
        entry.starting = false;
        how(&mut entry.job);
        entry.job.end_time = Some(now);
        entry.job.keeper = None;
        let mut commands = vec![Command::Save(id.to_owned())];
        commands.extend(entry.release());
        commands.extend(self.forget_oldest());
        commands.extend(self.start_what_fits());
        commands
    }

    fn forget_oldest(&mut self) -> Option<Command> {
        let ended = || self.jobs.values().filter(|entry| entry.job.status.is_terminal());
        if ended().count() <= self.limits.kept_max {
            return None;
        }
        let oldest = ended().min_by_key(|entry| entry.job.number)?.job.id.clone();
        self.jobs.remove(&oldest);
        Some(Command::Forget(oldest))
    }
}

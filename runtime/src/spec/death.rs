//! Why actors end.
//!
//! Plain data, made by whoever saw the end: worker, node agent or head.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::system::Panic;

/// Why an incarnation of an actor ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum DeathCause {
    /// The worker process exited by itself.
    #[error("worker process exited with code {code}")]
    Exited {
        /// Its exit code.
        code: i32,
    },
    /// A signal ended the worker process.
    #[error("worker process killed by signal {signal}{}", signal_name(*.signal))]
    Killed {
        /// Number of the signal.
        signal: i32,
    },
    /// The worker process is gone and nobody could read its exit status.
    #[error("worker process is gone: {why}")]
    Vanished {
        /// What is known.
        why: String,
    },
    /// The kernel ended the worker process because memory ran out.
    #[error("killed by the kernel: {scope} ran out of memory")]
    OutOfMemory {
        /// Whose memory it was: the control group's, or the machine's.
        scope: String,
    },
    /// The actor panicked.
    #[error("panicked{}: {message}", .location.as_ref().map_or(String::new(), |at| format!(" at {at}")))]
    Panicked {
        /// The panic message.
        message: String,
        /// File and line.
        location: Option<String>,
        /// Frames of the actor's thread, one a line, innermost first.
        backtrace: Option<String>,
    },
    /// The actor took no message for longer than its spec allows.
    #[error("hung for {waited_ms} ms: {what}")]
    Hung {
        /// How long it was waited for.
        waited_ms: u64,
        /// What it was at, as far as is known.
        what: String,
    },
    /// Its GPU failed, as its driver or the actor says.
    #[error("GPU fault: {message}")]
    GpuFault {
        /// What was said.
        message: String,
    },
    /// `Spawn::create` returned an error.
    #[error("could not be created: {message}")]
    CreateFailed {
        /// The error.
        message: String,
    },
    /// The worker process could not be started.
    #[error("worker could not be started: {message}")]
    StartFailed {
        /// The error.
        message: String,
    },
    /// The actor ended itself with an error.
    #[error("failed: {message}")]
    Failed {
        /// The error.
        message: String,
    },
    /// The actor ended itself because its work is done. It is not restarted.
    #[error("finished")]
    Finished,
    /// The node was lost.
    #[error("node {node} was lost: {why}")]
    NodeLost {
        /// Name of the node.
        node: String,
        /// How that was noticed.
        why: String,
    },
    /// Somebody asked for it: a stop, a restart or another spec.
    #[error("stopped: {why}{}", .by.as_ref().map_or(String::new(), |by| format!(", asked for by {by}")))]
    Stopped {
        /// What was asked for.
        why: String,
        /// Who asked, if that was told.
        by: Option<String>,
    },
    /// What it belonged to is gone.
    #[error("its owner is gone: {owner}: {why}")]
    OwnerGone {
        /// The owner.
        owner: String,
        /// How the owner ended.
        why: String,
    },
    /// Another child of its supervisor died, and this one is restarted with it.
    #[error("ended with {child} by supervisor {supervisor}; {child}: {death}")]
    SiblingDied {
        /// Name of the supervisor.
        supervisor: String,
        /// The child that died: an actor or a supervisor.
        child: String,
        /// Why that one ended.
        death: Box<DeathCause>,
    },
    /// A supervisor could not or would not repair the death of a child, and failed by it.
    #[error("supervisor {supervisor} failed by {child}: {death}")]
    Escalated {
        /// Name of the supervisor.
        supervisor: String,
        /// The child that died: an actor or a supervisor.
        child: String,
        /// Why that one ended.
        death: Box<DeathCause>,
    },
}

impl DeathCause {
    /// What was at the bottom of it: the first death of a chain.
    pub fn root(&self) -> &DeathCause {
        match self {
            DeathCause::SiblingDied { death, .. } | DeathCause::Escalated { death, .. } => death.root(),
            DeathCause::Exited { .. }
            | DeathCause::Killed { .. }
            | DeathCause::Vanished { .. }
            | DeathCause::OutOfMemory { .. }
            | DeathCause::Panicked { .. }
            | DeathCause::Hung { .. }
            | DeathCause::GpuFault { .. }
            | DeathCause::CreateFailed { .. }
            | DeathCause::StartFailed { .. }
            | DeathCause::Failed { .. }
            | DeathCause::Finished
            | DeathCause::NodeLost { .. }
            | DeathCause::Stopped { .. }
            | DeathCause::OwnerGone { .. } => self,
        }
    }

    /// The same without its backtrace, for where it stands beside many others.
    pub fn brief(mut self) -> Self {
        if let DeathCause::Panicked { backtrace, .. } = &mut self {
            *backtrace = None;
        }
        self
    }

    /// Bytes of its backtrace.
    pub(crate) fn detail_bytes(&self) -> usize {
        match self {
            DeathCause::Panicked { backtrace: Some(frames), .. } => frames.len(),
            _ => 0,
        }
    }

    /// Whether somebody meant it to end: no failure, and no reason to start it again.
    pub fn is_intended(&self) -> bool {
        matches!(self, DeathCause::Finished | DeathCause::Stopped { .. } | DeathCause::OwnerGone { .. })
    }

    /// A panic.
    pub fn panicked(panic: impl Into<Panic>) -> Self {
        let Panic { message, location, backtrace } = panic.into();
        DeathCause::Panicked { message, location, backtrace }
    }

    /// A stop that nobody in particular asked for.
    pub fn stopped(why: impl Into<String>) -> Self {
        DeathCause::Stopped { why: why.into(), by: None }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        2 => " (SIGINT)",
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        9 => " (SIGKILL, from outside of the cluster)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_cause_says_what_happened() {
        let killed = DeathCause::Killed { signal: 9 };
        assert!(killed.to_string().contains("signal 9 (SIGKILL"));
        let chain = DeathCause::Escalated {
            supervisor: "top".into(),
            child: "bottom".into(),
            death: Box::new(DeathCause::Escalated {
                supervisor: "bottom".into(),
                child: "rank-3".into(),
                death: Box::new(killed.clone()),
            }),
        };
        assert_eq!(*chain.root(), killed);
        let text = chain.to_string();
        assert!(
            text.starts_with("supervisor top failed by bottom: supervisor bottom failed by rank-3"),
            "{text}"
        );
    }
}

//! What is wanted: applications, their deployments, and how many replicas of each. Plain data.

use std::time::Duration;

use bincode::{Decode, Encode};

use super::workload::Workload;

/// One application: its route, and the deployments behind it.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct AppTarget {
    /// Its name.
    pub name: String,
    /// Start of the paths that it answers; none: it is not reached by HTTP.
    pub route_prefix: Option<String>,
    /// Who asked for it.
    pub source: Source,
    /// As it was written, JSON.
    pub config: String,
    /// At least one.
    pub deployments: Vec<DeploymentTarget>,
}

/// Who asked for an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Source {
    /// `[model]` of cluster.toml: it stays whatever else is deployed.
    Cluster,
    /// A deployed document: the next one that does not list it removes it.
    Document,
}

/// One deployment: what each of its replicas runs, and how many there are.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct DeploymentTarget {
    /// Its name, unique in its application.
    pub name: String,
    /// What a replica is.
    pub workload: Workload,
    /// What changes without a new process.
    pub settings: Settings,
}

/// What changes without a new process.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Settings {
    /// How many replicas.
    pub scale: Scale,
    /// Requests in flight per replica; none: the queues of the ranks are the bound. An actor of a user always has one.
    pub max_ongoing_requests: Option<u32>,
    /// Requests beyond those that wait; none: no bound of its own.
    pub max_queued_requests: Option<u32>,
    /// How a request beyond all bounds is refused, where that is written.
    pub backpressure: Option<Backpressure>,
    /// How long a replica that is to end may take to finish what it has.
    pub graceful_shutdown_timeout: Duration,
    /// How an update proceeds.
    pub rollout: Rollout,
}

impl Default for Settings {
    /// One replica; Ray's other defaults.
    fn default() -> Self {
        Self {
            scale: Scale::Fixed(1),
            max_ongoing_requests: None,
            max_queued_requests: None,
            backpressure: None,
            graceful_shutdown_timeout: Duration::from_secs(20),
            rollout: Rollout::Surge { percent: 0 },
        }
    }
}

/// Ray's `backpressure_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Backpressure {
    /// 503 or 429.
    pub status_code: u16,
    /// What `Retry-After` says, whole seconds.
    pub retry_after_s: Option<u32>,
}

/// How an update proceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Rollout {
    /// New replicas first: so many percent of the wanted number at a time, and at least one. Never below capacity.
    Surge {
        /// Of the wanted number.
        percent: u32,
    },
    /// Old replicas make room first: so many thousandths of the wanted number at a time, and at least one.
    InPlace {
        /// Of the wanted number.
        thousandths: u32,
    },
}

impl Rollout {
    /// Replicas that may be there beyond `wanted`, and that may be missing from it.
    pub(super) fn slack(self, wanted: u32) -> (u32, u32) {
        let share = |part: u32, whole: u64| (u64::from(wanted) * u64::from(part)).div_ceil(whole) as u32;
        match self {
            Self::Surge { percent } => (share(percent, 100).max(1), 0),
            Self::InPlace { thousandths } => (0, share(thousandths, 1000).clamp(1, wanted.max(1))),
        }
    }
}

/// How many replicas.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Scale {
    /// So many.
    Fixed(u32),
    /// As many as the load asks for.
    Auto(Autoscaling),
}

/// Ray's `autoscaling_config`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Autoscaling {
    /// At least so many; with 0 the deployment rests when nobody asks for it.
    pub min_replicas: u32,
    /// At first.
    pub initial_replicas: u32,
    /// At most.
    pub max_replicas: u32,
    /// Requests, queued and running, that a replica should have.
    pub target_ongoing_requests: f64,
    /// Load is averaged over this long.
    pub look_back: Duration,
    /// How long more must be wanted before there are more.
    pub upscale_delay: Duration,
    /// How long fewer must be wanted before there are fewer.
    pub downscale_delay: Duration,
    /// The same from one to none.
    pub downscale_to_zero_delay: Duration,
    /// Gain of a step up.
    pub upscaling_factor: f64,
    /// Gain of a step down.
    pub downscaling_factor: f64,
}

impl Scale {
    /// Replicas at first.
    pub(super) fn initial(&self) -> u32 {
        match self {
            Self::Fixed(replicas) => *replicas,
            Self::Auto(auto) => auto.initial_replicas.clamp(auto.min_replicas, auto.max_replicas),
        }
    }

    /// Replicas at most.
    pub(super) fn most(&self) -> u32 {
        match self {
            Self::Fixed(replicas) => *replicas,
            Self::Auto(auto) => auto.max_replicas,
        }
    }

    /// The present number, as far as it is still allowed.
    pub(super) fn bound(&self, present: u32) -> u32 {
        match self {
            Self::Fixed(replicas) => *replicas,
            Self::Auto(auto) => present.clamp(auto.min_replicas, auto.max_replicas),
        }
    }
}

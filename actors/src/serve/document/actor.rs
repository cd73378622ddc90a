//! An application of users' actors: `PACKAGE[@VERSION]:ACTOR_TYPE` and Ray's options of each deployment -> what their replicas
//! run.

use heliostat_runtime::package::{PackageId, PackageStatus};
use heliostat_runtime::spec::{LabelRule, LabelSelector, Quantity, Resources};
use serde_json::{Map, Value as Json};

use super::Facts;
use super::fields::{Fields, Problems, no};
use super::llm::ACCELERATOR_LABEL;
use super::settings::settings;
use crate::serve::target::DeploymentTarget;
use crate::serve::workload::{ActorDeployment, HealthChecks};

/// Ray's bound for a replica of which nothing is said.
const MAX_ONGOING_REQUESTS: u32 = 5;
/// Bytes of the name of a type of actor.
const TYPE_BYTES_MAX: usize = 128;
/// Messages that wait at a replica at least: what the runtime gives every actor.
const MAILBOX_MIN: u32 = 1024;

/// Ray's router that chooses as ours does, as JSON.
const OWN_ROUTER: &str = "\"ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter\"";

/// Which actor of which program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ActorPath {
    package: PackageId,
    actor_type: String,
}

impl ActorPath {
    /// Reads an import path that is none of a builder.
    ///
    /// # Errors
    /// It has another form, or names no package that is registered.
    pub(super) fn parse(import_path: &str, packages: &[PackageStatus]) -> Result<Self, String> {
        let (program, actor_type) =
            import_path.split_once(':').filter(|(program, it)| !program.is_empty() && !it.is_empty()).ok_or(
                "it is neither a builder nor PACKAGE:ACTOR_TYPE or PACKAGE@VERSION:ACTOR_TYPE".to_owned(),
            )?;
        let (name, version) = match program.split_once('@') {
            Some((name, version)) => (name, Some(version)),
            None => (program, None),
        };
        let there: Vec<&PackageId> =
            packages.iter().filter(|it| it.id.name == name && !it.replaced).map(|it| &it.id).collect();
        let versions = || there.iter().map(|id| id.version.as_str()).collect::<Vec<_>>().join(", ");
        let package = match (version, there.as_slice()) {
            (_, []) => {
                return Err(format!(
                    "no package is called {name:?}; register the program with helio package push BINARY or helio submit"
                ));
            }
            (None, [one]) => *one,
            (None, _) => {
                let first = &there[0].version;
                return Err(format!(
                    "package {name} has the versions {}; say which: {name}@{first}:{actor_type}",
                    versions()
                ));
            }
            (Some(version), _) => {
                there.iter().find(|id| id.version == version).copied().ok_or_else(|| {
                    format!(
                        "package {name} has no version {version:?} that is registered; there is {}",
                        versions()
                    )
                })?
            }
        };
        Ok(Self { package: package.clone(), actor_type: actor_type.to_owned() })
    }
}

/// An application of actors of users.
pub(super) struct ActorApp<'a> {
    /// The import path's, to which HTTP goes.
    pub(super) ingress: &'a ActorPath,
    /// Its name.
    pub(super) name: &'a str,
    /// What all its actors are created with, JSON.
    pub(super) args: String,
    /// What lies outside of the document.
    pub(super) facts: &'a Facts<'a>,
    /// Where all that is wrong is collected.
    pub(super) problems: &'a Problems,
}

impl ActorApp<'_> {
    /// Its deployments, each called as its actor's type: the ingress, and those that are listed besides. `path` is the
    /// application's.
    pub(super) fn deployments(&self, path: &str, listed: Vec<(String, Json)>) -> Vec<DeploymentTarget> {
        let mut made: Vec<DeploymentTarget> = Vec::new();
        let number = listed.len();
        for (path, mut options) in listed {
            let name = options.as_object_mut().and_then(|options| options.shift_remove("name"));
            let name = name.unwrap_or_default();
            match name.as_str().filter(|name| is_type(name)) {
                None => self.problems.add(
                    &format!("{path}.name"),
                    format!(
                        "{name} is not the name of a type of actor; HTTP goes to {}",
                        self.ingress.actor_type
                    ),
                ),
                Some(name) if made.iter().any(|it| it.name == name) => {
                    self.problems
                        .add(&format!("{path}.name"), format!("deployment {name:?} is listed twice"));
                }
                Some(name) => made.push(self.deployment(name, path, options)),
            }
        }
        if !made.iter().any(|it| it.name == self.ingress.actor_type) {
            let path = format!("{path}.deployments.{number}");
            made.push(self.deployment(&self.ingress.actor_type, path, Json::Object(Map::new())));
        }
        made
    }

    fn deployment(&self, name: &str, path: String, mut options: Json) -> DeploymentTarget {
        if let Some(options) = options.as_object_mut() {
            options.entry("max_ongoing_requests").or_insert(MAX_ONGOING_REQUESTS.into());
        }
        let mut options = Fields::open(path, options, self.problems);
        let user_config = options.raw("user_config").map(|config| config.to_string());
        let health = health(&mut options);
        let (resources, selector) = process(&mut options);
        router(&mut options);
        let settings = settings(options);
        let ongoing = settings.max_ongoing_requests.unwrap_or(MAX_ONGOING_REQUESTS);
        let actor = ActorDeployment {
            application: self.name.to_owned(),
            deployment: name.to_owned(),
            package: self.ingress.package.clone(),
            actor_type: name.to_owned(),
            args: self.args.clone(),
            user_config,
            ingress: name == self.ingress.actor_type,
            resources,
            selector,
            health,
            mailbox_capacity: ongoing.saturating_mul(2).max(MAILBOX_MIN),
            restart: self.facts.base.restart,
        };
        DeploymentTarget { name: name.to_owned(), workload: actor.into(), settings }
    }
}

fn is_type(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= TYPE_BYTES_MAX
        && !name.chars().any(|c| c.is_control() || c.is_whitespace())
}

fn health(options: &mut Fields<'_>) -> HealthChecks {
    let mut health = HealthChecks::default();
    let keys =
        [("health_check_period_s", &mut health.period), ("health_check_timeout_s", &mut health.timeout)];
    for (key, kept) in keys {
        match options.seconds(key) {
            Some(time) if time.is_zero() => options.wrong(key, "it must be above 0"),
            Some(time) => *kept = time,
            None => {}
        }
    }
    health
}

/// What the process of a replica needs, and where it may go.
fn process(options: &mut Fields<'_>) -> (Resources, LabelSelector) {
    let mut resources = Resources::cpus(1);
    let mut selector = LabelSelector::default();
    let Some(mut actor) = options.object("ray_actor_options") else { return (resources, selector) };
    if let Some(cpus) = quantity(&mut actor, "num_cpus") {
        resources.cpus = cpus;
    }
    match actor.take::<f64>("num_gpus") {
        None | Some(0.0) => {}
        Some(1.0) => resources.devices = 1,
        Some(other) => actor.wrong("num_gpus", format!("{other} is not supported: an actor has one or none")),
    }
    resources.memory = actor.take("memory").unwrap_or(0);
    if let Some(mut custom) = actor.object("resources") {
        for name in custom.keys() {
            if let Some(amount) = quantity(&mut custom, &name) {
                resources.custom.insert(name, amount);
            }
        }
        custom.finish();
    }
    if let Some(mut labels) = actor.object("label_selector") {
        for key in labels.keys() {
            if let Some(rule) = labels.take::<LabelRule>(&key) {
                selector = selector.and(key, rule);
            }
        }
        labels.finish();
    }
    if let Some(rule) = actor.take::<LabelRule>("accelerator_type") {
        selector = selector.and(ACCELERATOR_LABEL, rule);
    }
    actor
        .refuse(&[no("runtime_env", &["{}"], "the program is one binary"), no("fallback_strategy", &[], "")]);
    actor.finish();
    (resources, selector)
}

fn quantity(fields: &mut Fields<'_>, key: &str) -> Option<Quantity> {
    let amount: f64 = fields.take(key)?;
    Quantity::from_f64(amount).map_err(|why| fields.wrong(key, why.to_string())).ok()
}

/// Replicas of actors have no cached prefixes that a router could know.
fn router(options: &mut Fields<'_>) {
    let Some(mut router) = options.object("request_router_config") else { return };
    router.refuse(&[
        no("request_router_class", &[OWN_ROUTER], "the less busy one of two replicas is always chosen"),
        no("request_router_kwargs", &["{}"], ""),
        no("request_routing_stats_period_s", &["10"], ""),
        no("request_routing_stats_timeout_s", &["30"], ""),
        no("initial_backoff_s", &["0.025"], ""),
        no("backoff_multiplier", &["2"], ""),
        no("max_backoff_s", &["0.5"], ""),
    ]);
    router.finish();
}

//! What is to be served, what is, and what to do about the difference.
//!
//! Pure: deployments, what was seen of replicas and load, and the time come in, commands go out. It is written down
//! before a command is carried out, so a controller that starts anew goes on where the last one was. Every decision
//! follows from what is so, not from which message said it.

mod autoscale;
mod deployment;
mod order;
#[cfg(test)]
mod simulation;
mod sites;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use bincode::{Decode, Encode};
use heliostat_runtime::wire::{CodecError, from_bytes, to_bytes};

pub use self::deployment::{Deployment, DeploymentState, Replica, Stage};
pub use self::sites::{ProxyLocation, Room, SeenNode, SeenSite, SeenSites, Site, SiteArgs, SiteStage, Sites};
#[cfg(test)]
pub(super) use self::tests::{actor as test_actor, model as test_model};
use super::messages::{Table, TableApp};
use super::target::{AppTarget, Source};

/// Replicas of all deployments at most.
pub const REPLICAS_MAX: u32 = 1024;

/// How a replica is, as the head says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// None of its actors is there.
    Gone,
    /// An actor of it has no place; says why.
    Unplaced(String),
    /// Not all of it serves yet, or at present; says what is missing.
    Starting(String),
    /// All of it serves.
    Ready,
    /// It serves, but not as it is asked to, and will not by itself; says why.
    Ailing(String),
    /// It will not come (back) by itself; says why.
    Broken(String),
}

/// What was seen last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Each replica by number; one that is not listed has no actors.
    pub health: BTreeMap<u64, Health>,
    /// Requests in flight at all ingresses together, by application and deployment.
    pub loads: BTreeMap<(String, String), u64>,
    /// Requests of all ingresses at each replica that they all send nothing new, by number.
    pub draining: BTreeMap<u64, u64>,
    /// Why an ingress cannot serve a deployment.
    pub problems: BTreeMap<(String, String), String>,
    /// Nodes and ingresses; none while the head does not know its nodes.
    pub sites: Option<SeenSites>,
}

/// What the shell must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Keep the state; nothing that follows is done before it is durable.
    Persist,
    /// Have the actors of a replica, as it is now described.
    Ensure(u64),
    /// End the actors of a replica and forget them.
    Remove(u64),
    /// Have the actor of an ingress, as it is now described.
    EnsureIngress(String),
    /// End an ingress and forget it.
    RemoveIngress(String),
}

/// An application.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct App {
    /// Start of its paths.
    pub route_prefix: Option<String>,
    /// Who asked for it.
    pub source: Source,
    /// As it was written, JSON.
    pub config: String,
    /// When, milliseconds since 1970.
    pub deployed_at_ms: u64,
    /// It ends.
    pub deleting: bool,
    /// By name.
    pub deployments: BTreeMap<String, Deployment>,
}

/// Numbers that are never given out twice.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
struct Numbers {
    replica: u64,
    rank: u32,
    version: u64,
    /// The time of day, milliseconds since 1970; only shown.
    wall_ms: u64,
}

/// Everything that the controller knows.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct ServeState {
    apps: BTreeMap<String, App>,
    numbers: Numbers,
    sites: Sites,
    /// cluster.toml's application was removed by request, and as what.
    shut: Option<String>,
    /// It differs from what was written down last.
    changed: bool,
}

/// Two applications cannot be served side by side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Clash {
    /// The name is that of cluster.toml's application.
    #[error(
        "applications.{0}.name: {1:?} is the application of [model] in cluster.toml; choose another name"
    )]
    Name(usize, String),
    /// The route is taken.
    #[error(
        "applications.{index}.route_prefix: {prefix:?} is taken by application {by:?}; choose another (that of cluster.toml goes with `deploy = false` in [model])"
    )]
    Route {
        /// Which of the applications.
        index: usize,
        /// The route.
        prefix: String,
        /// Who has it.
        by: String,
    },
    /// There would be too many.
    #[error("applications: {0} replicas are asked for, and {REPLICAS_MAX} are the limit")]
    TooMany(u64),
}

impl ServeState {
    /// What an earlier controller has written down.
    ///
    /// # Errors
    /// Another version wrote it.
    pub fn restore(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut state: Self = from_bytes(bytes)?;
        state.changed = false;
        let all = state.apps.values_mut().flat_map(|app| app.deployments.values_mut());
        all.for_each(Deployment::start_anew);
        Ok(state)
    }

    /// What is to be written down.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn snapshot(&self) -> Result<Vec<u8>, CodecError> {
        to_bytes(self)
    }

    /// What was to be written down was not: it is still due.
    pub fn not_kept(&mut self) {
        self.changed = true;
    }

    /// All applications, by name.
    pub fn apps(&self) -> &BTreeMap<String, App> {
        &self.apps
    }

    /// Where HTTP is served.
    pub fn sites(&self) -> &Sites {
        &self.sites
    }

    /// What cluster.toml says of where HTTP is served.
    pub fn set_site_args(&mut self, args: SiteArgs) {
        self.sites.set_args(args);
        self.changed = true;
    }

    /// A replica by its number, with the names of its application and deployment.
    pub fn replica(&self, number: u64) -> Option<(&str, &str, &Replica)> {
        self.replicas().find(|(_, _, replica)| replica.number == number)
    }

    /// All replicas, with the names of their applications and deployments.
    pub fn replicas(&self) -> impl Iterator<Item = (&str, &str, &Replica)> {
        self.apps.iter().flat_map(|(app, state)| {
            state.deployments.iter().flat_map(move |(name, deployment)| {
                deployment.replicas().iter().map(move |replica| (app.as_str(), name.as_str(), replica))
            })
        })
    }

    /// cluster.toml's application, or that it has none. One that was removed by request stays away until it changes.
    pub fn set_base(&mut self, base: Option<AppTarget>, at_ms: u64) {
        let shut = base.as_ref().is_some_and(|base| self.shut.as_ref() == Some(&base.config));
        let base = base.filter(|_| !shut);
        if !shut {
            self.shut = None;
        }
        let name = base.as_ref().map(|base| base.name.clone());
        for (other, app) in &mut self.apps {
            if app.source == Source::Cluster && Some(other) != name.as_ref() {
                app.deleting = true;
            }
        }
        base.into_iter().for_each(|base| self.put(base, at_ms));
    }

    /// Serves exactly these, and cluster.toml's.
    ///
    /// # Errors
    /// Two of them get in each other's way; nothing is changed.
    pub fn deploy(&mut self, targets: Vec<AppTarget>, at_ms: u64) -> Result<(), Clash> {
        self.deploy_at(None, targets, at_ms)
    }

    /// The same, with what the document says of where HTTP is served.
    ///
    /// # Errors
    /// As above.
    pub fn deploy_at(
        &mut self,
        location: Option<ProxyLocation>,
        targets: Vec<AppTarget>,
        at_ms: u64,
    ) -> Result<(), Clash> {
        self.check(&targets)?;
        self.sites.set_written(location);
        for (name, app) in &mut self.apps {
            if app.source == Source::Document && !targets.iter().any(|target| target.name == *name) {
                app.deleting = true;
                self.changed = true;
            }
        }
        targets.into_iter().for_each(|target| self.put(target, at_ms));
        Ok(())
    }

    /// Drains and ends all applications.
    pub fn delete_all(&mut self) {
        self.changed = true;
        self.sites.set_written(None);
        for app in self.apps.values_mut() {
            app.deleting = true;
            if app.source == Source::Cluster {
                self.shut = Some(app.config.clone());
            }
        }
    }

    fn check(&self, targets: &[AppTarget]) -> Result<(), Clash> {
        let base = || self.apps.iter().filter(|(_, app)| app.source == Source::Cluster && !app.deleting);
        for (index, target) in targets.iter().enumerate() {
            if base().any(|(name, _)| *name == target.name) {
                return Err(Clash::Name(index, target.name.clone()));
            }
            let Some(prefix) = &target.route_prefix else { continue };
            let earlier = targets[..index].iter().map(|other| (&other.name, &other.route_prefix));
            let mut all = base().map(|(name, app)| (name, &app.route_prefix)).chain(earlier);
            if let Some((by, _)) = all.find(|(_, other)| other.as_ref() == Some(prefix)) {
                return Err(Clash::Route { index, prefix: prefix.clone(), by: by.clone() });
            }
        }
        let wanted = targets.iter().flat_map(|app| &app.deployments).map(|it| it.settings.scale.most());
        let wanted: u64 = wanted.map(u64::from).sum();
        if wanted > u64::from(REPLICAS_MAX) { Err(Clash::TooMany(wanted)) } else { Ok(()) }
    }

    fn put(&mut self, target: AppTarget, at_ms: u64) {
        self.changed = true;
        let AppTarget { name, route_prefix, source, config, deployments } = target;
        let app = self.apps.entry(name).or_insert_with(|| App {
            route_prefix: None,
            source,
            config: String::new(),
            deployed_at_ms: 0,
            deleting: false,
            deployments: BTreeMap::new(),
        });
        (app.route_prefix, app.source, app.config) = (route_prefix, source, config);
        (app.deployed_at_ms, app.deleting) = (at_ms, false);
        for (name, deployment) in &mut app.deployments {
            deployment.removing = !deployments.iter().any(|target| target.name == *name);
        }
        for target in deployments {
            match app.deployments.get_mut(&target.name) {
                Some(present) => present.retarget(target, &mut self.numbers.version),
                None => {
                    let name = target.name.clone();
                    app.deployments.insert(name, Deployment::new(target, &mut self.numbers.version));
                }
            }
        }
    }

    /// Compares what is wanted with what was seen at `now`, time since any fixed moment; `wall_ms` is the time of
    /// day, which is only shown.
    pub fn step(&mut self, now: Duration, wall_ms: u64, seen: &Seen) -> Vec<Command> {
        self.numbers.wall_ms = wall_ms;
        let mut commands = Vec::new();
        for (app_name, app) in &mut self.apps {
            for deployment in app.deployments.values_mut().filter(|it| app.deleting && !it.removing) {
                (deployment.removing, self.changed) = (true, true);
            }
            let held = order::held(&app.deployments);
            let at_home = app.source == Source::Cluster;
            for (name, deployment) in &mut app.deployments {
                let load = seen.loads.get(&(app_name.clone(), name.clone())).copied().unwrap_or(0);
                deployment.observe(now, seen);
                deployment.scale(now, load);
                deployment.reconcile(now, &mut self.numbers, (at_home, held.contains(name)));
                deployment.orders(now, seen, &mut commands);
                self.changed |= std::mem::take(&mut deployment.changed);
            }
            let before = app.deployments.len();
            app.deployments.retain(|_, deployment| !deployment.is_over());
            self.changed |= before != app.deployments.len();
        }
        if let Some(sites) = &seen.sites {
            self.changed |= self.sites.step(now, sites, &mut commands);
        }
        let before = self.apps.len();
        self.apps.retain(|_, app| !(app.deleting && app.deployments.is_empty()));
        self.changed |= before != self.apps.len();
        if std::mem::take(&mut self.changed) {
            commands.insert(0, Command::Persist);
        }
        commands
    }

    /// What an ingress serves.
    pub fn table(&self) -> Table {
        let app = |(name, app): (&String, &App)| {
            let ingress = order::ingress(&app.deployments);
            let actors = |(it, state): (&String, &Deployment)| state.table_of_actors(it, ingress == Some(it));
            TableApp {
                name: name.clone(),
                route_prefix: app.route_prefix.clone(),
                deployments: app.deployments.iter().flat_map(|(it, state)| state.table(name, it)).collect(),
                actors: app.deployments.iter().filter_map(actors).collect(),
            }
        };
        Table { apps: self.apps.iter().map(app).collect() }
    }

    /// Whether something is under way that the next look may bring on.
    pub fn is_moving(&self) -> bool {
        self.sites.is_moving()
            || self
                .apps
                .values()
                .any(|app| app.deleting || app.deployments.values().any(Deployment::is_moving))
    }
}

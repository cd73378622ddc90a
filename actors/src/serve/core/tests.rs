//! The core's rules, one by one.

use std::path::PathBuf;
use std::time::Duration;

use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::ep::Topology;
use heliostat_engine::eplb::{Gate, PlacementStrategy, Policy};
use heliostat_runtime::package::{Digest, PackageId};
use heliostat_runtime::spec::{LabelSelector, Resources, RestartPolicy};

use super::*;
use crate::deployment::{Duty, ModelDeployment};
use crate::eplb::EplbConfig;
use crate::rank::{CudaArgs, EngineArgs, KvCacheArgs, LinkArgs};
use crate::serve::target::{Autoscaling, DeploymentTarget, Rollout, Scale, Settings};
use crate::serve::workload::{ActorDeployment, HealthChecks, Workload};

/// A model of two ranks; another `seqs` needs other processes.
pub(in crate::serve) fn model(name: &str, seqs: u32) -> ModelDeployment {
    ModelDeployment {
        model: PathBuf::from("/models").join(name),
        model_name: name.to_owned(),
        duty: Duty::Whole,
        topology: Topology { dp: 2, ep: 2, colocate: true },
        redundant_experts: 2,
        initial_layout: None,
        strategy: PlacementStrategy::Linear,
        engine: EngineArgs {
            block_size: 16,
            kv_cache: KvCacheArgs::Blocks(64),
            max_num_seqs: seqs,
            max_num_batched_tokens: 64,
            max_model_len: 64,
            enable_prefix_caching: true,
            prefill_attention: PrefillAttention::default(),
            max_waiting: 8,
            load_report_steps: 16,
            cuda: CudaArgs::default(),
        },
        links: LinkArgs { timeout: Duration::from_secs(1), ring_bytes: 1024, secret: None, stage_ahead: 2 },
        eplb: EplbConfig {
            enabled: true,
            window_size: 10,
            step_interval: 10,
            policy: Policy::Deepseek { num_groups: 1, num_nodes: 1 },
            gate: Gate::default(),
            bytes_per_expert: 1,
            plan_timeout: Duration::from_secs(1),
            log_balancedness: false,
        },
        telemetry: None,
        spread: false,
        selector: LabelSelector::default(),
        restart: RestartPolicy::default(),
    }
}

/// An actor of a user; another `content` of its package needs other processes.
pub(in crate::serve) fn actor(name: &str, content: u8) -> ActorDeployment {
    ActorDeployment {
        application: name.to_owned(),
        deployment: name.to_owned(),
        package: PackageId { name: name.to_owned(), version: "1".to_owned(), sha256: Digest([content; 32]) },
        actor_type: name.to_owned(),
        args: "{}".to_owned(),
        user_config: None,
        ingress: true,
        resources: Resources::default(),
        selector: LabelSelector::default(),
        health: HealthChecks::default(),
        mailbox_capacity: 8,
        restart: RestartPolicy::default(),
    }
}

/// Which version a replica is of.
fn seqs(replica: &Replica) -> u32 {
    replica.workload.model().unwrap().engine.max_num_seqs
}

pub(super) fn target(name: &str, seqs: u32, settings: Settings) -> AppTarget {
    AppTarget {
        name: name.to_owned(),
        route_prefix: Some(format!("/{name}")),
        source: Source::Document,
        config: "{}".to_owned(),
        deployments: vec![DeploymentTarget {
            name: name.to_owned(),
            workload: model(name, seqs).into(),
            settings,
        }],
    }
}

pub(super) fn replicas(count: u32) -> Settings {
    Settings { scale: Scale::Fixed(count), ..Settings::default() }
}

/// A cluster in which everything works, as far as it is not told otherwise.
struct Rig {
    state: ServeState,
    seen: Seen,
    now: Duration,
    /// Versions, told by their `max_num_seqs`, that never start.
    broken: Vec<u32>,
    /// Requests at each replica.
    busy: BTreeMap<u64, u64>,
    ensured: Vec<u64>,
    removed: Vec<u64>,
}

impl Rig {
    fn new() -> Self {
        Self {
            state: ServeState::default(),
            seen: Seen::default(),
            now: Duration::ZERO,
            broken: Vec::new(),
            busy: BTreeMap::new(),
            ensured: Vec::new(),
            removed: Vec::new(),
        }
    }

    fn deploy(&mut self, targets: Vec<AppTarget>) {
        self.state.deploy(targets, 1).unwrap();
    }

    /// One look, and what follows from it.
    fn step(&mut self) {
        self.now += Duration::from_millis(500);
        let draining = self.state.replicas().filter(|(_, _, replica)| replica.stage == Stage::Draining);
        let at = |number: u64| (number, self.busy.get(&number).copied().unwrap_or(0));
        self.seen.draining = draining.map(|(_, _, replica)| at(replica.number)).collect();
        for command in self.state.step(self.now, 7, &self.seen) {
            match command {
                Command::EnsureIngress(_) | Command::RemoveIngress(_) => {}
                Command::Persist => {
                    let bytes = self.state.snapshot().unwrap();
                    assert_eq!(
                        ServeState::restore(&bytes).unwrap().replicas().count(),
                        self.state.replicas().count()
                    );
                }
                Command::Ensure(number) => {
                    self.ensured.push(number);
                    let (_, _, replica) = self.state.replica(number).unwrap();
                    let works = replica.workload.model().is_none() || !self.broken.contains(&seqs(replica));
                    let health = if works { Health::Ready } else { Health::Broken("no".to_owned()) };
                    self.seen.health.insert(number, health);
                }
                Command::Remove(number) => {
                    self.removed.push(number);
                    self.seen.health.remove(&number);
                }
            }
        }
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| self.step());
    }

    fn deployment(&self, app: &str) -> &Deployment {
        &self.state.apps()[app].deployments[app]
    }

    /// `max_num_seqs` of all replicas that serve, in order.
    fn serving(&self, app: &str) -> Vec<u32> {
        let serving =
            self.deployment(app).replicas().iter().filter(|replica| replica.stage == Stage::Running);
        serving.map(seqs).collect()
    }

    fn state(&self, app: &str) -> DeploymentState {
        self.deployment(app).state().0
    }
}

#[test]
fn applications_come_side_by_side_and_go_when_they_are_not_listed() {
    let mut rig = Rig::new();
    rig.deploy(vec![target("a", 8, replicas(2)), target("b", 8, replicas(1))]);
    rig.steps(4);
    assert_eq!((rig.serving("a"), rig.serving("b")), (vec![8, 8], vec![8]));
    assert_eq!(rig.state("a"), DeploymentState::Healthy);
    let table = rig.state.table();
    let first = |app: usize| {
        table.apps[app].deployments[0].replicas.iter().map(|it| it.first_rank).collect::<Vec<_>>()
    };
    assert_eq!((first(0), first(1)), (vec![0, 2], vec![4]), "every rank has a number of its own");
    rig.deploy(vec![target("b", 8, replicas(1))]);
    rig.steps(6);
    assert!(!rig.state.apps().contains_key("a"));
    assert_eq!(rig.removed.len(), 2);
    assert_eq!(rig.serving("b"), [8]);
}

#[test]
fn the_same_again_changes_nothing_and_settings_of_eplb_change_without_another_replica() {
    let mut rig = Rig::new();
    rig.deploy(vec![target("a", 8, replicas(2))]);
    rig.steps(4);
    let ensured = rig.ensured.len();
    rig.deploy(vec![target("a", 8, replicas(2))]);
    rig.steps(4);
    assert_eq!((rig.ensured.len(), rig.removed.len()), (ensured, 0));
    let mut live = target("a", 8, replicas(2));
    let Workload::Model(changed) = &mut live.deployments[0].workload else { unreachable!() };
    changed.eplb.step_interval = 77;
    rig.deploy(vec![live]);
    rig.steps(4);
    assert_eq!((rig.ensured.len(), rig.removed.len()), (ensured + 2, 0), "the same replicas, described anew");
    assert!(
        rig.deployment("a").replicas().iter().all(|replica| replica
            .workload
            .model()
            .unwrap()
            .eplb
            .step_interval
            == 77)
    );
    assert_eq!(rig.state("a"), DeploymentState::Healthy);
}

#[test]
fn an_update_never_drops_below_capacity_and_waits_for_what_is_in_flight() {
    let mut rig = Rig::new();
    rig.deploy(vec![target("a", 8, replicas(3))]);
    rig.steps(4);
    let old: Vec<u64> = rig.deployment("a").replicas().iter().map(|replica| replica.number).collect();
    rig.busy = old.iter().map(|&number| (number, 1)).collect();
    rig.deploy(vec![target("a", 9, replicas(3))]);
    for _ in 0..12 {
        rig.step();
        assert!(rig.serving("a").len() >= 3, "SD-1: {:?}", rig.serving("a"));
    }
    assert!(rig.removed.is_empty(), "SD-3: they are busy");
    assert_eq!(rig.state("a"), DeploymentState::Updating);
    rig.busy.clear();
    rig.steps(12);
    assert_eq!(rig.serving("a"), [9, 9, 9]);
    assert_eq!(rig.removed.len(), 3);
    assert_eq!(rig.state("a"), DeploymentState::Healthy);
}

#[test]
fn a_drain_ends_with_its_grace() {
    let mut rig = Rig::new();
    let settings = Settings { graceful_shutdown_timeout: Duration::from_secs(3), ..replicas(1) };
    rig.deploy(vec![target("a", 8, settings)]);
    rig.steps(3);
    rig.busy.insert(1, 5);
    rig.deploy(vec![]);
    rig.steps(5);
    assert!(rig.removed.is_empty());
    rig.steps(5);
    assert_eq!(rig.removed, [1]);
}

#[test]
fn a_version_that_does_not_start_is_rolled_back() {
    let mut rig = Rig::new();
    rig.deploy(vec![target("a", 8, replicas(2))]);
    rig.steps(4);
    rig.broken.push(9);
    rig.deploy(vec![target("a", 9, replicas(2))]);
    for _ in 0..60 {
        rig.step();
        assert_eq!(rig.serving("a"), [8, 8], "SD-2: what served goes on");
    }
    let (state, message) = rig.deployment("a").state();
    assert_eq!(state, DeploymentState::DeployFailed);
    assert!(message.contains("rolled back"), "{message}");
    assert!(rig.deployment("a").replicas().len() == 2);
    // Once it works, the same document is taken.
    rig.broken.clear();
    rig.deploy(vec![target("a", 9, replicas(2))]);
    rig.steps(20);
    assert_eq!((rig.serving("a"), rig.state("a")), (vec![9, 9], DeploymentState::Healthy));
}

#[test]
fn a_first_version_that_does_not_start_is_given_up_and_says_why() {
    let mut rig = Rig::new();
    rig.broken.push(8);
    rig.deploy(vec![target("a", 8, replicas(1))]);
    rig.steps(60);
    let (state, message) = rig.deployment("a").state();
    assert_eq!(state, DeploymentState::DeployFailed);
    assert!(message.contains("3 times: no"), "{message}");
    assert!(rig.deployment("a").replicas().is_empty());
}

#[test]
fn a_replica_that_breaks_is_replaced_and_one_that_ails_is_not() {
    let mut rig = Rig::new();
    rig.deploy(vec![target("a", 8, replicas(2))]);
    rig.steps(4);
    rig.seen.health.insert(1, Health::Starting("rank 1 is starting".into()));
    rig.steps(2);
    assert_eq!(rig.serving("a").len(), 2);
    assert_eq!(rig.deployment("a").state(), (DeploymentState::Unhealthy, "rank 1 is starting".to_owned()));
    rig.seen.health.insert(1, Health::Broken("out of memory".into()));
    rig.steps(10);
    assert_eq!(rig.removed, [1]);
    assert_eq!(rig.serving("a").len(), 2);
    assert_eq!(rig.state("a"), DeploymentState::Healthy);
}

#[test]
fn in_place_makes_room_first() {
    let mut rig = Rig::new();
    let settings = Settings { rollout: Rollout::InPlace { thousandths: 1000 }, ..replicas(1) };
    let mut base = target("a", 8, settings.clone());
    base.source = Source::Cluster;
    rig.state.set_base(Some(base), 1);
    rig.steps(4);
    assert!(rig.deployment("a").replicas()[0].home);
    let mut changed = target("a", 9, settings);
    changed.source = Source::Cluster;
    rig.state.set_base(Some(changed), 2);
    for _ in 0..10 {
        rig.step();
        assert!(
            rig.deployment("a").replicas().len() <= 1,
            "its devices are taken until the old one has gone"
        );
    }
    assert_eq!(rig.serving("a"), [9]);
    assert!(rig.deployment("a").replicas()[0].home, "it has the short names again");
}

#[test]
fn what_clashes_is_refused_by_name_and_nothing_changes() {
    let mut rig = Rig::new();
    let mut base = target("cluster", 8, replicas(1));
    (base.source, base.route_prefix) = (Source::Cluster, Some("/".into()));
    rig.state.set_base(Some(base), 1);
    let mut root = target("b", 8, replicas(1));
    root.route_prefix = Some("/".into());
    let clash = rig.state.deploy(vec![target("a", 8, replicas(1)), root], 2).unwrap_err();
    assert!(
        clash
            .to_string()
            .starts_with("applications.1.route_prefix: \"/\" is taken by application \"cluster\"")
    );
    let clash = rig.state.deploy(vec![target("cluster", 8, replicas(1))], 2).unwrap_err();
    assert!(clash.to_string().starts_with("applications.0.name: \"cluster\""));
    assert!(!rig.state.apps().contains_key("a"));
}

#[test]
fn a_shut_down_base_stays_away_until_it_changes() {
    let mut rig = Rig::new();
    let base = |config: &str| {
        let mut base = target("cluster", 8, replicas(1));
        (base.source, base.config) = (Source::Cluster, config.to_owned());
        Some(base)
    };
    rig.state.set_base(base("1"), 1);
    rig.steps(3);
    rig.state.delete_all();
    rig.steps(6);
    assert!(rig.state.apps().is_empty());
    rig.state.set_base(base("1"), 2);
    assert!(rig.state.apps().is_empty());
    rig.state.set_base(base("2"), 3);
    rig.steps(3);
    assert_eq!(rig.serving("cluster"), [8]);
}

#[test]
fn load_scales_to_zero_and_back_and_requests_may_wait() {
    let mut rig = Rig::new();
    let auto = Autoscaling {
        min_replicas: 0,
        initial_replicas: 0,
        max_replicas: 3,
        target_ongoing_requests: 2.0,
        look_back: Duration::from_secs(2),
        upscale_delay: Duration::from_secs(1),
        downscale_delay: Duration::from_secs(2),
        downscale_to_zero_delay: Duration::from_secs(3),
        upscaling_factor: 1.0,
        downscaling_factor: 1.0,
    };
    rig.deploy(vec![target("a", 8, Settings { scale: Scale::Auto(auto), ..Settings::default() })]);
    rig.steps(4);
    assert!(rig.serving("a").is_empty());
    assert!(rig.state.table().apps[0].deployments[0].may_wait);
    let load = |rig: &mut Rig, load| rig.seen.loads.insert(("a".into(), "a".into()), load);
    load(&mut rig, 1);
    rig.steps(3);
    assert_eq!(rig.serving("a"), [8]);
    load(&mut rig, 6);
    rig.steps(20);
    assert_eq!(rig.serving("a"), [8, 8, 8]);
    load(&mut rig, 0);
    rig.steps(40);
    assert!(rig.deployment("a").replicas().is_empty());
    assert_eq!(rig.state("a"), DeploymentState::Healthy);
}

#[test]
fn a_controller_that_starts_anew_goes_on_without_another_replica() {
    let mut rig = Rig::new();
    rig.deploy(vec![target("a", 8, replicas(2))]);
    rig.steps(4);
    rig.state = ServeState::restore(&rig.state.snapshot().unwrap()).unwrap();
    (rig.now, rig.ensured) = (Duration::ZERO, Vec::new());
    rig.steps(4);
    assert_eq!(rig.serving("a"), [8, 8]);
    assert_eq!(rig.ensured, [1, 2], "the same are applied again, which changes nothing");
}

#[test]
fn an_actor_of_a_user_is_updated_by_its_package_and_told_its_settings_live() {
    let mut rig = Rig::new();
    let target = |actor: ActorDeployment| AppTarget {
        deployments: vec![DeploymentTarget {
            name: "a".to_owned(),
            workload: actor.into(),
            settings: Settings { max_ongoing_requests: Some(5), ..Settings::default() },
        }],
        ..self::target("a", 1, Settings::default())
    };
    rig.state.deploy(vec![target(actor("a", 1))], 1).unwrap();
    let numbers = |state: &ServeState| state.replicas().map(|(_, _, it)| it.number).collect::<Vec<_>>();
    let step = |state: &mut ServeState, seen: &mut Seen, at: u64| {
        for command in state.step(Duration::from_secs(at), 7, seen) {
            match command {
                Command::Ensure(number) => drop(seen.health.insert(number, Health::Ready)),
                Command::Remove(number) => drop(seen.health.remove(&number)),
                Command::Persist | Command::EnsureIngress(_) | Command::RemoveIngress(_) => {}
            }
        }
        let drained = state.replicas().filter(|(_, _, it)| it.stage == Stage::Draining);
        seen.draining = drained.map(|(_, _, it)| (it.number, 0)).collect();
    };
    let (mut state, mut seen) = (rig.state, rig.seen);
    (0..3).for_each(|at| step(&mut state, &mut seen, at));
    assert_eq!(numbers(&state), [1]);
    let table = state.table();
    assert!(table.apps[0].deployments.is_empty());
    let shown = &table.apps[0].actors[0];
    assert_eq!((shown.name.as_str(), shown.max_ongoing_requests, shown.replicas.len()), ("a", 5, 1));

    // Settings concern nobody's process.
    let live = ActorDeployment { user_config: Some("2".to_owned()), ..actor("a", 1) };
    state.deploy(vec![target(live.clone())], 2).unwrap();
    let said = |state: &ServeState| state.apps()["a"].deployments["a"].state();
    assert_eq!(said(&state).0, DeploymentState::Updating, "nothing was told yet");
    step(&mut state, &mut seen, 3);
    assert_eq!(said(&state), (DeploymentState::Updating, "its new settings are on their way".to_owned()));
    (4..6).for_each(|at| step(&mut state, &mut seen, at));
    assert_eq!(said(&state).0, DeploymentState::Healthy);
    assert_eq!(numbers(&state), [1]);
    assert!(state.replicas().all(|(_, _, it)| it.workload == live.clone().into()));

    // Another binary does: the new one comes first.
    state.deploy(vec![target(actor("a", 2))], 3).unwrap();
    step(&mut state, &mut seen, 6);
    assert_eq!(numbers(&state), [1, 2]);
    (7..12).for_each(|at| step(&mut state, &mut seen, at));
    assert_eq!(numbers(&state), [2]);
}

/// An application of a gateway and of what it asks, both of a package with that `content`; those that are listed.
fn composed(content: u8, behind: &[&str]) -> AppTarget {
    let part = |name: &str, ingress| DeploymentTarget {
        name: name.to_owned(),
        workload: ActorDeployment { ingress, ..actor(name, content) }.into(),
        settings: replicas(1),
    };
    let mut deployments = vec![part("gateway", true)];
    deployments.extend(behind.iter().map(|name| part(name, false)));
    AppTarget { deployments, ..target("a", 0, replicas(1)) }
}

impl Rig {
    /// Which deployments have replicas, each with the contents of their packages.
    fn parts(&self) -> Vec<(&str, Vec<u8>)> {
        let Some(app) = self.state.apps().get("a") else { return Vec::new() };
        let content = |it: &Replica| it.workload.actor().unwrap().package.sha256.0[0];
        let there = app.deployments.iter().filter(|(_, it)| !it.replicas().is_empty());
        there.map(|(name, it)| (name.as_str(), it.replicas().iter().map(content).collect())).collect()
    }

    /// Looks until nothing changes; every state that was passed through.
    fn history(&mut self) -> Vec<Vec<(String, Vec<u8>)>> {
        let mut seen = Vec::new();
        for _ in 0..40 {
            self.step();
            let parts: Vec<_> = self.parts().into_iter().map(|(name, it)| (name.to_owned(), it)).collect();
            if seen.last() != Some(&parts) {
                seen.push(parts);
            }
        }
        seen
    }
}

#[test]
fn what_is_asked_comes_before_who_asks_it_and_goes_after_it() {
    let mut rig = Rig::new();
    rig.deploy(vec![composed(1, &["words"])]);
    let first = rig.history();
    assert!(first[0].iter().all(|(name, _)| name == "words"), "{first:?}");
    assert_eq!(rig.parts(), [("gateway", vec![1]), ("words", vec![1])]);

    // An update: no new gateway before all that it may ask is new.
    rig.deploy(vec![composed(2, &["words"])]);
    for parts in rig.history() {
        let of = |name: &str| parts.iter().find(|(it, _)| it == name).map(|(_, it)| it.clone()).unwrap();
        assert!(!of("gateway").contains(&2) || of("words").contains(&2), "{parts:?}");
    }
    assert_eq!(rig.parts(), [("gateway", vec![2]), ("words", vec![2])]);

    // What is not listed any more stays until the gateway does without it.
    rig.deploy(vec![composed(3, &["phrases"])]);
    for parts in rig.history() {
        let has = |name: &str, content| parts.iter().any(|(it, all)| it == name && all.contains(&content));
        assert!(has("words", 2) || !has("gateway", 2), "{parts:?}");
        assert!(has("phrases", 3) || !has("gateway", 3), "{parts:?}");
    }
    assert_eq!(rig.parts(), [("gateway", vec![3]), ("phrases", vec![3])]);

    // At the end who asks goes first, and what it has under way may still ask.
    let gateway = rig.state.apps()["a"].deployments["gateway"].replicas()[0].number;
    rig.busy.insert(gateway, 1);
    rig.state.delete_all();
    rig.steps(10);
    let phrases = &rig.state.apps()["a"].deployments["phrases"];
    assert_eq!(phrases.replicas()[0].stage, Stage::Running);
    rig.busy.clear();
    rig.steps(10);
    assert_eq!(rig.parts(), []);
    assert!(rig.state.apps().is_empty());
}

#[test]
fn http_goes_to_the_old_ingress_until_another_one_serves() {
    let mut rig = Rig::new();
    rig.deploy(vec![composed(1, &[])]);
    rig.steps(6);
    let mut other = composed(1, &[]);
    other.deployments[0].name = "portal".to_owned();
    rig.deploy(vec![other]);
    let ingress = |rig: &Rig| {
        let table = rig.state.table();
        let mut open = table.apps[0].actors.iter().filter(|it| it.ingress);
        let it = open.next().unwrap();
        assert!(open.next().is_none() && it.replicas.iter().any(|replica| !replica.draining), "{it:?}");
        it.name.clone()
    };
    assert_eq!(ingress(&rig), "gateway");
    for _ in 0..10 {
        rig.step();
        ingress(&rig);
    }
    assert_eq!((ingress(&rig), rig.parts()), ("portal".to_owned(), vec![("portal", vec![1])]));
}

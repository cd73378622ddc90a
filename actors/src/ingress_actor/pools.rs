//! What the ingress serves: a pool for each model of each deployment, with the ranks of all its replicas.
//!
//! A pool is one [`Ingress`]: its router sees all ranks of all replicas, so a request goes to the best of them, and one
//! whose replica ends goes on at another. Deployments of users' actors have an [`ActorPool`] each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use heliostat_engine::config::{GenerationDefaults, ModelConfig};
use heliostat_runtime::group::{GroupView, Member, MemberState};
use heliostat_runtime::handle::Handle;
use heliostat_runtime::system::System;

use crate::deployment::Duty;
use crate::ingress::Ingress;
use crate::ingress::apps::{AppRoute, Apps, ModelRoute};
use crate::ingress::dispatch::DispatchConfig;
use crate::ingress::engine::{Admission, EngineLink, Ranks, Stage};
use crate::ingress::forward::ActorPool;
use crate::ingress::metrics::Metrics;
use crate::ingress::model::ServedModel;
use crate::ingress::text::TextModel;
use crate::rank::Rank;
use crate::serve::messages::{
    Table, TableActors, TableApp, TableDeployment, TableModel, TableReplica, TableReport,
};

/// The ready DP ranks of all replicas, by their numbers here.
pub(super) type Handles = Arc<Mutex<HashMap<u32, Handle<Rank>>>>;

pub(super) fn lock(handles: &Handles) -> MutexGuard<'_, HashMap<u32, Handle<Rank>>> {
    handles.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which pool: application, deployment and model. Where prefill and decode are separated, the deployment is that of prefill.
type Key = (String, String, TableModel);

/// All pools.
pub(super) struct Pools {
    apps: Apps,
    table: Table,
    pools: Vec<(Key, Pool)>,
    /// Deployments of users' actors, by application and name.
    actors: BTreeMap<(String, String), ActorPool>,
    system: System,
    /// Why a model is not served.
    problems: Vec<(Key, String)>,
    /// The newest view of each group.
    views: BTreeMap<String, GroupView>,
}

struct Pool {
    route: ModelRoute,
    ingress: Ingress,
    ranks: Ranks,
}

/// A rank that is ready and that this ingress did not know in this incarnation.
pub(super) struct NewRank<'a> {
    pub(super) number: u32,
    pub(super) member: &'a Member,
}

impl Pools {
    pub(super) fn new(apps: Apps, system: System) -> Self {
        Self {
            apps,
            table: Table::default(),
            pools: Vec::new(),
            actors: BTreeMap::new(),
            system,
            problems: Vec::new(),
            views: BTreeMap::new(),
        }
    }

    /// Whether this is what it serves already.
    pub(super) fn serves(&self, table: &Table) -> bool {
        self.table == *table
    }

    /// Takes what is served. Returns the models that must be loaded for it.
    pub(super) fn set_table(&mut self, table: Table) -> Vec<(String, String, TableModel)> {
        self.table = table;
        self.set_actors();
        let mut wanted: Vec<Key> = Vec::new();
        for key in each(&self.table).map(|(app, deployment)| key(app, deployment)) {
            if !wanted.contains(&key) {
                wanted.push(key);
            }
        }
        self.pools.retain(|(key, pool)| {
            let stays = wanted.contains(key);
            if !stays {
                pool.ingress.close();
            }
            stays
        });
        self.problems.retain(|(key, _)| wanted.contains(key));
        let known = |key: &Key| {
            self.pools.iter().any(|(known, _)| known == key)
                || self.problems.iter().any(|(known, _)| known == key)
        };
        wanted.into_iter().filter(|key| !known(key)).collect()
    }

    fn set_actors(&mut self) {
        let mut before = std::mem::take(&mut self.actors);
        for (app, deployment) in actors(&self.table) {
            let key = (app.clone(), deployment.name.clone());
            let pool = before.remove(&key).unwrap_or_else(|| ActorPool::new(self.system.clone()));
            pool.set(deployment);
            self.actors.insert(key, pool);
        }
        before.values().for_each(ActorPool::close);
    }

    /// A model was loaded, or cannot be.
    pub(super) fn loaded(&mut self, key: Key, model: Result<ServedModel, String>, link: impl EngineLink) {
        if !each(&self.table).any(|(app, deployment)| self::key(app, deployment) == key)
            || self.pools.iter().any(|(known, _)| *known == key)
        {
            return;
        }
        let model = match model {
            Ok(model) => model,
            Err(why) => return self.problems.push((key, why)),
        };
        let dispatch = DispatchConfig {
            block_size: key.2.block_size as usize,
            queue_max: key.2.max_waiting as usize,
            ..DispatchConfig::default()
        };
        let metrics = Metrics::labelled(&[("application", &key.0), ("model_name", model.name())]);
        let ingress = Ingress::with_metrics(metrics, dispatch, link);
        let route = ModelRoute::new(ingress.clone(), Arc::new(model));
        self.pools.push((key, Pool { route, ingress, ranks: Ranks::default() }));
    }

    /// Takes a group's view.
    pub(super) fn set_view(&mut self, view: GroupView) {
        self.views.insert(view.group.clone(), view);
    }

    /// Works out anew which rank serves in which pool, and which application answers where. Calls `meet` with every
    /// ready rank.
    pub(super) fn refresh(&mut self, mut meet: impl FnMut(NewRank<'_>)) {
        for (key, pool) in &mut self.pools {
            let of = each(&self.table).filter(|(app, it)| self::key(app, it) == *key);
            let of: Vec<&TableDeployment> = of.map(|(_, deployment)| deployment).collect();
            let Some(first) = of.first() else { continue };
            let mut all = Ranks::default();
            for deployment in &of {
                let (ranks, ready) = ranks(deployment, &self.views);
                ready.into_iter().for_each(&mut meet);
                all.join(ranks);
            }
            let bounds: Option<Vec<u64>> = of.iter().map(|it| it.in_flight_max).collect();
            pool.ingress.set_admission(Admission {
                in_flight_max: bounds.map(|bounds| bounds.iter().sum::<u64>() as usize),
                may_wait: of.iter().any(|it| it.may_wait),
                backpressure: first.backpressure,
            });
            pool.ranks = all;
            pool.ingress.on_ranks(pool.ranks.clone());
        }
        let routes = self.table.apps.iter().filter_map(|app| {
            let prefix = app.route_prefix.as_deref()?;
            let of_actors = |it: &TableActors| self.actors.get(&(app.name.clone(), it.name.clone()));
            if let Some(ingress) = app.actors.iter().filter(|it| it.ingress).find_map(of_actors) {
                let behind = app.actors.iter().filter(|it| !it.ingress).filter_map(of_actors).cloned();
                return Some(AppRoute::of_actors(&app.name, prefix, ingress.clone(), behind.collect()));
            }
            let pool = |it: &TableDeployment| self.pool(&key(app, it)).map(|pool| pool.route.clone());
            let whole = app.deployments.iter().filter(|it| it.duty != Duty::Decode);
            Some(AppRoute::new(&app.name, prefix, whole.filter_map(pool).collect()))
        });
        self.apps.set(routes.collect());
    }

    fn pool(&self, key: &Key) -> Option<&Pool> {
        self.pools.iter().find(|(known, _)| known == key).map(|(_, pool)| pool)
    }

    /// The pools' lines to their ranks.
    pub(super) fn all(&self) -> impl Iterator<Item = &Ingress> {
        self.pools.iter().map(|(_, pool)| &pool.ingress)
    }

    /// The pool of a rank.
    pub(super) fn of_rank(&self, rank: u32) -> Option<&Ingress> {
        let (_, pool) = self.pools.iter().find(|(_, pool)| pool.ranks.local.contains_key(&rank))?;
        Some(&pool.ingress)
    }

    /// Every pool hears again which ranks it has.
    pub(super) fn repeat(&self) {
        self.pools.iter().for_each(|(_, pool)| pool.ingress.on_ranks(pool.ranks.clone()));
    }

    /// Whether every application takes requests, and there is one.
    pub(super) fn all_serve(&self) -> bool {
        self.apps.ready().is_ok()
    }

    /// From now on new requests are refused.
    pub(super) fn stop_taking_requests(&self) {
        self.pools.iter().for_each(|(_, pool)| pool.ingress.stop_taking_requests());
        self.actors.values().for_each(ActorPool::close);
    }

    /// The order of sequences is that far at other ingresses.
    pub(super) fn advance(&self, turns: &[(String, String, u64)]) {
        for (app, deployment, turn) in turns {
            let of = |(it, _): &&(Key, Pool)| it.0 == *app && it.1 == *deployment;
            self.pools.iter().filter(of).for_each(|(_, pool)| pool.ingress.advance_turn(*turn));
        }
    }

    /// What is in flight.
    pub(super) fn report(&self) -> TableReport {
        let mut loads: BTreeMap<(String, String), u64> = BTreeMap::new();
        let mut draining = Vec::new();
        for (app, deployment) in each(&self.table) {
            let pool = self.pool(&key(app, deployment));
            let load = pool.map_or(0, |pool| match deployment.duty {
                Duty::Whole => pool.ingress.in_flight(),
                Duty::Prefill => pool.ingress.in_flight_at_stage(Stage::Prompt),
                Duty::Decode => pool.ingress.in_flight_at_stage(Stage::Output),
            });
            *loads.entry((app.name.clone(), deployment.name.clone())).or_default() += load as u64;
            for replica in deployment.replicas.iter().filter(|replica| replica.draining) {
                let there = pool.map_or(0, |pool| pool.ingress.in_flight_at(numbers(replica)));
                draining.push((replica.number, there as u64));
            }
        }
        for (app, deployment) in actors(&self.table) {
            let Some(pool) = self.actors.get(&(app.clone(), deployment.name.clone())) else { continue };
            loads.insert((app.clone(), deployment.name.clone()), pool.load());
            let leaving = deployment.replicas.iter().filter(|replica| replica.draining);
            draining.extend(leaving.map(|replica| (replica.number, pool.load_at(replica.number))));
        }
        let problem =
            |((app, deployment, _), why): &(Key, String)| (app.clone(), deployment.clone(), why.clone());
        let turn = |((app, deployment, _), pool): &(Key, Pool)| {
            (app.clone(), deployment.clone(), pool.ingress.turn())
        };
        TableReport {
            loads: loads.into_iter().map(|((app, deployment), load)| (app, deployment, load)).collect(),
            draining,
            problems: self.problems.iter().map(problem).collect(),
            turns: self.pools.iter().map(turn).collect(),
            ..TableReport::default()
        }
    }
}

fn actors(table: &Table) -> impl Iterator<Item = (&String, &TableActors)> {
    table.apps.iter().flat_map(|app| app.actors.iter().map(|deployment| (&app.name, deployment)))
}

fn each(table: &Table) -> impl Iterator<Item = (&TableApp, &TableDeployment)> {
    table.apps.iter().flat_map(|app| app.deployments.iter().map(move |deployment| (app, deployment)))
}

fn key(app: &TableApp, deployment: &TableDeployment) -> Key {
    let prefill = |it: &TableDeployment| it.duty == Duty::Prefill;
    let same = app.deployments.iter().find(|it| prefill(it) && it.model == deployment.model);
    // While an update is under way on one side only.
    let alike = || app.deployments.iter().find(|it| prefill(it) && it.model.names == deployment.model.names);
    let first = match deployment.duty {
        Duty::Whole | Duty::Prefill => deployment,
        Duty::Decode => same.or_else(alike).unwrap_or(deployment),
    };
    (app.name.clone(), first.name.clone(), first.model.clone())
}

fn numbers(replica: &TableReplica) -> std::ops::Range<u32> {
    replica.first_rank..replica.first_rank + replica.dp
}

/// The ranks of all replicas of a deployment, and those of them that are ready.
fn ranks<'a>(
    deployment: &TableDeployment,
    views: &'a BTreeMap<String, GroupView>,
) -> (Ranks, Vec<NewRank<'a>>) {
    let mut ranks = Ranks { size: deployment.replicas.first().map_or(0, |it| it.dp), ..Ranks::default() };
    let (mut ready, mut missing, mut incomplete, mut whole) =
        (Vec::new(), Vec::new(), BTreeSet::new(), false);
    for replica in &deployment.replicas {
        ranks.local.extend(numbers(replica).zip(0..));
        if deployment.duty != Duty::Whole {
            ranks.duties.extend(numbers(replica).map(|rank| (rank, deployment.duty)));
        }
        let Some(view) = views.get(&replica.group) else {
            missing.push(format!("group {} has no rank yet", replica.group));
            continue;
        };
        for member in view.members.iter().filter(|member| member.rank < replica.dp) {
            let Some(addr) = &member.addr else { continue };
            let number = replica.first_rank + member.rank;
            ranks.ready.insert(number, addr.incarnation.0);
            if replica.draining {
                ranks.closed.insert(number);
            } else if !view.is_complete() {
                incomplete.insert(number);
            }
            ready.push(NewRank { number, member });
        }
        whole |= view.is_complete() && !replica.draining;
        missing.extend(view.members.iter().filter_map(self::missing));
    }
    // A group that lacks a rank waits for it; new requests need not, where another one is whole.
    if whole {
        ranks.closed.extend(incomplete);
    } else {
        ranks.missing = missing;
        if deployment.replicas.is_empty() && !deployment.may_wait {
            ranks.missing.push(format!("deployment {} has no replica yet", deployment.name));
        }
    }
    (ranks, ready)
}

/// What a rank that is not ready lacks, in words.
fn missing(member: &Member) -> Option<String> {
    match member.state {
        MemberState::Ready => None,
        MemberState::Starting => Some(format!("rank {} is starting", member.rank)),
        MemberState::Absent => Some(format!("rank {} has no process", member.rank)),
    }
}

/// Reads what HTTP needs of a model.
pub(super) fn load(model: &TableModel) -> Result<ServedModel, String> {
    let failed = |why: &dyn std::fmt::Display| format!("{}: {why}", model.path.display());
    let config = ModelConfig::from_dir(&model.path).map_err(|why| failed(&why))?;
    Ok(ServedModel {
        names: model.names.clone(),
        context_length: model.max_model_len as usize,
        vocab_size: config.vocab_size,
        text: TextModel::load(&model.path).map_err(|why| failed(&why))?,
        defaults: GenerationDefaults::from_dir(&model.path).map_err(|why| failed(&why))?,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    })
}

//! Tests of the supervision tree and of ownership at the door of the core: events in, commands out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Command, Event, HeadState, Manner, Patience, Record, Write};
use crate::cluster::status::ActorState;
use crate::handle::{ActorAddr, ActorId, Incarnation, ProcessId};
use crate::head::messages::{
    Apply, ApplyMode, NodeReport, NodeStage, ProcessStatus, WorkerPhase, WorkerProcess, WorkerReport,
};
use crate::spec::{
    ActorSpec, DeathCause, DriverId, Lifetime, Owner, RestartPolicy, Seat, SupervisorSpec,
    SupervisorStrategy, Verdict,
};

/// A head with one node that does what it is told at once, except that processes end when the test says so.
struct Rig {
    head: HeadState,
    now: Duration,
    seq: u64,
    running: BTreeMap<Incarnation, String>,
    /// Told to end.
    ending: BTreeSet<Incarnation>,
    asked: Vec<crate::supervisor::ChildDied>,
    /// What the head keeps, by key.
    kept: BTreeMap<String, Record>,
}

const KILLED: DeathCause = DeathCause::Killed { signal: 9 };

fn addr(actor: ActorId, incarnation: Incarnation) -> ActorAddr {
    ActorAddr { actor, incarnation, process: ProcessId(incarnation.0), endpoint: String::new() }
}

impl Rig {
    fn new(specs: Vec<ActorSpec>, supervisors: Vec<SupervisorSpec>) -> Self {
        let mut rig = Self {
            head: HeadState::new(Patience::default()),
            now: Duration::from_secs(1),
            seq: 0,
            running: BTreeMap::new(),
            ending: BTreeSet::new(),
            asked: Vec::new(),
            kept: BTreeMap::new(),
        };
        rig.report(Vec::new());
        rig.apply(Apply { supervisors, ..Apply::merge(specs) });
        rig
    }

    fn apply(&mut self, apply: Apply) {
        let (_, commands) = self.head.apply(self.now, apply).unwrap();
        self.obey(commands);
    }

    fn feed(&mut self, event: Event) {
        let commands = self.head.handle(self.now, event);
        self.obey(commands);
    }

    fn obey(&mut self, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::StartWorker { order, .. } => {
                    self.running.insert(order.incarnation, order.actor.clone());
                    self.report(Vec::new());
                    self.ready(&order.actor, order.incarnation);
                }
                Command::StopWorker { incarnation, .. } if self.running.contains_key(&incarnation) => {
                    self.ending.insert(incarnation);
                }
                Command::AskJudge { question, .. } => self.asked.push(question),
                Command::Persist(Write::Put(record)) => drop(self.kept.insert(record.key().path(), *record)),
                Command::Persist(Write::Delete(key)) => drop(self.kept.remove(&key.path())),
                _ => {}
            }
        }
    }

    fn report(&mut self, ends: Vec<(Incarnation, String, DeathCause)>) {
        self.seq += 1;
        let process = |incarnation, actor: &String, status| WorkerProcess {
            actor: actor.clone(),
            incarnation,
            device: None,
            pid: 1,
            status,
        };
        let running = self.running.iter().map(|(i, actor)| process(*i, actor, ProcessStatus::Running));
        let ended = ends.iter().map(|(i, a, cause)| process(*i, a, ProcessStatus::exited(cause.clone())));
        let report = NodeReport {
            name: "n".into(),
            boot: 1,
            seq: self.seq,
            registering: self.seq == 1,
            addr: addr(ActorId::NODE, Incarnation(0)),
            pid: 1,
            devices: Vec::new(),
            capacity: crate::spec::Capacity::default(),
            labels: Default::default(),
            packages: Vec::new(),
            stage: NodeStage::Serving,
            workers: running.chain(ended).collect(),
            term: 0,
        };
        self.feed(Event::NodeReport(report));
    }

    fn ready(&mut self, actor: &str, incarnation: Incarnation) {
        let report = WorkerReport {
            actor: actor.to_owned(),
            incarnation,
            seq: 1,
            registering: true,
            addr: addr(ActorId::WORKER, incarnation),
            pid: 1,
            node: "n".into(),
            device: None,
            phase: WorkerPhase::Ready(addr(ActorId::named(actor), incarnation)),
            announced: None,
            views: Vec::new(),
            held: Vec::new(),
            term: 0,
        };
        self.feed(Event::WorkerReport(report));
    }

    /// Another head takes over with what this one has kept.
    fn replace_head(&mut self) {
        let kept = self.kept.values().cloned().collect();
        let (head, commands) = HeadState::recover(Patience::default(), self.now, kept);
        self.head = head;
        self.obey(commands);
        self.seq = 0;
        self.report(Vec::new());
    }

    /// The process of the actor ends.
    fn die(&mut self, actor: &str) {
        self.end(&[actor], &KILLED);
    }

    fn end(&mut self, actors: &[&str], cause: &DeathCause) {
        let gone: Vec<_> =
            self.running.iter().filter(|(_, of)| actors.contains(&of.as_str())).map(|(i, _)| *i).collect();
        let mut ends = Vec::new();
        for incarnation in gone {
            ends.push((incarnation, self.running.remove(&incarnation).unwrap(), cause.clone()));
            self.ending.remove(&incarnation);
        }
        self.report(ends);
    }

    /// Actors that were told to end, sorted.
    fn ending(&self) -> Vec<&str> {
        let mut names: Vec<_> =
            self.ending.iter().map(|incarnation| self.running[incarnation].as_str()).collect();
        names.sort_unstable();
        names
    }

    /// What was told to end does so.
    fn let_end(&mut self) {
        let names: Vec<String> = self.ending().into_iter().map(str::to_owned).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.end(&names, &DeathCause::Exited { code: 0 });
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.report(Vec::new());
        self.feed(Event::Tick);
    }

    fn incarnation(&self, actor: &str) -> u64 {
        let status = self.head.actor_status();
        status.iter().find(|status| status.name == actor).map_or(0, |status| status.incarnation.0)
    }

    fn cause(&self, actor: &str) -> Option<DeathCause> {
        match self.head.find(actor)?.state {
            ActorState::Dead { cause } => Some(cause),
            _ => None,
        }
    }

    fn last_death(&self, actor: &str) -> DeathCause {
        let status = self.head.actor_status();
        status.iter().find(|status| status.name == actor).unwrap().last_death.clone().unwrap()
    }
}

fn actor(name: &str) -> ActorSpec {
    ActorSpec::new(name, "t", vec![])
}

fn child(name: &str, supervisor: &str, order: u32) -> ActorSpec {
    ActorSpec { seat: Some(Seat::new(supervisor, order)), ..actor(name) }
}

fn three(strategy: SupervisorStrategy) -> Rig {
    let specs = (0..3).map(|n| child(&format!("c{n}"), "s", n)).collect();
    Rig::new(specs, vec![SupervisorSpec::new("s", strategy)])
}

#[test]
fn one_for_one_restarts_only_the_child_that_died() {
    let mut rig = three(SupervisorStrategy::OneForOne);
    rig.die("c1");
    assert_eq!(rig.ending(), Vec::<&str>::new());
    assert_eq!([rig.incarnation("c0"), rig.incarnation("c1"), rig.incarnation("c2")], [1, 4, 3]);
}

/// SV-4: the new ones start when the last of the old ones is gone, and not before.
#[test]
fn one_for_all_restarts_all_when_the_last_has_ended() {
    let mut rig = three(SupervisorStrategy::OneForAll);
    rig.die("c1");
    assert_eq!(rig.ending(), ["c0", "c2"]);
    rig.end(&["c0"], &KILLED);
    assert_eq!([rig.incarnation("c0"), rig.incarnation("c1"), rig.incarnation("c2")], [1, 2, 3]);
    rig.end(&["c2"], &KILLED);
    let now = [rig.incarnation("c0"), rig.incarnation("c1"), rig.incarnation("c2")];
    assert_eq!(now, [4, 5, 6]);
    assert_eq!(rig.last_death("c1"), KILLED);
    assert!(matches!(rig.last_death("c0"), DeathCause::SiblingDied { child, .. } if child == "c1"));
}

#[test]
fn rest_for_one_restarts_those_after_it() {
    let mut rig = three(SupervisorStrategy::RestForOne);
    rig.die("c1");
    assert_eq!(rig.ending(), ["c2"]);
    rig.let_end();
    assert_eq!([rig.incarnation("c0"), rig.incarnation("c1"), rig.incarnation("c2")], [1, 4, 5]);
}

/// Several that die of one thing are one failure, and count once.
#[test]
fn deaths_of_one_round_count_once() {
    let mut rig = three(SupervisorStrategy::OneForAll);
    let restart = RestartPolicy { max_restarts: 1, ..RestartPolicy::default() };
    rig.apply(Apply {
        supervisors: vec![SupervisorSpec {
            restart,
            ..SupervisorSpec::new("s", SupervisorStrategy::OneForAll)
        }],
        ..Apply::merge(vec![])
    });
    rig.end(&["c0", "c1", "c2"], &KILLED);
    assert_eq!([rig.incarnation("c0"), rig.incarnation("c1"), rig.incarnation("c2")], [4, 5, 6]);
    rig.die("c0");
    rig.let_end();
    let cause = rig.cause("c2").unwrap();
    assert!(matches!(&cause, DeathCause::Escalated { supervisor, .. } if supervisor == "s"), "{cause}");
    assert_eq!(*cause.root(), KILLED);
}

/// A failed subtree is restarted as a whole by the supervisor above it.
#[test]
fn escalation_restarts_the_subtree_from_above() {
    let top = SupervisorSpec::new("top", SupervisorStrategy::RestForOne);
    let low = SupervisorSpec {
        seat: Some(Seat::new("top", 1)),
        ..SupervisorSpec::new("low", SupervisorStrategy::Escalate)
    };
    let specs = vec![child("a", "top", 0), child("b", "low", 0), child("c", "low", 1), child("d", "top", 2)];
    let mut rig = Rig::new(specs, vec![top, low]);
    rig.die("c");
    assert_eq!(rig.ending(), ["b", "d"]);
    rig.end(&["d"], &KILLED);
    assert_eq!(rig.incarnation("d"), 4, "b has not ended yet");
    rig.end(&["b"], &KILLED);
    let now = ["a", "b", "c", "d"].map(|name| rig.incarnation(name));
    assert_eq!(now, [1, 5, 6, 7]);
    let DeathCause::SiblingDied { child, death, .. } = rig.last_death("d") else { panic!() };
    assert_eq!((child.as_str(), death.root()), ("low", &KILLED));
}

/// At the top: the actor that owns the supervisor fails by it, and its next life starts the subtree again.
#[test]
fn escalation_ends_the_owner() {
    let lifetime = Lifetime::Owned(Owner::Actor { name: "boss".into(), incarnation: None });
    let s = SupervisorSpec {
        lifetime: lifetime.clone(),
        ..SupervisorSpec::new("s", SupervisorStrategy::Escalate)
    };
    let child = |name| ActorSpec { lifetime: lifetime.clone(), ..child(name, "s", 0) };
    let mut rig = Rig::new(vec![actor("boss"), child("a"), child("b")], vec![s]);
    rig.die("a");
    assert_eq!(rig.ending(), ["b", "boss"]);
    rig.end(&["b"], &KILLED);
    assert_eq!((rig.incarnation("a"), rig.incarnation("b")), (1, 2));
    rig.end(&["boss"], &KILLED);
    assert!(matches!(rig.last_death("boss"), DeathCause::Escalated { child, .. } if child == "a"));
    assert_eq!([rig.incarnation("boss"), rig.incarnation("a"), rig.incarnation("b")], [4, 5, 6]);
}

#[test]
fn what_ended_on_purpose_disturbs_nobody() {
    let mut rig = three(SupervisorStrategy::OneForAll);
    rig.end(&["c1"], &DeathCause::Finished);
    let commands = rig.head.stop_actor(rig.now, "c2", "me", Manner::Graceful).unwrap();
    rig.obey(commands);
    rig.let_end();
    rig.die("c0");
    assert_eq!([rig.incarnation("c0"), rig.incarnation("c1"), rig.incarnation("c2")], [4, 2, 3]);
    let by = rig.cause("c2").unwrap().to_string();
    assert_eq!(by, "stopped: by request, asked for by me");
}

#[test]
fn a_judge_is_asked_and_obeyed_and_its_silence_has_an_end() {
    let ask = SupervisorStrategy::Ask { actor: "judge".into(), otherwise: Verdict::Stop };
    let mut rig = Rig::new(
        vec![actor("judge"), child("a", "s", 0), child("b", "s", 1)],
        vec![SupervisorSpec::new("s", ask)],
    );
    rig.die("a");
    let question = rig.asked.pop().unwrap();
    assert_eq!((question.child.as_str(), &question.cause), ("a", &KILLED));
    assert_eq!(rig.incarnation("a"), 1, "nothing happens before it answers");
    let judged = |verdict| Event::Judged { child: "a".into(), incarnation: question.incarnation, verdict };
    rig.feed(judged(None));
    assert_eq!(rig.asked.len(), 1, "asked again");
    rig.feed(judged(Some(Verdict::RestartAll)));
    rig.let_end();
    assert_eq!((rig.incarnation("a"), rig.incarnation("b")), (4, 5));
    rig.feed(judged(Some(Verdict::Stop)));
    assert_eq!(rig.cause("a"), None, "an answer about an earlier life is none");
    rig.die("b");
    for _ in 0..10 {
        assert_eq!(rig.cause("b"), None);
        rig.wait(Duration::from_secs(1));
    }
    assert_eq!(rig.cause("b"), Some(KILLED));
}

/// SV-5: a head that takes over counts on, for all strategies and at every level.
#[test]
fn restarts_count_on_after_a_change_of_heads() {
    for strategy in [SupervisorStrategy::OneForOne, SupervisorStrategy::OneForAll] {
        let restart = RestartPolicy { max_restarts: 2, ..RestartPolicy::default() };
        let mut rig = Rig::new(
            vec![child("a", "s", 0), ActorSpec { restart, ..actor("alone") }],
            vec![SupervisorSpec { restart, ..SupervisorSpec::new("s", strategy.clone()) }],
        );
        for _ in 0..2 {
            rig.die("a");
            rig.die("alone");
            rig.wait(Duration::from_millis(200));
            rig.replace_head();
            assert_eq!((rig.cause("a"), rig.cause("alone")), (None, None), "{strategy:?}");
        }
        rig.die("a");
        rig.die("alone");
        assert!(matches!(rig.cause("a"), Some(DeathCause::Escalated { .. })), "{strategy:?}");
        assert_eq!(rig.cause("alone"), Some(KILLED));
    }
}

// Owners ------------------------------------------------------------------------------------------------------

/// LT-2.
#[test]
fn what_an_incarnation_owns_ends_with_it_and_is_forgotten() {
    let mut rig = Rig::new(vec![actor("boss")], vec![]);
    let owned = |incarnation| Lifetime::Owned(Owner::Actor { name: "boss".into(), incarnation });
    let life = ActorSpec { lifetime: owned(Some(Incarnation(1))), ..actor("of-the-life") };
    let actor_ = ActorSpec { lifetime: owned(None), ..actor("of-the-actor") };
    let grandchild =
        Lifetime::Owned(Owner::Actor { name: "of-the-life".into(), incarnation: Some(Incarnation(3)) });
    rig.apply(Apply::merge(vec![life.clone(), actor_]));
    rig.apply(Apply::merge(vec![ActorSpec { lifetime: grandchild, ..actor("grandchild") }]));
    rig.die("boss");
    assert_eq!(rig.ending(), ["grandchild", "of-the-life"]);
    rig.let_end();
    assert!(rig.head.find("of-the-life").is_none() && rig.head.find("grandchild").is_none());
    let error = rig.head.apply(rig.now, Apply::merge(vec![life])).unwrap_err();
    assert!(error.to_string().contains("is gone"), "{error}");
    let commands = rig.head.stop_actor(rig.now, "boss", "", Manner::Graceful).unwrap();
    rig.obey(commands);
    assert_eq!(rig.ending(), ["boss", "of-the-actor"]);
}

/// LT-1.
#[test]
fn a_driver_that_does_not_come_back_is_gone_with_what_it_owns() {
    let mut rig = Rig::new(vec![], vec![]);
    let id = DriverId(7);
    let hello = |first| Event::DriverHello { id, name: "d".into(), process: ProcessId(9), first };
    let lifetime = Lifetime::Owned(Owner::Driver(id));
    let owned = ActorSpec { lifetime: lifetime.clone(), ..child("a", "s", 0) };
    let supervisors =
        vec![SupervisorSpec { lifetime, ..SupervisorSpec::new("s", SupervisorStrategy::OneForAll) }];
    let apply = Apply { supervisors, ..Apply::merge(vec![owned, actor("detached")]) };
    let error = rig.head.apply(rig.now, apply.clone()).unwrap_err();
    assert!(error.to_string().contains("not registered"), "{error}");
    rig.feed(hello(true));
    rig.apply(apply);
    rig.feed(Event::ProcessLost(ProcessId(9)));
    rig.wait(Duration::from_secs(2));
    rig.feed(hello(false));
    rig.wait(Duration::from_secs(2));
    assert_eq!(rig.ending(), Vec::<&str>::new(), "it came back in time");
    rig.feed(Event::ProcessLost(ProcessId(9)));
    for _ in 0..3 {
        rig.wait(Duration::from_secs(1));
    }
    assert_eq!(rig.ending(), ["a"]);
    rig.let_end();
    assert!(rig.head.find("a").is_none() && rig.head.supervisor_status().is_empty());
    assert!(rig.head.admits_driver(id, false).unwrap_err().contains("taken for gone"));
    assert!(rig.head.find("detached").is_some());
}

#[test]
fn names_that_are_taken() {
    let mut rig = Rig::new(vec![actor("a")], vec![]);
    let apply = |mode| Apply { mode, ..Apply::merge(vec![ActorSpec { args: vec![1], ..actor("a") }]) };
    let error = rig.head.apply(rig.now, apply(ApplyMode::New)).unwrap_err();
    assert!(error.to_string().contains("get_or_spawn"), "{error}");
    rig.apply(apply(ApplyMode::KeepPresent));
    assert_eq!(rig.ending(), Vec::<&str>::new());
    let commands = rig.head.stop_actor(rig.now, "a", "", Manner::Graceful).unwrap();
    rig.obey(commands);
    rig.let_end();
    rig.apply(apply(ApplyMode::New));
    assert_eq!(rig.incarnation("a"), 2, "the name of a dead actor is free");
}

/// An exact set speaks for what earlier sets of its namespace listed, and for nothing else.
#[test]
fn an_exact_set_leaves_other_namespaces_and_what_was_never_in_a_set() {
    let listed = |name| ActorSpec { in_set: true, ..actor(name) };
    let mut rig = Rig::new(vec![listed("a"), listed("b"), listed("other/c"), actor("d")], vec![]);
    let mode = ApplyMode::Exactly { namespace: "default".into() };
    rig.apply(Apply { mode, ..Apply::merge(vec![listed("a")]) });
    assert_eq!(rig.ending(), ["b"]);
}

#[test]
fn a_tree_that_is_none_is_refused() {
    let mut rig = Rig::new(vec![], vec![]);
    let mut why = |supervisors, specs| {
        let error = rig.head.apply(rig.now, Apply { supervisors, ..Apply::merge(specs) }).unwrap_err();
        error.to_string()
    };
    assert!(why(vec![], vec![child("a", "s", 0)]).contains("no supervisor \"s\""));
    let below = |name: &str, above: &str| SupervisorSpec {
        seat: Some(Seat::new(above, 0)),
        ..SupervisorSpec::new(name, SupervisorStrategy::OneForOne)
    };
    assert!(why(vec![below("s", "t"), below("t", "s")], vec![]).contains("circle"));
    let ask = SupervisorStrategy::Ask { actor: "a".into(), otherwise: Verdict::Stop };
    assert!(why(vec![SupervisorSpec::new("s", ask)], vec![child("a", "s", 0)]).contains("asks it"));
    let itself = Lifetime::Owned(Owner::Actor { name: "a".into(), incarnation: None });
    assert!(why(vec![], vec![ActorSpec { lifetime: itself, ..actor("a") }]).contains("owns itself"));
}

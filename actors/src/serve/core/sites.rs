//! Where HTTP is served: the ingresses, each on a node of its own, from the first start to the last stream.
//!
//! SD-4: an ingress that is to go takes no connection any more, and ends when nothing is open there, or its node is gone.
//! SD-5: of the ingresses of a machine that take connections one at most has the configured port; the others have ports of
//! their own, which they keep when they start again.

use std::collections::BTreeMap;
use std::time::Duration;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::Command;
use crate::deployment::INGRESS;

/// An order that has no effect is given again after this long.
const ORDER_AGAIN: Duration = Duration::from_secs(3);
/// A node must be lost for so long before its ingress is given up: a head that was frozen, and leads no more, tells once
/// of nodes that it has not heard meanwhile.
const LOST_FOR: Duration = Duration::from_secs(1);
/// Letters of a node's name in that of its ingress.
const NODE_LETTERS: usize = 100;

/// Where ingresses are, in Ray's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub enum ProxyLocation {
    /// Nowhere: nothing is answered over HTTP.
    Disabled,
    /// One for the cluster.
    #[default]
    HeadOnly,
    /// One on each node.
    EveryNode,
}

/// What cluster.toml says of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct SiteArgs {
    /// Where they are unless a document says otherwise.
    pub location: ProxyLocation,
    /// The node of the one ingress of `HeadOnly`.
    pub node: Option<String>,
}

/// Whether a node has an ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It may.
    Open,
    /// It keeps what it has: it is silent for now.
    Kept,
    /// It is emptied.
    Leaving,
}

/// A node that is not lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenNode {
    /// Its name.
    pub name: String,
    /// Nodes of one machine have the same: they share its ports.
    pub machine: String,
    /// Whether it has an ingress.
    pub room: Room,
}

/// The actor of an ingress, as the head says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenSite {
    /// The actor is known.
    pub there: bool,
    /// It has a process.
    pub runs: bool,
    /// What is open there, as it said last.
    pub open: Option<u64>,
    /// The port it listens on.
    pub port: Option<u16>,
}

/// What was seen of nodes and ingresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenSites {
    /// Nodes that are not lost, by name.
    pub nodes: Vec<SeenNode>,
    /// The node of the controller itself.
    pub home: Option<String>,
    /// Ingresses, by name.
    pub ingresses: BTreeMap<String, SeenSite>,
}

/// How far an ingress is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SiteStage {
    /// It takes connections, or starts to.
    Serving,
    /// It takes no more, and ends with what it has.
    Draining,
    /// It ends.
    Stopping,
}

/// One ingress.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Site {
    /// Of its actor.
    pub name: String,
    /// Where it is.
    pub node: String,
    machine: String,
    /// It has the configured port.
    pub configured: bool,
    /// How far it is.
    pub stage: SiteStage,
    /// The port that it was seen to listen on last.
    pub port: Option<u16>,
    ordered: Option<Duration>,
    /// Its node is lost since.
    lost: Option<Duration>,
}

/// All ingresses.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Sites {
    args: SiteArgs,
    /// What the document says.
    written: Option<ProxyLocation>,
    sites: Vec<Site>,
}

impl Sites {
    /// What cluster.toml says; the ingresses are looked at anew, since it may say otherwise than before.
    pub(super) fn set_args(&mut self, args: SiteArgs) {
        self.args = args;
        self.sites.iter_mut().for_each(|site| (site.ordered, site.lost) = (None, None));
    }

    /// What a document says, or that none does.
    pub(super) fn set_written(&mut self, written: Option<ProxyLocation>) {
        self.written = written;
    }

    /// Where they are to be.
    pub fn location(&self) -> ProxyLocation {
        self.written.unwrap_or(self.args.location)
    }

    /// All of them, oldest first.
    pub fn all(&self) -> &[Site] {
        &self.sites
    }

    /// The one of that name.
    pub fn get(&self, name: &str) -> Option<&Site> {
        self.sites.iter().find(|site| site.name == name)
    }

    /// Brings them closer to what is wanted; whether something changed that must be kept.
    pub(super) fn step(&mut self, now: Duration, seen: &SeenSites, commands: &mut Vec<Command>) -> bool {
        let before: Vec<Site> = self.sites.clone();
        let there = |site: &Site| seen.nodes.iter().any(|node| node.name == site.node);
        for site in &mut self.sites {
            site.lost = if there(site) { None } else { site.lost.or(Some(now)) };
        }
        let wanted = self.wanted(seen);
        for site in &mut self.sites {
            let actor = seen.ingresses.get(&site.name).cloned().unwrap_or_default();
            site.port = actor.port.or(site.port);
            let stage = match site.stage {
                _ if site.lost.is_some_and(|since| now.saturating_sub(since) >= LOST_FOR) => {
                    SiteStage::Stopping
                }
                stage if site.lost.is_some() => stage,
                SiteStage::Serving if !wanted.contains(&site.node) => SiteStage::Draining,
                SiteStage::Draining if !actor.runs || actor.open == Some(0) => SiteStage::Stopping,
                stage => stage,
            };
            if site.stage != stage {
                (site.stage, site.ordered) = (stage, None);
            }
        }
        let actor_is_there = |site: &Site| seen.ingresses.get(&site.name).is_some_and(|actor| actor.there);
        self.sites.retain(|site| {
            site.stage != SiteStage::Stopping || site.ordered.is_none() || actor_is_there(site)
        });
        for node in seen.nodes.iter().filter(|node| wanted.contains(&node.name)) {
            if !self.serving().any(|site| site.node == node.name) {
                self.add(node);
            }
        }
        for site in &mut self.sites {
            let due = site.ordered.is_none_or(|at| now.saturating_sub(at) >= ORDER_AGAIN);
            let gone = !seen.ingresses.get(&site.name).is_some_and(|actor| actor.there);
            let command = match site.stage {
                SiteStage::Serving if site.ordered.is_none() || (gone && due) => {
                    Command::EnsureIngress(site.name.clone())
                }
                SiteStage::Stopping if due => Command::RemoveIngress(site.name.clone()),
                SiteStage::Serving | SiteStage::Draining | SiteStage::Stopping => continue,
            };
            site.ordered = Some(now);
            commands.push(command);
        }
        let kept = |sites: &[Site]| -> Vec<Site> {
            sites.iter().cloned().map(|site| Site { ordered: None, lost: None, ..site }).collect()
        };
        kept(&before) != kept(&self.sites)
    }

    fn serving(&self) -> impl Iterator<Item = &Site> {
        self.sites.iter().filter(|site| site.stage == SiteStage::Serving)
    }

    /// The nodes that are to have one; of those that are lost nothing is said.
    fn wanted(&self, seen: &SeenSites) -> Vec<String> {
        let has = |node: &&SeenNode| self.serving().any(|site| site.node == node.name);
        // One that is silent keeps what it has. So does one that is emptied, where no other node could have it.
        let open = seen.nodes.iter().any(|node| node.room == Room::Open);
        let usable = |node: &&SeenNode| match node.room {
            Room::Open => true,
            Room::Kept => has(node),
            Room::Leaving => !open && has(node),
        };
        let usable: Vec<&SeenNode> = seen.nodes.iter().filter(usable).collect();
        match self.location() {
            ProxyLocation::Disabled => Vec::new(),
            ProxyLocation::EveryNode => usable.iter().map(|node| node.name.clone()).collect(),
            ProxyLocation::HeadOnly => self.one(seen, &usable).into_iter().collect(),
        }
    }

    /// The node of the one ingress: the one that cluster.toml names, else where it is, else the controller's.
    fn one(&self, seen: &SeenSites, usable: &[&SeenNode]) -> Option<String> {
        if let Some(node) = &self.args.node {
            return Some(node.clone());
        }
        let is_usable = |node: &&String| usable.iter().any(|it| it.name == **node);
        let present = self.serving().find(|site| site.lost.is_some() || is_usable(&&site.node));
        present
            .map(|site| &site.node)
            .or(seen.home.as_ref().filter(is_usable))
            .or(usable.first().map(|node| &node.name))
            .cloned()
    }

    fn add(&mut self, node: &SeenNode) {
        let configured = !self.serving().any(|site| site.configured && site.machine == node.machine);
        self.sites.push(Site {
            name: self.free_name(&node.name),
            node: node.name.clone(),
            machine: node.machine.clone(),
            configured,
            stage: SiteStage::Serving,
            port: None,
            ordered: None,
            lost: None,
        });
    }

    /// The first one is `ingress`; others have the name of their node behind it.
    fn free_name(&self, node: &str) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
        let node: String = node.chars().map(plain).take(NODE_LETTERS).collect();
        let numbered = (2..).map(|number| format!("{INGRESS}.{node}.{number}"));
        let mut names = [INGRESS.to_owned(), format!("{INGRESS}.{node}")].into_iter().chain(numbered);
        names.find(|name| self.get(name).is_none()).unwrap_or_else(|| INGRESS.to_owned())
    }

    /// Whether one is on its way, or ends.
    pub(super) fn is_moving(&self) -> bool {
        self.sites.iter().any(|site| site.stage != SiteStage::Serving || site.lost.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    /// A cluster in which every order takes effect at once, but for streams that stay open.
    #[derive(Default)]
    struct Rig {
        sites: Sites,
        seen: SeenSites,
        now: u64,
    }

    impl Rig {
        fn new(location: ProxyLocation, node: Option<&str>, nodes: &[(&str, &str)]) -> Self {
            let mut rig = Self::default();
            rig.sites.set_args(SiteArgs { location, node: node.map(str::to_owned) });
            nodes.iter().for_each(|(name, machine)| rig.join(name, machine));
            rig
        }

        fn join(&mut self, name: &str, machine: &str) {
            let (name, machine) = (name.to_owned(), machine.to_owned());
            self.seen.nodes.push(SeenNode { name, machine, room: Room::Open });
            self.seen.nodes.sort_by(|a, b| a.name.cmp(&b.name));
        }

        fn room(&mut self, name: &str, room: Room) {
            self.seen.nodes.iter_mut().filter(|node| node.name == name).for_each(|node| node.room = room);
        }

        fn step(&mut self) -> Vec<Command> {
            let mut commands = Vec::new();
            self.now += 1;
            self.sites.step(S(self.now), &self.seen, &mut commands);
            for command in &commands {
                match command {
                    Command::EnsureIngress(name) => {
                        let actor = SeenSite { there: true, runs: true, open: Some(0), port: Some(9) };
                        self.seen.ingresses.insert(name.clone(), actor);
                    }
                    Command::RemoveIngress(name) => drop(self.seen.ingresses.remove(name)),
                    other => panic!("{other:?}"),
                }
            }
            commands
        }

        fn settle(&mut self) -> Vec<(String, String, bool)> {
            (0..6).for_each(|_| drop(self.step()));
            let all = self.sites.all().iter();
            all.map(|it| (it.name.clone(), it.node.clone(), it.configured)).collect()
        }
    }

    fn site(name: &str, node: &str, configured: bool) -> (String, String, bool) {
        (name.to_owned(), node.to_owned(), configured)
    }

    #[test]
    fn every_node_has_one_and_a_machine_gives_its_port_once() {
        let mut rig = Rig::new(ProxyLocation::EveryNode, None, &[("a", "m"), ("b", "m"), ("c", "n")]);
        let all = [site("ingress", "a", true), site("ingress.b", "b", false), site("ingress.c", "c", true)];
        assert_eq!(rig.settle(), all);
        rig.join("d", "m");
        assert_eq!(rig.settle()[3], site("ingress.d", "d", false));
        assert_eq!(rig.step(), [], "nothing is ordered twice");
        let lost = std::mem::take(&mut rig.seen.nodes);
        assert_eq!(rig.step(), [], "it may be the word of a head that leads no more");
        rig.seen.nodes = lost;
        rig.seen.nodes.retain(|node| node.name != "d");
        assert_eq!(rig.settle(), all, "lost with its node");
    }

    #[test]
    fn one_that_is_drained_waits_for_its_streams() {
        let mut rig = Rig::new(ProxyLocation::EveryNode, None, &[("a", "m"), ("b", "n")]);
        rig.settle();
        rig.seen.ingresses.get_mut("ingress.b").unwrap().open = Some(2);
        rig.room("b", Room::Leaving);
        rig.settle();
        assert_eq!(rig.sites.get("ingress.b").unwrap().stage, SiteStage::Draining);
        // The node is taken back meanwhile: the one that drains takes nothing any more, so there is a new one.
        rig.room("b", Room::Open);
        assert_eq!(rig.settle()[2], site("ingress.b.2", "b", true));
        rig.seen.ingresses.get_mut("ingress.b").unwrap().open = Some(0);
        assert_eq!(rig.settle(), [site("ingress", "a", true), site("ingress.b.2", "b", true)]);
    }

    #[test]
    fn one_that_has_not_said_what_is_open_is_not_ended() {
        let mut rig = Rig::new(ProxyLocation::EveryNode, None, &[("a", "m"), ("b", "n")]);
        rig.settle();
        rig.seen.ingresses.get_mut("ingress.b").unwrap().open = None;
        rig.room("b", Room::Leaving);
        rig.settle();
        assert_eq!(rig.sites.get("ingress.b").unwrap().stage, SiteStage::Draining);
        rig.seen.ingresses.get_mut("ingress.b").unwrap().runs = false;
        assert_eq!(rig.settle(), [site("ingress", "a", true)], "it died: nothing is open");
    }

    #[test]
    fn the_one_of_a_cluster_moves_from_a_node_that_leaves_and_stays_where_there_is_no_other() {
        let mut rig = Rig::new(ProxyLocation::HeadOnly, None, &[("a", "m"), ("b", "m")]);
        rig.seen.home = Some("b".to_owned());
        assert_eq!(rig.settle(), [site("ingress", "b", true)]);
        rig.room("b", Room::Kept);
        assert_eq!(rig.settle(), [site("ingress", "b", true)], "it may only be silent");
        rig.room("b", Room::Leaving);
        assert_eq!(rig.settle(), [site("ingress.a", "a", true)], "with the port that the other gave up");
        rig.room("a", Room::Leaving);
        assert_eq!(rig.settle(), [site("ingress.a", "a", true)]);
        rig.seen.nodes.remove(0);
        rig.room("b", Room::Open);
        assert_eq!(rig.settle(), [site("ingress", "b", true)]);

        let mut rig = Rig::new(ProxyLocation::HeadOnly, Some("b"), &[("a", "m")]);
        assert_eq!(rig.settle(), [], "it waits for its node");
        rig.join("b", "n");
        assert_eq!(rig.settle(), [site("ingress", "b", true)]);
        rig.room("b", Room::Leaving);
        assert_eq!(rig.settle(), [site("ingress", "b", true)], "no other node may have it");
    }

    #[test]
    fn documents_say_where_and_what_they_leave_out_is_as_in_the_configuration() {
        let mut rig = Rig::new(ProxyLocation::HeadOnly, None, &[("a", "m"), ("b", "n")]);
        rig.settle();
        rig.sites.set_written(Some(ProxyLocation::EveryNode));
        assert_eq!(rig.settle(), [site("ingress", "a", true), site("ingress.b", "b", true)]);
        rig.sites.set_written(Some(ProxyLocation::Disabled));
        assert_eq!(rig.settle(), []);
        rig.sites.set_written(None);
        assert_eq!(rig.settle(), [site("ingress", "a", true)]);
    }
}

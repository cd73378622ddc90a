//! Groups: who is a rank, when the membership epoch rises, who is told.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::actors::{Actor, Life, Phase};
use super::record::GroupRecord;
use super::{Command, HeadState, Key, Record, Reserve};
use crate::group::{GroupView, Member, MemberState};

/// Epochs of a group that are reserved at a time.
const EPOCH_BLOCK: u64 = 16;

/// One group.
#[derive(Debug)]
pub(super) struct Group {
    size: u32,
    /// Actor of each rank that has one.
    members: BTreeMap<u32, String>,
    subscribers: Vec<String>,
    /// GR-1: every issued epoch is higher than the one before, also across restarts of the head.
    epochs: Reserve,
    /// GR-2: what was sent last; a view never changes within an epoch.
    view: Arc<GroupView>,
}

impl Group {
    fn new(name: &str) -> Self {
        let view = GroupView { group: name.to_owned(), epoch: 0, members: Vec::new() };
        Self {
            size: 0,
            members: BTreeMap::new(),
            subscribers: Vec::new(),
            epochs: Reserve::default(),
            view: Arc::new(view),
        }
    }

    pub(super) fn recovered(view: Arc<GroupView>, reserved: u64) -> Self {
        let name = view.group.clone();
        Self { epochs: Reserve::recovered(reserved), view, ..Self::new(&name) }
    }

    /// Reserves a block of epochs; the record must be durable before one is issued.
    pub(super) fn reserve(&mut self) -> GroupRecord {
        self.epochs.reserved = self.epochs.issued + EPOCH_BLOCK;
        GroupRecord { view: GroupView::clone(&self.view), reserved: self.epochs.reserved }
    }

    pub(super) fn view(&self) -> &GroupView {
        &self.view
    }

    pub(super) fn members(&self) -> &BTreeMap<u32, String> {
        &self.members
    }
}

/// Whether who subscribes to `watched` hears of `group`: its name, or the start of it before a `*`.
fn covers(watched: &str, group: &str) -> bool {
    watched.strip_suffix('*').map_or(watched == group, |prefix| group.starts_with(prefix))
}

/// Whether the view shows this incarnation of the actor as one that serves.
fn shows(view: &GroupView, actor: &Actor) -> bool {
    let Some(member) = &actor.spec.group else { return false };
    let shown = view.members.get(member.rank as usize);
    shown.is_some_and(|shown| {
        shown.state == MemberState::Ready
            && shown.addr.as_ref().is_some_and(|addr| addr.incarnation == actor.incarnation)
    })
}

/// Whether the incarnation that stands in a view still runs.
fn still_there(shown: &Member, actor: &Actor) -> bool {
    let shown = shown.addr.as_ref().map(|addr| addr.incarnation);
    matches!(&actor.life, Life::Live(live) if Some(live.incarnation) == shown)
}

/// How the actor would stand in a view of this moment.
pub(super) fn seat(rank: u32, actor: Option<&Actor>) -> Member {
    let absent = Member { rank, addr: None, join_info: Vec::new(), state: MemberState::Absent };
    match actor.map(|actor| &actor.life) {
        Some(Life::Live(live)) => match (&live.phase, &live.announced) {
            (Phase::Ready(addr), Some(info)) => Member {
                addr: Some(addr.clone()),
                join_info: info.clone(),
                state: MemberState::Ready,
                ..absent
            },
            _ => Member { state: MemberState::Starting, ..absent },
        },
        _ => absent,
    }
}

impl HeadState {
    /// Works out anew which actors form and watch which groups. Called when the set of specs changes.
    pub(super) fn regroup(&mut self) {
        let before: Vec<String> = self.groups.keys().cloned().collect();
        for group in self.groups.values_mut() {
            group.size = 0;
            group.members.clear();
            group.subscribers.clear();
        }
        for (name, actor) in self.actors.iter() {
            if let Some(member) = &actor.spec.group {
                let group =
                    self.groups.entry(member.group.clone()).or_insert_with(|| Group::new(&member.group));
                group.size = group.size.max(member.size);
                group.members.insert(member.rank, name.clone());
            }
            for watched in actor.spec.subscribe.iter().filter(|watched| !watched.ends_with('*')) {
                let group = self.groups.entry(watched.clone()).or_insert_with(|| Group::new(watched));
                group.subscribers.push(name.clone());
            }
        }
        for (name, actor) in self.actors.iter() {
            let prefixes = || actor.spec.subscribe.iter().filter(|watched| watched.ends_with('*'));
            for (group, state) in self.groups.iter_mut() {
                if prefixes().any(|prefix| covers(prefix, group)) && !state.members.is_empty() {
                    state.subscribers.push(name.clone());
                }
            }
        }
        // The first epochs are reserved before one is issued.
        let new = self.groups.iter_mut().filter(|(name, _)| !before.contains(*name));
        let reserved: Vec<GroupRecord> = new.map(|(_, group)| group.reserve()).collect();
        reserved.into_iter().for_each(|record| self.persist(Record::Group(record)));
        let empty = |group: &Group| group.members.is_empty() && group.subscribers.is_empty();
        let gone: Vec<String> =
            self.groups.iter().filter(|(_, group)| empty(group)).map(|(name, _)| name.clone()).collect();
        for name in gone {
            self.groups.remove(&name);
            self.forget(Key::Group(name));
        }
    }

    /// An actor serves no more: groups whose view counts on it move on.
    pub(super) fn recheck_groups(&mut self) {
        let outdated = |group: &Group| {
            let mut ready = group.view.members.iter().filter(|shown| shown.state == MemberState::Ready);
            ready.any(|shown| !self.member(group, shown.rank).is_some_and(|actor| still_there(shown, actor)))
        };
        if self.closing {
            return;
        }
        let names: Vec<String> =
            self.groups.iter().filter(|(_, group)| outdated(group)).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.raise(&name);
        }
    }

    /// The actor serves: its group may be complete now.
    pub(super) fn joined_group(&mut self, actor: &str) {
        let Some(actor) = self.actors.get(actor) else { return };
        let Some(name) = actor.spec.group.as_ref().map(|member| member.group.clone()) else { return };
        let Some(group) = self.groups.get(&name) else { return };
        let now = self.members_now(group);
        let complete = now.iter().all(|member| member.state == MemberState::Ready);
        if complete && now != group.view.members && !self.closing {
            self.raise(&name);
        }
    }

    fn member(&self, group: &Group, rank: u32) -> Option<&Actor> {
        self.actors.get(group.members.get(&rank)?)
    }

    pub(super) fn members_now(&self, group: &Group) -> Vec<Member> {
        let seat = |rank: u32| {
            let actor = self.member(group, rank);
            let shown = group.view.members.get(rank as usize);
            // One that was ready is ready, even if this head, restarted, has not heard so from itself yet.
            match shown.filter(|shown| actor.is_some_and(|actor| still_there(shown, actor))) {
                Some(shown) if actor.is_some_and(|actor| actor.ready().is_none()) => shown.clone(),
                Some(_) | None => seat(rank, actor),
            }
        };
        (0..group.size).map(seat).collect()
    }

    /// Starts the next epoch with the members of this moment, and tells everybody.
    fn raise(&mut self, name: &str) {
        let Some(group) = self.groups.get(name) else { return };
        let members = self.members_now(group);
        let Some(group) = self.groups.get_mut(name) else { return };
        let (epoch, _) = group.epochs.issue(EPOCH_BLOCK);
        let reserved = group.epochs.reserved;
        self.publish(GroupView { group: name.to_owned(), epoch, members }, reserved);
    }

    /// A worker has views that this head, restarted, never heard of: they stand, and it goes on above them.
    pub(super) fn learn_views(&mut self, held: Vec<GroupView>) {
        for view in held {
            let Some(group) = self.groups.get_mut(&view.group) else { continue };
            if view.epoch > group.view.epoch {
                group.epochs.issued = group.epochs.issued.max(view.epoch);
                let reserved = group.epochs.reserved;
                self.publish(view, reserved);
            }
        }
        self.recheck_groups();
    }

    /// Makes this the view of its group and tells everybody who has not got it.
    fn publish(&mut self, view: GroupView, reserved: u64) {
        let Some(group) = self.groups.get_mut(&view.group) else { return };
        group.view = Arc::new(view.clone());
        let told: Vec<String> = group.members.values().chain(&group.subscribers).cloned().collect();
        self.changed = true;
        for actor in told {
            self.send_views(&actor);
        }
        self.persist(Record::Group(GroupRecord { view, reserved }));
    }

    /// Sends the actor what it has not been sent yet of its own group and of those it watches.
    pub(super) fn send_views(&mut self, name: &str) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        let own = actor.spec.group.as_ref().map(|member| member.group.clone());
        let due: Vec<Arc<GroupView>> = self
            .groups
            .iter()
            .filter(|(group, state)| {
                let watched = actor.spec.subscribe.iter().any(|watched| covers(watched, group));
                let member = own.as_ref() == Some(group) && shows(&state.view, actor);
                state.view.epoch > 0 && (watched || member)
            })
            .map(|(_, state)| state.view.clone())
            .collect();
        let Life::Live(live) = &mut actor.life else { return };
        if !matches!(live.phase, Phase::Ready(_)) {
            return;
        }
        for view in due {
            let sent = live.sent.entry(view.group.clone()).or_default();
            if *sent < view.epoch {
                *sent = view.epoch;
                self.out.push(Command::SendView { incarnation: live.incarnation, view });
            }
        }
    }
}

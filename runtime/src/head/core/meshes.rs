//! Meshes, as far as the head knows them: a group whose ranks have a shape. Removed as one.

use std::time::Duration;

use super::actors::{Actor, Life, Phase, Then};
use super::{Command, HeadState};
use crate::handle::{ActorAddr, ActorId};
use crate::mesh::MeshNow;
use crate::spec::{Progress, split_name};

/// How a rank looks to one that is to be created.
enum Peer {
    /// Its process is there.
    At(ActorAddr),
    /// Its process will be there.
    Awaited,
    /// It has none, and it is open when it will.
    Gone,
}

fn peer(name: &str, actor: &Actor) -> Peer {
    match &actor.life {
        Life::Live(live) => match (&live.phase, &live.worker) {
            (Phase::Ready(addr), _) => Peer::At(addr.clone()),
            (Phase::Starting(_), Some((process, endpoint))) => Peer::At(ActorAddr {
                actor: ActorId::named(name),
                incarnation: live.incarnation,
                process: *process,
                endpoint: endpoint.clone(),
            }),
            (Phase::Starting(_), None) => Peer::Awaited,
        },
        // The mesh is only being spawned.
        Life::Pending { .. } if actor.incarnation.0 == 0 => Peer::Awaited,
        Life::Pending { .. }
        | Life::Backoff { .. }
        | Life::Judged { .. }
        | Life::Stopping { .. }
        | Life::Dead { .. } => Peer::Gone,
    }
}

impl HeadState {
    /// The mesh of that name.
    pub fn mesh(&self, name: &str) -> Result<MeshNow, String> {
        let group = self.groups.get(name).ok_or_else(|| format!("there is no mesh named {name:?}"))?;
        let dims = group.members().values().find_map(|actor| self.actors.get(actor)?.spec.mesh.clone());
        let dims = dims.ok_or_else(|| format!("group {name:?} is not a mesh, its ranks have no shape"))?;
        Ok(MeshNow { dims, view: group.view().clone() })
    }

    /// Ends all ranks of a mesh and forgets them.
    pub fn remove_mesh(&mut self, now: Duration, name: &str) -> Result<Vec<Command>, String> {
        self.now = now;
        self.mesh(name)?;
        let ranks: Vec<String> = self.groups[name].members().values().cloned().collect();
        let cause = crate::spec::DeathCause::stopped("its mesh was removed");
        // The supervisor of a mesh that is supervised as one has its name, in the namespace of its ranks.
        let seat = |rank: &String| self.actors.get(rank)?.spec.seat.clone();
        let own = ranks.first().and_then(seat).map(|seat| seat.supervisor);
        for rank in &ranks {
            self.retire(rank, cause.clone(), Then::Forget);
        }
        if let Some(own) = own.filter(|own| split_name(own).1 == name) {
            self.remove_subtree(&own, &cause);
        }
        Ok(self.finish())
    }

    /// MS-4: ranks that wait are created as soon as all ranks that are on their way have a process, so that each can be
    /// told where the others are.
    pub(super) fn create_ranks(&mut self) {
        for mesh in std::mem::take(&mut self.gathering) {
            let Some(group) = self.groups.get(&mesh) else { continue };
            let ranks: Vec<(u32, String)> =
                group.members().iter().map(|(rank, name)| (*rank, name.clone())).collect();
            let size = group.members().keys().last().map_or(0, |last| *last as usize + 1);
            let (mut peers, mut awaited) = (vec![None; size], Vec::new());
            for (rank, name) in &ranks {
                match self.actors.get(name).map_or(Peer::Gone, |actor| peer(name, actor)) {
                    Peer::At(addr) => peers[*rank as usize] = Some(addr),
                    Peer::Awaited => awaited.push(*rank),
                    Peer::Gone => {}
                }
            }
            let waiting: Vec<String> =
                ranks.into_iter().map(|(_, name)| name).filter(|name| self.waits(name)).collect();
            match awaited.first() {
                None => waiting.iter().for_each(|name| self.create(name, peers.clone())),
                Some(rank) if !waiting.is_empty() => {
                    let (rank, more) = (*rank, awaited.len() - 1);
                    waiting.iter().for_each(|name| self.note_wait(name, rank, more));
                    self.gathering.insert(mesh);
                }
                Some(_) => {}
            }
        }
    }

    /// Whether its worker waits to hear what to create.
    fn waits(&self, name: &str) -> bool {
        matches!(self.actors.get(name), Some(Actor { life: Life::Live(live), .. }) if live.waiting)
    }

    /// Says in the status what a rank waits for.
    fn note_wait(&mut self, name: &str, rank: u32, more: usize) {
        let Some(Actor { life: Life::Live(live), .. }) = self.actors.get_mut(name) else { return };
        let phase = match more {
            0 => format!("waits for a process of rank {rank}"),
            more => format!("waits for processes of rank {rank} and {more} more"),
        };
        let phase = Phase::Starting(Progress { phase, ..Progress::default() });
        self.changed |= live.phase != phase;
        live.phase = phase;
    }
}

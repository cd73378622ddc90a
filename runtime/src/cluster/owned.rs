//! Names, namespaces and owners as a client sees them: what is spawned, found and ended by name.

use futures_util::future::join_all;

use super::{Applied, Cluster, ClusterError, ControlAction, Named, not_applied};
use crate::actor::RemoteActor;
use crate::cluster::status::ActorState;
use crate::head::messages::{Apply, ApplyMode, Find, Found};
use crate::objects::Keep;
use crate::spec::{
    ActorSpec, Lifetime, Owner, Seat, SupervisorSpec, SupervisorStrategy, full_name, split_name,
};

/// Who a client is that does not say: for causes of death.
pub(super) fn this_process() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("process {} on {host}", std::process::id())
}

impl Cluster {
    /// The same client in another namespace: names that say none are meant there.
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self { namespace: namespace.into(), ..self.clone() }
    }

    /// The namespace of names that say none.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The same client on behalf of an owner: what does not say how long it is there ends with that.
    pub(crate) fn owned_by(&self, owner: Owner, by: String) -> Self {
        Self { owner: Some(owner), by: by.into(), ..self.clone() }
    }

    /// What actors belong to that do not say how long they are there; `None`: they are detached.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// The full name of what is meant by `name` here.
    pub(super) fn full(&self, name: &str) -> String {
        full_name(&self.namespace, name)
    }

    fn lifetime(&self, lifetime: Lifetime) -> Lifetime {
        match lifetime {
            Lifetime::Caller => self.owner.clone().map_or(Lifetime::Detached, Lifetime::Owned),
            Lifetime::Owned(Owner::Actor { name, incarnation }) => {
                Lifetime::Owned(Owner::Actor { name: self.full(&name), incarnation })
            }
            Lifetime::Detached | Lifetime::Owned(Owner::Driver(_)) => lifetime,
        }
    }

    fn seat(&self, seat: Option<Seat>) -> Option<Seat> {
        seat.map(|seat| Seat { supervisor: self.full(&seat.supervisor), ..seat })
    }

    /// Applies actors and supervisors together, all or none; see [`Cluster::apply`].
    pub async fn apply_tree(
        &self,
        specs: Vec<ActorSpec>,
        supervisors: Vec<SupervisorSpec>,
    ) -> Result<Applied, ClusterError> {
        self.apply_as(specs, supervisors, ApplyMode::Merge).await
    }

    /// Starts an actor and returns a handle by name; messages can be sent once it is ready.
    ///
    /// # Errors
    /// The name is taken by an actor that lives, or will again.
    pub async fn spawn<A: RemoteActor>(&self, spec: ActorSpec) -> Result<Named<A>, ClusterError> {
        let name = spec.name.clone();
        self.apply_as(vec![spec], Vec::new(), ApplyMode::New).await?;
        Ok(self.named(name))
    }

    /// The actor of that name if it lives, or will again, whatever its spec is; else starts it.
    ///
    /// # Errors
    /// The one that is there is of another type.
    pub async fn get_or_spawn<A: RemoteActor>(&self, spec: ActorSpec) -> Result<Named<A>, ClusterError> {
        let name = spec.name.clone();
        self.apply_as(vec![spec], Vec::new(), ApplyMode::KeepPresent).await?;
        self.get_actor(&name).await
    }

    /// A handle to an actor that is there, whether it is ready yet or not.
    ///
    /// # Errors
    /// No actor has that name, it is dead, or it is of another type.
    pub async fn get_actor<A: RemoteActor>(&self, name: &str) -> Result<Named<A>, ClusterError> {
        let full = self.full(name);
        let Some(Found { type_name, state, .. }) = self.ask(Find { actor: full.clone() }).await? else {
            let (namespace, name) = split_name(&full);
            let (name, namespace) = (name.to_owned(), namespace.to_owned());
            return Err(ClusterError::NoSuchActor { name, namespace });
        };
        if type_name != A::TYPE {
            return Err(ClusterError::WrongType { actor: full, found: type_name, wanted: A::TYPE });
        }
        match state {
            ActorState::Dead { cause } => Err(ClusterError::Dead { actor: full, cause }),
            ActorState::Pending { .. }
            | ActorState::Starting { .. }
            | ActorState::Ready
            | ActorState::Restarting { .. }
            // A full name of the default namespace says none: it is meant there.
            | ActorState::Stopping => Ok(self.in_namespace(split_name(&full).0).named(full)),
        }
    }

    /// Ends a supervisor and all beneath it, and forgets them.
    pub async fn remove_supervisor(&self, name: &str) -> Result<(), ClusterError> {
        self.control(name, ControlAction::RemoveSupervisor).await
    }

    pub(super) async fn apply_as(
        &self,
        specs: Vec<ActorSpec>,
        supervisors: Vec<SupervisorSpec>,
        mode: ApplyMode,
    ) -> Result<Applied, ClusterError> {
        let actor = |spec: ActorSpec| ActorSpec {
            name: self.full(&spec.name),
            lifetime: self.lifetime(spec.lifetime),
            seat: self.seat(spec.seat),
            // Actors of a program run that program, unless the spec says otherwise.
            package: spec.package.or_else(|| self.package.clone()),
            ..spec
        };
        let supervisor = |spec: SupervisorSpec| SupervisorSpec {
            name: self.full(&spec.name),
            lifetime: self.lifetime(spec.lifetime),
            seat: self.seat(spec.seat),
            strategy: match spec.strategy {
                SupervisorStrategy::Ask { actor, otherwise } => {
                    SupervisorStrategy::Ask { actor: self.full(&actor), otherwise }
                }
                strategy => strategy,
            },
            ..spec
        };
        let by = self.by.to_string();
        let mut specs: Vec<ActorSpec> = specs.into_iter().map(actor).collect();
        let keep =
            |spec: &mut ActorSpec| Keep::of(&spec.name, &spec.args, &mut spec.refs, self.known_heads());
        let kept: Vec<Keep> = specs.iter_mut().filter_map(keep).collect();
        let supervisors = supervisors.into_iter().map(supervisor).collect();
        // Only a new name is not harmless twice: it would be refused as taken.
        let again = mode != ApplyMode::New;
        let apply = Apply { specs, supervisors, mode, by };
        let answer = self.ask_within(apply, std::time::Duration::ZERO, again).await?;
        let applied = answer.map_err(not_applied)?;
        join_all(kept.into_iter().map(|keep| keep.hand_over(self))).await;
        Ok(applied)
    }
}

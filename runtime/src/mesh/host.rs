//! A process's part in meshes: the views that it has heard of, and the actor that stops of a round speak to.
//!
//! It says which epoch the process is in; what happens in a round is `round`'s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, ResponseFuture};
use tokio::sync::watch;

use super::dims::{Dims, Slice};
use super::handle::Mesh;
use super::messages::{Declined, Down, Round, Up};
use super::round;
use super::tree::Plan;
use crate::actor::{Accepts, RemoteActor};
use crate::group::GroupView;
use crate::handle::ActorId;
use crate::system::{SpawnError, SpawnOptions, System, WeakSystem};

/// Rounds that a process takes part in at a time; one more is declined.
const ROUNDS_MAX: u32 = 1024;
/// How long a round of an epoch waits for the process to hear of that epoch. The head tells all members at once, so it
/// is a matter of milliseconds.
const VIEW_PATIENCE: Duration = Duration::from_secs(2);
/// Plans kept of one epoch.
const PLANS_MAX: usize = 256;

/// Follows the views of one mesh.
pub(super) type Views = watch::Receiver<Option<Arc<GroupView>>>;

/// The meshes that a process has heard of.
#[derive(Default)]
pub(crate) struct Meshes(Mutex<HashMap<String, Arc<Membership>>>);

/// One mesh, as a process knows it.
pub(super) struct Membership {
    view: watch::Sender<Option<Arc<GroupView>>>,
    plans: Mutex<Plans>,
}

/// Plans of one epoch, by slice.
#[derive(Default)]
struct Plans {
    epoch: u64,
    of: HashMap<Slice, Arc<Plan>>,
}

impl Meshes {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Membership>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, mesh: &str) -> Option<Arc<Membership>> {
        self.lock().get(mesh).cloned()
    }

    fn expect(&self, mesh: &str) -> Arc<Membership> {
        let mut meshes = self.lock();
        let new = || Arc::new(Membership { view: watch::Sender::new(None), plans: Mutex::default() });
        meshes.entry(mesh.to_owned()).or_insert_with(new).clone()
    }

    /// Takes a view of a mesh that this process is in, unless a newer one was there before it.
    pub(crate) fn take(&self, view: &GroupView) {
        let Some(membership) = self.find(&view.group) else { return };
        membership.view.send_if_modified(|known| {
            let newer = known.as_ref().is_none_or(|known| known.epoch < view.epoch);
            if newer {
                *known = Some(Arc::new(view.clone()));
            }
            newer
        });
    }
}

impl Membership {
    /// MS-2: the plan of a round, if this process is in its epoch. Waits if it has yet to hear of it.
    pub(super) async fn plan(&self, round: &Round, until: Option<Instant>) -> Result<Arc<Plan>, Declined> {
        let patience = Instant::now() + VIEW_PATIENCE;
        let until = until.map_or(patience, |until| until.min(patience));
        let mut views = self.view.subscribe();
        let heard = views.wait_for(|view| view.as_ref().is_some_and(|view| view.epoch >= round.epoch));
        let view = match tokio::time::timeout_at(until.into(), heard).await {
            Ok(Ok(view)) => view.clone(),
            Ok(Err(_)) | Err(_) => None,
        };
        match view {
            Some(view) if view.epoch == round.epoch => self.plan_in(&view, &round.slice),
            Some(view) => Err(Declined::Stale { epoch: view.epoch }),
            None => Err(Declined::Unheard { epoch: round.epoch }),
        }
    }

    fn plan_in(&self, view: &GroupView, slice: &Slice) -> Result<Arc<Plan>, Declined> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.epoch != view.epoch || plans.of.len() >= PLANS_MAX {
            *plans = Plans { epoch: view.epoch, of: HashMap::new() };
        }
        if let Some(plan) = plans.of.get(slice) {
            return Ok(plan.clone());
        }
        let ranks = u32::try_from(view.members.len()).unwrap_or(u32::MAX);
        if !slice.fits(ranks) {
            return Err(Declined::Malformed(format!("the slice is not within its {ranks} ranks")));
        }
        let plan = Plan::new(view, slice)
            .map_err(|absent| Declined::Malformed(format!("ranks {absent:?} are not ready in it")))?;
        let plan = Arc::new(plan);
        plans.of.insert(slice.clone(), plan.clone());
        Ok(plan)
    }

    pub(super) fn follow(&self) -> Views {
        self.view.subscribe()
    }
}

impl System {
    /// Gets ready for the rounds of a mesh: from now on they wait for the view instead of being declined.
    pub(crate) fn expect_mesh(&self, mesh: &str) -> Result<(), SpawnError> {
        self.meshes().expect(mesh);
        let system = self.downgrade();
        let options = SpawnOptions::well_known(ActorId::MESH);
        match self.spawn(options, move || MeshActor { system, under_way: Arc::default() }) {
            Ok(_) | Err(SpawnError::AlreadyHere { .. }) => Ok(()),
            Err(error @ SpawnError::ShuttingDown) => Err(error),
        }
    }

    /// Has this process take part in the rounds of the mesh of that name, in the view's epoch, unless it has heard of a
    /// later one. Workers do so with the head's views; call it only for a mesh that the head does not know.
    pub fn join_mesh(&self, view: GroupView) -> Result<(), SpawnError> {
        self.expect_mesh(&view.group)?;
        self.meshes().take(&view);
        Ok(())
    }

    /// A mesh as this process, which takes part in it, knows it.
    pub fn mesh<A>(&self, name: &str, dims: Dims) -> Mesh<A> {
        let views = self.meshes().expect(name).view.subscribe();
        Mesh::new(self.clone(), (name, dims), views, None)
    }
}

/// Does this process's part in rounds.
pub(super) struct MeshActor {
    system: WeakSystem,
    under_way: Arc<()>,
}

impl Actor for MeshActor {
    type Context = Context<Self>;
}

impl RemoteActor for MeshActor {
    const TYPE: &'static str = "mesh";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Down>();
    }
}

impl Handler<Down> for MeshActor {
    type Result = ResponseFuture<Result<Up, Declined>>;

    fn handle(&mut self, down: Down, _: &mut Context<Self>) -> Self::Result {
        let round = Arc::clone(&self.under_way);
        if Arc::strong_count(&round) > 1 + ROUNDS_MAX as usize {
            return Box::pin(async { Err(Declined::Busy(ROUNDS_MAX)) });
        }
        let system = self.system.upgrade();
        Box::pin(async move {
            let _round = round;
            let found = system.and_then(|system| Some((system.meshes().find(&down.round.mesh)?, system)));
            let Some((membership, system)) = found else {
                return Err(Declined::Unheard { epoch: down.round.epoch });
            };
            round::take_part(&system, &membership, down).await
        })
    }
}

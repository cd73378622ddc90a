//! Heliostat: a distributed actor runtime that serves mixture-of-experts models with wide expert parallelism.
//!
//! This facade is what a program depends on that talks to a cluster or runs actors of its own: [`Program`] makes one
//! binary of driver and workers, [`prelude`] has what an actor needs, [`runtime`] has actors, handles, specs and the
//! [`Cluster`](runtime::cluster::Cluster) client; [`actors`] has the messages of the serving product. The binary `helio`
//! stands on the same. `docs/actors.md` is the guide.
//!
//! ```no_run
//! use heliostat::actors::{deployment::EPLB, eplb::Eplb, messages::Rebalance};
//! use heliostat::runtime::cluster::Cluster;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Cluster::connect("127.0.0.1:6379", None).await?;
//! println!("{} actors", cluster.status().await?.actors.len());
//! let eplb = cluster.handle::<Eplb>(EPLB).await?;
//! match eplb.ask(Rebalance).await? {
//!     Ok(started) => println!("{} moves", started.moves),
//!     Err(refused) => println!("no remap: {refused}"),
//! }
//! # Ok(())
//! # }
//! ```

#[doc(hidden)]
pub mod logging;
mod messages;
mod program;

pub use actix;
pub use bincode;
pub use heliostat_actors as actors;
pub use heliostat_runtime as runtime;
#[doc(hidden)]
pub use program::tls as tls_files;
pub use program::{BoxError, Driver, DriverError, Program, connect};

/// What an actor needs that is a deployment of an application (`docs/serve.md`).
pub mod serve {
    pub use heliostat_actors::serve::calls::{CallError, CallReplies, DeploymentHandle, NoPlace};
    pub use heliostat_actors::serve::replica::{
        CheckHealth, HttpHead, HttpPart, HttpRequest, HttpResponse, Reconfigure, ReplicaArgs,
    };
    pub use heliostat_runtime::actor::{Items, StreamMessage};
}

/// What a file with an actor needs.
pub mod prelude {
    pub use crate::{BoxError, Driver, Program, functions, messages};
    pub use actix::{Actor, Context, Handler, MessageResult, ResponseFuture};
    pub use bincode::{Decode, Encode};
    pub use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn, WireMessage};
    pub use heliostat_runtime::cluster::{Cluster, Idempotent, Named};
    pub use heliostat_runtime::function::{FunctionCx, FunctionPool, PoolOptions, RemoteFunction};
    pub use heliostat_runtime::handle::Handle;
    pub use heliostat_runtime::objects::{ObjectBytes, ObjectError, ObjectRef, Objects};
    pub use heliostat_runtime::spec::{ActorSpec, Lifetime};
}

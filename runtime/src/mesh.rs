//! Meshes of ranks: actors over named dimensions that are spawned as one and spoken to as one.
//!
//! A mesh is a group (`crate::group`): the head alone says who is in it and in which epoch. This room adds its shape and
//! the rounds: a message goes down a tree of processes, answers come back up it. It never decides who lives.

mod dims;
mod error;
mod handle;
mod host;
mod messages;
mod round;
mod seat;
mod spec;
mod table;
mod tree;

pub use self::dims::{Dims, Point, RANKS_MAX, ShapeError, Slice};
pub use self::error::{MeshError, RankError, RankFailure, RoundFailure};
pub use self::handle::Mesh;
pub(crate) use self::host::Meshes;
pub use self::messages::{MeshNow, RemoveMesh, WatchMesh};
pub use self::seat::MeshSeat;
pub use self::spec::MeshSpec;
pub(crate) use self::table::MeshTable;
pub use self::table::Reduce;

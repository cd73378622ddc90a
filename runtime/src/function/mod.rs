//! Stateless remote functions: a table of them in a program, an actor that runs them, a pool that spreads calls.
//!
//! A function knows no actor and keeps no state, so a call whose worker dies may be made again elsewhere.

mod actor;
mod cx;
mod pool;

use std::collections::HashMap;
use std::sync::Arc;

use bincode::{Decode, Encode};

use crate::objects::scope;
use crate::wire::{from_bytes, to_bytes};

pub use actor::{FUNCTIONS, FunctionActor};
pub use cx::FunctionCx;
pub use pool::{CallError, FunctionPool, PoolError, PoolOptions};

/// A function that can be called on another machine.
pub trait RemoteFunction: 'static {
    /// Its name, unique in the program.
    const NAME: &'static str;
    /// What it is given.
    type Args: Encode + Decode<()> + Send + 'static;
    /// What it returns; a `Result` of its own where it may fail.
    type Output: Encode + Decode<()> + Send + 'static;

    /// Runs it, on a thread that it may block; `cx` reads and puts objects.
    fn call(args: Self::Args, cx: &FunctionCx) -> Self::Output;
}

/// Why a function has no result.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum FunctionError {
    /// The program of the worker has no such function.
    #[error("no function {name:?} in this program; it has {known}: add it with Program::function")]
    Unknown {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// What it was given, or returned, is not what it takes or returns.
    #[error("function {name:?}: {why}")]
    Codec {
        /// Its name.
        name: String,
        /// What the codec says.
        why: String,
    },
    /// It panicked.
    #[error("function {name:?} panicked: {message}")]
    Panicked {
        /// Its name.
        name: String,
        /// The panic message.
        message: String,
    },
    /// The worker runs as many as it may.
    #[error("the worker runs {0} calls already, as many as it may")]
    Busy(u32),
}

type RunFn = fn(&[u8], &FunctionCx) -> Result<Vec<u8>, FunctionError>;

/// The visible table of a program's functions.
#[derive(Default, Clone)]
pub struct FunctionTable {
    run: Arc<HashMap<&'static str, RunFn>>,
}

impl FunctionTable {
    /// Adds a function.
    ///
    /// # Panics
    /// If the name is taken.
    pub fn with<F: RemoteFunction>(mut self) -> Self {
        let earlier = Arc::make_mut(&mut self.run).insert(F::NAME, run::<F>);
        assert!(earlier.is_none(), "two functions named {:?}", F::NAME);
        self
    }

    /// Names of all functions, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.run.keys().copied().collect();
        names.sort_unstable();
        names
    }

    fn get(&self, name: &str) -> Result<RunFn, FunctionError> {
        let unknown = || FunctionError::Unknown { name: name.to_owned(), known: self.names().join(", ") };
        self.run.get(name).copied().ok_or_else(unknown)
    }
}

/// Refs in the arguments count as this process's; those in the result are on their way to the caller.
fn run<F: RemoteFunction>(args: &[u8], cx: &FunctionCx) -> Result<Vec<u8>, FunctionError> {
    let codec = |why: String| FunctionError::Codec { name: F::NAME.to_owned(), why };
    let args = cx.objects().received(|| from_bytes::<F::Args>(args));
    let output = F::call(args.map_err(|error| codec(error.to_string()))?, cx);
    scope::sent_to_one(|| to_bytes(&output)).map_err(|error| codec(error.to_string()))
}

//! The actor of a worker that runs functions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use actix::{Actor, Context, Handler, ResponseFuture};
use bincode::{Decode, Encode};

use super::{FunctionCx, FunctionError, FunctionTable};
use crate::actor::{Accepts, RemoteActor, WireMessage};
use crate::cluster::Cluster;
use crate::panics;

/// Its type in a program's table.
pub const FUNCTIONS: &str = "heliostat.functions";

/// Calls a function.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CallFunction {
    /// Its name.
    pub name: String,
    /// What it is given, encoded.
    pub args: Vec<u8>,
}

impl actix::Message for CallFunction {
    type Result = Result<Vec<u8>, FunctionError>;
}

impl WireMessage for CallFunction {
    const NAME: &'static str = "function.call";
}

/// Runs functions, each on a thread that it may block, and so many at once.
pub struct FunctionActor {
    table: FunctionTable,
    cx: Arc<FunctionCx>,
    running: Arc<AtomicU32>,
    running_max: u32,
}

impl FunctionActor {
    pub(crate) fn new(table: FunctionTable, running_max: u32, cluster: &Cluster) -> Self {
        Self {
            table,
            cx: Arc::new(FunctionCx::new(cluster)),
            running: Arc::default(),
            running_max: running_max.max(1),
        }
    }
}

impl Actor for FunctionActor {
    type Context = Context<Self>;
}

impl RemoteActor for FunctionActor {
    const TYPE: &'static str = FUNCTIONS;

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<CallFunction>();
    }
}

/// One that runs, until it is dropped.
struct Running(Arc<AtomicU32>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Handler<CallFunction> for FunctionActor {
    type Result = ResponseFuture<Result<Vec<u8>, FunctionError>>;

    fn handle(&mut self, call: CallFunction, _: &mut Context<Self>) -> Self::Result {
        let run = match self.table.get(&call.name) {
            Ok(run) => run,
            Err(unknown) => return Box::pin(async { Err(unknown) }),
        };
        let (running, cx) = (Running(self.running.clone()), self.cx.clone());
        if self.running.fetch_add(1, Ordering::Relaxed) >= self.running_max {
            let busy = FunctionError::Busy(self.running_max);
            return Box::pin(async move {
                drop(running);
                Err(busy)
            });
        }
        Box::pin(async move {
            let CallFunction { name, args } = call;
            // The place is free when the function has ended, also if nobody waits for it any more.
            let ran = tokio::task::spawn_blocking(move || {
                let _running = running;
                run(&args, &cx)
            });
            match ran.await {
                Ok(result) => result,
                Err(failed) => {
                    let message = match failed.try_into_panic() {
                        Ok(panic) => panics::message(&*panic),
                        Err(cancelled) => cancelled.to_string(),
                    };
                    Err(FunctionError::Panicked { name, message })
                }
            }
        })
    }
}

//! A user's program: one static binary that is the driver on one machine and every worker of its actors on others.
//!
//! It reads the process's arguments and the few variables by which a driver finds its cluster, and nothing else does.

mod driver;

use std::error::Error;
use std::future::Future;
use std::io::Write;
use std::process::ExitCode;

use heliostat_runtime::actor::{ActorTypes, Spawn};
use heliostat_runtime::function::{FunctionTable, RemoteFunction};
use heliostat_runtime::package::{DESCRIBE, WORKER};
use heliostat_runtime::worker::{self, WorkerConfig};

use crate::logging::{self, Whose};
pub use driver::{Driver, DriverError, connect, tls};

/// What a driver may fail with.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// A program: its name, its version and the visible table of its actor types.
///
/// ```no_run
/// use heliostat::prelude::*;
///
/// # struct Counter;
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # impl RemoteActor for Counter {
/// #     const TYPE: &'static str = "counter";
/// #     fn messages(_: &mut Accepts<Self>) {}
/// # }
/// # impl Spawn for Counter {
/// #     type Args = ();
/// #     async fn create(_: (), _: ActorCx) -> Result<Self, CreateError> { Ok(Self) }
/// # }
/// fn main() -> std::process::ExitCode {
///     Program::new("counter", env!("CARGO_PKG_VERSION")).actor::<Counter>().run(driver)
/// }
///
/// async fn driver(driver: Driver) -> Result<(), BoxError> {
///     println!("{} nodes", driver.cluster().status().await?.nodes.len());
///     Ok(())
/// }
/// ```
pub struct Program {
    name: &'static str,
    version: &'static str,
    types: ActorTypes,
    functions: FunctionTable,
}

impl Program {
    /// A program without actors. Name and version are its key in the cluster's registry of packages.
    pub fn new(name: &'static str, version: &'static str) -> Self {
        Self { name, version, types: ActorTypes::new(), functions: FunctionTable::default() }
    }

    /// Adds an actor type.
    ///
    /// # Panics
    /// If another one has its name.
    pub fn actor<A: Spawn>(mut self) -> Self {
        self.types = self.types.with::<A>();
        self
    }

    /// Adds a stateless function.
    ///
    /// # Panics
    /// If another one has its name.
    pub fn function<F: RemoteFunction>(mut self) -> Self {
        self.functions = self.functions.with::<F>();
        self
    }

    /// Runs the process to its end: as a worker where a node agent started it, else as the driver. Returns the exit code:
    /// 0, or 1 after an error, which is printed.
    pub fn run<F, D, E>(self, driver: D) -> ExitCode
    where
        D: FnOnce(Driver) -> F,
        F: Future<Output = Result<(), E>>,
        E: Into<BoxError>,
    {
        let mut args = std::env::args().skip(1).peekable();
        let ended = match args.peek().map(String::as_str) {
            Some(WORKER) => self.work(args.skip(1)),
            Some(DESCRIBE) => {
                describe(&self);
                Ok(())
            }
            _ => self.drive(driver, args.collect()),
        };
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                // Nobody may be there to read it.
                let _ = writeln!(std::io::stderr(), "error: {}", chain(&*error));
                ExitCode::FAILURE
            }
        }
    }

    fn work(self, args: impl Iterator<Item = String>) -> Result<(), BoxError> {
        let args: Vec<String> = args.collect();
        logging::init("info", &Whose::Worker(&args));
        let config = WorkerConfig::from_args(args)?;
        let types = self.types.with_functions(self.functions);
        let ended = runtime()?.block_on(worker::run(config, types))?;
        // Threads that the actor left behind must not keep the process.
        std::process::exit(ended.code())
    }

    fn drive<F, D, E>(self, driver: D, args: Vec<String>) -> Result<(), BoxError>
    where
        D: FnOnce(Driver) -> F,
        F: Future<Output = Result<(), E>>,
        E: Into<BoxError>,
    {
        logging::init("warn", &Whose::Process("driver"));
        runtime()?.block_on(async {
            let (ready, registered) = Driver::connect(self.name, self.version, args).await?;
            let outcome = driver(ready).await.map_err(Into::into);
            // What the driver has not detached ends with it.
            let ended = registered.end().await;
            outcome.and_then(|()| Ok(ended?))
        })
    }
}

/// Says what the program is, for `helio submit`.
#[allow(clippy::print_stdout, reason = "its output is its answer")]
fn describe(program: &Program) {
    let about = serde_json::json!({
        "name": program.name,
        "version": program.version,
        "heliostat": env!("CARGO_PKG_VERSION"),
        "actors": program.types.names(),
        "functions": program.functions.names(),
    });
    println!("{about}");
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// An error with its causes, each said once.
fn chain(error: &dyn Error) -> String {
    let (mut text, mut next) = (error.to_string(), error.source());
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}

//! The threads that actors run on: a small pool, and one of its own for an actor that is created by the cluster.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use actix::Arbiter;

use super::SystemError;
use super::home::Pulse;

/// The threads that actors run on.
pub(super) struct Arbiters {
    system: actix::System,
    pool: Vec<actix::ArbiterHandle>,
    turn: AtomicUsize,
}

impl Arbiters {
    pub(super) fn start(count: usize) -> Result<Self, SystemError> {
        let (started, outcome) = std::sync::mpsc::channel();
        let failed = |error: String| SystemError::Threads(error);
        std::thread::Builder::new()
            .name("heliostat-actix".to_owned())
            .spawn(move || {
                let runner = actix::System::new();
                let pool: Result<Vec<_>, _> =
                    (0..count).map(|_| Arbiter::try_new().map(|arbiter| arbiter.handle())).collect();
                let ok = pool.is_ok();
                let sent = started.send(pool.map(|pool| (actix::System::current(), pool)));
                if ok
                    && sent.is_ok()
                    && let Err(error) = runner.run()
                {
                    tracing::error!(%error, "actor threads ended");
                }
            })
            .map_err(|e| failed(e.to_string()))?;
        let (system, pool) =
            outcome.recv().map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
        Ok(Self { system, pool, turn: AtomicUsize::new(0) })
    }

    pub(super) fn next(&self) -> &actix::ArbiterHandle {
        &self.pool[self.turn.fetch_add(1, Ordering::Relaxed) % self.pool.len()]
    }

    /// Runs `work` on a new thread of the system, with what tells whether that thread is busy.
    pub(super) fn on_fresh(&self, work: impl FnOnce(Arc<Pulse>) + Send + 'static) {
        let pulse = Arc::new(Pulse::new());
        let of_thread = pulse.clone();
        let runtime = move || {
            let (parks, wakes) = (of_thread.clone(), of_thread);
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .on_thread_park(move || parks.rests())
                .on_thread_unpark(move || wakes.works())
                .build()
        };
        self.system.arbiter().spawn_fn(move || match Arbiter::try_with_tokio_rt(runtime) {
            Ok(arbiter) => drop(arbiter.spawn_fn(move || work(pulse))),
            // Dropping the work tells whoever waits for it.
            Err(error) => tracing::error!(%error, "cannot start an actor thread"),
        });
    }
}

impl Arbiters {
    /// Ends the threads, with what still runs on them.
    pub(super) fn stop(&self) {
        self.system.stop();
    }
}

impl Drop for Arbiters {
    fn drop(&mut self) {
        self.stop();
    }
}

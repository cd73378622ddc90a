//! Applications that are actors of users: finds a replica for each request, and carries it there and the answer back.
//!
//! `balance` decides, `forward` translates between HTTP and messages. Neither knows of models.

mod balance;
mod forward;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use heliostat_runtime::handle::Handle;
use heliostat_runtime::system::System;
use rand::RngExt;
use tokio::sync::oneshot;

use self::balance::{Balance, Offer, Seat, Taken};
pub(super) use self::forward::{Terms, answer};
use crate::serve::messages::TableActors;
use crate::serve::replica::AnyReplica;
use crate::serve::target::Backpressure;

/// How long a request waits for a replica that is started for it.
const FIRST_REPLICA: Duration = Duration::from_secs(120);
/// How long it waits for one that is being replaced.
const NEXT_REPLICA: Duration = Duration::from_secs(10);

/// The replicas of a deployment, and the requests that are under way there. Cheap to clone.
#[derive(Clone)]
pub struct ActorPool(Arc<Inner>);

struct Inner {
    system: System,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    balance: Balance,
    handles: HashMap<Seat, Handle<AnyReplica>>,
    waiting: HashMap<u64, oneshot::Sender<Place>>,
    tickets: u64,
    /// Replicas are there or on their way.
    expected: bool,
    may_wait: bool,
    backpressure: Option<Backpressure>,
    message: String,
    closed: bool,
}

/// A request's place at a replica; it is given back when dropped.
struct Place {
    pool: ActorPool,
    seat: Seat,
    handle: Handle<AnyReplica>,
}

/// No replica takes a request.
#[derive(Debug, thiserror::Error)]
enum NoPlace {
    #[error("no replica is free, and as many requests wait as may ({0}, `max_queued_requests`)")]
    Full(u64),
    #[error("no replica serves: {0}")]
    NotReady(String),
}

impl ActorPool {
    /// Without a replica.
    pub fn new(system: System) -> Self {
        Self(Arc::new(Inner { system, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is so of the deployment from now on.
    pub fn set(&self, deployment: &TableActors) {
        let mut state = self.lock();
        let mut handles = HashMap::new();
        for replica in deployment.replicas.iter().filter(|replica| !replica.draining) {
            let Some(addr) = &replica.addr else { continue };
            let seat = Seat { number: replica.number, incarnation: addr.incarnation.0 };
            let known = state.handles.remove(&seat);
            handles.insert(seat, known.unwrap_or_else(|| self.0.system.handle(addr.clone())));
        }
        let mut open: Vec<Seat> = handles.keys().copied().collect();
        open.sort();
        let queued_max = deployment.max_queued_requests.map(u64::from);
        state.balance.set(Offer { open, ongoing_max: deployment.max_ongoing_requests.into(), queued_max });
        state.handles = handles;
        state.expected = deployment.replicas.iter().any(|replica| !replica.draining);
        state.may_wait = deployment.may_wait;
        state.backpressure = deployment.backpressure;
        state.message.clone_from(&deployment.message);
        drop(state);
        self.seat_waiting();
    }

    /// The deployment is gone: who waits is refused, what is under way goes on.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.balance.set(Offer::default());
        state.message = "the application has ended".to_owned();
        let waiting = std::mem::take(&mut state.waiting);
        waiting.keys().for_each(|ticket| state.balance.leave(*ticket));
    }

    /// Requests under way and waiting.
    pub fn load(&self) -> u64 {
        self.lock().balance.load()
    }

    /// How a request is refused for which there is no room.
    pub(super) fn backpressure(&self) -> Option<Backpressure> {
        self.lock().backpressure
    }

    /// Requests under way at a replica.
    pub fn load_at(&self, number: u64) -> u64 {
        self.lock().balance.at(number)
    }

    /// What it still waits for.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), Vec<String>> {
        let state = self.lock();
        if state.may_wait || state.balance.is_open(&[]) { Ok(()) } else { Err(vec![state.missing()]) }
    }

    /// A place for a request that was tried at `tried` in vain; waits for one where that has sense.
    async fn place(&self, tried: &[Seat]) -> Result<Place, NoPlace> {
        let (mut waiting, receiver) = {
            let mut state = self.lock();
            if state.closed {
                return Err(NoPlace::NotReady(state.missing()));
            }
            state.tickets += 1;
            let ticket = state.tickets;
            match state.balance.take(ticket, tried, &mut draw) {
                Taken::Seat(seat) => return self.at(&mut state, seat),
                Taken::Full(waiting) => return Err(NoPlace::Full(waiting)),
                Taken::Waits => {}
            }
            let (sender, receiver) = oneshot::channel();
            state.waiting.insert(ticket, sender);
            (Waiting { pool: self, ticket }, receiver)
        };
        waiting.until(receiver, tried).await
    }

    fn at(&self, state: &mut State, seat: Seat) -> Result<Place, NoPlace> {
        match state.handles.get(&seat).cloned() {
            Some(handle) => Ok(Place { pool: self.clone(), seat, handle }),
            None => {
                state.balance.release(seat);
                Err(NoPlace::NotReady(state.missing()))
            }
        }
    }

    /// Gives places that are free to those who wait.
    fn seat_waiting(&self) {
        // What nobody takes any more is given back, outside of the lock.
        let mut unused = Vec::new();
        let mut state = self.lock();
        for (ticket, seat) in state.balance.seat_waiting(&mut draw) {
            let sender = state.waiting.remove(&ticket);
            let Ok(place) = self.at(&mut state, seat) else { continue };
            match sender {
                Some(sender) => unused.extend(sender.send(place).err()),
                None => unused.push(place),
            }
        }
        drop(state);
        drop(unused);
    }
}

fn draw(below: usize) -> usize {
    rand::rng().random_range(0..below)
}

impl State {
    /// Why no replica serves.
    fn missing(&self) -> String {
        match (self.message.as_str(), self.expected) {
            ("", true) => "it is starting".to_owned(),
            ("", false) => "there is none yet".to_owned(),
            (message, _) => message.to_owned(),
        }
    }

    /// How long a request may wait for a replica, where none would take it.
    fn patience(&self) -> Option<Duration> {
        match (self.may_wait, self.expected) {
            _ if self.closed => None,
            (true, _) => Some(FIRST_REPLICA),
            (false, true) => Some(NEXT_REPLICA),
            (false, false) => None,
        }
    }
}

/// A request that waits; its client may go away meanwhile.
struct Waiting<'a> {
    pool: &'a ActorPool,
    ticket: u64,
}

impl Waiting<'_> {
    async fn until(
        &mut self,
        mut receiver: oneshot::Receiver<Place>,
        tried: &[Seat],
    ) -> Result<Place, NoPlace> {
        let began = tokio::time::Instant::now();
        loop {
            let (open, patience) = {
                let state = self.pool.lock();
                (state.balance.is_open(tried), state.patience())
            };
            // A replica that only is busy is waited for as long as the client does.
            let until = match patience {
                _ if open => tokio::time::Instant::now() + NEXT_REPLICA,
                Some(patience) if began.elapsed() < patience => began + patience,
                _ => return Err(NoPlace::NotReady(self.pool.lock().missing())),
            };
            match tokio::time::timeout_at(until, &mut receiver).await {
                Ok(Ok(place)) => return Ok(place),
                Ok(Err(_)) => return Err(NoPlace::NotReady(self.pool.lock().missing())),
                Err(_) => {}
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.waiting.remove(&self.ticket);
        state.balance.leave(self.ticket);
    }
}

impl Place {
    /// Whether the replica was reached.
    fn reached(&self, well: bool) {
        self.pool.lock().balance.reached(self.seat, well);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pool.lock().balance.release(self.seat);
        self.pool.seat_waiting();
    }
}

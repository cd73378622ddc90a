//! The replicas of a deployment of users' actors as one caller sees them, and the requests that it has there.
//!
//! `balance` decides; this keeps handles, and those who wait. It knows neither HTTP nor messages.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::handle::Handle;
use heliostat_runtime::system::System;
use rand::RngExt;
use tokio::sync::{Notify, oneshot};

use super::NoPlace;
use super::balance::{Balance, Offer, Seat, Taken};
use super::counts::CallCounts;
use crate::serve::messages::TableActors;
use crate::serve::target::Backpressure;

/// How long a request waits for a replica that is started for it.
const FIRST_REPLICA: Duration = Duration::from_secs(120);
/// How long it waits for one that is being replaced.
const NEXT_REPLICA: Duration = Duration::from_secs(10);

/// The replicas of a deployment, and the requests that are under way there. Cheap to clone.
pub(crate) struct Pool<A>(Arc<Inner<A>>);

impl<A> Clone for Pool<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Inner<A> {
    system: System,
    state: Mutex<State<A>>,
    /// The requests under way have changed.
    changed: Notify,
}

struct State<A> {
    /// Of the deployment, as far as it is known.
    name: String,
    balance: Balance,
    counts: CallCounts,
    handles: HashMap<Seat, Handle<A>>,
    waiting: HashMap<u64, oneshot::Sender<Place<A>>>,
    /// Replicas that take nothing new.
    draining: Vec<u64>,
    tickets: u64,
    /// Replicas are there or on their way.
    expected: bool,
    may_wait: bool,
    backpressure: Option<Backpressure>,
    message: String,
    closed: bool,
}

/// A request's place at a replica; it is given back when dropped.
pub(crate) struct Place<A> {
    pool: Pool<A>,
    pub(super) seat: Seat,
    pub(super) handle: Handle<A>,
    began: Instant,
    end: End,
}

/// What became of a call at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It was answered, or given up by its caller.
    Over,
    /// The replica had nothing of it.
    Elsewhere,
    /// The replica had it, or may have, and gave no answer.
    Failed,
}

/// What a caller has under way.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Calls {
    /// Under way and waiting.
    pub(super) load: u64,
    /// At each replica that takes nothing new, by number.
    pub(super) draining: Vec<(u64, u64)>,
    /// Those that have ended, too.
    pub(super) counts: CallCounts,
}

impl<A> Pool<A> {
    /// Without a replica.
    pub(crate) fn new(system: System) -> Self {
        let state = Mutex::new(State {
            name: String::new(),
            balance: Balance::default(),
            counts: CallCounts::default(),
            handles: HashMap::new(),
            waiting: HashMap::new(),
            draining: Vec::new(),
            tickets: 0,
            expected: true,
            may_wait: false,
            backpressure: None,
            message: "its replicas are not known yet".to_owned(),
            closed: false,
        });
        Self(Arc::new(Inner { system, state, changed: Notify::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, State<A>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no such deployment: who waits is refused, what is under way goes on.
    pub(super) fn set_absent(&self, why: String) {
        self.lock().refuse_all(why);
    }

    /// The deployment is gone: who waits is refused, what is under way goes on.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.refuse_all("the application has ended".to_owned());
    }

    /// Requests under way and waiting.
    pub(crate) fn load(&self) -> u64 {
        self.lock().balance.load()
    }

    /// How a request is refused for which there is no room.
    pub(crate) fn backpressure(&self) -> Option<Backpressure> {
        self.lock().backpressure
    }

    /// Requests under way at a replica.
    pub(crate) fn load_at(&self, number: u64) -> u64 {
        self.lock().balance.at(number)
    }

    /// What is under way.
    pub(super) fn calls(&self) -> Calls {
        let state = self.lock();
        let draining = state.draining.iter().map(|number| (*number, state.balance.at(*number))).collect();
        Calls { load: state.balance.load(), draining, counts: state.counts() }
    }

    /// The name of the deployment, and what became of the calls there.
    pub(crate) fn counts(&self) -> (String, CallCounts) {
        let state = self.lock();
        (state.name.clone(), state.counts())
    }

    /// Waits until [`Self::calls`] may have changed. For one waiter only.
    pub(super) async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// What it still waits for.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn ready(&self) -> Result<(), Vec<String>> {
        let state = self.lock();
        if state.may_wait || state.balance.is_open(&[]) { Ok(()) } else { Err(vec![state.missing()]) }
    }

    /// A place for a request that was tried at `tried` in vain; waits for one where that has sense.
    pub(super) async fn place(&self, tried: &[Seat]) -> Result<Place<A>, NoPlace> {
        let (mut waiting, receiver) = {
            let mut state = self.lock();
            if state.closed {
                return Err(NoPlace::NotReady(state.missing()));
            }
            self.0.changed.notify_one();
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

    fn at(&self, state: &mut State<A>, seat: Seat) -> Result<Place<A>, NoPlace> {
        match state.handles.get(&seat).cloned() {
            Some(handle) => {
                Ok(Place { pool: self.clone(), seat, handle, began: Instant::now(), end: End::Over })
            }
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

impl<A: RemoteActor> Pool<A> {
    /// Takes what is so of the deployment from now on.
    pub(crate) fn set(&self, deployment: &TableActors) {
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
        state.name.clone_from(&deployment.name);
        state.expected = deployment.replicas.iter().any(|replica| !replica.draining);
        state.may_wait = deployment.may_wait;
        state.backpressure = deployment.backpressure;
        state.message.clone_from(&deployment.message);
        state.draining = deployment.replicas.iter().filter(|it| it.draining).map(|it| it.number).collect();
        drop(state);
        self.seat_waiting();
        self.0.changed.notify_one();
    }
}

fn draw(below: usize) -> usize {
    rand::rng().random_range(0..below)
}

impl<A> State<A> {
    fn counts(&self) -> CallCounts {
        let (queued, ongoing) = (self.balance.waiting(), self.balance.ongoing().clone());
        CallCounts { queued, ongoing, ..self.counts.clone() }
    }

    fn refuse_all(&mut self, why: String) {
        self.balance.set(Offer::default());
        self.handles.clear();
        (self.expected, self.may_wait, self.message) = (false, false, why);
        let waiting = std::mem::take(&mut self.waiting);
        waiting.keys().for_each(|ticket| self.balance.leave(*ticket));
    }

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
struct Waiting<'a, A> {
    pool: &'a Pool<A>,
    ticket: u64,
}

impl<A> Waiting<'_, A> {
    async fn until(
        &mut self,
        mut receiver: oneshot::Receiver<Place<A>>,
        tried: &[Seat],
    ) -> Result<Place<A>, NoPlace> {
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

impl<A> Drop for Waiting<'_, A> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.waiting.remove(&self.ticket);
        state.balance.leave(self.ticket);
    }
}

impl<A> Place<A> {
    /// The replica's number.
    pub(crate) fn number(&self) -> u64 {
        self.seat.number
    }

    /// The replica was reached.
    pub(super) fn reached(&self) {
        self.pool.lock().balance.reached(self.seat, true);
    }

    /// It had nothing of the call, and was not reached.
    pub(super) fn passed(&mut self) {
        self.end = End::Elsewhere;
        self.pool.lock().balance.reached(self.seat, false);
    }

    /// It had the call, or may have, and gave no answer; `lost`: it is gone.
    pub(crate) fn failed(&mut self, lost: bool) {
        self.end = End::Failed;
        self.pool.lock().balance.reached(self.seat, !lost);
    }
}

impl<A> Drop for Place<A> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.balance.release(self.seat);
        if self.end != End::Elsewhere {
            state.counts.ended(self.began.elapsed(), self.end == End::Failed);
        }
        drop(state);
        self.pool.0.changed.notify_one();
        self.pool.seat_waiting();
    }
}

//! The doorbell of a rank: the one place where its engine thread sleeps.
//!
//! Whoever changes something that the engine may wait for (a frame, room in a ring, the abort flag, a lost rank) rings.
//! The bell is a page of shared memory with two words: `sleeper` says whether the engine sleeps and for whom, `count`
//! is the futex. The engine writes `sleeper`, fences and looks once more at everything before it sleeps; a ringer
//! writes its news, fences and reads `sleeper`: so one of the two always sees the other, and nobody pays for a system
//! call while the engine is awake.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::event::Timespec;
use rustix::thread::futex;

use super::handshake::random;
use super::ring::{MapOffer, SharedMap};

const BYTES: usize = 4096;
const COUNT_AT: usize = 64;
const SLEEPER_AT: usize = 128;

/// Set while the engine sleeps in `poll`, where a futex does not reach it.
const POLLS: u32 = 1 << 31;
const ANYONE: u32 = 0xffff;

/// For whom the engine sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// News of one rank, and whatever is urgent.
    Rank(usize),
    /// All news.
    Anyone,
}

impl Interest {
    fn word(self) -> u32 {
        match self {
            Self::Rank(rank) => rank as u32 + 1,
            Self::Anyone => ANYONE,
        }
    }
}

/// How the engine sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sleep {
    /// On the futex of the bell.
    Futex,
    /// In `poll`, with the descriptor of the bell among others.
    Poll,
}

/// The bell of this process's rank. Lives as long as its listener, over all epochs.
#[derive(Debug)]
pub(super) struct Bell {
    map: SharedMap,
    offer: MapOffer,
    event: OwnedFd,
    woken: AtomicBool,
    /// Kept open for the peers that map the bell.
    _memory: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let (memory, offer, map) = SharedMap::create("heliostat-bell", BYTES, random()?)?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { map, offer, event, woken: AtomicBool::new(false), _memory: memory })
    }

    /// What a peer on this host needs to ring it.
    pub(super) fn offer(&self) -> MapOffer {
        self.offer
    }

    /// Announces that the engine is about to sleep. Look at everything once more afterwards, then sleep.
    pub(super) fn announce(&self, interest: Interest, sleep: Sleep) -> u32 {
        let count = self.map.u32(COUNT_AT).load(Ordering::Acquire);
        let polls = if sleep == Sleep::Poll { POLLS } else { 0 };
        self.map.u32(SLEEPER_AT).store(interest.word() | polls, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        count
    }

    /// Announces that the engine is awake.
    pub(super) fn retract(&self) {
        self.map.u32(SLEEPER_AT).store(0, Ordering::Relaxed);
    }

    /// Sleeps until the bell rings or has rung since [`Bell::announce`] returned `count`, at most for `time`.
    pub(super) fn sleep(&self, count: u32, time: Duration) {
        let time = Timespec::try_from(time).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        // Every outcome, also an interruption, sends the caller back to look.
        let _ = futex::wait(self.map.u32(COUNT_AT), futex::Flags::empty(), count, Some(&time));
    }

    /// Readable after a ring while the engine sleeps in `poll`.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes the descriptor unreadable again.
    pub(super) fn drain_event(&self) {
        // Not readable is fine too.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// Rings from a thread of this process.
    pub(super) fn ring(&self) {
        fence(Ordering::SeqCst);
        let sleeper = self.map.u32(SLEEPER_AT).load(Ordering::Relaxed);
        if sleeper & POLLS != 0 {
            // Fails only when the counter is full, and then it is readable.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        } else if sleeper != 0 {
            wake(&self.map);
        }
    }

    /// Whether a [`Waker`] rang and nobody has taken note.
    pub(super) fn is_woken(&self) -> bool {
        self.woken.load(Ordering::Acquire)
    }

    /// Whether a [`Waker`] rang since the last call.
    pub(super) fn take_woken(&self) -> bool {
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::Acquire)
    }
}

fn wake(map: &SharedMap) {
    map.u32(COUNT_AT).fetch_add(1, Ordering::Release);
    // Fails only for a bad address.
    let _ = futex::wake(map.u32(COUNT_AT), futex::Flags::empty(), 1);
}

/// The bell of another rank on this host.
#[derive(Debug)]
pub(super) struct RemoteBell {
    map: SharedMap,
}

impl RemoteBell {
    pub(super) fn open(offer: &MapOffer) -> io::Result<Self> {
        Ok(Self { map: SharedMap::open(offer, BYTES)? })
    }

    /// Rings for news of rank `from`, if the owner sleeps and cares for them or they are `Urgent`. Returns whether the
    /// owner sleeps in `poll` and must be woken through its socket.
    #[must_use]
    pub(super) fn ring(&self, from: usize, urgency: Urgency) -> bool {
        fence(Ordering::SeqCst);
        let sleeper = self.map.u32(SLEEPER_AT).load(Ordering::Relaxed);
        let interest = sleeper & ANYONE;
        if interest == 0 {
            return false;
        }
        if urgency == Urgency::Normal && interest != ANYONE && interest != Interest::Rank(from).word() {
            return false;
        }
        if sleeper & POLLS != 0 {
            return true;
        }
        wake(&self.map);
        false
    }
}

/// Whether news must reach an engine that sleeps for another rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    Normal,
    Urgent,
}

/// Ends the calls of one [`super::Fabric`], or of the `connect` that makes it, from any thread and for good.
#[derive(Clone, Debug, Default)]
pub struct Abort {
    state: Arc<AbortState>,
}

#[derive(Debug, Default)]
struct AbortState {
    reason: OnceLock<u64>,
    bells: Mutex<Vec<Weak<Bell>>>,
}

impl Abort {
    /// A flag that nobody has raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every blocked and every later call return [`super::FabricError::Aborted`] with this reason. The first
    /// reason stays.
    pub fn abort(&self, reason: u64) {
        self.state.reason.get_or_init(|| reason);
        let bells = self.state.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.iter().filter_map(Weak::upgrade).for_each(|bell| bell.ring());
    }

    /// The reason, once it was raised.
    pub fn reason(&self) -> Option<u64> {
        self.state.reason.get().copied()
    }

    /// Rings this bell too.
    pub(super) fn attach(&self, bell: &Arc<Bell>) {
        let mut bells = self.state.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(|known| known.strong_count() > 0 && !std::ptr::eq(known.as_ptr(), Arc::as_ptr(bell)));
        bells.push(Arc::downgrade(bell));
    }
}

/// Ends a [`super::Fabric::wait`] from any thread. Stays good over all epochs of its listener; a wake while nobody
/// waits ends the next wait.
#[derive(Clone, Debug)]
pub struct Waker {
    bell: Arc<Bell>,
}

impl Waker {
    pub(super) fn new(bell: Arc<Bell>) -> Self {
        Self { bell }
    }

    /// Makes the present or the next wait return [`super::Event::Woken`].
    pub fn wake(&self) {
        self.bell.woken.store(true, Ordering::Release);
        self.bell.ring();
    }
}

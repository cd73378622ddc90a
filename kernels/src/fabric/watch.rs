//! Watches the processes behind links through shared memory while the engine thread sleeps on its bell.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::bell::Bell;
use super::peer::{State, liveness};

const LEFT: u8 = 1;
const LOST: u8 = 2;

/// A thread that reads the connections of one fabric and rings its bell when one ends. Ends with this value.
#[derive(Debug)]
pub(super) struct Watch {
    news: Arc<News>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct News {
    any: AtomicBool,
    states: Vec<AtomicU8>,
}

impl Watch {
    /// Watches the connections to these ranks, which are below `world`.
    pub(super) fn start(
        streams: Vec<(usize, Arc<TcpStream>)>,
        world: usize,
        bell: Arc<Bell>,
    ) -> io::Result<Self> {
        let states = std::iter::repeat_with(|| AtomicU8::new(0)).take(world).collect();
        let news = Arc::new(News { any: AtomicBool::new(false), states });
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let thread = std::thread::Builder::new().name("fabric-watch".to_owned()).spawn({
            let (news, stop) = (news.clone(), stop.clone());
            move || watch(streams, &stop, &news, &bell)
        })?;
        Ok(Self { news, stop, thread: Some(thread) })
    }

    /// Calls `tell` for every rank whose connection has ended, if there is one.
    pub(super) fn each(&self, mut tell: impl FnMut(usize, State)) {
        if !self.news.any.load(Ordering::Acquire) {
            return;
        }
        for (rank, state) in self.news.states.iter().enumerate() {
            match state.load(Ordering::Acquire) {
                LEFT => tell(rank, State::Left),
                LOST => tell(rank, State::Lost),
                _ => {}
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

fn watch(mut streams: Vec<(usize, Arc<TcpStream>)>, stop: &OwnedFd, news: &News, bell: &Bell) {
    while !streams.is_empty() {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(streams.iter().map(|(_, stream)| PollFd::new(&**stream, PollFlags::IN)));
        // An interruption finds nothing readable and comes back here.
        let _ = poll(&mut fds, None);
        if !fds[0].revents().is_empty() {
            return;
        }
        let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        streams.retain(|(rank, stream)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            let Some(state) = liveness(stream) else { return true };
            news.states[*rank].store(if state == State::Left { LEFT } else { LOST }, Ordering::Release);
            news.any.store(true, Ordering::Release);
            bell.ring();
            false
        });
    }
}

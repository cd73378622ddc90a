//! The listener of a rank process: greets dialers of every epoch and keeps them until this rank connects at theirs.
//!
//! One thread, which never waits for a single stranger: messages have one size, greetings have a deadline, and their
//! number is bounded.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::bell::{Bell, Waker};
use super::connect::{self, Connect};
use super::endpoint::{Endpoint, HostId};
use super::error::FabricError;
use super::handshake::{End, Hello, MESSAGE_BYTES, Message, Nonce, Refusal, nonce, prove, verify};
use super::links::Fabric;
use super::peer::would_block;

/// How long a stranger may take to introduce itself.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Most strangers at one time; the oldest goes first.
const GREETINGS_MAX: usize = 512;
/// Most greeted dialers that wait for this rank; those of the oldest epoch go first.
const PARKED_MAX: usize = 4096;

/// Accepts links from other ranks, over all epochs, as long as it lives.
#[derive(Debug)]
pub struct FabricListener {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and `connect` share.
#[derive(Debug)]
pub(super) struct Shared {
    pub bell: Arc<Bell>,
    pub secret: Option<Vec<u8>>,
    pub endpoint: Endpoint,
    hall: Mutex<Hall>,
}

/// Greeted dialers.
#[derive(Debug, Default)]
pub(super) struct Hall {
    /// Dialers of older epochs are refused.
    pub epoch: u64,
    /// By epoch and rank.
    pub parked: BTreeMap<(u64, u32), (Hello, TcpStream)>,
}

impl Shared {
    pub(super) fn hall(&self) -> MutexGuard<'_, Hall> {
        self.hall.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FabricListener {
    /// Listens on a concrete address; port 0 picks a free one. With a secret only ranks that know it can link.
    pub fn bind(address: SocketAddr, secret: Option<Vec<u8>>) -> Result<Self, FabricError> {
        if address.ip().is_unspecified() {
            let what =
                format!("{address} names no host: bind the fabric to the address that other ranks reach");
            return Err(FabricError::Argument(what));
        }
        let refused = || FabricError::io(format!("listening on {address}"));
        let listener = TcpListener::bind(address).map_err(refused())?;
        listener.set_nonblocking(true).map_err(refused())?;
        let address = listener.local_addr().map_err(refused())?;
        let host = HostId::current().map_err(FabricError::io("reading the host id"))?;
        let bell = Arc::new(Bell::new().map_err(FabricError::io("making the doorbell"))?);
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| refused()(error.into()))?;
        let (stop, hall) = (Arc::new(stop), Mutex::default());
        let shared = Arc::new(Shared { bell, secret, endpoint: Endpoint { host, address }, hall });
        let thread = std::thread::Builder::new()
            .name("fabric-listen".to_owned())
            .spawn({
                let (shared, stop) = (shared.clone(), stop.clone());
                move || Greeter { listener, shared, greetings: Vec::new() }.run(&stop)
            })
            .map_err(FabricError::io("starting the listener"))?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }

    /// What the other ranks need to reach this one.
    pub fn endpoint(&self) -> Endpoint {
        self.shared.endpoint.clone()
    }

    /// Ends [`Fabric::wait`] of every fabric that this listener makes.
    pub fn waker(&self) -> Waker {
        Waker::new(self.shared.bell.clone())
    }

    /// Links this rank with all others. Every rank calls it with the same epoch and endpoints, in any order; it returns
    /// when all ranks have all their links.
    ///
    /// Ends early when `how.abort` is raised and when a rank turns out to be at a newer epoch. May be called again,
    /// also for the same epoch. Drop the fabric of the epoch before first.
    pub fn connect(&self, how: Connect<'_>) -> Result<Fabric, FabricError> {
        connect::connect(&self.shared, how)
    }
}

impl Drop for FabricListener {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

/// The thread.
struct Greeter {
    listener: TcpListener,
    shared: Arc<Shared>,
    greetings: Vec<Greeting>,
}

/// A stranger on the way in.
struct Greeting {
    stream: TcpStream,
    inbox: [u8; MESSAGE_BYTES],
    filled: usize,
    hello: Option<(Hello, Nonce)>,
    deadline: Instant,
}

/// What became of a stranger.
enum Outcome {
    /// More must arrive.
    Pending,
    /// It knows the secret.
    Greeted(Hello),
    /// It is sent away.
    Dismissed,
}

impl Greeter {
    fn run(mut self, stop: &OwnedFd) {
        loop {
            let now = Instant::now();
            self.greetings.retain(|greeting| greeting.deadline > now);
            let wait = self.greetings.iter().map(|greeting| greeting.deadline - now).min();
            let wait = wait.and_then(|wait| Timespec::try_from(wait + Duration::from_millis(1)).ok());
            let mut fds = vec![PollFd::new(stop, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            fds.extend(self.greetings.iter().map(|greeting| PollFd::new(&greeting.stream, PollFlags::IN)));
            // An interruption finds nothing ready and comes back here.
            let _ = poll(&mut fds, wait.as_ref());
            if !fds[0].revents().is_empty() {
                return;
            }
            let knock = !fds[1].revents().is_empty();
            let ready: Vec<bool> = fds[2..].iter().map(|fd| !fd.revents().is_empty()).collect();
            for at in (0..ready.len()).rev().filter(|&at| ready[at]) {
                match self.greetings[at].advance(self.shared.secret.as_deref()) {
                    Outcome::Pending => {}
                    Outcome::Dismissed => drop(self.greetings.swap_remove(at)),
                    Outcome::Greeted(hello) => {
                        let greeting = self.greetings.swap_remove(at);
                        self.park(hello, greeting.stream);
                    }
                }
            }
            if knock {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_err() || stream.set_nodelay(true).is_err() {
                    return;
                }
                if self.greetings.len() >= GREETINGS_MAX {
                    let oldest = (0..self.greetings.len()).min_by_key(|&at| self.greetings[at].deadline);
                    oldest.map(|at| self.greetings.swap_remove(at));
                }
                let deadline = Instant::now() + GREETING_TIME;
                let inbox = [0; MESSAGE_BYTES];
                self.greetings.push(Greeting { stream, inbox, filled: 0, hello: None, deadline });
            }
            Err(error) if would_block(&error) => {}
            // Out of descriptors or a stranger that is gone again: slow down rather than spin on it.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }

    fn park(&self, hello: Hello, stream: TcpStream) {
        let mut hall = self.shared.hall();
        if hello.epoch < hall.epoch {
            return refuse_stale(&stream, hall.epoch);
        }
        if hall.parked.len() >= PARKED_MAX {
            hall.parked.pop_first();
        }
        hall.parked.insert((hello.epoch, hello.from), (hello, stream));
        drop(hall);
        self.shared.bell.ring();
    }
}

/// Tells a dialer of an older epoch where this rank is.
pub(super) fn refuse_stale(mut stream: &TcpStream, newer: u64) {
    // The dialer asks again if it does not hear this.
    let _ = stream.write_all(&Message::Refused(Refusal::Stale { newer }).encode());
}

impl Greeting {
    /// Reads what has arrived and answers it.
    fn advance(&mut self, secret: Option<&[u8]>) -> Outcome {
        match self.stream.read(&mut self.inbox[self.filled..]) {
            Ok(0) => return Outcome::Dismissed,
            Ok(bytes) => self.filled += bytes,
            Err(error) if would_block(&error) => return Outcome::Pending,
            Err(_) => return Outcome::Dismissed,
        }
        if self.filled < MESSAGE_BYTES {
            return Outcome::Pending;
        }
        self.filled = 0;
        match (self.hello, Message::decode(&self.inbox)) {
            (None, Ok(Message::Hello(hello))) => self.challenge(hello, secret),
            (Some((hello, nonce)), Ok(Message::Proof(proof))) => {
                if verify(secret, End::Dialer, &hello, &nonce, &proof) {
                    return Outcome::Greeted(hello);
                }
                // Best effort: the stranger is sent away in any case.
                let _ = self.stream.write_all(&Message::Refused(Refusal::Secret).encode());
                Outcome::Dismissed
            }
            _ => Outcome::Dismissed,
        }
    }

    fn challenge(&mut self, hello: Hello, secret: Option<&[u8]>) -> Outcome {
        let Ok(nonce) = nonce() else { return Outcome::Dismissed };
        self.hello = Some((hello, nonce));
        let proof = prove(secret, End::Acceptor, &hello, &nonce);
        match self.stream.write_all(&Message::Challenge { nonce, proof }.encode()) {
            Ok(()) => Outcome::Pending,
            Err(_) => Outcome::Dismissed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello { epoch: 3, from: 1, to: 0, world: 2, nonce: [7; 16] };

    /// Says hello and answers the challenge, whoever the listener is. Returns what it says then.
    fn intrude(listener: &FabricListener, secret: Option<&[u8]>) -> Option<Message> {
        let mut stream = TcpStream::connect(listener.endpoint().address).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut inbox = [0; MESSAGE_BYTES];
        stream.write_all(&Message::Hello(HELLO).encode()).unwrap();
        stream.read_exact(&mut inbox).unwrap();
        let Ok(Message::Challenge { nonce, .. }) = Message::decode(&inbox) else { panic!("no challenge") };
        let proof = prove(secret, End::Dialer, &HELLO, &nonce);
        stream.write_all(&Message::Proof(proof).encode()).unwrap();
        stream.read_exact(&mut inbox).ok().map(|()| Message::decode(&inbox).unwrap())
    }

    #[test]
    fn a_dialer_with_a_wrong_proof_is_never_let_in() {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = FabricListener::bind(address, Some(b"secret".to_vec())).unwrap();
        for wrong in [Some(&b"other"[..]), None] {
            assert_eq!(intrude(&listener, wrong), Some(Message::Refused(Refusal::Secret)));
            assert!(listener.shared.hall().parked.is_empty());
        }
        assert_eq!(intrude(&listener, Some(b"secret")), None, "it waits for this rank to connect");
        assert!(listener.shared.hall().parked.contains_key(&(3, 1)));
        assert!(FabricListener::bind(SocketAddr::from(([0, 0, 0, 0], 0)), None).is_err(), "names no host");
    }
}

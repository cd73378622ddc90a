//! How two ranks become linked: the handshake of [`super::handshake`] as a state machine that never blocks.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::bell::{Bell, RemoteBell};
use super::endpoint::Endpoint;
use super::frame::Pool;
use super::handshake::{
    End, Hello, MESSAGE_BYTES, MemoryOffer, Message, Refusal, nonce, prove, random, verify,
};
use super::peer::{Ahead, Link, MemoryLink, Peer, PeerParts, would_block};
use super::ring::{Consumer, Producer, SharedMap, capacity_for, is_mapping, mapping_bytes};

/// How long the listener of a rank may take to answer a dialer.
const ANSWER_TIME: Duration = Duration::from_secs(3);
/// A silent connection is probed after this time, and given up after a few probes without an answer.
const PROBE_TIME: Duration = Duration::from_secs(2);
const PROBES: u32 = 3;

/// What all pairings of one `connect` share.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub epoch: u64,
    pub rank: usize,
    pub endpoints: &'a [Endpoint],
    pub secret: Option<&'a [u8]>,
    pub bell: &'a Bell,
    /// Memory may be shared with the ranks of this host.
    pub share_memory: bool,
    pub ring_bytes: usize,
    pub frame_bytes_max: usize,
    pub pool: &'a Arc<Pool>,
}

/// Why a pairing failed.
#[derive(Debug)]
pub(super) enum PairError {
    /// It may work the next time.
    Retry(String),
    /// The rank is at a newer epoch.
    Stale { newer: u64 },
}

impl From<io::Error> for PairError {
    fn from(error: io::Error) -> Self {
        Self::Retry(error.to_string())
    }
}

impl From<rustix::io::Errno> for PairError {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// A pairing with one rank.
#[derive(Debug)]
pub(super) struct Pairing {
    rank: usize,
    hello: Hello,
    stream: TcpStream,
    inbox: [u8; MESSAGE_BYTES],
    filled: usize,
    stage: Stage,
    local: Option<LocalMemory>,
    ready_said: bool,
    /// The other rank must have answered by then.
    pub deadline: Option<Instant>,
}

/// The ring that this rank writes. The descriptor stays open until the other rank has mapped it.
#[derive(Debug)]
struct LocalMemory {
    ring: Producer,
    _fd: OwnedFd,
}

/// What the pairing waits for.
#[derive(Debug)]
enum Stage {
    Connecting,
    Challenge,
    Offer,
    Verdict(Option<(Consumer, RemoteBell)>),
    Ready(Option<Link>),
    Done(Option<Link>),
}

impl Pairing {
    /// Starts to dial a rank.
    pub(super) fn dial(group: &Group<'_>, rank: usize) -> Result<Self, PairError> {
        let address = group.endpoints[rank].address;
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(PairError::Retry(format!("dialing {address}: {error}"))),
        }
        let hello = Hello {
            epoch: group.epoch,
            from: group.rank as u32,
            to: rank as u32,
            world: group.endpoints.len() as u32,
            nonce: nonce()?,
        };
        Ok(Self {
            rank,
            hello,
            stream: socket.into(),
            inbox: [0; MESSAGE_BYTES],
            filled: 0,
            stage: Stage::Connecting,
            local: None,
            ready_said: false,
            deadline: Some(Instant::now() + ANSWER_TIME),
        })
    }

    /// Goes on with a dialer whom the listener has greeted.
    pub(super) fn welcome(group: &Group<'_>, hello: Hello, stream: TcpStream) -> Result<Self, PairError> {
        let mut pairing = Self {
            rank: hello.from as usize,
            hello,
            stream,
            inbox: [0; MESSAGE_BYTES],
            filled: 0,
            stage: Stage::Offer,
            local: None,
            ready_said: false,
            deadline: None,
        };
        if hello.to as usize != group.rank || hello.world as usize != group.endpoints.len() {
            pairing.say(&Message::Refused(Refusal::Misdirected))?;
            let (to, world) = (hello.to, hello.world);
            let what = format!("rank {} takes this one for rank {to} of {world}", hello.from);
            return Err(PairError::Retry(what));
        }
        pairing.prepare()?;
        pairing.offer(group)?;
        Ok(pairing)
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether the connection must become writable, not readable, for the next step.
    pub(super) fn is_connecting(&self) -> bool {
        matches!(self.stage, Stage::Connecting)
    }

    /// Whether this rank has its link; the other one may still wait for others.
    pub(super) fn is_linked(&self) -> bool {
        matches!(self.stage, Stage::Ready(_) | Stage::Done(_))
    }

    /// Whether the other rank has all its links too.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done(_))
    }

    /// Tells the other rank, once, that this one has all its links.
    pub(super) fn say_ready(&mut self) -> Result<(), PairError> {
        if self.ready_said {
            return Ok(());
        }
        self.ready_said = true;
        self.say(&Message::Ready)
    }

    /// The link, once it is done.
    pub(super) fn into_peer(self, group: &Group<'_>) -> Option<Peer> {
        let Stage::Done(Some(link)) = self.stage else { return None };
        Some(Peer::new(PeerParts {
            rank: self.rank,
            local: group.rank,
            stream: self.stream,
            link,
            frame_bytes_max: group.frame_bytes_max,
            pool: group.pool.clone(),
        }))
    }

    /// Goes as far as it can without waiting.
    pub(super) fn advance(&mut self, group: &Group<'_>) -> Result<(), PairError> {
        if self.is_connecting() {
            let address: SocketAddr = group.endpoints[self.rank].address;
            sockopt::socket_error(&self.stream)?
                .map_err(|error| PairError::Retry(format!("dialing {address}: {error}")))?;
            self.prepare()?;
            self.say(&Message::Hello(self.hello))?;
            self.stage = Stage::Challenge;
        }
        while !self.is_done() {
            let Some(message) = self.hear()? else { return Ok(()) };
            self.answer(message, group)?;
        }
        Ok(())
    }

    fn answer(&mut self, message: Message, group: &Group<'_>) -> Result<(), PairError> {
        match (&mut self.stage, message) {
            (Stage::Challenge, Message::Challenge { nonce, proof }) => {
                if !verify(group.secret, End::Acceptor, &self.hello, &nonce, &proof) {
                    return Err(PairError::Retry("it does not know the secret of this group".to_owned()));
                }
                let proof = prove(group.secret, End::Dialer, &self.hello, &nonce);
                self.say(&Message::Proof(proof))?;
                self.offer(group)?;
                self.deadline = None;
                self.stage = Stage::Offer;
            }
            (Stage::Offer, Message::Offer(offer)) => {
                let mapped = offer.filter(|_| self.local.is_some()).and_then(|offer| open(&offer).ok());
                self.say(&Message::Verdict { mapped: mapped.is_some() })?;
                self.stage = Stage::Verdict(mapped);
            }
            (Stage::Verdict(mapped), Message::Verdict { mapped: theirs }) => {
                let link = match (mapped.take().filter(|_| theirs), self.local.take()) {
                    (Some((into, bell)), Some(LocalMemory { ring, .. })) => {
                        Link::Memory(Box::new(MemoryLink { out: ring, into, bell }))
                    }
                    _ => Link::Tcp(Ahead::new()),
                };
                self.stage = Stage::Ready(Some(link));
            }
            (Stage::Ready(link), Message::Ready) => self.stage = Stage::Done(link.take()),
            (_, Message::Refused(Refusal::Stale { newer })) => return Err(PairError::Stale { newer }),
            (_, Message::Refused(Refusal::Secret)) => {
                return Err(PairError::Retry("it says that this rank has another secret".to_owned()));
            }
            (_, Message::Refused(Refusal::Misdirected)) => {
                return Err(PairError::Retry(
                    "it says that it is another rank, or of another group".to_owned(),
                ));
            }
            (_, message) => return Err(PairError::Retry(format!("it sent {message:?} out of turn"))),
        }
        Ok(())
    }

    fn prepare(&self) -> Result<(), PairError> {
        self.stream.set_nodelay(true)?;
        let keep =
            |result: rustix::io::Result<()>| result.map_err(|error| PairError::Retry(error.to_string()));
        keep(sockopt::set_socket_keepalive(&self.stream, true))?;
        keep(sockopt::set_tcp_keepidle(&self.stream, PROBE_TIME))?;
        keep(sockopt::set_tcp_keepintvl(&self.stream, PROBE_TIME))?;
        keep(sockopt::set_tcp_keepcnt(&self.stream, PROBES))
    }

    /// Offers shared memory where it can work. Failing to make it is no reason not to link.
    fn offer(&mut self, group: &Group<'_>) -> Result<(), PairError> {
        let near = group.endpoints[self.rank].host == group.endpoints[group.rank].host;
        let memory = if near && group.share_memory { local_memory(group).ok() } else { None };
        let (local, offer) = memory.unzip();
        self.local = local;
        self.say(&Message::Offer(offer))
    }

    /// A fresh connection has room for the few messages of a handshake; one that has not is given up.
    fn say(&mut self, message: &Message) -> Result<(), PairError> {
        Ok(self.stream.write_all(&message.encode())?)
    }

    fn hear(&mut self) -> Result<Option<Message>, PairError> {
        match self.stream.read(&mut self.inbox[self.filled..]) {
            Ok(0) => return Err(PairError::Retry("it closed the connection".to_owned())),
            Ok(bytes) => self.filled += bytes,
            Err(error) if would_block(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if self.filled < MESSAGE_BYTES {
            return Ok(None);
        }
        self.filled = 0;
        Message::decode(&self.inbox).map(Some).map_err(PairError::Retry)
    }
}

fn local_memory(group: &Group<'_>) -> io::Result<(LocalMemory, MemoryOffer)> {
    let bytes = mapping_bytes(capacity_for(group.ring_bytes));
    let (fd, ring, map) = SharedMap::create("heliostat-ring", bytes, random()?)?;
    let offer = MemoryOffer { ring, bell: group.bell.offer() };
    Ok((LocalMemory { ring: Producer::new(map), _fd: fd }, offer))
}

fn open(offer: &MemoryOffer) -> io::Result<(Consumer, RemoteBell)> {
    if !is_mapping(offer.ring.bytes) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let ring = SharedMap::open(&offer.ring, offer.ring.bytes as usize)?;
    Ok((Consumer::new(ring), RemoteBell::open(&offer.bell)?))
}

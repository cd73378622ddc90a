//! One end of the link to one other rank: bytes out, frames in.
//!
//! Never blocks. The connection is the link itself, or else tells whether the process behind the shared memory lives.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use super::bell::{RemoteBell, Urgency};
use super::error::FabricError;
use super::frame::{Assembled, Assembler, Frame, HEADER_BYTES, Head, Pool, Tag, encode};
use super::ring::{Consumer, Producer};

/// On the connection of a link through shared memory: wakes an engine that sleeps in `poll`.
const POKE: u8 = 1;
/// On the connection of a link through shared memory: the sender leaves in peace.
const BYE: u8 = 2;

/// Most bytes that one push moves into a ring, so that the other side starts to read while this one still writes.
const PUSH_BYTES: usize = 256 << 10;
/// Most bytes to take in and throw away when leaving.
const LEAVE_BYTES: usize = 64 << 20;
/// Reads into frames from this size on go straight into the frame.
const AHEAD_BYTES: usize = 16 << 10;

/// How bytes travel to and from the rank.
#[derive(Debug)]
pub(super) enum Link {
    /// Two rings and the bell of the other rank.
    Memory(Box<MemoryLink>),
    /// The connection, with bytes that were read ahead.
    Tcp(Ahead),
}

#[derive(Debug)]
pub(super) struct MemoryLink {
    pub out: Producer,
    pub into: Consumer,
    pub bell: RemoteBell,
}

/// Bytes that a read brought beyond what was asked for.
#[derive(Debug)]
pub(super) struct Ahead {
    bytes: Box<[u8; AHEAD_BYTES]>,
    start: usize,
    end: usize,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { bytes: Box::new([0; AHEAD_BYTES]), start: 0, end: 0 }
    }

    /// Reads for `target`: large pieces directly, small ones by way of this buffer. A read that brings less than it
    /// could have taken has `drained` the connection; then only what was read ahead is left to give.
    fn read(&mut self, mut stream: &TcpStream, target: &mut [u8], drained: &mut bool) -> io::Result<usize> {
        if self.start == self.end {
            if *drained {
                return Ok(0);
            }
            if target.len() >= AHEAD_BYTES {
                let bytes = end_is_error(stream.read(target)?)?;
                *drained = bytes < target.len();
                return Ok(bytes);
            }
            (self.start, self.end) = (0, 0);
            self.end = end_is_error(stream.read(&mut self.bytes[..])?)?;
            *drained = self.end < AHEAD_BYTES;
        }
        let len = target.len().min(self.end - self.start);
        target[..len].copy_from_slice(&self.bytes[self.start..][..len]);
        self.start += len;
        Ok(len)
    }
}

/// Whether the rank is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is.
    Linked,
    /// It dropped its fabric; all that it sent has arrived.
    Left,
    /// Its connection ended without a word.
    Lost,
    /// It sent nonsense, or a frame to it was cut off.
    Broken(String),
}

/// The link to one rank.
#[derive(Debug)]
pub(super) struct Peer {
    rank: usize,
    local: usize,
    stream: Arc<TcpStream>,
    link: Link,
    assembler: Assembler,
    sent: u64,
    state: State,
}

/// What a peer is made of.
#[derive(Debug)]
pub(super) struct PeerParts {
    pub rank: usize,
    pub local: usize,
    pub stream: TcpStream,
    pub link: Link,
    pub frame_bytes_max: usize,
    pub pool: Arc<Pool>,
}

impl Peer {
    pub(super) fn new(parts: PeerParts) -> Self {
        Self {
            rank: parts.rank,
            local: parts.local,
            stream: Arc::new(parts.stream),
            link: parts.link,
            assembler: Assembler::new(parts.frame_bytes_max, parts.pool),
            sent: 0,
            state: State::Linked,
        }
    }

    pub(super) fn stream(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    pub(super) fn is_memory(&self) -> bool {
        matches!(self.link, Link::Memory(_))
    }

    pub(super) fn state(&self) -> &State {
        &self.state
    }

    pub(super) fn set_state(&mut self, state: State) {
        if self.state == State::Linked || (self.state == State::Left && matches!(state, State::Broken(_))) {
            self.state = state;
        }
    }

    /// Payload bytes set aside for a frame that is still arriving.
    pub(super) fn reserved(&self) -> usize {
        self.assembler.reserved()
    }

    /// The header of the next frame to this rank.
    pub(super) fn begin(&mut self, tag: Tag, len: usize) -> [u8; HEADER_BYTES] {
        let header = encode(Head::Frame(tag, len), self.sent);
        self.sent += 1;
        header
    }

    /// Moves bytes from the front of `slices` towards the rank as far as there is room. Returns how many.
    pub(super) fn push(&mut self, slices: &[IoSlice<'_>]) -> Result<usize, FabricError> {
        match &mut self.link {
            Link::Tcp(_) => match (&*self.stream).write_vectored(slices) {
                Ok(bytes) => Ok(bytes),
                Err(error) if would_block(&error) => Ok(0),
                Err(_) => {
                    self.set_state(State::Lost);
                    Err(self.failure())
                }
            },
            Link::Memory(link) => {
                let pushed = fill(&mut link.out, slices);
                match pushed {
                    Ok(0) => Ok(0),
                    Ok(bytes) => {
                        link.out.publish();
                        self.ring(Urgency::Normal);
                        Ok(bytes)
                    }
                    Err(what) => {
                        self.set_state(State::Broken(what));
                        Err(self.failure())
                    }
                }
            }
        }
    }

    /// Asks the rank to ring once it has made room, and wakes it if it sleeps. Without effect on a TCP link.
    pub(super) fn want_room(&mut self, bytes: usize) {
        if let Link::Memory(link) = &self.link {
            link.out.want_room(bytes.min(link.out.capacity() / 2).max(1));
            self.ring(Urgency::Urgent);
        }
    }

    /// Takes [`Peer::want_room`] back.
    pub(super) fn want_no_room(&mut self) {
        if let Link::Memory(link) = &self.link {
            link.out.want_room(0);
        }
    }

    /// Whether [`Peer::push`] could move at least a part of `bytes` now. Unknown on a TCP link: no.
    pub(super) fn has_room(&mut self, bytes: usize) -> bool {
        match &mut self.link {
            Link::Tcp(_) => false,
            Link::Memory(link) => {
                let wanted = bytes.min(link.out.capacity() / 2).max(1);
                link.out.room().is_ok_and(|room| room >= wanted)
            }
        }
    }

    /// Moves arrived bytes into frames and appends whole ones. Returns how many bytes moved.
    pub(super) fn pull(&mut self, frames: &mut VecDeque<Frame>, budget: usize) -> Result<usize, FabricError> {
        let (mut moved, mut released, mut drained) = (0, 0, false);
        while moved < budget && !matches!(self.state, State::Broken(_)) {
            if moved - released >= PUSH_BYTES {
                self.release();
                released = moved;
            }
            let target = self.assembler.target();
            let wanted = target.len().min(PUSH_BYTES);
            let target = &mut target[..wanted];
            let read = match &mut self.link {
                Link::Memory(link) => link.into.read(target),
                Link::Tcp(ahead) => match ahead.read(&self.stream, target, &mut drained) {
                    Ok(bytes) => Ok(bytes),
                    Err(error) if would_block(&error) => Ok(0),
                    Err(_) => {
                        self.set_state(State::Lost);
                        break;
                    }
                },
            };
            let done = read.and_then(|bytes| {
                moved += bytes;
                let assembled = if bytes == 0 { None } else { self.assembler.advance(bytes)? };
                Ok((bytes, assembled))
            });
            match done {
                Err(what) => {
                    self.set_state(State::Broken(what));
                    return Err(self.failure());
                }
                Ok((_, Some(Assembled::Frame(frame)))) => frames.push_back(frame),
                Ok((_, Some(Assembled::Bye))) => self.set_state(State::Left),
                Ok((0, None)) => break,
                Ok((_, None)) => {}
            }
        }
        if moved > released {
            self.release();
        }
        Ok(moved)
    }

    /// Gives the room of what was pulled back to the rank.
    fn release(&self) {
        if let Link::Memory(link) = &self.link
            && link.into.release()
        {
            self.ring(Urgency::Normal);
        }
    }

    /// Reads the connection of a link through shared memory, which says only whether the rank lives.
    pub(super) fn check_liveness(&mut self) {
        if let Some(state) = liveness(&self.stream) {
            self.set_state(state);
        }
    }

    /// Says farewell and closes, so that the rank does not take the end of the connection for a death.
    pub(super) fn leave(&mut self) {
        // Closing with unread bytes would reset a TCP link and take back what is still on its way to the rank.
        let _ = self.pull(&mut VecDeque::new(), LEAVE_BYTES);
        let mut stream = &*self.stream;
        // The rank may be gone already, or not be reading: then it sees a loss, which is what it must assume anyway.
        let _ = match self.link {
            Link::Memory(_) => stream.write_all(&[BYE]),
            Link::Tcp(_) => stream.write_all(&encode(Head::Bye, self.sent)),
        };
        self.close();
    }

    /// Closes without a farewell.
    pub(super) fn close(&mut self) {
        // Fails when the rank has reset the connection.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The error of a call that needs this rank when it is not linked.
    pub(super) fn failure(&self) -> FabricError {
        match &self.state {
            State::Broken(what) => FabricError::Protocol { rank: self.rank, what: what.clone() },
            State::Linked | State::Left | State::Lost => FabricError::PeerLost { rank: self.rank },
        }
    }

    fn ring(&self, urgency: Urgency) {
        if let Link::Memory(link) = &self.link
            && link.bell.ring(self.local, urgency)
        {
            // A full buffer holds unread pokes; a broken connection shows elsewhere.
            let _ = (&*self.stream).write(&[POKE]);
        }
    }
}

/// Writes what fits of `slices`, up to [`PUSH_BYTES`].
fn fill(ring: &mut Producer, slices: &[IoSlice<'_>]) -> Result<usize, String> {
    let mut pushed = 0;
    for slice in slices {
        let wanted = slice.len().min(PUSH_BYTES - pushed);
        let bytes = ring.write(&slice[..wanted])?;
        pushed += bytes;
        if bytes < slice.len() {
            break;
        }
    }
    Ok(pushed)
}

fn end_is_error(bytes: usize) -> io::Result<usize> {
    if bytes == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

/// What the connection of a link through shared memory says: nothing new, a farewell, or the end.
pub(super) fn liveness(mut stream: &TcpStream) -> Option<State> {
    let mut bytes = [0; 64];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Some(State::Lost),
            Ok(read) if bytes[..read].contains(&BYE) => return Some(State::Left),
            Ok(_) => {}
            Err(error) if would_block(&error) => return None,
            Err(_) => return Some(State::Lost),
        }
    }
}

pub(super) fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::bell::Bell;
    use super::super::frame::Kind;
    use super::super::ring::{SharedMap, mapping_bytes};
    use super::*;

    const TAG: Tag = Tag { kind: Kind::Dispatch, step: 1, layer: 2 };

    /// A link of rank 0 to rank 1, and what rank 1 holds of it: its ring, its end of the connection.
    fn link(memory: bool) -> (Peer, Producer, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let ring = || SharedMap::create("test", mapping_bytes(4096), 1).unwrap();
        let (_kept, offer, theirs) = ring();
        let ours = SharedMap::open(&offer, mapping_bytes(4096)).unwrap();
        let bell = Bell::new().unwrap();
        let bell = RemoteBell::open(&bell.offer()).unwrap();
        let link = if memory {
            Link::Memory(Box::new(MemoryLink {
                out: Producer::new(ring().2),
                into: Consumer::new(ours),
                bell,
            }))
        } else {
            Link::Tcp(Ahead::new())
        };
        let (frame_bytes_max, pool) = (1 << 20, Arc::default());
        let peer = Peer::new(PeerParts { rank: 1, local: 0, stream, link, frame_bytes_max, pool });
        (peer, Producer::new(theirs), other)
    }

    fn pull_all(peer: &mut Peer) -> (VecDeque<Frame>, Result<(), FabricError>) {
        let mut frames = VecDeque::new();
        loop {
            match peer.pull(&mut frames, usize::MAX) {
                Ok(0) => return (frames, Ok(())),
                Ok(_) => {}
                Err(error) => return (frames, Err(error)),
            }
        }
    }

    /// (FB-4) Frames before the nonsense arrive, the nonsense is an error, and the link stays broken.
    #[test]
    fn nonsense_from_a_peer_is_a_protocol_error() {
        let good = [&encode(Head::Frame(TAG, 3), 0)[..], b"abc"].concat();
        let cases = [
            ("random bytes", [0x5a; 40].to_vec(), "checksum"),
            ("a frame twice", good.clone(), "checksum"),
            ("a huge frame", encode(Head::Frame(TAG, 1 << 40), 1).to_vec(), "over the limit"),
        ];
        for memory in [true, false] {
            for (name, bad, wanted) in &cases {
                let (mut peer, mut ring, mut stream) = link(memory);
                let bytes = [&good[..], bad].concat();
                if memory {
                    assert_eq!(ring.write(&bytes), Ok(bytes.len()));
                    ring.publish();
                } else {
                    stream.write_all(&bytes).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                let (frames, result) = pull_all(&mut peer);
                assert_eq!(frames.len(), 1, "{name}");
                assert_eq!((frames[0].tag(), frames[0].payload()), (TAG, &b"abc"[..]));
                let error = result.unwrap_err().to_string();
                assert!(
                    error.contains("rank 1 broke the protocol") && error.contains(wanted),
                    "{name}: {error}"
                );
                assert!(matches!(peer.state(), State::Broken(_)));
                assert!(pull_all(&mut peer).0.is_empty(), "a broken link gives nothing more");
            }
        }
    }

    #[test]
    fn the_end_of_a_connection_is_a_loss_unless_the_rank_said_farewell() {
        for memory in [true, false] {
            for farewell in [true, false] {
                let (mut peer, _ring, mut stream) = link(memory);
                let bye = if memory { vec![POKE, BYE] } else { encode(Head::Bye, 0).to_vec() };
                if farewell {
                    stream.write_all(&bye).unwrap();
                }
                drop(stream);
                std::thread::sleep(std::time::Duration::from_millis(5));
                if memory {
                    peer.check_liveness();
                }
                pull_all(&mut peer).1.unwrap();
                assert_eq!(*peer.state(), if farewell { State::Left } else { State::Lost });
                assert!(matches!(peer.failure(), FabricError::PeerLost { rank: 1 }));
            }
        }
    }
}

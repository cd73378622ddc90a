//! The socket between a process and the store of its node: messages, some with a file descriptor.
//!
//! A frame is `[len u32][payload]`, little endian; a descriptor travels with the first byte of its frame.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bincode::{Decode, Encode};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::wire::{from_bytes, to_bytes};

/// Longer frames are not ours.
const FRAME_BYTES_MAX: usize = 64 << 10;
/// Room for one read.
const READ_BYTES: usize = 8 << 10;
/// Descriptors that one read may bring: each comes with a frame of its own, and a read ends where one begins.
const FDS_PER_READ: usize = 4;

/// Sends one message. Two at the same time would mingle: callers see to that.
pub(super) async fn send<M: Encode>(
    stream: &UnixStream,
    message: &M,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let payload = to_bytes(message).map_err(io::Error::other)?;
    let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = len.to_le_bytes().to_vec();
    frame.extend_from_slice(&payload);
    let (mut sent, mut fd) = (0, fd);
    while sent < frame.len() {
        sent += stream.async_io(Interest::WRITABLE, || write(stream, &frame[sent..], fd)).await?;
        fd = None;
    }
    Ok(())
}

fn write(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "there is room for one descriptor");
    }
    Ok(sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// What has arrived on a socket and was not yet taken.
#[derive(Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Inbox {
    /// The next message; `None` when the other side has closed. `carries` says which messages have a descriptor.
    ///
    /// # Errors
    /// The socket fails, or what arrives is no message of this kind.
    pub(super) async fn next<M: Decode<()>>(
        &mut self,
        stream: &UnixStream,
        carries: impl Fn(&M) -> bool,
    ) -> io::Result<Option<(M, Option<OwnedFd>)>> {
        loop {
            if let Some(payload) = self.frame()? {
                let message: M = from_bytes(&payload).map_err(io::Error::other)?;
                let fd = match carries(&message) {
                    true => Some(
                        self.fds.pop_front().ok_or_else(|| io::Error::other("no descriptor came along"))?,
                    ),
                    false => None,
                };
                return Ok(Some((message, fd)));
            }
            if stream.async_io(Interest::READABLE, || self.read(stream)).await? == 0 {
                return Ok(None);
            }
        }
    }

    fn frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(len) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_le_bytes(*len) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(io::Error::other(format!("a frame of {len} bytes is too long")));
        }
        if self.bytes.len() < 4 + len {
            return Ok(None);
        }
        let payload = self.bytes[4..4 + len].to_vec();
        self.bytes.drain(..4 + len);
        Ok(Some(payload))
    }

    fn read(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let mut buf = [0; READ_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_READ))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut buf)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        self.bytes.extend_from_slice(&buf[..received.bytes]);
        Ok(received.bytes)
    }
}

/// Calls `with` with a short path to `path`: that of a socket has room for 107 bytes, and directories may be deep.
pub(super) fn short<T>(path: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other(format!("{} is no path of a socket", path.display())));
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    use std::os::fd::AsRawFd;
    let mut short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    short.push(name);
    with(&short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn descriptors_arrive_with_their_messages() {
        let (here, there) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..20u64).map(|n| super::super::map::memory_file(n + 1).unwrap()).collect();
        for n in 0..20u64 {
            let fd = (n % 3 == 0).then(|| files[n as usize].as_fd());
            send(&here, &(n, vec![0u8; 1000]), fd).await.unwrap();
        }
        drop(here);
        let mut inbox = Inbox::default();
        for n in 0..20u64 {
            let carries = |message: &(u64, Vec<u8>)| message.0.is_multiple_of(3);
            let ((number, _), fd) = inbox.next(&there, carries).await.unwrap().unwrap();
            assert_eq!(number, n);
            let size = fd.map(|fd| rustix::fs::fstat(fd).unwrap().st_size as u64);
            assert_eq!(size, (n % 3 == 0).then_some(n + 1));
        }
        assert!(inbox.next::<(u64, Vec<u8>)>(&there, |_| false).await.unwrap().is_none());
    }
}

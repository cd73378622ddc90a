//! How the ranks of a measurement find each other: one process per GPU, of which the first starts the others and talks to
//! them by pipes. It carries the names of their memory and nothing of the measurement.
//!
//! Whenever they speak, a guest writes one line and reads one with what all have said, at the end of nothing: a peer's memory is
//! not let go while another may still read it.

use std::io::{BufRead, BufReader, Error, ErrorKind, Write};
use std::process::{Child, ChildStdin, ChildStdout};

use heliostat_kernels::cuda::heap::HeapHandle;
use heliostat_kernels::cuda::nccl::NcclId;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// This process's place among the ranks of a measurement.
#[derive(Debug)]
pub enum Meeting {
    /// The first rank, and its guests by rank; without any it computes alone.
    Host(Vec<Guest>),
    /// A rank that another process started.
    Guest {
        /// Its number, from 1.
        rank: usize,
        /// Of all ranks.
        ranks: usize,
    },
}

/// A guest as its host knows it. Dropping it ends the process.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Guest {
    /// Takes over a process whose standard input and output are pipes.
    ///
    /// # Panics
    /// If they are not.
    pub fn new(mut child: Child) -> Self {
        let to = child.stdin.take().expect("standard input is a pipe");
        let from = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        Self { child, to, from }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // One that has ended is only reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Meeting {
    /// This rank.
    pub fn rank(&self) -> usize {
        match self {
            Self::Host(_) => 0,
            Self::Guest { rank, .. } => *rank,
        }
    }

    /// All ranks.
    pub fn ranks(&self) -> usize {
        match self {
            Self::Host(guests) => guests.len() + 1,
            Self::Guest { ranks, .. } => *ranks,
        }
    }

    /// Tells all ranks this rank's heap, and the host's communicator if there is one; returns all heaps by rank.
    ///
    /// # Errors
    /// A rank ended before it was ready.
    pub(super) fn meet(
        &mut self,
        own: HeapHandle,
        nccl: Option<NcclId>,
    ) -> std::io::Result<(Vec<HeapHandle>, Option<NcclId>)> {
        let nccl = nccl.map(|id| id.0.to_vec()).unwrap_or_default();
        let names: Vec<(Vec<u8>, Vec<u8>)> = self.tell_all((own.to_bytes().to_vec(), nccl))?;
        let heap =
            |(bytes, _): &(Vec<u8>, _)| HeapHandle::from_bytes(bytes).ok_or_else(|| bad("names no heap"));
        let heaps = names.iter().map(heap).collect::<Result<_, _>>()?;
        let id = names.into_iter().next().and_then(|(_, nccl)| nccl.try_into().ok()).map(NcclId);
        Ok((heaps, id))
    }

    /// Tells all ranks something and returns what all said, by rank; nobody returns before all have spoken.
    ///
    /// # Errors
    /// A rank ended.
    pub(super) fn tell_all<T>(&mut self, own: T) -> std::io::Result<Vec<T>>
    where
        T: Serialize + DeserializeOwned,
    {
        match self {
            Self::Host(guests) => {
                let mut all = vec![own];
                for guest in guests.iter_mut() {
                    all.push(read(&mut guest.from)?);
                }
                for guest in guests.iter_mut() {
                    write(&mut guest.to, &all)?;
                }
                Ok(all)
            }
            Self::Guest { .. } => {
                write(&mut std::io::stdout().lock(), &own)?;
                read(&mut std::io::stdin().lock())
            }
        }
    }

    /// Waits until no rank needs another's memory any more.
    ///
    /// # Errors
    /// A guest failed after the measurement.
    pub(super) fn part(mut self) -> std::io::Result<()> {
        self.tell_all(())?;
        match &mut self {
            Self::Host(guests) => guests.iter_mut().try_for_each(|guest| guest.child.wait().map(drop)),
            Self::Guest { .. } => Ok(()),
        }
    }
}

fn bad(why: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("a rank of the measurement {why}"))
}

fn write(to: &mut impl Write, what: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_string(what)?;
    line.push('\n');
    to.write_all(line.as_bytes())?;
    to.flush()
}

fn read<T: DeserializeOwned>(from: &mut impl BufRead) -> std::io::Result<T> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err(bad("ended early: see what it said above"));
    }
    serde_json::from_str(&line).map_err(|_| bad("said something else than a name"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn guest(script: &str) -> Guest {
        let mut command = Command::new("sh");
        Guest::new(command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn handle(seed: u8) -> HeapHandle {
        HeapHandle::from_bytes(&[seed; HeapHandle::LEN]).unwrap()
    }

    #[test]
    fn all_ranks_learn_all_names() {
        // Says what it is named, looks for the communicator in what it is told, and waits to be let go.
        let name = serde_json::to_string(&(handle(2).to_bytes().to_vec(), Vec::<u8>::new())).unwrap();
        let script =
            format!("echo '{name}'; read names; case $names in *9,9,9*) echo null;; esac; read end; true");
        let mut host = Meeting::Host(vec![guest(&script)]);
        assert_eq!((host.rank(), host.ranks()), (0, 2));
        let (heaps, nccl) = host.meet(handle(1), Some(NcclId([9; 128]))).unwrap();
        assert_eq!((heaps, nccl), (vec![handle(1), handle(2)], Some(NcclId([9; 128]))));
        host.part().unwrap();
    }

    #[test]
    fn a_rank_that_ends_early_is_an_error() {
        let mut host = Meeting::Host(vec![guest("exit 1")]);
        let why = host.meet(handle(1), None).unwrap_err().to_string();
        assert!(why.contains("ended early"), "{why}");
        let mut host = Meeting::Host(vec![guest("echo hello")]);
        let why = host.meet(handle(1), None).unwrap_err().to_string();
        assert!(why.contains("something else"), "{why}");
    }
}

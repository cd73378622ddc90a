//! How many connections others may hold: strangers who have not greeted yet, by address and in all, and peers.
//!
//! Every stranger also has a time limit (`connect_timeout`), so that places come free again.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Strangers at a time.
pub(super) const STRANGERS_MAX: usize = 1024;
/// Strangers at a time from one address, so that one host cannot keep the others out.
pub(super) const STRANGERS_PER_ADDRESS_MAX: usize = 256;

/// Why somebody does not come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Full {
    #[error("{STRANGERS_MAX} connections are shaking hands already")]
    Strangers,
    #[error("{STRANGERS_PER_ADDRESS_MAX} connections of its address are shaking hands already")]
    Address,
    #[error("{0} connections are open; raise `connections_max`")]
    Peers(usize),
}

/// The gate of a listener.
#[derive(Debug)]
pub(crate) struct Gate {
    peers_max: usize,
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    strangers: HashMap<IpAddr, usize>,
    strangers_in_all: usize,
    peers: usize,
}

impl Gate {
    pub(super) fn new(peers_max: usize) -> Arc<Self> {
        Arc::new(Self { peers_max, inside: Mutex::default() })
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a stranger greet, for as long as the place is kept.
    pub(crate) fn enter(self: &Arc<Self>, from: IpAddr) -> Result<Place, Full> {
        let mut inside = self.inside();
        if inside.peers >= self.peers_max {
            return Err(Full::Peers(self.peers_max));
        }
        if inside.strangers_in_all >= STRANGERS_MAX {
            return Err(Full::Strangers);
        }
        let own = inside.strangers.entry(from).or_default();
        if *own >= STRANGERS_PER_ADDRESS_MAX {
            return Err(Full::Address);
        }
        *own += 1;
        inside.strangers_in_all += 1;
        Ok(Place { gate: self.clone(), stranger: Some(from) })
    }
}

/// A place inside; free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    gate: Arc<Gate>,
    /// Where it came from, until it has greeted.
    stranger: Option<IpAddr>,
}

impl Place {
    /// It has greeted and is a peer from now on, if there is room for one.
    pub(crate) fn greeted(&mut self) -> Result<(), Full> {
        let mut inside = self.gate.inside();
        if inside.peers >= self.gate.peers_max {
            return Err(Full::Peers(self.gate.peers_max));
        }
        if let Some(from) = self.stranger.take() {
            inside.forget(from);
            inside.peers += 1;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.gate.inside();
        match self.stranger.take() {
            Some(from) => inside.forget(from),
            None => inside.peers -= 1,
        }
    }
}

impl Inside {
    fn forget(&mut self, stranger: IpAddr) {
        self.strangers_in_all -= 1;
        if let Some(own) = self.strangers.get_mut(&stranger) {
            *own -= 1;
            if *own == 0 {
                self.strangers.remove(&stranger);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, host])
    }

    #[test]
    fn one_address_does_not_keep_the_others_out() {
        let gate = Gate::new(10);
        let mut first: Vec<Place> =
            (0..STRANGERS_PER_ADDRESS_MAX).map(|_| gate.enter(at(1)).unwrap()).collect();
        assert_eq!(gate.enter(at(1)).unwrap_err(), Full::Address);
        let other = gate.enter(at(2)).unwrap();
        first.pop();
        assert!(gate.enter(at(1)).is_ok(), "a place that was given back");
        drop((first, other));
        assert_eq!(gate.inside().strangers_in_all, 0);
        assert!(gate.inside().strangers.is_empty(), "nothing is kept of who has gone");
    }

    #[test]
    fn strangers_and_peers_are_bounded() {
        let gate = Gate::new(2);
        let strangers: Vec<Place> =
            (0..STRANGERS_MAX).map(|i| gate.enter(at((i % 5) as u8)).unwrap()).collect();
        assert_eq!(gate.enter(at(9)).unwrap_err(), Full::Strangers);
        let mut peers: Vec<Place> = strangers.into_iter().take(3).collect();
        assert_eq!(peers[0].greeted(), Ok(()));
        assert_eq!(peers[1].greeted(), Ok(()));
        assert_eq!(peers[2].greeted(), Err(Full::Peers(2)));
        assert_eq!(gate.enter(at(9)).unwrap_err(), Full::Peers(2), "not even asked");
        peers.remove(0);
        assert_eq!(peers[1].greeted(), Ok(()));
        drop(peers);
        let inside = gate.inside();
        assert_eq!((inside.peers, inside.strangers_in_all), (0, 0));
    }
}

//! Which replica of a user's actor gets a request: the one with fewer calls under way of two that are drawn.
//!
//! Of one caller, an ingress or a replica that asks others. Pure: replicas, requests and draws come in, places go out. (Ray
//! Serve's power of two choices; Mitzenmacher 2001)
//! AP-2: no replica has more requests at once than it may, and who waits longest goes first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A replica in one of its incarnations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Seat {
    /// The replica's number.
    pub(super) number: u64,
    /// Which run of its actor.
    pub(super) incarnation: u64,
}

/// What is so of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Offer {
    /// Replicas that take requests.
    pub(super) open: Vec<Seat>,
    /// Requests that each may have at once.
    pub(super) ongoing_max: u64,
    /// Requests that may wait; none: as many as come.
    pub(super) queued_max: Option<u64>,
}

/// The requests of one deployment.
#[derive(Debug, Default)]
pub(super) struct Balance {
    offer: Offer,
    /// Requests under way, by replica; also at those that take no more.
    ongoing: BTreeMap<u64, u64>,
    /// Those that could not be reached when last tried: taken only where there is no other.
    shaky: BTreeSet<Seat>,
    waiting: VecDeque<Waiter>,
}

/// A request that waits.
#[derive(Debug)]
struct Waiter {
    ticket: u64,
    /// Where it was tried in vain.
    tried: Vec<Seat>,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It goes there.
    Seat(Seat),
    /// It waits for its turn.
    Waits,
    /// So many wait, and no more may.
    Full(u64),
}

impl Balance {
    /// Another offer. Who waits may have a place now: see [`Self::seat_waiting`].
    pub(super) fn set(&mut self, offer: Offer) {
        self.shaky.retain(|seat| offer.open.contains(seat));
        self.offer = offer;
    }

    /// A request comes that was tried there in vain. `draw` gives a number below the one it is given.
    pub(super) fn take(
        &mut self,
        ticket: u64,
        tried: &[Seat],
        draw: &mut impl FnMut(usize) -> usize,
    ) -> Taken {
        if let Some(seat) = self.pick(tried, draw) {
            return Taken::Seat(self.occupy(seat));
        }
        let waiting = self.waiting.len() as u64;
        if self.offer.queued_max.is_some_and(|max| waiting >= max) {
            return Taken::Full(waiting);
        }
        self.waiting.push_back(Waiter { ticket, tried: tried.to_vec() });
        Taken::Waits
    }

    /// Those of the waiting that go now, and where.
    pub(super) fn seat_waiting(&mut self, draw: &mut impl FnMut(usize) -> usize) -> Vec<(u64, Seat)> {
        let mut seated = Vec::new();
        for waiter in std::mem::take(&mut self.waiting) {
            match self.pick(&waiter.tried, draw) {
                Some(seat) => seated.push((waiter.ticket, self.occupy(seat))),
                None => self.waiting.push_back(waiter),
            }
        }
        seated
    }

    /// A request waits no more.
    pub(super) fn leave(&mut self, ticket: u64) {
        self.waiting.retain(|waiter| waiter.ticket != ticket);
    }

    /// A request is done.
    pub(super) fn release(&mut self, seat: Seat) {
        if let Some(ongoing) = self.ongoing.get_mut(&seat.number) {
            *ongoing -= 1;
            if *ongoing == 0 {
                self.ongoing.remove(&seat.number);
            }
        }
    }

    /// A replica was reached, or not.
    pub(super) fn reached(&mut self, seat: Seat, well: bool) {
        if well {
            self.shaky.remove(&seat);
        } else if self.offer.open.contains(&seat) {
            self.shaky.insert(seat);
        }
    }

    /// Whether some replica would take a request that was tried there in vain, now or once it has room.
    pub(super) fn is_open(&self, tried: &[Seat]) -> bool {
        self.offer.open.iter().any(|seat| !tried.contains(seat))
    }

    /// Requests under way and waiting.
    pub(super) fn load(&self) -> u64 {
        self.ongoing.values().sum::<u64>() + self.waiting()
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Requests under way, by replica, where there are any.
    pub(super) fn ongoing(&self) -> &BTreeMap<u64, u64> {
        &self.ongoing
    }

    /// Requests under way at a replica.
    pub(super) fn at(&self, number: u64) -> u64 {
        self.ongoing.get(&number).copied().unwrap_or(0)
    }

    fn occupy(&mut self, seat: Seat) -> Seat {
        *self.ongoing.entry(seat.number).or_default() += 1;
        seat
    }

    fn pick(&self, tried: &[Seat], draw: &mut impl FnMut(usize) -> usize) -> Option<Seat> {
        let has_room = |seat: &&Seat| self.at(seat.number) < self.offer.ongoing_max && !tried.contains(seat);
        let open: Vec<Seat> = self.offer.open.iter().filter(has_room).copied().collect();
        let well: Vec<Seat> = open.iter().filter(|seat| !self.shaky.contains(seat)).copied().collect();
        let from = if well.is_empty() { open } else { well };
        let (first, second) = match from.len() {
            0 => return None,
            1 => (0, 0),
            // Two different ones: the second draw leaves the first one out.
            len => {
                let (first, second) = (draw(len), draw(len - 1));
                (first, if second >= first { second + 1 } else { second })
            }
        };
        let (first, second) = (from[first], from[second]);
        Some(if self.at(second.number) < self.at(first.number) { second } else { first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;
    use rand::SeedableRng;

    fn seat(number: u64) -> Seat {
        Seat { number, incarnation: number }
    }

    fn offer(open: &[u64], ongoing_max: u64, queued_max: Option<u64>) -> Offer {
        Offer { open: open.iter().copied().map(seat).collect(), ongoing_max, queued_max }
    }

    #[test]
    fn the_less_busy_of_two_gets_it_and_nobody_more_than_it_may_have() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        let mut draw = |below: usize| rng.random_range(0..below);
        let mut balance = Balance::default();
        balance.set(offer(&[1, 2, 3, 4], 25, Some(0)));
        for ticket in 0..100 {
            assert!(matches!(balance.take(ticket, &[], &mut draw), Taken::Seat(_)));
            let loads: Vec<u64> = (1..=4).map(|number| balance.at(number)).collect();
            // Purely random choice differs by about 9 here; two choices by very few.
            assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 4, "{loads:?}");
        }
        assert_eq!((1..=4).map(|number| balance.at(number)).collect::<Vec<_>>(), [25; 4]);
        assert_eq!(balance.take(100, &[], &mut draw), Taken::Full(0));
    }

    #[test]
    fn who_waits_longest_goes_first_and_a_full_queue_says_so() {
        let mut draw = |_: usize| 0;
        let mut balance = Balance::default();
        balance.set(offer(&[1], 1, Some(2)));
        assert_eq!(balance.take(0, &[], &mut draw), Taken::Seat(seat(1)));
        assert_eq!(balance.take(1, &[], &mut draw), Taken::Waits);
        assert_eq!(balance.take(2, &[], &mut draw), Taken::Waits);
        assert_eq!(balance.take(3, &[], &mut draw), Taken::Full(2));
        assert_eq!(balance.load(), 3);
        assert_eq!(balance.seat_waiting(&mut draw), []);
        balance.release(seat(1));
        assert_eq!(balance.seat_waiting(&mut draw), [(1, seat(1))]);
        balance.leave(2);
        assert_eq!(balance.load(), 1);
    }

    #[test]
    fn what_takes_no_more_keeps_what_it_has() {
        let mut draw = |_: usize| 0;
        let mut balance = Balance::default();
        balance.set(offer(&[1], 5, None));
        assert_eq!(balance.take(0, &[], &mut draw), Taken::Seat(seat(1)));
        balance.set(offer(&[2], 5, None));
        assert_eq!(balance.take(1, &[], &mut draw), Taken::Seat(seat(2)));
        assert_eq!((balance.at(1), balance.load()), (1, 2));
        balance.release(seat(1));
        assert_eq!(balance.at(1), 0);
    }

    #[test]
    fn one_that_was_not_reached_is_tried_last_and_never_twice_by_the_same_request() {
        let mut draw = |_: usize| 0;
        let mut balance = Balance::default();
        balance.set(offer(&[1, 2], 5, None));
        balance.reached(seat(1), false);
        for ticket in 0..3 {
            assert_eq!(balance.take(ticket, &[], &mut draw), Taken::Seat(seat(2)));
        }
        assert_eq!(balance.take(3, &[seat(2)], &mut draw), Taken::Seat(seat(1)));
        assert!(!balance.is_open(&[seat(1), seat(2)]));
        assert_eq!(balance.take(4, &[seat(1), seat(2)], &mut draw), Taken::Waits);
        // Its next incarnation is another matter.
        let again = Seat { number: 1, incarnation: 9 };
        balance.set(Offer { open: vec![again, seat(2)], ..offer(&[], 5, None) });
        assert_eq!(balance.seat_waiting(&mut draw), [(4, again)]);
    }
}

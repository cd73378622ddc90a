//! Whose sequence is next, and who may queue another: start-time fair queuing between clients, in tokens.
//!
//! Pure. A sequence gets a *turn* when it is submitted, and ranks run smaller turns first (after priorities). A client
//! that has asked for little gets the turn of what starts now; one that has asked for much gets turns further ahead, by
//! the tokens that its sequences cost. Turns are never taken back, so nobody waits for ever.
//!
//! Source: Goyal, Vin and Cheng, "Start-time fair queuing" (1996), with the tokens of "Fairness in serving large language
//! models" (2024) as cost.

use std::collections::HashMap;
use std::time::Duration;

use crate::http::Caller;

/// What a token that is drawn costs, in tokens of a prompt.
const OUTPUT_COST: u64 = 2;
/// Output tokens of a client of which nothing is known.
const OUTPUT_GUESS: u64 = 256;
/// How long a client that was turned away keeps its share of the queues.
const REMEMBERED: Duration = Duration::from_secs(5);
/// Clients with nothing in flight that are remembered for what they have had.
const IDLE_MAX: usize = 4096;

/// A place in the order of all sequences, and what it was thought to cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ticket {
    /// Smaller runs first.
    pub(super) turn: u64,
    output_tokens: u64,
}

/// What each client has had and has waiting.
#[derive(Debug, Default)]
pub(super) struct Shares {
    /// The latest turn of all sequences that have begun.
    clock: u64,
    clients: HashMap<Caller, Client>,
}

#[derive(Debug)]
struct Client {
    /// The turn of its next sequence, if it is not behind the clock.
    next: u64,
    /// Output tokens of its sequences, on average.
    output_tokens: u64,
    /// Sequences that have no token yet.
    waiting: usize,
    in_flight: usize,
    turned_away: Option<Duration>,
}

impl Default for Client {
    fn default() -> Self {
        Self { next: 0, output_tokens: OUTPUT_GUESS, waiting: 0, in_flight: 0, turned_away: None }
    }
}

impl Shares {
    /// How far the order is.
    pub(super) fn clock(&self) -> u64 {
        self.clock
    }

    /// Elsewhere it is that far: whoever comes now does not go before those who have waited there.
    pub(super) fn advance(&mut self, clock: u64) {
        self.clock = self.clock.max(clock);
    }

    /// Whether `client` may queue so many more of the `capacity` sequences that may wait: all of them while nobody else
    /// wants to, else an equal part. One request is always let in.
    pub(super) fn admits(&self, client: Caller, sequences: usize, capacity: usize, now: Duration) -> bool {
        let waiting = self.clients.get(&client).map_or(0, |client| client.waiting);
        if waiting == 0 || waiting + sequences <= capacity / self.clients.len() {
            return true;
        }
        let wants = |other: &Client| {
            other.waiting > 0 || other.turned_away.is_some_and(|at| now.saturating_sub(at) < REMEMBERED)
        };
        let others = self.clients.iter().filter(|(caller, other)| **caller != client && wants(other)).count();
        others == 0 || waiting + sequences <= capacity / (others + 1)
    }

    /// `client` found the queues full: its share is kept for a while.
    pub(super) fn turned_away(&mut self, client: Caller, now: Duration) {
        self.state(client).turned_away = Some(now);
    }

    /// A sequence of `client` is submitted.
    pub(super) fn enter(&mut self, client: Caller, prompt_tokens: usize, max_tokens: u32) -> Ticket {
        let clock = self.clock;
        let state = self.state(client);
        let output_tokens = state.output_tokens.min(u64::from(max_tokens));
        let turn = state.next.max(clock);
        state.next = turn + prompt_tokens as u64 + OUTPUT_COST * output_tokens;
        state.waiting += 1;
        state.in_flight += 1;
        state.turned_away = None;
        Ticket { turn, output_tokens }
    }

    /// It has its first token.
    pub(super) fn began(&mut self, client: Caller, ticket: Ticket) {
        self.clock = self.clock.max(ticket.turn);
        if let Some(state) = self.clients.get_mut(&client) {
            state.waiting = state.waiting.saturating_sub(1);
        }
    }

    /// It has ended, with so many tokens; none if it never began.
    pub(super) fn left(&mut self, client: Caller, ticket: Ticket, output_tokens: Option<usize>) {
        let Some(state) = self.clients.get_mut(&client) else { return };
        state.in_flight = state.in_flight.saturating_sub(1);
        let Some(drawn) = output_tokens.map(|tokens| tokens as u64) else {
            state.waiting = state.waiting.saturating_sub(1);
            return;
        };
        state.next = (state.next + OUTPUT_COST * drawn).saturating_sub(OUTPUT_COST * ticket.output_tokens);
        state.output_tokens = (7 * state.output_tokens + drawn).div_ceil(8);
    }

    /// The client's, new if need be: then those that want nothing are forgotten when there are too many.
    fn state(&mut self, client: Caller) -> &mut Client {
        if !self.clients.contains_key(&client) {
            self.make_room();
        }
        self.clients.entry(client).or_default()
    }

    fn make_room(&mut self) {
        if self.clients.len() >= IDLE_MAX {
            let clock = self.clock;
            self.clients.retain(|_, client| client.in_flight > 0 || client.next > clock);
        }
        if self.clients.len() >= 2 * IDLE_MAX {
            self.clients.retain(|_, client| client.in_flight > 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(100);
    const A: Caller = Caller::Key(0);
    const B: Caller = Caller::Key(1);

    #[test]
    fn who_comes_late_does_not_wait_for_all_that_another_has_queued() {
        let mut shares = Shares::default();
        let many: Vec<Ticket> = (0..100).map(|_| shares.enter(A, 50, 100)).collect();
        shares.began(A, many[0]);
        shares.began(A, many[1]);
        let late = shares.enter(B, 50, 100);
        assert!(many[1].turn <= late.turn && late.turn < many[2].turn, "{late:?} {:?}", &many[..3]);
    }

    #[test]
    fn a_client_alone_has_all_and_with_others_its_part() {
        let mut shares = Shares::default();
        let held: Vec<Ticket> = (0..8).map(|_| shares.enter(A, 1, 1)).collect();
        assert!(shares.admits(A, 100, 8, NOW), "nobody else wants any");
        shares.turned_away(B, NOW);
        assert!(!shares.admits(A, 1, 8, NOW), "B is owed half");
        assert!(shares.admits(B, 1, 8, NOW));
        assert!(shares.admits(A, 1, 8, NOW + REMEMBERED), "B has given up");
        held[..5].iter().for_each(|ticket| shares.began(A, *ticket));
        shares.enter(B, 1, 1);
        assert!(shares.admits(A, 1, 8, NOW), "3 of its 4 wait");
        shares.enter(A, 1, 1);
        assert!(!shares.admits(A, 1, 8, NOW));
    }

    #[test]
    fn who_comes_by_a_new_ingress_does_not_go_before_those_who_waited_at_another() {
        let (mut old, mut new) = (Shares::default(), Shares::default());
        let served: Vec<Ticket> = (0..100).map(|_| old.enter(A, 50, 100)).collect();
        served.iter().for_each(|ticket| old.began(A, *ticket));
        let waiting = old.enter(B, 50, 100);
        new.advance(old.clock());
        assert!(new.enter(B, 50, 100).turn >= waiting.turn);
        new.advance(0);
        assert_eq!(new.clock(), old.clock(), "it never goes back");
    }

    #[test]
    fn strangers_without_number_are_forgotten() {
        let mut shares = Shares::default();
        for key in 0..3 * IDLE_MAX {
            let ticket = shares.enter(Caller::Key(key), 10, 10);
            shares.began(Caller::Key(key), ticket);
            shares.left(Caller::Key(key), ticket, Some(10));
            assert!(shares.clients.len() <= 2 * IDLE_MAX);
        }
    }

    proptest! {
        /// Two clients that always have something queued get the same number of tokens, whatever their requests are.
        #[test]
        fn tokens_are_shared_evenly(prompts in [1usize..500, 1usize..500], outputs in [1u32..500, 1u32..500]) {
            let mut shares = Shares::default();
            let mut queue = BTreeMap::new();
            let mut served = HashMap::from([(A, 0u64), (B, 0)]);
            let cost = |at: usize| prompts[at] as u64 + OUTPUT_COST * u64::from(outputs[at]);
            let enter = |shares: &mut Shares, at: usize, number: usize| {
                let client = [A, B][at];
                let ticket = shares.enter(client, prompts[at], 500);
                ((ticket.turn, number), (at, ticket))
            };
            for number in 0..20 {
                queue.extend([enter(&mut shares, number % 2, number)]);
            }
            for number in 20..3000 {
                let (_, (at, ticket)) = queue.pop_first().unwrap();
                let client = [A, B][at];
                shares.began(client, ticket);
                shares.left(client, ticket, Some(outputs[at] as usize));
                *served.get_mut(&client).unwrap() += cost(at);
                queue.extend([enter(&mut shares, at, number)]);
            }
            let (a, b) = (served[&A] as f64, served[&B] as f64);
            // Ten requests of each are ahead of what is known of them.
            let slack = 40.0 * cost(0).max(cost(1)).max(500) as f64;
            prop_assert!((a - b).abs() <= slack + 0.05 * a.max(b), "{a} {b}");
        }
    }
}

//! Who may give orders: a head for as long as its lease surely lasts, and only the newest that anybody has heard of.
//!
//! Pure: time is an argument (since any fixed moment of this machine, never decreasing), so the simulation replays
//! leases, late orders and heads that were frozen.

use std::time::Duration;

use bincode::{Decode, Encode};

/// Part of the lease that is not used: clocks of two machines need not run equally fast.
const MARGIN_PARTS: u32 = 10;
/// A lease is renewed so many times while it lasts.
const RENEWALS: u32 = 4;

/// The order, or the report, belongs to an older head than one that was heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, thiserror::Error)]
#[error("a newer head leads, in term {term}")]
pub struct Superseded {
    /// The newer head's term.
    pub term: u64,
}

/// One head's time as the leader.
#[derive(Debug, Clone)]
pub struct Tenure {
    term: u64,
    lease: Option<Lease>,
    over: Option<String>,
}

#[derive(Debug, Clone)]
struct Lease {
    ttl: Duration,
    /// Whether another head may stand by: then nothing is ordered once the lease may have run out.
    strict: bool,
    /// When the last renewal that was answered had been sent.
    renewed: Duration,
}

impl Tenure {
    /// Of the only head of a store that nobody else can open.
    pub fn sole(term: u64) -> Self {
        Self { term, lease: None, over: None }
    }

    /// Of a head that was elected with a lease of `ttl`, asked for at `asked`. `strict` when others may stand by.
    pub fn leased(term: u64, ttl: Duration, strict: bool, asked: Duration) -> Self {
        Self { term, lease: Some(Lease { ttl, strict, renewed: asked }), over: None }
    }

    /// Grows from one leader to the next.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// The lease was renewed by a request that was sent at `sent`.
    pub fn renewed(&mut self, sent: Duration) {
        if let Some(lease) = &mut self.lease {
            lease.renewed = lease.renewed.max(sent);
        }
    }

    /// When the lease should be renewed next; `None` without a lease.
    pub fn renew_at(&self) -> Option<Duration> {
        self.lease.as_ref().map(|lease| lease.renewed + lease.ttl / RENEWALS)
    }

    /// Up to when the lease surely lasts.
    pub fn ends(&self) -> Option<Duration> {
        self.lease.as_ref().map(|lease| lease.renewed + lease.ttl - lease.ttl / MARGIN_PARTS)
    }

    /// HA-1: whether an order may be given at `now`. Once it may not, it never may again.
    pub fn may_act(&mut self, now: Duration) -> bool {
        let late = self.ends().is_some_and(|ends| now >= ends);
        if late && self.lease.as_ref().is_some_and(|lease| lease.strict) {
            self.end("its lease could not be renewed in time");
        }
        self.over.is_none()
    }

    /// Somebody has heard of a head of that term.
    pub fn heard(&mut self, term: u64) {
        if term > self.term {
            self.end(&Superseded { term }.to_string());
        }
    }

    /// The first reason counts.
    pub fn end(&mut self, why: &str) {
        self.over.get_or_insert_with(|| why.to_owned());
    }

    /// Why this head leads no more.
    pub fn over(&self) -> Option<&str> {
        self.over.as_deref()
    }
}

/// What a node or worker knows of heads: it obeys the newest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allegiance {
    term: u64,
}

impl Allegiance {
    /// The newest term that was heard of; 0 before the first.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// HA-2: whether a head of that term is to be obeyed. A newer one is, from now on; an older one never again.
    pub fn obey(&mut self, term: u64) -> Result<(), Superseded> {
        if term < self.term {
            return Err(Superseded { term: self.term });
        }
        self.term = term;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_leader_stops_before_its_lease_can_end_and_for_good() {
        let mut tenure = Tenure::leased(7, ms(2000), true, ms(100));
        assert_eq!((tenure.renew_at(), tenure.ends()), (Some(ms(600)), Some(ms(1900))));
        assert!(tenure.may_act(ms(1899)));
        tenure.renewed(ms(600));
        tenure.renewed(ms(500));
        assert!(tenure.may_act(ms(2399)), "an answer that was overtaken shortens nothing");
        assert!(!tenure.may_act(ms(2400)));
        tenure.renewed(ms(2399));
        assert!(!tenure.may_act(ms(2401)), "a late answer revives nothing");
        assert!(tenure.over().unwrap().contains("renewed"));
    }

    #[test]
    fn a_leader_that_is_alone_goes_on_without_its_store_until_it_hears_of_another() {
        let mut tenure = Tenure::leased(7, ms(2000), false, ms(0));
        assert!(tenure.may_act(ms(60_000)));
        tenure.heard(7);
        assert!(tenure.may_act(ms(60_000)));
        tenure.heard(8);
        assert!(!tenure.may_act(ms(60_000)));
        assert!(Tenure::sole(1).may_act(ms(u64::MAX)));
    }

    #[test]
    fn the_newest_head_is_obeyed() {
        let mut allegiance = Allegiance::default();
        assert_eq!(allegiance.obey(5), Ok(()));
        assert_eq!(allegiance.obey(9), Ok(()));
        assert_eq!(allegiance.obey(5), Err(Superseded { term: 9 }));
        assert_eq!((allegiance.obey(9), allegiance.term()), (Ok(()), 9));
    }
}

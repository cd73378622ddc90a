//! How many requests a client may make: a token bucket for each.
//!
//! Pure: time is an argument.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Clients that are told apart; more share one bucket.
const CLIENTS_MAX: usize = 16_384;

/// Whose requests are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// All with one key.
    Key(usize),
    /// All from one address; of IPv6, from one network of 64 bits.
    Address(IpAddr),
    /// All others.
    Other,
}

impl Caller {
    /// From this address.
    pub fn at(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Address(address),
            IpAddr::V6(v6) => Self::Address(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into()),
        }
    }
}

/// What clients have left.
#[derive(Debug)]
pub struct Rates {
    per_s: f64,
    buckets: HashMap<Caller, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Duration,
}

impl Rates {
    /// `per_s` requests a second, as many of them at once.
    pub fn new(per_s: u32) -> Self {
        Self { per_s: f64::from(per_s), buckets: HashMap::new() }
    }

    /// Counts a request at `now`, a time since any fixed moment; or says how long the client has to wait.
    ///
    /// # Errors
    /// It has made too many.
    pub fn count(&mut self, caller: Caller, now: Duration) -> Result<(), Duration> {
        let per_s = self.per_s;
        let refilled =
            |bucket: &Bucket| (bucket.left + now.saturating_sub(bucket.at).as_secs_f64() * per_s).min(per_s);
        if self.buckets.len() >= CLIENTS_MAX && !self.buckets.contains_key(&caller) {
            // One that is full is as good as none.
            self.buckets.retain(|_, bucket| refilled(bucket) < per_s);
        }
        let full = self.buckets.len() >= CLIENTS_MAX && !self.buckets.contains_key(&caller);
        let caller = if full { Caller::Other } else { caller };
        let bucket = self.buckets.entry(caller).or_insert(Bucket { left: per_s, at: now });
        *bucket = Bucket { left: refilled(bucket), at: now };
        if bucket.left < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - bucket.left) / per_s));
        }
        bucket.left -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(f64) -> Duration = Duration::from_secs_f64;

    fn v4(last: u32) -> Caller {
        Caller::at(IpAddr::from(last.to_be_bytes()))
    }

    #[test]
    fn a_client_has_its_burst_and_then_its_rate() {
        let mut rates = Rates::new(2);
        let mut ask = |caller, at: f64| rates.count(caller, S(at));
        assert_eq!([ask(v4(1), 0.0), ask(v4(1), 0.0)], [Ok(()), Ok(())]);
        assert_eq!(ask(v4(1), 0.0), Err(S(0.5)));
        assert_eq!(ask(v4(2), 0.0), Ok(()), "another client");
        assert_eq!(ask(v4(1), 0.5), Ok(()));
        assert_eq!(ask(v4(1), 0.75), Err(S(0.25)));
        assert_eq!([ask(v4(1), 99.0), ask(v4(1), 99.0), ask(v4(1), 99.0)], [Ok(()), Ok(()), Err(S(0.5))]);
    }

    #[test]
    fn strangers_without_number_cost_bounded_memory() {
        let mut rates = Rates::new(1);
        for i in 0..CLIENTS_MAX as u32 {
            assert_eq!(rates.count(v4(i), S(0.0)), Ok(()));
        }
        let late = CLIENTS_MAX as u32 + 1;
        assert_eq!(rates.count(v4(late), S(0.5)), Ok(()), "all others share one");
        assert!(rates.count(v4(late + 1), S(0.5)).is_err());
        assert!(rates.buckets.len() <= CLIENTS_MAX + 1);
        assert_eq!(rates.count(v4(late + 2), S(5.0)), Ok(()), "old ones are forgotten");
        assert!(rates.buckets.len() <= 2, "{}", rates.buckets.len());
    }

    #[test]
    fn a_network_of_ipv6_is_one_client() {
        let at = |text: &str| Caller::at(text.parse().unwrap());
        assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:1"));
        assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
    }
}

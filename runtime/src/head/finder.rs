//! Where the leading head may be: which address to try next. Pure.

/// Heads that are remembered at most.
const HEADS_MAX: usize = 32;

/// The known heads, and which of them is tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heads {
    addresses: Vec<String>,
    at: usize,
    /// The head that was tried named another, which is tried now.
    redirected: bool,
}

impl Heads {
    /// Of a list `HOST:PORT,HOST:PORT`, with at least one address.
    pub(crate) fn new(list: &str) -> Self {
        let mut heads = Self { addresses: Vec::new(), at: 0, redirected: false };
        heads.learn(list.split(','));
        if heads.addresses.is_empty() {
            heads.addresses.push(list.to_owned());
        }
        heads
    }

    /// The head to try.
    pub(crate) fn current(&self) -> &str {
        &self.addresses[self.at]
    }

    /// All of them as a list, the present one first.
    pub(crate) fn list(&self) -> String {
        let (before, from) = self.addresses.split_at(self.at);
        from.iter().chain(before).map(String::as_str).collect::<Vec<_>>().join(",")
    }

    /// Whether there is more than one.
    pub(crate) fn are_several(&self) -> bool {
        self.addresses.len() > 1
    }

    /// Remembers heads that it was told of.
    pub(crate) fn learn<'a>(&mut self, addresses: impl IntoIterator<Item = &'a str>) {
        for address in addresses.into_iter().map(str::trim).filter(|address| !address.is_empty()) {
            let known = self.addresses.iter().any(|known| known == address);
            if !known && self.addresses.len() < HEADS_MAX {
                self.addresses.push(address.to_owned());
            }
        }
    }

    /// The present one leads.
    pub(crate) fn found(&mut self) {
        self.redirected = false;
    }

    /// The present one does not lead. `leader` is the one that it named, empty for none. Returns whether the next one
    /// may be tried at once: after a pause otherwise.
    pub(crate) fn missed(&mut self, leader: &str) -> bool {
        let named = Some(leader).filter(|leader| !leader.is_empty() && *leader != self.current());
        if let (Some(leader), false) = (named, self.redirected) {
            self.learn([leader]);
            if let Some(at) = self.addresses.iter().position(|known| known == leader) {
                (self.at, self.redirected) = (at, true);
                return true;
            }
        }
        self.redirected = false;
        self.at = (self.at + 1) % self.addresses.len();
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_that_is_named_is_tried_next_and_then_the_others_in_turn() {
        let mut heads = Heads::new("a:1, b:1");
        assert!(!heads.missed(""));
        assert_eq!(heads.current(), "b:1");
        assert!(heads.missed("c:1"));
        assert_eq!(heads.current(), "c:1");
        assert!(!heads.missed("a:1"), "heads that name each other are not asked in a circle without a pause");
        assert_eq!((heads.current(), heads.list().as_str()), ("a:1", "a:1,b:1,c:1"));
        heads.found();
        assert!(heads.missed("b:1"));
        assert_eq!(heads.list(), "b:1,c:1,a:1");
    }

    #[test]
    fn one_head_is_tried_again() {
        let mut heads = Heads::new("a:1");
        assert!(!heads.missed("") && !heads.missed("a:1"));
        assert_eq!((heads.current(), heads.are_several()), ("a:1", false));
    }
}

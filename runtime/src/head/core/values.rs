//! Values that actors keep with the head: what must survive them and their machine. Few and small, and forgotten with
//! the cluster.

use std::collections::BTreeMap;

use super::{Command, HeadState, Key, Record};
use crate::head::messages::{Kept, PutError};
use crate::spec::is_name;

/// Values that are kept at most.
const VALUES_MAX: usize = 256;
/// Bytes of one value: a transaction of the state store takes no more.
const VALUE_BYTES_MAX: usize = 1 << 20;

/// All values, each with the revision of its last change.
#[derive(Debug, Default)]
pub(super) struct Values(BTreeMap<String, Kept>);

impl Values {
    pub(super) fn restore(&mut self, key: String, kept: Kept) {
        self.0.insert(key, kept);
    }
}

impl HeadState {
    /// Keeps a value under a key, if what is there has the revision `expect` (0: nothing is there). Returns the new
    /// revision, and what to do.
    ///
    /// # Errors
    /// Somebody else changed it meanwhile, or it is more than the head keeps.
    pub fn put_value(
        &mut self,
        key: &str,
        expect: u64,
        value: Vec<u8>,
    ) -> Result<(u64, Vec<Command>), PutError> {
        if !is_name(key) {
            return Err(PutError::Key(key.to_owned()));
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(PutError::TooLarge { bytes: value.len() as u64, max: VALUE_BYTES_MAX as u64 });
        }
        let present = self.values.0.get(key).map_or(0, |kept| kept.revision);
        if present != expect {
            return Err(PutError::Changed { key: key.to_owned() });
        }
        if present == 0 && self.values.0.len() == VALUES_MAX {
            return Err(PutError::TooMany { max: VALUES_MAX as u64 });
        }
        let kept = Kept { revision: present + 1, value };
        self.values.0.insert(key.to_owned(), kept.clone());
        self.persist(Record::Value(key.to_owned(), kept));
        Ok((present + 1, self.finish()))
    }

    /// What is kept under a key.
    pub fn value(&self, key: &str) -> Option<&Kept> {
        self.values.0.get(key)
    }

    pub(super) fn forget_values(&mut self) {
        for key in std::mem::take(&mut self.values).0.into_keys() {
            self.forget(Key::Value(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::head::core::{Event, Patience, Write};

    fn put(state: &mut HeadState, key: &str, expect: u64, value: &[u8]) -> Result<u64, PutError> {
        state.put_value(key, expect, value.to_vec()).map(|(revision, _)| revision)
    }

    #[test]
    fn a_value_changes_only_for_who_knows_it_and_survives_the_head() {
        let mut state = HeadState::new(Patience::default());
        assert_eq!(put(&mut state, "serve", 0, b"a"), Ok(1));
        assert_eq!(put(&mut state, "serve", 0, b"b"), Err(PutError::Changed { key: "serve".into() }));
        let (revision, commands) = state.put_value("serve", 1, b"c".to_vec()).unwrap();
        assert_eq!(revision, 2);
        let records = commands.into_iter().filter_map(|command| match command {
            Command::Persist(Write::Put(record)) => Some(*record),
            _ => None,
        });
        let (mut next, _) =
            HeadState::recover(Patience::default(), Duration::ZERO, records.collect::<Vec<_>>());
        assert_eq!(next.value("serve").map(|kept| kept.value.as_slice()), Some(&b"c"[..]));
        next.handle(Duration::ZERO, Event::Shutdown);
        assert_eq!(next.value("serve"), None);
    }

    #[test]
    fn values_are_few_and_small() {
        let mut state = HeadState::new(Patience::default());
        assert!(matches!(put(&mut state, "a/b", 0, b""), Err(PutError::Key(_))));
        assert!(matches!(put(&mut state, "a", 0, &[0; VALUE_BYTES_MAX + 1]), Err(PutError::TooLarge { .. })));
        for i in 0..VALUES_MAX {
            put(&mut state, &format!("k{i}"), 0, b"").unwrap();
        }
        assert!(matches!(put(&mut state, "one-more", 0, b""), Err(PutError::TooMany { .. })));
        assert_eq!(put(&mut state, "k0", 1, b"x"), Ok(2));
    }
}

//! API keys: what clients prove to know. Only digests are kept, in memory and wherever arguments of actors are.

use std::collections::HashSet;
use std::fmt;

use actix_web::http::header::HeaderValue;
use bincode::{Decode, Encode};
use sha2::{Digest, Sha256};

/// Shortest key that is taken from a file.
const KEY_CHARS_MIN: usize = 16;

/// The keys of a server. None: it asks for none.
#[derive(Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ApiKeys(Vec<[u8; 32]>);

/// A text that holds no keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// It is empty, or all comment.
    #[error("it holds no key")]
    None,
    /// A key that could be guessed, by its line.
    #[error("the key in line {0} is shorter than {KEY_CHARS_MIN} characters")]
    Short(usize),
    /// A key that no client could send, by its line.
    #[error("the key in line {0} has a space, or what is no ASCII")]
    Unsendable(usize),
}

impl ApiKeys {
    /// Exactly these.
    pub fn new(keys: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        let mut seen = HashSet::new();
        let digests = keys.into_iter().map(|key| Sha256::digest(key.as_ref()).into());
        Self(digests.filter(|digest| seen.insert(*digest)).collect())
    }

    /// One key per line; empty lines and those that begin with `#` count for nothing.
    ///
    /// # Errors
    /// There is none, or one that cannot be used.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let lines = (1..).zip(text.lines().map(str::trim));
        let lines: Vec<(usize, &str)> =
            lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).collect();
        for (number, key) in &lines {
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(KeysError::Unsendable(*number));
            }
            if key.len() < KEY_CHARS_MIN {
                return Err(KeysError::Short(*number));
            }
        }
        if lines.is_empty() {
            return Err(KeysError::None);
        }
        Ok(Self::new(lines.into_iter().map(|(_, key)| key)))
    }

    /// Whether none is asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which key an `Authorization` header shows. All are compared, and each whole, so that the time does not tell which
    /// of them is nearly right.
    pub fn find(&self, header: Option<&HeaderValue>) -> Option<usize> {
        let given = header?.to_str().ok()?;
        let (scheme, key) = given.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let given: [u8; 32] = Sha256::digest(key.trim().as_bytes()).into();
        let mut found = None;
        for (at, own) in self.0.iter().enumerate() {
            let differs = own.iter().zip(&given).fold(0, |differs, (a, b)| differs | (a ^ b));
            if std::hint::black_box(differs) == 0 {
                found = Some(at);
            }
        }
        found
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_one_key_per_line() {
        let keys = ApiKeys::parse("# team a\n0123456789abcdef\n\n  fedcba9876543210  \n").unwrap();
        let find = |text: &'static str| keys.find(Some(&HeaderValue::from_static(text)));
        assert_eq!(find("Bearer 0123456789abcdef"), Some(0));
        assert_eq!(find("bearer fedcba9876543210"), Some(1));
        for wrong in ["0123456789abcdef", "Basic 0123456789abcdef", "Bearer ", "Bearer 0123456789abcde", ""] {
            assert_eq!(find(wrong), None, "{wrong}");
        }
        assert_eq!(keys.find(None), None);
        assert!(!format!("{keys:?}").contains("01234"));
        assert_eq!(ApiKeys::parse("# nothing\n"), Err(KeysError::None));
        assert_eq!(ApiKeys::parse("\nabc\n"), Err(KeysError::Short(2)));
        assert_eq!(ApiKeys::parse("0123456789 abcdef\n"), Err(KeysError::Unsendable(1)));
    }
}

//! How a section of cluster.toml is declared: one macro makes the struct, its defaults and its documentation.
//!
//! The declaration is the only place that names a key, so the reader, the "did you mean" and the reference page
//! cannot disagree.

use heliostat_runtime::spec::Quantity;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// One key of a section, for documentation and suggestions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    /// As written in the file.
    pub(crate) name: &'static str,
    /// Its documentation, line by line.
    pub(crate) about: &'static [&'static str],
    /// What it takes, in words.
    pub(crate) kind: &'static str,
}

/// A table of the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SectionInfo {
    /// Name of the table: `head` for `[head]`.
    pub(crate) title: &'static str,
    /// True for `[[title]]`.
    pub(crate) repeated: bool,
    /// Its documentation, line by line.
    pub(crate) about: &'static [&'static str],
    /// Its keys, in the order of the documentation.
    pub(crate) keys: &'static [Key],
    /// Its defaults as TOML; a key without one is missing.
    pub(crate) defaults: fn() -> toml::Table,
}

/// What the documentation says about the values of a type.
pub(crate) trait Kind {
    /// In words, for the reference page.
    const NAME: &'static str;
}

macro_rules! kinds { ($($ty:ty => $name:literal),* $(,)?) => { $(impl Kind for $ty { const NAME: &'static str = $name; })* } }
kinds! {
    String => "string", PathBuf => "path", bool => "boolean", u16 => "integer", u32 => "integer", u64 => "integer",
    f64 => "number", SocketAddr => "\"address:port\"", IpAddr => "\"address\"", Vec<String> => "list of strings",
    Vec<PathBuf> => "list of paths", BTreeMap<String, String> => "table of strings",
    BTreeMap<String, Quantity> => "table of numbers",
    Count => "integer or \"auto\"", ByteSize => "bytes, or a string such as \"256MiB\"",
    Vec<ByteSize> => "list of bytes, or of strings such as \"256MiB\"",
}
impl<T: Kind> Kind for Option<T> {
    const NAME: &'static str = T::NAME;
}

/// Declares one section: its documentation, keys, types and defaults.
macro_rules! section {
    ($(#[doc = $about:literal])+ $name:ident = $title:literal $(repeated $repeated:literal)? {
        $( $(#[doc = $doc:literal])+ $key:ident : $ty:ty = $default:expr ),* $(,)?
    }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
        #[serde(deny_unknown_fields, default)]
        pub(crate) struct $name { $( $(#[doc = $doc])+ pub(crate) $key: $ty, )* }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default, )* }
            }
        }

        impl $name {
            /// Its description, for suggestions and the reference page.
            pub(crate) const INFO: $crate::config::section::SectionInfo = $crate::config::section::SectionInfo {
                title: $title,
                repeated: false $(|| $repeated)?,
                about: &[$($about),+],
                keys: &[$( $crate::config::section::Key {
                    name: stringify!($key),
                    about: &[$($doc),+],
                    kind: <$ty as $crate::config::section::Kind>::NAME,
                } ),*],
                defaults: || toml::Table::try_from(Self::default()).expect("defaults are plain TOML values"),
            };
        }
    };
}
pub(crate) use section;

/// A closed set of words: the enum, its spelling in the file and its kind.
macro_rules! words {
    ($(#[doc = $about:literal])+ $name:ident, $kind:literal { $( $(#[doc = $doc:literal])+ $(#[serde(rename = $word:literal)])? $variant:ident ),* $(,)? }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum $name { $( $(#[doc = $doc])+ $(#[serde(rename = $word)])? $variant, )* }

        impl $crate::config::section::Kind for $name { const NAME: &'static str = $kind; }
    };
}
pub(crate) use words;

/// A number, or "auto": chosen from the machine or the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    /// Chosen by Heliostat.
    Auto,
    /// As written.
    Exactly(u32),
}

impl Count {
    /// The number, or `auto` where none is written.
    pub(crate) fn or(self, auto: u32) -> u32 {
        match self {
            Self::Auto => auto,
            Self::Exactly(n) => n,
        }
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountVisitor;
        impl Visitor<'_> for CountVisitor {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or \"auto\"")
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Count, E> {
                let n = u32::try_from(v).map_err(|_| E::invalid_value(de::Unexpected::Signed(v), &self))?;
                Ok(Count::Exactly(n))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Count, E> {
                if v == "auto" {
                    Ok(Count::Auto)
                } else {
                    Err(E::invalid_value(de::Unexpected::Str(v), &self))
                }
            }
        }
        deserializer.deserialize_any(CountVisitor)
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Exactly(n) => serializer.serialize_u32(*n),
        }
    }
}

/// A number of bytes; the file may write it with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) u64);

/// Longest first, so that "MiB" is not read as "B".
const UNITS: [(&str, u64); 8] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

impl ByteSize {
    /// Reads "256MiB", "1.5 GiB" or "4096"; None for anything else.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(unit, bytes)| text.strip_suffix(unit).map(|n| (n.trim_end(), *bytes)))
            .unwrap_or((text, 1));
        let number: f64 = number.parse().ok()?;
        (number.is_finite() && number >= 0.0).then_some(Self((number * unit as f64) as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS[..4].iter().rev().find(|(_, bytes)| self.0 > 0 && self.0.is_multiple_of(*bytes)) {
            Some((unit, bytes)) => write!(f, "{}{unit}", self.0 / bytes),
            None => write!(f, "{}", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a string such as \"256MiB\"")
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<ByteSize, E> {
                u64::try_from(v).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(v), &self))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<ByteSize, E> {
                ByteSize::parse(v).ok_or_else(|| E::invalid_value(de::Unexpected::Str(v), &self))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_sizes_read_back_what_they_write() {
        for (text, bytes) in [("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("10MB", 10_000_000), ("7", 7)] {
            let size = ByteSize::parse(text).expect(text);
            assert_eq!(size.0, bytes, "{text}");
            assert_eq!(ByteSize::parse(&size.to_string()), Some(size));
        }
        for bad in ["", "MiB", "-1", "12 parsecs", "NaN"] {
            assert_eq!(ByteSize::parse(bad), None, "{bad}");
        }
    }
}

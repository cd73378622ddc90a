//! Reads JSON objects field by field, and remembers everything that is wrong with them by its path in the document.

use std::cell::RefCell;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

/// What is wrong, one line each: `path: why`.
#[derive(Debug, Default)]
pub(super) struct Problems(RefCell<Vec<String>>);

impl Problems {
    pub(super) fn add(&self, path: &str, why: impl AsRef<str>) {
        self.0.borrow_mut().push(format!("{path}: {}", why.as_ref()));
    }

    pub(super) fn into_result<T>(self, value: T) -> Result<T, Vec<String>> {
        let problems = self.0.into_inner();
        if problems.is_empty() { Ok(value) } else { Err(problems) }
    }
}

/// An object whose fields are taken out one by one; what is left at the end is refused.
pub(super) struct Fields<'a> {
    path: String,
    object: Map<String, Json>,
    problems: &'a Problems,
}

impl<'a> Fields<'a> {
    /// Opens a value that must be an object; null is an empty one.
    pub(super) fn open(path: impl Into<String>, value: Json, problems: &'a Problems) -> Self {
        let path = path.into();
        let object = match value {
            Json::Object(object) => object,
            Json::Null => Map::new(),
            other => {
                problems.add(&path, format!("it must be an object, not {other}"));
                Map::new()
            }
        };
        Self { path, object, problems }
    }

    /// The path of a field.
    pub(super) fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Notes that something is wrong with a field.
    pub(super) fn wrong(&self, key: &str, why: impl AsRef<str>) {
        self.problems.add(&self.at(key), why);
    }

    /// Takes a field; none where it is missing, null or of another type.
    pub(super) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        let value = self.raw(key)?;
        match serde_json::from_value(value.clone()) {
            Ok(value) => Some(value),
            Err(why) => {
                self.wrong(key, format!("{value} cannot be used: {why}"));
                None
            }
        }
    }

    /// Takes a number above zero.
    pub(super) fn positive(&mut self, key: &str) -> Option<u32> {
        let value: u32 = self.take(key)?;
        if value == 0 {
            self.wrong(key, "it must be at least 1");
            return None;
        }
        Some(value)
    }

    /// Takes a duration in seconds.
    pub(super) fn seconds(&mut self, key: &str) -> Option<std::time::Duration> {
        let value: f64 = self.take(key)?;
        let duration = std::time::Duration::try_from_secs_f64(value);
        if duration.is_err() {
            self.wrong(key, format!("{value} is no number of seconds"));
        }
        duration.ok()
    }

    /// Takes a field as it is; none where it is missing or null.
    pub(super) fn raw(&mut self, key: &str) -> Option<Json> {
        self.object.shift_remove(key).filter(|value| !value.is_null())
    }

    /// Takes an object.
    pub(super) fn object(&mut self, key: &str) -> Option<Fields<'a>> {
        let value = self.raw(key)?;
        Some(Self::open(self.at(key), value, self.problems))
    }

    /// Names of the fields that were not taken yet.
    pub(super) fn keys(&self) -> Vec<String> {
        self.object.keys().cloned().collect()
    }

    /// Takes a list.
    pub(super) fn list(&mut self, key: &str) -> Vec<(String, Json)> {
        let path = self.at(key);
        match self.raw(key) {
            None => Vec::new(),
            Some(Json::Array(items)) => {
                items.into_iter().enumerate().map(|(i, item)| (format!("{path}.{i}"), item)).collect()
            }
            Some(other) => {
                self.problems.add(&path, format!("it must be a list, not {other}"));
                Vec::new()
            }
        }
    }

    /// Fields that are not supported, with the values by which they ask for nothing.
    pub(super) fn refuse(&mut self, table: &[Refused]) {
        for Refused { key, neutral, instead } in table {
            let Some(value) = self.raw(key) else { continue };
            let shown = value.to_string();
            let numbers = |text: &&str| match (text.parse::<f64>(), value.as_f64()) {
                (Ok(a), Some(b)) => a == b,
                _ => **text == shown,
            };
            if !neutral.iter().any(numbers) {
                let space = if instead.is_empty() { "" } else { "; " };
                self.wrong(key, format!("{shown} is not supported{space}{instead}"));
            }
        }
    }

    /// Refuses what was not taken.
    pub(super) fn finish(self) {
        for key in self.object.keys() {
            self.wrong(key, "there is no such field");
        }
    }
}

/// A field that is known and not supported.
pub(super) struct Refused {
    pub(super) key: &'static str,
    /// Values, as JSON, that ask for nothing.
    pub(super) neutral: &'static [&'static str],
    /// What to do instead.
    pub(super) instead: &'static str,
}

/// One of a table.
pub(super) const fn no(
    key: &'static str,
    neutral: &'static [&'static str],
    instead: &'static str,
) -> Refused {
    Refused { key, neutral, instead }
}

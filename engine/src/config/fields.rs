//! Reads typed fields out of a JSON object; every refusal names the file, the field and the value found.
//!
//! Decides nothing about models.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// A config.json or generation_config.json that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}; a checkpoint directory needs this file, download it again", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{}: not valid JSON: {source}; NaN and Infinity are not JSON either; download the file again", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Line, column and what was expected there.
        source: serde_json::Error,
    },
    /// One field is missing, wrong or asks for what is not supported.
    #[error("{}: field {field}: {problem}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, dotted from the top.
        field: String,
        /// What is wrong and what is supported.
        problem: String,
    },
}

/// Largest dimension accepted: it keeps every product of two dimensions far from overflow.
const DIMENSION_MAX: u64 = 1 << 28;

/// One JSON object of a file.
pub(super) struct Fields<'a> {
    file: &'a Path,
    prefix: String,
    object: &'a Map<String, Value>,
}

/// Reads `file` as one JSON object.
pub(super) fn read_object(file: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = std::fs::read(file).map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| ConfigError::Json { file: file.to_owned(), source })
}

impl<'a> Fields<'a> {
    /// The fields of the top object of `file`.
    pub(super) fn new(file: &'a Path, object: &'a Map<String, Value>) -> Self {
        Self { file, prefix: String::new(), object }
    }

    /// An error about `field`.
    pub(super) fn error(&self, field: &str, problem: impl Into<String>) -> ConfigError {
        let field = format!("{}{field}", self.prefix);
        ConfigError::Field { file: self.file.to_owned(), field, problem: problem.into() }
    }

    /// An error that says that the value of `field` is not supported, and what is.
    pub(super) fn unsupported(&self, field: &str, supported: &str) -> ConfigError {
        let found = self.object.get(field).map_or_else(|| "nothing".to_owned(), Value::to_string);
        self.error(field, format!("{found} is not supported; supported: {supported}"))
    }

    /// The value of `field`, unless it is missing or null.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// The object `field`, unless it is missing or null.
    pub(super) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        self.get(field).map(|value| self.nested(field, value)).transpose()
    }

    fn nested(&self, field: &str, value: &'a Value) -> Result<Fields<'a>, ConfigError> {
        let object = value.as_object().ok_or_else(|| self.wrong(field, value, "an object"))?;
        Ok(Fields { file: self.file, prefix: format!("{}{field}.", self.prefix), object })
    }

    /// A dimension of at least 1.
    pub(super) fn dimension(&self, field: &str) -> Result<usize, ConfigError> {
        self.optional_dimension(field)?.ok_or_else(|| self.missing(field))
    }

    /// A dimension of at least 1, unless the field is missing or null.
    pub(super) fn optional_dimension(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        match self.count(field)? {
            Some(0) => Err(self.error(field, "0 is not a dimension; it must be at least 1")),
            count => Ok(count),
        }
    }

    /// A count of at least 0, unless the field is missing or null.
    pub(super) fn count(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let count = value.as_u64().filter(|&count| count <= DIMENSION_MAX);
        let count = count.ok_or_else(|| self.wrong(field, value, "an integer from 0 to 2^28"))?;
        Ok(Some(count as usize))
    }

    /// A finite number above 0, unless the field is missing or null.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(number) = self.number(field)? else { return Ok(None) };
        if number > 0.0 {
            return Ok(Some(number));
        }
        Err(self.error(field, format!("{number} must be above 0")))
    }

    /// A finite number, unless the field is missing or null.
    pub(super) fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(field, value, "a finite number"))
    }

    /// `field`, or `default` where it is missing or null.
    pub(super) fn bool_or(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(field, value, "true or false"))
    }

    /// A string, unless the field is missing or null.
    pub(super) fn string(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(field, value, "a string"))
    }

    /// Fails unless the string `field` is missing, null or one of `supported`; returns it or `supported[0]`.
    pub(super) fn one_of(
        &self,
        field: &str,
        supported: &[&'static str],
    ) -> Result<&'static str, ConfigError> {
        let Some(found) = self.string(field)? else { return Ok(supported[0]) };
        let same = supported.iter().find(|&&name| name == found);
        same.copied().ok_or_else(|| self.unsupported(field, &supported.join(", ")))
    }

    /// Fails where the boolean `field` is true.
    pub(super) fn refuse_true(&self, field: &str) -> Result<(), ConfigError> {
        if self.bool_or(field, false)? { Err(self.unsupported(field, "false")) } else { Ok(()) }
    }

    /// A list of non-negative integers; one integer stands for a list of one; missing or null is an empty list.
    pub(super) fn integers(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let items = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
        let integer = |item: &Value| item.as_u64().and_then(|item| u32::try_from(item).ok());
        let integers: Option<Vec<u32>> = items.iter().map(integer).collect();
        integers.ok_or_else(|| self.wrong(field, value, "an integer or a list of integers, none negative"))
    }

    fn missing(&self, field: &str) -> ConfigError {
        self.error(field, "missing; take config.json from the same release as the weights")
    }

    fn wrong(&self, field: &str, value: &Value, expected: &str) -> ConfigError {
        self.error(field, format!("{value} is not {expected}"))
    }
}

//! Which rows of a listing are shown, and which columns of each: filters, limits, details.
//!
//! Pure. A row is a JSON object. It knows nothing of what is listed, and serves Ray's columns as well as our own.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value as Json};

/// One thing that is listed.
pub type Row = Map<String, Json>;

/// Keys that say which variant a nested value is: `state=ready` compares `{"state": "ready", ...}`.
const TAGS: [&str; 3] = ["state", "cause", "kind"];

/// Why a listing is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// Not of the form of a filter.
    #[error("{0:?} is no filter: write KEY=VALUE or KEY!=VALUE")]
    NoFilter(String),
    /// A predicate that Ray does not know either.
    #[error("the predicate {0:?} is not supported: use = or !=")]
    Predicate(String),
    /// No such column.
    #[error("there is no column {column:?} to filter by; there are: {known}")]
    Column {
        /// What was asked for.
        column: String,
        /// What can be asked for.
        known: String,
    },
    /// The column is no number.
    #[error("{column} holds {kind}; {value:?} is none")]
    Value {
        /// The column.
        column: String,
        /// What it holds.
        kind: &'static str,
        /// What it was compared with.
        value: String,
    },
    /// The column holds more than one value.
    #[error("{column} holds several values: filter by one of them, e.g. {column}.{example}=VALUE")]
    Nested {
        /// The column.
        column: String,
        /// A key in it.
        example: String,
    },
    /// Keys, predicates and values do not belong together.
    #[error("there are {keys} filter_keys, {predicates} filter_predicates and {values} filter_values")]
    Uneven {
        /// How many keys.
        keys: usize,
        /// How many predicates.
        predicates: usize,
        /// How many values.
        values: usize,
    },
    /// Not what the parameter takes.
    #[error("{name}={value:?}: it takes {wanted}")]
    Parameter {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
        /// What would be right.
        wanted: String,
    },
}

/// How a column is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Predicate {
    /// Equal; text without regard to case.
    Is,
    /// Not equal.
    IsNot,
}

/// A condition on a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// The column; `a.b` for key `b` in column `a`.
    pub column: String,
    /// How it is compared.
    pub predicate: Predicate,
    /// With what; `null` for nothing.
    pub value: String,
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let predicate = match self.predicate {
            Predicate::Is => "=",
            Predicate::IsNot => "!=",
        };
        write!(f, "{}{predicate}{}", self.column, self.value)
    }
}

impl FromStr for Filter {
    type Err = QueryError;

    /// `KEY=VALUE` or `KEY!=VALUE`.
    fn from_str(text: &str) -> Result<Self, QueryError> {
        let none = || QueryError::NoFilter(text.to_owned());
        let (left, value) = text.split_once('=').ok_or_else(none)?;
        let (column, predicate) =
            left.strip_suffix('!').map_or((left, Predicate::Is), |column| (column, Predicate::IsNot));
        match column.trim() {
            "" => Err(none()),
            column => Ok(Self::new(column, predicate, value.trim())),
        }
    }
}

impl Filter {
    /// A condition. Names of columns know no case; keys within a column do.
    pub fn new(column: &str, predicate: Predicate, value: &str) -> Self {
        let end = column.find('.').unwrap_or(column.len());
        let column = column[..end].to_ascii_lowercase() + &column[end..];
        Self { column, predicate, value: value.to_owned() }
    }

    /// Whether a row fulfils it. A row without the column holds nothing there.
    ///
    /// # Errors
    /// The value cannot be compared with what the column holds.
    pub fn matches(&self, row: &Row) -> Result<bool, QueryError> {
        let held = find(row, &self.column).unwrap_or(&Json::Null);
        let is = self.equals(held)?;
        Ok(is == (self.predicate == Predicate::Is))
    }

    fn equals(&self, held: &Json) -> Result<bool, QueryError> {
        let wrong = |kind| QueryError::Value { column: self.column.clone(), kind, value: self.value.clone() };
        match held {
            Json::Null => Ok(self.value.eq_ignore_ascii_case("null")),
            _ if self.value.eq_ignore_ascii_case("null") => Ok(false),
            Json::String(text) => Ok(text.eq_ignore_ascii_case(&self.value)),
            Json::Bool(flag) => match self.value.to_ascii_lowercase().as_str() {
                "true" | "1" => Ok(*flag),
                "false" | "0" => Ok(!*flag),
                _ => Err(wrong("true or false")),
            },
            Json::Number(number) => {
                let wanted = self.value.parse::<f64>().map_err(|_| wrong("a number"))?;
                // Large integers are not told apart by their doubles.
                Ok(number.to_string() == self.value || number.as_f64() == Some(wanted))
            }
            Json::Array(_) | Json::Object(_) => Err(QueryError::Nested {
                column: self.column.clone(),
                example: held
                    .as_object()
                    .and_then(|o| o.keys().next().cloned())
                    .unwrap_or_else(|| "KEY".into()),
            }),
        }
    }
}

/// What a row holds in a column: a nested value by its variant, `a.b` by its path.
fn find<'r>(row: &'r Row, column: &str) -> Option<&'r Json> {
    let value = match row.get(column) {
        Some(value) => value,
        None => {
            let (first, rest) = column.split_once('.')?;
            return find(row.get(first)?.as_object()?, rest);
        }
    };
    let tagged = |object: &'r Map<String, Json>| TAGS.iter().find_map(|tag| object.get(*tag));
    value.as_object().and_then(tagged).or(Some(value))
}

/// Which rows fulfil all filters.
///
/// # Errors
/// A filter names no column of any row, or compares what cannot be compared.
pub fn choose(rows: &[Row], filters: &[Filter]) -> Result<Vec<bool>, QueryError> {
    for filter in filters {
        let first = filter.column.split('.').next().unwrap_or_default();
        if !rows.is_empty() && !rows.iter().any(|row| row.contains_key(first)) {
            let mut known: Vec<&str> = rows[0].keys().map(String::as_str).collect();
            known.sort_unstable();
            let known = known.join(", ");
            return Err(QueryError::Column { column: filter.column.clone(), known });
        }
    }
    let mut chosen = Vec::with_capacity(rows.len());
    for row in rows {
        let mut fits = true;
        for filter in filters {
            fits = fits && filter.matches(row)?;
        }
        chosen.push(fits);
    }
    Ok(chosen)
}

/// The rows that fulfil all filters.
///
/// # Errors
/// As those of [`choose`].
pub fn filtered(rows: Vec<Row>, filters: &[Filter]) -> Result<Vec<Row>, QueryError> {
    let chosen = choose(&rows, filters)?;
    Ok(rows.into_iter().zip(chosen).filter_map(|(row, fits)| fits.then_some(row)).collect())
}

/// How many rows there are by what they hold in two columns; what is nothing counts as `-`.
pub fn count(rows: &[Row], by: &str, and: &str) -> BTreeMap<String, BTreeMap<String, u64>> {
    let word = |row: &Row, column: &str| match find(row, column) {
        None | Some(Json::Null) => "-".to_owned(),
        Some(Json::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let mut counts: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    for row in rows {
        *counts.entry(word(row, by)).or_default().entry(word(row, and)).or_default() += 1;
    }
    counts
}

/// A column of a table that others have laid down.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Whether rows can be chosen by it.
    pub filterable: bool,
    /// Whether it is shown only in detail.
    pub detail: bool,
}

/// The columns of one kind of thing.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// The column that tells things apart.
    pub id: &'static str,
    /// All columns.
    pub columns: &'static [Column],
}

/// What is asked of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// All must hold.
    pub filters: Vec<Filter>,
    /// Rows at most.
    pub limit: usize,
    /// Seconds that the answer may take.
    pub timeout_s: u64,
    /// Whether all columns are wanted.
    pub detail: bool,
}

impl Query {
    /// Rows that are shown unless it says otherwise, as in Ray.
    pub const LIMIT: usize = 100;
    /// Rows that can be asked for, as in Ray.
    pub const LIMIT_MAX: usize = 10_000;
    /// Seconds, as in Ray.
    pub const TIMEOUT_S: u64 = 30;

    /// Reads the parameters of a request as Ray's clients write them. What they send besides is of no consequence here.
    ///
    /// # Errors
    /// A parameter is not what it should be.
    pub fn parse(parameters: &[(String, String)]) -> Result<Self, QueryError> {
        let all = |wanted: &str| -> Vec<&str> {
            let of_name = parameters.iter().filter(|(name, _)| name == wanted);
            of_name.map(|(_, value)| value.as_str()).collect()
        };
        let (keys, predicates, values) = (all("filter_keys"), all("filter_predicates"), all("filter_values"));
        if keys.len() != values.len() || keys.len() != predicates.len() {
            let (keys, predicates, values) = (keys.len(), predicates.len(), values.len());
            return Err(QueryError::Uneven { keys, predicates, values });
        }
        let mut filters = Vec::with_capacity(keys.len());
        for ((key, predicate), value) in keys.into_iter().zip(predicates).zip(values) {
            let predicate = match predicate {
                "=" => Predicate::Is,
                "!=" => Predicate::IsNot,
                other => return Err(QueryError::Predicate(other.to_owned())),
            };
            filters.push(Filter::new(key, predicate, value));
        }
        let whole = |name: &str, or: u64, max: u64| match all(name).first() {
            None => Ok(or),
            Some(text) => text.parse().ok().filter(|n| (1..=max).contains(n)).ok_or_else(|| {
                let wanted = format!("a whole number from 1 to {max}");
                QueryError::Parameter { name: name.into(), value: (*text).into(), wanted }
            }),
        };
        let limit = whole("limit", Self::LIMIT as u64, Self::LIMIT_MAX as u64)?;
        let timeout_s = whole("timeout", Self::TIMEOUT_S, 3600)?;
        let detail = match all("detail").first().map(|text| text.to_ascii_lowercase()).as_deref() {
            None | Some("false" | "0") => false,
            Some("true" | "1") => true,
            Some(other) => {
                let wanted = "true or false".to_owned();
                return Err(QueryError::Parameter { name: "detail".into(), value: other.into(), wanted });
            }
        };
        Ok(Self { filters, limit: limit as usize, timeout_s, detail })
    }

    /// The answer over all `rows`, in the order of their ids.
    ///
    /// # Errors
    /// A filter does not fit the columns.
    pub fn answer(&self, rows: Vec<Row>, schema: &Schema) -> Result<Page, QueryError> {
        for filter in &self.filters {
            let filterable = || schema.columns.iter().filter(|column| column.filterable);
            if !filterable().any(|column| column.name == filter.column) {
                let known = filterable().map(|column| column.name).collect::<Vec<_>>().join(", ");
                return Err(QueryError::Column { column: filter.column.clone(), known });
            }
        }
        let total = rows.len();
        let mut kept = filtered(rows, &self.filters)?;
        let num_filtered = kept.len();
        let id = |row: &Row| row.get(schema.id).and_then(Json::as_str).unwrap_or_default().to_owned();
        kept.sort_by_cached_key(id);
        kept.truncate(self.limit);
        let shown = |mut row: Row| -> Row {
            let columns = schema.columns.iter().filter(|column| self.detail || !column.detail);
            columns
                .map(|column| (column.name.to_owned(), row.remove(column.name).unwrap_or_default()))
                .collect()
        };
        Ok(Page { total, num_filtered, rows: kept.into_iter().map(shown).collect() })
    }
}

/// What is shown of a listing.
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// Rows there are.
    pub total: usize,
    /// Rows that fulfil the filters.
    pub num_filtered: usize,
    /// Those that are shown.
    pub rows: Vec<Row>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SCHEMA: Schema = Schema {
        id: "name",
        columns: &[
            Column { name: "name", filterable: true, detail: false },
            Column { name: "pid", filterable: true, detail: false },
            Column { name: "head", filterable: true, detail: false },
            Column { name: "labels", filterable: false, detail: true },
        ],
    };

    fn row(value: Json) -> Row {
        value.as_object().cloned().unwrap()
    }

    fn rows() -> Vec<Row> {
        vec![
            row(json!({"name": "b", "pid": 7, "head": true, "labels": {"Zone/y": "x"}})),
            row(json!({"name": "A", "pid": null, "head": false, "labels": {}, "other": 1})),
        ]
    }

    fn names(text: &str) -> Result<Vec<String>, QueryError> {
        let kept = filtered(rows(), &[text.parse()?])?;
        Ok(kept.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn a_filter_compares_by_what_the_column_holds() {
        for (filter, wanted) in [
            ("name=a", &["A"][..]),
            ("NAME != a", &["b"]),
            ("pid=7", &["b"]),
            ("pid!=7", &["A"]),
            ("pid=null", &["A"]),
            ("pid!=null", &["b"]),
            ("head=1", &["b"]),
            ("head=False", &["A"]),
            ("LABELS.Zone/y=X", &["b"]),
            ("name=a=b", &[]),
        ] {
            assert_eq!(names(filter).unwrap(), wanted, "{filter}");
        }
    }

    #[test]
    fn a_filter_that_cannot_hold_is_refused_by_name() {
        assert_eq!(names("name"), Err(QueryError::NoFilter("name".into())));
        assert_eq!(names("=x"), Err(QueryError::NoFilter("=x".into())));
        assert!(names("nme=x").unwrap_err().to_string().contains("head, labels, name, pid"));
        assert!(names("pid=seven").unwrap_err().to_string().contains("pid holds a number"));
        assert!(names("head=yes").unwrap_err().to_string().contains("true or false"));
        assert!(names("labels=x").unwrap_err().to_string().contains("labels.Zone/y=VALUE"));
    }

    #[test]
    fn a_nested_state_is_compared_by_its_tag() {
        let rows = vec![row(json!({"name": "a", "state": {"state": "pending", "reason": "no room"}}))];
        assert_eq!(filtered(rows.clone(), &["state=PENDING".parse().unwrap()]).unwrap().len(), 1);
        assert_eq!(filtered(rows, &["state.reason!=no room".parse().unwrap()]).unwrap().len(), 0);
    }

    #[test]
    fn rows_are_counted_by_two_columns() {
        let rows: Vec<Row> = [("rank", "ready"), ("rank", "ready"), ("rank", "dead"), ("jobs", "ready")]
            .map(|(kind, state)| row(json!({"type": kind, "state": {"state": state}})))
            .to_vec();
        let counts = count(&rows, "type", "state");
        assert_eq!((counts["rank"]["ready"], counts["rank"]["dead"], counts["jobs"]["ready"]), (2, 1, 1));
        assert_eq!(count(&rows, "node", "state")["-"]["ready"], 3);
    }

    fn parse(text: &str) -> Result<Query, QueryError> {
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).filter_map(|pair| pair.split_once('='));
        Query::parse(&pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect::<Vec<_>>())
    }

    #[test]
    fn an_answer_is_sorted_cut_and_has_the_columns_of_the_schema() {
        let page = parse("limit=1&detail=False").unwrap().answer(rows(), &SCHEMA).unwrap();
        assert_eq!((page.total, page.num_filtered, page.rows.len()), (2, 2, 1));
        assert_eq!(Json::Object(page.rows[0].clone()), json!({"name": "A", "pid": null, "head": false}));
        let text = "filter_keys=pid&filter_predicates=!=&filter_values=9&detail=True&timeout=24";
        let page = parse(text).unwrap().answer(rows(), &SCHEMA).unwrap();
        assert_eq!(page.rows[1]["labels"], json!({"Zone/y": "x"}));
        let hidden = parse("filter_keys=labels&filter_predicates==&filter_values=x").unwrap();
        let error = hidden.answer(rows(), &SCHEMA).unwrap_err().to_string();
        assert!(error.ends_with("there are: name, pid, head"), "{error}");
    }

    #[test]
    fn parameters_are_checked() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(error("limit=10001").contains("1 to 10000"));
        assert!(error("limit=x").contains("limit"));
        assert!(error("detail=maybe").contains("true or false"));
        assert!(error("filter_keys=a").contains("1 filter_keys"));
        assert!(error("filter_keys=a&filter_predicates=<&filter_values=1").contains("use = or !="));
    }
}

//! What an answer must look like: OpenAI's `response_format`, and vLLM's fields for the same.

use heliostat_engine::grammar::Grammar;
use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;

/// The fields that any of both say it in.
pub(super) const FIELDS: &[&str] = &[
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
];

const CHOICES_MAX: usize = 1024;

/// At most one of them may ask for something.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Structured {
    pub(super) response_format: Option<Format>,
    structured_outputs: Option<Outputs>,
    guided_json: Option<Json>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
}

/// `response_format`, and `text.format` of the responses API.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Format {
    /// Anything.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON by a schema: in an object of its own, or beside the type as the responses API has it.
    JsonSchema { json_schema: Option<NamedSchema>, schema: Option<Json> },
    /// Text that a regular expression matches.
    Regex { regex: String },
    /// Text of a Lark grammar.
    Grammar { grammar: String },
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NamedSchema {
    schema: Option<Json>,
}

/// vLLM's `structured_outputs`.
#[derive(Debug, Default, Deserialize)]
struct Outputs {
    json: Option<Json>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
}

impl Structured {
    /// What was asked for and the field that says so.
    pub(super) fn grammar(self) -> Result<Option<(&'static str, Grammar)>, ApiError> {
        let mut asked = Vec::new();
        if let Some(format) = self.response_format {
            asked.extend(format.grammar("response_format")?.map(|grammar| ("response_format", grammar)));
        }
        if let Some(outputs) = self.structured_outputs {
            let object = outputs.json_object == Some(true);
            asked.extend(outputs.json.map(|schema| ("structured_outputs", json_schema(&schema))));
            asked.extend(object.then(|| ("structured_outputs", any_object())));
            asked.extend(outputs.regex.map(|regex| ("structured_outputs", Grammar::Regex(regex))));
            asked.extend(outputs.choice.map(|choice| one_of("structured_outputs", &choice)).transpose()?);
            asked.extend(outputs.grammar.map(|grammar| lark("structured_outputs", grammar)).transpose()?);
        }
        asked.extend(self.guided_json.map(|schema| ("guided_json", json_schema(&schema))));
        asked.extend(self.guided_regex.map(|regex| ("guided_regex", Grammar::Regex(regex))));
        asked.extend(self.guided_choice.map(|choice| one_of("guided_choice", &choice)).transpose()?);
        asked.extend(self.guided_grammar.map(|grammar| lark("guided_grammar", grammar)).transpose()?);
        if let [(first, _), (second, _), ..] = &asked[..] {
            let message =
                format!("Only one grammar is possible, but `{first}` and `{second}` both ask for one.");
            return Err(ApiError::invalid(*second, message));
        }
        Ok(asked.pop())
    }
}

impl Format {
    /// The grammar that it stands for; none for plain text.
    pub(super) fn grammar(self, param: &'static str) -> Result<Option<Grammar>, ApiError> {
        match self {
            Self::Text => Ok(None),
            Self::JsonObject => Ok(Some(any_object())),
            Self::JsonSchema { json_schema: named, schema } => {
                let schema = schema.or_else(|| named?.schema).ok_or_else(|| {
                    let message = format!("`{param}` of type json_schema has no `schema`.");
                    ApiError::invalid(param, message)
                })?;
                Ok(Some(json_schema(&schema)))
            }
            Self::Regex { regex } => Ok(Some(Grammar::Regex(regex))),
            Self::Grammar { grammar } => lark(param, grammar).map(|(_, grammar)| Some(grammar)),
        }
    }
}

/// Compiles the grammar once, so that a mistake is told before anything runs.
pub(super) fn check(model: &ServedModel, param: &str, grammar: &Grammar) -> Result<(), ApiError> {
    let vocabulary = model.text.vocabulary(&model.defaults.eos_token_ids);
    let compiled = vocabulary.and_then(|vocabulary| vocabulary.compile(grammar));
    compiled.map(drop).map_err(|why| ApiError::invalid(param, format!("`{param}` cannot be followed: {why}")))
}

/// JSON by that schema, which vLLM also takes as text.
pub(super) fn json_schema(schema: &Json) -> Grammar {
    Grammar::JsonSchema(schema.as_str().map_or_else(|| schema.to_string(), str::to_owned))
}

fn any_object() -> Grammar {
    json_schema(&json!({"type": "object"}))
}

fn one_of(param: &'static str, choices: &[String]) -> Result<(&'static str, Grammar), ApiError> {
    if !(1..=CHOICES_MAX).contains(&choices.len()) || choices.iter().any(String::is_empty) {
        let message = format!("`{param}` must have between 1 and {CHOICES_MAX} choices, none of them empty.");
        return Err(ApiError::invalid(param, message));
    }
    let quoted: Vec<String> = choices.iter().map(|choice| Json::from(choice.as_str()).to_string()).collect();
    Ok((param, Grammar::Lark(format!("start: {}", quoted.join(" | ")))))
}

fn lark(param: &'static str, grammar: String) -> Result<(&'static str, Grammar), ApiError> {
    if grammar.contains("::=") {
        let message = format!(
            "`{param}` is in GBNF, but this server reads Lark: write `rule: ...` instead of `rule ::= ...`, begin with `start:`."
        );
        return Err(ApiError::invalid(param, message));
    }
    Ok((param, Grammar::Lark(grammar)))
}

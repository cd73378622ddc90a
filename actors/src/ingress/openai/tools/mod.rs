//! Tools: what a request offers to the model, and the calls that the model makes of it.
//!
//! With `tool_choice` `auto` the model calls in the form that its chat template teaches ([`CallForm`]). Where a call is
//! required, or one function is named, a grammar leaves the model no other way, whatever its template teaches.

mod form;
mod parser;

use heliostat_engine::grammar::Grammar;
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;

use super::structured;

use form::CallForm;
pub(super) use parser::{CallParser, Piece};

const TOOLS_MAX: usize = 128;

/// The fields of a request.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ToolFields {
    tools: Option<Vec<Json>>,
    tool_choice: Option<Json>,
    parallel_tool_calls: Option<bool>,
}

/// Who chooses.
#[derive(Clone, Debug, PartialEq)]
enum Choice {
    Auto,
    Required,
    Named(String),
}

/// Tools that the model may or must call.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    definitions: Vec<Json>,
    choice: Choice,
    parallel: bool,
}

impl ToolFields {
    /// The offer, checked; `None` where the request offers nothing.
    pub(super) fn offer(self) -> Result<Option<Tools>, ApiError> {
        let definitions = self.tools.unwrap_or_default();
        if definitions.len() > TOOLS_MAX {
            let message =
                format!("`tools` has {} tools, but at most {TOOLS_MAX} are allowed.", definitions.len());
            return Err(ApiError::invalid("tools", message));
        }
        let names: Vec<&str> = definitions
            .iter()
            .enumerate()
            .map(|(index, tool)| name_of(index, tool))
            .collect::<Result<_, _>>()?;
        let choice = match choice_of(self.tool_choice.as_ref())? {
            None => return Ok(None),
            Some(Choice::Auto) if names.is_empty() => return Ok(None),
            Some(Choice::Named(name)) if !names.contains(&name.as_str()) => {
                let message = format!("`tool_choice` names `{name}`, which is not among `tools`.");
                return Err(ApiError::invalid("tool_choice", message));
            }
            Some(Choice::Required) if names.is_empty() => {
                return Err(ApiError::invalid(
                    "tool_choice",
                    "`tool_choice` is required, but `tools` is empty.",
                ));
            }
            Some(choice) => choice,
        };
        Ok(Some(Tools { definitions, choice, parallel: self.parallel_tool_calls.unwrap_or(true) }))
    }
}

/// The name of a function that a tool is.
fn name_of(index: usize, tool: &Json) -> Result<&str, ApiError> {
    let param = format!("tools[{index}]");
    match tool.get("type").and_then(Json::as_str) {
        Some("function") => {}
        Some(other) => {
            let message = format!("`{param}` is of type `{other}`, but only functions are supported.");
            return Err(ApiError::unsupported(&param, message));
        }
        None => {
            let message = format!("`{param}` must be {{\"type\": \"function\", \"function\": {{...}}}}.");
            return Err(ApiError::invalid(param, message));
        }
    }
    let name = tool.pointer("/function/name").and_then(Json::as_str).unwrap_or_default();
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > 64 || !name.chars().all(usable) {
        let message = format!("`{param}.function.name` must be 1 to 64 letters, digits, `_`, `-` or `.`.");
        return Err(ApiError::invalid(format!("{param}.function.name"), message));
    }
    match tool.pointer("/function/parameters") {
        None | Some(Json::Null | Json::Object(_)) => Ok(name),
        Some(_) => {
            let message = format!("`{param}.function.parameters` must be a JSON schema.");
            Err(ApiError::invalid(format!("{param}.function.parameters"), message))
        }
    }
}

/// `None` means that no tool may be called.
fn choice_of(choice: Option<&Json>) -> Result<Option<Choice>, ApiError> {
    match choice {
        None | Some(Json::Null) => Ok(Some(Choice::Auto)),
        Some(Json::String(choice)) => match choice.as_str() {
            "none" => Ok(None),
            "auto" => Ok(Some(Choice::Auto)),
            "required" => Ok(Some(Choice::Required)),
            other => {
                let message = format!(
                    "`tool_choice` is `{other}`, but must be none, auto, required or name a function."
                );
                Err(ApiError::invalid("tool_choice", message))
            }
        },
        Some(named) => match named.pointer("/function/name").and_then(Json::as_str) {
            Some(name) => Ok(Some(Choice::Named(name.to_owned()))),
            None => {
                let message = "`tool_choice` must be a string or {\"type\": \"function\", \"function\": {\"name\": ...}}.";
                Err(ApiError::invalid("tool_choice", message))
            }
        },
    }
}

impl Tools {
    /// What the chat template shows to the model.
    pub(super) fn definitions(&self) -> &[Json] {
        &self.definitions
    }

    /// The grammar that makes the model call, where it must.
    pub(super) fn grammar(&self) -> Result<Option<Grammar>, ApiError> {
        match &self.choice {
            Choice::Auto => Ok(None),
            Choice::Named(name) => {
                let tool = self.definitions.iter().find(|tool| tool["function"]["name"] == name.as_str());
                Ok(tool.map(|tool| structured::json_schema(&parameters(tool))))
            }
            Choice::Required => self.required().map(Some),
        }
    }

    /// A list of at least one `{"name", "parameters"}`, as vLLM has it.
    fn required(&self) -> Result<Grammar, ApiError> {
        let mut shared = Map::new();
        let mut calls = Vec::new();
        for tool in &self.definitions {
            let mut parameters = parameters(tool);
            let own = parameters.as_object_mut().and_then(|parameters| parameters.remove("$defs"));
            for (name, definition) in own.as_ref().and_then(Json::as_object).into_iter().flatten() {
                // References are looked up in the whole schema, so definitions of all functions move to its top.
                let earlier = shared.insert(name.clone(), definition.clone());
                if earlier.is_some_and(|earlier| earlier != *definition) {
                    let message = format!("`tools` define `{name}` in two ways; rename one of them.");
                    return Err(ApiError::invalid("tools", message));
                }
            }
            calls.push(json!({
                "type": "object",
                "properties": {"name": {"enum": [tool["function"]["name"]]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": false,
            }));
        }
        let mut schema = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
        if !self.parallel {
            schema["maxItems"] = json!(1);
        }
        if !shared.is_empty() {
            schema["$defs"] = Json::Object(shared);
        }
        Ok(structured::json_schema(&schema))
    }

    /// Finds the calls in one sequence's text.
    pub(super) fn parser(&self, model: &ServedModel) -> CallParser {
        let calls_max = if self.parallel { usize::MAX } else { 1 };
        match &self.choice {
            Choice::Auto => CallParser::marked(self.form(model), calls_max),
            Choice::Required => CallParser::list(calls_max),
            Choice::Named(name) => CallParser::named(name.clone()),
        }
    }

    /// The form in which the model calls by its own choice.
    fn form(&self, model: &ServedModel) -> Option<CallForm> {
        let template = model.text.chat_template().filter(|_| self.choice == Choice::Auto)?;
        CallForm::of_template(template.source())
    }

    /// Whether the marks of calls are control tokens, which must be text then.
    pub(super) fn marks_are_control(&self, model: &ServedModel) -> bool {
        self.form(model).is_some_and(|form| model.text.is_control(form.marks().begin))
    }

    /// Refuses an offer of which the model would never hear.
    pub(super) fn check_template(&self, model: &ServedModel) -> Result<(), ApiError> {
        let shown = model.text.chat_template().is_some_and(|template| template.source().contains("tools"));
        if shown || self.choice != Choice::Auto {
            return Ok(());
        }
        let message = "The model's chat template shows no tools to the model. Require a call or name a function by `tool_choice`.";
        Err(ApiError::unsupported("tools", message))
    }

    /// OpenAI says `tool_calls` when the model decided to call, `stop` when it was told to call this function.
    pub(super) fn ends_with_calls(&self) -> bool {
        !matches!(self.choice, Choice::Named(_))
    }
}

fn parameters(tool: &Json) -> Json {
    let parameters = tool.pointer("/function/parameters").filter(|parameters| !parameters.is_null());
    parameters.cloned().unwrap_or_else(|| json!({"type": "object", "properties": {}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(fields: Json) -> Result<Option<Tools>, String> {
        let fields: ToolFields = serde_json::from_value(fields).unwrap();
        fields.offer().map_err(|error| error.to_string())
    }

    #[test]
    fn definitions_of_all_functions_move_to_the_top() {
        let tool = |name: &str, of: &str| {
            let parameters = json!({"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": of}}});
            json!({"type": "function", "function": {"name": name, "parameters": parameters}})
        };
        let fields = |second: &str| json!({"tools": [tool("a", "string"), tool("b", second)], "tool_choice": "required"});
        let grammar = offer(fields("string")).unwrap().unwrap().grammar().unwrap().unwrap();
        let Grammar::JsonSchema(schema) = grammar else { panic!("no schema") };
        let schema: Json = serde_json::from_str(&schema).unwrap();
        assert_eq!(schema["$defs"], json!({"X": {"type": "string"}}));
        assert_eq!(schema["items"]["anyOf"][1]["properties"]["parameters"].get("$defs"), None);
        let clash = offer(fields("number")).unwrap().unwrap().grammar().unwrap_err().to_string();
        assert!(clash.contains("define `X` in two ways"), "{clash}");
    }

    #[test]
    fn what_is_wrong_with_an_offer_is_told() {
        let tools = json!([{"type": "function", "function": {"name": "a"}}]);
        assert!(offer(json!({})).unwrap().is_none());
        assert!(offer(json!({"tools": tools, "tool_choice": "none"})).unwrap().is_none());
        for (fields, part) in [
            (json!({"tools": [{"type": "web_search"}]}), "only functions"),
            (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
            (json!({"tools": tools, "tool_choice": "always"}), "must be none, auto, required"),
            (
                json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "names `b`",
            ),
            (json!({"tool_choice": "required"}), "`tools` is empty"),
        ] {
            let message = offer(fields.clone()).map(|_| ()).unwrap_err();
            assert!(message.contains(part), "{fields}: {message}");
        }
    }
}

//! From a conversation to a prompt: messages checked and brought into the form that chat templates expect.

use serde_json::{Map, Value as Json};

use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;
use crate::ingress::text::ChatTemplate;

use super::body::empty;
use super::job::{Prompt, encode};
use super::tools::Tools;

const MESSAGES_MAX: usize = 4096;

/// A conversation and how it is to be rendered.
pub(super) struct Conversation<'a> {
    pub(super) messages: &'a [Map<String, Json>],
    /// The field that they came from.
    pub(super) param: &'static str,
    pub(super) add_generation_prompt: bool,
    /// The client's `chat_template_kwargs`.
    pub(super) extra: Map<String, Json>,
    /// What the model may call.
    pub(super) tools: Option<&'a Tools>,
}

impl Conversation<'_> {
    /// The prompt by the model's template. Its control tokens stand in the template.
    pub(super) fn prompt(self, model: &ServedModel) -> Result<Prompt, ApiError> {
        let text = self.render(model)?;
        Ok(Prompt { ids: encode(model, self.param, &text, false)?, text: None })
    }

    /// The prompt's text.
    fn render(&self, model: &ServedModel) -> Result<String, ApiError> {
        let Some(template) = model.text.chat_template() else {
            let message = "The model has no chat template; use /v1/completions.";
            return Err(ApiError::invalid(self.param, message));
        };
        let count = self.messages.len();
        if !(1..=MESSAGES_MAX).contains(&count) {
            let param = self.param;
            let message =
                format!("`{param}` has {count} messages, but must have between 1 and {MESSAGES_MAX}.");
            return Err(ApiError::invalid(param, message));
        }
        let plain = Plain { param: self.param, arguments: ArgumentsAs::of(template) };
        let messages = self.messages.iter().enumerate().map(|(index, message)| plain.message(index, message));
        let messages: Vec<Json> = messages.collect::<Result<_, _>>()?;
        let mut extra = self.extra.clone();
        if let Some(tools) = self.tools {
            extra.insert("tools".into(), Json::Array(tools.definitions().to_vec()));
        }
        let rendered = template.render(&messages, self.add_generation_prompt, &extra);
        rendered.map_err(|error| ApiError::invalid(self.param, error.to_string()))
    }
}

/// How a template takes the arguments of earlier calls, which clients send as text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ArgumentsAs {
    Text,
    Object,
}

impl ArgumentsAs {
    fn of(template: &ChatTemplate) -> Self {
        let packed: String = template.source().split_whitespace().collect();
        if packed.contains("arguments|tojson") { Self::Object } else { Self::Text }
    }
}

/// Messages as templates expect them.
struct Plain {
    param: &'static str,
    arguments: ArgumentsAs,
}

impl Plain {
    /// Content as one string; OpenAI's newer `developer` is `system`.
    fn message(&self, index: usize, message: &Map<String, Json>) -> Result<Json, ApiError> {
        let param = |field: &str| format!("{}[{index}].{field}", self.param);
        let role = match message.get("role").and_then(Json::as_str) {
            Some("developer" | "system") => "system",
            Some("user") => "user",
            Some("assistant") => "assistant",
            Some("tool") => "tool",
            Some("function") => {
                let param = param("role");
                let message = format!("`{param}`: the role `function` is not supported; use `tool`.");
                return Err(ApiError::unsupported(&param, message));
            }
            other => {
                let param = param("role");
                let found = other.map_or("missing or no string".to_owned(), |role| format!("`{role}`"));
                let message = format!(
                    "`{param}` is {found}, but must be one of system, developer, user, assistant, tool."
                );
                return Err(ApiError::invalid(param, message));
            }
        };
        for field in ["function_call", "audio"] {
            if message.get(field).is_some_and(|value| !empty(value)) {
                let param = param(field);
                let message = format!("`{param}` is not supported by this server.");
                return Err(ApiError::unsupported(&param, message));
            }
        }
        let content = match message.get("content") {
            Some(Json::String(text)) => text.clone(),
            Some(Json::Array(parts)) => {
                let text = |(part, value)| text_part(&format!("{}[{part}]", param("content")), value);
                parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n")
            }
            None | Some(Json::Null) if role == "assistant" => String::new(),
            _ => {
                let param = param("content");
                let message = format!("`{param}` must be a string or an array of text parts.");
                return Err(ApiError::invalid(param, message));
            }
        };
        let mut plain = message.clone();
        plain.insert("role".into(), role.into());
        plain.insert("content".into(), content.into());
        match plain.get_mut("tool_calls") {
            Some(calls) if !empty(calls) => self.calls(&param("tool_calls"), calls)?,
            _ => drop(plain.shift_remove("tool_calls")),
        }
        Ok(Json::Object(plain))
    }

    /// Earlier calls of the model.
    fn calls(&self, param: &str, calls: &mut Json) -> Result<(), ApiError> {
        for (index, call) in calls.as_array_mut().into_iter().flatten().enumerate() {
            let wrong = |what: &str| ApiError::invalid(param, format!("`{param}[{index}]` {what}."));
            if !call.pointer("/function/name").is_some_and(Json::is_string) {
                return Err(wrong("must be {\"id\", \"type\", \"function\": {\"name\", \"arguments\"}}"));
            }
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            match (self.arguments, &*arguments) {
                (ArgumentsAs::Object, Json::String(text)) => {
                    let text = if text.trim().is_empty() { "{}" } else { text };
                    *arguments =
                        serde_json::from_str(text).map_err(|_| wrong("has arguments that are no JSON"))?;
                }
                (ArgumentsAs::Text, Json::Object(_)) => *arguments = arguments.to_string().into(),
                (ArgumentsAs::Object | ArgumentsAs::Text, _) => {}
            }
        }
        Ok(())
    }
}

fn text_part(param: &str, part: &Json) -> Result<String, ApiError> {
    match (part.get("type").and_then(Json::as_str), part.get("text").and_then(Json::as_str)) {
        (Some("text" | "input_text" | "output_text"), Some(text)) => Ok(text.to_owned()),
        (Some("text") | None, _) => Err(ApiError::invalid(
            param,
            format!("`{param}` must be {{\"type\": \"text\", \"text\": \"...\"}}."),
        )),
        (Some(kind), _) => {
            let message = format!("`{param}` is of type `{kind}`, but only text is supported.");
            Err(ApiError::unsupported(param, message))
        }
    }
}

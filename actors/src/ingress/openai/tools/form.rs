//! How models write calls, each family in its own way, known by the marks in its chat template.

use serde_json::Value as Json;

/// A form of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ingress::openai) enum CallForm {
    /// Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
    Hermes,
    /// DeepSeek V3 and R1: `function`, a separator, the name, and the arguments in a fence.
    DeepSeekV3,
    /// DeepSeek V3.1: the name, a separator, the arguments.
    DeepSeekV31,
    /// Kimi K2: `functions.NAME:INDEX`, a mark, the arguments.
    KimiK2,
}

/// Where a call begins and ends in the text, and marks around all calls that say nothing.
#[derive(Debug)]
pub(super) struct Marks {
    pub(super) begin: &'static str,
    pub(super) end: &'static str,
    pub(super) around: &'static [&'static str],
}

const FENCED: &str = "\n```json\n";

impl CallForm {
    /// The form that a template teaches; none where it shows no tools, or in a form that is not known here.
    pub(super) fn of_template(source: &str) -> Option<Self> {
        if source.contains("<|tool_call_argument_begin|>") {
            Some(Self::KimiK2)
        } else if source.contains("<｜tool▁call▁begin｜>") {
            Some(if source.contains("```json") { Self::DeepSeekV3 } else { Self::DeepSeekV31 })
        } else if source.contains("<tool_call>") && !source.contains("<function=") {
            Some(Self::Hermes)
        } else {
            None
        }
    }

    pub(super) fn marks(self) -> Marks {
        match self {
            Self::Hermes => Marks { begin: "<tool_call>", end: "</tool_call>", around: &[] },
            Self::DeepSeekV3 | Self::DeepSeekV31 => Marks {
                begin: "<｜tool▁call▁begin｜>",
                end: "<｜tool▁call▁end｜>",
                around: &["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
            },
            Self::KimiK2 => Marks {
                begin: "<|tool_call_begin|>",
                end: "<|tool_call_end|>",
                around: &["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"],
            },
        }
    }

    /// Name and arguments of the call between its marks; none where that is no call.
    pub(super) fn parse(self, call: &str) -> Option<(String, String)> {
        let (name, arguments) = match self {
            Self::Hermes => return parse_object(call, "arguments"),
            Self::DeepSeekV3 => {
                let (_, call) = call.split_once("<｜tool▁sep｜>")?;
                let (name, fenced) = call.split_once(FENCED)?;
                (name, fenced.trim_end().strip_suffix("```").unwrap_or(fenced))
            }
            Self::DeepSeekV31 => call.split_once("<｜tool▁sep｜>")?,
            Self::KimiK2 => {
                let (id, arguments) = call.split_once("<|tool_call_argument_begin|>")?;
                let id = id.trim();
                let name = id.strip_prefix("functions.").unwrap_or(id);
                (name.rsplit_once(':').map_or(name, |(name, _)| name), arguments)
            }
        };
        let (name, arguments) = (name.trim(), arguments.trim());
        let is_object = serde_json::from_str::<Json>(arguments).is_ok_and(|arguments| arguments.is_object());
        (!name.is_empty() && is_object).then(|| (name.to_owned(), arguments.to_owned()))
    }
}

/// Name and arguments of `{"name": ..., FIELD: {...}}`.
pub(super) fn parse_object(call: &str, field: &str) -> Option<(String, String)> {
    let call: Json = serde_json::from_str(call.trim()).ok()?;
    let name = call.get("name")?.as_str()?.to_owned();
    let arguments = match call.get(field) {
        None | Some(Json::Null) => "{}".to_owned(),
        Some(Json::String(arguments)) => arguments.clone(),
        Some(arguments @ Json::Object(_)) => arguments.to_string(),
        Some(_) => return None,
    };
    Some((name, arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_writes_calls_its_own_way() {
        let expected = Some(("get_weather".to_owned(), r#"{"city":"Bern","days":2}"#.to_owned()));
        for (form, call) in [
            (
                CallForm::Hermes,
                "\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Bern\", \"days\": 2}}\n",
            ),
            (
                CallForm::DeepSeekV3,
                "function<｜tool▁sep｜>get_weather\n```json\n{\"city\":\"Bern\",\"days\":2}\n```",
            ),
            (CallForm::DeepSeekV31, "get_weather<｜tool▁sep｜>{\"city\":\"Bern\",\"days\":2}"),
            (
                CallForm::KimiK2,
                "functions.get_weather:0<|tool_call_argument_begin|>{\"city\":\"Bern\",\"days\":2}",
            ),
        ] {
            assert_eq!(form.parse(call), expected, "{form:?}");
            let cut = call.rfind(':').unwrap();
            assert_eq!(form.parse(&call[..cut]), None, "{form:?}");
        }
    }
}

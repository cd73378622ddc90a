//! Renders a model's chat template as Hugging Face transformers does: Jinja with `trim_blocks` and `lstrip_blocks`,
//! Python's string and dict methods, `raise_exception` and `strftime_now`.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value as Json};
use time::OffsetDateTime;
use time::format_description::parse_strftime_owned;

const NAME: &str = "chat_template";

/// A compiled chat template with the model's special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token`, `eos_token` and their like.
    special_tokens: Map<String, Json>,
}

/// A conversation that the template does not take; its words for why.
#[derive(Debug, thiserror::Error)]
#[error("the chat template refused the messages: {0}")]
pub struct RenderError(String);

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// The template uses what is not Jinja, or not supported.
    pub fn compile(source: &str, special_tokens: Map<String, Json>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Self { environment, source: source.to_owned(), special_tokens })
    }

    /// What it was compiled from: it shows in which form the model knows tools.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages`; `extra` is the client's `chat_template_kwargs`.
    ///
    /// # Errors
    /// The template raised an exception, or does not fit the messages.
    pub fn render(
        &self,
        messages: &[Json],
        add_generation_prompt: bool,
        extra: &Map<String, Json>,
    ) -> Result<String, RenderError> {
        let mut context = self.special_tokens.clone();
        context.extend(extra.clone());
        context.insert("messages".into(), Json::Array(messages.to_vec()));
        context.insert("add_generation_prompt".into(), Json::Bool(add_generation_prompt));
        context.entry("tools").or_insert(Json::Null);
        context.entry("documents").or_insert(Json::Null);
        let template = self.environment.get_template(NAME).expect("it was added when compiled");
        template
            .render(Value::from(Serde(&context)))
            .map_err(|error| RenderError(error.detail().map_or_else(|| error.to_string(), str::to_owned)))
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The date in UTC, by Python's format codes.
fn strftime_now(format: String) -> Result<String, Error> {
    let invalid = |error: String| Error::new(ErrorKind::InvalidOperation, error);
    let parsed = parse_strftime_owned(&format).map_err(|error| invalid(error.to_string()))?;
    OffsetDateTime::now_utc().format(&parsed).map_err(|error| invalid(error.to_string()))
}

/// `json.dumps(value, ensure_ascii=False)`: Python's separators, nothing escaped for HTML.
fn to_json(value: Value, options: minijinja::value::Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<Value> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let json = serde_json::to_value(Serde(&value).0).map_err(failed)?;
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSeparators);
            json.serialize(&mut serializer).map_err(failed)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8(out).expect("JSON is UTF-8")))
}

/// `, ` and `: `.
struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Json) -> Result<String, RenderError> {
        let special = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
        let template = ChatTemplate::compile(source, special).unwrap();
        template.render(messages.as_array().unwrap(), true, &Map::new())
    }

    #[test]
    fn whitespace_methods_and_namespaces_are_as_in_transformers() {
        let source = "{% set ns = namespace(n=0) %}\n{{ bos_token }}\n    {% for m in messages if m['role'] != 'system' %}\n\
            {% set ns.n = ns.n + 1 %}\n{{ m.content.strip().split('|')[-1] }}{{ m.get('name', '-') }}\n    {%- endfor %}\n\
            {% if tools %}T{% endif %}{{ ns.n }}{% if not enable_thinking is defined %}!{% endif %}\n";
        let messages = json!([{"role": "system", "content": "x"}, {"role": "user", "content": " a|b "}]);
        assert_eq!(render(source, messages).unwrap(), "<s>\nb-1!");
    }

    #[test]
    fn an_exception_of_the_template_carries_its_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert!(error.to_string().ends_with("refused the messages: roles must alternate"), "{error}");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let messages = json!([{"role": "user", "content": "<é> \"q\"", "x": [1, 2]}]);
        let expected = r#"{"role": "user", "content": "<é> \"q\"", "x": [1, 2]}"#;
        assert_eq!(render("{{ messages[0] | tojson }}", messages).unwrap(), expected);
    }

    #[test]
    fn strftime_now_takes_pythons_codes() {
        let date = render("{{ strftime_now('%d %b %Y') }}", json!([])).unwrap();
        let expected = OffsetDateTime::now_utc();
        assert!(date.ends_with(&expected.year().to_string()) && date.len() == 11, "{date}");
    }
}

//! The model as HTTP clients see it: its names, its limits, and how it is sampled unless they say otherwise.

use std::sync::Arc;

use heliostat_engine::config::GenerationDefaults;

use super::text::TextModel;

/// The served model.
#[derive(Clone)]
pub struct ServedModel {
    /// Names by which clients may call it; the first is told to them. At least one.
    pub names: Vec<String>,
    /// Tokens of a prompt and its output together.
    pub context_length: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokenizer and chat template.
    pub text: Arc<TextModel>,
    /// generation_config.json.
    pub defaults: GenerationDefaults,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
}

impl ServedModel {
    /// The name told to clients.
    pub fn name(&self) -> &str {
        self.names.first().map_or("model", String::as_str)
    }

    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }
}

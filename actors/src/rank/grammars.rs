//! Grammars of requests, compiled for the model's vocabulary.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use heliostat_engine::config::GenerationDefaults;
use heliostat_engine::grammar::{Constraint, Grammar};

use crate::ingress::text::TextModel;

/// The model's vocabulary, read when the first request has a grammar: most ranks never need it.
pub(super) struct Grammars {
    model: PathBuf,
    text: OnceLock<Result<Text, String>>,
}

struct Text {
    model: Arc<TextModel>,
    eos: Vec<u32>,
}

impl Grammars {
    /// For the checkpoint in that directory.
    pub(super) fn new(model: PathBuf) -> Self {
        Self { model, text: OnceLock::new() }
    }

    /// Makes a grammar ready. Blocks: the first call reads the tokenizer.
    pub(super) fn compile(&self, grammar: &Grammar) -> Result<Constraint, String> {
        let read = || {
            let model = TextModel::load(&self.model).map_err(|why| why.to_string())?;
            let defaults = GenerationDefaults::from_dir(&self.model).map_err(|why| why.to_string())?;
            Ok(Text { model, eos: defaults.eos_token_ids })
        };
        let Text { model, eos } = self.text.get_or_init(read).as_ref().map_err(Clone::clone)?;
        let vocabulary = model.vocabulary(eos).map_err(|why| why.to_string())?;
        vocabulary.compile(grammar).map_err(|why| why.to_string())
    }
}

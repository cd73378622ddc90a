//! Grammars of requests, compiled for the model's vocabulary.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use heliostat_engine::config::GenerationDefaults;
use heliostat_engine::grammar::{Constraint, Grammar};

use crate::ingress::text::TextModel;

/// The model's vocabulary, read when the first request has a grammar: most ranks never need it.
pub(super) struct Grammars {
    model: PathBuf,
    text: OnceLock<Result<(Arc<TextModel>, Vec<u32>), String>>,
}

impl Grammars {
    /// For the checkpoint in that directory.
    pub(super) fn new(model: PathBuf) -> Self {
        Self { model, text: OnceLock::new() }
    }

    /// Makes a grammar ready. Blocks: the first call reads the tokenizer.
    pub(super) fn compile(&self, grammar: &Grammar) -> Result<Constraint, String> {
        let read = || {
            let text = TextModel::load(&self.model).map_err(|why| why.to_string())?;
            let defaults = GenerationDefaults::from_dir(&self.model).map_err(|why| why.to_string())?;
            Ok((text, defaults.eos_token_ids))
        };
        let (text, eos) = self.text.get_or_init(read).as_ref().map_err(Clone::clone)?;
        let vocabulary = text.vocabulary(eos).map_err(|why| why.to_string())?;
        vocabulary.compile(grammar).map_err(|why| why.to_string())
    }
}

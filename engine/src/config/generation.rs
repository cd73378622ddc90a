//! Reads generation_config.json: which tokens end a sequence and how tokens are drawn unless a request says otherwise.

use std::path::Path;

use super::fields::{ConfigError, Fields, read_object};

/// What a model's authors recommend for generation. A request overrides each of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a sequence.
    pub bos_token_id: Option<u32>,
    /// Temperature; 0 where `do_sample` is false.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most likely tokens kept.
    pub top_k: Option<u32>,
    /// Least likelihood kept, relative to the most likely token.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Output tokens where the request sets no limit.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Reads generation_config.json of `dir`, and config.json for what it does not say. The first may be absent.
    ///
    /// # Errors
    /// A file that is not JSON, or a field of the wrong type.
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        let config_file = dir.join("config.json");
        let config = read_object(&config_file)?;
        let config = Fields::new(&config_file, &config);
        let file = dir.join("generation_config.json");
        let object = if file.exists() { read_object(&file)? } else { serde_json::Map::new() };
        let fields = Fields::new(&file, &object);

        let mut defaults = Self::sampling(&fields)?;
        defaults.eos_token_ids = fields.integers("eos_token_id")?;
        if defaults.eos_token_ids.is_empty() {
            defaults.eos_token_ids = config.integers("eos_token_id")?;
        }
        let bos = fields.integers("bos_token_id")?.first().copied();
        defaults.bos_token_id = bos.or(config.integers("bos_token_id")?.first().copied());
        Ok(defaults)
    }

    fn sampling(fields: &Fields<'_>) -> Result<Self, ConfigError> {
        let greedy = !fields.bool_or("do_sample", true)?;
        let at_least_0 = |field| match fields.number(field)? {
            Some(number) if number < 0.0 => Err(fields.error(field, format!("{number} must be at least 0"))),
            number => Ok(number.map(|number| number as f32)),
        };
        Ok(Self {
            temperature: if greedy { Some(0.0) } else { at_least_0("temperature")? },
            top_p: fields.positive("top_p")?.map(|top_p| top_p as f32),
            top_k: fields.count("top_k")?.map(|top_k| top_k as u32),
            min_p: at_least_0("min_p")?,
            repetition_penalty: fields.positive("repetition_penalty")?.map(|penalty| penalty as f32),
            max_new_tokens: fields.count("max_new_tokens")?.map(|tokens| tokens as u32),
            ..Self::default()
        })
    }
}

//! Everything about a model's text that lies in its checkpoint directory: tokenizer.json, tokenizer_config.json, the
//! chat template.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use heliostat_engine::grammar::{GrammarError, TokenText, Vocabulary};
use serde_json::{Map, Value as Json};
use tokenizers::Tokenizer;

use super::bytes::TokenBytes;
use super::template::ChatTemplate;

/// Tokenizer and chat template of one model. Shared by all requests; nothing in it changes.
pub struct TextModel {
    tokenizer: Tokenizer,
    bytes: Option<TokenBytes>,
    /// Bytes of the longest token, where no text has fewer tokens than its bytes divided by this.
    token_bytes_max: Option<usize>,
    special: HashSet<u32>,
    /// Prepended to prompts whose tokenizer.json does not do it itself.
    bos: Option<u32>,
    template: Option<ChatTemplate>,
    /// What clients that tokenise by this server want to know of it.
    info: Map<String, Json>,
    /// The tokens as grammars see them; made when it is first asked for.
    vocabulary: OnceLock<Result<Vocabulary, GrammarError>>,
}

/// A file that the text side cannot use.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct LoadError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it, and what to do.
    pub problem: String,
}

impl TextModel {
    /// Reads the files of the checkpoint directory `dir`. Without a chat template chat requests are refused.
    ///
    /// # Errors
    /// tokenizer.json is missing or unreadable, tokenizer_config.json is no JSON, or the template does not compile.
    pub fn load(dir: &Path) -> Result<Arc<Self>, LoadError> {
        let file = dir.join("tokenizer.json");
        let problem = |problem: String| LoadError { file: file.clone(), problem };
        if !file.exists() {
            return Err(problem("missing; a checkpoint needs the fast tokenizer's file".into()));
        }
        let mut tokenizer = Tokenizer::from_file(&file).map_err(|error| problem(error.to_string()))?;
        tokenizer.with_truncation(None).map_err(|error| problem(error.to_string()))?;
        tokenizer.with_padding(None);
        let config = read_config(&dir.join("tokenizer_config.json"))?;
        let template = load_template(dir, &config)?;
        Ok(Arc::new(Self::new(tokenizer, &config, template)))
    }

    fn new(tokenizer: Tokenizer, config: &Map<String, Json>, template: Option<ChatTemplate>) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let wants_bos = config.get("add_bos_token").and_then(Json::as_bool) == Some(true);
        let bos = token_content(config.get("bos_token")).and_then(|token| tokenizer.token_to_id(&token));
        let bytes = TokenBytes::of(&tokenizer);
        // A normalizer may shorten the text first.
        let exact = bytes.as_ref().filter(|_| tokenizer.get_normalizer().is_none());
        let token_bytes_max = exact.map(TokenBytes::longest);
        Self {
            token_bytes_max,
            bytes,
            special,
            bos: bos.filter(|_| wants_bos),
            info: info(config, template.as_ref()),
            template,
            tokenizer,
            vocabulary: OnceLock::new(),
        }
    }

    /// At least how many tokens `text` has, known without encoding it; 0 where nothing is known.
    pub fn tokens_min(&self, text: &str) -> usize {
        self.token_bytes_max.map_or(0, |longest| text.len().div_ceil(longest.max(1)))
    }

    /// Token ids of `text`; with `add_special_tokens` as a prompt, else as it stands.
    ///
    /// # Errors
    /// Only for vocabularies that lack an unknown token, in the tokenizer's words.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special_tokens).map_err(|error| error.to_string())?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(bos) = self.bos.filter(|bos| add_special_tokens && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        self.tokenizer.decode(ids, skip_special_tokens).unwrap_or_default()
    }

    /// Bytes of one token alone, as `logprobs` shows them.
    pub fn bytes_of(&self, token: u32) -> Vec<u8> {
        match &self.bytes {
            Some(table) => table.get(token).to_vec(),
            None => self.decode(&[token], false).into_bytes(),
        }
    }

    /// Text of one token alone; U+FFFD where it is a part of a character.
    pub fn token_text(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.bytes_of(token)).into_owned()
    }

    /// Whether the token is a control token such as end-of-sequence.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// Whether that text is one control token.
    pub fn is_control(&self, text: &str) -> bool {
        self.tokenizer.token_to_id(text).is_some_and(|id| self.is_special(id))
    }

    /// Class, special tokens and chat template, in the words of tokenizer_config.json.
    pub fn info(&self) -> &Map<String, Json> {
        &self.info
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The tokens as grammars see them, of a model that ends its output with any of `eos`, which are always the same.
    /// The first call takes about a second for a large vocabulary.
    ///
    /// # Errors
    /// The tokenizer is not byte-level, or there is no end-of-sequence token.
    pub fn vocabulary(&self, eos: &[u32]) -> Result<&Vocabulary, GrammarError> {
        self.vocabulary.get_or_init(|| self.make_vocabulary(eos)).as_ref().map_err(Clone::clone)
    }

    fn make_vocabulary(&self, eos: &[u32]) -> Result<Vocabulary, GrammarError> {
        let Some(bytes) = &self.bytes else { return Err(GrammarError::no_bytes()) };
        let token = |id| match self.special.contains(&id) {
            true => TokenText::Control(self.tokenizer.id_to_token(id).unwrap_or_default()),
            false => TokenText::Bytes(bytes.get(id).to_vec()),
        };
        Vocabulary::new((0..bytes.len() as u32).map(token).collect(), eos)
    }

    pub(super) fn token_bytes(&self) -> Option<&TokenBytes> {
        self.bytes.as_ref()
    }
}

fn read_config(file: &Path) -> Result<Map<String, Json>, LoadError> {
    if !file.exists() {
        return Ok(Map::new());
    }
    let problem = |problem: String| LoadError { file: file.to_owned(), problem };
    let text = std::fs::read_to_string(file).map_err(|error| problem(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| problem(error.to_string()))
}

/// chat_template.jinja where it exists, else `chat_template` of tokenizer_config.json: a string, or a list of named
/// ones of which `default` is taken.
fn load_template(dir: &Path, config: &Map<String, Json>) -> Result<Option<ChatTemplate>, LoadError> {
    let mut file = dir.join("chat_template.jinja");
    let source = if file.exists() {
        let read = std::fs::read_to_string(&file);
        Some(read.map_err(|error| LoadError { file: file.clone(), problem: error.to_string() })?)
    } else {
        file = dir.join("tokenizer_config.json");
        let named = |list: &Vec<Json>| {
            let default = list.iter().find(|entry| entry["name"] == "default");
            default.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
        };
        let template = config.get("chat_template");
        template.and_then(|template| match template {
            Json::String(source) => Some(source.clone()),
            Json::Array(list) => named(list),
            _ => None,
        })
    };
    let Some(source) = source else { return Ok(None) };
    let template = ChatTemplate::compile(&source, special_tokens(config));
    let problem =
        |error| LoadError { file, problem: format!("the chat template does not compile: {error:#}") };
    template.map(Some).map_err(problem)
}

fn info(config: &Map<String, Json>, template: Option<&ChatTemplate>) -> Map<String, Json> {
    let kept = ["tokenizer_class", "model_max_length", "add_bos_token", "add_eos_token"];
    let kept = kept.into_iter().filter_map(|name| Some((name.to_owned(), config.get(name)?.clone())));
    let template = template.map(|template| ("chat_template".to_owned(), Json::from(template.source())));
    kept.chain(special_tokens(config)).chain(template).collect()
}

fn special_tokens(config: &Map<String, Json>) -> Map<String, Json> {
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let token = |name: &str| Some((name.to_owned(), Json::String(token_content(config.get(name))?)));
    names.into_iter().filter_map(token).collect()
}

/// A token is written as a string or as an object with its `content`.
fn token_content(token: Option<&Json>) -> Option<String> {
    let token = token?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::OnceLock;

    use serde_json::json;

    use super::*;

    fn bundled_dir() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/sundial-20m")
    }

    /// The bundled model's text side.
    pub(crate) fn bundled() -> Arc<TextModel> {
        static MODEL: OnceLock<Arc<TextModel>> = OnceLock::new();
        MODEL.get_or_init(|| TextModel::load(&bundled_dir()).unwrap()).clone()
    }

    /// A SentencePiece-like vocabulary with byte fallback, whose text depends on neighbours.
    pub(crate) fn sentence_pieces() -> Arc<TextModel> {
        let mut vocab =
            json!({"<unk>": 0, "\u{2581}": 1, "a": 2, "b": 3, "c": 4, "d": 5, "\u{2581}a": 6, "ab": 7});
        for byte in 0..=255u8 {
            vocab[format!("<0x{byte:02X}>")] = json!(8 + u32::from(byte));
        }
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "post_processor": null,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                "merges": ["\u{2581} a", "a b"]},
        });
        let tokenizer = Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
        Arc::new(TextModel::new(tokenizer, &Map::new(), None))
    }

    #[test]
    fn prompts_are_encoded_as_by_the_reference() {
        let reference = std::fs::read_to_string(bundled_dir().join("reference.json")).unwrap();
        let reference: Json = serde_json::from_str(&reference).unwrap();
        let prompts = reference["prompts"].as_array().unwrap();
        let text = prompts.iter().filter(|prompt| prompt["kind"] == "text");
        for prompt in text.clone() {
            let ids = bundled().encode(prompt["prompt"].as_str().unwrap(), true).unwrap();
            assert_eq!(json!(ids), prompt["prompt_ids"], "{}", prompt["prompt"]);
            let least = bundled().tokens_min(prompt["prompt"].as_str().unwrap());
            assert!((1..ids.len()).contains(&least));
        }
        assert!(text.count() > 2);
    }

    #[test]
    fn a_conversation_is_one_of_the_models_own_form() {
        let messages =
            [json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": "Yes."})];
        let template = bundled();
        let text = template.chat_template().unwrap().render(&messages, true, &Map::new()).unwrap();
        assert_eq!(text, "<|begin_of_sentence|><|user|>Hi<|assistant|>Yes.<|end_of_sentence|><|assistant|>");
        let ids = template.encode(&text, false).unwrap();
        assert_eq!((ids[0], ids[1], *ids.last().unwrap()), (0, 2, 3));
    }

    #[test]
    fn a_begin_token_missing_from_the_post_processor_is_added_once() {
        let tokenizer = Tokenizer::from_file(bundled_dir().join("tokenizer.json")).unwrap();
        let config = json!({"add_bos_token": true, "bos_token": {"content": "<|user|>"}});
        let model = TextModel::new(tokenizer, config.as_object().unwrap(), None);
        assert_eq!(model.encode("The", true).unwrap()[..2], [2, 0]);
        assert_eq!(model.encode("The", false).unwrap().len(), 1);
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = TextModel::load(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: missing"), "{error}");
    }
}

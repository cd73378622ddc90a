//! Log-probabilities in the three shapes that clients expect: `/v1/completions`, chat, and vLLM's prompt ones.

use heliostat_engine::request::TokenLogprob;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::ingress::text::{TextModel, TokenPiece};

/// Shown where a probability is 0, whose logarithm JSON cannot hold.
const LOGPROB_MIN: f32 = -9999.0;

/// `logprobs` of `/v1/completions`: parallel arrays.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    /// None for the first token of an echoed prompt.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    text_offset: Vec<usize>,
}

/// Token texts with their log-probabilities, best first, as a JSON object.
#[derive(Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Adds the first token of an echoed prompt.
    pub(super) fn push_first(&mut self, model: &TextModel, token: u32) {
        self.tokens.push(model.token_text(token));
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.text_offset.push(0);
    }

    /// Adds a token whose text begins `offset` characters into the answer.
    pub(super) fn push(&mut self, model: &TextModel, logprob: &TokenLogprob, offset: usize) {
        let text = model.token_text(logprob.token);
        let own = (text.clone(), finite(logprob.logprob));
        let mut top: Vec<(String, f32)> = Vec::new();
        let others = logprob.top.iter().map(|&(token, logprob)| (model.token_text(token), finite(logprob)));
        // Parts of characters may share a text: an object can hold only the most likely.
        for (text, logprob) in others.chain([own.clone()]) {
            if !top.iter().any(|(other, _)| *other == text) {
                top.push((text, logprob));
            }
        }
        self.tokens.push(text);
        self.token_logprobs.push(Some(own.1));
        self.top_logprobs.push(Some(TopLogprobs(top)));
        self.text_offset.push(offset);
    }
}

/// `logprobs` of chat.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatLogprob {
    #[serde(flatten)]
    own: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(super) fn new(model: &TextModel, pieces: &[TokenPiece]) -> Self {
        let token = |token: u32, logprob: f32| {
            let bytes = model.bytes_of(token);
            ChatToken { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
        };
        let entry = |piece: &TokenPiece| ChatLogprob {
            own: token(piece.logprob.token, piece.logprob.logprob),
            top_logprobs: piece.logprob.top.iter().map(|&(id, logprob)| token(id, logprob)).collect(),
        };
        Self { content: pieces.iter().map(entry).collect(), refusal: None }
    }
}

/// vLLM's `prompt_logprobs`: null for the first token, then an object by token id for each.
#[derive(Debug, Serialize)]
pub(super) struct PromptLogprobs(Vec<Option<ById>>);

#[derive(Debug)]
struct ById(Vec<(u32, Ranked)>);

#[derive(Clone, Debug, Serialize)]
struct Ranked {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl Serialize for ById {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, ranked) in &self.0 {
            map.serialize_entry(token, ranked)?;
        }
        map.end()
    }
}

impl PromptLogprobs {
    pub(super) fn new(model: &TextModel, logprobs: &[TokenLogprob]) -> Self {
        let ranked = |token: u32, logprob: f32, rank: u32| {
            (token, Ranked { logprob: finite(logprob), rank, decoded_token: model.token_text(token) })
        };
        let entry = |own: &TokenLogprob| {
            let others = own.top.iter().enumerate().filter(|(_, (token, _))| *token != own.token);
            let others = others.map(|(index, &(token, logprob))| ranked(token, logprob, index as u32 + 1));
            Some(ById([ranked(own.token, own.logprob, own.rank)].into_iter().chain(others).collect()))
        };
        Self([None].into_iter().chain(logprobs.iter().map(entry)).collect())
    }
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

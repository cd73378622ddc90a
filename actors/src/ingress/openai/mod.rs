//! OpenAI's API over the ingress: what requests may say, and how answers are written.
//!
//! Fields that OpenAI or vLLM document and this server lacks are refused by name when they ask for anything; fields
//! that nobody documents are ignored, as OpenAI's servers do.

mod body;
mod chat;
mod completions;
mod job;
mod logprobs;
mod messages;
mod params;
mod reply;
mod responses;
mod run;
mod structured;
mod tokenize;
mod tools;

pub(crate) use body::not_whole;
pub(crate) use chat::chat_completions;
pub(crate) use completions::completions;
pub(crate) use reply::{model, models};
pub(crate) use responses::responses;
pub(crate) use tokenize::{detokenize, embeddings, tokenize, tokenizer_info};

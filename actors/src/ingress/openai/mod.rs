//! OpenAI's API over the ingress: what requests may say, and how answers are written.
//!
//! Fields that OpenAI or vLLM document and this server lacks are refused by name when they ask for anything; fields
//! that nobody documents are ignored, as OpenAI's servers do.

mod body;
mod chat;
mod completions;
mod job;
mod logprobs;
mod params;
mod reply;
mod run;

pub(crate) use chat::chat_completions;
pub(crate) use completions::completions;
pub(crate) use reply::{model, models};

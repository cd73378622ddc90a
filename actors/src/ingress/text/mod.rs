//! Text of the ingress: prompts to token ids, chat templates, and output tokens back to text without leaking half a
//! character or a part of a stop string.
//!
//! Ranks see token ids only; everything that knows characters is here.

mod bytes;
mod detokenizer;
mod pipeline;
mod stop;
mod template;
mod tokenizer;

pub use detokenizer::Detokenizer;
pub use pipeline::{Delta, Ending, SequenceText, TextOptions, TokenPiece};
pub use stop::{StopFinder, Stopped};
pub use template::{ChatTemplate, RenderError};
pub use tokenizer::{LoadError, TextModel};

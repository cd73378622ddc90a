//! Turns output tokens into text one by one. All that it returned, joined, equals decoding all tokens at once, and no
//! piece ever ends in half a character.

use std::sync::Arc;

use super::tokenizer::TextModel;

/// Decoder of one sequence.
pub struct Detokenizer {
    model: Arc<TextModel>,
    skip_special_tokens: bool,
    state: State,
}

enum State {
    /// Byte-level vocabulary: the first bytes of a character whose rest has not come, at most three.
    Bytes { pending: Vec<u8> },
    /// Any other decoder: tokens are decoded with a few before them, since their text may depend on those.
    Window {
        ids: Vec<u32>,
        /// `ids[..emitted]` has been returned.
        emitted: usize,
        /// Text of `ids[..emitted]`.
        prefix: String,
    },
}

impl Detokenizer {
    /// A decoder at the start of a text. `skip_special_tokens` leaves out tokens such as end-of-sequence.
    pub fn new(model: Arc<TextModel>, skip_special_tokens: bool) -> Self {
        let state = if model.token_bytes().is_some() {
            State::Bytes { pending: Vec::new() }
        } else {
            State::Window { ids: Vec::new(), emitted: 0, prefix: String::new() }
        };
        Self { model, skip_special_tokens, state }
    }

    /// Appends to `out` the text that `token` completes; maybe none.
    pub fn push(&mut self, token: u32, out: &mut String) {
        if self.skip_special_tokens && self.model.is_special(token) {
            return;
        }
        match &mut self.state {
            State::Bytes { pending } => {
                let table = self.model.token_bytes().expect("the state was chosen by the table");
                pending.extend_from_slice(table.get(token));
                take_characters(pending, out);
            }
            State::Window { ids, emitted, prefix } => {
                ids.push(token);
                let text = self.model.decode(ids, self.skip_special_tokens);
                if text.len() <= prefix.len() || text.ends_with(char::REPLACEMENT_CHARACTER) {
                    return;
                }
                out.push_str(rest_of(&text, prefix));
                ids.drain(..*emitted);
                *emitted = ids.len();
                *prefix = self.model.decode(ids, self.skip_special_tokens);
            }
        }
    }

    /// Appends what was held back at the end of the sequence: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        match &mut self.state {
            State::Bytes { pending } => {
                if !pending.is_empty() {
                    out.push(char::REPLACEMENT_CHARACTER);
                    pending.clear();
                }
            }
            State::Window { ids, emitted, prefix } => {
                let text = self.model.decode(ids, self.skip_special_tokens);
                out.push_str(rest_of(&text, prefix));
                *emitted = ids.len();
                *prefix = text;
            }
        }
    }
}

/// Moves complete characters, and U+FFFD for what can never become one, from `pending` to `out`.
fn take_characters(pending: &mut Vec<u8>, out: &mut String) {
    let mut rest = pending.as_slice();
    let kept = loop {
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                break 0;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                out.push_str(std::str::from_utf8(valid).expect("valid up to there"));
                let Some(invalid) = error.error_len() else { break after.len() };
                out.push(char::REPLACEMENT_CHARACTER);
                rest = &after[invalid..];
            }
        }
    };
    pending.drain(..pending.len() - kept);
}

/// What `text` has beyond `prefix`. A decoder that rewrote the end of the prefix loses that rewrite.
fn rest_of<'a>(text: &'a str, prefix: &str) -> &'a str {
    let mut at = prefix.len().min(text.len());
    while !text.is_char_boundary(at) {
        at += 1;
    }
    &text[at..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ingress::text::tokenizer::tests::{bundled, sentence_pieces};

    fn incremental(model: &Arc<TextModel>, ids: &[u32], skip: bool) -> String {
        let mut detokenizer = Detokenizer::new(model.clone(), skip);
        let mut text = String::new();
        for &id in ids {
            detokenizer.push(id, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    #[test]
    fn half_a_character_waits_for_its_rest() {
        let model = bundled();
        let ids = model.encode("é☃𝄞", false).unwrap();
        let mut detokenizer = Detokenizer::new(model.clone(), true);
        let mut text = String::new();
        for &id in &ids {
            detokenizer.push(id, &mut text);
            assert!("é☃𝄞".starts_with(&text), "{text:?}");
        }
        assert_eq!(text, "é☃𝄞");
        detokenizer.push(ids[0], &mut text);
        let before = text.len();
        detokenizer.finish(&mut text);
        let cut = if model.token_text(ids[0]) == "é" { "" } else { "\u{FFFD}" };
        assert_eq!(&text[before..], cut);
    }

    proptest! {
        #[test]
        fn joined_pieces_equal_the_whole_of_any_ids(ids in prop::collection::vec(0u32..4100, 0..60), skip: bool) {
            let model = bundled();
            prop_assert_eq!(incremental(&model, &ids, skip), model.decode(&ids, skip));
        }

        #[test]
        fn joined_pieces_equal_the_text(text in "\\PC{0,40}", skip: bool) {
            let model = bundled();
            let ids = model.encode(&text, false).unwrap();
            prop_assert_eq!(incremental(&model, &ids, skip), text);
        }

        #[test]
        fn a_sentencepiece_vocabulary_works_too(text in "[a-d é☃]{0,30}") {
            let model = sentence_pieces();
            let ids = model.encode(&text, false).unwrap();
            prop_assert_eq!(incremental(&model, &ids, true), model.decode(&ids, true));
        }
    }
}

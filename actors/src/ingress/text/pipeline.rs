//! One sequence from output tokens to what its client sees: text without stop strings, and the log-probabilities of
//! exactly the tokens whose text was given out.

use std::collections::VecDeque;
use std::sync::Arc;

use heliostat_engine::request::{FinishReason, Output, TokenLogprob};

use super::detokenizer::Detokenizer;
use super::stop::StopFinder;
use super::tokenizer::TextModel;

/// What the client asked of the text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextOptions {
    /// Leave out control tokens.
    pub skip_special_tokens: bool,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Keep the stop string, or the text of the stop token, in the text.
    pub include_stop: bool,
    /// No stop string may end within this many tokens.
    pub min_tokens: u32,
}

/// Why the text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It contained this stop string.
    StopString(String),
    /// The model drew this end-of-sequence or stop token.
    StopToken(u32),
    /// `max_tokens` or the context length.
    Length,
}

/// A token whose text was given out, with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPiece {
    /// Probability of the token and of others at its place.
    pub logprob: TokenLogprob,
    /// Where its text begins, in characters from the start of the output.
    pub offset: usize,
}

/// What one or more outputs added for the client.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// New text.
    pub text: String,
    /// Tokens of the text given out, where log-probabilities were asked for.
    pub pieces: Vec<TokenPiece>,
    /// Set once, at the end.
    pub ending: Option<Ending>,
}

/// The text of one sequence.
pub struct SequenceText {
    model: Arc<TextModel>,
    detokenizer: Detokenizer,
    stops: StopFinder,
    options: TextOptions,
    tokens: u32,
    /// Bytes and characters that the detokeniser returned, and bytes given out.
    made: usize,
    made_chars: usize,
    shown: usize,
    /// Tokens not given out yet, each with the span of its text in bytes.
    waiting: VecDeque<(TokenPiece, std::ops::Range<usize>)>,
    ended: bool,
}

impl SequenceText {
    /// The start of a text.
    pub fn new(model: Arc<TextModel>, options: TextOptions) -> Self {
        Self {
            detokenizer: Detokenizer::new(model.clone(), options.skip_special_tokens),
            stops: StopFinder::new(options.stop.clone(), options.include_stop),
            model,
            options,
            tokens: 0,
            made: 0,
            made_chars: 0,
            shown: 0,
            waiting: VecDeque::new(),
            ended: false,
        }
    }

    /// Output tokens taken so far; those after a stop string do not count.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Adds what a rank sent to `delta`. After the end nothing is added.
    pub fn push(&mut self, output: &Output, delta: &mut Delta) {
        let stop_token = match &output.finish {
            Some(FinishReason::Stop(token)) => Some(*token),
            Some(FinishReason::Length | FinishReason::Aborted | FinishReason::Error(_)) | None => None,
        };
        let (last, shown_before) = (output.tokens.len().saturating_sub(1), delta.text.len());
        for (index, &token) in output.tokens.iter().enumerate() {
            if self.ended {
                break;
            }
            self.tokens += 1;
            if index == last && stop_token == Some(token) {
                self.push_stop_token(token, delta);
            } else {
                self.push_token(token, output.logprobs.get(index), delta);
            }
        }
        if let (false, Some(finish)) = (self.ended, &output.finish) {
            self.end(finish, delta);
        }
        self.shown += delta.text.len() - shown_before;
        let shown = self.shown;
        while self.waiting.front().is_some_and(|(_, span)| span.start < shown || span.end <= shown) {
            delta.pieces.extend(self.waiting.pop_front().map(|(piece, _)| piece));
        }
    }

    fn push_token(&mut self, token: u32, logprob: Option<&TokenLogprob>, delta: &mut Delta) {
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        let (start, offset) = (self.made, self.made_chars);
        self.made += text.len();
        self.made_chars += text.chars().count();
        if let Some(logprob) = logprob {
            self.waiting.push_back((TokenPiece { logprob: logprob.clone(), offset }, start..self.made));
        }
        if self.tokens <= self.options.min_tokens {
            self.stops.push_exempt(&text, &mut delta.text);
        } else {
            self.search(&text, delta);
        }
    }

    /// The token that ended the sequence is text only if the client wants to see what stopped it.
    fn push_stop_token(&mut self, token: u32, delta: &mut Delta) {
        if self.options.include_stop {
            self.search(&self.model.token_text(token), delta);
        }
    }

    fn search(&mut self, text: &str, delta: &mut Delta) {
        if let Some(stopped) = self.stops.push(text, &mut delta.text) {
            delta.ending = Some(Ending::StopString(stopped.stop));
            self.ended = true;
        }
    }

    fn end(&mut self, finish: &FinishReason, delta: &mut Delta) {
        let mut rest = String::new();
        self.detokenizer.finish(&mut rest);
        self.made += rest.len();
        self.search(&rest, delta);
        if self.ended {
            return;
        }
        self.stops.finish(&mut delta.text);
        self.ended = true;
        delta.ending = match finish {
            FinishReason::Stop(token) => Some(Ending::StopToken(*token)),
            FinishReason::Length => Some(Ending::Length),
            FinishReason::Aborted | FinishReason::Error(_) => None,
        };
    }
}

#[cfg(test)]
mod tests {
    use heliostat_engine::request::RequestId;

    use super::*;
    use crate::ingress::text::tokenizer::tests::bundled;

    fn output(tokens: &[u32], finish: Option<FinishReason>) -> Output {
        let logprob = |&token| TokenLogprob { token, logprob: -1.0, rank: 1, top: vec![] };
        Output {
            id: RequestId(1),
            first_index: 0,
            tokens: tokens.to_vec(),
            logprobs: tokens.iter().map(logprob).collect(),
            prompt_logprobs: None,
            cached_tokens: 0,
            finish,
        }
    }

    fn run(options: TextOptions, tokens: &[u32], finish: FinishReason) -> (Delta, u32) {
        let mut text = SequenceText::new(bundled(), options);
        let mut delta = Delta::default();
        for (index, token) in tokens.iter().enumerate() {
            let finish = (index + 1 == tokens.len()).then(|| finish.clone());
            text.push(&output(&[*token], finish), &mut delta);
        }
        (delta, text.tokens())
    }

    #[test]
    fn pieces_are_those_of_the_text_before_a_stop_string() {
        let tokens = bundled().encode(" vec![1, 2, 3];\n let mut v", false).unwrap();
        let options = TextOptions { stop: vec!["3];".into()], ..TextOptions::default() };
        let (delta, taken) = run(options, &tokens, FinishReason::Length);
        assert_eq!(delta.text, " vec![1, 2, ");
        assert_eq!(delta.ending, Some(Ending::StopString("3];".into())));
        let joined: String =
            delta.pieces.iter().map(|piece| bundled().token_text(piece.logprob.token)).collect();
        assert!(joined.starts_with(&delta.text) && joined.len() < delta.text.len() + 2, "{joined:?}");
        assert!((taken as usize) < tokens.len());
        for piece in &delta.pieces {
            let (rest, token) = (&delta.text[piece.offset..], bundled().token_text(piece.logprob.token));
            assert!(rest.starts_with(&token) || token.starts_with(rest), "{token:?} at {rest:?}");
        }
    }

    #[test]
    fn a_stop_token_counts_but_is_not_text_unless_wanted() {
        let mut tokens = bundled().encode("All is well", false).unwrap();
        tokens.push(1);
        for include_stop in [false, true] {
            let options = TextOptions { include_stop, ..TextOptions::default() };
            let (delta, taken) = run(options, &tokens, FinishReason::Stop(1));
            assert_eq!(
                delta.text.strip_prefix("All is well"),
                Some(if include_stop { "<|end_of_sentence|>" } else { "" })
            );
            assert_eq!((delta.ending, taken as usize), (Some(Ending::StopToken(1)), tokens.len()));
        }
    }

    #[test]
    fn a_stop_string_within_min_tokens_is_passed_over() {
        let tokens = bundled().encode("a;b;c", false).unwrap();
        let options = TextOptions { stop: vec![";".into()], min_tokens: 2, ..TextOptions::default() };
        assert_eq!(run(options, &tokens, FinishReason::Length).0.text, "a;b");
    }
}

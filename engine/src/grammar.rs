//! Output that must follow a grammar: which tokens may be drawn next.
//!
//! The grammars and their matching are those of the `llguidance` library. A constraint depends on the grammar and the
//! tokens drawn so far only, so a sequence that moves to another rank goes on under it.

use std::fmt;
use std::sync::Arc;

use bincode::{Decode, Encode};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value as Json, json};

use crate::sampler::SampleError;

/// What the output must look like.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Grammar {
    /// JSON that this JSON schema (its text) allows.
    JsonSchema(String),
    /// Text that this regular expression, in the syntax of Rust's `regex`, matches whole.
    Regex(String),
    /// Text of this grammar, in llguidance's variant of Lark, from its rule `start`.
    Lark(String),
}

/// A grammar that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl GrammarError {
    /// For a tokenizer whose tokens stand for no bytes of their own.
    pub fn no_bytes() -> Self {
        Self("the model's tokenizer is not byte-level, which grammars need".into())
    }
}

/// A token of a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenText {
    /// These bytes of the text; none where the id is not used.
    Bytes(Vec<u8>),
    /// A control token of this name, which never stands for text.
    Control(String),
}

/// The tokens of a model as grammars see them. Cheap to clone; building it takes about a second for 100,000 tokens.
#[derive(Clone)]
pub struct Vocabulary {
    factory: Arc<ParserFactory>,
    eos: u32,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vocabulary({} tokens)", self.factory.tok_env().tok_trie().vocab_size())
    }
}

impl Vocabulary {
    /// A vocabulary whose token `i` is `tokens[i]`; any of `eos` ends an output.
    ///
    /// # Errors
    /// There is no end-of-sequence token among the tokens, or the library says no.
    pub fn new(tokens: Vec<TokenText>, eos: &[u32]) -> Result<Self, GrammarError> {
        let Some(&first) = eos.first().filter(|_| eos.iter().all(|&id| (id as usize) < tokens.len())) else {
            return Err(GrammarError("the model names no end-of-sequence token of its vocabulary".into()));
        };
        let word = |token| match token {
            TokenText::Bytes(bytes) => bytes,
            TokenText::Control(name) => {
                let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                word.extend_from_slice(name.as_bytes());
                word
            }
        };
        let words: Vec<Vec<u8>> = tokens.into_iter().map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words).with_eos_tokens(eos);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|why| GrammarError(why.to_string()))?;
        factory.quiet();
        // What the client reads should name its mistake and not quote all of its grammar.
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory: Arc::new(factory), eos: first })
    }

    /// Makes the grammar ready for one sequence. May take milliseconds for a small one and a second for a huge one;
    /// the library bounds it.
    ///
    /// # Errors
    /// The grammar is malformed, uses what is not supported, or is too large; the words are for its author.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        let failed = |why: String| GrammarError(why.trim().to_owned());
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => {
                let mut schema = serde_json::from_str(schema).map_err(|why| failed(why.to_string()))?;
                bound_whitespace(&mut schema);
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let parser = self.factory.create_parser(grammar).map_err(|why| failed(format!("{why:#}")))?;
        let mut matcher = Matcher::new(Ok(parser));
        matcher.compute_mask_or_eos().map_err(|why| failed(why.to_string()))?;
        Ok(Constraint { matcher, eos: self.eos, next: None })
    }
}

/// Between the parts of JSON any whitespace is allowed, but not for ever: a small model may have nothing else to say.
fn bound_whitespace(schema: &mut Json) {
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert(json!({"whitespace_pattern": "[ \\n\\r\\t]{0,20}"}));
    }
}

/// Tokens that may be drawn next.
#[derive(Debug)]
pub struct TokenMask(SimpleVob);

impl TokenMask {
    /// Sets the logits of all other tokens, those beyond the vocabulary included, to minus infinity.
    pub(crate) fn apply(&self, logits: &mut [f32]) {
        for (chunk, word) in
            logits.chunks_mut(32).zip(self.0.as_slice().iter().copied().chain(std::iter::repeat(0)))
        {
            match word {
                u32::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                _ => {
                    let forbidden = chunk.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
                    forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
    }
}

/// How far one sequence is in its grammar.
pub struct Constraint {
    matcher: Matcher,
    eos: u32,
    /// Worked out ahead.
    next: Option<TokenMask>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Constraint({:?})", self.matcher.stop_reason())
    }
}

impl Constraint {
    /// Works out which tokens may come next, so that `mask` has the answer: for when the device computes anyway.
    pub(crate) fn prepare(&mut self) {
        // A failure comes up again where it can be told.
        self.next = self.next.take().or_else(|| self.matcher.compute_mask_or_eos().ok().map(TokenMask));
    }

    /// Which tokens may come next: end-of-sequence tokens where the text may end, and only they where it must.
    ///
    /// # Errors
    /// The grammar became too complex for the library's bounds.
    pub(crate) fn mask(&mut self) -> Result<&TokenMask, SampleError> {
        if self.next.is_none() {
            let mask = self.matcher.compute_mask_or_eos().map_err(|_| SampleError::GrammarTooComplex)?;
            self.next = Some(TokenMask(mask));
        }
        self.next.as_ref().ok_or(SampleError::GrammarTooComplex)
    }

    /// Takes a token that was drawn.
    ///
    /// # Errors
    /// It was not allowed, or the grammar became too complex for the library's bounds.
    pub(crate) fn accept(&mut self, token: u32) -> Result<(), SampleError> {
        self.next = None;
        if self.matcher.is_stopped() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|_| SampleError::GrammarTooComplex)
    }

    /// Once the text is complete and nothing may follow: the token that says so.
    pub(crate) fn ended(&self) -> Option<u32> {
        self.matcher.is_stopped().then_some(self.eos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: u32 = 256;

    /// Every byte is a token; 256 ends an output.
    fn bytes() -> Vocabulary {
        let tokens = (0..=255).map(|byte| TokenText::Bytes(vec![byte]));
        Vocabulary::new(tokens.chain([TokenText::Control("<eos>".into())]).collect(), &[EOS]).unwrap()
    }

    fn allowed(constraint: &mut Constraint) -> Vec<u32> {
        let mut logits = vec![0.0; 300];
        constraint.mask().unwrap().apply(&mut logits);
        (0..).zip(logits).filter(|(_, logit)| *logit == 0.0).map(|(token, _)| token).collect()
    }

    fn follow(constraint: &mut Constraint, text: &str) {
        for byte in text.bytes() {
            assert!(allowed(constraint).contains(&u32::from(byte)), "{:?} of {text:?}", byte as char);
            constraint.accept(u32::from(byte)).unwrap();
        }
    }

    #[test]
    fn only_what_the_grammar_allows_may_be_drawn() {
        let mut constraint = bytes().compile(&Grammar::Regex("a(b|c)+".into())).unwrap();
        assert_eq!(allowed(&mut constraint), [u32::from(b'a')]);
        follow(&mut constraint, "ab");
        assert_eq!(allowed(&mut constraint), [u32::from(b'b'), u32::from(b'c'), EOS]);
        assert_eq!(constraint.ended(), None);
        constraint.accept(EOS).unwrap();
        assert_eq!(constraint.ended(), Some(EOS));
    }

    #[test]
    fn a_text_that_cannot_go_on_has_ended() {
        let schema = r#"{"type":"object","properties":{"n":{"enum":[7,8]}},"required":["n"],"additionalProperties":false}"#;
        let mut constraint = bytes().compile(&Grammar::JsonSchema(schema.into())).unwrap();
        follow(&mut constraint, r#"{"n": 8"#);
        assert_eq!(constraint.ended(), None);
        follow(&mut constraint, "}");
        assert_eq!(constraint.ended(), Some(EOS));
        assert_eq!(allowed(&mut constraint), [EOS]);
    }

    #[test]
    fn a_mistake_in_a_grammar_is_told() {
        let refused = |grammar| bytes().compile(&grammar).unwrap_err().to_string();
        assert!(
            refused(Grammar::Regex("a(".into())).contains("a("),
            "{}",
            refused(Grammar::Regex("a(".into()))
        );
        let schema = refused(Grammar::JsonSchema(r#"{"type":"strin"}"#.into()));
        assert!(schema.contains("strin"), "{schema}");
        assert!(refused(Grammar::Lark("start: nowhere".into())).contains("nowhere"));
        assert!(Vocabulary::new(vec![], &[]).is_err());
    }
}

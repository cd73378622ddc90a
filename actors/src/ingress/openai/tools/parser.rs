//! Splits what a model writes into text and calls, while it comes.
//!
//! Text goes on at once, but for an end that may be the beginning of a mark. A call goes on when it is whole; only that
//! of a function which the client named goes on as it comes. What was begun as a call and is none is text.

use super::form::{CallForm, Marks, parse_object};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::ingress::openai) enum Piece {
    /// Text beside calls.
    Text(String),
    /// The call of that index, from 0, begins: of this function.
    Begin(usize, String),
    /// More of the arguments of that call.
    Arguments(usize, String),
}

/// One sequence's text.
#[derive(Debug)]
pub(in crate::ingress::openai) struct CallParser {
    kind: Kind,
    /// What came and did not go on.
    held: String,
    calls: usize,
    calls_max: usize,
}

#[derive(Debug)]
enum Kind {
    /// Nothing is a call.
    Plain,
    /// Calls stand between marks.
    Marked { form: CallForm, marks: Marks, inside: bool },
    /// The text is a JSON list of calls; how deep in it, and whether in a string.
    List { depth: u32, string: Option<Escape> },
    /// The text is the arguments of this function.
    Named { name: String, begun: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    No,
    Next,
}

impl CallParser {
    /// Calls of a known form among text.
    pub(super) fn marked(form: Option<CallForm>, calls_max: usize) -> Self {
        let kind = match form {
            Some(form) => Kind::Marked { form, marks: form.marks(), inside: false },
            None => Kind::Plain,
        };
        Self { kind, held: String::new(), calls: 0, calls_max }
    }

    /// Nothing but a list of calls.
    pub(super) fn list(calls_max: usize) -> Self {
        Self { kind: Kind::List { depth: 0, string: None }, held: String::new(), calls: 0, calls_max }
    }

    /// Nothing but the arguments of one call.
    pub(super) fn named(name: String) -> Self {
        Self { kind: Kind::Named { name, begun: false }, held: String::new(), calls: 0, calls_max: 1 }
    }

    /// Calls so far.
    pub(in crate::ingress::openai) fn calls(&self) -> usize {
        self.calls
    }

    /// Takes more text; returns what can go on.
    pub(in crate::ingress::openai) fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        match &mut self.kind {
            Kind::Plain => push_text(&mut pieces, text),
            Kind::Named { name, begun } => {
                if !std::mem::replace(begun, true) {
                    pieces.push(Piece::Begin(0, name.clone()));
                    self.calls = 1;
                }
                if !text.is_empty() {
                    pieces.push(Piece::Arguments(0, text.to_owned()));
                }
            }
            Kind::List { .. } => self.push_list(text, &mut pieces),
            Kind::Marked { .. } => {
                self.held.push_str(text);
                while self.step(&mut pieces) {}
            }
        }
        pieces
    }

    /// The text has ended: returns what was held back.
    pub(in crate::ingress::openai) fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let held = std::mem::take(&mut self.held);
        match &self.kind {
            Kind::Plain | Kind::Named { .. } => {}
            // Cut short by a limit: what there is of the last call is no call.
            Kind::List { .. } => push_text(&mut pieces, &held),
            &Kind::Marked { form, inside: true, .. } => match form.parse(&held) {
                Some(call) => self.push_call(call, &mut pieces),
                None => push_text(&mut pieces, &format!("{}{held}", form.marks().begin)),
            },
            Kind::Marked { .. } => self.push_beside(&held, &mut pieces),
        }
        pieces
    }

    /// One step through held text with marks; false when more must come first.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let Kind::Marked { form, marks, inside } = &mut self.kind else { return false };
        if *inside {
            let Some(end) = self.held.find(marks.end) else { return false };
            let rest = self.held.split_off(end + marks.end.len());
            let call = std::mem::replace(&mut self.held, rest);
            let body = &call[..end];
            *inside = false;
            match form.parse(body) {
                Some(call) => self.push_call(call, pieces),
                None => push_text(pieces, &format!("{}{call}", marks.begin)),
            }
            return true;
        }
        let all = || std::iter::once(marks.begin).chain(marks.around.iter().copied());
        let first = all().filter_map(|mark| Some((self.held.find(mark)?, mark))).min();
        if let Some((at, mark)) = first {
            let rest = self.held.split_off(at + mark.len());
            let text = std::mem::replace(&mut self.held, rest);
            *inside = mark == marks.begin;
            self.push_beside(&text[..at], pieces);
            return true;
        }
        let kept = all().map(|mark| partial_end(&self.held, mark)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        let text = std::mem::replace(&mut self.held, rest);
        self.push_beside(&text, pieces);
        false
    }

    /// Text beside calls; space around them is of no interest.
    fn push_beside(&self, text: &str, pieces: &mut Vec<Piece>) {
        if self.calls == 0 || !text.trim().is_empty() {
            push_text(pieces, text);
        }
    }

    fn push_call(&mut self, (name, arguments): (String, String), pieces: &mut Vec<Piece>) {
        if self.calls < self.calls_max {
            pieces.extend([Piece::Begin(self.calls, name), Piece::Arguments(self.calls, arguments)]);
            self.calls += 1;
        }
    }

    /// Follows the braces of a list that a grammar made.
    fn push_list(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        for char in text.chars() {
            let Kind::List { depth, string } = &mut self.kind else { return };
            let mut ended = false;
            match (*string, char) {
                (Some(Escape::Next), _) => *string = Some(Escape::No),
                (Some(Escape::No), '\\') => *string = Some(Escape::Next),
                (Some(Escape::No), '"') => *string = None,
                (None, '"') => *string = Some(Escape::No),
                (None, '{') => *depth += 1,
                (None, '}') => {
                    *depth = depth.saturating_sub(1);
                    ended = *depth == 0;
                }
                (Some(Escape::No) | None, _) => {}
            }
            if *depth > 0 || ended {
                self.held.push(char);
            }
            if ended {
                let call = std::mem::take(&mut self.held);
                match parse_object(&call, "parameters") {
                    Some(call) => self.push_call(call, pieces),
                    None => push_text(pieces, &call),
                }
            }
        }
    }
}

fn push_text(pieces: &mut Vec<Piece>, text: &str) {
    if text.is_empty() {
        return;
    }
    match pieces.last_mut() {
        Some(Piece::Text(last)) => last.push_str(text),
        _ => pieces.push(Piece::Text(text.to_owned())),
    }
}

/// Bytes at the end of `text` that may be the beginning of `mark`.
fn partial_end(text: &str, mark: &str) -> usize {
    let lengths = mark.char_indices().map(|(at, _)| at).skip(1);
    lengths.filter(|&length| text.ends_with(&mark[..length])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All pieces of `text`, given in parts of `size` characters, texts joined.
    fn pieces(parser: &mut CallParser, text: &str, size: usize) -> Vec<Piece> {
        let chars: Vec<char> = text.chars().collect();
        let parts = chars.chunks(size).flat_map(|part| parser.push(&part.iter().collect::<String>()));
        let mut all: Vec<Piece> = parts.collect();
        all.extend(parser.finish());
        let mut joined: Vec<Piece> = Vec::new();
        for piece in all {
            match (joined.last_mut(), piece) {
                (Some(Piece::Text(last)), Piece::Text(text)) => last.push_str(&text),
                (Some(Piece::Arguments(_, last)), Piece::Arguments(_, text)) => last.push_str(&text),
                (_, piece) => joined.push(piece),
            }
        }
        joined
    }

    fn call(index: usize, name: &str, arguments: &str) -> [Piece; 2] {
        [Piece::Begin(index, name.into()), Piece::Arguments(index, arguments.into())]
    }

    #[test]
    fn the_cut_of_the_text_does_not_matter() {
        let hermes = "I look. <tool\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"</tool\"}}\n</tool_call>\n\
            <tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>\n";
        let deepseek = "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": 1}\n```\
            <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        for size in 1..40 {
            let mut parser = CallParser::marked(Some(CallForm::Hermes), usize::MAX);
            let mut expected = vec![Piece::Text("I look. <tool\n".into())];
            expected.extend([call(0, "f", "{\"x\":\"</tool\"}"), call(1, "g", "{}")].concat());
            assert_eq!(pieces(&mut parser, hermes, size), expected, "{size}");
            assert_eq!(parser.calls(), 2);
            let mut parser = CallParser::marked(Some(CallForm::DeepSeekV3), 1);
            let mut expected = vec![Piece::Text("Hm.".into())];
            expected.extend(call(0, "f", "{\"x\": 1}"));
            assert_eq!(pieces(&mut parser, deepseek, size), expected, "{size}");
            let mut parser = CallParser::list(usize::MAX);
            let list = "[ {\"name\": \"f\", \"parameters\": {\"x\": \"}\\\"{\"}},{\"name\":\"g\",\"parameters\":{}} ]";
            let expected = [call(0, "f", "{\"x\":\"}\\\"{\"}"), call(1, "g", "{}")].concat();
            assert_eq!(pieces(&mut parser, list, size), expected, "{size}");
            let mut parser = CallParser::named("f".into());
            assert_eq!(pieces(&mut parser, "{\"x\": 1}", size), call(0, "f", "{\"x\": 1}"), "{size}");
        }
    }

    #[test]
    fn what_is_no_call_is_text() {
        for text in [
            "<tool_call>{\"name\": 3}</tool_call>",
            "<tool_call>{\"name\": \"f\", ",
            "a <tool_c",
            "",
            "plain",
        ] {
            let mut parser = CallParser::marked(Some(CallForm::Hermes), usize::MAX);
            let expected = if text.is_empty() { vec![] } else { vec![Piece::Text(text.into())] };
            assert_eq!(pieces(&mut parser, text, 3), expected);
            assert_eq!(parser.calls(), 0);
        }
    }
}

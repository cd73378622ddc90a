//! Finds the client's stop strings in text that comes in pieces, and lets no part of one out.
//!
//! The result does not depend on how the text was cut: the match that ends first wins, and among those the longest.

/// Searches one sequence's text.
pub struct StopFinder {
    stops: Vec<String>,
    /// A stop string that was found stays in the text.
    include: bool,
    /// Text not given out: it may be the beginning of a stop string.
    held: String,
    /// A match must end beyond this many bytes of `held`: what lies before was exempt.
    exempt: usize,
}

/// A stop string was found.
#[derive(Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Which one.
    pub stop: String,
}

impl StopFinder {
    /// Searches for `stops`, none of them empty.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()), "an empty stop string would end every text");
        Self { stops, include, held: String::new(), exempt: 0 }
    }

    /// Adds `text` that may complete a stop string. Appends to `out` what is safe to show; after a match, what
    /// precedes it (and itself, if it is to be included).
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<Stopped> {
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        self.held.push_str(text);
        if let Some((start, stop)) = self.find() {
            let end = start + stop.len();
            out.push_str(&self.held[..if self.include { end } else { start }]);
            self.held.clear();
            return Some(Stopped { stop });
        }
        self.release(out);
        None
    }

    /// Adds text in which no stop string may end (the first `min_tokens`).
    pub fn push_exempt(&mut self, text: &str, out: &mut String) {
        if self.stops.is_empty() {
            out.push_str(text);
            return;
        }
        self.held.push_str(text);
        self.exempt = self.held.len();
        self.release(out);
    }

    /// Gives out the rest at the end of the sequence.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.exempt = 0;
    }

    fn find(&self) -> Option<(usize, String)> {
        let held = self.held.as_bytes();
        let first = |stop| {
            let stop: &String = stop;
            let from = (self.exempt + 1).saturating_sub(stop.len());
            let windows = held.get(from..)?.windows(stop.len());
            let start = from + windows.into_iter().position(|window| window == stop.as_bytes())?;
            Some((start + stop.len(), start, stop))
        };
        let (_, start, stop) = self.stops.iter().filter_map(first).min()?;
        Some((start, stop.clone()))
    }

    /// Gives out all but the longest end that begins a stop string.
    fn release(&mut self, out: &mut String) {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let mut from = self.held.len().saturating_sub(longest);
        let begins_a_stop = |from: usize| {
            let end = &self.held.as_bytes()[from..];
            self.stops.iter().any(|stop| stop.len() > end.len() && stop.as_bytes().starts_with(end))
        };
        while from < self.held.len() && !begins_a_stop(from) {
            from += 1;
        }
        out.push_str(&self.held[..from]);
        self.held.drain(..from);
        self.exempt = self.exempt.saturating_sub(from);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(pieces: &[&str], stops: &[String], include: bool) -> (String, Option<String>) {
        let mut finder = StopFinder::new(stops.to_vec(), include);
        let mut out = String::new();
        for piece in pieces {
            if let Some(stopped) = finder.push(piece, &mut out) {
                return (out, Some(stopped.stop));
            }
        }
        finder.finish(&mut out);
        (out, None)
    }

    /// The definition: the shortest beginning that ends in a stop string, and the longest such string.
    fn spec(text: &str, stops: &[String], include: bool) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ending = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
            if let Some(stop) = ending.max_by_key(|stop| stop.len()) {
                let cut = if include { end } else { end - stop.len() };
                return (text[..cut].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_given_out() {
        let mut finder = StopFinder::new(vec!["END.".into()], false);
        let mut out = String::new();
        assert_eq!(finder.push("the EN", &mut out), None);
        assert_eq!(out, "the ");
        assert_eq!(finder.push("DEN", &mut out), None);
        assert_eq!(out, "the END");
        assert_eq!(finder.push("D. more", &mut out), Some(Stopped { stop: "END.".into() }));
        assert_eq!(out, "the END");
    }

    #[test]
    fn exempt_text_cannot_complete_a_stop_string_but_can_begin_one() {
        let mut finder = StopFinder::new(vec!["ab".into()], false);
        let mut out = String::new();
        finder.push_exempt("xabya", &mut out);
        assert_eq!(out, "xaby");
        assert!(finder.push("b", &mut out).is_some());
        assert_eq!(out, "xaby");
    }

    proptest! {
        #[test]
        fn the_cut_of_the_text_does_not_matter(
            pieces in prop::collection::vec("[ab☃]{0,4}", 0..8),
            stops in prop::collection::vec("[ab☃]{1,4}", 0..4),
            include: bool,
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&pieces, &stops, include), spec(&pieces.concat(), &stops, include));
        }
    }
}

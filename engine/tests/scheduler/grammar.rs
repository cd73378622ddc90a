//! Sequences under a grammar: they draw what it allows, end with it, and move like any other.

use heliostat_engine::grammar::{Grammar, TokenText, Vocabulary};
use heliostat_engine::request::{FinishReason, Request};
use heliostat_engine::scheduler::{RefuseReason, Scheduler};

use crate::rig::{EOS, FakeModel, VOCAB, roomy, simple};

/// Token 0 is `a`, token 1 is `b`, ...; EOS is a control token.
fn vocabulary() -> Vocabulary {
    let letter = |token: u32| match token {
        EOS => TokenText::Control("<eos>".into()),
        letter => TokenText::Bytes(vec![b'a' + letter as u8]),
    };
    Vocabulary::new((0..VOCAB as u32).map(letter).collect(), &[EOS]).unwrap()
}

fn request(regex: &str, max_tokens: u32) -> Request {
    Request { grammar: Some(Box::new(Grammar::Regex(regex.into()))), ..simple(1, vec![1, 2, 3], max_tokens) }
}

fn add(scheduler: &mut Scheduler, request: Request) -> Result<(), RefuseReason> {
    let constraint = vocabulary().compile(request.grammar.as_ref().unwrap()).unwrap();
    scheduler.add_constrained(request, constraint).map_err(|refused| refused.reason)
}

/// One rank's steps, until the sequence ends or `most` were made.
fn run(scheduler: &mut Scheduler, most: usize) -> (String, Option<FinishReason>) {
    let mut model = FakeModel::new(scheduler.config());
    let mut text = String::new();
    for _ in 0..most {
        let step = scheduler.schedule();
        scheduler.prepare_masks();
        for output in scheduler.complete(&model.forward(&step)) {
            text.extend(output.tokens.iter().map(|&token| (b'a' + token as u8) as char));
            if output.finish.is_some() {
                return (text, output.finish);
            }
        }
    }
    (text, None)
}

#[test]
fn the_output_follows_the_grammar_and_ends_with_it() {
    let mut scheduler = Scheduler::new(roomy()).unwrap();
    add(&mut scheduler, request("(a|c|e)(b|g){4}f", 20)).unwrap();
    let (text, finish) = run(&mut scheduler, 20);
    let inner = text.strip_prefix(['a', 'c', 'e']).and_then(|rest| rest.strip_suffix('f')).unwrap();
    assert!(inner.len() == 4 && inner.chars().all(|c| c == 'b' || c == 'g'), "{text}");
    // Nothing may follow: no step is spent on drawing an end.
    assert_eq!(finish, Some(FinishReason::Stop(EOS)));
}

#[test]
fn a_sequence_that_moves_goes_on_in_its_grammar() {
    let all = {
        let mut scheduler = Scheduler::new(roomy()).unwrap();
        add(&mut scheduler, request("((a|b)(c|e)(f|g)){3}", 20)).unwrap();
        run(&mut scheduler, 20).0
    };
    assert_eq!(all.len(), 9);
    let mut first = Scheduler::new(roomy()).unwrap();
    add(&mut first, request("((a|b)(c|e)(f|g)){3}", 20)).unwrap();
    let (begun, _) = run(&mut first, 4);
    let moved = first.take_back().pop().unwrap();
    assert_eq!(moved.generated.len(), begun.len());
    let mut second = Scheduler::new(roomy()).unwrap();
    add(&mut second, moved.clone()).unwrap();
    assert_eq!(begun + &run(&mut second, 20).0, all);
    let wrong = Request { generated: vec![0, 0], ..moved };
    assert_eq!(add(&mut Scheduler::new(roomy()).unwrap(), wrong), Err(RefuseReason::OffGrammar));
}

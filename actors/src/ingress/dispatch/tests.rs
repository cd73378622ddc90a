//! Dispatch against simulated ranks: whatever is lost, refused or said twice, each client gets its tokens once and in
//! order.

use std::collections::BTreeMap;

use heliostat_engine::request::{SamplingParams, StopConditions};
use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_secs(1000);

fn request(id: u128, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt: vec![id as u32; 20],
        generated: Vec::new(),
        sampling: SamplingParams::default(),
        stop: StopConditions { max_tokens, min_tokens: 0, eos_token_ids: vec![], stop_token_ids: vec![] },
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        priority: 0,
        turn: 0,
    }
}

/// From a client who wants this rank.
fn at(rank: u32) -> Origin {
    Origin { pinned: Some(rank), ..Origin::default() }
}

fn output(id: u128, first_index: u32, tokens: &[u32], finish: Option<FinishReason>) -> Output {
    Output { first_index, tokens: tokens.to_vec(), finish, ..finished(&request(id, 0)) }
}

fn ranks(ready: &[(u32, u64)]) -> Ranks {
    Ranks {
        size: 4,
        ready: ready.iter().copied().collect(),
        missing: vec!["rank 3: starting".into()],
        ..Ranks::default()
    }
}

fn dispatch(ready: &[(u32, u64)]) -> Dispatch {
    let config = DispatchConfig { queue_max: 4, moves_max: 2, ..DispatchConfig::default() };
    let mut dispatch = Dispatch::new(config);
    dispatch.set_ranks(NOW, ranks(ready), &mut Vec::new());
    dispatch
}

/// Where the one submission among `effects` went, and with how many tokens.
fn submitted(effects: &mut Vec<Effect>) -> (u32, usize) {
    match std::mem::take(effects).as_slice() {
        [Effect::Send(rank, RankCommand::Submit(request))] => (*rank, request.generated.len()),
        other => panic!("not one submission: {other:?}"),
    }
}

#[test]
fn requests_wait_for_no_one_who_is_not_there() {
    let mut none = dispatch(&[]);
    let refused = none.submit(NOW, vec![request(1, 4)], Origin::default(), &mut Vec::new()).unwrap_err();
    assert_eq!(refused.to_string(), "the model is not ready: rank 3: starting");
    let mut two = dispatch(&[(0, 1), (1, 1)]);
    let mut submit = |pinned| two.submit(NOW, vec![request(1, 4)], at(pinned), &mut Vec::new());
    assert_eq!(submit(3), Err(Refused::RankNotReady(3)));
    assert_eq!(submit(4), Err(Refused::NoSuchRank { rank: 4, size: 4 }));
    assert_eq!(submit(1), Ok(()));
}

#[test]
fn full_queues_refuse_all_of_a_request_or_none() {
    let mut dispatch = dispatch(&[(0, 1), (1, 1)]);
    let mut effects = Vec::new();
    let mut submit = |ids: std::ops::Range<u128>, effects: &mut Vec<Effect>| {
        dispatch.submit(NOW, ids.map(|id| request(id, 4)).collect(), Origin::default(), effects)
    };
    assert_eq!(submit(0..9, &mut effects), Err(Refused::NeverFits { sequences: 9, capacity: 8 }));
    assert_eq!(submit(0..5, &mut effects), Ok(()));
    assert_eq!(submit(5..9, &mut effects), Err(Refused::QueueFull));
    assert_eq!(submit(5..8, &mut effects), Ok(()));
    assert_eq!(effects.len(), 8);
}

#[test]
fn a_refused_sequence_tries_the_others_then_fails() {
    let mut dispatch = dispatch(&[(0, 1), (1, 1)]);
    let mut effects = Vec::new();
    dispatch.submit(NOW, vec![request(1, 4)], Origin::default(), &mut effects).unwrap();
    let (first, _) = submitted(&mut effects);
    dispatch.refused(NOW, first, RequestId(1), Refusal::Full, &mut effects);
    assert_eq!(submitted(&mut effects).0, 1 - first);
    dispatch.refused(NOW, 1 - first, RequestId(1), Refusal::Full, &mut effects);
    assert_eq!(effects, [Effect::Fail(RequestId(1), Failure::QueueFull)]);
    assert!(dispatch.is_empty());
}

#[test]
fn a_restarted_rank_has_forgotten_its_sequences() {
    let mut dispatch = dispatch(&[(0, 1)]);
    let mut effects = Vec::new();
    dispatch.submit(NOW, vec![request(1, 4)], at(0), &mut effects).unwrap();
    effects.clear();
    dispatch.outputs(NOW, 0, vec![output(1, 0, &[7, 8], None)], &mut effects);
    effects.clear();
    dispatch.set_ranks(NOW, ranks(&[(0, 2)]), &mut effects);
    assert_eq!(submitted(&mut effects), (0, 2));
    assert_eq!(dispatch.moves(), 1);
}

#[test]
fn a_sequence_without_a_rank_waits_so_long_then_fails() {
    let mut dispatch = dispatch(&[(0, 1)]);
    let mut effects = Vec::new();
    dispatch.set_ranks(NOW, Ranks { missing: vec![], ..ranks(&[(0, 1)]) }, &mut effects);
    dispatch.submit(NOW, vec![request(1, 4), request(2, 4)], Origin::default(), &mut effects).unwrap();
    effects.clear();
    dispatch.outputs(NOW, 0, vec![output(2, 0, &[1, 2, 3, 4], None)], &mut effects);
    effects.clear();
    dispatch.rank_lost(NOW, 0, &mut effects);
    assert!(matches!(&effects[..], [Effect::Deliver(_, end)] if end.finish == Some(FinishReason::Length)));
    effects.clear();
    assert!(dispatch.tick(NOW + Duration::from_secs(119), &mut effects) && effects.is_empty());
    assert!(!dispatch.tick(NOW + Duration::from_secs(120), &mut effects));
    let [Effect::Fail(RequestId(1), failure)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(failure.to_string(), "no rank could take the request for 120 seconds");
}

#[test]
fn a_sequence_that_is_refused_again_and_again_does_not_wait_for_ever() {
    let mut dispatch = dispatch(&[(0, 1)]);
    let mut effects = Vec::new();
    dispatch.submit(NOW, vec![request(1, 4)], Origin::default(), &mut effects).unwrap();
    for second in 0..=120 {
        let now = NOW + Duration::from_secs(second);
        dispatch.refused(now, 0, RequestId(1), Refusal::Gone, &mut effects);
        effects.clear();
        dispatch.tick(now, &mut effects);
        assert_eq!(dispatch.is_empty(), second == 120 && matches!(&effects[..], [.., Effect::Fail(..)]));
    }
}

#[test]
fn a_group_that_lacks_a_rank_and_makes_nothing_fails_its_sequences() {
    let mut dispatch = dispatch(&[(0, 1)]);
    let mut effects = Vec::new();
    dispatch.submit(NOW, vec![request(1, 4)], Origin::default(), &mut effects).unwrap();
    let later = |seconds| NOW + Duration::from_secs(seconds);
    dispatch.outputs(later(60), 0, vec![output(1, 0, &[7], None)], &mut effects);
    effects.clear();
    assert!(dispatch.tick(later(179), &mut effects) && effects.is_empty(), "it worked 119 seconds ago");
    assert!(!dispatch.tick(later(180), &mut effects));
    let [Effect::Send(0, RankCommand::Abort(_)), Effect::Fail(_, failure)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(failure.to_string(), "the group generated nothing for 120 seconds: rank 3: starting");
    let refused = dispatch.submit(later(181), vec![request(2, 4)], Origin::default(), &mut effects);
    assert!(matches!(refused, Err(Refused::NotReady { .. })));
    let complete = Ranks { missing: vec![], ..ranks(&[(0, 1)]) };
    dispatch.set_ranks(later(182), complete, &mut effects);
    assert_eq!(dispatch.submit(later(183), vec![request(2, 4)], Origin::default(), &mut effects), Ok(()));
    assert!(!dispatch.needs_tick());
}

#[test]
fn ranks_lost_again_and_again_end_in_an_error() {
    let mut dispatch = dispatch(&[(0, 1)]);
    let mut effects = Vec::new();
    dispatch.submit(NOW, vec![request(1, 4)], Origin::default(), &mut effects).unwrap();
    for incarnation in 2..5 {
        effects.clear();
        dispatch.set_ranks(NOW, ranks(&[(0, incarnation)]), &mut effects);
    }
    assert_eq!(effects, [Effect::Fail(RequestId(1), Failure::MovedTooOften(2))]);
}

#[test]
fn outputs_of_a_sequence_that_is_gone_are_answered_by_an_abort() {
    let mut dispatch = dispatch(&[(0, 1), (1, 1)]);
    let mut effects = Vec::new();
    dispatch.submit(NOW, vec![request(1, 4)], at(0), &mut effects).unwrap();
    dispatch.abort(RequestId(1), &mut effects);
    effects.clear();
    dispatch.outputs(
        NOW,
        0,
        vec![output(1, 0, &[7], None), output(1, 1, &[7], Some(FinishReason::Aborted))],
        &mut effects,
    );
    assert_eq!(effects, [Effect::Send(0, RankCommand::Abort(RequestId(1)))]);
}

/// One rank that takes prompts, and two that go on.
fn apart(ready: &[(u32, u64)]) -> Ranks {
    let duties = [(0, Duty::Prefill), (1, Duty::Decode), (2, Duty::Decode)].into_iter().collect();
    Ranks { duties, missing: Vec::new(), ..ranks(ready) }
}

/// Where the one sequence among `effects` went on, from which rank its prompt comes, and with how many tokens.
fn continued(effects: &mut Vec<Effect>) -> (u32, u32, usize) {
    match effects.pop() {
        Some(Effect::Send(rank, RankCommand::Continue(request, from))) => {
            assert_eq!(request.stop.max_tokens, 4, "all that its client wants");
            (rank, from, request.generated.len())
        }
        other => panic!("it does not go on: {other:?}"),
    }
}

#[test]
fn a_sequence_goes_on_where_tokens_are_generated_with_its_first_one() {
    let mut dispatch = dispatch(&[]);
    let mut effects = Vec::new();
    dispatch.set_ranks(NOW, apart(&[(1, 1), (2, 1)]), &mut effects);
    let refused = dispatch.submit(NOW, vec![request(1, 4)], Origin::default(), &mut effects);
    assert!(matches!(refused, Err(Refused::NotReady { .. })), "nobody takes prompts: {refused:?}");
    dispatch.set_ranks(NOW, apart(&[(0, 1), (1, 1), (2, 1)]), &mut effects);
    dispatch.submit(NOW, vec![request(1, 4)], at(0), &mut effects).unwrap();
    match effects.pop() {
        Some(Effect::Send(0, RankCommand::Submit(request))) => assert_eq!(request.stop.max_tokens, 1),
        other => panic!("{other:?}"),
    }
    dispatch.outputs(NOW, 0, vec![output(1, 0, &[7], Some(FinishReason::Length))], &mut effects);
    let (to, from, have) = continued(&mut effects);
    assert_eq!((to > 0, from, have), (true, 0, 1));
    // The first token is on its way, and not as the last one.
    assert_eq!(effects, [Effect::Deliver(0, output(1, 0, &[7], None))]);
    effects.clear();
    // The rank that went on with it is lost, and with it what it had of the prompt.
    dispatch.rank_lost(NOW, to, &mut effects);
    assert_eq!(continued(&mut effects), (3 - to, 0, 1));
    // So is the one that has the prompt: the next one computes it.
    dispatch.set_ranks(NOW, apart(&[(0, 1), (1, 1), (2, 1)]), &mut effects);
    effects.clear();
    dispatch.rank_lost(NOW, 0, &mut effects);
    dispatch.rank_lost(NOW, 3 - to, &mut effects);
    assert_eq!(submitted(&mut effects), (to, 1));
    dispatch.outputs(NOW, to, vec![output(1, 1, &[8, 9, 10], Some(FinishReason::Length))], &mut effects);
    assert_eq!(effects, [Effect::Deliver(to, output(1, 1, &[8, 9, 10], Some(FinishReason::Length)))]);
    assert!(dispatch.is_empty());
}

#[test]
fn a_sequence_that_ends_with_its_first_token_ends_there() {
    let mut dispatch = dispatch(&[]);
    let mut effects = Vec::new();
    dispatch.set_ranks(NOW, apart(&[(0, 1), (1, 1)]), &mut effects);
    let ends = [(1, FinishReason::Length, 1), (2, FinishReason::Stop(7), 4)];
    for (id, finish, max_tokens) in ends {
        dispatch.submit(NOW, vec![request(id, max_tokens)], Origin::default(), &mut effects).unwrap();
        effects.clear();
        dispatch.outputs(NOW, 0, vec![output(id, 0, &[7], Some(finish.clone()))], &mut effects);
        assert_eq!(effects, [Effect::Deliver(0, output(id, 0, &[7], Some(finish)))]);
    }
    assert!(dispatch.is_empty());
}

#[test]
fn prompts_are_taken_as_long_as_others_can_go_on_with_them() {
    let mut dispatch = dispatch(&[]);
    let mut effects = Vec::new();
    dispatch.set_ranks(NOW, apart(&[(0, 1), (1, 1)]), &mut effects);
    let submit = |dispatch: &mut Dispatch, id| {
        dispatch.submit(NOW, vec![request(id, 4)], Origin::default(), &mut Vec::new())
    };
    for id in 1..=4 {
        assert_eq!(submit(&mut dispatch, id), Ok(()));
        dispatch.outputs(NOW, 0, vec![output(id, 0, &[7], Some(FinishReason::Length))], &mut effects);
    }
    // The queue of prompts is empty, and the other rank has as many as it takes.
    assert_eq!(submit(&mut dispatch, 5), Err(Refused::QueueFull));
    dispatch.outputs(NOW, 1, vec![output(1, 1, &[8], None), output(2, 1, &[8], None)], &mut effects);
    assert_eq!(submit(&mut dispatch, 5), Ok(()));
}

#[test]
fn a_sequence_with_tokens_waits_for_a_rank_that_goes_on() {
    let mut dispatch = dispatch(&[]);
    let mut effects = Vec::new();
    dispatch.set_ranks(NOW, apart(&[(0, 1)]), &mut effects);
    dispatch.submit(NOW, vec![request(1, 4)], Origin::default(), &mut effects).unwrap();
    dispatch.outputs(NOW, 0, vec![output(1, 0, &[7], Some(FinishReason::Length))], &mut effects);
    assert_eq!((dispatch.rank_of(RequestId(1)), dispatch.at_stage(Stage::Output)), (None, 1));
    effects.clear();
    dispatch.set_ranks(NOW, apart(&[(0, 1), (2, 1)]), &mut effects);
    assert_eq!(continued(&mut effects), (2, 0, 1));
}

/// What the simulated ranks hold, and what the clients got.
struct World {
    dispatch: Dispatch,
    /// Incarnation and sequences of each rank that is up.
    up: BTreeMap<u32, (u64, BTreeMap<RequestId, Request>)>,
    /// Ranks that take a part of a sequence only.
    duties: BTreeMap<u32, Duty>,
    got: BTreeMap<RequestId, (Vec<u32>, bool)>,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Submit,
    /// A rank sends this many tokens of each sequence, from this many before what it last sent.
    Step(u32, u32, u32),
    /// A rank's outputs are lost on the way.
    LoseOutputs(u32),
    Kill(u32),
    Start(u32),
    Abort(u128),
    Refuse(u32),
}

fn token(id: RequestId, index: u32) -> u32 {
    (id.0 as u32) * 1000 + index
}

impl World {
    fn new(duties: &[(u32, Duty)]) -> Self {
        let config = DispatchConfig { moves_max: 1000, ..DispatchConfig::default() };
        let duties = duties.iter().copied().collect();
        Self { dispatch: Dispatch::new(config), up: BTreeMap::new(), duties, got: BTreeMap::new() }
    }

    fn apply(&mut self, op: Op, step: u64) {
        let mut effects = Vec::new();
        match op {
            Op::Submit => {
                let id = RequestId(u128::from(step));
                if self.dispatch.submit(NOW, vec![request(id.0, 12)], Origin::default(), &mut effects).is_ok()
                {
                    self.got.insert(id, Default::default());
                }
            }
            Op::Step(rank, tokens, overlap) => self.step(rank, tokens, overlap, &mut effects),
            Op::LoseOutputs(rank) => {
                for request in self.up.get_mut(&rank).into_iter().flat_map(|(_, held)| held.values_mut()) {
                    request.generated.push(token(request.id, request.generated.len() as u32));
                }
            }
            Op::Kill(rank) => {
                self.up.remove(&rank);
                self.tell_ranks(&mut effects);
            }
            Op::Start(rank) => {
                self.up.insert(rank, (step, BTreeMap::new()));
                self.tell_ranks(&mut effects);
            }
            Op::Abort(id) => {
                let id = RequestId(id);
                if self.got.remove(&id).is_some() {
                    self.dispatch.abort(id, &mut effects);
                }
            }
            Op::Refuse(rank) => {
                let held = self.up.get_mut(&rank).and_then(|(_, held)| held.pop_first());
                if let Some((id, _)) = held {
                    self.dispatch.refused(NOW, rank, id, Refusal::Gone, &mut effects);
                }
            }
        }
        self.perform(effects);
    }

    fn tell_ranks(&mut self, effects: &mut Vec<Effect>) {
        let ready = self.up.iter().map(|(&rank, (incarnation, _))| (rank, *incarnation)).collect();
        let duties = self.duties.clone();
        self.dispatch.set_ranks(NOW, Ranks { size: 3, ready, duties, ..Ranks::default() }, effects);
    }

    fn step(&mut self, rank: u32, tokens: u32, overlap: u32, effects: &mut Vec<Effect>) {
        let Some((_, held)) = self.up.get_mut(&rank) else { return };
        let mut outputs = Vec::new();
        held.retain(|&id, request| {
            let have = request.generated.len() as u32;
            let (first, end) = (have.saturating_sub(overlap), (have + tokens).min(request.stop.max_tokens));
            let new: Vec<u32> = (first..end.max(first)).map(|index| token(id, index)).collect();
            request.generated.extend((have..end).map(|index| token(id, index)));
            let finish = (end >= request.stop.max_tokens).then_some(FinishReason::Length);
            outputs.push(output(id.0, first, &new, finish.clone()));
            finish.is_none()
        });
        self.dispatch.outputs(NOW, rank, outputs, effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(rank, command) => {
                    let Some((_, held)) = self.up.get_mut(&rank) else { continue };
                    match command {
                        RankCommand::Submit(request) | RankCommand::Continue(request, _) => {
                            drop(held.insert(request.id, *request));
                        }
                        RankCommand::Abort(id) => drop(held.remove(&id)),
                    }
                }
                Effect::Deliver(_, output) => {
                    let Some((got, ended)) = self.got.get_mut(&output.id) else { panic!("after its end") };
                    assert!(!*ended);
                    assert_eq!(output.first_index as usize, got.len());
                    got.extend(output.tokens);
                    *ended = output.finish.is_some();
                }
                Effect::Fail(id, failure) => panic!("{id:?} failed: {failure}"),
            }
        }
    }
}

fn any_op() -> impl Strategy<Value = Op> {
    let rank = 0u32..3;
    prop_oneof![
        3 => Just(Op::Submit),
        6 => (rank.clone(), 0u32..4, 0u32..3).prop_map(|(rank, tokens, overlap)| Op::Step(rank, tokens, overlap)),
        1 => rank.clone().prop_map(Op::LoseOutputs),
        1 => rank.clone().prop_map(Op::Kill),
        2 => rank.clone().prop_map(Op::Start),
        1 => (0u128..40).prop_map(Op::Abort),
        1 => rank.prop_map(Op::Refuse),
    ]
}

proptest! {
    #[test]
    fn every_token_arrives_once_and_in_order(
        ops in prop::collection::vec(any_op(), 1..80),
        split in any::<bool>(),
    ) {
        let apart = [(0, Duty::Prefill), (1, Duty::Decode), (2, Duty::Decode)];
        let mut world = World::new(if split { &apart } else { &[] });
        for (step, &op) in ops.iter().enumerate() {
            world.apply(op, step as u64);
        }
        // Full healing: all ranks up, all outputs arrive.
        for rank in 0..3 {
            world.apply(Op::Start(rank), 1000);
        }
        for step in 0..60 {
            world.apply(Op::Step(step % 3, 1, 0), 0);
            let mut effects = Vec::new();
            world.dispatch.tick(NOW, &mut effects);
            world.perform(effects);
        }
        for (id, (got, ended)) in &world.got {
            prop_assert!(ended);
            prop_assert_eq!(got.clone(), (0..12).map(|index| token(*id, index)).collect::<Vec<_>>());
        }
        prop_assert!(world.dispatch.is_empty());
        prop_assert!(world.up.values().all(|(_, held)| held.is_empty()), "a sequence runs unheard");
    }
}

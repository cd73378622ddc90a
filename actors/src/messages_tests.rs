//! What the messages are on the wire.

use heliostat_engine::request::{FinishReason, SamplingParams, StopConditions, TokenLogprob};
use heliostat_runtime::handle::{ActorId, Incarnation, ProcessId};
use heliostat_runtime::wire::{from_bytes, to_bytes};
use proptest::prelude::*;

use super::*;
use crate::telemetry::TraceContext;
use heliostat_runtime::actor::WireMessage;

fn addr() -> ActorAddr {
    let (actor, incarnation, process) = (ActorId::named("ingress"), Incarnation(3), ProcessId(9));
    ActorAddr { actor, incarnation, process, endpoint: "10.0.0.1:4000".into() }
}

fn submit() -> Submit {
    let stop =
        StopConditions { max_tokens: 9, min_tokens: 1, eos_token_ids: vec![1], stop_token_ids: vec![7] };
    let request = Request {
        id: RequestId(u128::MAX - 5),
        prompt: vec![1, 300, 70_000],
        generated: vec![5],
        sampling: SamplingParams { logit_bias: vec![(4, -1.5)], ..SamplingParams::default() },
        stop,
        grammar: None,
        logprobs: Some(2),
        prompt_logprobs: None,
        priority: -3,
        turn: 1 << 40,
    };
    let trace = TraceContext { trace: 7 << 100, span: 9, state: "vendor=1".into() };
    let from = Provenance { request_id: "mine".into(), trace: Some(trace) };
    Submit { request, from, reply_to: addr(), kv_at: Some(addr()) }
}

fn outputs() -> RankOutputs {
    let logprob = TokenLogprob { token: 5, logprob: -0.5, rank: 1, top: vec![(5, -0.5), (6, -1.0)] };
    let output = Output {
        id: RequestId(1),
        first_index: 3,
        tokens: vec![5],
        logprobs: vec![logprob.clone()],
        prompt_logprobs: Some(vec![logprob]),
        cached_tokens: 16,
        finish: Some(FinishReason::Error("why".into())),
    };
    RankOutputs {
        dp: 1,
        outputs: vec![output],
        stats: RankStats { steps: 7, ..RankStats::default() },
        spans: SpanCounts { dropped: 3, ..SpanCounts::default() },
    }
}

/// Decoding says what is wrong, or gives a value that encodes again; it neither panics nor takes memory for what is
/// not there.
fn survives<M: WireMessage>(bytes: &[u8]) {
    if let Ok(message) = from_bytes::<M>(bytes) {
        assert!(to_bytes(&message).is_ok());
    }
}

fn all_survive(bytes: &[u8]) {
    survives::<Submit>(bytes);
    survives::<Abort>(bytes);
    survives::<ApplyPlan>(bytes);
    survives::<AbandonPlan>(bytes);
    survives::<FetchExpert>(bytes);
    survives::<FetchKv>(bytes);
    survives::<ReportLoad>(bytes);
    survives::<AttachEplb>(bytes);
    survives::<AttachIngress>(bytes);
    survives::<Ping>(bytes);
    survives::<RankOutputs>(bytes);
    survives::<RankRefused>(bytes);
    survives::<StepLoad>(bytes);
    survives::<PlanReport>(bytes);
    survives::<RankJoined>(bytes);
    survives::<GetStatus>(bytes);
    survives::<Rebalance>(bytes);
}

#[test]
fn what_a_message_says_crosses_the_wire() {
    let sent = submit();
    let got: Submit = from_bytes(&to_bytes(&sent).unwrap()).unwrap();
    assert_eq!((got.request, got.from, got.reply_to), (sent.request, sent.from, sent.reply_to));
    let got: RankOutputs = from_bytes(&to_bytes(&outputs()).unwrap()).unwrap();
    assert_eq!((got.outputs, got.stats, got.spans), (outputs().outputs, outputs().stats, outputs().spans));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        all_survive(&bytes);
    }

    #[test]
    fn damaged_messages_decode_or_are_refused(
        which: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        end in any::<prop::sample::Index>(),
    ) {
        let mut bytes = if which { to_bytes(&submit()).unwrap() } else { to_bytes(&outputs()).unwrap() };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        all_survive(&bytes);
        bytes.truncate(end.index(bytes.len() + 1));
        all_survive(&bytes);
    }
}

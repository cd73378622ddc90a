//! The stages of the exchange on one rank alone: rows move within the GPU's memory.

use std::time::Duration;

use half::bf16;
use heliostat_kernels::cuda::exchange::{
    Exchange, ExchangeShape, Member, Membership, OwnResults, Reduce, Roles, RowFormat, Rows, Transport,
};
use heliostat_kernels::cuda::heap::HeapHandle;
use heliostat_kernels::cuda::nccl::Nccl;
use heliostat_kernels::cuda::{Buffer, CudaError, Stream};

use super::{Bench, EXPERTS, HIDDEN, OpReport, SLOTS, TOP_K};
use crate::bench::floor::Cost;

/// Calls in a recording.
pub(super) const CALLS: usize = 20;
/// Bytes of a row on its way: codes and scales.
const ROW_BYTES: usize = HIDDEN + HIDDEN / 128 * 4;

/// Measures each stage for `rows` tokens.
pub(super) fn measure(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    let mut rank = Rank::new(bench, rows, Seat { rank: 0, ranks: 1, transport: Transport::Local })?;
    rank.connect(&bench.stream, &[rank.handle()])?;
    rank.round(&bench.stream)?;
    rank.verify(&bench.stream)?;
    let signal = bench.time_us(CALLS, |stream, _| rank.signal(stream))?;
    // DP and EP rounds went apart: signals without a layout.
    rank.exchange.reset(&bench.stream, 2)?;
    let both = bench.time_us(CALLS, |stream, _| {
        rank.signal(stream)?;
        rank.exchange.layout(stream)
    })?;
    // From here each kernel repeats the round that happened last.
    let gather = bench.time_us(CALLS, |stream, _| rank.exchange.gather(stream))?;
    rank.exchange.finish(&bench.stream)?;
    let combine = |bench: &Bench<'_>, own| {
        bench.time_us(CALLS, |stream, _| rank.exchange.combine(stream, &rank.results, own))
    };
    let pushed = combine(bench, OwnResults::Pushed)?;
    let in_place = combine(bench, OwnResults::InPlace)?;
    let reduce = bench.time_us(CALLS, |stream, _| rank.reduce(stream))?;
    let round = bench.time_us(CALLS, |stream, _| rank.round(stream))?;
    rank.verify(&bench.stream)?;
    let results = rows * TOP_K * HIDDEN * 2;
    let gathered = Cost::moving((rows + rows * TOP_K) * ROW_BYTES);
    let reduced = Cost::moving(results + rows * HIDDEN * 4);
    for (name, us, cost) in [
        ("exchange: signal", signal, None),
        ("exchange: layout", both - signal, None),
        ("exchange: gather", gather, Some(gathered)),
        ("exchange: combine, results in place", in_place, None),
        ("exchange: combine, results pushed", pushed, Some(Cost::moving(2 * results))),
        ("exchange: reduce", reduce, Some(reduced)),
        ("exchange: whole round, in place", round, None),
    ] {
        bench.note(OpReport::new((name, rows), us, cost));
    }
    Ok(())
}

/// A rank's place.
#[derive(Clone, Copy)]
pub(super) struct Seat {
    pub(super) rank: usize,
    pub(super) ranks: usize,
    pub(super) transport: Transport,
}

/// One rank's end, with all that a round needs.
pub(super) struct Rank {
    seat: Seat,
    rows: usize,
    exchange: Exchange,
    tokens: Buffer<u32>,
    weights: Buffer<f32>,
    results: Buffer<bf16>,
    shared: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl Rank {
    /// How long a peer may be silent.
    pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

    /// Bytes that a token's choices take on their way to the experts.
    pub(super) fn sent_bytes() -> usize {
        TOP_K * ROW_BYTES
    }

    /// Bytes of their results.
    pub(super) fn returned_bytes() -> usize {
        TOP_K * HIDDEN * 2
    }

    /// Not connected yet.
    pub(super) fn new(bench: &Bench<'_>, rows: usize, seat: Seat) -> Result<Self, CudaError> {
        let tokens_max = rows.next_multiple_of(4);
        let shape = ExchangeShape {
            tokens_max,
            top_k: TOP_K,
            hidden: HIDDEN,
            format: RowFormat::Fp8,
            dp_max: seat.ranks,
            ep_max: seat.ranks,
            slots_max: SLOTS,
            rows_max: ExchangeShape::rows_worst(seat.ranks, tokens_max, TOP_K, SLOTS),
        };
        let (device, stream) = (&bench.device, &bench.stream);
        let roles = Roles { tokens: true, experts: true };
        let exchange = Exchange::new(device, shape, seat.transport, roles)?;
        let outgoing = exchange.outgoing();
        if let Rows::Fp8 { codes, scales } = &outgoing.rows {
            bench.fill.e4m3(stream, (codes, scales), (5, 1.0))?;
        }
        outgoing.slots.write(stream, &choices(rows, seat.ranks * SLOTS))?;
        Ok(Self {
            seat,
            rows,
            tokens: device.upload(&[rows as u32])?,
            weights: bench.f32(rows * TOP_K)?,
            results: bench.bf16(shape.rows_max * HIDDEN)?,
            shared: bench.bf16(rows * HIDDEN)?,
            out: device.alloc(rows * HIDDEN)?,
            exchange,
        })
    }

    /// Names its memory.
    pub(super) fn handle(&self) -> HeapHandle {
        self.exchange.handle()
    }

    /// Rows travel by `nccl`.
    pub(super) fn carry_by(&mut self, nccl: Nccl) {
        self.exchange.carry_by(nccl);
    }

    /// Joins the ranks that own `heaps`.
    pub(super) fn connect(&mut self, stream: &Stream, heaps: &[HeapHandle]) -> Result<(), CudaError> {
        let members = (0..).zip(heaps).map(|(rank, &heap)| Some(Member { rank, heap }));
        let members: Vec<_> = members.collect();
        let membership = Membership {
            epoch: 1,
            rank: self.seat.rank as u32,
            dp: members.clone(),
            ep: members,
            slots: SLOTS,
            timeout: Self::TIMEOUT,
        };
        self.exchange.connect(stream, membership)
    }

    fn signal(&self, stream: &Stream) -> Result<(), CudaError> {
        self.exchange.signal(stream, &self.tokens)
    }

    /// The first half of a round, of which all ranks know that it is over.
    pub(super) fn dispatch(&self, stream: &Stream) -> Result<(), CudaError> {
        self.bring(stream)?;
        self.exchange.finish(stream)
    }

    fn bring(&self, stream: &Stream) -> Result<(), CudaError> {
        self.signal(stream)?;
        self.exchange.carry_rows(stream, self.rows)?;
        self.exchange.layout(stream)?;
        self.exchange.gather(stream)
    }

    fn reduce(&self, stream: &Stream) -> Result<(), CudaError> {
        let Self { rows, weights, results, shared, out, .. } = self;
        let (in_place, shared) = (Some(results), Some(shared));
        self.exchange.reduce(stream, &Reduce { rows: *rows, weights, in_place, shared, out })
    }

    /// A round that computes nothing.
    pub(super) fn round(&self, stream: &Stream) -> Result<(), CudaError> {
        self.bring(stream)?;
        self.exchange.combine(stream, &self.results, OwnResults::InPlace)?;
        self.exchange.carry_results(stream, self.rows, OwnResults::InPlace)?;
        self.reduce(stream)
    }

    /// Whether all rounds so far went well.
    pub(super) fn verify(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.synchronize()?;
        self.exchange.status().map_err(|why| CudaError::Other(why.to_string()))
    }
}

/// Slots of `rows` tokens: distinct experts, of which each lies on the slot of its number modulo `slots`.
fn choices(rows: usize, slots: usize) -> Vec<u32> {
    let experts = |row: usize| {
        // An odd stride visits all experts before it comes back.
        let mixed = (row as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let (first, stride) = ((mixed >> 40) as usize, (mixed >> 20) as usize | 1);
        (0..TOP_K).map(move |choice| (first + choice * stride) % EXPERTS)
    };
    (0..rows).flat_map(experts).map(|expert| (expert % slots) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_spread_over_the_slots() {
        let slots = choices(128, SLOTS);
        assert_eq!(slots.len(), 128 * TOP_K);
        let counts = (0..SLOTS as u32).map(|slot| slots.iter().filter(|&&at| at == slot).count());
        let counts: Vec<usize> = counts.collect();
        assert!(counts.iter().all(|&count| (85..145).contains(&count)), "{counts:?}");
    }
}

//! Ranks of a group: in one process each has a stream of its own.

use std::time::Duration;

use half::bf16;
use heliostat_kernels::cuda::exchange::{
    Exchange, Member, Membership, OwnResults, Reduce, Roles, RowFormat, Rows, Transport,
};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Kernel, Launch, Params, Priority, Source, Stream};

use super::reference::{Input, Layout, Scenario};

const EXPERTS: &str = r#"
#include "common.cuh"
struct Params {
    u64 rows, scales, start, count, results, destination;
    u32 hidden, stride, slots, first_slot, fp8;
};
extern "C" __global__ void experts(const __grid_constant__ Params p) {
    wait_for_previous();
    const u32* start = (const u32*)p.start;
    const u32* count = (const u32*)p.count;
    for (u32 s = blockIdx.x; s < p.slots; s += gridDim.x) {
        for (u32 i = threadIdx.x; i < count[s] * p.hidden; i += blockDim.x) {
            const u32 row = start[s] + i / p.hidden, h = i % p.hidden;
            u32 seen;
            if (p.fp8) {
                seen = ((const u8*)p.rows)[u64(row) * p.hidden + h];
                seen += __float_as_uint(((const float*)p.scales)[u64(h / 128) * p.stride + row]) >> 9;
            } else {
                const u32 bits = ((const u16*)p.rows)[u64(row) * p.hidden + h];
                seen = (bits & 255) + 3 * (bits >> 8);
            }
            const float y = float((seen + 37 * (p.first_slot + s)) & 255) / 16.0f;
            bf16* to = p.destination ? (bf16*)((const u64*)p.destination)[row] : (bf16*)p.results + u64(row) * p.hidden;
            to[h] = to_bf16(y);
        }
    }
}
"#;

#[repr(C)]
#[derive(Clone, Copy)]
struct ExpertParams {
    rows: u64,
    scales: u64,
    start: u64,
    count: u64,
    results: u64,
    destination: u64,
    hidden: u32,
    stride: u32,
    slots: u32,
    first_slot: u32,
    fp8: u32,
}

// SAFETY: the same fields as `Params` above.
unsafe impl Params for ExpertParams {}

/// How results get to their tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// Combine pushes those of other ranks.
    InPlace,
    /// Combine pushes all.
    Pushed,
    /// The experts' kernel pushes all.
    Fused,
}

impl Path {
    pub(crate) const ALL: [Self; 3] = [Self::InPlace, Self::Pushed, Self::Fused];
}

/// One rank with all that its rounds need.
pub(crate) struct Rank {
    pub(crate) id: u32,
    pub(crate) scenario: Scenario,
    pub(crate) dp: Option<usize>,
    pub(crate) ep: Option<usize>,
    pub(crate) stream: Stream,
    pub(crate) exchange: Exchange,
    pub(crate) path: Path,
    pub(crate) results: Buffer<bf16>,
    pub(crate) out: Buffer<bf16>,
    tokens: Buffer<u32>,
    weights: Buffer<f32>,
    shared: Buffer<bf16>,
    experts: Kernel,
}

impl Rank {
    pub(crate) fn new(device: &Device, scenario: &Scenario, id: u32, transport: Transport) -> Self {
        let shape = &scenario.shape;
        let index = |ranks: &[u32]| ranks.iter().position(|&rank| rank == id);
        let (dp, ep) = (index(&scenario.dp), index(&scenario.ep));
        let roles = Roles { tokens: dp.is_some(), experts: ep.is_some() };
        let rank = Self {
            id,
            dp,
            ep,
            stream: device.stream(Priority::High).unwrap(),
            exchange: Exchange::new(device, *shape, transport, roles).unwrap(),
            path: Path::InPlace,
            results: device.alloc(shape.rows_max * shape.hidden).unwrap(),
            out: device.alloc(shape.tokens_max * shape.hidden).unwrap(),
            tokens: device.alloc(1).unwrap(),
            weights: device.alloc(shape.tokens_max * shape.top_k).unwrap(),
            shared: device.alloc(shape.tokens_max * shape.hidden).unwrap(),
            experts: device.module(&Source::new("experts", EXPERTS)).unwrap().kernel("experts").unwrap(),
            scenario: scenario.clone(),
        };
        rank.poison();
        rank
    }

    /// Fills all that a round must write with what it never writes.
    pub(crate) fn poison(&self) {
        self.results.fill(&self.stream, 0xff).unwrap();
        self.out.fill(&self.stream, 0xff).unwrap();
        if self.ep.is_some() {
            let permuted = self.exchange.permuted();
            for words in [&permuted.segment_start, &permuted.segment_rows] {
                words.fill(&self.stream, 0xee).unwrap();
            }
            permuted.source.fill(&self.stream, 0xee).unwrap();
        }
        self.stream.synchronize().unwrap();
    }

    pub(crate) fn member(&self) -> Member {
        Member { rank: self.id, heap: self.exchange.handle() }
    }

    pub(crate) fn connect(&mut self, members: &[Member], epoch: u64, timeout: Duration) {
        let find = |id: &u32| members.iter().copied().find(|member| member.rank == *id);
        let membership = Membership {
            epoch,
            rank: self.id,
            dp: self.scenario.dp.iter().map(find).collect(),
            ep: self.scenario.ep.iter().map(find).collect(),
            slots: self.scenario.slots,
            timeout,
        };
        self.exchange.connect(&self.stream, membership).unwrap();
    }

    /// Puts its input where the round reads it.
    pub(crate) fn load(&self, inputs: &[Input]) {
        let Some(input) = self.dp.map(|dp| &inputs[dp]) else { return };
        let (stream, outgoing) = (&self.stream, self.exchange.outgoing());
        match &outgoing.rows {
            Rows::Fp8 { codes, scales } => {
                codes.write(stream, &input.rows).unwrap();
                scales.write(stream, &input.scales).unwrap();
            }
            Rows::Bf16(rows) => rows.cast::<u8>().write(stream, &input.rows).unwrap(),
        }
        outgoing.slots.write(stream, &input.slots).unwrap();
        self.tokens.write(stream, &[input.tokens as u32]).unwrap();
        self.weights.write(stream, &input.weights).unwrap();
        self.shared.write(stream, &input.shared).unwrap();
    }

    pub(crate) fn run_experts(&self, stream: &Stream) -> Result<(), CudaError> {
        let shape = self.exchange.shape();
        let permuted = self.exchange.permuted();
        let (rows, scales) = match &permuted.rows {
            Rows::Fp8 { codes, scales } => (codes.address(), scales.address()),
            Rows::Bf16(rows) => (rows.address(), 0),
        };
        let params = ExpertParams {
            rows,
            scales,
            start: permuted.segment_start.address(),
            count: permuted.segment_rows.address(),
            results: self.results.address(),
            destination: if self.path == Path::Fused { permuted.destination.address() } else { 0 },
            hidden: shape.hidden as u32,
            stride: shape.rows_max as u32,
            slots: self.scenario.slots as u32,
            first_slot: (self.ep.unwrap() * self.scenario.slots) as u32,
            fp8: u32::from(shape.format == RowFormat::Fp8),
        };
        let launch = Launch { dependent: true, ..Launch::new(18, 256) };
        // SAFETY: all buffers are those of the exchange's shape.
        unsafe { self.experts.launch(stream, &launch, &params) }
    }

    /// Queues one round.
    pub(crate) fn round(&self, stream: &Stream) -> Result<(), CudaError> {
        let rows = self.scenario.shape.tokens_max;
        if self.dp.is_some() {
            self.exchange.signal(stream, &self.tokens)?;
        }
        self.exchange.carry_rows(stream, rows)?;
        if self.ep.is_some() {
            self.exchange.layout(stream)?;
            self.exchange.gather(stream)?;
            self.run_experts(stream)?;
        }
        let own = self.own_results();
        match (self.ep, self.path) {
            (Some(_), Path::InPlace | Path::Pushed) => self.exchange.combine(stream, &self.results, own)?,
            (Some(_), Path::Fused) | (None, _) => self.exchange.finish(stream)?,
        }
        self.exchange.carry_results(stream, rows, own)?;
        if self.dp.is_some() { self.reduce(stream) } else { Ok(()) }
    }

    pub(crate) fn own_results(&self) -> OwnResults {
        match self.path {
            Path::InPlace => OwnResults::InPlace,
            Path::Pushed | Path::Fused => OwnResults::Pushed,
        }
    }

    /// Queues one round that computes nothing: for ranks with tokens and experts.
    pub(crate) fn round_without_experts(&self, stream: &Stream) -> Result<(), CudaError> {
        self.signal(stream)?;
        self.exchange.layout(stream)?;
        self.exchange.gather(stream)?;
        self.exchange.combine(stream, &self.results, self.own_results())?;
        self.reduce(stream)
    }

    pub(crate) fn signal(&self, stream: &Stream) -> Result<(), CudaError> {
        self.exchange.signal(stream, &self.tokens)
    }

    pub(crate) fn reduce(&self, stream: &Stream) -> Result<(), CudaError> {
        let in_place = self.ep.is_some() && self.path == Path::InPlace;
        let reduce = Reduce {
            rows: self.scenario.shape.tokens_max,
            weights: &self.weights,
            in_place: in_place.then_some(&self.results),
            shared: Some(&self.shared),
            out: &self.out,
        };
        self.exchange.reduce(stream, &reduce)
    }

    /// Fails unless the round that ended gave exactly what it must.
    pub(crate) fn verify(&self, inputs: &[Input], what: &str) {
        self.exchange.status().unwrap_or_else(|why| panic!("{what}, rank {}: {why}", self.id));
        if let Some(ep) = self.ep {
            self.verify_layout(&Layout::new(&self.scenario, inputs, ep), inputs, what);
        }
        let Some(input) = self.dp.map(|dp| &inputs[dp]) else { return };
        let hidden = self.scenario.shape.hidden;
        let got = bits(&self.out.download(&self.stream).unwrap());
        let want = bits(&input.reduced(&self.scenario));
        for token in 0..self.scenario.shape.tokens_max {
            let row = |all: &[u16]| all.get(token * hidden..(token + 1) * hidden).map(<[u16]>::to_vec);
            let want = row(&want).unwrap_or_else(|| vec![0; hidden]);
            assert_eq!(
                row(&got).unwrap(),
                want,
                "{what}, rank {}: token {token} of {}",
                self.id,
                input.tokens
            );
        }
    }

    fn verify_layout(&self, layout: &Layout, inputs: &[Input], what: &str) {
        let (shape, stream, permuted) = (&self.scenario.shape, &self.stream, self.exchange.permuted());
        let what = format!("{what}, rank {}", self.id);
        assert_eq!(permuted.segment_start.download(stream).unwrap(), layout.start, "{what}");
        assert_eq!(permuted.segment_rows.download(stream).unwrap(), layout.rows, "{what}");
        let source = permuted.source.download(stream).unwrap();
        let (rows, scales) = match &permuted.rows {
            Rows::Fp8 { codes, scales } => {
                (codes.download(stream).unwrap(), scales.download(stream).unwrap())
            }
            Rows::Bf16(rows) => (rows.cast::<u8>().download(stream).unwrap(), Vec::new()),
        };
        let bytes = inputs[0].rows.len() / shape.tokens_max;
        for (row, at) in layout.source.iter().enumerate() {
            let Some((dp, token, choice)) = *at else { continue };
            let packed = token as u64 | (dp as u64) << 32 | (choice as u64) << 48;
            assert_eq!(source[row], packed, "{what}: row {row} of {dp} {token} {choice}");
            let want = &inputs[dp].rows[token * bytes..][..bytes];
            assert_eq!(&rows[row * bytes..][..bytes], want, "{what}: row {row} of {dp} {token}");
            let of = |all: &[f32], stride: usize, at: usize| -> Vec<u32> {
                all.chunks(stride).map(|block| block[at].to_bits()).collect()
            };
            let want = of(&inputs[dp].scales, shape.tokens_max, token);
            assert_eq!(of(&scales, shape.rows_max, row), want, "{what}: scales of row {row}");
        }
    }
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// All ranks of a group in this process.
pub(crate) struct World {
    pub(crate) ranks: Vec<Rank>,
}

impl World {
    pub(crate) fn new(device: &Device, scenario: &Scenario, timeout: Duration) -> Self {
        let mut ids: Vec<u32> = scenario.dp.iter().chain(&scenario.ep).copied().collect();
        ids.sort_unstable();
        ids.dedup();
        let transport = if ids.len() == 1 { Transport::Local } else { Transport::Peer };
        let rank = |id: u32| Rank::new(device, scenario, id, transport);
        let mut world = Self { ranks: ids.into_iter().map(rank).collect() };
        let members: Vec<Member> = world.ranks.iter().map(Rank::member).collect();
        world.ranks.iter_mut().for_each(|rank| rank.connect(&members, 1, timeout));
        world
    }

    /// Runs one round on all ranks and checks it.
    pub(crate) fn round(&self, inputs: &[Input], what: &str) {
        self.ranks.iter().for_each(|rank| rank.load(inputs));
        self.ranks.iter().for_each(|rank| rank.round(&rank.stream).unwrap());
        self.synchronize();
        self.ranks.iter().for_each(|rank| rank.verify(inputs, what));
    }

    pub(crate) fn synchronize(&self) {
        self.ranks.iter().for_each(|rank| rank.stream.synchronize().unwrap());
    }
}

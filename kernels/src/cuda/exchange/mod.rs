//! Dispatch and combine of MoE tokens between devices: one [`Exchange`] per rank and stream of rounds.
//!
//! It moves rows and never computes experts. A round is one MoE layer, and every rank queues the same rounds, whatever
//! its number of tokens: DP ranks [`Exchange::signal`] once rows and routing are in their heap, EP ranks
//! [`Exchange::layout`] and [`Exchange::gather`], compute, and [`Exchange::combine`]; DP ranks [`Exchange::reduce`] last.
//! By NCCL, all ranks also [`Exchange::carry_rows`] and [`Exchange::carry_results`] in between.
//! Nothing in a round needs the host, so rounds can be recorded; recordings survive changes of the membership. The
//! protocol and why its buffers never race is told in `cu/exchange.cuh`; `engine::ep` is its CPU spec.

mod members;
mod mirror;
mod params;
mod rounds;
mod shape;

use std::sync::Arc;

use half::bf16;

pub use members::{AbortHandle, ExchangeFailure, Member, Membership, Phase};
pub use params::source;
pub use shape::{ExchangeShape, RANKS_MAX, Roles, RowFormat, SEGMENT_ALIGN, SLOTS_MAX, Transport};

use super::heap::{Heap, HeapHandle, PeerHeap};
use super::nccl::Nccl;
use super::{Buffer, CudaError, Device, Stream};
use members::{ContextWords, Control};
use params::Kernels;
use shape::Geometry;

/// Bytes of `Context`, `State` and `Plan` in `exchange.cuh`.
const CONTEXT_WORDS: usize = 9 + 2 * RANKS_MAX + RANKS_MAX;
const STATE_WORDS: usize = 3;
const PLAN_WORDS: usize = 2 * (RANKS_MAX + 1) + 1;

/// Rows and how they are kept.
#[derive(Clone, Debug)]
pub enum Rows {
    /// FP8.
    Fp8 {
        /// E4M3, `[rows][hidden]`.
        codes: Buffer<u8>,
        /// `[ceil(hidden / 128)][capacity]`, the capacity in rows.
        scales: Buffer<f32>,
    },
    /// `[rows][hidden]`.
    Bf16(Buffer<bf16>),
}

/// What a DP rank fills before it signals. It lies in the rank's heap, where its peers read it.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Rows of the tokens, capacity `tokens_max`.
    pub rows: Rows,
    /// Physical slot of each choice, `[tokens_max][top_k]`; `u32::MAX`: no choice, it adds nothing.
    pub slots: Buffer<u32>,
}

/// What an EP rank computes on: rows sorted by (local slot, DP rank, token, choice).
#[derive(Clone, Debug)]
pub struct Permuted {
    /// Capacity `rows_max`; garbage between segments.
    pub rows: Rows,
    /// First row of each slot, a multiple of 128, and the end of the last: `[slots_max + 1]`.
    pub segment_start: Buffer<u32>,
    /// Real rows of each slot, `[slots_max]`.
    pub segment_rows: Buffer<u32>,
    /// Where each row is from, `[rows_max]`: token, DP index << 32, choice << 48. Stale between segments.
    pub source: Buffer<u64>,
    /// Where each row's result belongs (bf16 `[hidden]`), `[rows_max]`. Stale between segments: nothing may be written there.
    pub destination: Buffer<u64>,
    place: Buffer<u32>,
    own_place: Buffer<u32>,
    push: Buffer<u64>,
    plan: Buffer<u32>,
}

/// What happens to results for the rank that computed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnResults {
    /// They stay, and [`Reduce::in_place`] reads them there.
    InPlace,
    /// They are pushed like all others.
    Pushed,
}

/// Arguments of [`Exchange::reduce`].
#[derive(Clone, Copy, Debug)]
pub struct Reduce<'a> {
    /// Rows to write: the tokens of the step, then zeros. At most `tokens_max`.
    pub rows: usize,
    /// Weights of the choices, `[rows][top_k]`.
    pub weights: &'a Buffer<f32>,
    /// The results given to [`Exchange::combine`] with [`OwnResults::InPlace`].
    pub in_place: Option<&'a Buffer<bf16>>,
    /// Added last, `[rows][hidden]`.
    pub shared: Option<&'a Buffer<bf16>>,
    /// `[rows][hidden]`.
    pub out: &'a Buffer<bf16>,
}

/// One rank's end of the exchange.
#[derive(Debug)]
pub struct Exchange {
    device: Device,
    shape: ExchangeShape,
    transport: Transport,
    geometry: Geometry,
    heap: Heap,
    outgoing: Option<Outgoing>,
    permuted: Option<Permuted>,
    context: Buffer<u64>,
    state: Buffer<u64>,
    control: Arc<Control>,
    kernels: Kernels,
    peers: Vec<PeerHeap>,
    /// By NCCL, on an EP rank: `[dp_max][mirror_bytes]`.
    mirrors: Option<Buffer<u8>>,
    nccl: Option<Nccl>,
    membership: Option<Membership>,
}

impl Exchange {
    /// Allocates all that rounds need; nothing works before [`Exchange::connect`].
    ///
    /// # Errors
    /// The device is full.
    ///
    /// # Panics
    /// If the shape is none that the kernels take.
    pub fn new(
        device: &Device,
        shape: ExchangeShape,
        transport: Transport,
        roles: Roles,
    ) -> Result<Self, CudaError> {
        shape.assert_valid();
        let geometry = shape.geometry(transport);
        let heap = Heap::new(device, shape.heap_bytes(transport, roles.tokens))?;
        let mirrored = transport == Transport::Nccl && roles.experts;
        let mirrors = mirrored.then(|| device.alloc(shape.dp_max * shape.mirror_bytes())).transpose()?;
        Ok(Self {
            outgoing: roles.tokens.then(|| outgoing(&shape, &geometry, heap.memory())),
            permuted: roles.experts.then(|| Permuted::new(device, &shape)).transpose()?,
            context: device.alloc(CONTEXT_WORDS)?,
            state: device.alloc(STATE_WORDS)?,
            control: Arc::new(Control::new(device)?),
            kernels: Kernels::load(device)?,
            device: device.clone(),
            peers: Vec::new(),
            mirrors,
            nccl: None,
            membership: None,
            shape,
            transport,
            geometry,
            heap,
        })
    }

    /// Its sizes.
    pub fn shape(&self) -> &ExchangeShape {
        &self.shape
    }

    /// How it reaches peers.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// This rank's heap, for peers to open.
    pub fn handle(&self) -> HeapHandle {
        self.heap.handle()
    }

    /// What to fill before [`Exchange::signal`].
    ///
    /// # Panics
    /// On a rank without tokens.
    pub fn outgoing(&self) -> &Outgoing {
        self.outgoing.as_ref().expect("only a rank with tokens sends rows")
    }

    /// What experts compute on after [`Exchange::gather`].
    ///
    /// # Panics
    /// On a rank without experts.
    pub fn permuted(&self) -> &Permuted {
        self.permuted.as_ref().expect("only a rank with experts gets rows")
    }

    /// Ends waits from another thread.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::clone(&self.control))
    }

    /// How the rounds went that have ended. To be asked after a step, when its stream is idle.
    ///
    /// # Errors
    /// What ended them early, first cause first.
    pub fn status(&self) -> Result<(), ExchangeFailure> {
        self.control.status()
    }

    /// Takes part in a group from now on, with rounds counted anew under its epoch. `stream` and whatever else runs
    /// rounds of this exchange must be idle. So must be the streams of all ranks of the epoch before, or their
    /// processes ended, before any rank begins a round of the new one: what a straggler pushed late could overwrite
    /// results.
    ///
    /// # Errors
    /// A peer's heap cannot be opened.
    ///
    /// # Panics
    /// If the membership does not fit the shape or the epoch does not grow.
    pub fn connect(&mut self, stream: &Stream, membership: Membership) -> Result<(), CudaError> {
        self.assert_fits(&membership);
        let (dp, ep) = self.heaps(&membership)?;
        let alone = membership.ranks() == [membership.rank];
        let context = ContextWords {
            control: &self.control,
            membership: &membership,
            dp,
            ep,
            own: self.heap.memory().address(),
            // A rank alone waits for nobody: its kernels follow each other.
            flags: self.transport == Transport::Peer && !alone,
        };
        self.context.write(stream, &context.words())?;
        self.control.carried_by(membership.epoch, self.nccl.clone());
        self.membership = Some(membership);
        self.restart(stream)
    }

    /// Lets go of the peers' heaps and of what carries rows. No round may run before the next [`Exchange::connect`], and
    /// none may be under way.
    pub fn disconnect(&mut self) {
        self.peers.clear();
        self.nccl = None;
        self.control.carried_by(0, None);
    }

    /// Counts rounds anew under `epoch` and forgets a failure; the members stay. As [`Exchange::connect`], on all ranks.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If it was never connected, or the epoch does not grow.
    pub fn reset(&mut self, stream: &Stream, epoch: u64) -> Result<(), CudaError> {
        let before = self.membership.as_ref().expect("connected");
        let membership = Membership { epoch, ..before.clone() };
        self.connect(stream, membership)
    }

    /// Where the kernels find the heaps of DP and EP ranks.
    fn heaps(&mut self, membership: &Membership) -> Result<(Vec<u64>, Vec<u64>), CudaError> {
        let Membership { dp, ep, .. } = membership;
        if self.transport == Transport::Nccl {
            return Ok(((0..dp.len()).map(|index| self.mirror(index)).collect(), vec![0; ep.len()]));
        }
        let members = || dp.iter().chain(ep).flatten();
        self.peers.retain(|peer| members().any(|member| member.heap == peer.handle()));
        let bytes = |tokens| self.shape.heap_bytes(self.transport, tokens);
        let (dp_bytes, ep_bytes) = (bytes(true), bytes(false));
        let dp = open_all(&self.device, &mut self.peers, dp, dp_bytes)?;
        Ok((dp, open_all(&self.device, &mut self.peers, ep, ep_bytes)?))
    }

    fn restart(&self, stream: &Stream) -> Result<(), CudaError> {
        let round = self.membership.as_ref().expect("connected").epoch << 32;
        self.state.write(stream, &[round, round, 0])?;
        self.control.clear();
        Ok(())
    }

    fn assert_fits(&self, membership: &Membership) {
        let Membership { epoch, dp, ep, slots, .. } = membership;
        assert!(
            dp.len() <= self.shape.dp_max && ep.len() <= self.shape.ep_max,
            "{} DP, {} EP",
            dp.len(),
            ep.len()
        );
        assert!((1..=self.shape.slots_max).contains(slots), "{slots} slots");
        assert!(*epoch < 1 << 32, "epoch {epoch}");
        assert!(
            self.membership.as_ref().is_none_or(|before| before.epoch < *epoch),
            "epoch {epoch} is not new"
        );
        let has = |members: &[Option<Member>]| {
            members.iter().flatten().any(|member| member.rank == membership.rank)
        };
        assert!(!has(dp) || self.outgoing.is_some(), "a DP rank was built without tokens");
        assert!(!has(ep) || self.permuted.is_some(), "an EP rank was built without experts");
        let ranks = dp.iter().chain(ep).flatten().map(|member| member.rank);
        assert!(ranks.into_iter().all(|rank| (rank as usize) < RANKS_MAX), "rank ids are below {RANKS_MAX}");
    }
}

fn outgoing(shape: &ExchangeShape, geometry: &Geometry, heap: &Buffer<u8>) -> Outgoing {
    let part = |at: u64, bytes: usize| heap.slice(at as usize..at as usize + bytes);
    let rows = part(geometry.rows_at, shape.tokens_max * shape.row_bytes());
    let rows = match shape.format {
        RowFormat::Fp8 => {
            let scales = part(geometry.scales_at, shape.tokens_max * shape.scale_blocks() * 4);
            Rows::Fp8 { codes: rows, scales: scales.cast() }
        }
        RowFormat::Bf16 => Rows::Bf16(rows.cast()),
    };
    Outgoing { rows, slots: part(geometry.slots_at, shape.tokens_max * shape.top_k * 4).cast() }
}

/// Addresses of the members' heaps, each opened once.
fn open_all(
    device: &Device,
    peers: &mut Vec<PeerHeap>,
    members: &[Option<Member>],
    bytes: usize,
) -> Result<Vec<u64>, CudaError> {
    let mut open = |member: Member| {
        if let Some(peer) = peers.iter().find(|peer| peer.handle() == member.heap) {
            return Ok(peer.address());
        }
        let peer = PeerHeap::open(device, member.heap, bytes)?;
        let address = peer.address();
        peers.push(peer);
        Ok(address)
    };
    members.iter().map(|member| member.map_or(Ok(0), &mut open)).collect()
}

impl Permuted {
    fn new(device: &Device, shape: &ExchangeShape) -> Result<Self, CudaError> {
        let rows = match shape.format {
            RowFormat::Fp8 => Rows::Fp8 {
                codes: device.alloc(shape.rows_max * shape.hidden)?,
                scales: device.alloc(shape.rows_max * shape.scale_blocks())?,
            },
            RowFormat::Bf16 => Rows::Bf16(device.alloc(shape.rows_max * shape.hidden)?),
        };
        Ok(Self {
            rows,
            segment_start: device.alloc(shape.slots_max + 1)?,
            segment_rows: device.alloc(shape.slots_max)?,
            source: device.alloc(shape.rows_max)?,
            destination: device.alloc(shape.rows_max)?,
            place: device.alloc(shape.dp_max * shape.tokens_max * shape.top_k)?,
            own_place: device.alloc(shape.tokens_max * shape.top_k)?,
            push: device.alloc(shape.rows_max * 2)?,
            plan: device.alloc(PLAN_WORDS)?,
        })
    }
}

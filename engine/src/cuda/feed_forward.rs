//! Dense and mixture-of-experts layers, queued.

use heliostat_kernels::cuda::activation::{ActivationArgs, RowSet};
use heliostat_kernels::cuda::exchange::{OwnResults, Reduce};
use heliostat_kernels::cuda::gemm::{Output, Segments};
use heliostat_kernels::cuda::router::RoutingArgs;
use heliostat_kernels::cuda::{Buffer, CudaError, Event, StoredAs, Stream};

use super::buffers::{dense, operand_of};
use super::layer::{FeedForward, Mlp, MoeWeights};
use super::model::{CudaModel, Dp, Ep, StepShape};

impl FeedForward {
    /// What the first products read.
    pub(super) fn inputs(&self, experts: StoredAs) -> Vec<StoredAs> {
        match self {
            Self::Dense(mlp) => vec![mlp.gate_up.stored()],
            Self::Moe(moe) => {
                let shared = moe.shared.as_ref().map(|shared| shared.gate_up.stored());
                [moe.router.stored(), experts].into_iter().chain(shared).collect()
            }
        }
    }
}

impl CudaModel {
    /// One MoE layer of all ranks; on a DP rank `branch = experts(normed)` for its rows.
    pub(super) fn moe(
        &self,
        stream: &Stream,
        moe_layer: usize,
        own: Option<(&Dp, &MoeWeights)>,
        StepShape { rows, carried, .. }: StepShape,
    ) -> Result<(), CudaError> {
        let shared = match own {
            Some((dp, MoeWeights { shared: Some(shared), .. })) => {
                Some((&dp.buffers.shared, dp.beside(stream, shared, rows)?))
            }
            Some((_, MoeWeights { shared: None, .. })) | None => None,
        };
        if let Some((dp, weights)) = own {
            stream.label("router");
            self.route(stream, (dp, weights), rows)?;
            self.exchange.signal(stream, dp.inputs.count())?;
        }
        stream.label("dispatch");
        self.exchange.carry_rows(stream, carried)?;
        let stay = if own.is_some() { OwnResults::InPlace } else { OwnResults::Pushed };
        let in_place = match &self.ep {
            Some(ep) => {
                self.experts(stream, ep, moe_layer, rows)?;
                stream.label("combine");
                match &ep.results {
                    Some(results) => self.exchange.combine(stream, results, stay)?,
                    // The experts have pushed them already.
                    None => self.exchange.finish(stream)?,
                }
                ep.results.as_ref()
            }
            None => {
                self.exchange.finish(stream)?;
                None
            }
        };
        self.exchange.carry_results(stream, carried, stay)?;
        match own {
            Some((dp, _)) => {
                stream.label("reduce");
                if let Some((_, Some(done))) = &shared {
                    stream.wait(done)?;
                }
                let shared = shared.map(|(rows, _)| rows);
                let (weights, out) = (&dp.buffers.weights, &dp.buffers.branch);
                self.exchange.reduce(stream, &Reduce { rows, weights, in_place, shared, out })
            }
            None => Ok(()),
        }
    }

    fn route(
        &self,
        stream: &Stream,
        (dp, weights): (&Dp, &MoeWeights),
        rows: usize,
    ) -> Result<(), CudaError> {
        let (ops, buffers, router) = (&dp.ops, &dp.buffers, &weights.router);
        let experts = router.n();
        let x = dp.moe_input.operand(router.stored(), router.k());
        let logits = Output::F32 { data: &buffers.router_logits, stride: experts };
        ops.gemm.dense(stream, router, x, rows, logits)?;
        ops.routing.run(
            stream,
            &RoutingArgs {
                rows,
                rule: dp.rule,
                logits: &buffers.router_logits,
                positions: dp.inputs.positions(),
                bias: weights.correction_bias.as_ref(),
                slot_table: Some(&self.tables.slots[weights.moe_layer]),
                salt: 0,
                ids: &buffers.ids,
                slots: &self.exchange.outgoing().slots,
                weights: &buffers.weights,
                loads: Some(&dp.loads[weights.moe_layer]),
            },
        )
    }

    /// Runs the local experts over the rows that all ranks sent them.
    fn experts(&self, stream: &Stream, ep: &Ep, moe_layer: usize, rows: usize) -> Result<(), CudaError> {
        self.exchange.layout(stream)?;
        self.exchange.gather(stream)?;
        let permuted = self.exchange.permuted();
        let (hidden, width) = (ep.gate_up.k(), ep.down.k());
        let rows_max = self.exchange.shape().rows_max;
        let slots = permuted.segment_rows.len();
        let segments = Segments {
            start: &permuted.segment_start,
            rows: &permuted.segment_rows,
            pool_of_slot: &self.tables.places[moe_layer],
            rows_max,
            // What others bring is known on the device only; a rank without tokens guesses a decode step.
            rows_typical: (rows.max(1) * self.exchange.shape().top_k).div_ceil(slots),
        };
        let x = operand_of(&permuted.rows, hidden, rows_max);
        let gate_up = Output::Bf16 { data: &ep.gate_up_out, stride: 2 * width };
        stream.label("experts gate_up");
        ep.gemm.grouped(stream, &ep.gate_up, x, segments, gate_up)?;
        let stored = ep.down.stored();
        stream.label("experts silu");
        ep.activation.silu_mul(
            stream,
            &ActivationArgs {
                rows: RowSet::Segments {
                    start: &permuted.segment_start,
                    rows: &permuted.segment_rows,
                    capacity: rows_max,
                },
                width,
                x: dense(&ep.gate_up_out, 2 * width),
                out: ep.inner.out(&[stored]),
            },
        )?;
        let out = match &ep.results {
            Some(results) => Output::Bf16 { data: results, stride: hidden },
            None => Output::Scattered { addresses: &permuted.destination },
        };
        stream.label("experts down");
        ep.gemm.grouped(stream, &ep.down, ep.inner.operand(stored, width), segments, out)
    }
}

impl Dp {
    /// Queues the shared experts beside routing and dispatch, which are short and wait much. Kernels that are timed one by
    /// one run in order instead. Returns where they end, if not in order.
    fn beside(&self, stream: &Stream, shared: &Mlp, rows: usize) -> Result<Option<Event>, CudaError> {
        stream.label("shared expert");
        if stream.is_profiling() || rows == 0 {
            self.mlp(stream, shared, &self.buffers.shared, rows)?;
            return Ok(None);
        }
        self.side.wait(&stream.record()?)?;
        self.mlp(&self.side, shared, &self.buffers.shared, rows)?;
        self.side.record().map(Some)
    }

    /// `out = down(silu(gate x) * up x)` of the normed rows.
    pub(super) fn mlp(
        &self,
        stream: &Stream,
        mlp: &Mlp,
        out: &Buffer<half::bf16>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (ops, buffers) = (&self.ops, &self.buffers);
        let Mlp { gate_up, down, width } = mlp;
        let x = self.moe_input.operand(gate_up.stored(), gate_up.k());
        let both = Output::Bf16 { data: &buffers.wide, stride: 2 * width };
        ops.gemm.dense(stream, gate_up, x, rows, both)?;
        let stored = down.stored();
        let args = ActivationArgs {
            rows: RowSet::First(rows),
            width: *width,
            x: dense(&buffers.wide, 2 * width),
            out: buffers.inner.out(&[stored]),
        };
        ops.activation.silu_mul(stream, &args)?;
        let out = Output::Bf16 { data: out, stride: self.config.hidden_size };
        ops.gemm.dense(stream, down, buffers.inner.operand(stored, *width), rows, out)
    }
}

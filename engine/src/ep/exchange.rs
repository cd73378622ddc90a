//! Dispatch and combine: how tokens reach the experts of other ranks and come back.
//!
//! Per MoE layer every DP rank sends one dispatch frame to every EP rank (empty ones too, so nobody has to guess) and
//! gets one combine frame back. A row travels once per EP rank, with the list of local slots that want it. EP ranks
//! return one row per (token, choice), unweighted, and the DP rank sums them in the order of the choices: so neither
//! placement nor batch changes a bit of the result.
//!
//! Dispatch frame: `rows: u32, entries: u32`, then `entries` pairs `(row: u32, slot: u32)`, then `rows` rows of
//! `hidden` f32. Combine frame: `entries` rows of `hidden` f32 in the order of the entries. Little-endian.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::fabric::{Fabric, FabricError, Kind, Tag};

use super::{ExpertWeights, Role, SharedSlots, Topology};
use crate::eplb::map::Layout;
use crate::model::{ExchangeError, ExpertScratch, Experts, Routed};

/// One rank's end of the group during one membership epoch.
#[derive(Debug)]
pub struct EpGroup {
    fabric: Fabric,
    topology: Topology,
    role: Role,
    cpu: Cpu,
    layout: Layout,
    slots: SharedSlots,
    hidden: usize,
    step: u64,
    /// Tokens routed by this DP rank, `[moe layer][logical expert]`, since they were last taken.
    loads: Vec<Vec<u32>>,
    outbox: Vec<Outbox>,
    places: Vec<(usize, usize)>,
    combined: Vec<Vec<f32>>,
    served: Served,
}

/// A dispatch frame in the making.
#[derive(Debug, Default)]
struct Outbox {
    head: Vec<u32>,
    rows: Vec<u32>,
    payload: Vec<f32>,
}

/// Buffers of the serving half.
#[derive(Debug, Default)]
struct Served {
    inbox: Vec<Inbox>,
    by_slot: Vec<Vec<(u32, u32, u32)>>,
    input: Vec<f32>,
    output: Vec<f32>,
    scratch: ExpertScratch,
}

/// A dispatch frame that arrived, and the combine frame that answers it.
#[derive(Debug, Default)]
struct Inbox {
    entries: Vec<u32>,
    rows: Vec<f32>,
    reply: Vec<f32>,
}

/// What a rank's end of the group is made of.
#[derive(Debug)]
pub struct EpParts {
    /// Links to all ranks.
    pub fabric: Fabric,
    /// Shape of the group.
    pub topology: Topology,
    /// This rank.
    pub rank: usize,
    /// Where it computes.
    pub cpu: Cpu,
    /// The layout that all ranks agreed on.
    pub layout: Layout,
    /// This rank's expert weights; unused on a rank without experts.
    pub slots: SharedSlots,
    /// Width of a row.
    pub hidden: usize,
}

impl EpGroup {
    /// Joins; the fabric is connected.
    pub fn new(parts: EpParts) -> Self {
        let EpParts { fabric, topology, rank, cpu, layout, slots, hidden } = parts;
        let experts = layout.shape().experts as usize;
        let outbox = std::iter::repeat_with(Outbox::default).take(topology.ep).collect();
        let inbox = std::iter::repeat_with(Inbox::default).take(topology.dp).collect();
        let by_slot = vec![Vec::new(); layout.shape().slots_per_rank() as usize];
        Self {
            role: topology.role(rank),
            loads: vec![vec![0; experts]; layout.layers().len()],
            combined: vec![Vec::new(); topology.ep],
            served: Served { inbox, by_slot, ..Served::default() },
            fabric,
            topology,
            cpu,
            layout,
            slots,
            hidden,
            step: 0,
            outbox,
            places: Vec::new(),
        }
    }

    /// Links to the other ranks.
    pub fn fabric(&mut self) -> &mut Fabric {
        &mut self.fabric
    }

    /// Takes another layout of the same shape, between two steps; the slots hold its weights already.
    pub fn set_layout(&mut self, layout: Layout) {
        self.layout = layout;
    }

    /// MoE layers of the model.
    pub fn moe_layers(&self) -> usize {
        self.layout.layers().len()
    }

    /// Names the step that the next exchanges belong to.
    pub fn begin_step(&mut self, step: u64) {
        self.step = step;
    }

    /// Tells all ranks two numbers, once a step, and returns the largest of each.
    ///
    /// # Errors
    /// A peer was lost, or sent something else.
    pub fn largest(&mut self, numbers: [u32; 2]) -> Result<[u32; 2], ExchangeError> {
        // A group that asks this sends no rows here. Among headers the next step's would come first.
        let tag = Tag { kind: Kind::Dispatch, step: self.step, layer: 0 };
        for rank in 0..self.topology.size() {
            self.fabric.send(rank, tag, &numbers.map(u32::to_le_bytes).each_ref().map(|bytes| &bytes[..]))?;
        }
        (0..self.topology.size()).try_fold([0, 0], |[a, b], rank| {
            let frame = self.fabric.recv(rank, tag)?;
            let [first, second] = words(frame.payload())
                .ok_or_else(|| ExchangeError::Other(format!("rank {rank} sent no two numbers")))?;
            Ok([a.max(first), b.max(second)])
        })
    }

    /// Adds the tokens routed by this DP rank since the last call to `sums`, `[moe layer][logical expert]`; an empty
    /// one is given its shape.
    pub fn drain_loads(&mut self, sums: &mut Vec<Vec<u32>>) {
        if sums.is_empty() {
            sums.resize(self.loads.len(), vec![0; self.layout.shape().experts as usize]);
        }
        for (sum, count) in sums.iter_mut().flatten().zip(self.loads.iter_mut().flatten()) {
            *sum = sum.saturating_add(std::mem::take(count));
        }
    }

    /// Serves one MoE layer on a rank without attention.
    pub fn serve(&mut self, moe_layer: usize) -> Result<(), ExchangeError> {
        self.receive_dispatch(moe_layer)?;
        self.compute(moe_layer)?;
        self.send_combine(moe_layer)
    }

    /// Sends each EP rank the rows that its experts must see.
    fn dispatch(&mut self, moe_layer: usize, hidden: &[f32], ids: &[u32]) -> Result<(), ExchangeError> {
        let tokens = hidden.len() / self.hidden;
        let top_k = ids.len().checked_div(tokens).unwrap_or(0);
        for outbox in &mut self.outbox {
            outbox.head.clear();
            outbox.head.extend([0, 0]);
            outbox.rows.clear();
            outbox.payload.clear();
        }
        self.places.clear();
        let map = self.layout.layer(moe_layer);
        for (token, choices) in ids.chunks_exact(top_k.max(1)).enumerate() {
            for &expert in choices {
                let slot = map.slot_for(expert, token as u64);
                let ep = map.rank_of(slot) as usize;
                let outbox = &mut self.outbox[ep];
                if outbox.rows.last() != Some(&(token as u32)) {
                    outbox.rows.push(token as u32);
                    outbox.payload.extend_from_slice(&hidden[token * self.hidden..][..self.hidden]);
                }
                self.places.push((ep, (outbox.head.len() - 2) / 2));
                outbox.head.extend([outbox.rows.len() as u32 - 1, slot]);
                self.loads[moe_layer][expert as usize] += 1;
            }
        }
        let tag = Tag { kind: Kind::Dispatch, step: self.step, layer: moe_layer as u32 };
        for (ep, outbox) in self.outbox.iter_mut().enumerate() {
            outbox.head[0] = outbox.rows.len() as u32;
            outbox.head[1] = (outbox.head.len() as u32 - 2) / 2;
            let parts = [bytemuck::cast_slice(&outbox.head), bytemuck::cast_slice(&outbox.payload)];
            self.fabric.send(self.topology.rank_of_ep(ep), tag, &parts)?;
        }
        Ok(())
    }

    fn receive_dispatch(&mut self, moe_layer: usize) -> Result<(), ExchangeError> {
        let tag = Tag { kind: Kind::Dispatch, step: self.step, layer: moe_layer as u32 };
        for (dp, inbox) in self.served.inbox.iter_mut().enumerate() {
            let from = self.topology.rank_of_dp(dp);
            let frame = self.fabric.recv(from, tag)?;
            inbox.read(frame.payload(), self.hidden).map_err(|why| {
                ExchangeError::Other(format!("rank {from} sent a bad dispatch frame for {tag:?}: {why}"))
            })?;
        }
        Ok(())
    }

    /// Runs every local expert that was asked for over all its rows at once.
    fn compute(&mut self, moe_layer: usize) -> Result<(), ExchangeError> {
        let hidden = self.hidden;
        let Served { inbox, by_slot, input, output, scratch } = &mut self.served;
        let first = self.role.ep.unwrap_or(0) * by_slot.len();
        by_slot.iter_mut().for_each(Vec::clear);
        for (dp, inbox) in inbox.iter_mut().enumerate() {
            inbox.reply.clear();
            inbox.reply.resize(inbox.entries.len() / 2 * hidden, 0.0);
            for (entry, pair) in inbox.entries.chunks_exact(2).enumerate() {
                let local = (pair[1] as usize).wrapping_sub(first);
                let rows = by_slot.get_mut(local).ok_or_else(|| {
                    ExchangeError::Other(format!("DP rank {dp} asked slot {} of another rank", pair[1]))
                })?;
                rows.push((dp as u32, pair[0], entry as u32));
            }
        }
        let slots = self.slots.read();
        for (slot, wanted) in by_slot.iter().enumerate().filter(|(_, wanted)| !wanted.is_empty()) {
            let content = slots.get(moe_layer, slot).map_err(|why| ExchangeError::Other(why.to_string()))?;
            input.clear();
            for &(dp, row, _) in wanted {
                input.extend_from_slice(&inbox[dp as usize].rows[row as usize * hidden..][..hidden]);
            }
            output.clear();
            output.resize(input.len(), 0.0);
            let ExpertWeights::Host(expert) = &content.weights else {
                return Err(ExchangeError::Other("experts of a GPU were asked for on the CPU".to_owned()));
            };
            expert.forward_with(&self.cpu, input, scratch, output);
            for (&(dp, _, entry), row) in wanted.iter().zip(output.chunks_exact(hidden)) {
                inbox[dp as usize].reply[entry as usize * hidden..][..hidden].copy_from_slice(row);
            }
        }
        Ok(())
    }

    fn send_combine(&mut self, moe_layer: usize) -> Result<(), ExchangeError> {
        let tag = Tag { kind: Kind::Combine, step: self.step, layer: moe_layer as u32 };
        for (dp, inbox) in self.served.inbox.iter().enumerate() {
            self.fabric.send(self.topology.rank_of_dp(dp), tag, &[bytemuck::cast_slice(&inbox.reply)])?;
        }
        Ok(())
    }

    /// Receives the experts' rows and sums each token's in the order of its choices.
    fn combine(&mut self, moe_layer: usize, weights: &[f32], out: &mut [f32]) -> Result<(), ExchangeError> {
        let tag = Tag { kind: Kind::Combine, step: self.step, layer: moe_layer as u32 };
        for (ep, rows) in self.combined.iter_mut().enumerate() {
            let from = self.topology.rank_of_ep(ep);
            let frame = self.fabric.recv(from, tag)?;
            let wanted = (self.outbox[ep].head.len() - 2) / 2 * self.hidden * size_of::<f32>();
            if frame.payload().len() != wanted {
                let got = frame.payload().len();
                return Err(ExchangeError::Other(format!(
                    "rank {from} sent {got} bytes for {tag:?}, not {wanted}"
                )));
            }
            copy_f32(rows, frame.payload());
        }
        out.fill(0.0);
        let tokens = out.len() / self.hidden;
        let top_k = weights.len().checked_div(tokens).unwrap_or(0);
        let choices = self.places.iter().zip(weights);
        for (choice, (&(ep, entry), &weight)) in choices.enumerate() {
            let out = &mut out[choice / top_k * self.hidden..][..self.hidden];
            let row = &self.combined[ep][entry * self.hidden..][..self.hidden];
            self.cpu.scaled_add(out, weight, row);
        }
        Ok(())
    }
}

impl Experts for EpGroup {
    fn forward(
        &mut self,
        moe_layer: usize,
        hidden: &[f32],
        ids: &[u32],
        weights: &[f32],
        out: &mut [f32],
    ) -> Result<(), ExchangeError> {
        self.forward_during(moe_layer, Routed { hidden, ids, weights }, out, &mut || ())
    }

    fn forward_during(
        &mut self,
        moe_layer: usize,
        routed: Routed<'_>,
        out: &mut [f32],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), ExchangeError> {
        self.dispatch(moe_layer, routed.hidden, routed.ids)?;
        if self.role.ep.is_some() {
            self.serve(moe_layer)?;
        }
        meanwhile();
        self.combine(moe_layer, routed.weights, out)
    }
}

impl Inbox {
    /// Takes a dispatch frame apart, trusting none of its lengths.
    fn read(&mut self, payload: &[u8], hidden: usize) -> Result<(), &'static str> {
        let (head, rest) = payload.split_at_checked(8).ok_or("it is shorter than its head")?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (rows, entries) = (word(0) as usize, word(4) as usize);
        let (list, data) = rest.split_at_checked(entries * 8).ok_or("its entries are cut off")?;
        if data.len() != rows * hidden * size_of::<f32>() {
            return Err("its rows do not fill the rest");
        }
        self.entries.clear();
        self.entries.extend(list.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])));
        if self.entries.chunks_exact(2).any(|pair| pair[0] as usize >= rows) {
            return Err("an entry names a row that is not there");
        }
        copy_f32(&mut self.rows, data);
        Ok(())
    }
}

fn words(bytes: &[u8]) -> Option<[u32; 2]> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Some([word(0)?, word(4)?])
}

/// Copies bytes, which need no alignment, into floats.
fn copy_f32(to: &mut Vec<f32>, from: &[u8]) {
    to.clear();
    to.resize(from.len() / size_of::<f32>(), 0.0);
    bytemuck::cast_slice_mut(to).copy_from_slice(from);
}

impl From<FabricError> for ExchangeError {
    fn from(error: FabricError) -> Self {
        match error {
            FabricError::Aborted { .. } => Self::Aborted,
            FabricError::PeerLost { rank } => Self::PeerLost { rank: rank as u32 },
            FabricError::Timeout { rank: Some(rank), .. } => Self::Silent { rank: rank as u32 },
            other => Self::Other(other.to_string()),
        }
    }
}

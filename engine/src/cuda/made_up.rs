//! What measurements need of a rank without a checkpoint: made-up experts and KV blocks, and a map that folds all experts
//! onto a few slots.

use heliostat_kernels::cuda::CudaError;
use heliostat_kernels::cuda::synthetic::{Distribution, Synthetic};

use super::model::Kv;
use super::pool::PooledExpert;
use super::rank::CudaRank;
use super::source::WeightSource;

impl CudaRank {
    /// For measurements, with [`fold`](super::CudaOptions::fold): makes up experts and KV blocks, and folds the map.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// Without `fold`.
    pub fn make_up(&mut self, fold: usize) -> Result<(), CudaError> {
        assert_eq!(fold, self.local_slots, "the rank was loaded for another number of slots");
        let slots = fold * self.topology.ep;
        let stream = &self.stream;
        if let Some(ep) = &self.model.ep {
            let device = ep.gate_up.stack().data().device();
            let mut source = WeightSource::synthetic(device, stream, true)?;
            source.fill(ep.gate_up.stack())?;
            source.fill(ep.down.stack())?;
        }
        if let Some(dp) = &self.model.dp {
            let synthetic = Synthetic::new(dp.embedding.device())?;
            let what = |seed| Distribution { seed, mean: 0.0, deviation: 1.0 };
            for (layer, kv) in (0..).zip(&dp.kv) {
                match kv {
                    Kv::Latent(cache) => synthetic.bf16(stream, cache, what(layer))?,
                    Kv::KeysValues(keys, values) => {
                        synthetic.bf16(stream, keys, what(layer))?;
                        synthetic.bf16(stream, values, what(layer + 1000))?;
                    }
                }
            }
        }
        self.made_up.clear();
        for moe_layer in 0..self.model.config.moe_layers() {
            let taken = match &self.model.ep {
                Some(ep) => (0..fold).map(|_| ep.pool.take().expect("one place per slot")).collect(),
                None => Vec::new(),
            };
            self.made_up.push(taken);
            self.fold(moe_layer, slots)?;
        }
        self.stream.synchronize()
    }

    /// For measurements, after [`CudaRank::make_up`]: puts other weights into a slot, as a remap does.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn swap(&mut self, moe_layer: usize, slot: usize, weights: PooledExpert) -> Result<(), CudaError> {
        self.guard_weights()?;
        self.made_up[moe_layer][slot] = weights;
        self.fold(moe_layer, self.local_slots * self.topology.ep)
    }

    fn fold(&mut self, moe_layer: usize, slots: usize) -> Result<(), CudaError> {
        let places: Vec<u32> = self.made_up[moe_layer].iter().map(PooledExpert::place).collect();
        let experts = self.model.config.moe.num_experts;
        self.model.tables.fold(&self.stream, moe_layer, (experts, slots), &places)
    }
}

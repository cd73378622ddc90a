//! The least time that the chip needs for each part of a decode step: what bounds a kernel is either the bytes that it
//! must move or the operations that it must do. Exchange of rows between GPUs is taken to hide behind computing.
//!
//! Pure: from the model's shape and the load of one rank. The names of parts are those under which a step is profiled.

use heliostat_engine::config::{Attention, ModelConfig};

/// Bytes per second of device memory, as measured by a copy on an H200 (HBM3e).
pub const MEMORY_BYTES_PER_S: f64 = 4.3e12;
/// BF16 operations per second of a large matrix product on an H200, as measured.
pub const BF16_FLOP_PER_S: f64 = 790e12;
/// FP8: twice that.
pub const FP8_FLOP_PER_S: f64 = 1580e12;

/// What one rank has to do in a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Sequences, a token each.
    pub batch: usize,
    /// Positions that each of them attends to.
    pub context: usize,
    /// Expert slots of the rank, over which `batch * top_k` rows are spread.
    pub slots: usize,
}

/// How numbers are stored and multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Two bytes.
    Bf16,
    /// One byte; scales are not counted.
    Fp8,
}

impl Precision {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    fn flop_per_s(self) -> f64 {
        match self {
            Self::Bf16 => BF16_FLOP_PER_S,
            Self::Fp8 => FP8_FLOP_PER_S,
        }
    }
}

/// What one kernel must move and do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Bytes to and from device memory.
    pub bytes: f64,
    /// Operations on matrices.
    pub flop: f64,
    /// What those are done in.
    pub precision: Precision,
}

impl Cost {
    /// A kernel that only moves bytes.
    pub fn moving(bytes: usize) -> Self {
        Self { bytes: bytes as f64, flop: 0.0, precision: Precision::Bf16 }
    }

    /// The product of a shape.
    pub fn product(product: Product) -> Self {
        let Product { matrices, rows, n, k, precision, y_bytes } = product;
        let x_and_w = (matrices * n * k + rows * k) * precision.bytes();
        let bytes = (x_and_w + rows * n * y_bytes) as f64;
        Self { bytes, flop: 2.0 * (rows * n) as f64 * k as f64, precision }
    }

    /// Attention of `rows` tokens, each with `context` positions of its own in the cache; a head's query has `query`
    /// elements, its output `value`, and a position `cached`.
    pub fn attention(rows: usize, context: usize, heads: usize, widths: AttentionWidths) -> Self {
        let AttentionWidths { query, value, cached } = widths;
        let positions = (rows * context) as f64;
        let moved = 2.0 * (positions * cached as f64 + (rows * heads * (query + value)) as f64);
        let flop = positions * (2 * heads * (query + value)) as f64;
        Self { bytes: moved, flop, precision: Precision::Bf16 }
    }

    /// Microseconds at least.
    pub fn floor_us(&self) -> f64 {
        (self.bytes / MEMORY_BYTES_PER_S).max(self.flop / self.precision.flop_per_s()) * 1e6
    }
}

/// Elements per head of attention, and per position of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionWidths {
    /// Of a head's query.
    pub query: usize,
    /// Of a head's output.
    pub value: usize,
    /// Of a position, all heads.
    pub cached: usize,
}

/// `y[r][n] = sum_k x[r][k] w[n][k]` with `matrices` matrices w.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Matrices that are read whole.
    pub matrices: usize,
    /// Rows of x, each multiplied by one of them.
    pub rows: usize,
    /// Columns of y.
    pub n: usize,
    /// Columns of x.
    pub k: usize,
    /// Of x and w.
    pub precision: Precision,
    /// Bytes of an element of y.
    pub y_bytes: usize,
}

/// The floor of one part of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PartFloor {
    /// As profiled.
    pub part: &'static str,
    /// Layers that have it; 1 for what a step does once.
    pub layers: usize,
    /// Microseconds of it in one of these layers.
    pub us: f64,
}

/// Floors of all parts of a step, those of attention first.
pub fn floors(config: &ModelConfig, load: Load) -> Vec<PartFloor> {
    let step = Step { config, load, linear: linear(config) };
    let moe = config.moe_layers();
    let mut floors = Vec::new();
    let mut put = |layers: usize, parts: Vec<(&'static str, f64)>| {
        let parts = parts.into_iter().filter(|_| layers > 0);
        floors.extend(parts.map(|(part, us)| PartFloor { part, layers, us }));
    };
    put(config.num_layers, step.attention());
    put(moe, step.moe());
    put(config.num_layers - moe, step.dense());
    put(1, step.once());
    floors
}

/// Microseconds of a step at least: every part in all its layers.
pub fn step_us(floors: &[PartFloor]) -> f64 {
    floors.iter().map(|floor| floor.us * floor.layers as f64).sum()
}

fn linear(config: &ModelConfig) -> Precision {
    if config.fp8_blocks { Precision::Fp8 } else { Precision::Bf16 }
}

struct Step<'a> {
    config: &'a ModelConfig,
    load: Load,
    /// Of linear layers.
    linear: Precision,
}

impl Step<'_> {
    /// A linear layer on all rows.
    fn linear(&self, n: usize, k: usize) -> f64 {
        self.product(1, self.load.batch, (n, k))
    }

    fn product(&self, matrices: usize, rows: usize, (n, k): (usize, usize)) -> f64 {
        Cost::product(Product { matrices, rows, n, k, precision: self.linear, y_bytes: 2 }).floor_us()
    }

    /// One BF16 matrix per head.
    fn heads(&self, heads: usize, (n, k): (usize, usize)) -> f64 {
        let (matrices, rows) = (heads, self.load.batch * heads);
        Cost::product(Product { matrices, rows, n, k, precision: Precision::Bf16, y_bytes: 2 }).floor_us()
    }

    /// A BF16 product with f32 results: router and head.
    fn logits(&self, n: usize) -> f64 {
        let (rows, k) = (self.load.batch, self.config.hidden_size);
        Cost::product(Product { matrices: 1, rows, n, k, precision: Precision::Bf16, y_bytes: 4 }).floor_us()
    }

    /// `rows` rows of so many bytes moved.
    fn moving(rows: usize, bytes: usize) -> f64 {
        Cost::moving(rows * bytes).floor_us()
    }

    fn attention(&self) -> Vec<(&'static str, f64)> {
        let Load { batch, context, .. } = self.load;
        let (hidden, linear) = (self.config.hidden_size, self.linear.bytes());
        // Twice: f32 in and out, a BF16 branch in, the product's input out.
        let mut parts = vec![("norms", 2.0 * Self::moving(batch, hidden * (4 + 4 + 2 + linear)))];
        let quantised = if self.linear == Precision::Fp8 { 2 + 1 } else { 0 };
        match &self.config.attention {
            Attention::Mla(mla) => {
                let (heads, latent, rope) = (mla.num_heads, mla.kv_lora_rank, mla.qk_rope_head_dim);
                let (nope, value) = (mla.qk_nope_head_dim, mla.v_head_dim);
                let widths = AttentionWidths { query: latent + rope, value: latent, cached: latent + rope };
                let rank = mla.q_lora_rank.unwrap_or(0);
                parts.push(("qkv_a", self.linear(rank + latent + rope, hidden)));
                if rank > 0 {
                    parts.push(("q_a norm", Self::moving(batch, rank * (2 + linear))));
                }
                let out = heads * value;
                parts.extend([
                    ("q_b", self.linear(heads * (nope + rope), if rank > 0 { rank } else { hidden })),
                    ("rope and append", Self::moving(batch, (heads * rope + latent + rope) * 4)),
                    ("W_UK", self.heads(heads, (latent, nope))),
                    ("MLA", Cost::attention(batch, context, heads, widths).floor_us()),
                    ("W_UV", self.heads(heads, (value, latent))),
                    ("o_proj", Self::moving(batch, out * quantised) + self.linear(hidden, out)),
                ]);
            }
            Attention::Gqa(gqa) => {
                let (queries, keys) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
                let widths = AttentionWidths { query: gqa.head_dim, value: gqa.head_dim, cached: 2 * keys };
                parts.extend([
                    ("qkv", self.linear(queries + 2 * keys, hidden)),
                    ("rope and append", Self::moving(batch, (queries + 2 * keys) * 4)),
                    ("GQA", Cost::attention(batch, context, gqa.num_heads, widths).floor_us()),
                    ("o_proj", Self::moving(batch, queries * quantised) + self.linear(hidden, queries)),
                ]);
            }
        }
        parts
    }

    fn moe(&self) -> Vec<(&'static str, f64)> {
        let Load { batch, slots, .. } = self.load;
        let (hidden, moe) = (self.config.hidden_size, &self.config.moe);
        let (rows, width) = (batch * moe.top_k, moe.intermediate_size);
        let shared = match moe.shared_intermediate_size {
            0 => 0.0,
            width => self.mlp(width),
        };
        vec![
            (
                "router",
                self.logits(moe.num_experts) + Self::moving(batch, moe.num_experts * 4 + moe.top_k * 12),
            ),
            ("shared expert", shared),
            // The exchange itself is hidden.
            ("dispatch", 0.0),
            ("experts gate_up", self.product(slots, rows, (2 * width, hidden))),
            ("experts silu", self.silu(rows, width)),
            ("experts down", self.product(slots, rows, (hidden, width))),
            ("combine", 0.0),
            ("reduce", Self::moving(rows, hidden * 2) + Self::moving(batch, hidden * (2 + 2))),
        ]
    }

    fn dense(&self) -> Vec<(&'static str, f64)> {
        vec![("dense MLP", self.mlp(self.config.intermediate_size))]
    }

    fn once(&self) -> Vec<(&'static str, f64)> {
        let Load { batch, .. } = self.load;
        let head = self.logits(self.config.vocab_size) + Self::moving(batch, self.config.vocab_size * 4);
        vec![("embed", Self::moving(batch, self.config.hidden_size * (2 + 4))), ("LM head and draws", head)]
    }

    fn mlp(&self, width: usize) -> f64 {
        let hidden = self.config.hidden_size;
        self.linear(2 * width, hidden) + self.silu(self.load.batch, width) + self.linear(hidden, width)
    }

    fn silu(&self, rows: usize, width: usize) -> f64 {
        Self::moving(rows, width * (2 * 2 + self.linear.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::slice::DEEPSEEK_R1;

    fn deepseek_r1() -> ModelConfig {
        ModelConfig::from_json("deepseek-r1.json", DEEPSEEK_R1).unwrap()
    }

    #[track_caller]
    fn assert_near(got: f64, want: f64, share: f64, what: &str) {
        assert!((got / want - 1.0).abs() < share, "{what}: {got}, not {want}");
    }

    #[test]
    fn one_rank_of_32() {
        let config = deepseek_r1();
        let steps_ms =
            [(2048, [(64, 13.5), (128, 17.3), (256, 26.4)]), (4096, [(64, 16.3), (128, 23.0), (256, 37.7)])];
        for (context, (batch, ms)) in steps_ms.into_iter().flat_map(|(c, rows)| rows.map(|row| (c, row))) {
            let floors = floors(&config, Load { batch, context, slots: 9 });
            assert_near(step_us(&floors) / 1e3, ms, 0.03, &format!("{batch} x {context}"));
        }
    }

    #[test]
    fn parts_at_batch_128_and_context_4096() {
        let floors = floors(&deepseek_r1(), Load { batch: 128, context: 4096, slots: 9 });
        let part = |name: &str| floors.iter().find(|floor| floor.part == name).unwrap();
        let parts = [
            ("qkv_a", 3.9),
            ("q_b", 10.3),
            ("W_UK", 8.8),
            ("MLA", 184.8),
            ("W_UV", 8.8),
            ("shared expert", 11.5),
            ("experts gate_up", 65.1),
            ("experts down", 34.6),
            ("router", 1.35),
        ];
        for (name, us) in parts {
            assert_near(part(name).us, us, 0.03, name);
        }
        // With quantisation before it.
        assert_near(part("o_proj").us, 28.2 + 1.5, 0.01, "o_proj");
        assert_near(part("LM head and draws").us, 446.8 + 15.4, 0.01, "head and draws");
        assert_eq!((part("MLA").layers, part("router").layers, part("dense MLP").layers), (61, 58, 3));
    }

    #[test]
    fn fewer_layers_lack_the_parts_of_others() {
        let mut config = deepseek_r1();
        config.num_layers = 3;
        config.moe_layer_of.truncate(3);
        let floors = floors(&config, Load { batch: 8, context: 64, slots: 9 });
        assert!(floors.iter().all(|floor| floor.part != "router"));
        assert!(floors.iter().any(|floor| floor.part == "dense MLP" && floor.layers == 3));
    }
}

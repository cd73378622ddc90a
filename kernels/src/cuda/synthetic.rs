//! Reproducible pseudo-random weights, for measurements of models that nobody has the weights of.
//!
//! Element i of a buffer is a function of the seed and i alone, close to normally distributed (no element is further than
//! 3.5 standard deviations from the mean). [`value`] is the specification.

use half::bf16;

use super::{Buffer, CudaError, Device, Element, Kernel, Launch, Params, Source, Stream};

/// Standard deviation of the FP8 codes' values, so that the largest is 388 of 448.
const E4M3_DEVIATION: f32 = 112.0;

/// The kernels.
#[derive(Clone, Debug)]
pub struct Synthetic {
    f32: Kernel,
    bf16: Kernel,
    e4m3: Kernel,
    blocks_max: u32,
}

/// What is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Distribution {
    /// Names the numbers: equal seeds give equal buffers.
    pub seed: u64,
    /// Mean.
    pub mean: f32,
    /// Standard deviation.
    pub deviation: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FillParams {
    data: u64,
    length: u64,
    seed: u64,
    mean: f32,
    deviation: f32,
}

// SAFETY: the fields of `FillParams` in cu/synthetic.cu.
unsafe impl Params for FillParams {}

impl Synthetic {
    /// The source of the kernels.
    pub fn source() -> Source {
        Source::new("synthetic", include_str!("cu/synthetic.cu"))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// They do not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&Self::source())?;
        Ok(Self {
            f32: module.kernel("fill_f32")?,
            bf16: module.kernel("fill_bf16")?,
            e4m3: module.kernel("fill_e4m3")?,
            blocks_max: device.properties().sm_count * 8,
        })
    }

    /// Fills with f32.
    ///
    /// # Errors
    /// The launch failed.
    pub fn f32(&self, stream: &Stream, to: &Buffer<f32>, what: Distribution) -> Result<(), CudaError> {
        self.fill(stream, &self.f32, to, what)
    }

    /// Fills with bf16.
    ///
    /// # Errors
    /// The launch failed.
    pub fn bf16(&self, stream: &Stream, to: &Buffer<bf16>, what: Distribution) -> Result<(), CudaError> {
        self.fill(stream, &self.bf16, to, what)
    }

    /// Fills with E4M3 codes and equal scales, however many codes share one. Their products have mean 0 and the deviation
    /// asked for.
    ///
    /// # Errors
    /// A launch failed.
    pub fn e4m3(
        &self,
        stream: &Stream,
        (codes, scales): (&Buffer<u8>, &Buffer<f32>),
        (seed, deviation): (u64, f32),
    ) -> Result<(), CudaError> {
        let what = Distribution { seed, mean: 0.0, deviation: E4M3_DEVIATION };
        self.fill(stream, &self.e4m3, codes, what)?;
        self.f32(stream, scales, Distribution { seed, mean: deviation / E4M3_DEVIATION, deviation: 0.0 })
    }

    fn fill<T: Element>(
        &self,
        stream: &Stream,
        kernel: &Kernel,
        to: &Buffer<T>,
        what: Distribution,
    ) -> Result<(), CudaError> {
        let Distribution { seed, mean, deviation } = what;
        let params = FillParams { data: to.address(), length: to.len() as u64, seed, mean, deviation };
        let grid = to.len().div_ceil(256).min(self.blocks_max as usize) as u32;
        // SAFETY: the kernel of this element type, and the buffer's own length.
        unsafe { kernel.launch(stream, &Launch::new(grid, 256), &params) }
    }
}

/// Element `index` before it is rounded to its type.
pub fn value(what: Distribution, index: u64) -> f32 {
    let Distribution { seed, mean, deviation } = what;
    let mut x = index
        .wrapping_add(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_mul(0xd134_2543_de82_ef95)
        .wrapping_add(seed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    let sum: u32 = (0..4).map(|part| (x >> (16 * part)) as u32 & 0xffff).sum();
    ((sum as f32 - 131_070.0) / 37_837.2).mul_add(deviation, mean)
}

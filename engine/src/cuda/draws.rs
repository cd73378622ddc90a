//! The tokens that the device draws, on their way there and back.

use heliostat_kernels::cuda::sample::{
    LogprobsOut, NOT_FINITE, OK, ROW_WORDS, SampleArgs, SampleRow, Sampling as SampleKernels,
};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Element, Pinned, Stream};

use super::inputs::STEPS_MAX;
use crate::batch::{DeviceSampling, Drawn, Step};
use crate::request::TokenLogprob;
use crate::sampler::SampleError;

/// Most likely tokens that the device names per row.
pub(super) const TOP_MAX: usize = 20;

/// One array that comes back: the device's, and page-locked copies.
#[derive(Debug)]
struct Returned<T> {
    device: Buffer<T>,
    host: Vec<Pinned<T>>,
    per_row: usize,
}

impl<T: Element> Returned<T> {
    fn new(device: &Device, rows: usize, per_row: usize) -> Result<Self, CudaError> {
        let host = (0..STEPS_MAX).map(|_| device.pinned(rows * per_row)).collect::<Result<_, _>>()?;
        Ok(Self { device: device.alloc(rows * per_row)?, host, per_row })
    }

    fn fetch(&self, stream: &Stream, copy: usize, rows: usize) -> Result<(), CudaError> {
        self.device.copy_to_pinned(stream, &self.host[copy], rows * self.per_row)
    }

    fn row(&self, copy: usize, row: usize) -> Vec<T> {
        self.host[copy].read(row * self.per_row..(row + 1) * self.per_row)
    }
}

/// Parameters of draws and what was drawn.
#[derive(Debug)]
pub(super) struct Draws {
    how: Buffer<u32>,
    how_host: Vec<Pinned<u32>>,
    tokens: Returned<u32>,
    status: Returned<u32>,
    logprobs: Returned<f32>,
    ranks: Returned<u32>,
    top_tokens: Returned<u32>,
    top_logprobs: Returned<f32>,
    rows_max: usize,
}

impl Draws {
    /// For up to `rows_max` rows of logits.
    pub(super) fn new(device: &Device, rows_max: usize) -> Result<Self, CudaError> {
        let words = rows_max * ROW_WORDS;
        Ok(Self {
            how: device.alloc(words)?,
            how_host: (0..STEPS_MAX).map(|_| device.pinned(words)).collect::<Result<_, _>>()?,
            tokens: Returned::new(device, rows_max, 1)?,
            status: Returned::new(device, rows_max, 1)?,
            logprobs: Returned::new(device, rows_max, 1)?,
            ranks: Returned::new(device, rows_max, 1)?,
            top_tokens: Returned::new(device, rows_max, TOP_MAX)?,
            top_logprobs: Returned::new(device, rows_max, TOP_MAX)?,
            rows_max,
        })
    }

    /// The tokens drawn by the newest step, `[rows]`.
    pub(super) fn drawn(&self) -> &Buffer<u32> {
        &self.tokens.device
    }

    /// Queues how the first rows are drawn from; the others of `rows` are not.
    pub(super) fn send(
        &self,
        stream: &Stream,
        copy: usize,
        step: &Step,
        rows: usize,
    ) -> Result<(), CudaError> {
        if rows == 0 {
            return Ok(());
        }
        assert!(rows <= self.rows_max, "{rows} rows of logits of {}", self.rows_max);
        let sent = step.device_draws().map(|(_, how)| SampleRow::words(Some(&sample_row(how))));
        let mut words: Vec<u32> = sent.flatten().collect();
        words.resize(rows * ROW_WORDS, 0);
        self.how_host[copy].write(0, &words);
        self.how.copy_from_pinned(stream, &self.how_host[copy], words.len())
    }

    /// Queues the draws from `rows` rows of `logits`.
    pub(super) fn sample(
        &self,
        stream: &Stream,
        kernels: &SampleKernels,
        (logits, vocab): (&Buffer<f32>, usize),
        rows: usize,
    ) -> Result<(), CudaError> {
        kernels.sample(
            stream,
            &SampleArgs {
                rows,
                vocab,
                logits,
                stride: vocab,
                params: &self.how,
                tokens: &self.tokens.device,
                status: &self.status.device,
                logprobs: LogprobsOut {
                    logprobs: &self.logprobs.device,
                    ranks: &self.ranks.device,
                    top_tokens: &self.top_tokens.device,
                    top_logprobs: &self.top_logprobs.device,
                    top_max: TOP_MAX,
                },
            },
        )
    }

    /// Queues the way back of what `step` draws.
    pub(super) fn fetch(&self, stream: &Stream, copy: usize, step: &Step) -> Result<(), CudaError> {
        let rows = step.device_draws().count();
        if rows == 0 {
            return Ok(());
        }
        self.tokens.fetch(stream, copy, rows)?;
        self.status.fetch(stream, copy, rows)?;
        if step.device_draws().any(|(_, how)| how.logprobs.is_some()) {
            self.logprobs.fetch(stream, copy, rows)?;
            self.ranks.fetch(stream, copy, rows)?;
        }
        if step.device_draws().any(|(_, how)| how.logprobs.is_some_and(|top| top > 0)) {
            self.top_tokens.fetch(stream, copy, rows)?;
            self.top_logprobs.fetch(stream, copy, rows)?;
        }
        Ok(())
    }

    /// What came back for `step`, in the order of its draws.
    pub(super) fn read(&self, copy: usize, step: &Step) -> Vec<Result<Drawn, SampleError>> {
        let drawn = step.device_draws().enumerate();
        drawn.map(|(row, (_, how))| self.read_row(copy, row, how)).collect()
    }

    fn read_row(&self, copy: usize, row: usize, how: &DeviceSampling) -> Result<Drawn, SampleError> {
        match self.status.host[copy].get(row) {
            OK => {}
            NOT_FINITE => return Err(SampleError::NotFinite),
            _ => return Err(SampleError::NothingLeft),
        }
        let token = self.tokens.host[copy].get(row);
        let logprob = how.logprobs.map(|top| TokenLogprob {
            token,
            logprob: self.logprobs.host[copy].get(row),
            rank: self.ranks.host[copy].get(row),
            top: match top {
                0 => Vec::new(),
                top => {
                    let named =
                        self.top_tokens.row(copy, row).into_iter().zip(self.top_logprobs.row(copy, row));
                    named.take(top as usize).filter(|(token, _)| *token != u32::MAX).collect()
                }
            },
        });
        Ok(Drawn { token, logprob })
    }
}

fn sample_row(how: &DeviceSampling) -> SampleRow {
    let DeviceSampling { temperature, top_k, top_p, min_p, uniform, logprobs } = *how;
    SampleRow { uniform, temperature, top_p, min_p, top_k, logprobs }
}

//! Draws tokens from rows of logits, and says how likely they were.
//!
//! Specification: the engine's sampler, for draws without bias, penalties or forbidden tokens. A row's draw depends on
//! that row's logits and parameters only; all sums have an order that the vocabulary and the row decide.

use super::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};

/// Blocks that draw from one row together, and their threads.
const BLOCKS: u32 = 8;
const THREADS: u32 = 512;

/// Shared memory that a block may take for its part of a row.
const SHARED_BYTES_MAX: usize = 200 << 10;

/// Words of a [`SampleRow`].
pub const ROW_WORDS: usize = 8;

/// How a row ended: [`SampleArgs::status`].
pub const OK: u32 = 0;
/// Some logit is NaN or plus infinity: nothing was drawn.
pub const NOT_FINITE: u32 = 1;
/// All logits are minus infinity: nothing was drawn.
pub const NOTHING_LEFT: u32 = 2;

/// The kernels.
#[derive(Clone, Debug)]
pub struct Sampling {
    sample: Kernel,
    next_tokens: Kernel,
}

/// How a row is drawn from.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow {
    /// Where in the remaining weight, counted in order of tokens, the drawn one lies; in [0, 1).
    pub uniform: f64,
    /// Below 1e-5: the most likely token.
    pub temperature: f32,
    /// Keeps the fewest most likely tokens whose share reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this many times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Keeps so many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// The number of most likely tokens to name; `None`: no log-probability either.
    pub logprobs: Option<u32>,
}

impl SampleRow {
    /// As the kernel reads it, `None` for a row without a draw: [`SampleArgs::rows`] is these one after the other.
    pub fn words(row: Option<&Self>) -> [u32; ROW_WORDS] {
        let Some(Self { uniform, temperature, top_p, min_p, top_k, logprobs }) = row else {
            return [0; ROW_WORDS];
        };
        let bits = uniform.to_bits();
        let flags = 1 | if logprobs.is_some() { 2 } else { 0 };
        let floats = [temperature, top_p, min_p].map(|value| value.to_bits());
        let top = logprobs.unwrap_or(0);
        [bits as u32, (bits >> 32) as u32, floats[0], floats[1], floats[2], *top_k, flags, top]
    }
}

/// Arguments of [`Sampling::sample`].
#[derive(Clone, Copy, Debug)]
pub struct SampleArgs<'a> {
    /// Rows of logits.
    pub rows: usize,
    /// Tokens.
    pub vocab: usize,
    /// Raw logits: rows of `vocab`, `stride` elements apart.
    pub logits: &'a Buffer<f32>,
    /// Elements from row to row.
    pub stride: usize,
    /// [`SampleRow::words`] of each row, 8-byte aligned.
    pub params: &'a Buffer<u32>,
    /// Drawn tokens, `[rows]`; `u32::MAX` where nothing could be drawn, unchanged where nothing was asked for.
    pub tokens: &'a Buffer<u32>,
    /// [`OK`], [`NOT_FINITE`] or [`NOTHING_LEFT`], `[rows]`.
    pub status: &'a Buffer<u32>,
    /// What is written for rows that ask for log-probabilities.
    pub logprobs: LogprobsOut<'a>,
}

/// Log-probabilities under the raw logits.
#[derive(Clone, Copy, Debug)]
pub struct LogprobsOut<'a> {
    /// Of the drawn token, `[rows]`.
    pub logprobs: &'a Buffer<f32>,
    /// Its rank, 1 for the most likely; equal logits rank by token id. `[rows]`.
    pub ranks: &'a Buffer<u32>,
    /// The most likely tokens, best first, `[rows][top_max]`; `u32::MAX` behind the last of a small vocabulary. Entries that a
    /// row did not ask for are unchanged.
    pub top_tokens: &'a Buffer<u32>,
    /// Their log-probabilities, likewise.
    pub top_logprobs: &'a Buffer<f32>,
    /// Most tokens that a row can have named.
    pub top_max: usize,
}

/// Arguments of [`Sampling::next_tokens`].
#[derive(Clone, Copy, Debug)]
pub struct NextTokensArgs<'a> {
    /// Rows of the step.
    pub rows: usize,
    /// Tokens that the host knows, `[rows]`.
    pub known: &'a Buffer<u32>,
    /// Where the others stand among the drawn ones, `[rows]`; `u32::MAX`: the host's token.
    pub from_previous: &'a Buffer<u32>,
    /// Tokens drawn by the step before.
    pub drawn: &'a Buffer<u32>,
    /// Result, `[rows]`.
    pub tokens: &'a Buffer<u32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleParams {
    logits: u64,
    rows: u64,
    tokens: u64,
    logprobs: u64,
    ranks: u64,
    status: u64,
    top_tokens: u64,
    top_logprobs: u64,
    stride: u64,
    vocab: u32,
    chunk: u32,
    top_max: u32,
    wide: u32,
}

// SAFETY: the fields of `SampleParams` in cu/sample.cu.
unsafe impl Params for SampleParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct NextTokensParams {
    known: u64,
    from_previous: u64,
    drawn: u64,
    tokens: u64,
    rows: u32,
    drawn_rows: u32,
}

// SAFETY: the fields of `NextTokensParams` in cu/sample.cu.
unsafe impl Params for NextTokensParams {}

impl Sampling {
    /// The source of the kernels.
    pub fn source() -> Source {
        Source::new("sample", include_str!("cu/sample.cu"))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// They do not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&Self::source())?;
        Ok(Self { sample: module.kernel("sample")?, next_tokens: module.kernel("next_tokens")? })
    }

    /// Draws a token from every row that asks for it.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit, or the vocabulary is beyond 405504.
    pub fn sample(&self, stream: &Stream, args: &SampleArgs<'_>) -> Result<(), CudaError> {
        let SampleArgs { rows, vocab, logits, stride, params, tokens, status, logprobs } = *args;
        assert!(vocab > 0 && vocab <= stride, "sample: rows of {vocab} every {stride} logits");
        let needed = if rows == 0 { 0 } else { (rows - 1) * stride + vocab };
        assert!(logits.len() >= needed, "sample: {} of {needed} logits", logits.len());
        assert!(params.len() >= rows * ROW_WORDS && params.address().is_multiple_of(8), "sample: parameters");
        assert!(tokens.len() >= rows && status.len() >= rows, "sample: room for {rows} tokens");
        let LogprobsOut { logprobs, ranks, top_tokens, top_logprobs, top_max } = logprobs;
        assert!(logprobs.len() >= rows && ranks.len() >= rows, "sample: room for {rows} log-probabilities");
        let named = rows * top_max;
        assert!(top_tokens.len() >= named && top_logprobs.len() >= named, "sample: room for {named} names");
        let chunk = vocab.div_ceil((BLOCKS * THREADS) as usize) | 1;
        let shared_bytes = THREADS as usize * chunk * size_of::<f32>();
        assert!(shared_bytes <= SHARED_BYTES_MAX, "sample: a vocabulary of {vocab}");
        let wide = vocab.is_multiple_of(4) && stride.is_multiple_of(4) && logits.address().is_multiple_of(16);
        let params = SampleParams {
            logits: logits.address(),
            rows: params.address(),
            tokens: tokens.address(),
            logprobs: logprobs.address(),
            ranks: ranks.address(),
            status: status.address(),
            top_tokens: top_tokens.address(),
            top_logprobs: top_logprobs.address(),
            stride: stride as u64,
            vocab: vocab as u32,
            chunk: chunk as u32,
            top_max: top_max as u32,
            wide: u32::from(wide),
        };
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            cluster: BLOCKS,
            dependent: true,
            ..Launch::new(rows as u32 * BLOCKS, THREADS)
        };
        // SAFETY: the lengths were checked above; no parameter of a row leads beyond them.
        unsafe { self.sample.launch(stream, &launch, &params) }
    }

    /// Puts together the tokens of a step: those that the host knew when it queued the step, and those that the step
    /// before is only now drawing.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn next_tokens(&self, stream: &Stream, args: &NextTokensArgs<'_>) -> Result<(), CudaError> {
        let NextTokensArgs { rows, known, from_previous, drawn, tokens } = *args;
        for buffer in [known, from_previous, tokens] {
            assert!(buffer.len() >= rows, "next_tokens: {} of {rows} rows", buffer.len());
        }
        let params = NextTokensParams {
            known: known.address(),
            from_previous: from_previous.address(),
            drawn: drawn.address(),
            tokens: tokens.address(),
            rows: rows as u32,
            drawn_rows: drawn.len() as u32,
        };
        let launch = Launch { dependent: true, ..Launch::new((rows as u32).div_ceil(256), 256) };
        // SAFETY: the lengths were checked above, and the kernel checks each row of the step before.
        unsafe { self.next_tokens.launch(stream, &launch, &params) }
    }
}

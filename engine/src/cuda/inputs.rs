//! What a step tells its kernels: tokens, positions, sequences, blocks, wanted rows.
//!
//! The host writes to page-locked memory, of which there are as many copies as steps in flight, and queues copies to
//! fixed addresses on the device.

use heliostat_kernels::cuda::attention::BatchMeta;
use heliostat_kernels::cuda::rope::PagedRows;
use heliostat_kernels::cuda::sample::NextTokensArgs;
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Pinned, Stream};

use crate::batch::Step;

/// Steps that may be in flight.
pub(super) const STEPS_MAX: usize = 2;

/// Position of a row that a recorded graph computes but the batch does not have; also "no draw" and "no row".
pub(super) const NONE: u32 = u32::MAX;

/// Sizes of the inputs.
#[derive(Clone, Copy, Debug)]
pub(super) struct InputSizes {
    pub(super) rows_max: usize,
    pub(super) logit_rows_max: usize,
    pub(super) seqs_max: usize,
    pub(super) blocks_max: usize,
}

/// One array of words: page-locked copies and the device's.
#[derive(Debug)]
pub(super) struct Section {
    host: Vec<Pinned<u32>>,
    device: Buffer<u32>,
}

impl Section {
    pub(super) fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        let host = (0..STEPS_MAX).map(|_| device.pinned(len)).collect::<Result<_, _>>()?;
        Ok(Self { host, device: device.alloc(len)? })
    }

    pub(super) fn send(&self, stream: &Stream, copy: usize, words: &[u32]) -> Result<(), CudaError> {
        if words.is_empty() {
            return Ok(());
        }
        self.host[copy].write(0, words);
        self.device.copy_from_pinned(stream, &self.host[copy], words.len())
    }

    pub(super) fn device(&self) -> &Buffer<u32> {
        &self.device
    }
}

/// The inputs of a DP rank.
#[derive(Debug)]
pub(super) struct Inputs {
    sizes: InputSizes,
    /// Tokens known to the host.
    known: Section,
    /// Which draw of the step before gives a row's token; `NONE`: the host knows it.
    feeds: Section,
    /// Tokens as the model reads them.
    tokens: Buffer<u32>,
    positions: Section,
    seq_of_row: Section,
    block_table: Section,
    /// Rows whose logits are wanted.
    wanted: Section,
    /// How many rows are real.
    count: Section,
    words: Vec<u32>,
}

impl Inputs {
    pub(super) fn new(device: &Device, sizes: InputSizes) -> Result<Self, CudaError> {
        let section = |len: usize| Section::new(device, len);
        Ok(Self {
            known: section(sizes.rows_max)?,
            feeds: section(sizes.rows_max)?,
            tokens: device.alloc(sizes.rows_max)?,
            positions: section(sizes.rows_max)?,
            seq_of_row: section(sizes.rows_max)?,
            block_table: section(sizes.seqs_max * sizes.blocks_max)?,
            wanted: section(sizes.logit_rows_max)?,
            count: section(1)?,
            words: Vec::new(),
            sizes,
        })
    }

    /// Queues the inputs of `step`, computed as `rows` rows of which `logit_rows` get logits, from copy `copy` of the
    /// page-locked memory.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        copy: usize,
        step: &Step,
        (rows, logit_rows): (usize, usize),
    ) -> Result<(), CudaError> {
        let real = step.tokens.len();
        assert!(real <= rows && rows <= self.sizes.rows_max, "{real} tokens in {rows} rows");
        self.count.send(stream, copy, &[real as u32])?;
        let words = &mut self.words;
        let padded = |words: &mut Vec<u32>, values: &[u32], len: usize, pad: u32| {
            words.clear();
            words.extend_from_slice(values);
            words.resize(len, pad);
        };
        padded(words, &step.tokens, rows, 0);
        self.known.send(stream, copy, words)?;
        padded(words, &step.positions, rows, NONE);
        self.positions.send(stream, copy, words)?;
        padded(words, &[], rows, NONE);
        step.feeds.iter().for_each(|feed| words[feed.row as usize] = feed.draw);
        self.feeds.send(stream, copy, words)?;
        words.clear();
        for (index, seq) in (0..).zip(&step.seqs) {
            words.extend(std::iter::repeat_n(index, seq.len));
        }
        words.resize(rows, 0);
        self.seq_of_row.send(stream, copy, words)?;
        words.clear();
        words.extend(step.device_draws().map(|(row, _)| row as u32));
        words.extend(step.host_rows().map(|row| row as u32));
        assert!(words.len() <= logit_rows, "{} rows of logits, {logit_rows} are computed", words.len());
        words.resize(logit_rows, NONE);
        self.wanted.send(stream, copy, words)?;
        words.clear();
        for seq in &step.seqs {
            let blocks = &seq.block_table[..seq.block_table.len().min(self.sizes.blocks_max)];
            words.extend_from_slice(blocks);
            words.resize(words.len().next_multiple_of(self.sizes.blocks_max), 0);
        }
        self.block_table.send(stream, copy, words)
    }

    /// Arguments of the kernel that puts together the tokens of `rows` rows.
    pub(super) fn next_tokens<'a>(&'a self, rows: usize, drawn: &'a Buffer<u32>) -> NextTokensArgs<'a> {
        let (known, from_previous) = (&self.known.device, &self.feeds.device);
        NextTokensArgs { rows, known, from_previous, drawn, tokens: &self.tokens }
    }

    pub(super) fn tokens(&self) -> &Buffer<u32> {
        &self.tokens
    }

    pub(super) fn positions(&self) -> &Buffer<u32> {
        &self.positions.device
    }

    pub(super) fn wanted(&self) -> &Buffer<u32> {
        &self.wanted.device
    }

    pub(super) fn count(&self) -> &Buffer<u32> {
        &self.count.device
    }

    pub(super) fn meta(&self) -> BatchMeta<'_> {
        BatchMeta {
            positions: &self.positions.device,
            seq_of_row: &self.seq_of_row.device,
            block_table: &self.block_table.device,
            blocks_max: self.sizes.blocks_max,
        }
    }

    pub(super) fn paged(&self, rows: usize) -> PagedRows<'_> {
        PagedRows {
            rows,
            positions: &self.positions.device,
            seq_of_row: &self.seq_of_row.device,
            block_table: &self.block_table.device,
            blocks_max: self.sizes.blocks_max,
        }
    }
}

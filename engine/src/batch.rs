//! What one step computes: the flat tokens of its sequences.
//!
//! The scheduler builds it, the model reads it. It holds no state: executing the same batch again writes the same
//! keys and values to the same places, so an aborted step can simply be redone.

/// The tokens of one step, sequence after sequence. Empty on a rank that only keeps its peers company.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[t]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[t]`.
    pub positions: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub seqs: Vec<BatchSeq>,
}

impl Batch {
    /// Whether the step computes no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Rows of logits that the model returns for this batch.
    pub fn num_logit_rows(&self) -> usize {
        self.seqs.iter().map(BatchSeq::num_logit_rows).sum()
    }
}

/// One sequence's share of a batch: `len` tokens that follow `context` tokens already in the KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSeq {
    /// First row in `Batch::tokens`.
    pub start: usize,
    /// Tokens of this step, at least one.
    pub len: usize,
    /// Tokens whose keys and values are in the KV cache already.
    pub context: usize,
    /// KV blocks in the order of positions; position `p` lives in `block_table[p / block_size]`. Covers at least
    /// `context + len` positions.
    pub block_table: Vec<u32>,
    /// Rows whose logits are wanted.
    pub logits: LogitRows,
}

impl BatchSeq {
    /// Rows of logits that the model returns for this sequence.
    pub fn num_logit_rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.len,
        }
    }
}

/// Which rows of a sequence need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a chunk of a prompt that goes on.
    None,
    /// The last row: the next token is drawn from it.
    Last,
    /// Every row: prompt log-probabilities were asked for.
    All,
}

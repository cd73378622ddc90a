//! The bytes that each token of a byte-level vocabulary stands for.
//!
//! Byte-level BPE writes every byte as one printable character; decoding a sequence is concatenating the bytes of
//! its tokens and reading them as UTF-8. With this table that can be done token by token, exactly.

use tokenizers::{DecoderWrapper, Tokenizer};

/// Bytes of every token, in one arena.
pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
}

impl TokenBytes {
    /// Returns nothing where the tokenizer's decoder is not plain byte-level.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let Some(DecoderWrapper::ByteLevel(_)) = tokenizer.get_decoder() else { return None };
        let byte_of = byte_of_char();
        let tokens = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let mut table = Self { bytes: Vec::new(), ends: Vec::with_capacity(tokens as usize) };
        for id in 0..tokens {
            if let Some(token) = tokenizer.id_to_token(id) {
                let start = table.bytes.len();
                let mapped = token.chars().try_for_each(|char| {
                    let byte = byte_of.get(char as usize).copied().flatten()?;
                    table.bytes.push(byte);
                    Some(())
                });
                if mapped.is_none() {
                    table.bytes.truncate(start);
                    table.bytes.extend_from_slice(token.as_bytes());
                }
            }
            table.ends.push(table.bytes.len() as u32);
        }
        Some(table)
    }

    /// Number of token ids.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of the longest token.
    pub(crate) fn longest(&self) -> usize {
        (0..self.ends.len() as u32).map(|token| self.get(token).len()).max().unwrap_or(0)
    }

    /// Bytes of `token`; empty where the vocabulary has no such token.
    pub(crate) fn get(&self, token: u32) -> &[u8] {
        let token = token as usize;
        let Some(&end) = self.ends.get(token) else { return &[] };
        let start = if token == 0 { 0 } else { self.ends[token - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// GPT-2's table, inverted: printable Latin-1 bytes stand for themselves, the rest for characters from U+0100 on.
fn byte_of_char() -> Vec<Option<u8>> {
    let mut table = vec![None; 0x200];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let char = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        table[char] = Some(byte);
    }
    table
}

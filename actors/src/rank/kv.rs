//! KV blocks that go from rank to rank: how a rank goes on with a sequence whose prompt another one has computed.
//!
//! The rank that goes on asks for the full blocks of the prompt that it lacks, part by part, and puts them into its prefix
//! cache; then it queues the sequence, which finds them there. Nothing is reserved anywhere: what was evicted meanwhile, or does
//! not come for whatever reason, is computed, with the same result.

use std::time::{Duration, Instant};

use heliostat_engine::request::Request;
use heliostat_engine::scheduler::BlockHash;
use heliostat_runtime::handle::Handle;
use tokio::sync::oneshot;

use super::Rank;
use super::link::{Command, Link};
use super::thread::StepThread;
use crate::ingress::Hex;
use crate::messages::{FetchKv, KvChunk};

/// Bytes of one answer: steps of the rank that reads wait so long for it.
const CHUNK_BYTES: u64 = 8 << 20;

/// Blocks for the step thread to take in.
pub(super) struct StoreKv {
    /// Names of all blocks up to the last one of `chunk`.
    hashes: Vec<BlockHash>,
    /// Which of them the first one of `chunk` is.
    first: usize,
    chunk: KvChunk,
    /// Told how many of a prefix of `hashes` are here then.
    here: oneshot::Sender<usize>,
}

/// What became of the blocks of a sequence.
pub(super) struct Fetched {
    /// All are here that could be.
    pub(super) complete: bool,
    pub(super) bytes: u64,
    pub(super) took: Duration,
}

/// Brings the full blocks of a prompt from the rank that computed them, as far as it has them.
pub(super) async fn fetch(link: &Link, from: &Handle<Rank>, request: &Request) {
    let began = Instant::now();
    let mut bytes = 0;
    let outcome = bring(link, from, request, &mut bytes).await;
    if let Err(why) = &outcome {
        tracing::info!(sequence = %Hex(request.id), bytes, "its KV blocks are computed here: {why}");
    }
    link.send(Command::Fetched(Fetched { complete: outcome.is_ok(), bytes, took: began.elapsed() }));
}

async fn bring(link: &Link, from: &Handle<Rank>, request: &Request, bytes: &mut u64) -> Result<(), String> {
    let ended = |_| "the rank ends".to_owned();
    let (reply, found) = oneshot::channel();
    link.send(Command::FindKv(request.prompt.clone(), reply));
    let (hashes, mut here) = found.await.map_err(ended)?;
    while here < hashes.len() {
        let ask = FetchKv { hashes: hashes[here..].to_vec(), bytes_max: CHUNK_BYTES };
        let chunk = from.ask(ask).await.map_err(|why| why.to_string())?;
        let came = chunk.blocks();
        if came == 0 || came > hashes.len() - here {
            return Err(format!("the other rank has {here} of {} blocks", hashes.len()));
        }
        *bytes += chunk.bytes.len() as u64;
        let (reply, stored) = oneshot::channel();
        let upto = hashes[..here + came].to_vec();
        link.send(Command::StoreKv(StoreKv { hashes: upto, first: here, chunk, here: reply }));
        let now = stored.await.map_err(ended)?;
        if now < here + came {
            return Err(format!("there is room for {now} of {} blocks", hashes.len()));
        }
        here = now;
    }
    Ok(())
}

impl KvChunk {
    /// Whole blocks that it has.
    fn blocks(&self) -> usize {
        match self.form.block_bytes as usize {
            0 => 0,
            bytes if self.bytes.len().is_multiple_of(bytes) => self.bytes.len() / bytes,
            _ => 0,
        }
    }
}

impl StepThread {
    /// Names the full blocks of a prompt, and says how many of them are here.
    pub(super) fn find_kv(&mut self, prompt: &[u32]) -> (Vec<BlockHash>, usize) {
        let Some(attention) = &mut self.attention else { return Default::default() };
        let hashes = attention.scheduler().prompt_blocks(prompt);
        let here = attention.scheduler().cached(&hashes).len();
        (hashes, here)
    }

    /// Reads blocks that are cached here.
    pub(super) fn read_kv(&mut self, ask: &FetchKv) -> KvChunk {
        let Some(attention) = &mut self.attention else { return KvChunk::default() };
        let form = self.engine.kv_form();
        let mut blocks = attention.scheduler().cached(&ask.hashes);
        blocks.truncate((ask.bytes_max / form.block_bytes.max(1)).max(1) as usize);
        match self.engine.read_kv(&blocks) {
            Ok(bytes) => KvChunk { form, bytes },
            Err(why) => {
                tracing::warn!("cannot read KV blocks: {why}");
                KvChunk::default()
            }
        }
    }

    /// Takes in what has arrived, unless steps are in flight.
    pub(super) fn store_arrived(&mut self) {
        let Some(attention) = &mut self.attention else { return };
        while attention.scheduler().is_settled()
            && let Some(StoreKv { hashes, first, chunk, here }) = self.arrived.pop_front()
        {
            let form = self.engine.kv_form();
            let bytes = form.block_bytes.max(1) as usize;
            let engine = &mut self.engine;
            let write = |blocks: &[(usize, u32)]| {
                if chunk.form != form {
                    return Err("the other rank is of another kind".to_owned());
                }
                let content = |index: usize| chunk.bytes.get((index - first) * bytes..)?.get(..bytes);
                // Those before the first have been evicted meanwhile.
                let wanted = blocks.iter().map(|&(index, block)| {
                    let content = (index >= first).then(|| content(index)).flatten();
                    content
                        .map(|content| (block, content))
                        .ok_or_else(|| "blocks before these are gone".to_owned())
                });
                let wanted: Vec<_> = wanted.collect::<Result<_, _>>()?;
                engine.write_kv(&wanted).map_err(|why| why.to_string())
            };
            let stored = attention.scheduler().take_in(&hashes, write).unwrap_or_else(|why| {
                tracing::info!("cannot take KV blocks in: {why}");
                first
            });
            // Nobody waits for them once the sequence was given up.
            let _ = here.send(stored);
        }
    }
}

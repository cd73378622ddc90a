//! Generates greedily with one rank and prints tokens per second: `generate [DIR] [BATCH] [TOKENS] [THREADS]`.
//!
//! Prompts come from the checkpoint's reference.json. For measuring and profiling the forward pass alone.

#![allow(clippy::print_stdout, reason = "it is a program")]

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use heliostat_engine::batch::{Batch, BatchSeq, LogitRows};
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::model::{KvPages, LocalExperts, Model};
use heliostat_kernels::cpu::Cpu;

const BLOCK_SIZE: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().unwrap_or_else(|| "models/sundial-20m".to_owned()));
    let mut number = |default: usize| args.next().map_or(Ok(default), |arg| arg.parse());
    let (batch_size, new_tokens, threads) = (number(1)?, number(128)?, number(1)?);

    let cpu = Cpu::new(NonZeroUsize::new(threads).ok_or("at least one thread")?)?;
    let config = Arc::new(ModelConfig::from_dir(&dir)?);
    let checkpoint = Checkpoint::open(&dir)?;
    checkpoint.validate(&config)?;
    let began = Instant::now();
    let mut model = Model::load(&checkpoint, &config, cpu.clone(), &mut |_, _| ())?;
    let mut experts = LocalExperts::load(&checkpoint, &config, cpu)?;
    println!("loaded in {:.0} ms", began.elapsed().as_secs_f64() * 1e3);

    let prompts = prompts(&dir)?;
    let mut tokens: Vec<Vec<u32>> = prompts.iter().cycle().take(batch_size).cloned().collect();
    let longest = tokens.iter().map(Vec::len).max().unwrap_or(0) + new_tokens;
    let blocks_each = longest.div_ceil(BLOCK_SIZE);
    let mut kv = KvPages::new(&config, batch_size * blocks_each, BLOCK_SIZE);
    let mut cached = vec![0; batch_size];
    let mut steps = Vec::with_capacity(new_tokens);
    for _ in 0..new_tokens {
        let batch = next_batch(&tokens, &cached, blocks_each);
        let began = Instant::now();
        let logits = model.forward(&batch, &mut kv, &mut experts)?;
        steps.push(began.elapsed().as_secs_f64());
        for ((tokens, cached), row) in
            tokens.iter_mut().zip(&mut cached).zip(logits.rows.chunks(logits.vocab))
        {
            *cached = tokens.len();
            let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).ok_or("no logits")?;
            tokens.push(best.0 as u32);
        }
    }
    let prefill = steps.remove(0);
    let decode: f64 = steps.iter().sum();
    let rate = (steps.len() * batch_size) as f64 / decode;
    steps.sort_by(f64::total_cmp);
    println!("prefill {:.2} ms", prefill * 1e3);
    println!("decode {rate:.0} tokens/s, median step {:.3} ms", steps[steps.len() / 2] * 1e3);
    Ok(())
}

fn prompts(dir: &std::path::Path) -> Result<Vec<Vec<u32>>, Box<dyn Error>> {
    let reference: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("reference.json"))?)?;
    let prompts = reference["prompts"].as_array().ok_or("reference.json has no prompts")?;
    prompts.iter().map(|prompt| Ok(serde_json::from_value(prompt["prompt_ids"].clone())?)).collect()
}

/// All tokens that are not cached yet, of every sequence.
fn next_batch(tokens: &[Vec<u32>], cached: &[usize], blocks_each: usize) -> Batch {
    let mut batch = Batch::default();
    for (number, (tokens, &context)) in tokens.iter().zip(cached).enumerate() {
        let first = (number * blocks_each) as u32;
        batch.seqs.push(BatchSeq {
            start: batch.tokens.len(),
            len: tokens.len() - context,
            context,
            block_table: (first..first + blocks_each as u32).collect(),
            logits: LogitRows::Last,
            expanded: 0,
        });
        batch.tokens.extend(&tokens[context..]);
        batch.positions.extend((context..tokens.len()).map(|position| position as u32));
    }
    batch
}

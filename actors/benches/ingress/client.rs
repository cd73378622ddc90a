//! Streams, read as a client reads them, and what they cost.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::AnyError;
use crate::server::Process;

/// The text of the token that the replica draws: the last of the prompt.
const TOKEN: &[u8] = b" the";
/// Clock ticks of `/proc/PID/stat` in a second; Linux shows 100 to every program.
const TICKS_PER_S: f64 = 100.0;

/// Prints all rows.
pub(crate) fn table() -> Result<(), AnyError> {
    let runtime = crate::runtime()?;
    runtime.block_on(async {
        println!(
            "{:>7} {:>9} | {:>8} {:>8} | {:>9} | {:>9} {:>7} | cpu us per token: {:>7} {:>7} {:>7}",
            "streams",
            "tokens/s",
            "p50 ms",
            "p99 ms",
            "first p50",
            "got/s",
            "events",
            "ingress",
            "replica",
            "client"
        );
        for run in [
            Run { streams: 64, tokens: 500, step: Duration::from_millis(20) },
            Run { streams: 256, tokens: 300, step: Duration::from_millis(20) },
            Run { streams: 1000, tokens: 100, step: Duration::from_millis(50) },
            Run { streams: 256, tokens: 400, step: Duration::from_micros(500) },
            Run { streams: 1000, tokens: 100, step: Duration::from_micros(500) },
        ] {
            run.measure().await?;
        }
        Ok(())
    })
}

/// Some streams at once. A step gives each of them a token.
#[derive(Clone, Copy)]
struct Run {
    streams: u64,
    tokens: usize,
    step: Duration,
}

/// What a stream got.
struct Got {
    seed: u64,
    began: u128,
    /// When each token was read.
    tokens: Vec<u128>,
    events: usize,
}

impl Run {
    async fn measure(self) -> Result<(), AnyError> {
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("steps");
        let args = ["serve".into(), self.step.as_micros().to_string(), log.display().to_string()];
        let server = tokio::task::spawn_blocking(move || Process::start(&args)).await??;
        let (address, replica) = server.line.split_once(' ').ok_or("the server did not start")?;
        stream(address.to_owned(), u64::MAX >> 1, 2).await?;
        let pids = [server.pid(), replica.parse()?, std::process::id()];
        let before = pids.map(cpu_s);
        let began = Instant::now();
        let streams =
            (0..self.streams).map(|seed| tokio::spawn(stream(address.to_owned(), seed, self.tokens)));
        let streams: Vec<_> = streams.collect();
        let mut all = Vec::new();
        for stream in streams {
            all.push(stream.await??);
        }
        let seconds = began.elapsed().as_secs_f64();
        let spent: Vec<f64> = pids.iter().zip(before).map(|(&pid, before)| cpu_s(pid) - before).collect();
        let sent = sent(&log, self.streams as usize * self.tokens).await?;
        let mut added = Vec::new();
        for got in &all {
            if got.tokens.len() != self.tokens {
                return Err(format!("a stream got {} of {} tokens", got.tokens.len(), self.tokens).into());
            }
            let late = |(index, &read): (usize, &u128)| {
                let sent = sent.get(&(got.seed, index)).ok_or("a token that no step drew")?;
                Ok::<_, AnyError>(read.saturating_sub(*sent) as f64 / 1e6)
            };
            added.extend(got.tokens.iter().enumerate().map(late).collect::<Result<Vec<_>, _>>()?);
        }
        let mut first: Vec<f64> = all.iter().map(|got| (got.tokens[0] - got.began) as f64 / 1e6).collect();
        first.sort_by(f64::total_cmp);
        added.sort_by(f64::total_cmp);
        let tokens = added.len() as f64;
        let of = |all: &[f64], percent: usize| all[(all.len() - 1) * percent / 100];
        let events: usize = all.iter().map(|got| got.events).sum();
        let offered = self.streams as f64 / self.step.as_secs_f64();
        println!(
            "{:>7} {:>9.0} | {:>8.2} {:>8.2} | {:>9.2} | {:>9.0} {:>7.2} |                   {:>7.1} {:>7.1} {:>7.1}",
            self.streams,
            offered,
            of(&added, 50),
            of(&added, 99),
            of(&first, 50),
            tokens / seconds,
            events as f64 / tokens,
            spent[0] * 1e6 / tokens,
            spent[1] * 1e6 / tokens,
            spent[2] * 1e6 / tokens
        );
        Ok(())
    }
}

/// When the step of each token ended, by seed and index; waits until the replica has written all of them.
async fn sent(log: &Path, tokens: usize) -> Result<HashMap<(u64, usize), u128>, AnyError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let text = std::fs::read_to_string(log)?;
        if text.lines().count() >= tokens && text.ends_with('\n') {
            let parse = |line: &str| {
                let mut words = line.split(' ');
                let mut word = || words.next().ok_or("a short line");
                Ok::<_, AnyError>(((word()?.parse()?, word()?.parse()?), word()?.parse()?))
            };
            return text.lines().map(parse).collect();
        }
        if Instant::now() > deadline {
            return Err("the replica wrote no whole log".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// One streamed completion.
async fn stream(address: String, seed: u64, tokens: usize) -> Result<Got, AnyError> {
    let body = format!(
        r#"{{"model":"sundial-20m","prompt":"The fox and the","max_tokens":{tokens},"ignore_eos":true,"seed":{seed},"stream":true}}"#
    );
    let mut socket = TcpStream::connect(&address).await?;
    socket.set_nodelay(true)?;
    let began = now();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\nconnection: close\r\n";
    socket.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await?;
    let mut got = Got { seed, began, tokens: Vec::new(), events: 0 };
    let mut buffer: Vec<u8> = Vec::with_capacity(1 << 16);
    loop {
        let read = socket.read_buf(&mut buffer).await?;
        let at = now();
        if read == 0 {
            break;
        }
        // Whole events only; the rest waits for more.
        let Some(end) = buffer.windows(2).rposition(|two| two == b"\n\n").map(|start| start + 2) else {
            continue;
        };
        let count = |what: &[u8]| buffer[..end].windows(what.len()).filter(|window| *window == what).count();
        got.events += count(b"data: {");
        got.tokens.extend(std::iter::repeat_n(at, count(TOKEN)));
        buffer.drain(..end);
    }
    match got.tokens.len() {
        0 => Err(format!("no stream: {}", String::from_utf8_lossy(&buffer)).into()),
        _ => Ok(got),
    }
}

/// Processor seconds that a process has used.
fn cpu_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let ticks =
        |at: usize| after_name.split(' ').nth(at).and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS_PER_S
}

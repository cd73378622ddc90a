//! What HTTP, router and wire cost where the model does nothing: a real ingress, a replica in a process of its own that
//! draws a token for every sequence at every step, and clients.
//!
//! `cargo bench -p heliostat-actors --bench ingress` measures streams: what is added to a token between engine and
//! client, tokens per second, and processor time per token. `-- serve` and `-- bare` only serve, for load generators of
//! others: `scripts/bench_http` runs these beside Ray Serve. It starts itself as the replica.

#![allow(clippy::print_stdout, reason = "the table is the purpose of the program")]

mod client;
mod replica;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let served = match words.as_slice() {
        [] => client::table(),
        ["serve"] => server::serve(Duration::ZERO, None),
        ["serve", step_us] => step(step_us).and_then(|step| server::serve(step, None)),
        ["serve", step_us, log] => {
            step(step_us).and_then(|step| server::serve(step, Some(PathBuf::from(log))))
        }
        ["replica", step_us] => step(step_us).and_then(|step| replica::run(step, None)),
        ["replica", step_us, log] => {
            step(step_us).and_then(|step| replica::run(step, Some(PathBuf::from(log))))
        }
        ["bare"] => server::bare(),
        _ => Err("arguments: none, `serve [STEP_US [LOG]]` or `bare`".into()),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn step(text: &str) -> Result<Duration, AnyError> {
    Ok(Duration::from_micros(text.parse()?))
}

/// As many threads for I/O as `helio` gives a process.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, AnyError> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

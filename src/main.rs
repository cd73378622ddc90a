//! `helio`: arguments -> checked configuration -> commands. Errors are rendered once, here.
#![allow(clippy::print_stdout, reason = "a command line prints")]

mod args;
mod client;
mod cluster;
mod commands;
mod config;
mod deploy;
mod failure;
mod gpus;
mod processes;
mod rundir;
mod show;

use anyhow::{Context, Result};
use args::{Cli, Command};
use clap::Parser;
use heliostat::logging::{self, Whose};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    begin_log(&cli.command);
    match run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(failure::report(&error)),
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Down(args) => one_thread()?.block_on(commands::down::run(args)),
        Command::Bench(args) => commands::bench::run(args),
        Command::Cert(command) => commands::cert::run(command),
        Command::Check(args) => commands::check::run(args),
        Command::Reference => commands::print(&config::reference_page()),
        Command::Head(args) => many_threads()?.block_on(commands::head::run(args)),
        Command::Node(args) => many_threads()?.block_on(commands::node::run(args)),
        Command::Worker(args) => many_threads()?.block_on(commands::worker::run(args)),
        // A child's parent-death signal follows the thread that started it, so `up` must have only this one.
        Command::Up(args) => one_thread()?.block_on(commands::up::run(args)),
        Command::Status(args) => one_thread()?.block_on(commands::status::run(args)),
        Command::Top(args) => one_thread()?.block_on(commands::top::run(args)),
        Command::Timeline(args) => one_thread()?.block_on(commands::timeline::run(args)),
        Command::List(args) => one_thread()?.block_on(commands::list::list(args)),
        Command::Get(args) => one_thread()?.block_on(commands::list::get(args)),
        Command::Summary(args) => one_thread()?.block_on(commands::list::summary(args)),
        Command::Logs(args) => one_thread()?.block_on(commands::logs::run(args)),
        Command::Drain(args) => one_thread()?.block_on(commands::drain::run(args)),
        Command::Undrain(args) => one_thread()?.block_on(commands::drain::undo(args)),
        Command::Submit(args) => one_thread()?.block_on(commands::submit::run(args)),
        Command::Package(args) => one_thread()?.block_on(commands::package::run(args)),
        Command::Serve(args) => one_thread()?.block_on(commands::serve::run(args)),
        Command::Job(args) => one_thread()?.block_on(commands::job::run(args)),
        Command::Entrypoint(args) => one_thread()?.block_on(commands::entrypoint::run(args)),
        Command::Eplb(args) => one_thread()?.block_on(commands::eplb::run(args)),
    }
}

/// Processes of a cluster say what they do, commands only what goes wrong.
fn begin_log(command: &Command) {
    let (level, whose) = match command {
        Command::Worker(worker) => ("info", Whose::Worker(&worker.args)),
        Command::Head(_) => ("info", Whose::Process("head")),
        Command::Node(_) => ("info", Whose::Process("node")),
        Command::Entrypoint(_) => ("info", Whose::Process("entrypoint")),
        _ => ("warn", Whose::Process("helio")),
    };
    logging::init(level, &whose);
}

fn one_thread() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the I/O runtime")
}

/// Two: the control plane is light, and ranks want the cores.
fn many_threads() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().context("cannot start the I/O runtime")
}

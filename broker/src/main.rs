//! The process: arguments, configuration, runtime, exit code.

use std::process::ExitCode;

use anyhow::Context;
use chronik_broker::config::Args;
use chronik_telemetry::process::{EXIT_CONFIG, run};
use clap::Parser;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub fn main() -> ExitCode {
    let args = Args::parse();
    let check_config = args.check_config;
    let config = match args.load() {
        Ok(config) => config,
        Err(why) => {
            eprintln!("chronik-broker: {why}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if check_config {
        return ExitCode::SUCCESS;
    }
    let telemetry = config.telemetry.clone();
    let worker_threads = config.worker_threads;
    run(
        "chronik-broker",
        &telemetry,
        worker_threads,
        |stop| async move {
            let running = chronik_broker::start(config)
                .await
                .context("cannot start")?;
            running.run_until(stop).await
        },
    )
}

//! The process: arguments, configuration, runtime, exit code.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use chronik_controller::config::{Args, Config, Task};
use chronik_telemetry::process::{EXIT_CONFIG, run};
use clap::Parser;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args = Args::parse();
    let check_config = args.check_config;
    let task = args.task.clone();
    let config = match args.load() {
        Ok(config) => config,
        Err(why) => {
            eprintln!("chronik-controller: {why}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if check_config {
        return ExitCode::SUCCESS;
    }
    if let Some(Task::Restore { from }) = task {
        return restore(&config, &from);
    }
    let telemetry = config.telemetry.clone();
    let worker_threads = config.worker_threads;
    run(
        "chronik-controller",
        &telemetry,
        worker_threads,
        |stop| async move {
            let running = chronik_controller::start(config)
                .await
                .context("cannot start")?;
            running.run_until(stop).await
        },
    )
}

/// Makes the data folder from a backup. There are no logs for this: a person waits for the answer.
fn restore(config: &Config, from: &Path) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let restored = runtime
        .context("cannot start the async runtime")
        .and_then(|runtime| runtime.block_on(chronik_controller::backup::restore(config, from)));
    match restored {
        Ok(restored) => {
            let text = format!(
                "controller {} has cluster {} at revision {} in {}: {} topics, from backup {}.\n\
                 Restore the other controllers from the same file, then start all of them.\n",
                config.controller_id,
                restored.cluster_id,
                restored.revision,
                config.data_dir.display(),
                restored.topic_count,
                restored.backup_id,
            );
            // It is done, also where nobody reads it.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("chronik-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! `chronik dev`: a whole cluster on this machine, every service a process of its own.
//!
//! Invariants: it says "up" only when clients are served; when it ends, in any way, its processes
//! end; started again on the same folder it is the same cluster with its data.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

mod layout;
mod ports;

mod lock;
mod process;
mod ready;
mod report;
mod service_config;

use layout::{Layout, Wanted};
use lock::FolderLock;
use ports::Ports;
use process::{ProcessSpec, Processes, Role, describe_exit, last_lines};
use report::Report;
use service_config::{Service, Telemetry};

/// A start that takes longer has failed, and nobody is served by waiting on.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// How long a start may take before its progress is told, and how often.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(3);
const LOG_LINES_SHOWN: usize = 12;

#[derive(Args)]
pub struct DevArguments {
    /// Controllers: 1, 3 or 5. Fixed once the data folder exists. [default: 3]
    #[arg(long, value_name = "N", value_parser = odd_count)]
    controllers: Option<u16>,
    /// Brokers. More may be added later, never fewer. [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    brokers: Option<u16>,
    /// Gateways, each with one Kafka endpoint per broker. [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=20))]
    gateways: Option<u16>,
    /// Folder for all data, configs and logs.
    #[arg(long, value_name = "FOLDER", default_value = "./data")]
    data_dir: PathBuf,
    /// First Kafka endpoint; the others follow it. 0: free ports, kept for the next start.
    /// [default: 9092]
    #[arg(long, value_name = "PORT")]
    kafka_port: Option<u16>,
    /// REST API of controller 1. 0: a free port, kept for the next start. [default: 8080]
    #[arg(long, value_name = "PORT")]
    rest_port: Option<u16>,
    /// Send traces there: an OTLP gRPC endpoint such as http://127.0.0.1:4317.
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// Fraction of client requests to trace, 0 to 1. Without it: the services' default.
    #[arg(long, value_name = "RATIO", value_parser = ratio)]
    trace_sample_ratio: Option<f64>,
    /// Print JSON lines for programs: one when all is up, with addresses, pids and files, then one
    /// for each process that ends.
    #[arg(long)]
    json: bool,
}

fn odd_count(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(count @ (1 | 3 | 5)) => Ok(count),
        _ => Err("expected 1, 3 or 5".to_owned()),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

/// SIGINT, SIGTERM and SIGHUP: each asks to stop.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl StopSignals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Safe to drop and call again.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

pub async fn run(arguments: DevArguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut signals = StopSignals::listen().context("cannot listen for signals")?;
    let binaries = find_binaries()?;
    let folders = ["config", "logs"].map(|name| arguments.data_dir.join(name));
    for folder in &folders {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}; check --data-dir", folder.display()))?;
    }
    let data_dir = arguments
        .data_dir
        .canonicalize()
        .with_context(|| format!("cannot resolve {}", arguments.data_dir.display()))?;
    let _lock = FolderLock::take(&data_dir)?;
    // The reservations last as long as this function: see `ports`.
    let mut ports = Ports::default();
    let layout = plan_layout(&arguments, &data_dir, &mut ports)?;
    let telemetry = Telemetry {
        otlp_endpoint: arguments.otlp_endpoint.clone(),
        trace_sample_ratio: arguments.trace_sample_ratio,
    };
    let services = service_config::services(&layout, &data_dir, &telemetry)?;
    let report = Report::new(arguments.json, data_dir);

    let mut processes = Processes::new();
    let outcome = bring_up(&services, &binaries, &mut processes, &mut signals, &report).await;
    match outcome {
        Ok(true) => report.up(&services, &processes, started.elapsed()),
        Ok(false) => return stop(processes, signals, &report).await,
        Err(error) => {
            // The cause of the failed start counts, whatever the stop says.
            if let Err(stop_error) = stop(processes, signals, &report).await {
                eprintln!("{stop_error:#}");
            }
            return Err(error);
        }
    }
    loop {
        tokio::select! {
            () = signals.next() => return stop(processes, signals, &report).await,
            (spec, status) = processes.next_exit() => {
                report.exited(&spec, &describe_exit(status), &last_lines(&spec.log, LOG_LINES_SHOWN));
                if !processes.any_running() {
                    bail!("every process has ended");
                }
            }
        }
    }
}

/// Starts everything and waits until it serves. False: asked to stop meanwhile.
async fn bring_up(
    services: &[Service],
    binaries: &Path,
    processes: &mut Processes,
    signals: &mut StopSignals,
    report: &Report,
) -> anyhow::Result<bool> {
    for service in services {
        std::fs::write(&service.config, &service.toml)
            .with_context(|| format!("cannot write {}", service.config.display()))?;
        processes.start(ProcessSpec {
            name: service.name.clone(),
            role: service.role,
            binary: binaries.join(binary_name(service.role)),
            config: service.config.clone(),
            log: service.log.clone(),
        })?;
    }
    let mut told = Instant::now();
    let mut last_missing = Vec::new();
    let ready = ready::wait_until_ready(services, |missing| {
        last_missing = missing.to_vec();
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            report.progress(missing);
        }
    });
    tokio::select! {
        () = ready => return Ok(true),
        () = signals.next() => return Ok(false),
        (spec, status) = processes.next_exit() => {
            let lines = last_lines(&spec.log, LOG_LINES_SHOWN).join("\n  ");
            bail!(
                "{} ended during the start: {}; the end of its log {}:\n  {lines}",
                spec.name,
                describe_exit(status),
                spec.log.display()
            );
        }
        () = tokio::time::sleep(START_DEADLINE) => {}
    }
    bail!(
        "not up after {} s, still waiting for {}; see {}",
        START_DEADLINE.as_secs(),
        last_missing.join(", "),
        report.logs().display()
    );
}

/// Gateways first, so that clients see closed connections and not errors; controllers last, since
/// brokers hand their partitions over through them. A second signal kills what is left.
async fn stop(
    mut processes: Processes,
    mut signals: StopSignals,
    report: &Report,
) -> anyhow::Result<()> {
    if !processes.any_running() {
        return Ok(());
    }
    report.stopping();
    let in_order = async {
        for role in [Role::Gateway, Role::Broker, Role::Controller] {
            for name in processes.stop_role(role).await {
                report.killed(&name);
            }
        }
    };
    let stopped = tokio::select! {
        () = in_order => true,
        () = signals.next() => false,
    };
    if !stopped {
        processes.kill_all().await;
        bail!("stopped at once by a second signal; the services recover at the next start");
    }
    report.stopped();
    Ok(())
}

fn plan_layout(
    arguments: &DevArguments,
    data_dir: &Path,
    ports: &mut Ports,
) -> anyhow::Result<Layout> {
    let path = data_dir.join("cluster.toml");
    let kept = match std::fs::read_to_string(&path) {
        Ok(text) => Some(toml::from_str(&text).with_context(|| {
            format!(
                "{} cannot be understood; mend it, or take another --data-dir",
                path.display()
            )
        })?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    };
    let wanted = Wanted {
        controllers: arguments.controllers,
        brokers: arguments.brokers,
        gateways: arguments.gateways,
        kafka_port: arguments.kafka_port,
        rest_port: arguments.rest_port,
    };
    let layout = Layout::plan(kept.clone(), wanted, ports)?;
    if kept.as_ref() != Some(&layout) {
        // Written beside and renamed: a crash leaves the old file or the new one.
        let text = format!(
            "# Kept by `chronik dev`: the ports of this cluster, the same at every start.\n{}",
            toml::to_string(&layout)?
        );
        let beside = data_dir.join("cluster.toml.new");
        std::fs::write(&beside, text)
            .and_then(|()| std::fs::rename(&beside, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(layout)
}

fn binary_name(role: Role) -> String {
    format!("chronik-{}", role.name())
}

/// The services' binaries are where this one is.
fn find_binaries() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let folder = own.parent().context("a program is in a folder")?.to_owned();
    for role in [Role::Controller, Role::Broker, Role::Gateway] {
        let binary = folder.join(binary_name(role));
        if !binary.is_file() {
            bail!(
                "{} does not exist; build the services first: make run",
                binary.display()
            );
        }
    }
    Ok(folder)
}

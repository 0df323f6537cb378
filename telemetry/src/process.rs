//! The life of a service process: logging and tracing set up, a runtime, signals, an exit code.
//!
//! Invariant: a panic in any task ends the process. A half-dead service that still answers is
//! worse than one that is restarted.

use std::process::ExitCode;
use std::time::Duration;

use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, TelemetryConfig};
use crate::trace;

/// Exit code for a configuration that cannot be used (`EX_USAGE` of sysexits.h).
pub const EXIT_CONFIG: u8 = 64;
/// With less, brokers open and close the files of segments more often than they should.
const OPEN_FILES_WANTED: u64 = 4_096;
/// How long the last spans may take to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a service until it ends by itself or a signal asks it to.
///
/// The first SIGINT or SIGTERM cancels the token, and `service_main` is expected to return soon;
/// a second one exits at once. `worker_threads` 1 runs everything on one thread, which is the
/// cheapest way to use one core; 0 means one thread per core.
pub fn run<F, Fut>(
    service: &'static str,
    telemetry: &TelemetryConfig,
    worker_threads: usize,
    service_main: F,
) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    init_logging(telemetry);
    abort_on_panic();
    disable_huge_pages();
    raise_open_files_limit();
    let runtime = match build_runtime(worker_threads) {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    let provider = {
        // The OTLP client looks for a runtime when it is built.
        let _entered = runtime.enter();
        match trace::init(service, telemetry.otlp_endpoint.as_deref()) {
            Ok(provider) => provider,
            Err(error) => {
                error!(%error, "cannot set up trace export; check telemetry.otlp-endpoint");
                return ExitCode::from(EXIT_CONFIG);
            }
        }
    };
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        // Listened to before anything is opened, which may take a while and holds the only thread: a
        // signal would end the process where it stands.
        match listen() {
            Ok(signals) => drop(tokio::spawn(cancel_on_signal(signals, stop.clone()))),
            Err(error) => error!(%error, "cannot listen to signals: stop the process with SIGKILL"),
        }
        service_main(stop).await
    });
    flush_spans(&runtime, provider);
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => {
            info!(service, "stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!(service, error = format!("{error:#}"), "stopped by an error");
            ExitCode::FAILURE
        }
    }
}

fn build_runtime(worker_threads: usize) -> std::io::Result<Runtime> {
    let mut builder = match worker_threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    if worker_threads > 1 {
        builder.worker_threads(worker_threads);
    }
    builder.enable_all().build()
}

/// Every Raft group keeps a few large queues that are hardly touched; with huge pages the first
/// touch of each costs 2 MiB (measured: 300 idle replicas took 670 MiB with, 90 MiB without).
fn disable_huge_pages() {
    #[cfg(target_os = "linux")]
    // SAFETY: PR_SET_THP_DISABLE takes plain numbers and only changes how this process's later
    // page faults are served.
    if unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } != 0 {
        info!("cannot switch huge pages off: idle partitions will take more memory");
    }
}

/// How many files and sockets this process may have open at a time.
pub fn open_files_limit() -> u64 {
    // What cannot be asked for is taken for little.
    limits().map_or(256, |limits| limits.rlim_cur)
}

/// The soft and the hard limit of open files.
fn limits() -> std::io::Result<libc::rlimit> {
    let mut limits = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure may be written to for the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limits) } {
        0 => Ok(limits),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn set_limits(limits: libc::rlimit) -> std::io::Result<()> {
    // SAFETY: the structure is read for the call.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limits) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Every process may have as many files open as its owner allows: the usual limit of 1,024 is for programs
/// that use select(2), and a broker reaches it with a few hundred partitions.
fn raise_open_files_limit() {
    let raised = limits().and_then(|mut limits| {
        limits.rlim_cur = limits.rlim_max;
        set_limits(limits)
    });
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files");
    }
    let limit = open_files_limit();
    if limit < OPEN_FILES_WANTED {
        warn!(
            limit,
            wanted = OPEN_FILES_WANTED,
            "few files may be open at a time; raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        );
    }
}

fn init_logging(telemetry: &TelemetryConfig) {
    let filter =
        EnvFilter::try_new(&telemetry.log_filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // Fails only where a subscriber is set already, as in tests that start several services.
    let _ = match telemetry.log_format {
        LogFormat::Text => subscriber.with_ansi(false).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
}

fn abort_on_panic() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        error!(%panic, "a task panicked: the process stops");
        std::process::abort();
    }));
}

/// SIGINT and SIGTERM, from now on.
fn listen() -> std::io::Result<(Signal, Signal)> {
    let interrupt = signal(SignalKind::interrupt())?;
    Ok((interrupt, signal(SignalKind::terminate())?))
}

async fn cancel_on_signal(
    (mut interrupt, mut terminate): (Signal, Signal),
    stop: CancellationToken,
) {
    for again in [false, true] {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        info!(signal = name, "asked to stop");
        stop.cancel();
        if again {
            std::process::exit(130);
        }
    }
}

/// Sends the last spans. `shutdown` blocks on a thread that needs the runtime to go on, so it runs
/// beside it.
fn flush_spans(runtime: &Runtime, provider: Option<SdkTracerProvider>) {
    let Some(provider) = provider else { return };
    let flushed = runtime.block_on(async {
        let shutdown =
            tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH_TIMEOUT));
        tokio::time::timeout(FLUSH_TIMEOUT * 2, shutdown).await
    });
    if !matches!(flushed, Ok(Ok(Ok(())))) {
        info!("the last spans could not be sent");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_raised_to_what_is_allowed() {
        let mut limit = limits().unwrap();
        limit.rlim_cur = limit.rlim_max.min(200);
        set_limits(limit).unwrap();
        assert_eq!(open_files_limit(), limit.rlim_cur);
        raise_open_files_limit();
        assert_eq!(open_files_limit(), limit.rlim_max);
    }
}

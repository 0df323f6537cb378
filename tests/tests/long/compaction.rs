//! Compaction of a log that is written: it keeps to its rate, and writers do not wait for it.

use std::time::{Duration, Instant};

use chronik_tests::cluster::{BROKERS, Cluster, Options};
use chronik_tests::figures::{Allowance, report};
use chronik_tests::log_files;
use chronik_tests::probe::{self, latencies, now, p99};
use chronik_tests::tools::{kafka_tool, kcat, run_ok};
use chronik_tests::wait::{holds, measure_over, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(300);
const BASELINE: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
const KEYS: u64 = 100;
/// Of 1 KiB each.
const RECORDS: u64 = 128 * 1024;
/// Read and written by compaction on each broker.
const LIMIT_BYTES_PER_SECOND: u64 = 12_000_000;
/// How many times its quiet value the p99 of writes to the same partition may be.
const P99_GOAL: f64 = 2.0;

fn compactions(cluster: &Cluster, broker: &str) -> Result<f64, String> {
    cluster.metric(broker, "chronik_broker_compactions_total")
}

#[test]
fn compaction_keeps_to_its_rate_and_writers_do_not_wait_for_it() {
    let limit = LIMIT_BYTES_PER_SECOND.to_string();
    let setting =
        |(name, value): (&str, &str)| (format!("CHRONIK_BROKER_LOG__{name}"), value.to_owned());
    let settings = [
        ("RETENTION_CHECK_INTERVAL_MS", "500"),
        ("COMPACTION_BYTES_PER_SECOND", &limit),
    ];
    let options = Options {
        alone: true,
        environment: settings.map(setting).to_vec(),
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("compaction", options);
    let rest = cluster.rest();
    let configs = json!({"cleanup.policy": "compact", "segment.bytes": "8388608",
        "min.cleanable.dirty.ratio": "0.5", "min.compaction.lag.ms": "3600000",
        "min.insync.replicas": "2"});
    rest.create_topic("latest", 1, 3, configs);
    rest.wait_until_healthy("latest", DEADLINE);
    let filler = "x".repeat(1000);
    let record = |number| format!("key-{:03}\t{number:08} {filler}\n", number % KEYS);
    let input: String = (0..RECORDS).map(record).collect();
    let bootstrap = cluster.bootstrap();
    let to_latest = [
        "-P", "-b", &bootstrap, "-t", "latest", "-p", "0", "-K", "\t",
    ];
    run_ok(
        &mut kcat(&[&to_latest[..], &["-X", "acks=all"]].concat()),
        &input,
        DEADLINE,
    );
    let before_bytes = log_files::size(&cluster, BROKERS[0]);
    assert!(before_bytes > 100 * MIB, "{before_bytes} bytes");

    let probe = probe::start(&cluster, "latest", 1);
    let quiet = now();
    measure_over(BASELINE);
    for broker in BROKERS {
        assert_eq!(compactions(&cluster, broker), Ok(0.0), "{broker}");
    }
    let began_at = now();
    let began = Instant::now();
    let alter = [
        "--bootstrap-server",
        &bootstrap,
        "--alter",
        "--topic",
        "latest",
        "--add-config",
        "min.compaction.lag.ms=0",
    ];
    let mut alter = kafka_tool("kafka.admin.ConfigCommand", &alter);
    run_ok(&mut alter, "", DEADLINE);
    for broker in BROKERS {
        wait_for(&format!("{broker} to compact"), DEADLINE, || {
            let (bytes, runs) = (
                log_files::size(&cluster, broker),
                compactions(&cluster, broker)?,
            );
            let is_done = runs >= 1.0 && bytes < before_bytes / 4;
            holds(is_done, format!("{runs} runs, {bytes} bytes"))
        });
    }
    let took = began.elapsed();
    let ended_at = now();
    let lines = probe.finish(DEADLINE);
    let before = latencies(&lines, quiet..began_at);
    let meanwhile = latencies(&lines, began_at..ended_at);
    let max = |sorted: &[f64]| sorted.last().copied().unwrap_or_default();
    report(&format!(
        "compaction of {} MiB on each of three brokers in {:.1} s, at no more than {:.0} MB/s; writes to the partition \
         beside it: p99 {:.1} ms, max {:.1} ms; before: p99 {:.1} ms, max {:.1} ms",
        before_bytes / MIB,
        took.as_secs_f64(),
        LIMIT_BYTES_PER_SECOND as f64 / 1e6,
        p99(&meanwhile),
        max(&meanwhile),
        p99(&before),
        max(&before),
    ));
    // It has to read all that is sealed, at least once.
    let least = (before_bytes - 16 * MIB) as f64 / LIMIT_BYTES_PER_SECOND as f64;
    assert!(
        took.as_secs_f64() >= least,
        "{took:?}, at least {least} s were expected"
    );
    Allowance::of_this_run().hold(
        "compaction: p99 of writes beside it, in times of before",
        p99(&meanwhile) / p99(&before),
        P99_GOAL,
    );
    cluster.assert_no_panic();
    cluster.stop();
}

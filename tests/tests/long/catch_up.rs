//! A replica that missed a gibibyte: how fast it comes back, and what its clients feel of it.

use std::time::{Duration, Instant};

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::figures::{Allowance, report};
use chronik_tests::ledger::produce;
use chronik_tests::probe::{self, latencies, now, p99};
use chronik_tests::wait::measure_over;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(300);
const BASELINE: Duration = Duration::from_secs(15);
const MISSED_BYTES: u64 = 1 << 30;
/// Seconds per gigabyte, so that less is better: 100 MB/s.
const RATE_GOAL: f64 = 10.0;
/// How many times its quiet value the foreground's p99 may be.
const P99_GOAL: f64 = 2.0;

#[test]
fn a_replica_that_missed_a_gibibyte_catches_up_beside_its_clients() {
    let options = Options {
        alone: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("catch-up", options);
    let rest = cluster.rest();
    rest.create_topic("bulk", 4, 3, json!({"min.insync.replicas": "2"}));
    rest.create_topic("front", 2, 3, json!({"min.insync.replicas": "2"}));
    rest.wait_until_healthy("bulk", DEADLINE);
    rest.wait_until_healthy("front", DEADLINE);
    cluster.kill_9("broker-3");
    let records = (MISSED_BYTES / 1024).to_string();
    let arguments = ["-partitions", "4", "-size", "1024", "-timeout", "290s"];
    let mut arguments = arguments.to_vec();
    arguments.extend(["-records", &records]);
    let missed = produce(&cluster, "bulk", &arguments, DEADLINE);
    missed.assert_all_acked(MISSED_BYTES / 1024);

    let probe = probe::start(&cluster, "front", 2);
    let quiet = now();
    measure_over(BASELINE);
    let began_at = now();
    let began = Instant::now();
    cluster.start_service("broker-3");
    cluster.wait_until_ready("broker-3", DEADLINE);
    let ready = began.elapsed();
    rest.wait_until_healthy("bulk", DEADLINE);
    let took = began.elapsed();
    let ended_at = now();
    let lines = probe.finish(DEADLINE);
    let before = p99(&latencies(&lines, quiet..began_at));
    let meanwhile = p99(&latencies(&lines, began_at..ended_at));
    let rate = MISSED_BYTES as f64 / took.as_secs_f64();
    report(&format!(
        "a replica that missed 1 GiB: back in the ISR {:.1} s after its start (ready after {:.1} s), {:.0} MB/s; \
         p99 of writes beside it {meanwhile:.1} ms, {before:.1} ms before",
        took.as_secs_f64(),
        ready.as_secs_f64(),
        rate / 1e6
    ));
    // What it holds is what was acknowledged: it and one other serve it all.
    rest.wait_until_healthy("front", DEADLINE);
    cluster.kill_9("broker-1");
    missed.verify(&cluster);
    let allowance = Allowance::of_this_run();
    allowance.hold("catch-up: seconds per gigabyte", 1e9 / rate, RATE_GOAL);
    // A ratio of one run, whatever the machine.
    Allowance::NONE.hold(
        "catch-up: p99 of writes beside it, in times of before",
        meanwhile / before,
        P99_GOAL,
    );
    cluster.assert_no_panic();
    cluster.stop();
}

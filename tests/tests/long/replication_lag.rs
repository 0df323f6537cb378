//! How far followers are behind their leaders at half of the peak rate.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_tests::cluster::{BROKERS, Cluster, Options};
use chronik_tests::figures::{Allowance, report};
use chronik_tests::ledger::produce;
use chronik_tests::rest::Rest;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(180);
const GOAL_MS: f64 = 100.0;
const METRIC: &str = "chronik_broker_replication_seconds_bucket{le=\"";

/// Answers of followers so far by how long they took at most, in milliseconds, over all brokers.
fn answers(cluster: &Cluster) -> BTreeMap<u64, u64> {
    let mut all = BTreeMap::new();
    for broker in BROKERS {
        let http = cluster.service(broker).http.clone();
        let text = Rest::new(vec![http])
            .text("/metrics")
            .expect("a broker answers");
        for line in text.lines() {
            let Some((bound, count)) = line
                .strip_prefix(METRIC)
                .and_then(|rest| rest.split_once("\"} "))
            else {
                continue;
            };
            let bound = match bound {
                "+Inf" => u64::MAX,
                seconds => (seconds.parse::<f64>().expect("a number") * 1000.0) as u64,
            };
            *all.entry(bound).or_default() += count.trim().parse::<u64>().expect("a number");
        }
    }
    all
}

/// The bound, in milliseconds, that at least 99 of 100 answers between the two looks kept.
fn p99_ms(before: &BTreeMap<u64, u64>, after: &BTreeMap<u64, u64>) -> (u64, u64) {
    let since = |bound: &u64| after[bound] - before.get(bound).copied().unwrap_or(0);
    let all = since(&u64::MAX);
    let kept = after.keys().find(|bound| since(bound) * 100 >= all * 99);
    (*kept.expect("the last bound keeps all"), all)
}

#[test]
fn followers_are_hardly_behind_at_half_of_the_peak_rate() {
    let options = Options {
        alone: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("lag", options);
    let rest = cluster.rest();
    for topic in ["peak", "half"] {
        rest.create_topic(topic, 12, 3, json!({"min.insync.replicas": "2"}));
        rest.wait_until_healthy(topic, DEADLINE);
    }
    let load = ["-partitions", "12", "-size", "1024", "-timeout", "170s"];
    let with = |records: u64, rate: u64| -> Vec<String> {
        let (records, rate) = (records.to_string(), rate.to_string());
        let more = ["-records", &records, "-rate", &rate].map(str::to_owned);
        load.map(str::to_owned).into_iter().chain(more).collect()
    };
    let run = |topic: &str, records: u64, rate: u64| {
        let arguments = with(records, rate);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let produced = produce(&cluster, topic, &arguments, DEADLINE);
        produced.assert_all_acked(records);
        produced
    };
    let peak = run("peak", 500_000, 0);
    let peak_rate = peak.acked as f64 / peak.seconds;
    let half = (peak_rate / 2.0) as u64;
    let before = answers(&cluster);
    let produced = run("half", half * 15, half);
    let (p99, count) = p99_ms(&before, &answers(&cluster));
    report(&format!(
        "peak {peak_rate:.0} records/s of 1 KiB; at half of it ({:.0} records/s) 99 % of {count} appends were on a \
         follower's disk within {p99} ms",
        produced.acked as f64 / produced.seconds
    ));
    assert!(count > 1000, "{count} appends");
    let allowance = Allowance::of_this_run();
    allowance.hold("replication lag: p99 in ms", p99 as f64, GOAL_MS);
    produced.verify(&cluster);
    cluster.assert_no_panic();
    cluster.stop();
}

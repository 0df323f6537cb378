//! An upgrade's worth of trouble under load: every broker is restarted in order, one after the other,
//! and then every partition moves.

use std::time::{Duration, Instant};

use chronik_tests::cluster::{Cluster, Options, STOP_BOUND};
use chronik_tests::figures::{Spread, report};
use chronik_tests::ledger::Production;
use chronik_tests::rest::Rest;
use chronik_tests::wait::{holds, wait_for};
use reqwest::Method;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(120);
const PRODUCE_DEADLINE: Duration = Duration::from_secs(600);
const RECORDS: u64 = 1_000_000;
const BROKERS: [i64; 4] = [1, 2, 3, 4];

/// Every partition gets replicas of which one is new.
fn moved(replicas: &[i64]) -> Vec<i64> {
    let new = BROKERS.iter().find(|broker| !replicas.contains(broker));
    let kept = &replicas[1..];
    new.into_iter().chain(kept).copied().collect()
}

fn restart_in_order(cluster: &mut Cluster, rest: &Rest, broker: i64) -> Duration {
    let name = format!("broker-{broker}");
    let took = cluster.stop_service(&name);
    cluster.start_service(&name);
    cluster.wait_until_ready(&name, DEADLINE);
    rest.wait_until_healthy("rolled", DEADLINE);
    took
}

fn move_all(rest: &Rest, targets: &[Vec<i64>]) {
    let partition = |(index, replicas): (usize, &Vec<i64>)| json!({"topic": "rolled", "partition": index, "replicas": replicas});
    let partitions: Vec<Value> = targets.iter().enumerate().map(partition).collect();
    let body = json!({ "partitions": partitions });
    let answer = rest.ask(Method::POST, "/v1/reassignments", Some(&body));
    assert_eq!(answer.expect("a controller answers").status, 200);
    wait_for("every partition to be moved", DEADLINE, || {
        let partitions = rest.partitions("rolled")?;
        let at: Vec<Vec<i64>> = partitions.iter().map(|p| p.replicas.clone()).collect();
        let healthy = partitions.iter().all(|partition| partition.is_healthy());
        holds(at == targets && healthy, format!("{partitions:?}"))
    });
}

#[test]
fn a_million_records_go_through_a_rolling_restart_and_a_move_of_every_partition() {
    let options = Options {
        brokers: 4,
        alone: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("rolling", options);
    let rest = cluster.rest();
    rest.create_topic("rolled", 12, 3, json!({"min.insync.replicas": "2"}));
    rest.wait_until_healthy("rolled", DEADLINE);
    let arguments = ["-partitions", "12", "-records", "5000000", "-until-told"];
    let arguments = [&arguments[..], &["-rate", "10000", "-timeout", "590s"]].concat();
    let production = Production::start(&cluster, "rolled", &arguments);
    production.wait_until_acked(50_000, PRODUCE_DEADLINE);

    let stops: Vec<Duration> = BROKERS
        .iter()
        .map(|broker| restart_in_order(&mut cluster, &rest, *broker))
        .collect();
    let before = rest.partitions("rolled").expect("REST answers");
    let targets: Vec<Vec<i64>> = before.iter().map(|p| moved(&p.replicas)).collect();
    let began = Instant::now();
    move_all(&rest, &targets);
    let moving = began.elapsed();
    production.wait_until_acked_more(10_000, PRODUCE_DEADLINE);
    production.wait_until_acked(RECORDS, PRODUCE_DEADLINE);
    let produced = production.finish(PRODUCE_DEADLINE);
    let verdict = produced.verify(&cluster);
    let stops = Spread::of(stops);
    report(&format!(
        "{} records through a rolling restart of 4 brokers (orderly stops: {stops}) and a move of all \
         partitions ({:.1} s): {verdict}",
        produced.acked,
        moving.as_secs_f64()
    ));
    produced.assert_at_least_acked(RECORDS);
    assert!(stops.max < STOP_BOUND, "{stops}");
    cluster.assert_no_panic();
    cluster.stop();
}

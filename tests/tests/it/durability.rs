//! What was acknowledged is there, once and in order, whatever was killed meanwhile.

use std::time::Duration;

use chronik_tests::cluster::{Cluster, STOP_BOUND};
use chronik_tests::figures::report;
use chronik_tests::ledger::Production;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const PRODUCE_DEADLINE: Duration = Duration::from_secs(300);
const MILLION: u64 = 1_000_000;

#[test]
fn a_million_acked_records_survive_a_leader_killed_and_restarted_in_the_middle() {
    let mut cluster = Cluster::start("million");
    let rest = cluster.rest();
    rest.create_topic("million", 6, 3, json!({"min.insync.replicas": "2"}));
    let production = Production::start(
        &cluster,
        "million",
        &[
            "-partitions",
            "6",
            "-records",
            "1000000",
            "-timeout",
            "290s",
        ],
    );
    production.wait_until_acked(MILLION / 4, PRODUCE_DEADLINE);
    let leader = rest
        .partition("million", 0)
        .expect("REST answers")
        .leader
        .expect("a leader");
    let broker = format!("broker-{leader}");
    cluster.kill_9(&broker);
    production.wait_until_acked(MILLION / 2, PRODUCE_DEADLINE);
    cluster.start_service(&broker);
    let produced = production.finish(PRODUCE_DEADLINE);
    let verdict = produced.verify(&cluster);
    report(&format!(
        "leader killed among {MILLION} records, {:.0} records/s: {verdict}",
        produced.acked as f64 / produced.seconds
    ));
    // An idempotent producer that may retry without limit is told success in the end.
    produced.assert_all_acked(MILLION);
    // The killed broker comes back as a full replica: with it and one other, all is still there.
    rest.wait_until_healthy("million", DEADLINE);
    let other = if leader == 1 { "broker-2" } else { "broker-1" };
    cluster.kill_9(other);
    produced.verify(&cluster);
    cluster.start_service(other);
    rest.wait_until_healthy("million", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_million_acked_records_survive_kill_9_of_every_process_at_once() {
    let mut cluster = Cluster::start("kill-all");
    cluster
        .rest()
        .create_topic("kill-all", 6, 3, json!({"min.insync.replicas": "2"}));
    let production = Production::start(
        &cluster,
        "kill-all",
        &[
            "-partitions",
            "6",
            "-records",
            "1000000",
            "-timeout",
            "290s",
        ],
    );
    production.wait_until_acked(MILLION / 3, PRODUCE_DEADLINE);
    cluster.kill_9_everything();
    cluster.launch();
    // The same producer goes on: its sequences have to be known after the restart.
    let produced = production.finish(PRODUCE_DEADLINE);
    let verdict = produced.verify(&cluster);
    report(&format!(
        "all processes killed among {MILLION} records: {verdict}"
    ));
    produced.assert_all_acked(MILLION);
    // Once more, with nobody writing, and a stop in order after that.
    cluster.kill_9_everything();
    cluster.launch();
    produced.verify(&cluster);
    cluster.stop();
    cluster.launch();
    produced.verify(&cluster);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_gateway_killed_under_load_loses_and_repeats_nothing() {
    let mut cluster = Cluster::start("gateway-kill");
    cluster.rest().create_topic("through", 6, 3, json!({}));
    let production = Production::start(
        &cluster,
        "through",
        &["-partitions", "6", "-records", "300000", "-timeout", "290s"],
    );
    for stage in 1..=3 {
        production.wait_until_acked(stage * 50_000, PRODUCE_DEADLINE);
        cluster.kill_9("gateway-1");
        cluster.start_service("gateway-1");
    }
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_all_acked(300_000);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_broker_stopped_in_order_hands_over_without_an_error_to_clients() {
    let mut cluster = Cluster::start("handover");
    let rest = cluster.rest();
    rest.create_topic("handover", 12, 3, json!({}));
    rest.wait_until_healthy("handover", DEADLINE);
    let production = Production::start(
        &cluster,
        "handover",
        &[
            "-partitions",
            "12",
            "-records",
            "200000",
            "-rate",
            "20000",
            "-timeout",
            "290s",
        ],
    );
    production.wait_until_acked(40_000, PRODUCE_DEADLINE);
    let took = cluster.stop_service("broker-2");
    report(&format!(
        "orderly stop of a broker under load: {:.2} s",
        took.as_secs_f64()
    ));
    assert!(took < STOP_BOUND, "it took {took:?}");
    let leads: Vec<_> = rest
        .partitions("handover")
        .expect("REST answers")
        .into_iter()
        .filter(|partition| partition.leader == Some(2))
        .collect();
    assert!(
        leads.is_empty(),
        "broker 2 has ended and still leads {leads:?}"
    );
    cluster.start_service("broker-2");
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_all_acked(200_000);
    rest.wait_until_healthy("handover", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn too_few_in_sync_replicas_refuse_acks_all_and_take_it_again_later() {
    let mut cluster = Cluster::start("min-isr");
    let rest = cluster.rest();
    rest.create_topic("strict", 1, 3, json!({"min.insync.replicas": "3"}));
    rest.wait_until_healthy("strict", DEADLINE);
    cluster.kill_9("broker-3");
    chronik_tests::wait::wait_for("the ISR to shrink", DEADLINE, || {
        let partition = rest.partition("strict", 0)?;
        let shrunk = partition.isr == [1, 2] && partition.leader.is_some();
        chronik_tests::wait::holds(shrunk, format!("{partition:?}"))
    });
    let refused = chronik_tests::ledger::produce(
        &cluster,
        "strict",
        &[
            "-partitions",
            "1",
            "-records",
            "10",
            "-retries",
            "2",
            "-idempotent=false",
        ],
        DEADLINE,
    );
    assert_eq!(
        refused.acked, 0,
        "acknowledged with two of three in-sync replicas"
    );
    assert!(
        refused.first_error.contains("NOT_ENOUGH_REPLICAS"),
        "{}",
        refused.first_error
    );
    cluster.start_service("broker-3");
    rest.wait_until_healthy("strict", DEADLINE);
    let mut probe = chronik_tests::tools::franz_go(
        "probe",
        &cluster.bootstrap(),
        &["-topic", "strict", "-count", "5"],
    );
    chronik_tests::tools::run_ok(&mut probe, "", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}

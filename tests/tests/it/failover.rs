//! kill -9 of a partition leader: how long until the next write with acks=all is acknowledged.

use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::figures::{Spread, report};
use chronik_tests::probe::{self, Ack, now};
use chronik_tests::process::Talking;
use chronik_tests::rest::{Partition, Rest};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const ROUNDS: usize = 20;
/// What the README promises: a second, always.
const BOUND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(60);

/// The partition with all replicas in sync, and led by the same broker when looked at twice.
fn settled(rest: &Rest, topic: &str) -> Partition {
    let mut before: Option<Partition> = None;
    wait_for("the partition to be settled", DEADLINE, || {
        let partition = rest.partition(topic, 0)?;
        holds(partition.is_healthy(), format!("{partition:?}"))?;
        // A leader that is about to hand over to the preferred one would be no leader to kill.
        holds(
            partition.leader == partition.replicas.first().copied(),
            format!("{partition:?}"),
        )?;
        if before.as_ref() == Some(&partition) {
            return Ok(partition);
        }
        before = Some(partition);
        Err("seen once".to_owned())
    })
}

#[test]
fn a_killed_leader_is_replaced_within_a_second_in_twenty_rounds() {
    let options = Options {
        alone: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("failover", options);
    let rest = cluster.rest();
    let mut gaps = Vec::new();
    // A partition per broker and its own probe, so that every broker is killed as a leader.
    let topics = ["failover-a", "failover-b", "failover-c"];
    for topic in topics {
        rest.create_topic(topic, 1, 3, json!({"min.insync.replicas": "2"}));
    }
    let probes: Vec<Talking> = topics
        .iter()
        .map(|topic| probe::start(&cluster, topic, 1))
        .collect();
    for round in 0..ROUNDS {
        let topic = topics[round % topics.len()];
        let probe = &probes[round % topics.len()];
        let before = settled(&rest, topic);
        let leader = before.leader.expect("settled means led");
        probe.lines_so_far();
        probe.wait_for_line("an ack before the kill", DEADLINE, Ack::parse);
        let broker = format!("broker-{leader}");
        let process = cluster.service(&broker).process.clone();
        let killed = now();
        process.signal(libc::SIGKILL);
        // The write after the kill: one that was on its way may have been committed before it.
        let ack = probe.wait_for_line("an ack after the kill", DEADLINE, |line| {
            Ack::parse(line).filter(|ack| ack.began >= killed)
        });
        assert_eq!(ack.partition, 0);
        gaps.push(Duration::from_nanos(
            u64::try_from(ack.ended - killed).expect("it is later"),
        ));
        let after = wait_for("REST to show the new leader", DEADLINE, || {
            let after = rest.partition(topic, 0)?;
            let moved = after.leader.is_some() && after.leader != Some(leader);
            holds(moved, format!("{after:?}"))?;
            Ok::<_, String>(after)
        });
        assert!(
            after.leader_epoch > before.leader_epoch,
            "{before:?} {after:?}"
        );
        cluster.kill_9(&broker);
        cluster.start_service(&broker);
        for topic in topics {
            rest.wait_until_healthy(topic, DEADLINE);
        }
    }
    let spread = Spread::of(gaps.clone());
    report(&format!(
        "kill -9 of a leader to the next acked write, {ROUNDS} rounds: {spread}"
    ));
    assert!(spread.max < BOUND, "{spread}, all: {gaps:?}");
    for probe in probes {
        probe.finish(DEADLINE);
    }
    cluster.assert_no_panic();
    cluster.stop();
}

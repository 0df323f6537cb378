//! Followers that rest, and what wakes them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::harness::{
    BROKERS, Cluster, TestBroker, all_in_sync, leaders, others_lead, preferred_leaders,
};
use crate::fake_controller::FakeController;
use crate::replica::engine::EngineStatus;
use crate::test_wait::{stays, until};

impl Cluster {
    /// Waits until the replicas' Raft is open where they lead, and closed everywhere else.
    async fn wait_for_rest(&self) {
        let rests = |broker: &TestBroker| {
            broker.replicas.all().iter().all(|replica| {
                let leads = replica.leadership().borrow().is_leader;
                let status = replica.engine().status();
                status
                    == if leads {
                        EngineStatus::Open
                    } else {
                        EngineStatus::AtRest
                    }
            })
        };
        until("followers rest", || self.brokers.values().all(rests)).await;
    }

    /// How often any replica's Raft was opened.
    fn opened(&self) -> u64 {
        let replicas = self
            .brokers
            .values()
            .flat_map(|broker| broker.replicas.all());
        replicas.map(|replica| replica.engine().opened()).sum()
    }

    fn terms(&self) -> BTreeMap<u64, u64> {
        let replicas = self
            .brokers
            .values()
            .flat_map(|broker| broker.replicas.all());
        let mut terms = BTreeMap::new();
        for replica in replicas {
            let term: &mut u64 = terms.entry(replica.group_id().0).or_default();
            *term = (*term).max(replica.vote().leader_id.term);
        }
        terms
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_rest_and_wake_up_for_records_and_elections() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::tuned(folder.path(), &serving, |replication| {
        replication.follower_rest_after_ms = 200;
    });
    controller.create_topic("t", 6, &BROKERS);
    all_in_sync(controller, "six leaders").await;
    preferred_leaders(controller).await;
    for group in 1..=6 {
        cluster.produce(group, "one").await;
    }
    cluster.wait_for_rest().await;
    // Nothing wakes them by itself: no heartbeat, no retry of a leader whose session rests.
    let opened = cluster.opened();
    stays("they rest", Duration::from_secs(2), || {
        cluster.opened() == opened
    })
    .await;

    for group in 1..=6 {
        cluster.produce(group, "two").await;
    }
    assert!(cluster.opened() >= opened + 6, "a majority has it");
    cluster.wait_for_rest().await;

    let leader = cluster.produce(1, "three").await;
    cluster.wait_for_rest().await;
    cluster.kill(leader);
    let begun = Instant::now();
    cluster.produce(1, "four").await;
    println!(
        "from the death of a leader whose followers rest to the next acked write: {:?}",
        begun.elapsed()
    );
    assert!(begun.elapsed() < Duration::from_secs(15));
    let next = cluster.produce(1, "five").await;
    let expected = ["one", "two", "three", "four", "five"];
    assert_eq!(cluster.read(next, 1, 5).await, expected);
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_comes_back_disturbs_no_leader() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::tuned(folder.path(), &serving, |replication| {
        replication.follower_rest_after_ms = 200;
    });
    controller.keep_leaders();
    controller.create_topic("t", 6, &BROKERS);
    all_in_sync(controller, "six leaders").await;
    for group in 1..=6 {
        cluster.produce(group, "one").await;
    }
    // All six are led by the two that stay.
    let leader = leaders(controller)[0].unwrap();
    cluster.kill(leader);
    controller
        .wait_for("others lead", |image| others_lead(image, leader))
        .await;
    cluster.wait_for_rest().await;
    let before = cluster.terms();
    cluster.start_broker(leader, None);
    all_in_sync(controller, "it is back").await;
    cluster.wait_for_rest().await;
    assert_eq!(cluster.terms(), before, "no election");
    cluster.end();
}

//! Replicas that rest, and what wakes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::BrokerId;

use super::harness::{
    BROKERS, Cluster, TestBroker, all_in_sync, leaders, others_lead, preferred_leaders,
};
use crate::fake_controller::{FakeController, Serving};
use crate::peers::stand::{Campaign, Stood, stand};
use crate::replica::engine::EngineStatus;
use crate::test_wait::{stays, until};

impl Cluster {
    fn that_rests_soon(folder: &Path, controller: &Serving) -> Cluster {
        Cluster::tuned(folder, controller, |replication| {
            replication.rest_after_ms = 200;
        })
    }

    /// Waits until everybody's Raft is closed.
    async fn wait_for_rest(&self) {
        let rests = |broker: &TestBroker| {
            let replicas = broker.replicas.all();
            let mut states = replicas.iter().map(|replica| replica.engine().status());
            states.all(|status| status == EngineStatus::AtRest)
        };
        until("all rest", || self.brokers.values().all(rests)).await;
    }

    /// How often any replica's Raft was opened.
    fn opened(&self) -> u64 {
        self.brokers.keys().map(|id| self.opened_by(*id)).sum()
    }

    fn opened_by(&self, broker: i32) -> u64 {
        let replicas = self.brokers[&broker].replicas.all();
        let opened = replicas.iter().map(|replica| replica.engine().opened());
        opened.sum()
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
async fn all_rest_and_wake_up_for_records() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::that_rests_soon(folder.path(), &serving);
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
    let opened = cluster.opened() - cluster.opened_by(leader);
    cluster.kill(leader);
    // The election itself opens nothing.
    let is_led = |image: &ClusterImage| others_lead(image, leader);
    controller.wait_for("others lead", is_led).await;
    assert_eq!(cluster.opened(), opened);
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
    let mut cluster = Cluster::that_rests_soon(folder.path(), &serving);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_at_rest_learns_of_a_higher_term_by_asking_whether_it_could_win() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let cluster = Cluster::that_rests_soon(folder.path(), &serving);
    controller.keep_leaders();
    controller.create_topic("t", 1, &BROKERS);
    all_in_sync(controller, "a leader").await;
    let leader = cluster.produce(1, "one").await;
    cluster.wait_for_rest().await;
    let [asking, ahead] = BROKERS
        .into_iter()
        .filter(|broker| *broker != leader)
        .collect::<Vec<i32>>()[..]
    else {
        panic!("three brokers");
    };
    let taken = cluster.replica_of(ahead, 1).engine().stand(20).await;
    assert_eq!(taken.unwrap().vote.leader_id.term, 21);
    let replica = cluster.replica_of(asking, 1);
    let campaign = Campaign::Elect { ask_first: true };
    let peers = &cluster.brokers[&asking].peers;
    let outcome = stand(peers, &replica, campaign, Duration::from_secs(20)).await;
    assert_eq!(outcome, Stood::Lost);
    assert!(replica.vote().leader_id.term >= 21, "{}", replica.vote());
    let next = cluster.produce(1, "two").await;
    assert_eq!(cluster.read(next, 1, 2).await, ["one", "two"]);
    cluster.end();
}

/// What a follower was told last may be lost without that a link breaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_at_rest_speaks_to_followers_that_may_not_know_what_is_committed() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let cluster = Cluster::that_rests_soon(folder.path(), &serving);
    controller.keep_leaders();
    controller.create_topic("t", 1, &BROKERS);
    all_in_sync(controller, "a leader").await;
    let leader = cluster.replica_of(cluster.produce(1, "one").await, 1);
    cluster.wait_for_rest().await;
    let behind = || leader.engine().behind_at_rest(&BTreeSet::new()).len();
    until("all know what is committed", || behind() == 0).await;
    let opened = cluster.opened();
    leader
        .engine()
        .unsure_at_rest(&BROKERS.map(BrokerId).into());
    assert_eq!(behind(), 2);
    until("both followers are spoken to", || behind() == 0).await;
    assert_eq!(cluster.opened(), opened);
    cluster.end();
}

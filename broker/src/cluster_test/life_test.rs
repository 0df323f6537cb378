//! Brokers that die, stop, come back and lose topics, with real elections between them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use super::harness::{
    BROKERS, Cluster, all_in_sync, all_registered, leaders, others_lead, preferred_leaders,
};
use crate::fake_controller::FakeController;
use crate::test_wait::{until, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_survive_the_death_of_their_leader() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    all_registered(controller).await;

    let begun = Instant::now();
    controller.create_topic("t", 6, &BROKERS);
    all_in_sync(controller, "six leaders").await;
    println!("6 partitions have leaders after {:?}", begun.elapsed());

    let mut wrote: Vec<String> = Vec::new();
    let mut times = Vec::new();
    for round in 0..3 {
        wrote.push(format!("before {round}"));
        let leader = cluster.produce(1, &wrote[wrote.len() - 1]).await;
        cluster.kill(leader);
        let begun = Instant::now();
        wrote.push(format!("after {round}"));
        cluster.produce(1, &wrote[wrote.len() - 1]).await;
        times.push(begun.elapsed());
        cluster.start_broker(leader, None);
        all_in_sync(controller, "the dead broker is back in every ISR").await;
    }
    println!("from the death of a leader to the next acked write: {times:?}");
    assert!(
        times.iter().all(|time| *time < Duration::from_secs(15)),
        "{times:?}"
    );

    // Leaders spread again.
    preferred_leaders(controller).await;
    let leader = leaders(controller)[0].unwrap();
    // The image may know it a moment before it is ready.
    let leadership = cluster.replica_of(leader, 1).leadership();
    until("it is ready", || leadership.borrow().ready).await;
    assert_eq!(cluster.read(leader, 1, wrote.len()).await, wrote);
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_stops_hands_over_first() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    controller.create_topic("t", 6, &BROKERS);
    all_in_sync(controller, "six leaders").await;
    preferred_leaders(controller).await;
    let group = 1;
    let leader = cluster.produce(group, "one").await;

    let begun = Instant::now();
    cluster.stop_in_order(leader).await;
    println!("a broker stopped in order in {:?}", begun.elapsed());
    controller
        .wait_for("others lead", |image| others_lead(image, leader))
        .await;
    let next = cluster.produce(group, "two").await;
    assert_eq!(cluster.read(next, group, 2).await, vec!["one", "two"]);

    cluster.start_broker(leader, None);
    all_in_sync(controller, "it is back").await;
    preferred_leaders(controller).await;
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_brokers_restart_and_serve_without_any_controller() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = serving.controller.clone();
    let mut cluster = Cluster::start(folder.path(), &serving);
    controller.create_topic("t", 3, &BROKERS);
    all_in_sync(&controller, "three leaders").await;
    for group in 1..=3 {
        cluster.produce(group, &format!("of {group}")).await;
    }
    wait_for_saved_images(folder.path(), controller.image().revision).await;

    drop(serving);
    let addresses: BTreeMap<i32, SocketAddr> =
        BROKERS.iter().map(|id| (*id, cluster.kill(*id))).collect();
    let begun = Instant::now();
    for (id, address) in addresses {
        cluster.start_broker(id, Some(address));
    }
    for group in 1..=3 {
        let leader = cluster.produce(group, "again").await;
        let values = cluster.read(leader, group, 2).await;
        assert_eq!(values, vec![format!("of {group}"), "again".to_owned()]);
    }
    println!(
        "restarted without a controller and writable after {:?}",
        begun.elapsed()
    );
    cluster.end();
}

async fn wait_for_saved_images(folder: &Path, revision: u64) {
    let is_saved = |id: &i32| {
        let folder = folder.join(format!("broker-{id}"));
        let image = crate::controller_client::load_image(&folder).unwrap();
        image.is_some_and(|image| image.revision >= revision)
    };
    until("the image is saved", || BROKERS.iter().all(is_saved)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_of_a_deleted_topic_are_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    controller.create_topic("t", 3, &BROKERS);
    all_in_sync(controller, "three leaders").await;
    let leader = cluster.produce(1, "gone soon").await;
    controller.delete_topic("t");
    wait_until_gone(&cluster, leader).await;
    // Even if it was killed before it had saved that, it comes back without it.
    cluster.kill(leader);
    cluster.start_broker(leader, None);
    wait_until_gone(&cluster, leader).await;
    cluster.end();
}

async fn wait_until_gone(cluster: &Cluster, id: i32) {
    let is_gone = async || (!cluster.replica_exists(id, 1).await).then_some(());
    wait_for("the replica goes", is_gone).await;
}

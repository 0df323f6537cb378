//! Whole brokers on disks that are full, that cannot read and that cannot sync: each goes on with what it
//! still can, and the others with the rest.

use std::io::ErrorKind;
use std::time::Duration;

use chronik_proto::v1::PartitionError;
use chronik_storage::disk::faulty::{Fault, Operation};
use chronik_types::offset::Offset;
use tempfile::TempDir;

use super::harness::{
    BROKERS, Cluster, RESERVE_BYTES, all_in_sync, all_registered, others_lead, preferred_leaders,
};
use crate::fake_controller::{FakeController, Serving};
use crate::test_wait::{until, wait_for};

const GROUP: u64 = 1;
const LEADER: i32 = 1;
const FULL: i32 = 2;
const THIRD: i32 = 3;

/// A partition that broker 1 leads.
struct Scene {
    cluster: Cluster,
    serving: Serving,
    /// Kept for as long as the brokers.
    _folder: TempDir,
}

impl Scene {
    async fn start() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let serving = FakeController::serve().await;
        let controller = &serving.controller;
        let cluster = Cluster::on_faulty_disks(folder.path(), &serving);
        all_registered(controller).await;
        controller.create_topic("t", 1, &BROKERS);
        all_in_sync(controller, "a leader").await;
        preferred_leaders(controller).await;
        Scene {
            cluster,
            serving,
            _folder: folder,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_disk_is_full_votes_for_the_next_leader() {
    let mut scene = Scene::start().await;
    let (cluster, controller) = (&mut scene.cluster, &scene.serving.controller);
    let mut wrote = vec!["with room".to_owned()];
    cluster.produce(GROUP, &wrote[0]).await;

    // Half of its reserve is for what is on its way; less is left.
    let disk = cluster.disks[&FULL].clone();
    let full = cluster.started_replica_of(FULL, GROUP).await.log().clone();
    until("it has all", || full.log_end_offset() == Offset(1)).await;
    cluster.fill_disk(FULL, RESERVE_BYTES / 4).await;
    for number in 0..20 {
        wrote.push(format!("without broker {FULL}, {number}"));
        cluster.produce(GROUP, &wrote[wrote.len() - 1]).await;
    }
    assert_eq!(full.log_end_offset(), Offset(1), "what has no room waits");

    // The leader dies: the third has all, and needs the vote of the full one.
    cluster.kill(LEADER);
    let led = |image: &chronik_types::cluster_image::ClusterImage| {
        let topic = image.topic_by_name("t");
        topic.is_some_and(|topic| topic.partitions[0].leader.is_some_and(|id| id.0 == THIRD))
    };
    controller.wait_for("the third leads", led).await;
    // It cannot commit anything; what was known to be committed is read.
    let all = wrote.len() - 1;
    assert_eq!(cluster.earliest(THIRD, GROUP).await, Some(0));
    assert_eq!(cluster.read(THIRD, GROUP, all).await[..all], wrote[..all]);

    // There is room again: it gets what it missed, and both go on.
    disk.set_capacity(None);
    wrote.push("with room again".to_owned());
    assert_eq!(cluster.produce(GROUP, &wrote[wrote.len() - 1]).await, THIRD);
    assert_eq!(cluster.read(THIRD, GROUP, wrote.len()).await, wrote);
    cluster.start_broker(LEADER, None);
    all_in_sync(controller, "all are back").await;
    scene.cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_on_its_way_when_the_disks_filled_up_comes_to_all() {
    let mut scene = Scene::start().await;
    let (cluster, controller) = (&mut scene.cluster, &scene.serving.controller);
    for other in [LEADER, THIRD] {
        cluster.ways.cut(&[(other, FULL), (FULL, other)]);
    }
    let wrote: Vec<String> = (0..5).map(|number| format!("record {number}")).collect();
    for value in &wrote {
        cluster.produce_at(&[LEADER, THIRD], GROUP, value).await;
    }
    for id in BROKERS {
        cluster.fill_disk(id, RESERVE_BYTES * 3 / 4).await;
    }
    cluster.ways.heal();
    let followed = cluster.replica_of(FULL, GROUP);
    until("the one that was away has all", || {
        followed.high_watermark() == Offset(5)
    })
    .await;
    drop(followed);
    // So any two of them go on, but for new records.
    cluster.kill(LEADER);
    let others = [FULL, THIRD];
    let leader = wait_for("another leader", async || {
        let image = controller.image();
        let leader = image.topic_by_name("t").unwrap().partitions[0].leader?.0;
        others.contains(&leader).then_some(leader)
    })
    .await;
    until_refused(cluster, leader).await;
    assert_eq!(cluster.read(leader, GROUP, wrote.len()).await, wrote);
    scene.cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_full_refuses_records_and_hands_over() {
    let mut scene = Scene::start().await;
    let (cluster, controller) = (&mut scene.cluster, &scene.serving.controller);
    cluster.produce(GROUP, "with room").await;
    cluster.fill_disk(LEADER, RESERVE_BYTES / 4).await;
    until_refused(cluster, LEADER).await;
    assert_eq!(cluster.read(LEADER, GROUP, 1).await, vec!["with room"]);
    // An orderly stop needs no room but the reserve.
    cluster.stop_in_order(LEADER).await;
    controller
        .wait_for("others lead", |image| others_lead(image, LEADER))
        .await;
    cluster.disks[&LEADER].set_capacity(None);
    cluster.start_broker(LEADER, None);
    all_in_sync(controller, "it is back").await;
    scene.cluster.end();
}

async fn until_refused(cluster: &Cluster, id: i32) {
    wait_for("records are refused", async || {
        let answer = cluster.ask_to_produce(id, GROUP, "refused").await;
        (answer == PartitionError::Storage).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leader_cannot_read_comes_back_from_a_peer() {
    let mut scene = Scene::start().await;
    let (cluster, controller) = (&mut scene.cluster, &scene.serving.controller);
    let wrote: Vec<String> = (0..20).map(|number| format!("record {number}")).collect();
    for value in &wrote {
        cluster.produce(GROUP, value).await;
    }
    for id in BROKERS {
        let log = cluster.started_replica_of(id, GROUP).await.log().clone();
        until("all is there and committed", || {
            log.committed() == log.durable_index() && log.log_end_offset() == Offset(20)
        })
        .await;
        tokio::task::spawn_blocking(move || log.roll().unwrap())
            .await
            .unwrap();
    }
    // So that it reads from its disk, not from memory.
    cluster.stop_in_order(LEADER).await;
    let disk = cluster.disks[&LEADER].clone();
    let is_segment = |path: &std::path::PathBuf| path.extension().is_some_and(|e| e == "log");
    let unreadable = disk.paths().into_iter().find(is_segment).unwrap();
    let unreadable = unreadable.to_str().unwrap().to_owned();
    disk.inject(Fault {
        operation: Operation::Read,
        path_contains: unreadable.clone().leak(),
        after: 0,
        error: ErrorKind::Other,
    });
    cluster.start_broker(LEADER, None);
    let log = cluster
        .started_replica_of(LEADER, GROUP)
        .await
        .log()
        .clone();
    // Whoever reads finds it: a client here, the scrub otherwise. It never gets anything wrong.
    let is_found = async || {
        let found = cluster.fetch(LEADER, GROUP, Duration::ZERO).await;
        assert!(found.records.is_empty());
        (log.is_damaged() || !disk.paths().iter().any(|path| path.ends_with(&unreadable)))
            .then_some(())
    };
    wait_for("the error is found", is_found).await;
    until("the log is rebuilt", || !log.is_damaged()).await;
    let read = move || log.read(Offset(0), log.log_end_offset(), usize::MAX);
    let batches = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
    assert_eq!(super::client::values(&batches.concat()), wrote);
    all_in_sync(controller, "it is whole").await;
    scene.cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_whose_fsync_fails_stops_and_the_others_lead() {
    let mut scene = Scene::start().await;
    let (cluster, controller) = (&mut scene.cluster, &scene.serving.controller);
    cluster.produce(GROUP, "before").await;
    let disk = cluster.disks[&LEADER].clone();
    disk.inject(Fault {
        operation: Operation::Sync,
        path_contains: "/wal/",
        after: 0,
        error: ErrorKind::Other,
    });
    let answer = cluster
        .ask_to_produce(LEADER, GROUP, "not durable here")
        .await;
    let why = cluster.ended_by_itself(LEADER).await;
    assert!(why.contains("wal"), "{why}");
    cluster.produce(GROUP, "after").await;
    controller
        .wait_for("others lead", |image| others_lead(image, LEADER))
        .await;
    // What was not synced is gone with the process; what was acknowledged is not.
    cluster.disks.insert(LEADER, disk.crash(&mut || false));
    cluster.start_broker(LEADER, None);
    all_in_sync(controller, "it is back").await;
    preferred_leaders(controller).await;
    let read = wait_for("it leads again", async || {
        let found = cluster.fetch(LEADER, GROUP, Duration::from_secs(1)).await;
        (found.error() == PartitionError::None)
            .then(|| super::client::values(&found.records.concat()))
    })
    .await;
    // The two others may have had it and acknowledged it.
    let kept = read.contains(&"not durable here".to_owned());
    assert!(
        kept || answer != PartitionError::None,
        "an acknowledged record is lost"
    );
    assert_eq!(read.first().map(String::as_str), Some("before"));
    assert_eq!(read.last().map(String::as_str), Some("after"));
    scene.cluster.end();
}

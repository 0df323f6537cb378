//! Three real brokers, one of which finds files of a log damaged: nothing wrong is served, somebody else
//! leads, and the files come back by themselves.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::offset::Offset;

use super::client::values;
use super::harness::{
    BROKERS, Cluster, all_in_sync, all_registered, others_lead, preferred_leaders,
};
use crate::fake_controller::FakeController;
use crate::replica::Replica;
use crate::test_wait::{until, wait_for};

const GROUP: u64 = 1;
const DAMAGED: i32 = 1;

#[derive(Debug, Clone, Copy)]
enum Harm {
    Flip,
    Short,
    Gone,
}

fn harm(path: &Path, how: Harm) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    match how {
        Harm::Flip => bytes[middle] ^= 1,
        Harm::Short => bytes.truncate(middle),
        Harm::Gone => return std::fs::remove_file(path).unwrap(),
    }
    std::fs::write(path, bytes).unwrap();
}

impl Cluster {
    /// Files of the partition at one broker, in order.
    fn files(&self, id: i32, extension: &str) -> Vec<PathBuf> {
        let folder = format!("broker-{id}/storage/partitions/{GROUP}");
        let entries = std::fs::read_dir(self.folder.join(folder)).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut paths: Vec<PathBuf> = paths
            .filter(|path| path.extension().is_some_and(|e| e == extension))
            .collect();
        paths.sort();
        paths
    }

    fn content(&self, id: i32) -> Vec<u8> {
        let files = self.files(id, "log").into_iter();
        files
            .flat_map(|path| std::fs::read(path).unwrap())
            .collect()
    }

    /// Segments of each replica end where it stands now.
    async fn roll_all(&self) {
        let end = self.replica_of(BROKERS[0], GROUP).log().log_end_offset();
        for id in BROKERS {
            // A partition has a leader as soon as two of its replicas run.
            let replica = self.started_replica_of(id, GROUP).await;
            until("all is committed everywhere", || {
                replica.high_watermark() >= end
            })
            .await;
            roll(&replica).await;
        }
    }
}

async fn roll(replica: &Replica) {
    let log = replica.log().clone();
    tokio::task::spawn_blocking(move || log.roll().unwrap())
        .await
        .unwrap();
}

/// What the replica's log has from an offset on, in memory or on disk.
async fn read_log(replica: &Replica, from: Offset) -> Vec<String> {
    let log = replica.log().clone();
    let read = move || log.read(from, log.log_end_offset(), usize::MAX);
    let batches = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
    values(&batches.concat())
}

/// A partition in three segments on each of three brokers, led by the one that is to be damaged.
async fn written(cluster: &Cluster, controller: &FakeController) -> Vec<String> {
    all_registered(controller).await;
    controller.create_topic("t", 1, &BROKERS);
    all_in_sync(controller, "a leader").await;
    preferred_leaders(controller).await;
    let mut wrote = Vec::new();
    for _ in 0..3 {
        for _ in 0..10 {
            wrote.push(format!("record {}", wrote.len()));
            cluster.produce(GROUP, &wrote[wrote.len() - 1]).await;
        }
        cluster.roll_all().await;
    }
    wrote
}

/// All replicas have the same records, in memory or on disk, and the same files.
async fn all_are_the_same(cluster: &Cluster, wrote: &[String]) {
    for id in BROKERS {
        let replica = cluster.started_replica_of(id, GROUP).await;
        until("all is committed", || {
            replica.high_watermark().0 >= wrote.len() as i64
        })
        .await;
        assert_eq!(read_log(&replica, Offset(0)).await, wrote, "broker {id}");
        assert!(!replica.log().is_damaged());
    }
    cluster.roll_all().await;
    let expected = cluster.content(DAMAGED);
    for id in BROKERS {
        assert!(cluster.content(id) == expected, "broker {id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_leader_hands_over_and_is_rebuilt() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    let mut wrote = written(&cluster, controller).await;
    // So that it reads from its disk, not from memory.
    cluster.stop_in_order(DAMAGED).await;
    cluster.start_broker(DAMAGED, None);
    let damaged = cluster.started_replica_of(DAMAGED, GROUP).await;
    let leadership = damaged.leadership();
    // The image may show the leader of before its restart.
    until("it leads again", || leadership.borrow().ready).await;
    all_in_sync(controller, "it is back").await;
    harm(&cluster.files(DAMAGED, "log")[1], Harm::Flip);
    let others_lead = || others_lead(&controller.image(), DAMAGED);
    // What it gives is right or an error, and whoever reads finds the damage.
    let read_until_others_lead = async || {
        if others_lead() {
            return Some(());
        }
        let found = cluster.fetch(DAMAGED, GROUP, Duration::ZERO).await;
        match found.error() {
            v1::PartitionError::None => {
                let values = values(&found.records.concat());
                assert_eq!(values[..], wrote[..values.len()]);
            }
            error => assert!(
                [v1::PartitionError::Storage, v1::PartitionError::NotLeader].contains(&error),
                "{error:?}"
            ),
        }
        None
    };
    wait_for("another one leads", read_until_others_lead).await;
    let leader = cluster.produce(GROUP, "meanwhile").await;
    assert_ne!(leader, DAMAGED);
    wrote.push("meanwhile".to_owned());
    assert_eq!(cluster.read(leader, GROUP, wrote.len()).await, wrote);
    until("the log is rebuilt", || !damaged.log().is_damaged()).await;
    all_are_the_same(&cluster, &wrote).await;
    // The controllers want it to lead again; it was damaged a moment ago.
    assert!(others_lead());
    drop(damaged);
    // What was put in place stays.
    cluster.stop_in_order(DAMAGED).await;
    cluster.start_broker(DAMAGED, None);
    all_in_sync(controller, "it is back again").await;
    all_are_the_same(&cluster, &wrote).await;
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_missing_or_short_are_brought_back_after_a_start() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    let mut wrote = written(&cluster, controller).await;
    for (number, extension, how) in [
        (0, "log", Harm::Gone),
        (2, "raft", Harm::Short),
        (1, "raft", Harm::Gone),
    ] {
        cluster.stop_in_order(DAMAGED).await;
        let harmed = cluster.files(DAMAGED, extension).swap_remove(number);
        harm(&harmed, how);
        cluster.start_broker(DAMAGED, None);
        let damaged = cluster.started_replica_of(DAMAGED, GROUP).await;
        wrote.push(format!("while {extension} is {how:?}"));
        cluster.produce(GROUP, &wrote[wrote.len() - 1]).await;
        until("the log is rebuilt", || !damaged.log().is_damaged()).await;
        // What takes the place of a damaged file has another name.
        until("the file is replaced", || !harmed.exists()).await;
        let names = |extension| {
            let files = cluster.files(DAMAGED, extension).into_iter();
            files
                .map(|path| path.with_extension(""))
                .collect::<Vec<_>>()
        };
        assert_eq!(names("log"), names("raft"));
        drop(damaged);
        all_in_sync(controller, "it is back").await;
        all_are_the_same(&cluster, &wrote).await;
    }
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_another_replica_a_log_stays_damaged_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    all_registered(controller).await;
    controller.create_topic("t", 1, &[DAMAGED]);
    cluster.produce(GROUP, "first").await;
    roll(&cluster.replica_of(DAMAGED, GROUP)).await;
    cluster.produce(GROUP, "second").await;
    roll(&cluster.replica_of(DAMAGED, GROUP)).await;
    cluster.stop_in_order(DAMAGED).await;
    harm(&cluster.files(DAMAGED, "log")[0], Harm::Short);
    cluster.start_broker(DAMAGED, None);
    let damaged = cluster.started_replica_of(DAMAGED, GROUP).await;
    assert!(damaged.log().is_damaged());
    drop(damaged);
    assert_eq!(cluster.produce(GROUP, "third").await, DAMAGED);
    let first = cluster.fetch(DAMAGED, GROUP, Duration::ZERO).await;
    assert_ne!(first.error(), v1::PartitionError::None);
    let damaged = cluster.replica_of(DAMAGED, GROUP);
    assert_eq!(read_log(&damaged, Offset(1)).await, ["second", "third"]);
    assert!(damaged.log().is_damaged());
    drop(damaged);
    cluster.end();
}

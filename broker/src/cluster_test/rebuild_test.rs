//! Three real brokers, one of which finds files of a log damaged: nothing wrong is served, somebody else
//! leads, and the files come back by themselves.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::id::{BrokerId, RaftGroupId};
use chronik_types::offset::Offset;
use futures::StreamExt;
use tokio::time::{sleep, timeout};

use super::{BROKERS, Cluster, LIMIT, all_in_sync, preferred_leaders, values};
use crate::fake_controller::FakeController;
use crate::replica::Replica;

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
    fn replica_of(&self, id: i32) -> Arc<Replica> {
        let replicas = &self.brokers[&id].replicas;
        replicas.get(RaftGroupId(GROUP)).expect("the replica runs")
    }

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
        let end = self.replica_of(BROKERS[0]).log().log_end_offset();
        for id in BROKERS {
            // A partition has a leader as soon as two of its replicas run.
            let replica = self.started_replica_of(id).await;
            self.until("all is committed everywhere", || {
                replica.high_watermark() >= end
            })
            .await;
            let log = replica.log().clone();
            tokio::task::spawn_blocking(move || log.roll().unwrap())
                .await
                .unwrap();
        }
    }

    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let reached = async {
            while !holds() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, reached)
            .await
            .unwrap_or_else(|_| panic!("not in time: {what}"));
    }

    /// The replica of a broker that was just started, as soon as it runs.
    async fn started_replica_of(&self, id: i32) -> Arc<Replica> {
        let replicas = &self.brokers[&id].replicas;
        let get = || replicas.get(RaftGroupId(GROUP));
        self.until("the replica runs", || get().is_some()).await;
        get().expect("nobody stops it")
    }

    async fn stop_in_order(&mut self, id: i32) {
        let broker = self.brokers.remove(&id).unwrap();
        tokio::task::spawn_blocking(move || broker.stop())
            .await
            .unwrap();
    }

    /// What a client gets of the first records.
    async fn fetch_first(&self, id: i32) -> Result<Vec<String>, v1::PartitionError> {
        let mut client = self.client(id).await;
        let start = v1::FetchStart {
            max_wait_ms: 0,
            min_bytes: 0,
            max_bytes: 10_000_000,
            read_committed: false,
            partitions: vec![v1::PartitionFetch {
                raft_group_id: GROUP,
                fetch_offset: 0,
                max_bytes: 10_000_000,
                current_leader_epoch: -1,
                last_fetched_epoch: -1,
            }],
            traceparent: String::new(),
        };
        let request = v1::FetchRequest {
            request_id: 1,
            kind: Some(v1::fetch_request::Kind::Start(start)),
        };
        let requests = futures::stream::once(async { request }).chain(futures::stream::pending());
        let mut responses = client.fetch(requests).await.unwrap().into_inner();
        let response = responses.next().await.unwrap().unwrap();
        let partition = &response.partitions[0];
        match partition.error() {
            v1::PartitionError::None => Ok(values(&partition.records.concat())),
            error => Err(error),
        }
    }

    fn end(self) {
        for broker in self.brokers.into_values() {
            broker.kill();
        }
    }
}

/// A partition in three segments on each of three brokers, led by the one that is to be damaged.
async fn written(cluster: &Cluster, controller: &FakeController) -> Vec<String> {
    controller
        .wait_for("three brokers", |image| image.brokers.len() == 3)
        .await;
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
        let replica = cluster.started_replica_of(id).await;
        cluster
            .until("all is committed", || {
                replica.high_watermark().0 >= wrote.len() as i64
            })
            .await;
        let log = replica.log().clone();
        let read = move || log.read(Offset(0), log.log_end_offset(), usize::MAX);
        let batches = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
        assert_eq!(values(&batches.concat()), wrote, "broker {id}");
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
    let damaged = cluster.started_replica_of(DAMAGED).await;
    let leadership = damaged.leadership();
    // The image may show the leader of before its restart.
    cluster
        .until("it leads again", || leadership.borrow().ready)
        .await;
    all_in_sync(controller, "it is back").await;
    harm(&cluster.files(DAMAGED, "log")[1], Harm::Flip);
    let others_lead = |image: &chronik_types::cluster_image::ClusterImage| {
        let topic = image.topic_by_name("t").unwrap();
        let leader = topic.partitions[0].leader;
        leader.is_some_and(|id| id != BrokerId(DAMAGED))
    };
    // What it gives is right or an error, and whoever reads finds the damage.
    let read_until_others_lead = async {
        while !others_lead(&controller.image()) {
            match cluster.fetch_first(DAMAGED).await {
                Ok(values) => assert_eq!(values[..], wrote[..values.len()]),
                Err(error) => assert!(
                    [v1::PartitionError::Storage, v1::PartitionError::NotLeader].contains(&error),
                    "{error:?}"
                ),
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, read_until_others_lead)
        .await
        .expect("another one leads");
    let leader = cluster.produce(GROUP, "meanwhile").await;
    assert_ne!(leader, DAMAGED);
    wrote.push("meanwhile".to_owned());
    assert_eq!(cluster.read(leader, GROUP, wrote.len()).await, wrote);
    cluster
        .until("the log is rebuilt", || !damaged.log().is_damaged())
        .await;
    all_are_the_same(&cluster, &wrote).await;
    // The controllers want it to lead again; it was damaged a moment ago.
    assert!(others_lead(&controller.image()));
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
        harm(&cluster.files(DAMAGED, extension)[number], how);
        cluster.start_broker(DAMAGED, None);
        let damaged = cluster.started_replica_of(DAMAGED).await;
        wrote.push(format!("while {extension} is {how:?}"));
        cluster.produce(GROUP, &wrote[wrote.len() - 1]).await;
        cluster
            .until("the log is rebuilt", || !damaged.log().is_damaged())
            .await;
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
    controller
        .wait_for("three brokers", |image| image.brokers.len() == 3)
        .await;
    controller.create_topic("t", 1, &[DAMAGED]);
    cluster.produce(GROUP, "first").await;
    let roll = |cluster: &Cluster| {
        let log = cluster.replica_of(DAMAGED).log().clone();
        tokio::task::spawn_blocking(move || log.roll().unwrap())
    };
    roll(&cluster).await.unwrap();
    cluster.produce(GROUP, "second").await;
    roll(&cluster).await.unwrap();
    cluster.stop_in_order(DAMAGED).await;
    harm(&cluster.files(DAMAGED, "log")[0], Harm::Short);
    cluster.start_broker(DAMAGED, None);
    let damaged = cluster.started_replica_of(DAMAGED).await;
    assert!(damaged.log().is_damaged());
    drop(damaged);
    assert_eq!(cluster.produce(GROUP, "third").await, DAMAGED);
    assert!(cluster.fetch_first(DAMAGED).await.is_err());
    let log = cluster.replica_of(DAMAGED).log().clone();
    let read = move || log.read(Offset(1), log.log_end_offset(), usize::MAX);
    let batches = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
    assert_eq!(values(&batches.concat()), ["second", "third"]);
    assert!(cluster.replica_of(DAMAGED).log().is_damaged());
    cluster.end();
}

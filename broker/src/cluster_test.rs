//! Three real brokers, each on a runtime of its own so that it can be killed at once, over loopback,
//! with a fake controller.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use chronik_proto::v1;
use chronik_proto::v1::data_client::DataClient;
use chronik_types::id::BrokerId;
use futures::StreamExt;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::config::{Config, ReplicationSettings};
use crate::fake_controller::{FakeController, Serving};
use crate::peers::Connector;
use crate::replica::engine::EngineStatus;
use crate::replica::test_batches;
use crate::replicas::WeakReplicas;

mod cut_off_test;
mod rebuild_test;

use cut_off_test::Ways;

const LIMIT: Duration = Duration::from_secs(40);
const BROKERS: [i32; 3] = [1, 2, 3];

struct TestBroker {
    rpc_address: SocketAddr,
    replicas: WeakReplicas,
    kill: Option<oneshot::Sender<()>>,
    stop: CancellationToken,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl TestBroker {
    fn start(config: Config, connector: Arc<dyn Connector>) -> TestBroker {
        let (kill, killed) = oneshot::channel();
        let (started, addresses) = mpsc::channel();
        let stop = CancellationToken::new();
        let token = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let outcome = runtime.block_on(async move {
                let running = crate::start_with(config, connector).await?;
                let replicas = running.replicas().downgrade();
                started.send((running.rpc_address, replicas)).unwrap();
                tokio::select! {
                    ended = running.run_until(token) => ended,
                    // Everything is dropped where it stands.
                    _ = killed => Ok(()),
                }
            });
            // Only calls that are inside the storage are waited for: they hold the folder's lock.
            runtime.shutdown_timeout(LIMIT);
            outcome
        });
        let (rpc_address, replicas) = match addresses.recv_timeout(LIMIT) {
            Ok(started) => started,
            Err(_) => panic!("the broker does not start: {:?}", thread.join()),
        };
        TestBroker {
            rpc_address,
            replicas,
            kill: Some(kill),
            stop,
            thread: Some(thread),
        }
    }

    fn kill(mut self) {
        self.kill.take().unwrap().send(()).unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    fn stop(mut self) {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

struct Cluster {
    folder: PathBuf,
    controller: String,
    tune: fn(&mut ReplicationSettings),
    /// Ways between brokers that a test may cut.
    ways: Ways,
    brokers: BTreeMap<i32, TestBroker>,
}

/// `RUST_LOG=info` shows what the brokers say.
fn init_log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    // Fails where another test was first: that one's serves.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .try_init();
}

impl Cluster {
    fn start(folder: &Path, controller: &Serving) -> Cluster {
        Self::tuned(folder, controller, |_| {})
    }

    fn tuned(folder: &Path, controller: &Serving, tune: fn(&mut ReplicationSettings)) -> Cluster {
        init_log();
        let mut cluster = Cluster {
            folder: folder.to_owned(),
            controller: controller.address.clone(),
            tune,
            ways: Ways::default(),
            brokers: BTreeMap::new(),
        };
        for id in BROKERS {
            cluster.start_broker(id, None);
        }
        cluster
    }

    /// `rpc_listen`: where it was before, so that others find it without a controller.
    fn start_broker(&mut self, id: i32, rpc_listen: Option<SocketAddr>) {
        let mut config = Config {
            broker_id: id,
            data_dir: self.folder.join(format!("broker-{id}")),
            rpc_listen: rpc_listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
            http_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            controllers: vec![self.controller.clone()],
            ..Config::default()
        };
        config.storage.wal_file_size_bytes = 4 * 1024 * 1024;
        // However full the machine's disk is.
        config.storage.reserve_bytes = Some(0);
        (self.tune)(&mut config.replication);
        let connector = self.ways.connector(id);
        let broker = TestBroker::start(config, connector);
        self.ways.add(id, broker.rpc_address);
        self.brokers.insert(id, broker);
    }

    fn kill(&mut self, id: i32) -> SocketAddr {
        let broker = self.brokers.remove(&id).unwrap();
        let address = broker.rpc_address;
        broker.kill();
        address
    }

    async fn client(&self, id: i32) -> DataClient<Channel> {
        let address = format!("http://{}", self.brokers[&id].rpc_address);
        DataClient::connect(address).await.unwrap()
    }

    /// Appends one record with acks=all, wherever the leader is; the broker that took it.
    async fn produce(&self, group: u64, value: &str) -> i32 {
        let produced = async {
            loop {
                for id in self.brokers.keys() {
                    if self.try_produce(*id, group, value).await {
                        return *id;
                    }
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, produced)
            .await
            .expect("no broker takes the record in time")
    }

    async fn try_produce(&self, id: i32, group: u64, value: &str) -> bool {
        self.ask_to_produce(id, group, value).await == v1::PartitionError::None
    }

    /// How the broker answers one record with acks=all.
    async fn ask_to_produce(&self, id: i32, group: u64, value: &str) -> v1::PartitionError {
        self.ask_to_produce_within(2_000, id, group, value).await
    }

    async fn ask_to_produce_within(
        &self,
        timeout_ms: u32,
        id: i32,
        group: u64,
        value: &str,
    ) -> v1::PartitionError {
        let request = v1::ProduceRequest {
            request_id: 1,
            acks: -1,
            timeout_ms,
            partitions: vec![v1::PartitionProduce {
                raft_group_id: group,
                records: test_batches::value(value).into(),
            }],
            traceparent: String::new(),
        };
        // The request stream stays open, as a gateway's does.
        let requests = futures::stream::once(async { request }).chain(futures::stream::pending());
        let mut client = self.client(id).await;
        let mut responses = client.produce(requests).await.unwrap().into_inner();
        match responses.next().await {
            Some(Ok(response)) => response.partitions[0].error(),
            _ => v1::PartitionError::TimedOut,
        }
    }

    /// Everything committed in the partition, as its leader has it.
    async fn read(&self, id: i32, group: u64, at_least: usize) -> Vec<String> {
        let mut client = self.client(id).await;
        let start = v1::FetchStart {
            max_wait_ms: 2_000,
            min_bytes: 1,
            max_bytes: 10_000_000,
            read_committed: false,
            partitions: vec![v1::PartitionFetch {
                raft_group_id: group,
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
        assert_eq!(
            partition.error(),
            v1::PartitionError::None,
            "{}",
            partition.error_message
        );
        let bytes: Vec<u8> = partition.records.concat();
        let values = values(&bytes);
        assert!(values.len() >= at_least, "{values:?}");
        values
    }
}

/// The values of single-record batches made by `test_batches::value`.
fn values(mut bytes: &[u8]) -> Vec<String> {
    let mut values = Vec::new();
    while bytes.len() >= 12 {
        let length = 12 + i32::from_be_bytes(bytes[8..12].try_into().unwrap()) as usize;
        // Header, then length, attributes, timestamp, offset, key and value length: one byte each.
        let record = &bytes[61..length];
        values.push(String::from_utf8(record[6..record.len() - 1].to_vec()).unwrap());
        bytes = &bytes[length..];
    }
    values
}

fn leaders(controller: &FakeController) -> Vec<Option<i32>> {
    let image = controller.image();
    let topic = image.topic_by_name("t").unwrap();
    topic
        .partitions
        .iter()
        .map(|p| p.leader.map(|id| id.0))
        .collect()
}

async fn all_in_sync(controller: &FakeController, what: &str) {
    controller
        .wait_for(what, |image| {
            image.topic_by_name("t").is_some_and(|topic| {
                topic
                    .partitions
                    .iter()
                    .all(|p| p.leader.is_some() && p.isr.len() == 3)
            })
        })
        .await;
}

async fn preferred_leaders(controller: &FakeController) {
    controller
        .wait_for("every preferred leader leads", |image| {
            let topic = image.topic_by_name("t").unwrap();
            topic
                .partitions
                .iter()
                .all(|p| p.leader == Some(p.replicas[0].broker_id))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_survive_the_death_of_their_leader() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let controller = &serving.controller;
    let mut cluster = Cluster::start(folder.path(), &serving);
    controller
        .wait_for("three brokers", |image| image.brokers.len() == 3)
        .await;

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
    assert_eq!(cluster.read(leader, 1, wrote.len()).await, wrote);
    for broker in std::mem::take(&mut cluster.brokers).into_values() {
        broker.kill();
    }
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
    let stopping = cluster.brokers.remove(&leader).unwrap();
    let stopped = tokio::task::spawn_blocking(move || stopping.stop());
    timeout(LIMIT, stopped).await.unwrap().unwrap();
    println!("a broker stopped in order in {:?}", begun.elapsed());
    controller
        .wait_for("others lead", |image| {
            let topic = image.topic_by_name("t").unwrap();
            topic
                .partitions
                .iter()
                .all(|p| p.leader.is_some_and(|id| id != BrokerId(leader)))
        })
        .await;
    let next = cluster.produce(group, "two").await;
    assert_eq!(cluster.read(next, group, 2).await, vec!["one", "two"]);

    cluster.start_broker(leader, None);
    all_in_sync(controller, "it is back").await;
    preferred_leaders(controller).await;
    for broker in std::mem::take(&mut cluster.brokers).into_values() {
        broker.kill();
    }
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
    for broker in std::mem::take(&mut cluster.brokers).into_values() {
        broker.kill();
    }
}

async fn wait_for_saved_images(folder: &Path, revision: u64) {
    let saved = async {
        for id in BROKERS {
            let folder = folder.join(format!("broker-{id}"));
            loop {
                let image = crate::controller_client::load_image(&folder).unwrap();
                if image.is_some_and(|image| image.revision >= revision) {
                    break;
                }
                sleep(Duration::from_millis(20)).await;
            }
        }
    };
    timeout(LIMIT, saved)
        .await
        .expect("the image is saved in time");
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
    cluster.wait_until_gone(leader, 1).await;
    // Even if it was killed before it had saved that, it comes back without it.
    cluster.kill(leader);
    cluster.start_broker(leader, None);
    cluster.wait_until_gone(leader, 1).await;
    for broker in std::mem::take(&mut cluster.brokers).into_values() {
        broker.kill();
    }
}

impl Cluster {
    async fn wait_until_gone(&self, id: i32, group: u64) {
        let gone = async {
            while self.replica_exists(id, group).await {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LIMIT, gone)
            .await
            .expect("the replica goes in time");
    }

    async fn replica_exists(&self, id: i32, group: u64) -> bool {
        let mut client = self.client(id).await;
        let partition = v1::PartitionListOffsets {
            raft_group_id: group,
            current_leader_epoch: -1,
            timestamp: -1,
        };
        let request = v1::ListOffsetsRequest {
            read_committed: false,
            partitions: vec![partition],
        };
        let response = client.list_offsets(request).await.unwrap().into_inner();
        response.partitions[0].error() != v1::PartitionError::UnknownPartition
    }
}

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
        let all_rest = async {
            while !self.brokers.values().all(rests) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LIMIT, all_rest)
            .await
            .expect("followers rest in time");
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
    sleep(Duration::from_secs(2)).await;
    assert_eq!(cluster.opened(), opened);

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
    for broker in std::mem::take(&mut cluster.brokers).into_values() {
        broker.kill();
    }
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
        .wait_for("others lead", |image| {
            let topic = image.topic_by_name("t").unwrap();
            topic
                .partitions
                .iter()
                .all(|p| p.leader.is_some_and(|id| id.0 != leader))
        })
        .await;
    cluster.wait_for_rest().await;
    let before = cluster.terms();
    cluster.start_broker(leader, None);
    all_in_sync(controller, "it is back").await;
    cluster.wait_for_rest().await;
    assert_eq!(cluster.terms(), before, "no election");
    for broker in std::mem::take(&mut cluster.brokers).into_values() {
        broker.kill();
    }
}

//! The brokers, and what a test does to them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use chronik_storage::disk::FaultyDisk;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::{BrokerId, RaftGroupId};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::ways::Ways;
use crate::Host;
use crate::config::{Config, ReplicationSettings};
use crate::fake_controller::{FakeController, Serving};
use crate::peers::Peers;
use crate::replica::Replica;
use crate::replicas::WeakReplicas;
use crate::test_wait::{until, wait_for};

const LIMIT: Duration = Duration::from_secs(40);
pub const BROKERS: [i32; 3] = [1, 2, 3];
/// Of a disk that can be full.
pub const RESERVE_BYTES: u64 = 64 << 20;

pub struct TestBroker {
    pub rpc_address: SocketAddr,
    pub replicas: WeakReplicas,
    pub peers: Peers,
    kill: Option<oneshot::Sender<()>>,
    stop: CancellationToken,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl TestBroker {
    fn start(config: Config, host: Host) -> TestBroker {
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
                let running = crate::start_with(config, host).await?;
                let replicas = running.replicas().downgrade();
                let peers = running.peers().clone();
                started
                    .send((running.rpc_address, replicas, peers))
                    .unwrap();
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
        let (rpc_address, replicas, peers) = match addresses.recv_timeout(LIMIT) {
            Ok(started) => started,
            Err(_) => panic!("the broker does not start: {:?}", thread.join()),
        };
        TestBroker {
            rpc_address,
            replicas,
            peers,
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

pub struct Cluster {
    pub folder: PathBuf,
    controller: String,
    tune: fn(&mut ReplicationSettings),
    /// Ways between brokers that a test may cut.
    pub ways: Ways,
    /// Brokers on disks that fail when told to; the others have their files in `folder`.
    pub disks: BTreeMap<i32, FaultyDisk>,
    pub brokers: BTreeMap<i32, TestBroker>,
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
    pub fn start(folder: &Path, controller: &Serving) -> Cluster {
        Self::tuned(folder, controller, |_| {})
    }

    pub fn tuned(
        folder: &Path,
        controller: &Serving,
        tune: fn(&mut ReplicationSettings),
    ) -> Cluster {
        Self::on(BTreeMap::new(), folder, controller, tune)
    }

    /// Every broker with a disk that fails when told to.
    pub fn on_faulty_disks(folder: &Path, controller: &Serving) -> Cluster {
        let disks = BROKERS.map(|id| (id, FaultyDisk::new()));
        Self::on(disks.into(), folder, controller, |_| {})
    }

    fn on(
        disks: BTreeMap<i32, FaultyDisk>,
        folder: &Path,
        controller: &Serving,
        tune: fn(&mut ReplicationSettings),
    ) -> Cluster {
        init_log();
        let mut cluster = Cluster {
            folder: folder.to_owned(),
            controller: controller.address.clone(),
            tune,
            ways: Ways::default(),
            disks,
            brokers: BTreeMap::new(),
        };
        for id in BROKERS {
            cluster.start_broker(id, None);
        }
        cluster
    }

    /// `rpc_listen`: where it was before, so that others find it without a controller.
    pub fn start_broker(&mut self, id: i32, rpc_listen: Option<SocketAddr>) {
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
        let reserve_bytes = match self.disks.contains_key(&id) {
            true => RESERVE_BYTES,
            false => 0,
        };
        config.storage.reserve_bytes = Some(reserve_bytes);
        (self.tune)(&mut config.replication);
        let mut host = Host {
            connector: self.ways.connector(id),
            ..Host::default()
        };
        if let Some(disk) = self.disks.get(&id) {
            host.disk = Arc::new(disk.clone());
        }
        let broker = TestBroker::start(config, host);
        self.ways.add(id, broker.rpc_address);
        self.brokers.insert(id, broker);
    }

    pub fn kill(&mut self, id: i32) -> SocketAddr {
        let broker = self.brokers.remove(&id).unwrap();
        let address = broker.rpc_address;
        broker.kill();
        address
    }

    /// From now on the disk of a broker has so much of its reserve left, and the broker knows.
    pub async fn fill_disk(&self, id: i32, left_bytes: u64) {
        let disk = &self.disks[&id];
        disk.set_capacity(Some(disk.used_bytes() + left_bytes));
        let log = self.brokers[&id].replicas.all()[0].log().clone();
        until("the disk is full", || log.check_room(1).is_err()).await;
    }

    /// Waits for the end of a broker that nobody told to stop, and gives its reason.
    pub async fn ended_by_itself(&mut self, id: i32) -> String {
        let mut broker = self.brokers.remove(&id).unwrap();
        let thread = broker.thread.take().unwrap();
        let ended = || thread.is_finished().then_some(());
        wait_for("the broker ends", async || ended()).await;
        let outcome = thread.join().unwrap();
        format!("{:#}", outcome.expect_err("it does not end well"))
    }

    /// It hands over first.
    pub async fn stop_in_order(&mut self, id: i32) {
        let broker = self.brokers.remove(&id).unwrap();
        tokio::task::spawn_blocking(move || broker.stop())
            .await
            .unwrap();
    }

    pub fn replica_of(&self, id: i32, group: u64) -> Arc<Replica> {
        let replica = self.find_replica(id, group);
        replica.expect("the replica runs")
    }

    /// The replica of a broker that was just started, as soon as it runs.
    pub async fn started_replica_of(&self, id: i32, group: u64) -> Arc<Replica> {
        wait_for("the replica runs", async || self.find_replica(id, group)).await
    }

    fn find_replica(&self, id: i32, group: u64) -> Option<Arc<Replica>> {
        self.brokers[&id].replicas.get(RaftGroupId(group))
    }

    pub fn end(self) {
        for broker in self.brokers.into_values() {
            broker.kill();
        }
    }
}

pub fn leaders(controller: &FakeController) -> Vec<Option<i32>> {
    let image = controller.image();
    let topic = image.topic_by_name("t").unwrap();
    topic
        .partitions
        .iter()
        .map(|p| p.leader.map(|id| id.0))
        .collect()
}

pub async fn all_registered(controller: &FakeController) {
    controller
        .wait_for("three brokers", |image| image.brokers.len() == 3)
        .await;
}

pub async fn all_in_sync(controller: &FakeController, what: &str) {
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

pub async fn preferred_leaders(controller: &FakeController) {
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

/// Every partition is led, and not by the broker.
pub fn others_lead(image: &ClusterImage, broker: i32) -> bool {
    let topic = image.topic_by_name("t").unwrap();
    let mut leaders = topic.partitions.iter().map(|p| p.leader);
    leaders.all(|leader| leader.is_some_and(|id| id != BrokerId(broker)))
}

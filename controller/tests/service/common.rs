//! Groups of controllers in this process, and the clients of them that tests need.

use std::sync::Arc;
use std::time::Duration;

use chronik_controller::config::{Config, ControllerAddress, RaftSettings};
use chronik_controller::controller::{Controller, Role};
use chronik_controller::{Listeners, Running, start_on};
use chronik_proto::v1::admin_client::AdminClient;
use chronik_proto::v1::sessions_client::SessionsClient;
use chronik_proto::v1::watch_client::WatchClient;
use chronik_proto::{uuid_bytes, v1};
use chronik_types::cluster_image::{ClusterImage, ImageChange};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// What the work gives. Fails at the deadline and says what did not come.
pub async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(value) => value,
        Err(_) => panic!("not within {LIMIT:?}: {what}"),
    }
}

/// Looks until there is something: the one place that sleeps between two looks.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    within(what, found).await
}

/// A group of controllers, each in its own folder.
pub struct Group {
    folder: TempDir,
    addresses: Vec<ControllerAddress>,
    pub controllers: Vec<Option<Running>>,
    /// Sockets of those that were never started.
    reserved: Vec<Option<Listeners>>,
    pub session_timeout_ms: u32,
    pub raft: RaftSettings,
}

impl Group {
    /// Starts `count` controllers on free ports.
    pub async fn start(count: usize) -> Self {
        Self::start_with(count, 3000).await
    }

    pub async fn start_with(count: usize, session_timeout_ms: u32) -> Self {
        let mut group = Self::unstarted(count).await;
        group.session_timeout_ms = session_timeout_ms;
        // The last one first: the order must not matter.
        for index in (0..count).rev() {
            group.restart(index).await;
        }
        group
    }

    /// Chooses free ports for a group and starts none of it.
    pub async fn unstarted(count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut addresses = Vec::new();
        let mut listeners = Vec::new();
        for id in (1..).take(count) {
            let pair = Listeners {
                rpc: bind(0).await,
                rest: bind(0).await,
            };
            addresses.push(ControllerAddress {
                id,
                rpc_address: pair.rpc.local_addr().unwrap().to_string(),
                rest_address: pair.rest.local_addr().unwrap().to_string(),
            });
            listeners.push(pair);
        }
        let mut group = Self {
            folder,
            addresses,
            controllers: Vec::new(),
            reserved: listeners.into_iter().map(Some).collect(),
            session_timeout_ms: 3000,
            raft: RaftSettings {
                snapshot_log_entries: 60,
                retained_log_entries: 10,
                ..RaftSettings::default()
            },
        };
        group.controllers.resize_with(count, || None);
        group
    }

    pub fn config(&self, index: usize) -> Config {
        Config {
            controller_id: self.addresses[index].id,
            data_dir: self.folder.path().join(format!("controller-{index}")),
            controllers: self.addresses.clone(),
            session_timeout_ms: self.session_timeout_ms,
            session_heartbeat_interval_ms: self.session_timeout_ms / 6,
            raft: self.raft.clone(),
            ..Config::default()
        }
    }

    pub async fn restart(&mut self, index: usize) {
        assert!(self.controllers[index].is_none());
        let address = &self.addresses[index];
        let port = |address: &str| address.rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
        let listeners = match self.reserved[index].take() {
            Some(listeners) => listeners,
            None => Listeners {
                rpc: bind(port(&address.rpc_address)).await,
                rest: bind(port(&address.rest_address)).await,
            },
        };
        let running = start_on(self.config(index), listeners).await.unwrap();
        self.controllers[index] = Some(running);
    }

    pub async fn kill(&mut self, index: usize) {
        within("kill", self.controllers[index].take().unwrap().kill()).await;
    }

    /// Deletes the data of a controller that does not run.
    pub fn lose_disk(&self, index: usize) {
        assert!(self.controllers[index].is_none());
        std::fs::remove_dir_all(self.config(index).data_dir).unwrap();
    }

    pub async fn stop(&mut self, index: usize) {
        within("stop", self.controllers[index].take().unwrap().stop())
            .await
            .unwrap();
    }

    pub fn controller(&self, index: usize) -> &Controller {
        self.controllers[index].as_ref().unwrap().controller()
    }

    /// Waits until the group is as wanted.
    pub async fn until(&self, what: &str, mut wanted: impl FnMut(&Self) -> bool) {
        until(what, async || wanted(self).then_some(())).await;
    }

    /// Index of the leader, once all running controllers agree on it.
    pub async fn leader(&self) -> usize {
        let running = self.controllers.iter().flatten();
        let mut found = Vec::new();
        for controller in running {
            let mut roles = controller.controller().role().subscribe();
            loop {
                let known = roles.wait_for(|role| *role != Role::Waiting);
                let role = *within("a leader", known).await.unwrap();
                let id = match role {
                    Role::Leader => controller.controller().config().controller_id,
                    Role::Follower { leader } => leader,
                    Role::Waiting => unreachable!(),
                };
                let index = usize::try_from(id).unwrap() - 1;
                if self.controllers[index].is_some() {
                    found.push(index);
                    break;
                }
                // It still believes in one that was killed.
                within("a new leader", roles.changed()).await.unwrap();
            }
        }
        let last = *found.last().unwrap();
        let mut roles = self.controller(last).role().subscribe();
        within("the leader", roles.wait_for(|role| *role == Role::Leader))
            .await
            .unwrap();
        last
    }

    pub fn follower_of(&self, leader: usize) -> usize {
        (0..self.controllers.len())
            .find(|index| *index != leader && self.controllers[*index].is_some())
            .unwrap()
    }

    pub fn channel(&self, index: usize) -> Channel {
        let address = &self.addresses[index].rpc_address;
        Endpoint::from_shared(format!("http://{address}"))
            .unwrap()
            .connect_lazy()
    }

    pub fn admin(&self, index: usize) -> AdminClient<Channel> {
        AdminClient::new(self.channel(index))
    }

    pub fn sessions(&self, index: usize) -> SessionsClient<Channel> {
        SessionsClient::new(self.channel(index))
    }

    /// Waits until the image of a controller is as wanted.
    pub async fn image(
        &self,
        index: usize,
        what: &str,
        wanted: impl FnMut(&Arc<ClusterImage>) -> bool,
    ) -> Arc<ClusterImage> {
        let mut images = self.controller(index).feed().subscribe();
        within(what, images.wait_for(wanted)).await.unwrap().clone()
    }
}

pub async fn bind(port: u16) -> TcpListener {
    TcpListener::bind(("127.0.0.1", port)).await.unwrap()
}

/// A broker as the controllers see it: registers, and reports itself leader of what it is given.
pub struct FakeBroker {
    pub broker_id: i32,
    pub broker_epoch: u64,
    pub sessions: SessionsClient<Channel>,
}

impl FakeBroker {
    pub async fn register(group: &Group, index: usize, broker_id: i32) -> Self {
        let mut sessions = group.sessions(index);
        let request = registration(broker_id, Uuid::new_v4(), Uuid::from_u128(9));
        let response = within("register", sessions.register_broker(request))
            .await
            .unwrap();
        let broker_epoch = response.into_inner().broker_epoch;
        Self {
            broker_id,
            broker_epoch,
            sessions,
        }
    }

    pub async fn heartbeat(&mut self) -> bool {
        let request = v1::BrokerHeartbeatRequest {
            broker_id: self.broker_id,
            broker_epoch: self.broker_epoch,
            ..Default::default()
        };
        within("heartbeat", self.sessions.broker_heartbeat(request))
            .await
            .unwrap()
            .into_inner()
            .fenced
    }

    /// Heartbeats until dropped.
    pub async fn live(&mut self, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        loop {
            ticks.tick().await;
            let request = v1::BrokerHeartbeatRequest {
                broker_id: self.broker_id,
                broker_epoch: self.broker_epoch,
                ..Default::default()
            };
            // A controller may be gone for a moment.
            let _ = self.sessions.broker_heartbeat(request).await;
        }
    }

    pub async fn report(
        &mut self,
        reports: Vec<v1::PartitionReport>,
    ) -> v1::ReportPartitionsResponse {
        let request = v1::ReportPartitionsRequest {
            broker_id: self.broker_id,
            broker_epoch: self.broker_epoch,
            reports,
            progress: Vec::new(),
            copies: Vec::new(),
        };
        within("report", self.sessions.report_partitions(request))
            .await
            .unwrap()
            .into_inner()
    }

    /// Reports leadership of every partition of which it is the preferred leader, for ever.
    pub async fn lead_all(&mut self, mut images: tokio::sync::watch::Receiver<Arc<ClusterImage>>) {
        loop {
            let reports: Vec<_> = images
                .borrow_and_update()
                .topics
                .values()
                .flat_map(|topic| &topic.partitions)
                .filter(|p| p.leader.is_none() && p.replicas[0].broker_id.0 == self.broker_id)
                .map(|p| report(p, p.leader_epoch.0 + 1, p.partition_epoch.0))
                .collect();
            if !reports.is_empty() {
                self.report(reports).await;
            }
            if images.changed().await.is_err() {
                return;
            }
        }
    }
}

/// A report that all replicas are caught up.
pub fn report(
    partition: &chronik_types::cluster_image::Partition,
    leader_epoch: i32,
    partition_epoch: i32,
) -> v1::PartitionReport {
    v1::PartitionReport {
        raft_group_id: partition.raft_group_id.0,
        leader_epoch,
        partition_epoch,
        replicas: partition
            .replicas
            .iter()
            .map(|replica| v1::ReplicaProgress {
                broker_id: replica.broker_id.0,
                state: v1::replica_progress::State::CaughtUp.into(),
            })
            .collect(),
        voters: Vec::new(),
    }
}

pub fn registration(
    broker_id: i32,
    incarnation_id: Uuid,
    storage_id: Uuid,
) -> v1::RegisterBrokerRequest {
    v1::RegisterBrokerRequest {
        broker_id,
        incarnation_id: uuid_bytes(incarnation_id),
        rpc_address: format!("broker{broker_id}:1"),
        rack: None,
        storage_id: uuid_bytes(storage_id),
        cluster_id: String::new(),
        ..Default::default()
    }
}

pub fn new_topic(name: &str, partition_count: i32, replication_factor: i32) -> v1::NewTopic {
    v1::NewTopic {
        name: name.to_owned(),
        partition_count,
        replication_factor,
        ..Default::default()
    }
}

pub async fn create(
    admin: &mut AdminClient<Channel>,
    topics: Vec<v1::NewTopic>,
    timeout_ms: u32,
) -> Vec<v1::CreatedTopic> {
    let request = v1::CreateTopicsRequest {
        topics,
        timeout_ms,
        validate_only: false,
    };
    within("create topics", admin.create_topics(request))
        .await
        .unwrap()
        .into_inner()
        .topics
}

/// A watcher that keeps its own image.
pub struct Watcher {
    stream: Streaming<v1::WatchEvent>,
    pub image: ClusterImage,
    pub full_image_count: usize,
}

impl Watcher {
    pub async fn open(channel: Channel, image: ClusterImage) -> Self {
        let request = v1::WatchRequest {
            from_revision: image.revision,
            cluster_id: image.cluster_id.clone(),
        };
        let stream = within("watch", WatchClient::new(channel).watch_image(request)).await;
        Self {
            stream: stream.unwrap().into_inner(),
            image,
            full_image_count: 0,
        }
    }

    /// Takes events until the image is as wanted.
    pub async fn until(&mut self, what: &str, wanted: impl Fn(&ClusterImage) -> bool) {
        while !wanted(&self.image) {
            let event = within(what, self.stream.message()).await.unwrap().unwrap();
            match event.event.unwrap() {
                v1::watch_event::Event::Image(image) => {
                    self.image = image.try_into().unwrap();
                    self.full_image_count += 1;
                }
                v1::watch_event::Event::Delta(delta) => {
                    assert_eq!(delta.base_revision, self.image.revision, "no gap");
                    let change: ImageChange = delta.change.unwrap().try_into().unwrap();
                    assert!(change.revision > self.image.revision);
                    self.image.apply(change);
                }
            }
        }
    }
}

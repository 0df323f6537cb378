//! A controller for tests of the broker alone: sessions, watches and reports over real gRPC, kept in
//! memory, deciding nothing that the tests do not need.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::sessions_server::{Sessions, SessionsServer};
use chronik_proto::v1::watch_server::{Watch, WatchServer};
use chronik_types::cluster_image::{Broker, ClusterImage, Drain, Partition, Topic};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use futures::stream::{BoxStream, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use uuid::Uuid;

#[derive(Clone)]
pub struct FakeController {
    image: Arc<Mutex<ClusterImage>>,
    revision: watch::Sender<u64>,
    /// Leaders are not asked to hand over to preferred ones.
    keeps_leaders: Arc<AtomicBool>,
}

/// One that serves; stops when dropped.
pub struct Serving {
    pub controller: FakeController,
    pub address: String,
    task: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeController {
    pub async fn serve() -> Serving {
        let image = ClusterImage {
            cluster_id: "test".to_owned(),
            ..Default::default()
        };
        let controller = FakeController {
            image: Arc::new(Mutex::new(image)),
            revision: watch::Sender::new(0),
            keeps_leaders: Arc::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = Server::builder()
            .add_service(SessionsServer::new(controller.clone()))
            .add_service(WatchServer::new(controller.clone()));
        let task = tokio::spawn(async move {
            router
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
                .unwrap();
        });
        Serving {
            controller,
            address,
            task,
        }
    }

    pub fn image(&self) -> ClusterImage {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, ClusterImage> {
        self.image.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut ClusterImage) -> T) -> T {
        let mut image = self.lock();
        image.revision += 1;
        let result = change(&mut image);
        let revision = image.revision;
        drop(image);
        self.revision.send_replace(revision);
        result
    }

    /// A topic with a replica of every partition on each of `brokers`, leaders in turn.
    pub fn create_topic(&self, name: &str, partitions: usize, brokers: &[i32]) {
        self.change(|image| {
            let first_group = 1 + image
                .topics
                .values()
                .map(|t| t.partitions.len())
                .sum::<usize>();
            let revision = image.revision;
            let partitions = (0..partitions).map(|index| {
                let mut replicas: Vec<ReplicaId> = brokers
                    .iter()
                    .map(|id| ReplicaId {
                        broker_id: BrokerId(*id),
                        incarnation: revision,
                    })
                    .collect();
                replicas.rotate_left(index % brokers.len());
                Partition {
                    partition: PartitionIndex(index as i32),
                    raft_group_id: RaftGroupId((first_group + index) as u64),
                    isr: replicas.iter().map(|replica| replica.broker_id).collect(),
                    replicas,
                    leader: None,
                    leader_epoch: LeaderEpoch(0),
                    partition_epoch: PartitionEpoch(0),
                    ..Partition::default()
                }
            });
            let topic = Topic {
                topic_id: TopicId(Uuid::new_v4()),
                name: name.into(),
                configs: BTreeMap::new(),
                partitions: partitions.collect(),
            };
            image.put_topic(Arc::new(topic));
        });
    }

    /// Leadership stays where it is.
    pub fn keep_leaders(&self) {
        self.keeps_leaders.store(true, Ordering::Relaxed);
    }

    pub fn delete_topic(&self, name: &str) {
        self.change(|image| {
            let topic_id = image.topic_by_name(name).unwrap().topic_id;
            image.remove_topic(topic_id);
        });
    }

    /// Waits until the image is as `is_good` wants it.
    pub async fn wait_for(&self, what: &str, is_good: impl Fn(&ClusterImage) -> bool) {
        let mut revision = self.revision.subscribe();
        let reached = async {
            loop {
                revision.borrow_and_update();
                if is_good(&self.lock()) {
                    return;
                }
                revision.changed().await.unwrap();
            }
        };
        let limit = Duration::from_secs(40);
        if tokio::time::timeout(limit, reached).await.is_err() {
            panic!("{what} did not come about in time: {:#?}", self.image());
        }
    }
}

fn fence(image: &mut ClusterImage, broker_id: BrokerId) {
    if let Some(broker) = image.brokers.get_mut(&broker_id) {
        broker.fenced = true;
    }
    for topic in image.topics.values_mut() {
        for partition in &mut Arc::make_mut(topic).partitions {
            if partition.isr.len() > 1 {
                partition.isr.retain(|id| *id != broker_id);
            }
            if partition.leader == Some(broker_id) {
                partition.leader = None;
            }
            partition.partition_epoch.0 += 1;
        }
    }
}

/// Puts one report in force; true: it was accepted.
fn report(
    image: &mut ClusterImage,
    reporter: BrokerId,
    report: &v1::PartitionReport,
    keeps_leaders: bool,
) -> bool {
    use v1::replica_progress::State;
    let brokers = image.brokers.clone();
    let group = RaftGroupId(report.raft_group_id);
    for topic in image.topics.values_mut() {
        let Some(index) = topic
            .partitions
            .iter()
            .position(|p| p.raft_group_id == group)
        else {
            continue;
        };
        let partition = &mut Arc::make_mut(topic).partitions[index];
        if report.leader_epoch < partition.leader_epoch.0
            || (report.leader_epoch == partition.leader_epoch.0
                && report.partition_epoch != partition.partition_epoch.0)
        {
            return false;
        }
        partition.leader = Some(reporter);
        partition.leader_epoch = LeaderEpoch(report.leader_epoch);
        partition.isr = report
            .replicas
            .iter()
            .filter(|replica| replica.state() == State::CaughtUp)
            .map(|replica| BrokerId(replica.broker_id))
            .filter(|id| brokers.get(id).is_some_and(|broker| !broker.fenced))
            .collect();
        // Leaders go back to where they should be.
        let preferred = partition.replicas[0].broker_id;
        let can_lead =
            !keeps_leaders && preferred != reporter && partition.isr.contains(&preferred);
        partition.wanted_leader = can_lead.then_some(preferred);
        partition.partition_epoch.0 += 1;
        return true;
    }
    false
}

#[tonic::async_trait]
impl Sessions for FakeController {
    async fn register_broker(
        &self,
        request: Request<v1::RegisterBrokerRequest>,
    ) -> Result<Response<v1::RegisterBrokerResponse>, Status> {
        let request = request.into_inner();
        let broker_epoch = self.change(|image| {
            let broker = Broker {
                broker_id: BrokerId(request.broker_id),
                incarnation_id: chronik_proto::uuid("id", &request.incarnation_id).unwrap(),
                broker_epoch: BrokerEpoch(image.revision),
                rpc_address: request.rpc_address,
                rack: None,
                fenced: false,
                drain: Drain::None,
            };
            image.brokers.insert(broker.broker_id, broker);
            image.revision
        });
        Ok(Response::new(v1::RegisterBrokerResponse {
            broker_epoch,
            session_timeout_ms: 3_000,
            heartbeat_interval_ms: 200,
            cluster_id: "test".to_owned(),
        }))
    }

    async fn broker_heartbeat(
        &self,
        request: Request<v1::BrokerHeartbeatRequest>,
    ) -> Result<Response<v1::BrokerHeartbeatResponse>, Status> {
        let request = request.into_inner();
        let id = BrokerId(request.broker_id);
        let fenced = |image: &ClusterImage| image.brokers.get(&id).is_none_or(|b| b.fenced);
        let is_fenced = fenced(&self.lock());
        if request.shutting_down && !is_fenced {
            self.change(|image| fence(image, id));
        }
        Ok(Response::new(v1::BrokerHeartbeatResponse {
            fenced: fenced(&self.lock()),
        }))
    }

    async fn report_partitions(
        &self,
        request: Request<v1::ReportPartitionsRequest>,
    ) -> Result<Response<v1::ReportPartitionsResponse>, Status> {
        use v1::partition_report_result::Outcome;
        let request = request.into_inner();
        let reporter = BrokerId(request.broker_id);
        let keeps_leaders = self.keeps_leaders.load(Ordering::Relaxed);
        let results = self.change(|image| {
            let results = request.reports.iter().map(|one| v1::PartitionReportResult {
                raft_group_id: one.raft_group_id,
                outcome: match report(image, reporter, one, keeps_leaders) {
                    true => Outcome::Accepted.into(),
                    false => Outcome::StalePartitionEpoch.into(),
                },
            });
            results.collect()
        });
        Ok(Response::new(v1::ReportPartitionsResponse {
            fenced: false,
            results,
        }))
    }

    async fn register_gateway(
        &self,
        _: Request<v1::RegisterGatewayRequest>,
    ) -> Result<Response<v1::RegisterGatewayResponse>, Status> {
        Err(Status::unimplemented("brokers only"))
    }

    async fn gateway_heartbeat(
        &self,
        _: Request<v1::GatewayHeartbeatRequest>,
    ) -> Result<Response<v1::GatewayHeartbeatResponse>, Status> {
        Err(Status::unimplemented("brokers only"))
    }
}

#[tonic::async_trait]
impl Watch for FakeController {
    type WatchImageStream = BoxStream<'static, Result<v1::WatchEvent, Status>>;

    async fn watch_image(
        &self,
        _: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchImageStream>, Status> {
        let revisions = tokio_stream::wrappers::WatchStream::new(self.revision.subscribe());
        let controller = self.clone();
        let events = revisions.map(move |_| {
            let image = v1::ClusterImage::from(&controller.image());
            Ok(v1::WatchEvent {
                event: Some(v1::watch_event::Event::Image(image)),
            })
        });
        Ok(Response::new(events.boxed()))
    }
}

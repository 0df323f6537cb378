//! Brokers and a controller that do as a test tells them, behind the real gRPC services.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1::{self, PartitionError};
use chronik_types::cluster_image::{Broker, ClusterImage, Drain, Partition, Topic};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

type Answer<T> = Result<Response<T>, Status>;
type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a fake broker does with produce requests.
#[derive(Debug, Clone, PartialEq)]
pub enum ProduceMode {
    Answer,
    /// Answers only when this many have come, the last one first.
    Reverse(usize),
    Silent,
    /// Answers when `BrokerState::released` is cancelled.
    Hold,
    /// Ends the stream at the first request.
    Break,
    Refuse(PartitionError, Option<v1::Leader>),
}

pub struct BrokerState {
    pub mode: Mutex<ProduceMode>,
    pub produced: Mutex<Vec<v1::ProduceRequest>>,
    /// Records by Raft group, given to whoever fetches.
    pub records: Mutex<HashMap<u64, Bytes>>,
    pub fetches: Mutex<Vec<v1::FetchStart>>,
    pub not_leader_of: Mutex<HashMap<u64, v1::Leader>>,
    pub finished: Mutex<usize>,
    pub changed: Notify,
    pub released: CancellationToken,
}

impl BrokerState {
    /// Waits until that many produce requests have come.
    pub async fn wait_for_produced(&self, count: usize) {
        let arrived = async {
            loop {
                let changed = self.changed.notified();
                if self.produced.lock().unwrap().len() >= count {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), arrived)
            .await
            .unwrap();
    }
}

/// A running fake broker; stops when dropped.
pub struct FakeBroker {
    pub broker_id: i32,
    pub address: SocketAddr,
    pub state: Arc<BrokerState>,
    _process: Process,
}

impl FakeBroker {
    pub fn start(broker_id: i32) -> Self {
        let state = Arc::new(BrokerState {
            mode: Mutex::new(ProduceMode::Answer),
            produced: Mutex::default(),
            records: Mutex::default(),
            fetches: Mutex::default(),
            not_leader_of: Mutex::default(),
            finished: Mutex::default(),
            changed: Notify::new(),
            released: CancellationToken::new(),
        });
        let service = BrokerService {
            broker_id,
            state: state.clone(),
        };
        let (address, process) = serve(move |server| {
            server
                .add_service(v1::data_server::DataServer::new(service.clone()))
                .add_service(v1::groups_server::GroupsServer::new(service))
        });
        Self {
            broker_id,
            address,
            state,
            _process: process,
        }
    }

    pub fn set_mode(&self, mode: ProduceMode) {
        *self.state.mode.lock().unwrap() = mode;
    }
}

/// A runtime of its own, so that dropping it ends every connection at once, like a killed process.
struct Process(Option<Runtime>);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn serve(
    add: impl FnOnce(&mut tonic::transport::Server) -> tonic::transport::server::Router,
) -> (SocketAddr, Process) {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let router = add(&mut tonic::transport::Server::builder());
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        router
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    (address, Process(Some(runtime)))
}

#[derive(Clone)]
struct BrokerService {
    broker_id: i32,
    state: Arc<BrokerState>,
}

impl BrokerService {
    fn produced(&self, request: &v1::ProduceRequest) -> v1::ProduceResponse {
        let (error, leader) = match &*self.state.mode.lock().unwrap() {
            ProduceMode::Refuse(error, leader) => (*error, *leader),
            _ => (PartitionError::None, None),
        };
        let partitions = request
            .partitions
            .iter()
            .map(|p| v1::PartitionProduceResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                base_offset: request.request_id as i64,
                log_append_time_ms: -1,
                leader,
                ..Default::default()
            });
        v1::ProduceResponse {
            request_id: request.request_id,
            partitions: partitions.collect(),
        }
    }

    fn fetched(&self, request_id: u64, start: &v1::FetchStart) -> v1::FetchResponse {
        let records = self.state.records.lock().unwrap();
        let not_leader = self.state.not_leader_of.lock().unwrap();
        let partitions = start.partitions.iter().map(|p| {
            let leader = not_leader.get(&p.raft_group_id).copied();
            let error = match leader {
                Some(_) => PartitionError::NotLeader,
                None => PartitionError::None,
            };
            v1::PartitionFetchResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                high_watermark: 10,
                last_stable_offset: 10,
                records: records.get(&p.raft_group_id).cloned().into_iter().collect(),
                leader,
                ..Default::default()
            }
        });
        v1::FetchResponse {
            request_id,
            partitions: partitions.collect(),
        }
    }
}

#[tonic::async_trait]
impl v1::data_server::Data for BrokerService {
    type ProduceStream = Outgoing<v1::ProduceResponse>;
    type FetchStream = Outgoing<v1::FetchResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Answer<Self::ProduceStream> {
        let mut incoming = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        let service = self.clone();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(Ok(request)) = incoming.next().await {
                service.state.produced.lock().unwrap().push(request.clone());
                service.state.changed.notify_waiters();
                let mode = service.state.mode.lock().unwrap().clone();
                match mode {
                    _ if request.acks == 0 => {}
                    ProduceMode::Answer | ProduceMode::Refuse(..) => {
                        let _ = sender.send(Ok(service.produced(&request))).await;
                    }
                    ProduceMode::Reverse(count) => {
                        held.push(request);
                        if held.len() == count {
                            for request in held.drain(..).rev() {
                                let _ = sender.send(Ok(service.produced(&request))).await;
                            }
                        }
                    }
                    ProduceMode::Silent => {}
                    ProduceMode::Hold => {
                        let (service, sender) = (service.clone(), sender.clone());
                        tokio::spawn(async move {
                            service.state.released.cancelled().await;
                            let _ = sender.send(Ok(service.produced(&request))).await;
                        });
                    }
                    ProduceMode::Break => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Answer<Self::FetchStream> {
        let mut incoming = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        let service = self.clone();
        tokio::spawn(async move {
            let mut polls: BTreeMap<u64, CancellationToken> = BTreeMap::new();
            while let Some(Ok(request)) = incoming.next().await {
                let id = request.request_id;
                match request.kind.unwrap() {
                    v1::fetch_request::Kind::Finish(_) => {
                        *service.state.finished.lock().unwrap() += 1;
                        if let Some(poll) = polls.remove(&id) {
                            poll.cancel();
                        }
                    }
                    v1::fetch_request::Kind::Start(start) => {
                        service.state.fetches.lock().unwrap().push(start.clone());
                        let finish = CancellationToken::new();
                        polls.insert(id, finish.clone());
                        let (service, sender) = (service.clone(), sender.clone());
                        tokio::spawn(async move {
                            let answer = service.fetched(id, &start);
                            let news = |p: &v1::PartitionFetchResult| {
                                p.error() != PartitionError::None || !p.records.is_empty()
                            };
                            if !answer.partitions.iter().any(news) {
                                let wait = Duration::from_millis(u64::from(start.max_wait_ms));
                                let _ = tokio::time::timeout(wait, finish.cancelled()).await;
                            }
                            let _ = sender.send(Ok(answer)).await;
                        });
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Answer<v1::ListOffsetsResponse> {
        let not_leader = self.state.not_leader_of.lock().unwrap();
        let partitions = request.into_inner().partitions.into_iter().map(|p| {
            let leader = not_leader.get(&p.raft_group_id).copied();
            let error = if leader.is_some() {
                PartitionError::NotLeader
            } else {
                PartitionError::None
            };
            v1::PartitionListOffsetsResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                offset: 100 + i64::from(self.broker_id),
                timestamp: -1,
                leader_epoch: 3,
                leader,
                ..Default::default()
            }
        });
        Ok(Response::new(v1::ListOffsetsResponse {
            partitions: partitions.collect(),
        }))
    }

    async fn offset_for_leader_epoch(
        &self,
        request: Request<v1::OffsetForLeaderEpochRequest>,
    ) -> Answer<v1::OffsetForLeaderEpochResponse> {
        let partitions =
            request
                .into_inner()
                .partitions
                .into_iter()
                .map(|p| v1::PartitionEpochEndOffset {
                    raft_group_id: p.raft_group_id,
                    end: Some(v1::EpochEndOffset {
                        leader_epoch: p.leader_epoch,
                        end_offset: 9,
                    }),
                    ..Default::default()
                });
        Ok(Response::new(v1::OffsetForLeaderEpochResponse {
            partitions: partitions.collect(),
        }))
    }

    async fn describe_logs(
        &self,
        _request: Request<v1::DescribeLogsRequest>,
    ) -> Answer<v1::DescribeLogsResponse> {
        Ok(Response::new(v1::DescribeLogsResponse {
            folder: "/data".to_owned(),
            total_bytes: 1000,
            available_bytes: 400,
            // The second is of no topic that the gateway knows of.
            logs: [1, 999]
                .map(|raft_group_id| v1::LogDescription {
                    raft_group_id,
                    size_bytes: 70,
                    offset_lag: 2,
                })
                .to_vec(),
        }))
    }

    /// Every log ends at offset 50.
    async fn delete_records(
        &self,
        request: Request<v1::DeleteRecordsRequest>,
    ) -> Answer<v1::DeleteRecordsResponse> {
        const END: i64 = 50;
        let partitions = request.into_inner().partitions.into_iter().map(|p| {
            let error = if p.before_offset > END {
                PartitionError::OffsetOutOfRange
            } else {
                PartitionError::None
            };
            v1::PartitionDeleteRecordsResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                log_start_offset: if p.before_offset == -1 {
                    END
                } else {
                    p.before_offset
                },
                ..Default::default()
            }
        });
        Ok(Response::new(v1::DeleteRecordsResponse {
            partitions: partitions.collect(),
        }))
    }
}

#[tonic::async_trait]
impl v1::groups_server::Groups for BrokerService {
    async fn join_group(
        &self,
        request: Request<v1::JoinGroupRequest>,
    ) -> Answer<v1::JoinGroupResponse> {
        let request = request.into_inner();
        let protocol = request.protocols.first().map(|p| p.name.clone());
        Ok(Response::new(v1::JoinGroupResponse {
            generation: 1,
            protocol_type: Some(request.protocol_type),
            protocol_name: protocol,
            leader: "m".to_owned(),
            member_id: "m".to_owned(),
            members: vec![v1::GroupMember {
                member_id: "m".to_owned(),
                group_instance_id: None,
                metadata: Bytes::from_static(b"meta"),
            }],
            ..Default::default()
        }))
    }

    async fn sync_group(
        &self,
        request: Request<v1::SyncGroupRequest>,
    ) -> Answer<v1::SyncGroupResponse> {
        let assignment = request
            .into_inner()
            .assignments
            .first()
            .map(|a| a.assignment.clone());
        let assignment = assignment.unwrap_or_default();
        Ok(Response::new(v1::SyncGroupResponse {
            assignment,
            ..Default::default()
        }))
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatResponse> {
        let error = v1::GroupError::RebalanceInProgress.into();
        Ok(Response::new(v1::HeartbeatResponse { error }))
    }

    async fn leave_group(
        &self,
        request: Request<v1::LeaveGroupRequest>,
    ) -> Answer<v1::LeaveGroupResponse> {
        let members = request
            .into_inner()
            .members
            .into_iter()
            .map(|m| v1::LeavingMemberResult {
                member_id: m.member_id,
                group_instance_id: m.group_instance_id,
                error: v1::GroupError::UnknownMember.into(),
            });
        Ok(Response::new(v1::LeaveGroupResponse {
            members: members.collect(),
            error: 0,
        }))
    }

    async fn commit_offsets(
        &self,
        request: Request<v1::CommitOffsetsRequest>,
    ) -> Answer<v1::CommitOffsetsResponse> {
        let results = request
            .into_inner()
            .offsets
            .into_iter()
            .map(|o| v1::OffsetCommitResult {
                topic: o.topic,
                partition: o.partition,
                error: 0,
            });
        Ok(Response::new(v1::CommitOffsetsResponse {
            results: results.collect(),
        }))
    }

    async fn fetch_offsets(
        &self,
        request: Request<v1::FetchOffsetsRequest>,
    ) -> Answer<v1::FetchOffsetsResponse> {
        let groups = request
            .into_inner()
            .groups
            .into_iter()
            .map(|g| v1::GroupOffsets {
                consumer_group: g.consumer_group,
                error: 0,
                offsets: vec![v1::CommittedOffset {
                    topic: "t".to_owned(),
                    partition: 0,
                    offset: 42,
                    leader_epoch: 1,
                    metadata: "note".to_owned(),
                }],
            });
        Ok(Response::new(v1::FetchOffsetsResponse {
            groups: groups.collect(),
        }))
    }

    async fn describe_groups(
        &self,
        request: Request<v1::DescribeGroupsRequest>,
    ) -> Answer<v1::DescribeGroupsResponse> {
        let groups = request
            .into_inner()
            .groups
            .into_iter()
            .map(|g| v1::DescribedGroup {
                consumer_group: g.consumer_group,
                error: v1::GroupError::UnknownGroup.into(),
                ..Default::default()
            });
        Ok(Response::new(v1::DescribeGroupsResponse {
            groups: groups.collect(),
        }))
    }

    async fn list_groups(
        &self,
        _: Request<v1::ListGroupsRequest>,
    ) -> Answer<v1::ListGroupsResponse> {
        let group = v1::ListedGroup {
            consumer_group: format!("group-of-{}", self.broker_id),
            protocol_type: "consumer".to_owned(),
            state: "Stable".to_owned(),
        };
        Ok(Response::new(v1::ListGroupsResponse {
            error: 0,
            groups: vec![group],
        }))
    }
}

/// A running fake controller; stops when dropped.
pub struct FakeController {
    pub address: SocketAddr,
    pub image: Arc<watch::Sender<ClusterImage>>,
    _process: Process,
}

impl FakeController {
    /// A cluster of these brokers, without topics.
    pub fn start(brokers: &[&FakeBroker]) -> Self {
        let mut image = ClusterImage {
            cluster_id: "test-cluster".to_owned(),
            revision: 1,
            ..ClusterImage::default()
        };
        for broker in brokers {
            let broker_id = BrokerId(broker.broker_id);
            image.brokers.insert(
                broker_id,
                Broker {
                    broker_id,
                    incarnation_id: Uuid::nil(),
                    broker_epoch: BrokerEpoch(1),
                    rpc_address: broker.address.to_string(),
                    rack: None,
                    fenced: false,
                    drain: Drain::None,
                },
            );
        }
        let image = Arc::new(watch::Sender::new(image));
        let service = ControllerService {
            image: image.clone(),
        };
        let (address, process) = serve(move |server| {
            server
                .add_service(v1::sessions_server::SessionsServer::new(service.clone()))
                .add_service(v1::watch_server::WatchServer::new(service.clone()))
                .add_service(v1::admin_server::AdminServer::new(service))
        });
        Self {
            address,
            image,
            _process: process,
        }
    }

    /// Adds a topic whose partition `i` is led by `leaders[i]`; Raft groups are `first_group + i`.
    pub fn add_topic(&self, name: &str, first_group: u64, leaders: &[Option<i32>]) -> Uuid {
        add_topic(&self.image, name, first_group, leaders)
    }
}

fn add_topic(
    image: &watch::Sender<ClusterImage>,
    name: &str,
    first_group: u64,
    leaders: &[Option<i32>],
) -> Uuid {
    let topic_id = Uuid::from_u128(u128::from(first_group));
    image.send_modify(|image| {
        let replicas: Vec<ReplicaId> = image
            .brokers
            .keys()
            .map(|id| ReplicaId {
                broker_id: *id,
                incarnation: 1,
            })
            .collect();
        let partitions = leaders.iter().enumerate().map(|(index, leader)| Partition {
            partition: PartitionIndex(index as i32),
            raft_group_id: RaftGroupId(first_group + index as u64),
            replicas: replicas.clone(),
            isr: image.brokers.keys().copied().collect(),
            leader: leader.map(BrokerId),
            leader_epoch: LeaderEpoch(1),
            partition_epoch: PartitionEpoch(1),
            ..Partition::default()
        });
        let topic = Topic {
            topic_id: TopicId(topic_id),
            name: name.into(),
            configs: Default::default(),
            partitions: partitions.collect(),
        };
        image.put_topic(Arc::new(topic));
        image.revision += 1;
    });
    topic_id
}

#[derive(Clone)]
struct ControllerService {
    image: Arc<watch::Sender<ClusterImage>>,
}

#[tonic::async_trait]
impl v1::sessions_server::Sessions for ControllerService {
    async fn register_broker(
        &self,
        _: Request<v1::RegisterBrokerRequest>,
    ) -> Answer<v1::RegisterBrokerResponse> {
        Err(Status::unimplemented("brokers are fakes"))
    }

    async fn broker_heartbeat(
        &self,
        _: Request<v1::BrokerHeartbeatRequest>,
    ) -> Answer<v1::BrokerHeartbeatResponse> {
        Err(Status::unimplemented("brokers are fakes"))
    }

    async fn report_partitions(
        &self,
        _: Request<v1::ReportPartitionsRequest>,
    ) -> Answer<v1::ReportPartitionsResponse> {
        Err(Status::unimplemented("brokers are fakes"))
    }

    async fn register_gateway(
        &self,
        request: Request<v1::RegisterGatewayRequest>,
    ) -> Answer<v1::RegisterGatewayResponse> {
        let request = request.into_inner();
        let gateway = v1::Gateway {
            gateway_id: request.gateway_id,
            incarnation_id: request.incarnation_id,
            rack: request.rack,
            endpoints: request.endpoints,
        };
        let gateway = chronik_types::cluster_image::Gateway::try_from(gateway).unwrap();
        self.image.send_modify(|image| {
            image.gateways.insert(gateway.gateway_id.clone(), gateway);
            image.revision += 1;
        });
        Ok(Response::new(v1::RegisterGatewayResponse {
            session_timeout_ms: 3000,
            heartbeat_interval_ms: 100,
            cluster_id: "test-cluster".to_owned(),
        }))
    }

    async fn gateway_heartbeat(
        &self,
        request: Request<v1::GatewayHeartbeatRequest>,
    ) -> Answer<v1::GatewayHeartbeatResponse> {
        let request = request.into_inner();
        if request.leaving {
            self.image.send_modify(|image| {
                image.gateways.remove(&request.gateway_id);
                image.revision += 1;
            });
        }
        let expired = !self
            .image
            .borrow()
            .gateways
            .contains_key(&request.gateway_id);
        Ok(Response::new(v1::GatewayHeartbeatResponse { expired }))
    }
}

#[tonic::async_trait]
impl v1::watch_server::Watch for ControllerService {
    type WatchImageStream = Outgoing<v1::WatchEvent>;

    async fn watch_image(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchImageStream> {
        let images = tokio_stream::wrappers::WatchStream::new(self.image.subscribe());
        let events = images.map(|image| {
            let event = v1::watch_event::Event::Image((&image).into());
            Ok(v1::WatchEvent { event: Some(event) })
        });
        Ok(Response::new(events.boxed()))
    }
}

#[tonic::async_trait]
impl v1::admin_server::Admin for ControllerService {
    async fn create_topics(
        &self,
        request: Request<v1::CreateTopicsRequest>,
    ) -> Answer<v1::CreateTopicsResponse> {
        let request = request.into_inner();
        let mut topics = Vec::new();
        for topic in request.topics {
            let mut created = v1::CreatedTopic {
                name: topic.name.clone(),
                partition_count: 2,
                replication_factor: 1,
                configs: topic.configs,
                ..Default::default()
            };
            if self.image.borrow().topic_by_name(&topic.name).is_some() {
                created.error = v1::AdminError::TopicAlreadyExists.into();
            } else if topic.name.contains(' ') {
                created.error = v1::AdminError::InvalidTopicName.into();
            } else if !request.validate_only {
                let (revision, leader) = {
                    let image = self.image.borrow();
                    (image.revision, image.brokers.keys().next().map(|id| id.0))
                };
                let leaders = [leader, leader];
                let id = add_topic(&self.image, &topic.name, 1000 * revision, &leaders);
                created.topic_id = chronik_proto::uuid_bytes(id);
            }
            topics.push(created);
        }
        Ok(Response::new(v1::CreateTopicsResponse { topics }))
    }

    async fn delete_topics(
        &self,
        request: Request<v1::DeleteTopicsRequest>,
    ) -> Answer<v1::TopicResults> {
        let mut topics = Vec::new();
        for topic in request.into_inner().topics {
            let known = self
                .image
                .borrow()
                .topic_by_name(&topic.name)
                .map(|t| t.topic_id);
            let error = match known {
                Some(id) => {
                    self.image.send_modify(|image| {
                        image.remove_topic(id);
                        image.revision += 1;
                    });
                    v1::AdminError::None
                }
                None => v1::AdminError::UnknownTopic,
            };
            topics.push(v1::TopicResult {
                name: topic.name,
                topic_id: topic.topic_id,
                error: error.into(),
                ..Default::default()
            });
        }
        Ok(Response::new(v1::TopicResults { topics }))
    }

    async fn create_partitions(
        &self,
        request: Request<v1::CreatePartitionsRequest>,
    ) -> Answer<v1::TopicResults> {
        let topics = request
            .into_inner()
            .topics
            .into_iter()
            .map(|topic| v1::TopicResult {
                name: topic.name,
                error: v1::AdminError::InvalidPartitions.into(),
                error_message: "too few".to_owned(),
                ..Default::default()
            });
        Ok(Response::new(v1::TopicResults {
            topics: topics.collect(),
        }))
    }

    async fn alter_topic_configs(
        &self,
        request: Request<v1::AlterTopicConfigsRequest>,
    ) -> Answer<v1::TopicResults> {
        let mut topics = Vec::new();
        for change in request.into_inner().topics {
            self.image.send_modify(|image| {
                let mut topic = image.topic_by_name(&change.name).unwrap().as_ref().clone();
                for change in &change.changes {
                    topic
                        .configs
                        .insert(change.name.clone(), change.value.clone());
                }
                image.put_topic(Arc::new(topic));
                image.revision += 1;
            });
            topics.push(v1::TopicResult {
                name: change.name,
                ..Default::default()
            });
        }
        Ok(Response::new(v1::TopicResults { topics }))
    }

    async fn allocate_producer_ids(
        &self,
        request: Request<v1::AllocateProducerIdsRequest>,
    ) -> Answer<v1::AllocateProducerIdsResponse> {
        let count = request.into_inner().count;
        Ok(Response::new(v1::AllocateProducerIdsResponse {
            first: 5000,
            count,
        }))
    }

    async fn alter_reassignments(
        &self,
        request: Request<v1::AlterReassignmentsRequest>,
    ) -> Answer<v1::PartitionResults> {
        let request = request.into_inner();
        let results = request.changes.into_iter().map(|change| {
            let error = match &change.target {
                None => v1::AdminError::NoReassignmentInProgress,
                Some(target) if request.keep_replication_factor && target.broker_ids.len() != 3 => {
                    v1::AdminError::InvalidReplicationFactor
                }
                Some(_) => v1::AdminError::None,
            };
            v1::PartitionResult {
                topic: change.topic,
                partition: change.partition,
                error: error.into(),
                error_message: "because".to_owned(),
            }
        });
        let partitions = results.collect();
        Ok(Response::new(v1::PartitionResults { partitions }))
    }

    async fn list_reassignments(
        &self,
        request: Request<v1::ListReassignmentsRequest>,
    ) -> Answer<v1::ListReassignmentsResponse> {
        let mut named = request.into_inner().partitions;
        if named.is_empty() {
            named = (0..2)
                .map(|partition| v1::PartitionRef {
                    topic: "t".to_owned(),
                    partition,
                })
                .collect();
        }
        let states = named.into_iter().map(|named| v1::ReassignmentState {
            topic: named.topic,
            partition: named.partition,
            replicas: vec![1, 2, 3],
            adding: vec![1],
            removing: vec![3],
            ..Default::default()
        });
        Ok(Response::new(v1::ListReassignmentsResponse {
            reassignments: states.collect(),
        }))
    }

    async fn elect_leaders(
        &self,
        request: Request<v1::ElectLeadersRequest>,
    ) -> Answer<v1::PartitionResults> {
        let request = request.into_inner();
        let results = request.partitions.into_iter().map(|named| {
            let error = match (request.unclean, named.partition) {
                (true, _) => v1::AdminError::UncleanElectionUnsupported,
                (false, 0) => v1::AdminError::None,
                (false, _) => v1::AdminError::ElectionNotNeeded,
            };
            v1::PartitionResult {
                topic: named.topic,
                partition: named.partition,
                error: error.into(),
                error_message: "because".to_owned(),
            }
        });
        let partitions = results.collect();
        Ok(Response::new(v1::PartitionResults { partitions }))
    }

    async fn set_broker_drain(
        &self,
        _: Request<v1::SetBrokerDrainRequest>,
    ) -> Answer<v1::BrokerResult> {
        Err(Status::unimplemented("no gateway asks for it"))
    }

    async fn unregister_broker(
        &self,
        request: Request<v1::UnregisterBrokerRequest>,
    ) -> Answer<v1::BrokerResult> {
        let error = match request.into_inner().broker_id {
            9 => v1::AdminError::UnknownBroker,
            _ => v1::AdminError::BrokerNeeded,
        };
        Ok(Response::new(v1::BrokerResult {
            error: error.into(),
            error_message: "because".to_owned(),
        }))
    }

    async fn alter_cluster_settings(
        &self,
        _: Request<v1::AlterClusterSettingsRequest>,
    ) -> Answer<v1::ClusterSettings> {
        Err(Status::unimplemented("no gateway asks for it"))
    }
}

//! A fake controller: the cluster image that a test gives it, with the sessions and the watch that
//! every gateway needs.
//!
//! Invariant: each change of the image raises its revision.

mod admin;

use std::net::SocketAddr;
use std::sync::Arc;

use chronik_proto::v1;
use chronik_types::cluster_image::{Broker, ClusterImage, Drain, Partition, Topic};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use futures::StreamExt;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::broker::FakeBroker;
use super::{Answer, Outgoing, Process, serve};

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

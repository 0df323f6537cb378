//! The whole gateway in this process, against fake brokers and a fake controller. Here: the cluster
//! under test and the requests that most tests make.
//!
//! Invariant: each test starts a cluster of its own; what it waits for comes in time or fails it.

mod admin_test;
mod fetch_test;
mod groups_test;
mod life_test;
mod metadata_test;
mod produce_test;
mod protocol_test;

use std::net::SocketAddr;
use std::time::Duration;

use chronik_proto::v1::{self, PartitionError};
use kafka_wire as k;
use tokio::time::Instant;

use super::batch_with_headers;
use super::fakes::broker::{FakeBroker, ProduceMode};
use super::fakes::controller::FakeController;
use super::kafka_client::KafkaClient;
use crate::Running;
use crate::config::Config;
use crate::error::ErrorCode;

struct Cluster {
    brokers: Vec<FakeBroker>,
    controller: FakeController,
    gateway: Running,
    folder: tempfile::TempDir,
}

fn config(controller: SocketAddr, folder: &tempfile::TempDir, listeners: usize) -> Config {
    Config {
        listeners: vec!["127.0.0.1:0".to_owned(); listeners],
        controllers: vec![controller.to_string()],
        data_dir: folder.path().to_owned(),
        http_listen: "127.0.0.1:0".to_owned(),
        ..Config::default()
    }
}

impl Cluster {
    async fn start(listeners: usize) -> Self {
        Self::start_with(listeners, |_| {}).await
    }

    async fn start_with(listeners: usize, change: impl FnOnce(&mut Config)) -> Self {
        let mut brokers = Vec::new();
        for id in 1..=3 {
            brokers.push(FakeBroker::start(id));
        }
        let controller = FakeController::start(&brokers.iter().collect::<Vec<_>>());
        controller.add_topic("t", 10, &[Some(1), Some(2), Some(3)]);
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(controller.address, &folder, listeners);
        change(&mut config);
        let gateway = crate::start(config).await.unwrap();
        let cluster = Self {
            brokers,
            controller,
            gateway,
            folder,
        };
        cluster.ready().await;
        cluster
    }

    /// Waits until the gateway has the image with itself in it.
    async fn ready(&self) {
        let mut client = self.client(0).await;
        until("the gateway gets an image", async || {
            let metadata = client.call(&all_topics(), 1).await;
            let registered = !self.controller.image.borrow().gateways.is_empty();
            metadata.brokers.len() == 3 && registered
        })
        .await;
    }

    async fn client(&self, endpoint: usize) -> KafkaClient {
        KafkaClient::connect(self.gateway.kafka_addresses[endpoint]).await
    }

    /// The id of topic "t".
    fn topic_id(&self) -> kafka_wire_core::Uuid {
        let image = self.controller.image.borrow();
        let topic_id = image.topic_by_name("t").unwrap().topic_id;
        kafka_wire_core::Uuid::from_bytes(*topic_id.0.as_bytes())
    }
}

/// Asks until the condition holds.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::task::yield_now().await;
    }
}

fn all_topics() -> k::MetadataRequest {
    let mut request = k::MetadataRequest::default();
    request.topics = None;
    request
}

fn produce(topic: &str, partition: i32, acks: i16, timeout_ms: i32) -> k::ProduceRequest {
    let mut data = k::produce_request::PartitionProduceData::default();
    data.index = partition;
    data.records = Some(batch_with_headers(&[]));
    let mut topic_data = k::produce_request::TopicProduceData::default();
    topic_data.name = topic.into();
    topic_data.partition_data = vec![data];
    let mut request = k::ProduceRequest::default();
    request.acks = acks;
    request.timeout_ms = timeout_ms;
    request.topic_data = vec![topic_data];
    request
}

fn partition_of(response: &k::ProduceResponse) -> &k::produce_response::PartitionProduceResponse {
    &response.responses[0].partition_responses[0]
}

/// Produces for all replicas; gives the partition's error code.
async fn produce_code(
    client: &mut KafkaClient,
    topic: &str,
    partition: i32,
    timeout_ms: i32,
) -> i16 {
    let request = produce(topic, partition, -1, timeout_ms);
    partition_of(&client.call(&request, 7).await).error_code
}

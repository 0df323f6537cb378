//! The whole gateway in this process, against fake brokers and a fake controller.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1::{self, PartitionError};
use kafka_wire as k;
use tokio::time::{Instant, timeout};

use super::batch_with_headers;
use super::fakes::{FakeBroker, FakeController, ProduceMode};
use super::kafka_client::KafkaClient;
use crate::Running;
use crate::config::Config;
use crate::error::ErrorCode;
use crate::protocol::Api;

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
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let metadata = client.call(&all_topics(), 1).await;
            let registered = !self.controller.image.borrow().gateways.is_empty();
            if metadata.brokers.len() == 3 && registered {
                return;
            }
            assert!(Instant::now() < deadline, "the gateway got no image");
            tokio::task::yield_now().await;
        }
    }

    async fn client(&self, endpoint: usize) -> KafkaClient {
        KafkaClient::connect(self.gateway.kafka_addresses[endpoint]).await
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

fn fetch(topic: &str, partitions: &[i32], max_wait_ms: i32, max_bytes: i32) -> k::FetchRequest {
    let mut wanted = k::fetch_request::FetchTopic::default();
    wanted.topic = topic.into();
    for index in partitions {
        let mut partition = k::fetch_request::FetchPartition::default();
        partition.partition = *index;
        partition.partition_max_bytes = 1 << 20;
        partition.current_leader_epoch = -1;
        wanted.partitions.push(partition);
    }
    let mut request = k::FetchRequest::default();
    request.replica_id = -1;
    request.max_wait_ms = max_wait_ms;
    request.min_bytes = 1;
    request.max_bytes = max_bytes;
    request.session_epoch = -1;
    request.topics = vec![wanted];
    request
}

#[tokio::test]
async fn pipelined_produce_requests_reach_the_broker_in_order_and_are_answered_in_order() {
    let cluster = Cluster::start(1).await;
    const COUNT: usize = 20;
    cluster.brokers[0].set_mode(ProduceMode::Reverse(COUNT));
    let mut client = cluster.client(0).await;
    let mut sent = Vec::new();
    for number in 0..COUNT {
        let mut request = produce("t", 0, -1, 10_000);
        request.topic_data[0].partition_data[0].records = Some(super::batch(&[number as u8]));
        sent.push(client.send(&request, 7).await);
    }
    let mut offsets = Vec::new();
    for correlation_id in sent {
        let (answered, response) = client.receive::<k::ProduceRequest>(7).await;
        assert_eq!(answered, correlation_id);
        assert_eq!(partition_of(&response).error_code, 0);
        offsets.push(partition_of(&response).base_offset);
    }
    assert!(offsets.is_sorted(), "{offsets:?}");
    let produced = cluster.brokers[0].state.produced.lock().unwrap();
    let order: Vec<u8> = produced
        .iter()
        .map(|request| *request.partitions[0].records.last().unwrap())
        .collect();
    assert_eq!(order, (0..COUNT as u8).collect::<Vec<_>>());
}

#[tokio::test]
async fn requests_of_other_kinds_wait_for_those_before_them() {
    let cluster = Cluster::start(1).await;
    cluster.brokers[0].set_mode(ProduceMode::Reverse(2));
    let mut client = cluster.client(0).await;
    client.send(&produce("t", 0, -1, 10_000), 7).await;
    client.send(&produce("t", 0, -1, 10_000), 7).await;
    client.send(&k::MetadataRequest::default(), 1).await;
    client.send(&produce("t", 1, -1, 10_000), 7).await;
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, 1);
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, 2);
    assert_eq!(client.receive::<k::MetadataRequest>(1).await.0, 3);
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, 4);
}

#[tokio::test]
async fn produce_works_in_every_version() {
    let cluster = Cluster::start(1).await;
    let topic_id = cluster
        .controller
        .image
        .borrow()
        .topic_by_name("t")
        .unwrap()
        .topic_id;
    let mut client = cluster.client(0).await;
    for version in 3..=13 {
        let mut request = produce("t", 0, -1, 1000);
        if version >= 13 {
            request.topic_data[0].name = "".into();
            request.topic_data[0].topic_id =
                kafka_wire_core::Uuid::from_bytes(*topic_id.0.as_bytes());
        }
        let response = client.call(&request, version).await;
        assert_eq!(partition_of(&response).error_code, 0, "version {version}");
    }
}

#[tokio::test]
async fn produce_of_the_old_versions_is_refused_in_its_own_form() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    // Version 2: header with a null client id; acks 1, timeout 1, topic "t", partition 0, no bytes.
    let mut frame = vec![0, 0, 0, 2, 0, 0, 0, 9, 0xff, 0xff];
    frame.extend([
        0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    client.send_raw(&(frame.len() as i32).to_be_bytes()).await;
    client.send_raw(&frame).await;
    let answer = client.frame().await.unwrap();
    let expected = [
        vec![
            0, 0, 0, 9, 0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 1, 0, 0, 0, 0, 0, 35,
        ],
        vec![0xff; 16],
        vec![0; 4],
    ];
    assert_eq!(answer[..], expected.concat());
}

#[tokio::test]
async fn a_broken_stream_is_an_unknown_outcome() {
    let cluster = Cluster::start(1).await;
    cluster.brokers[0].set_mode(ProduceMode::Break);
    let mut client = cluster.client(0).await;
    let response = client.call(&produce("t", 0, -1, 5000), 7).await;
    assert_eq!(
        partition_of(&response).error_code,
        ErrorCode::RequestTimedOut.code()
    );
    // The stream comes back by itself.
    cluster.brokers[0].set_mode(ProduceMode::Answer);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let response = client.call(&produce("t", 0, -1, 5000), 7).await;
        if partition_of(&response).error_code == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "the stream did not come back");
    }
}

#[tokio::test]
async fn no_answer_in_time_is_an_unknown_outcome() {
    let cluster = Cluster::start(1).await;
    cluster.brokers[0].set_mode(ProduceMode::Silent);
    let mut client = cluster.client(0).await;
    let response = client.call(&produce("t", 0, -1, 50), 7).await;
    assert_eq!(
        partition_of(&response).error_code,
        ErrorCode::RequestTimedOut.code()
    );
}

#[tokio::test]
async fn acks_0_has_no_answer() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    client.send(&produce("t", 0, 0, 1000), 7).await;
    let last = client.send(&produce("t", 0, 1, 1000), 7).await;
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, last);
    assert_eq!(cluster.brokers[0].state.produced.lock().unwrap().len(), 2);
    // A failure cannot be told, so the connection ends.
    client.send(&produce("t", 99, 0, 1000), 7).await;
    assert_eq!(client.frame().await, None);
}

#[tokio::test]
async fn a_hint_moves_later_requests_and_metadata_to_the_new_leader() {
    let cluster = Cluster::start(1).await;
    let leader = v1::Leader {
        broker_id: 2,
        leader_epoch: 5,
    };
    cluster.brokers[0].set_mode(ProduceMode::Refuse(PartitionError::NotLeader, Some(leader)));
    let mut client = cluster.client(0).await;
    let response = client.call(&produce("t", 0, -1, 1000), 10).await;
    let partition = partition_of(&response);
    assert_eq!(partition.error_code, ErrorCode::NotLeaderOrFollower.code());
    assert_eq!(
        (
            partition.current_leader.leader_id,
            partition.current_leader.leader_epoch
        ),
        (2, 5)
    );
    assert_eq!(response.node_endpoints[0].node_id, 2);
    let response = client.call(&produce("t", 0, -1, 1000), 10).await;
    assert_eq!(partition_of(&response).error_code, 0);
    assert_eq!(cluster.brokers[1].state.produced.lock().unwrap().len(), 1);
    let metadata = client.call(&all_topics(), 1).await;
    assert_eq!(metadata.topics[0].partitions[0].leader_id, 2);
}

#[tokio::test]
async fn three_endpoints_stand_for_one_broker_each() {
    let cluster = Cluster::start(3).await;
    let mut ports = Vec::new();
    let mut groups = Vec::new();
    for endpoint in 0..3 {
        let mut client = cluster.client(endpoint).await;
        let metadata = client.call(&all_topics(), 12).await;
        assert_eq!(metadata.cluster_id.as_deref(), Some("test-cluster"));
        let seen: Vec<(i32, i32)> = metadata
            .brokers
            .iter()
            .map(|b| (b.node_id, b.port))
            .collect();
        ports.push(seen);
        let listed = client.call(&k::ListGroupsRequest::default(), 4).await;
        assert_eq!(listed.groups.len(), 1);
        groups.push((
            cluster.gateway.kafka_addresses[endpoint].port(),
            listed.groups[0].clone(),
        ));
    }
    assert_eq!(ports[0], ports[1]);
    assert_eq!(ports[1], ports[2]);
    let mut distinct: Vec<i32> = ports[0].iter().map(|(_, port)| *port).collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 3);
    for (port, group) in groups {
        let broker = ports[0]
            .iter()
            .find(|(_, p)| *p == i32::from(port))
            .unwrap()
            .0;
        assert_eq!(&*group.group_id, format!("group-of-{broker}"));
    }
}

#[tokio::test]
async fn a_fetch_over_several_brokers_is_answered_by_the_first_that_has_something() {
    let cluster = Cluster::start(1).await;
    let records = batch_with_headers(&[]);
    cluster.brokers[1]
        .state
        .records
        .lock()
        .unwrap()
        .insert(11, records.clone());
    let mut client = cluster.client(0).await;
    let started = Instant::now();
    let response = client
        .call(&fetch("t", &[0, 1, 2], 15_000, 1 << 20), 11)
        .await;
    assert!(started.elapsed() < Duration::from_secs(10));
    let partitions = &response.responses[0].partitions;
    let seen: Vec<(i32, i16, usize)> = partitions
        .iter()
        .map(|p| {
            (
                p.partition_index,
                p.error_code,
                p.records.as_ref().map_or(0, Bytes::len),
            )
        })
        .collect();
    assert_eq!(seen, vec![(0, 0, 0), (1, 0, records.len()), (2, 0, 0)]);
    for broker in [&cluster.brokers[0], &cluster.brokers[2]] {
        assert_eq!(*broker.state.finished.lock().unwrap(), 1);
    }
}

#[tokio::test]
async fn fetch_works_in_every_version() {
    let cluster = Cluster::start(1).await;
    let records = batch_with_headers(&[]);
    cluster.brokers[0]
        .state
        .records
        .lock()
        .unwrap()
        .insert(10, records.clone());
    let topic_id = cluster
        .controller
        .image
        .borrow()
        .topic_by_name("t")
        .unwrap()
        .topic_id;
    let mut client = cluster.client(0).await;
    for version in 4..=18 {
        let mut request = fetch("t", &[0], 100, 1 << 20);
        if version >= 13 {
            request.topics[0].topic = "".into();
            request.topics[0].topic_id = kafka_wire_core::Uuid::from_bytes(*topic_id.0.as_bytes());
        }
        if version < 7 {
            request.session_epoch = -1;
        }
        let response = client.call(&request, version).await;
        let partition = &response.responses[0].partitions[0];
        assert_eq!(partition.error_code, 0, "version {version}");
        assert_eq!(
            partition.records.as_ref(),
            Some(&records),
            "version {version}"
        );
    }
}

#[tokio::test]
async fn a_fetch_keeps_to_its_size_over_all_brokers() {
    let cluster = Cluster::start(1).await;
    let records = batch_with_headers(&[]);
    for (at, broker) in cluster.brokers.iter().enumerate() {
        broker
            .state
            .records
            .lock()
            .unwrap()
            .insert(10 + at as u64, records.clone());
    }
    let mut client = cluster.client(0).await;
    let limit = records.len() as i32 + 1;
    let response = client.call(&fetch("t", &[2, 0, 1], 100, limit), 11).await;
    let sizes: Vec<usize> = response.responses[0]
        .partitions
        .iter()
        .map(|p| p.records.as_ref().map_or(0, Bytes::len))
        .collect();
    let with_records = sizes.iter().filter(|size| **size > 0).count();
    assert_eq!(with_records, 1, "{sizes:?}");
}

#[tokio::test]
async fn a_fetch_follows_a_moved_leader_once() {
    let cluster = Cluster::start(1).await;
    let leader = v1::Leader {
        broker_id: 3,
        leader_epoch: 9,
    };
    cluster.brokers[0]
        .state
        .not_leader_of
        .lock()
        .unwrap()
        .insert(10, leader);
    let records = batch_with_headers(&[]);
    cluster.brokers[2]
        .state
        .records
        .lock()
        .unwrap()
        .insert(10, records.clone());
    let mut client = cluster.client(0).await;
    let response = client.call(&fetch("t", &[0], 1000, 1 << 20), 12).await;
    assert_eq!(
        response.responses[0].partitions[0].records.as_ref(),
        Some(&records)
    );
}

#[tokio::test]
async fn fetch_sessions_are_not_given_out() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    let mut request = fetch("t", &[0], 0, 1 << 20);
    request.session_epoch = 0;
    assert_eq!(client.call(&request, 11).await.session_id, 0);
    request.session_id = 77;
    request.session_epoch = 1;
    let response = client.call(&request, 11).await;
    assert_eq!(
        response.error_code,
        ErrorCode::FetchSessionIdNotFound.code()
    );
    let mut unknown = fetch("", &[0], 0, 1 << 20);
    unknown.topics[0].topic_id = kafka_wire_core::Uuid::from_bytes([9; 16]);
    let response = client.call(&unknown, 13).await;
    let code = response.responses[0].partitions[0].error_code;
    assert_eq!(code, ErrorCode::UnknownTopicId.code());
}

#[tokio::test]
async fn topics_are_created_for_metadata_and_produce() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    let mut topic = k::metadata_request::MetadataRequestTopic::default();
    topic.name = Some("by-metadata".into());
    let mut request = k::MetadataRequest::default();
    request.topics = Some(vec![topic.clone()]);
    request.allow_auto_topic_creation = false;
    let metadata = client.call(&request, 9).await;
    assert_eq!(
        metadata.topics[0].error_code,
        ErrorCode::UnknownTopicOrPartition.code()
    );
    request.allow_auto_topic_creation = true;
    let metadata = client.call(&request, 9).await;
    assert_eq!(
        (
            metadata.topics[0].error_code,
            metadata.topics[0].partitions.len()
        ),
        (0, 2)
    );
    topic.name = Some("not valid".into());
    request.topics = Some(vec![topic]);
    let metadata = client.call(&request, 9).await;
    assert_eq!(
        metadata.topics[0].error_code,
        ErrorCode::InvalidTopic.code()
    );
    let response = client.call(&produce("by-produce", 1, -1, 5000), 7).await;
    assert_eq!(partition_of(&response).error_code, 0);
}

#[tokio::test]
async fn a_partition_without_a_leader_says_so() {
    let cluster = Cluster::start(1).await;
    cluster.controller.add_topic("headless", 90, &[None]);
    let mut client = cluster.client(0).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let metadata = client.call(&all_topics(), 1).await;
        if let Some(topic) = metadata
            .topics
            .iter()
            .find(|t| t.name.as_deref() == Some("headless"))
        {
            let partition = &topic.partitions[0];
            let expected = (ErrorCode::LeaderNotAvailable.code(), -1);
            assert_eq!((partition.error_code, partition.leader_id), expected);
            break;
        }
        assert!(Instant::now() < deadline);
    }
    let response = client.call(&produce("headless", 0, -1, 1000), 7).await;
    assert_eq!(
        partition_of(&response).error_code,
        ErrorCode::LeaderNotAvailable.code()
    );
}

#[tokio::test]
async fn groups_find_their_coordinator_and_work_in_every_version() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for version in 0..=6 {
        let mut request = k::FindCoordinatorRequest::default();
        if version >= 4 {
            request.coordinator_keys = vec!["g".into()];
            let response = client.call(&request, version).await;
            let found = (
                response.coordinators[0].error_code,
                response.coordinators[0].node_id,
            );
            assert_eq!(found, (0, 1));
        } else {
            request.key = "g".into();
            let response = client.call(&request, version).await;
            assert_eq!((response.error_code, response.node_id), (0, 1));
        }
    }
    for version in 0..=9 {
        let mut request = k::JoinGroupRequest::default();
        request.group_id = "g".into();
        request.session_timeout_ms = 10_000;
        request.rebalance_timeout_ms = if version == 0 { -1 } else { 10_000 };
        request.protocol_type = "consumer".into();
        let response = client.call(&request, version).await;
        assert_eq!(
            (response.error_code, response.members.len()),
            (0, 1),
            "version {version}"
        );
    }
    for version in 0..=5 {
        let mut request = k::SyncGroupRequest::default();
        request.group_id = "g".into();
        assert_eq!(client.call(&request, version).await.error_code, 0);
    }
    for version in 0..=4 {
        let mut request = k::HeartbeatRequest::default();
        request.group_id = "g".into();
        let code = client.call(&request, version).await.error_code;
        assert_eq!(code, ErrorCode::RebalanceInProgress.code());
    }
    for version in 0..=5 {
        let mut request = k::LeaveGroupRequest::default();
        request.group_id = "g".into();
        if version >= 3 {
            request.members = vec![k::leave_group_request::MemberIdentity::default()];
            let response = client.call(&request, version).await;
            let expected = ErrorCode::UnknownMemberId.code();
            assert_eq!(response.members[0].error_code, expected);
        } else {
            request.member_id = "m".into();
            let code = client.call(&request, version).await.error_code;
            assert_eq!(code, ErrorCode::UnknownMemberId.code());
        }
    }
    for version in 0..=6 {
        let mut request = k::DescribeGroupsRequest::default();
        request.groups = vec!["g".into()];
        let response = client.call(&request, version).await;
        let expected = if version >= 6 {
            ErrorCode::GroupIdNotFound.code()
        } else {
            0
        };
        assert_eq!(response.groups[0].error_code, expected);
        assert_eq!(&*response.groups[0].group_state, "Dead");
    }
}

#[tokio::test]
async fn offsets_are_committed_and_fetched_in_every_version() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    let mut find = k::FindCoordinatorRequest::default();
    find.key = "g".into();
    client.call(&find, 0).await;
    let topic_id = cluster
        .controller
        .image
        .borrow()
        .topic_by_name("t")
        .unwrap()
        .topic_id;
    let topic_id = kafka_wire_core::Uuid::from_bytes(*topic_id.0.as_bytes());
    for version in 2..=10 {
        let mut partition = k::offset_commit_request::OffsetCommitRequestPartition::default();
        partition.committed_offset = 42;
        let mut topic = k::offset_commit_request::OffsetCommitRequestTopic::default();
        if version >= 10 {
            topic.topic_id = topic_id;
        } else {
            topic.name = "t".into();
        }
        let mut missing = partition.clone();
        missing.partition_index = 77;
        topic.partitions = vec![partition, missing];
        let mut request = k::OffsetCommitRequest::default();
        request.group_id = "g".into();
        request.topics = vec![topic];
        let response = client.call(&request, version).await;
        let codes: Vec<i16> = response.topics[0]
            .partitions
            .iter()
            .map(|p| p.error_code)
            .collect();
        assert_eq!(
            codes,
            vec![0, ErrorCode::UnknownTopicOrPartition.code()],
            "{version}"
        );
    }
    for version in 1..=10 {
        let mut request = k::OffsetFetchRequest::default();
        if version >= 8 {
            let mut topic = k::offset_fetch_request::OffsetFetchRequestTopics::default();
            if version >= 10 {
                topic.topic_id = topic_id;
            } else {
                topic.name = "t".into();
            }
            topic.partition_indexes = vec![0, 1];
            let mut group = k::offset_fetch_request::OffsetFetchRequestGroup::default();
            group.group_id = "g".into();
            group.topics = Some(vec![topic]);
            let mut all = k::offset_fetch_request::OffsetFetchRequestGroup::default();
            all.group_id = "h".into();
            all.topics = None;
            request.groups = vec![group, all];
            let response = client.call(&request, version).await;
            let offsets: Vec<i64> = response.groups[0].topics[0]
                .partitions
                .iter()
                .map(|p| p.committed_offset)
                .collect();
            assert_eq!(offsets, vec![42, -1], "version {version}");
            assert_eq!(
                response.groups[1].topics[0].partitions[0].committed_offset,
                42
            );
        } else {
            let mut topic = k::offset_fetch_request::OffsetFetchRequestTopic::default();
            topic.name = "t".into();
            topic.partition_indexes = vec![0, 1];
            request.group_id = "g".into();
            request.topics = Some(vec![topic]);
            let response = client.call(&request, version).await;
            let offsets: Vec<i64> = response.topics[0]
                .partitions
                .iter()
                .map(|p| p.committed_offset)
                .collect();
            assert_eq!(offsets, vec![42, -1], "version {version}");
        }
    }
}

#[tokio::test]
async fn offsets_of_partitions_come_from_their_leaders_in_every_version() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for version in 1..=11 {
        let mut topic = k::list_offsets_request::ListOffsetsTopic::default();
        topic.name = "t".into();
        for index in 0..4 {
            let mut partition = k::list_offsets_request::ListOffsetsPartition::default();
            partition.partition_index = index;
            partition.current_leader_epoch = -1;
            partition.timestamp = -1;
            topic.partitions.push(partition);
        }
        let mut request = k::ListOffsetsRequest::default();
        request.replica_id = -1;
        request.topics = vec![topic];
        let response = client.call(&request, version).await;
        let seen: Vec<(i16, i64)> = response.topics[0]
            .partitions
            .iter()
            .map(|p| (p.error_code, p.offset))
            .collect();
        let missing = ErrorCode::UnknownTopicOrPartition.code();
        assert_eq!(
            seen,
            vec![(0, 101), (0, 102), (0, 103), (missing, -1)],
            "{version}"
        );
    }
    for version in 2..=4 {
        let mut partition = k::offset_for_leader_epoch_request::OffsetForLeaderPartition::default();
        partition.leader_epoch = 4;
        let mut topic = k::offset_for_leader_epoch_request::OffsetForLeaderTopic::default();
        topic.topic = "t".into();
        topic.partitions = vec![partition];
        let mut request = k::OffsetForLeaderEpochRequest::default();
        request.replica_id = -1;
        request.topics = vec![topic];
        let response = client.call(&request, version).await;
        let end = &response.topics[0].partitions[0];
        assert_eq!(
            (end.error_code, end.leader_epoch, end.end_offset),
            (0, 4, 9)
        );
    }
}

#[tokio::test]
async fn records_are_deleted_by_the_leaders_in_every_version() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for version in 0..=2 {
        let mut topic = k::delete_records_request::DeleteRecordsTopic::default();
        topic.name = "t".into();
        for (index, offset) in [(0, 7), (1, -1), (2, 51), (3, 1)] {
            let mut partition = k::delete_records_request::DeleteRecordsPartition::default();
            partition.partition_index = index;
            partition.offset = offset;
            topic.partitions.push(partition);
        }
        let mut request = k::DeleteRecordsRequest::default();
        request.topics = vec![topic];
        request.timeout_ms = 1000;
        let response = client.call(&request, version).await;
        let seen: Vec<(i16, i64)> = response.topics[0]
            .partitions
            .iter()
            .map(|p| (p.error_code, p.low_watermark))
            .collect();
        let out_of_range = ErrorCode::OffsetOutOfRange.code();
        let missing = ErrorCode::UnknownTopicOrPartition.code();
        assert_eq!(
            seen,
            vec![(0, 7), (0, 50), (out_of_range, -1), (missing, -1)],
            "{version}"
        );
    }
}

#[tokio::test]
async fn admin_requests_work_in_every_version() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for version in 2..=7 {
        let mut topic = k::create_topics_request::CreatableTopic::default();
        topic.name = format!("made-{version}").into();
        topic.num_partitions = 2;
        topic.replication_factor = 1;
        let mut request = k::CreateTopicsRequest::default();
        request.topics = vec![topic];
        request.timeout_ms = 1000;
        let response = client.call(&request, version).await;
        assert_eq!(response.topics[0].error_code, 0, "version {version}");
        let response = client.call(&request, version).await;
        assert_eq!(
            response.topics[0].error_code,
            ErrorCode::TopicAlreadyExists.code()
        );
    }
    for version in 1..=6 {
        let mut request = k::DeleteTopicsRequest::default();
        let name: kafka_wire_core::StrBytes = format!("made-{}", version + 1).into();
        if version >= 6 {
            let mut topic = k::delete_topics_request::DeleteTopicState::default();
            topic.name = Some(name);
            request.topics = vec![topic];
        } else {
            request.topic_names = vec![name];
        }
        let response = client.call(&request, version).await;
        assert_eq!(response.responses[0].error_code, 0, "version {version}");
        let response = client.call(&request, version).await;
        let unknown = ErrorCode::UnknownTopicOrPartition.code();
        assert_eq!(response.responses[0].error_code, unknown);
    }
    for version in 0..=3 {
        let mut topic = k::create_partitions_request::CreatePartitionsTopic::default();
        topic.name = "t".into();
        topic.count = 1;
        let mut request = k::CreatePartitionsRequest::default();
        request.topics = vec![topic];
        let response = client.call(&request, version).await;
        assert_eq!(
            response.results[0].error_code,
            ErrorCode::InvalidPartitions.code()
        );
        assert_eq!(
            response.results[0].error_message.as_deref(),
            Some("too few")
        );
    }
    for version in 0..=5 {
        let request = k::InitProducerIdRequest::default();
        let mut plain = request.clone();
        plain.transactional_id = None;
        let response = client.call(&plain, version).await;
        assert_eq!((response.error_code, response.producer_epoch), (0, 0));
        assert_eq!(response.producer_id, 5000 + i64::from(version));
        let mut transactional = request;
        transactional.transactional_id = Some("tx".into());
        let response = client.call(&transactional, version).await;
        assert_eq!(response.error_code, ErrorCode::UnsupportedVersion.code());
    }
    for version in 0..=2 {
        let response = client
            .call(&k::DescribeClusterRequest::default(), version)
            .await;
        assert_eq!((response.error_code, response.brokers.len()), (0, 3));
        assert_eq!(&*response.cluster_id, "test-cluster");
    }
}

#[tokio::test]
async fn configs_are_changed_and_described_in_every_version() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for version in 0..=1 {
        let mut config = k::incremental_alter_configs_request::AlterableConfig::default();
        config.name = "retention.ms".into();
        config.value = Some("1234".into());
        let mut resource = k::incremental_alter_configs_request::AlterConfigsResource::default();
        resource.resource_type = 2;
        resource.resource_name = "t".into();
        resource.configs = vec![config];
        let mut broker = resource.clone();
        broker.resource_type = 4;
        broker.resource_name = "1".into();
        let mut request = k::IncrementalAlterConfigsRequest::default();
        request.resources = vec![resource, broker];
        let response = client.call(&request, version).await;
        let codes: Vec<i16> = response.responses.iter().map(|r| r.error_code).collect();
        assert_eq!(codes, vec![0, ErrorCode::InvalidRequest.code()]);
    }
    for version in 1..=4 {
        let resource = |kind, name: &str| {
            let mut resource = k::describe_configs_request::DescribeConfigsResource::default();
            resource.resource_type = kind;
            resource.resource_name = name.into();
            resource.configuration_keys = None;
            resource
        };
        let mut request = k::DescribeConfigsRequest::default();
        request.resources = vec![resource(2, "t"), resource(4, "1"), resource(2, "none")];
        request.include_synonyms = true;
        let response = client.call(&request, version).await;
        let [topic, broker, none] = &response.results[..] else {
            panic!("three were asked")
        };
        let config = topic
            .configs
            .iter()
            .find(|c| &*c.name == "retention.ms")
            .unwrap();
        assert_eq!(
            (config.value.as_deref(), config.config_source),
            (Some("1234"), 1)
        );
        assert_eq!(config.synonyms.len(), 2);
        assert!(
            broker
                .configs
                .iter()
                .any(|c| &*c.name == "message.max.bytes")
        );
        assert_eq!(none.error_code, ErrorCode::UnknownTopicOrPartition.code());
    }
}

#[tokio::test]
async fn versions_from_the_future_are_refused_and_do_no_harm() {
    let cluster = Cluster::start(1).await;
    for api in Api::ALL {
        for version in [api.versions().1 + 1, i16::MAX, -1] {
            let mut client = cluster.client(0).await;
            let mut frame = api.key().to_be_bytes().to_vec();
            frame.extend(version.to_be_bytes());
            frame.extend([0, 0, 0, 5, 0xff, 0xff]);
            frame.extend([0; 40]);
            client.send_raw(&(frame.len() as i32).to_be_bytes()).await;
            client.send_raw(&frame).await;
            let answer = client.frame().await;
            if let Some(answer) = &answer {
                assert_eq!(answer[..4], [0, 0, 0, 5], "{}", api.name());
            }
            if *api == Api::ApiVersions {
                assert_eq!(answer.unwrap()[4..6], 35i16.to_be_bytes());
            }
        }
    }
    let mut client = cluster.client(0).await;
    for version in 0..=5 {
        let response = client
            .call(&k::ApiVersionsRequest::default(), version)
            .await;
        assert_eq!(response.error_code, 0);
        let produce = response
            .api_keys
            .iter()
            .find(|api| api.api_key == 0)
            .unwrap();
        assert_eq!((produce.min_version, produce.max_version), (0, 13));
        assert_eq!(response.api_keys.len(), Api::ALL.len());
    }
}

#[tokio::test]
async fn malformed_bytes_close_the_connection_and_nothing_else() {
    let cluster = Cluster::start(1).await;
    let huge_array = [
        0, 3, 0, 12, 0, 0, 0, 1, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, 0x07, 0, 0, 0, 0,
    ];
    let mut bad: Vec<Vec<u8>> = vec![
        (-1i32).to_be_bytes().to_vec(),
        i32::MAX.to_be_bytes().to_vec(),
        [&20i32.to_be_bytes()[..], &huge_array[..]].concat(),
        b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n".to_vec(),
        [0, 0, 0, 2, 9, 9].to_vec(),
        // An API that nobody knows.
        [0, 0, 0, 10, 0x7f, 0xff, 0, 0, 0, 0, 0, 1, 0xff, 0xff].to_vec(),
    ];
    // Each API with a body of garbage.
    for api in Api::ALL {
        let mut frame = api.key().to_be_bytes().to_vec();
        frame.extend(api.versions().1.to_be_bytes());
        frame.extend([0, 0, 0, 1, 0xff, 0xff, 0]);
        frame.extend([0xff; 64]);
        bad.push([&(frame.len() as i32).to_be_bytes()[..], &frame].concat());
    }
    for bytes in bad {
        let mut client = cluster.client(0).await;
        client.send_raw(&bytes).await;
        assert_eq!(client.frame().await, None, "{bytes:?}");
    }
    let mut client = cluster.client(0).await;
    assert_eq!(
        client
            .call(&produce("t", 0, -1, 1000), 7)
            .await
            .responses
            .len(),
        1
    );
}

#[tokio::test]
async fn a_gateway_starts_and_serves_while_all_controllers_are_down() {
    let cluster = Cluster::start(1).await;
    let folder = cluster.folder;
    let address = cluster.controller.address;
    cluster.gateway.shut_down().await;
    drop(cluster.controller);
    let gateway = crate::start(config(address, &folder, 1)).await.unwrap();
    let mut client = KafkaClient::connect(gateway.kafka_addresses[0]).await;
    let metadata = client.call(&all_topics(), 1).await;
    assert_eq!(metadata.brokers.len(), 3);
    let response = client.call(&produce("t", 0, -1, 5000), 7).await;
    assert_eq!(partition_of(&response).error_code, 0);
    gateway.shut_down().await;
}

#[tokio::test]
async fn when_the_leader_cannot_be_reached_another_replica_tells_the_new_one() {
    let mut cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    let hint = v1::Leader {
        broker_id: 3,
        leader_epoch: 8,
    };
    cluster.brokers[1].set_mode(ProduceMode::Refuse(PartitionError::NotLeader, Some(hint)));
    cluster.brokers.remove(0);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let response = client.call(&produce("t", 0, -1, 2000), 7).await;
        if partition_of(&response).error_code == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "no other replica was asked");
    }
}

#[tokio::test]
async fn a_stopping_gateway_answers_what_it_took() {
    let cluster = Cluster::start(1).await;
    let broker = cluster.brokers[0].state.clone();
    cluster.brokers[0].set_mode(ProduceMode::Hold);
    let mut client = cluster.client(0).await;
    let mut other = cluster.client(0).await;
    client.send(&produce("t", 0, -1, 10_000), 7).await;
    other.send(&produce("t", 0, -1, 10_000), 7).await;
    broker.wait_for_produced(2).await;
    let stopping = tokio::spawn(cluster.gateway.shut_down());
    broker.released.cancel();
    assert_eq!(
        partition_of(&client.receive::<k::ProduceRequest>(7).await.1).error_code,
        0
    );
    assert_eq!(
        partition_of(&other.receive::<k::ProduceRequest>(7).await.1).error_code,
        0
    );
    timeout(Duration::from_secs(4), stopping)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(client.frame().await, None);
}

#[tokio::test]
async fn the_drain_deadline_ends_connections_that_wait_for_a_broker() {
    let cluster = Cluster::start_with(1, |config| config.limits.drain_timeout_ms = 100).await;
    cluster.brokers[0].set_mode(ProduceMode::Hold);
    let mut client = cluster.client(0).await;
    client.send(&produce("t", 0, -1, 60_000), 7).await;
    cluster.brokers[0].state.wait_for_produced(1).await;
    timeout(Duration::from_secs(4), cluster.gateway.shut_down())
        .await
        .unwrap();
    assert_eq!(client.frame().await, None);
}

#[tokio::test]
async fn too_many_connections_are_closed_at_once() {
    let cluster = Cluster::start_with(1, |config| config.limits.max_connections = 2).await;
    let mut first = cluster.client(0).await;
    first.call(&all_topics(), 1).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        // The connection that waited for the start of the cluster may not be gone yet.
        let mut second = cluster.client(0).await;
        let mut third = cluster.client(0).await;
        let request = k::ApiVersionsRequest::default();
        second.send(&request, 0).await;
        third.send(&request, 0).await;
        let (second, third) = (second.frame().await, third.frame().await);
        assert!(third.is_none());
        if second.is_some() {
            return;
        }
        assert!(Instant::now() < deadline);
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let cluster = Cluster::start_with(1, |config| config.limits.connections_max_idle_ms = 50).await;
    let mut client = cluster.client(0).await;
    assert_eq!(client.frame().await, None);
}

#[tokio::test]
async fn moves_of_replicas_are_asked_for_listed_and_refused_partition_by_partition() {
    use k::alter_partition_reassignments_request::{ReassignablePartition, ReassignableTopic};
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for version in 0..=1 {
        let partition = |index: i32, replicas: Option<Vec<i32>>| {
            let mut partition = ReassignablePartition::default();
            partition.partition_index = index;
            partition.replicas = replicas;
            partition
        };
        let mut topic = ReassignableTopic::default();
        topic.name = "t".into();
        topic.partitions = vec![
            partition(0, Some(vec![1, 2, 3])),
            partition(1, None),
            partition(2, Some(vec![1])),
        ];
        let mut request = k::AlterPartitionReassignmentsRequest::default();
        request.topics = vec![topic];
        request.allow_replication_factor_change = version == 0;
        let response = client.call(&request, version).await;
        let codes: Vec<i16> = response.responses[0]
            .partitions
            .iter()
            .map(|partition| partition.error_code)
            .collect();
        let third = match version {
            0 => ErrorCode::None,
            _ => ErrorCode::InvalidReplicationFactor,
        };
        let expected = [ErrorCode::None, ErrorCode::NoReassignmentInProgress, third];
        assert_eq!(codes, expected.map(ErrorCode::code), "version {version}");
    }

    let mut request = k::ListPartitionReassignmentsRequest::default();
    request.topics = None;
    let all = client.call(&request, 0).await;
    assert_eq!((all.topics.len(), all.topics[0].partitions.len()), (1, 2));
    assert_eq!(all.topics[0].partitions[0].adding_replicas, [1]);
    assert_eq!(all.topics[0].partitions[0].removing_replicas, [3]);
    request.topics = Some(Vec::new());
    assert!(client.call(&request, 0).await.topics.is_empty());
}

#[tokio::test]
async fn preferred_leaders_are_elected_and_unclean_elections_refused() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for (version, election_type, expected) in [
        (0, 0, [ErrorCode::None, ErrorCode::ElectionNotNeeded]),
        (2, 0, [ErrorCode::None, ErrorCode::ElectionNotNeeded]),
        (2, 1, [ErrorCode::InvalidRequest; 2]),
    ] {
        let mut topic = k::elect_leaders_request::TopicPartitions::default();
        topic.topic = "t".into();
        topic.partitions = vec![0, 1];
        let mut request = k::ElectLeadersRequest::default();
        request.election_type = election_type;
        request.topic_partitions = Some(vec![topic]);
        request.timeout_ms = 1000;
        let response = client.call(&request, version).await;
        let results = &response.replica_election_results[0].partition_result;
        let codes: Vec<i16> = results.iter().map(|result| result.error_code).collect();
        assert_eq!(codes, expected.map(ErrorCode::code), "version {version}");
    }
    let mut request = k::UnregisterBrokerRequest::default();
    for (broker_id, expected) in [
        (9, ErrorCode::BrokerIdNotRegistered),
        (1, ErrorCode::InvalidRequest),
    ] {
        request.broker_id = broker_id;
        let response = client.call(&request, 0).await;
        assert_eq!(response.error_code, expected.code());
    }
}

#[tokio::test]
async fn throttles_of_kafkas_tool_are_refused_and_their_removal_is_done_already() {
    use k::incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig};
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for (resource_type, name, config) in [
        (4, "1", "leader.replication.throttled.rate"),
        (2, "t", "follower.replication.throttled.replicas"),
    ] {
        for (operation, expected) in [(0, ErrorCode::InvalidRequest), (1, ErrorCode::None)] {
            let mut change = AlterableConfig::default();
            change.name = config.into();
            change.config_operation = operation;
            change.value = (operation == 0).then(|| "1".into());
            let mut resource = AlterConfigsResource::default();
            resource.resource_type = resource_type;
            resource.resource_name = name.into();
            resource.configs = vec![change];
            let mut request = k::IncrementalAlterConfigsRequest::default();
            request.resources = vec![resource];
            let response = client.call(&request, 1).await;
            let answer = &response.responses[0];
            assert_eq!(answer.error_code, expected.code(), "{config} {operation}");
            let message = answer.error_message.as_deref().unwrap_or_default();
            assert_eq!(message.contains("chronik cluster set"), expected.is_error());
        }
    }
}

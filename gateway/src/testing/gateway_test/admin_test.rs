//! What admin clients ask: topics, their records and configs, moves of replicas, elections.

use super::*;

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
async fn every_broker_has_a_folder_and_one_that_is_away_an_error_that_clients_take() {
    let mut cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    let mut topic = k::describe_log_dirs_request::DescribableLogDirTopic::default();
    topic.topic = "t".into();
    topic.partitions = vec![1];
    let mut named = k::DescribeLogDirsRequest::default();
    named.topics = Some(vec![topic.clone()]);
    topic.partitions = vec![0];
    let mut other = k::DescribeLogDirsRequest::default();
    other.topics = Some(vec![topic]);
    let mut all = k::DescribeLogDirsRequest::default();
    all.topics = None;
    for version in 1..=4 {
        for (request, found) in [(&all, 1), (&named, 1), (&other, 0)] {
            let response = client.call(request, version).await;
            assert_eq!(response.results.len(), 3);
            for result in &response.results {
                assert_eq!((result.error_code, &*result.log_dir), (0, "/data"));
                assert_eq!(result.topics.len(), found, "version {version}");
            }
        }
    }
    let response = client.call(&all, 4).await;
    let topic = &response.results[0].topics[0];
    let partition = &topic.partitions[0];
    assert_eq!(&*topic.name, "t");
    assert_eq!(
        (partition.partition_index, partition.partition_size),
        (1, 70)
    );
    drop(cluster.brokers.pop());
    let storage_error = ErrorCode::KafkaStorageError.code();
    until("the broker that is away has an error", async || {
        let response = client.call(&all, 4).await;
        let codes = response.results.iter().map(|result| result.error_code);
        let mut codes: Vec<i16> = codes.collect();
        codes.sort_unstable();
        codes == [0, 0, storage_error]
    })
    .await;
}

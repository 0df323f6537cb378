//! Fetches and offset look-ups, each over the leaders of its partitions.

use bytes::Bytes;

use super::*;

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
async fn a_fetch_over_several_brokers_is_answered_by_the_first_that_has_something() {
    let cluster = Cluster::start(1).await;
    let records = batch_with_headers(&[]);
    cluster.brokers[1].set_records(11, records.clone());
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
    cluster.brokers[0].set_records(10, records.clone());
    let topic_id = cluster.topic_id();
    let mut client = cluster.client(0).await;
    for version in 4..=18 {
        let mut request = fetch("t", &[0], 100, 1 << 20);
        if version >= 13 {
            request.topics[0].topic = "".into();
            request.topics[0].topic_id = topic_id;
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
        broker.set_records(10 + at as u64, records.clone());
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
    cluster.brokers[2].set_records(10, records.clone());
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

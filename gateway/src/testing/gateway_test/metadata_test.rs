//! What clients are told of brokers, topics and leaders, and how a stale leader is corrected.

use super::*;

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
    assert_eq!(produce_code(&mut client, "by-produce", 1, 5000).await, 0);
}

#[tokio::test]
async fn a_partition_without_a_leader_says_so() {
    let cluster = Cluster::start(1).await;
    cluster.controller.add_topic("headless", 90, &[None]);
    let mut client = cluster.client(0).await;
    until("metadata has the topic", async || {
        let metadata = client.call(&all_topics(), 1).await;
        let mut topics = metadata.topics.iter();
        let Some(topic) = topics.find(|t| t.name.as_deref() == Some("headless")) else {
            return false;
        };
        let partition = &topic.partitions[0];
        let expected = (ErrorCode::LeaderNotAvailable.code(), -1);
        assert_eq!((partition.error_code, partition.leader_id), expected);
        true
    })
    .await;
    let code = produce_code(&mut client, "headless", 0, 1000).await;
    assert_eq!(code, ErrorCode::LeaderNotAvailable.code());
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
async fn when_the_leader_cannot_be_reached_another_replica_tells_the_new_one() {
    let mut cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    let hint = v1::Leader {
        broker_id: 3,
        leader_epoch: 8,
    };
    cluster.brokers[1].set_mode(ProduceMode::Refuse(PartitionError::NotLeader, Some(hint)));
    cluster.brokers.remove(0);
    until("another replica is asked", async || {
        produce_code(&mut client, "t", 0, 2000).await == 0
    })
    .await;
}

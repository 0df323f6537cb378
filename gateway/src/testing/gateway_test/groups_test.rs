//! Consumer groups and their committed offsets, in every version.

use super::*;

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
    let topic_id = cluster.topic_id();
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

//! The coordinator through its gRPC service: requests and errors as gateways see them.

use chronik_proto::v1;
use chronik_proto::v1::groups_server::Groups;
use tonic::Request;

use super::*;
use crate::rpc::groups::GroupsService;

#[tokio::test]
async fn the_service_speaks_the_wire() {
    let broker = Broker::leading(config()).await;
    let service = GroupsService::new(broker.coordinators.clone());
    let request = v1::JoinGroupRequest {
        raft_group_id: GROUP.0,
        consumer_group: "g".to_owned(),
        session_timeout_ms: 10_000,
        rebalance_timeout_ms: 10_000,
        protocol_type: "consumer".to_owned(),
        protocols: vec![v1::GroupProtocol {
            name: "range".to_owned(),
            metadata: Bytes::new(),
        }],
        client_id: "client".to_owned(),
        client_host: "/127.0.0.1".to_owned(),
        require_known_member_id: true,
        ..Default::default()
    };
    let join = |request: v1::JoinGroupRequest| async {
        within(service.join_group(Request::new(request)))
            .await
            .unwrap()
            .into_inner()
    };
    let first = join(request.clone()).await;
    assert_eq!(first.error(), v1::GroupError::MemberIdRequired);
    assert!(
        first.member_id.starts_with("client-"),
        "{}",
        first.member_id
    );
    let known = v1::JoinGroupRequest {
        member_id: first.member_id.clone(),
        ..request.clone()
    };
    let joined = join(known).await;
    assert_eq!(
        (joined.error(), joined.generation),
        (v1::GroupError::None, 1)
    );
    let elsewhere = v1::JoinGroupRequest {
        raft_group_id: 99,
        ..request.clone()
    };
    assert_eq!(
        join(elsewhere).await.error(),
        v1::GroupError::NotCoordinator
    );
    let hasty = v1::JoinGroupRequest {
        session_timeout_ms: 1,
        ..request.clone()
    };
    assert_eq!(
        join(hasty).await.error(),
        v1::GroupError::InvalidSessionTimeout
    );
    let nameless = v1::JoinGroupRequest {
        consumer_group: String::new(),
        ..request.clone()
    };
    assert_eq!(join(nameless).await.error(), v1::GroupError::InvalidGroup);
    let wordy = v1::JoinGroupRequest {
        client_id: "x".repeat(40_000),
        ..request
    };
    assert_eq!(join(wordy).await.error(), v1::GroupError::MetadataTooLarge);

    let offset = |partition, metadata: &str| v1::OffsetToCommit {
        topic: "t".to_owned(),
        partition,
        offset: 5,
        leader_epoch: 1,
        metadata: metadata.to_owned(),
        ..Default::default()
    };
    // During the rebalance a commit is refused, for each of its offsets.
    let commit = v1::CommitOffsetsRequest {
        raft_group_id: GROUP.0,
        consumer_group: "g".to_owned(),
        generation: 1,
        member_id: first.member_id.clone(),
        offsets: vec![offset(0, ""), offset(1, &"x".repeat(4_097))],
        retention_ms: -1,
        ..Default::default()
    };
    let results = |commit: v1::CommitOffsetsRequest| async {
        let response = within(service.commit_offsets(Request::new(commit)))
            .await
            .unwrap();
        let results = response.into_inner().results;
        results
            .iter()
            .map(|result| result.error())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        results(commit.clone()).await,
        vec![v1::GroupError::RebalanceInProgress; 2]
    );
    let sync = v1::SyncGroupRequest {
        raft_group_id: GROUP.0,
        consumer_group: "g".to_owned(),
        generation: 1,
        member_id: first.member_id.clone(),
        assignments: vec![v1::MemberAssignment {
            member_id: first.member_id.clone(),
            assignment: Bytes::from_static(b"p0"),
        }],
        ..Default::default()
    };
    let synced = within(service.sync_group(Request::new(sync)))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (synced.error(), &synced.assignment[..]),
        (v1::GroupError::None, &b"p0"[..])
    );
    let outcomes = results(commit).await;
    assert_eq!(
        outcomes,
        vec![v1::GroupError::None, v1::GroupError::MetadataTooLarge]
    );

    let fetch = v1::FetchOffsetsRequest {
        groups: vec![v1::GroupOffsetsRequest {
            raft_group_id: GROUP.0,
            consumer_group: "g".to_owned(),
            topics: vec![v1::TopicPartitions {
                topic: "t".to_owned(),
                partitions: vec![0, 1],
            }],
            ..Default::default()
        }],
        require_stable: true,
    };
    let fetched = within(service.fetch_offsets(Request::new(fetch)))
        .await
        .unwrap()
        .into_inner();
    let offsets: Vec<_> = fetched.groups[0].offsets.iter().map(|o| o.offset).collect();
    assert_eq!(offsets, vec![5, -1]);
    let listed = service
        .list_groups(Request::new(v1::ListGroupsRequest {}))
        .await
        .unwrap();
    let listed = listed.into_inner();
    assert_eq!(
        (listed.error(), listed.groups[0].state.as_str()),
        (v1::GroupError::None, "Stable")
    );
    let refs = ["g", "nobody"].map(|name| v1::GroupRef {
        raft_group_id: GROUP.0,
        consumer_group: name.to_owned(),
    });
    let describe = v1::DescribeGroupsRequest {
        groups: refs.to_vec(),
    };
    let described = service
        .describe_groups(Request::new(describe))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(described.groups[0].members[0].assignment, &b"p0"[..]);
    assert_eq!(described.groups[1].error(), v1::GroupError::UnknownGroup);
    assert_eq!(described.groups[1].state, "Dead");
    within(broker.coordinators.shutdown()).await;
}

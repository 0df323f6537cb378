//! A fake broker's `Groups` service: one answer for each request, whatever came before.

use bytes::Bytes;
use chronik_proto::v1;
use tonic::{Request, Response};

use super::BrokerService;
use crate::testing::fakes::Answer;

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

//! The gRPC service `Groups`: gateways' requests to the coordinators of consumer groups.
//!
//! Invariant: JoinGroup and SyncGroup wait inside the call and own nothing else; a gateway that
//! drops the call leaves no trace but the membership, which times out by itself.

use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1;
use chronik_proto::v1::groups_server::Groups;
use chronik_telemetry::rpc::server_span;
use chronik_types::id::RaftGroupId;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::consumer_group::coordinator::{Commit, FetchedOffset, GroupDescription, Membership};
use crate::consumer_group::records::STRING_MAX_BYTES;
use crate::consumer_group::state::{Join, JoinRefused, Joined, Sync, Synced};
use crate::consumer_group::{Coordinator, Coordinators, GroupError};

/// Room for the random end of a member id.
const MEMBER_ID_SUFFIX_BYTES: usize = 40;

/// Serves all coordinators of this broker.
#[derive(Clone)]
pub struct GroupsService {
    coordinators: Coordinators,
}

impl GroupsService {
    pub fn new(coordinators: Coordinators) -> GroupsService {
        GroupsService { coordinators }
    }

    fn coordinator(&self, raft_group_id: u64) -> Result<std::sync::Arc<Coordinator>, GroupError> {
        self.coordinators
            .get(RaftGroupId(raft_group_id))
            .ok_or(GroupError::NotCoordinator)
    }

    async fn try_join(&self, request: v1::JoinGroupRequest) -> Result<Joined, JoinRefused> {
        let refused = |error| JoinRefused {
            error,
            member_id: String::new(),
        };
        let coordinator = self.coordinator(request.raft_group_id).map_err(refused)?;
        let group = request.consumer_group.clone();
        coordinator
            .join(&group, to_join(request).map_err(refused)?)
            .await
    }

    async fn try_leave(
        &self,
        request: &v1::LeaveGroupRequest,
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        let members: Vec<_> = request
            .members
            .iter()
            .map(|member| (member.member_id.clone(), member.group_instance_id.clone()))
            .collect();
        self.coordinator(request.raft_group_id)?
            .leave(&request.consumer_group, &members)
            .await
    }

    async fn try_commit(
        &self,
        request: v1::CommitOffsetsRequest,
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        let who = Membership {
            generation: request.generation,
            member_id: request.member_id,
            group_instance_id: request.group_instance_id,
        };
        let retention_ms = (request.retention_ms >= 0).then_some(request.retention_ms);
        let offsets = request.offsets.into_iter().map(to_commit).collect();
        let coordinator = self.coordinator(request.raft_group_id)?;
        coordinator
            .commit(&request.consumer_group, &who, offsets, retention_ms)
            .await
    }

    fn try_fetch(
        &self,
        request: &v1::GroupOffsetsRequest,
    ) -> Result<Vec<FetchedOffset>, GroupError> {
        let coordinator = self.coordinator(request.raft_group_id)?;
        if request.all_topics {
            return coordinator.fetch_offsets(&request.consumer_group, None);
        }
        let topics: Vec<_> = request
            .topics
            .iter()
            .map(|t| (t.topic.clone(), t.partitions.clone()))
            .collect();
        coordinator.fetch_offsets(&request.consumer_group, Some(&topics))
    }
}

#[tonic::async_trait]
impl Groups for GroupsService {
    async fn join_group(
        &self,
        mut request: Request<v1::JoinGroupRequest>,
    ) -> Result<Response<v1::JoinGroupResponse>, Status> {
        let _span = server_span(&mut request, "broker.join_group");
        let response = match self.try_join(request.into_inner()).await {
            Ok(joined) => from_joined(joined),
            Err(refused) => v1::JoinGroupResponse {
                error: to_wire(refused.error).into(),
                error_message: refused.error.to_string(),
                generation: -1,
                member_id: refused.member_id,
                ..Default::default()
            },
        };
        Ok(Response::new(response))
    }

    async fn sync_group(
        &self,
        mut request: Request<v1::SyncGroupRequest>,
    ) -> Result<Response<v1::SyncGroupResponse>, Status> {
        let _span = server_span(&mut request, "broker.sync_group");
        let request = request.into_inner();
        let outcome = match self.coordinator(request.raft_group_id) {
            Ok(coordinator) => {
                let group = request.consumer_group.clone();
                coordinator.sync(&group, to_sync(request)).await
            }
            Err(error) => Err(error),
        };
        Ok(Response::new(match outcome {
            Ok(synced) => from_synced(synced),
            Err(error) => v1::SyncGroupResponse {
                error: to_wire(error).into(),
                error_message: error.to_string(),
                ..Default::default()
            },
        }))
    }

    async fn heartbeat(
        &self,
        mut request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let _span = server_span(&mut request, "broker.heartbeat");
        let request = request.into_inner();
        let who = Membership {
            generation: request.generation,
            member_id: request.member_id,
            group_instance_id: request.group_instance_id,
        };
        let outcome = self
            .coordinator(request.raft_group_id)
            .and_then(|coordinator| coordinator.heartbeat(&request.consumer_group, &who));
        Ok(Response::new(v1::HeartbeatResponse {
            error: code(outcome),
        }))
    }

    async fn leave_group(
        &self,
        mut request: Request<v1::LeaveGroupRequest>,
    ) -> Result<Response<v1::LeaveGroupResponse>, Status> {
        let _span = server_span(&mut request, "broker.leave_group");
        let request = request.into_inner();
        let response = match self.try_leave(&request).await {
            Ok(outcomes) => {
                let members = request.members.into_iter().zip(outcomes);
                let result = |(member, outcome): (v1::LeavingMember, _)| v1::LeavingMemberResult {
                    member_id: member.member_id,
                    group_instance_id: member.group_instance_id,
                    error: code(outcome),
                };
                v1::LeaveGroupResponse {
                    error: v1::GroupError::None.into(),
                    members: members.map(result).collect(),
                }
            }
            Err(error) => v1::LeaveGroupResponse {
                error: to_wire(error).into(),
                members: Vec::new(),
            },
        };
        Ok(Response::new(response))
    }

    async fn commit_offsets(
        &self,
        mut request: Request<v1::CommitOffsetsRequest>,
    ) -> Result<Response<v1::CommitOffsetsResponse>, Status> {
        let _span = server_span(&mut request, "broker.commit_offsets");
        let request = request.into_inner();
        let names: Vec<_> = request
            .offsets
            .iter()
            .map(|offset| (offset.topic.clone(), offset.partition))
            .collect();
        let outcomes = match self.try_commit(request).await {
            Ok(outcomes) => outcomes,
            Err(error) => vec![Err(error); names.len()],
        };
        let result = |((topic, partition), outcome)| v1::OffsetCommitResult {
            topic,
            partition,
            error: code(outcome),
        };
        let results = names.into_iter().zip(outcomes).map(result).collect();
        Ok(Response::new(v1::CommitOffsetsResponse { results }))
    }

    async fn fetch_offsets(
        &self,
        mut request: Request<v1::FetchOffsetsRequest>,
    ) -> Result<Response<v1::FetchOffsetsResponse>, Status> {
        let _span = server_span(&mut request, "broker.fetch_offsets");
        let groups = request.into_inner().groups;
        let answer = |request: v1::GroupOffsetsRequest| match self.try_fetch(&request) {
            Ok(offsets) => v1::GroupOffsets {
                consumer_group: request.consumer_group,
                error: v1::GroupError::None.into(),
                offsets: offsets.into_iter().map(from_fetched).collect(),
            },
            Err(error) => v1::GroupOffsets {
                consumer_group: request.consumer_group,
                error: to_wire(error).into(),
                offsets: Vec::new(),
            },
        };
        let groups = groups.into_iter().map(answer).collect();
        Ok(Response::new(v1::FetchOffsetsResponse { groups }))
    }

    async fn describe_groups(
        &self,
        mut request: Request<v1::DescribeGroupsRequest>,
    ) -> Result<Response<v1::DescribeGroupsResponse>, Status> {
        let _span = server_span(&mut request, "broker.describe_groups");
        let describe = |group: v1::GroupRef| {
            let description = self
                .coordinator(group.raft_group_id)
                .and_then(|coordinator| coordinator.describe(&group.consumer_group));
            match description {
                Ok(description) => from_description(group.consumer_group, description),
                Err(error) => v1::DescribedGroup {
                    consumer_group: group.consumer_group,
                    error: to_wire(error).into(),
                    // Kafka's state of a group that does not exist.
                    state: if error == GroupError::UnknownGroup {
                        "Dead"
                    } else {
                        ""
                    }
                    .to_owned(),
                    ..Default::default()
                },
            }
        };
        let groups = request
            .into_inner()
            .groups
            .into_iter()
            .map(describe)
            .collect();
        Ok(Response::new(v1::DescribeGroupsResponse { groups }))
    }

    async fn list_groups(
        &self,
        mut request: Request<v1::ListGroupsRequest>,
    ) -> Result<Response<v1::ListGroupsResponse>, Status> {
        let _span = server_span(&mut request, "broker.list_groups");
        let mut response = v1::ListGroupsResponse::default();
        for coordinator in self.coordinators.all() {
            match coordinator.list() {
                Ok(groups) => {
                    response
                        .groups
                        .extend(groups.into_iter().map(|group| v1::ListedGroup {
                            consumer_group: group.consumer_group,
                            protocol_type: group.protocol_type,
                            state: group.state.to_owned(),
                        }))
                }
                Err(GroupError::Loading) => {
                    response.error = v1::GroupError::Loading.into();
                }
                // Partitions that are led elsewhere are listed there.
                Err(_) => {}
            }
        }
        Ok(Response::new(response))
    }
}

fn code(outcome: Result<(), GroupError>) -> i32 {
    outcome
        .map_or_else(to_wire, |()| v1::GroupError::None)
        .into()
}

/// The one table from a coordinator's refusal to the wire.
fn to_wire(error: GroupError) -> v1::GroupError {
    match error {
        GroupError::NotCoordinator => v1::GroupError::NotCoordinator,
        GroupError::Loading => v1::GroupError::Loading,
        GroupError::UnknownMember => v1::GroupError::UnknownMember,
        GroupError::IllegalGeneration => v1::GroupError::IllegalGeneration,
        GroupError::InconsistentProtocol => v1::GroupError::InconsistentProtocol,
        GroupError::InvalidSessionTimeout => v1::GroupError::InvalidSessionTimeout,
        GroupError::RebalanceInProgress => v1::GroupError::RebalanceInProgress,
        GroupError::MemberIdRequired => v1::GroupError::MemberIdRequired,
        GroupError::FencedInstance => v1::GroupError::FencedInstance,
        GroupError::GroupFull => v1::GroupError::GroupFull,
        GroupError::InvalidGroup => v1::GroupError::InvalidGroup,
        GroupError::UnknownGroup => v1::GroupError::UnknownGroup,
        GroupError::MetadataTooLarge => v1::GroupError::MetadataTooLarge,
        GroupError::TimedOut => v1::GroupError::TimedOut,
    }
}

/// Refuses names that do not fit Kafka's record formats.
fn to_join(request: v1::JoinGroupRequest) -> Result<Join, GroupError> {
    let prefix = request
        .group_instance_id
        .as_ref()
        .unwrap_or(&request.client_id);
    let names = [
        request.member_id.as_str(),
        request.group_instance_id.as_deref().unwrap_or_default(),
        &request.client_id,
        &request.client_host,
        &request.protocol_type,
    ];
    let protocols = request
        .protocols
        .iter()
        .map(|protocol| protocol.name.as_str());
    let too_long = |name: &str| name.len() > STRING_MAX_BYTES - MEMBER_ID_SUFFIX_BYTES;
    if names.into_iter().chain(protocols).any(too_long) {
        return Err(GroupError::MetadataTooLarge);
    }
    Ok(Join {
        new_member_id: format!("{prefix}-{}", Uuid::new_v4()),
        member_id: request.member_id,
        group_instance_id: request.group_instance_id,
        client_id: request.client_id,
        client_host: request.client_host,
        session_timeout: Duration::from_millis(request.session_timeout_ms.into()),
        rebalance_timeout: Duration::from_millis(request.rebalance_timeout_ms.into()),
        protocol_type: request.protocol_type,
        protocols: request
            .protocols
            .into_iter()
            .map(|p| (p.name, own(&p.metadata)))
            .collect(),
        require_known_member_id: request.require_known_member_id,
        supports_skip_assignment: request.supports_skip_assignment,
    })
}

/// A copy: a slice of the request's buffer would keep all of it alive as long as the group.
fn own(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn to_sync(request: v1::SyncGroupRequest) -> Sync {
    Sync {
        generation: request.generation,
        member_id: request.member_id,
        group_instance_id: request.group_instance_id,
        protocol_type: request.protocol_type,
        protocol_name: request.protocol_name,
        assignments: request
            .assignments
            .into_iter()
            .map(|assignment| (assignment.member_id, own(&assignment.assignment)))
            .collect(),
    }
}

fn to_commit(offset: v1::OffsetToCommit) -> Commit {
    Commit {
        // Anything but 16 bytes: committed by name.
        topic_id: Uuid::from_slice(&offset.topic_id).unwrap_or_default(),
        topic: offset.topic,
        partition: offset.partition,
        offset: offset.offset,
        leader_epoch: offset.leader_epoch,
        metadata: offset.metadata,
    }
}

fn from_joined(joined: Joined) -> v1::JoinGroupResponse {
    let members = joined.members.into_iter().map(|member| v1::GroupMember {
        member_id: member.member_id,
        group_instance_id: member.group_instance_id,
        metadata: member.metadata,
    });
    v1::JoinGroupResponse {
        error: v1::GroupError::None.into(),
        error_message: String::new(),
        generation: joined.generation,
        protocol_type: joined.protocol_type,
        protocol_name: joined.protocol_name,
        leader: joined.leader,
        member_id: joined.member_id,
        members: members.collect(),
        skip_assignment: joined.skip_assignment,
    }
}

fn from_synced(synced: Synced) -> v1::SyncGroupResponse {
    v1::SyncGroupResponse {
        error: v1::GroupError::None.into(),
        error_message: String::new(),
        protocol_type: synced.protocol_type,
        protocol_name: synced.protocol_name,
        assignment: synced.assignment,
    }
}

fn from_fetched(fetched: FetchedOffset) -> v1::CommittedOffset {
    let (offset, leader_epoch, metadata) = match fetched.value {
        Some(value) => (value.offset, value.leader_epoch, value.metadata),
        None => (-1, -1, String::new()),
    };
    v1::CommittedOffset {
        topic: fetched.topic,
        partition: fetched.partition,
        offset,
        leader_epoch,
        metadata,
    }
}

fn from_description(consumer_group: String, group: GroupDescription) -> v1::DescribedGroup {
    let members = group.members.into_iter().map(|member| v1::DescribedMember {
        member_id: member.member_id,
        group_instance_id: member.group_instance_id,
        client_id: member.client_id,
        client_host: member.client_host,
        metadata: member.metadata,
        assignment: member.assignment,
    });
    v1::DescribedGroup {
        consumer_group,
        error: v1::GroupError::None.into(),
        state: group.state.to_owned(),
        protocol_type: group.protocol_type,
        protocol_name: group.protocol_name,
        members: members.collect(),
    }
}

//! DescribeGroups, versions 0 to 6.

use chronik_proto::v1;
use chronik_proto::v1::GroupError;

use super::coordinator::{self, CALL_TIMEOUT};
use crate::error::{ErrorCode, group_error};
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use crate::services::Context;

/// READ, DELETE, DESCRIBE: without ACLs everyone may do everything.
const GROUP_OPERATIONS: i32 = 0x148;
/// From this version on a group that does not exist is an error, not a dead group.
const UNKNOWN_IS_ERROR_FROM: i16 = 6;

pub async fn handle(
    context: Context,
    request: m::DescribeGroupsRequest,
) -> m::DescribeGroupsResponse {
    let mut groups = Vec::with_capacity(request.groups.len());
    for group_id in request.groups {
        let mut group = describe(&context, group_id).await;
        if request.include_authorized_operations && context.version >= 3 {
            group.authorized_operations = GROUP_OPERATIONS;
        }
        groups.push(group);
    }
    message!(m::DescribeGroupsResponse { groups: groups })
}

async fn describe(context: &Context, group_id: StrBytes) -> DescribedGroup {
    let consumer_group = group_id.to_string();
    let answer = coordinator::ask(
        &context.services,
        &group_id,
        CALL_TIMEOUT,
        |mut client, raft_group_id| {
            let consumer_group = consumer_group.clone();
            let groups = vec![v1::GroupRef {
                raft_group_id,
                consumer_group,
            }];
            async move {
                client
                    .describe_groups(v1::DescribeGroupsRequest { groups })
                    .await
            }
        },
        |answer: &v1::DescribeGroupsResponse| {
            answer
                .groups
                .first()
                .map_or(GroupError::NotCoordinator, v1::DescribedGroup::error)
        },
    )
    .await;
    match answer.map(|answer| answer.groups.into_iter().next()) {
        Ok(Some(group)) => match group.error() {
            GroupError::None => described(group_id, group),
            GroupError::UnknownGroup => unknown(group_id, context.version),
            error => failed(group_id, group_error(error)),
        },
        Ok(None) => failed(group_id, ErrorCode::CoordinatorNotAvailable),
        Err(code) => failed(group_id, code),
    }
}

fn described(group_id: StrBytes, group: v1::DescribedGroup) -> DescribedGroup {
    let members = group
        .members
        .into_iter()
        .map(|member| {
            message!(DescribedGroupMember {
                member_id: member.member_id.into(),
                group_instance_id: member.group_instance_id.map(StrBytes::from),
                client_id: member.client_id.into(),
                client_host: member.client_host.into(),
                member_metadata: member.metadata,
                member_assignment: member.assignment,
            })
        })
        .collect();
    message!(DescribedGroup {
        group_id: group_id,
        group_state: group.state.into(),
        protocol_type: group.protocol_type.into(),
        protocol_data: group.protocol_name.into(),
        members: members,
    })
}

fn unknown(group_id: StrBytes, version: i16) -> DescribedGroup {
    let mut group = message!(DescribedGroup {
        group_state: "Dead".into()
    });
    if version >= UNKNOWN_IS_ERROR_FROM {
        group.error_code = ErrorCode::GroupIdNotFound.code();
        group.error_message = Some(format!("group {} not found", &*group_id).into());
    }
    group.group_id = group_id;
    group
}

fn failed(group_id: StrBytes, code: ErrorCode) -> DescribedGroup {
    message!(DescribedGroup {
        group_id: group_id,
        error_code: code.code()
    })
}

//! LeaveGroup, versions 0 to 5: one member, and from version 3 on several.

use chronik_proto::v1;

use super::coordinator::{self, CALL_TIMEOUT};
use crate::error::{ErrorCode, group_error};
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::leave_group_response::MemberResponse;
use crate::services::Context;

/// From this version on members come in a list.
const BATCHES_FROM: i16 = 3;

pub async fn handle(context: Context, request: m::LeaveGroupRequest) -> m::LeaveGroupResponse {
    let batch = context.version >= BATCHES_FROM;
    let group = request.group_id.to_string();
    let members: Vec<v1::LeavingMember> = if batch {
        request
            .members
            .into_iter()
            .map(|member| v1::LeavingMember {
                member_id: member.member_id.to_string(),
                group_instance_id: member.group_instance_id.map(StrBytes::into_string),
            })
            .collect()
    } else {
        vec![v1::LeavingMember {
            member_id: request.member_id.to_string(),
            group_instance_id: None,
        }]
    };
    let answer = coordinator::ask(
        &context.services,
        &group,
        CALL_TIMEOUT,
        |mut client, raft_group_id| {
            let (consumer_group, members) = (group.clone(), members.clone());
            let request = v1::LeaveGroupRequest {
                raft_group_id,
                consumer_group,
                members,
            };
            async move { client.leave_group(request).await }
        },
        v1::LeaveGroupResponse::error,
    )
    .await;
    match answer {
        Ok(answer) if batch => message!(m::LeaveGroupResponse {
            error_code: group_error(answer.error()).code(),
            members: answer.members.into_iter().map(member).collect(),
        }),
        Ok(answer) => message!(m::LeaveGroupResponse {
            error_code: error_of_one(&answer).code()
        }),
        Err(code) => message!(m::LeaveGroupResponse {
            error_code: code.code()
        }),
    }
}

fn member(result: v1::LeavingMemberResult) -> MemberResponse {
    message!(MemberResponse {
        error_code: group_error(result.error()).code(),
        member_id: result.member_id.into(),
        group_instance_id: result.group_instance_id.map(StrBytes::from),
    })
}

/// Before version 3 there is one error for the request and its only member.
fn error_of_one(answer: &v1::LeaveGroupResponse) -> ErrorCode {
    match group_error(answer.error()) {
        ErrorCode::None => answer
            .members
            .first()
            .map_or(ErrorCode::None, |member| group_error(member.error())),
        error => error,
    }
}

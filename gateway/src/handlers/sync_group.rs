//! SyncGroup, versions 0 to 5.

use std::time::Duration;

use chronik_proto::v1;

use super::coordinator;
use crate::error::group_error;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::services::Context;

/// A follower waits for the leader's assignment; the coordinator ends that by its session timeout,
/// which Kafka bounds at 30 minutes.
const WAIT: Duration = Duration::from_secs(30 * 60);

pub async fn handle(context: Context, request: m::SyncGroupRequest) -> m::SyncGroupResponse {
    let group = request.group_id.to_string();
    let wire = v1::SyncGroupRequest {
        raft_group_id: 0,
        consumer_group: group.clone(),
        generation: request.generation_id,
        member_id: request.member_id.to_string(),
        group_instance_id: request.group_instance_id.map(StrBytes::into_string),
        protocol_type: request.protocol_type.map(StrBytes::into_string),
        protocol_name: request.protocol_name.map(StrBytes::into_string),
        assignments: request
            .assignments
            .into_iter()
            .map(|a| v1::MemberAssignment {
                member_id: a.member_id.to_string(),
                assignment: a.assignment,
            })
            .collect(),
    };
    let answer = coordinator::ask(
        &context.services,
        &group,
        WAIT,
        |mut client, raft_group_id| {
            let request = v1::SyncGroupRequest {
                raft_group_id,
                ..wire.clone()
            };
            async move { client.sync_group(request).await }
        },
        v1::SyncGroupResponse::error,
    )
    .await;
    match answer {
        Ok(answer) => message!(m::SyncGroupResponse {
            error_code: group_error(answer.error()).code(),
            protocol_type: answer.protocol_type.map(StrBytes::from),
            protocol_name: answer.protocol_name.map(StrBytes::from),
            assignment: answer.assignment,
        }),
        Err(code) => message!(m::SyncGroupResponse {
            error_code: code.code()
        }),
    }
}

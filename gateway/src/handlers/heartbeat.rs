//! Heartbeat of a classic group's member, versions 0 to 4.

use chronik_proto::v1;

use super::coordinator::{self, CALL_TIMEOUT};
use crate::error::group_error;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::services::Context;

pub async fn handle(context: Context, request: m::HeartbeatRequest) -> m::HeartbeatResponse {
    let group = request.group_id.to_string();
    let wire = v1::HeartbeatRequest {
        raft_group_id: 0,
        consumer_group: group.clone(),
        generation: request.generation_id,
        member_id: request.member_id.to_string(),
        group_instance_id: request.group_instance_id.map(StrBytes::into_string),
    };
    let answer = coordinator::ask(
        &context.services,
        &group,
        CALL_TIMEOUT,
        |mut client, raft_group_id| {
            let request = v1::HeartbeatRequest {
                raft_group_id,
                ..wire.clone()
            };
            async move { client.heartbeat(request).await }
        },
        v1::HeartbeatResponse::error,
    )
    .await;
    let error = match answer {
        Ok(answer) => group_error(answer.error()),
        Err(code) => code,
    };
    message!(m::HeartbeatResponse {
        error_code: error.code()
    })
}

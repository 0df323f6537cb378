//! JoinGroup, versions 0 to 9.

use std::time::Duration;

use chronik_proto::v1;

use super::coordinator;
use crate::error::{ErrorCode, group_error};
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::join_group_response::JoinGroupResponseMember;
use crate::services::Context;

/// From this version on an unknown member gets its id before it joins (KIP-394).
const KNOWN_MEMBER_ID_FROM: i16 = 4;
/// From this version on the leader may keep the assignment (KIP-814).
const SKIP_ASSIGNMENT_FROM: i16 = 9;
/// From this version on protocol type and name may be null.
const NULLABLE_PROTOCOL_FROM: i16 = 7;
/// The coordinator answers within the rebalance timeout; this much later it is given up.
const GRACE: Duration = Duration::from_secs(10);

pub async fn handle(context: Context, request: m::JoinGroupRequest) -> m::JoinGroupResponse {
    let version = context.version;
    let member_id = request.member_id.clone();
    let group = request.group_id.to_string();
    let wire = wire_request(&context, request);
    let wait = Duration::from_millis(
        u64::from(wire.rebalance_timeout_ms).max(u64::from(wire.session_timeout_ms)),
    );
    let answer = coordinator::ask(
        &context.services,
        &group,
        wait.saturating_add(GRACE),
        |mut client, raft_group_id| {
            let request = v1::JoinGroupRequest {
                raft_group_id,
                ..wire.clone()
            };
            async move { client.join_group(request).await }
        },
        v1::JoinGroupResponse::error,
    )
    .await;
    match answer {
        Ok(answer) => response(answer, version),
        Err(code) => failed(code, member_id, version),
    }
}

fn wire_request(context: &Context, request: m::JoinGroupRequest) -> v1::JoinGroupRequest {
    let millis = |number: i32| u32::try_from(number).unwrap_or(0);
    let session_timeout_ms = millis(request.session_timeout_ms);
    v1::JoinGroupRequest {
        raft_group_id: 0,
        consumer_group: request.group_id.to_string(),
        session_timeout_ms,
        // Version 0 has no rebalance timeout.
        rebalance_timeout_ms: match request.rebalance_timeout_ms {
            -1 => session_timeout_ms,
            timeout => millis(timeout),
        },
        member_id: request.member_id.to_string(),
        group_instance_id: request.group_instance_id.map(StrBytes::into_string),
        protocol_type: request.protocol_type.to_string(),
        protocols: request
            .protocols
            .into_iter()
            .map(|p| v1::GroupProtocol {
                name: p.name.to_string(),
                metadata: p.metadata,
            })
            .collect(),
        client_id: context.client_id.clone(),
        client_host: format!("/{}", context.origin.client_host),
        require_known_member_id: context.version >= KNOWN_MEMBER_ID_FROM,
        supports_skip_assignment: context.version >= SKIP_ASSIGNMENT_FROM,
    }
}

fn response(answer: v1::JoinGroupResponse, version: i16) -> m::JoinGroupResponse {
    let error = group_error(answer.error());
    let members = answer
        .members
        .into_iter()
        .map(|member| {
            message!(JoinGroupResponseMember {
                member_id: member.member_id.into(),
                group_instance_id: member.group_instance_id.map(StrBytes::from),
                metadata: member.metadata,
            })
        })
        .collect();
    let name = answer.protocol_name.map(StrBytes::from);
    message!(m::JoinGroupResponse {
        error_code: error.code(),
        generation_id: if error.is_error() {
            -1
        } else {
            answer.generation
        },
        protocol_type: answer.protocol_type.map(StrBytes::from),
        protocol_name: never_null_before(version, name),
        leader: answer.leader.into(),
        skip_assignment: answer.skip_assignment && version >= SKIP_ASSIGNMENT_FROM,
        member_id: answer.member_id.into(),
        members: members,
    })
}

fn failed(code: ErrorCode, member_id: StrBytes, version: i16) -> m::JoinGroupResponse {
    message!(m::JoinGroupResponse {
        error_code: code.code(),
        generation_id: -1,
        protocol_name: never_null_before(version, None),
        member_id: member_id,
    })
}

fn never_null_before(version: i16, name: Option<StrBytes>) -> Option<StrBytes> {
    match name {
        None if version < NULLABLE_PROTOCOL_FROM => Some(StrBytes::default()),
        name => name,
    }
}

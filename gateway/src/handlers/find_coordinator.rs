//! FindCoordinator, versions 0 to 6. Creates `__consumer_offsets` for the first that asks.

use super::{coordinator, resolve};
use crate::error::ErrorCode;
use crate::metadata_cache::Snapshot;
use crate::protocol::fetch::NodeEndpoint;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::find_coordinator_response::Coordinator;
use crate::services::Context;

/// Key types: 0 group, 1 transaction, 2 share group.
const GROUP: i8 = 0;
/// From this version on several keys are asked for at once.
const BATCHES_FROM: i16 = 4;
const UNSUPPORTED: &str = "only coordinators of consumer groups exist; transactions and share \
                           groups are not supported yet";

pub async fn handle(
    context: Context,
    request: m::FindCoordinatorRequest,
) -> m::FindCoordinatorResponse {
    let ensured = if request.key_type == GROUP {
        context.services.ensure_offsets_topic().await.map(|_| ())
    } else {
        Err(ErrorCode::UnsupportedVersion)
    };
    let snapshot = context.services.cache.load();
    let find = |key: &StrBytes| {
        ensured.map_err(|code| match code {
            ErrorCode::UnsupportedVersion => code,
            // Whatever keeps the topic from being created, asking again is right.
            _ => ErrorCode::CoordinatorNotAvailable,
        })?;
        node_of(&context, &snapshot, key)
    };
    if context.version < BATCHES_FROM {
        return answer_one(find(&request.key), context.version);
    }
    let coordinators = request
        .coordinator_keys
        .iter()
        .map(|key| answer(key, find(key)))
        .collect();
    message!(m::FindCoordinatorResponse {
        coordinators: coordinators
    })
}

fn node_of(
    context: &Context,
    snapshot: &Snapshot,
    key: &StrBytes,
) -> Result<NodeEndpoint, ErrorCode> {
    if key.is_empty() {
        return Err(ErrorCode::InvalidGroupId);
    }
    let partition = coordinator::partition_of(snapshot, key)?;
    let leader = context.services.router.leader(&partition);
    leader
        .filter(|leader| snapshot.image.is_live(leader.broker_id))
        .and_then(|leader| resolve::node(snapshot, leader.broker_id))
        .ok_or(ErrorCode::CoordinatorNotAvailable)
}

fn message_of(code: ErrorCode) -> Option<StrBytes> {
    (code == ErrorCode::UnsupportedVersion).then(|| UNSUPPORTED.into())
}

fn answer(key: &StrBytes, found: Result<NodeEndpoint, ErrorCode>) -> Coordinator {
    match found {
        Ok(node) => message!(Coordinator {
            key: key.clone(),
            node_id: node.broker_id,
            host: node.host.into(),
            port: i32::from(node.port),
        }),
        Err(code) => message!(Coordinator {
            key: key.clone(),
            node_id: -1,
            port: -1,
            error_code: code.code(),
            error_message: message_of(code),
        }),
    }
}

fn answer_one(found: Result<NodeEndpoint, ErrorCode>, version: i16) -> m::FindCoordinatorResponse {
    match found {
        Ok(node) => message!(m::FindCoordinatorResponse {
            node_id: node.broker_id,
            host: node.host.into(),
            port: i32::from(node.port),
        }),
        Err(code) => message!(m::FindCoordinatorResponse {
            error_code: code.code(),
            error_message: message_of(code).filter(|_| version >= 1),
            node_id: -1,
            port: -1,
        }),
    }
}

//! ApiVersions, versions 0 to 5: the table of `protocol::versions`.
//!
//! Invariant: a client that does not say what it is, or that was led here by another cluster's metadata, is told so and
//! gets no table.

use chronik_types::id::BrokerId;

use crate::error::ErrorCode;
use crate::metadata_cache::Snapshot;
use crate::protocol::messages as m;
use crate::protocol::versions::advertised;
use crate::services::Context;

pub async fn handle(context: Context, request: m::ApiVersionsRequest) -> m::ApiVersionsResponse {
    let is_named =
        is_name(&request.client_software_name) && is_name(&request.client_software_version);
    let refused = if context.version >= 3 && !is_named {
        Some(ErrorCode::InvalidRequest)
    } else if context.version >= 5 && is_misrouted(&context.services.cache.load(), &request) {
        Some(ErrorCode::RebootstrapRequired)
    } else {
        None
    };
    if let Some(error) = refused {
        return message!(m::ApiVersionsResponse {
            error_code: error.code(),
            finalized_features_epoch: -1
        });
    }
    message!(m::ApiVersionsResponse {
        api_keys: advertised(),
        finalized_features_epoch: -1
    })
}

/// A client's name or version as KIP-511 wants it: letters and digits, with `-` and `.` between them.
fn is_name(text: &str) -> bool {
    let is_inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    let ends = [text.bytes().next(), text.bytes().next_back()];
    ends.iter()
        .all(|end| end.is_some_and(|b| b.is_ascii_alphanumeric()))
        && text.bytes().all(is_inner)
}

/// The client means another cluster, or a broker that this one does not have (KIP-1242). Any endpoint serves every
/// broker's partitions, so a client that reaches a broker by another one's endpoint is right here.
fn is_misrouted(snapshot: &Snapshot, request: &m::ApiVersionsRequest) -> bool {
    let image = &snapshot.image;
    let other_cluster = request
        .cluster_id
        .as_ref()
        .is_some_and(|id| id.as_str() != image.cluster_id.as_str());
    let no_broker = request.node_id >= 0 && !image.brokers.contains_key(&BrokerId(request.node_id));
    snapshot.is_known() && (other_cluster || no_broker)
}

/// The answer to a version from the future, in version 0.
pub fn unsupported() -> m::ApiVersionsResponse {
    message!(m::ApiVersionsResponse {
        error_code: ErrorCode::UnsupportedVersion.code(),
        api_keys: advertised(),
        finalized_features_epoch: -1,
    })
}

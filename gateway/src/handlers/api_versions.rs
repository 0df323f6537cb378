//! ApiVersions, versions 0 to 5: the table of `protocol::versions`.
//!
//! Invariant: a client that does not say what it is, or that was led here by another cluster's metadata, is told so and
//! gets no table.

use crate::error::ErrorCode;
use crate::metadata_cache::Snapshot;
use crate::protocol::messages as m;
use crate::protocol::messages::api_versions_response::ApiVersion;
use crate::protocol::versions::advertised;
use crate::services::Context;

pub async fn handle(context: Context, request: m::ApiVersionsRequest) -> m::ApiVersionsResponse {
    let is_named =
        is_name(&request.client_software_name) && is_name(&request.client_software_version);
    // A broker of which cluster?
    let is_vague = request.node_id >= 0 && request.cluster_id.is_none();
    let refused = if context.version >= 3 && !is_named || context.version >= 5 && is_vague {
        Some(ErrorCode::InvalidRequest)
    } else if context.version >= 5 && is_misrouted(&context.services.cache.load(), &request) {
        Some(ErrorCode::RebootstrapRequired)
    } else {
        None
    };
    match refused {
        Some(error) => answer(error, Vec::new()),
        None => answer(ErrorCode::None, advertised()),
    }
}

fn answer(error: ErrorCode, api_keys: Vec<ApiVersion>) -> m::ApiVersionsResponse {
    message!(m::ApiVersionsResponse {
        error_code: error.code(),
        api_keys: api_keys,
        finalized_features_epoch: -1,
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

/// The client means another cluster (KIP-1242). Which broker it means is all the same: any endpoint serves every
/// broker's partitions.
fn is_misrouted(snapshot: &Snapshot, request: &m::ApiVersionsRequest) -> bool {
    let meant = request.cluster_id.as_ref();
    snapshot.is_known() && meant.is_some_and(|id| id.as_str() != snapshot.image.cluster_id.as_str())
}

/// The answer to a version from the future, in version 0.
pub fn unsupported() -> m::ApiVersionsResponse {
    answer(ErrorCode::UnsupportedVersion, advertised())
}

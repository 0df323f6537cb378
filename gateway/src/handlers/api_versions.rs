//! ApiVersions, versions 0 to 5: the table of `protocol::versions`.

use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::versions::advertised;
use crate::services::Context;

pub async fn handle(_: Context, _: m::ApiVersionsRequest) -> m::ApiVersionsResponse {
    message!(m::ApiVersionsResponse {
        api_keys: advertised(),
        finalized_features_epoch: -1
    })
}

/// The answer to a version from the future, in version 0.
pub fn unsupported() -> m::ApiVersionsResponse {
    message!(m::ApiVersionsResponse {
        error_code: ErrorCode::UnsupportedVersion.code(),
        api_keys: advertised(),
        finalized_features_epoch: -1,
    })
}

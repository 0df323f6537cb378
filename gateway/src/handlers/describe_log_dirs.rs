//! DescribeLogDirs, versions 1 to 4: each broker has one log dir, of which nothing is told yet, and that
//! is said as an error. Kafka's kafka-reassign-partitions asks for it and goes on without.

use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::describe_log_dirs_response::DescribeLogDirsResult;
use crate::services::Context;

pub async fn handle(
    _context: Context,
    _request: m::DescribeLogDirsRequest,
) -> m::DescribeLogDirsResponse {
    let dir = message!(DescribeLogDirsResult {
        error_code: ErrorCode::UnsupportedVersion.code(),
        log_dir: "data".into(),
    });
    message!(m::DescribeLogDirsResponse { results: vec![dir] })
}

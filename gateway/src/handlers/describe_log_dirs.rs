//! DescribeLogDirs, versions 1 to 4: no log dir is told of yet. Kafka's kafka-reassign-partitions asks
//! for it before it does anything, and goes on without.

use crate::protocol::messages as m;
use crate::services::Context;

pub async fn handle(
    _context: Context,
    _request: m::DescribeLogDirsRequest,
) -> m::DescribeLogDirsResponse {
    m::DescribeLogDirsResponse::default()
}
